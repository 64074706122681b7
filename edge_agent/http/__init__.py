"""The local inference API: Open Inference Protocol v2 over TCP and a Unix socket."""
