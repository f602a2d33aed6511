"""Owns processes: Ray actors, the engine loop, batch jobs and the command line."""
