"""What rings do, for whoever watches: `headrace top` and `headrace trace`."""
