"""GGUF surgery: read a header without loading weights, widen tensors block by block, write, undo."""
