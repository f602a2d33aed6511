"""Stores in a cold tier: any filesystem or object store that fsspec knows, and ways there and back."""
