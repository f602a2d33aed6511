"""Checkpoints made smaller by leaving layers, neurons, heads and single weights out."""
