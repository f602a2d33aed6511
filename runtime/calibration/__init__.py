"""Quantizing by what a layer is given: statistics of inputs, and roundings that look at them."""
