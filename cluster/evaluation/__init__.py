"""What compression costs: a store beside its reference, in figures, on a page, and as a gate."""
