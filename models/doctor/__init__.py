"""What `edge-agent doctor` and `fl-server doctor` both look at."""
