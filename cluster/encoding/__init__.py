"""Texts to token ids: in pieces, with what texts begin with kept."""
