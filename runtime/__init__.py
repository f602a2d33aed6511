"""Executes one stage's part of a plan on one device: weights, layers, KV pages, sampling. Knows no Ray."""
