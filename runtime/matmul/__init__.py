"""Few rows times 4-bit weights."""
