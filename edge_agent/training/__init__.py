"""Private training: its parts run in a process of their own."""
