"""GGUF files as checkpoints: metadata as configuration and tokenizer, blocks as affine codes."""
