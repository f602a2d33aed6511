"""Weights on their way: storages, tiers, the ring, experts."""
