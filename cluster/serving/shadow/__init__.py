"""Samples of what a server answered, replayed through a reference by a process of its own."""
