"""GGUF files as checkpoints: their metadata by transformers, their blocks as affine codes."""
