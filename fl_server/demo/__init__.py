"""The whole loop on one machine, as separate processes."""
