"""Models that write: behind an endpoint, or a GGUF on this machine."""
