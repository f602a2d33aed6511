"""Weights as views of the bytes they were stored in, one class a format."""
