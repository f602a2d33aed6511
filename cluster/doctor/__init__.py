"""What is right and wrong with a machine, or with each node of a Ray cluster: `headrace doctor`."""
