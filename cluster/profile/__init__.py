"""The memory of a run, measured and compared with its plan: `headrace profile`."""
