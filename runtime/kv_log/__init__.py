"""Full KV pages on NVMe, found by their keys: append-only, bounded, verified, encrypted."""
