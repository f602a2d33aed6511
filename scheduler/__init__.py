"""Decides: requests, pages, passes and placement. Standard library only; integers in, plans out."""
