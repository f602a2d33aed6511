"""Attention over pages: torch on CPUs, Triton on CUDA."""
