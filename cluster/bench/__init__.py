"""What this machine can do and what a model's shape reaches on it: `headrace bench`."""
