"""Speed and memory, measured beside a peer or a floor in the same run: read the ratios, not the absolutes."""
