"""Clients of a server's gRPC port."""
