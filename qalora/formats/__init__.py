"""What the bytes are: one module a format, tensors and layouts only. Nothing here knows a model family."""
