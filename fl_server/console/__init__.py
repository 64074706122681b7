"""What the coordinator answers over HTTPS, on the loopback behind the proxy."""
