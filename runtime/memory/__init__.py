"""What a process's memory is made of: measured, not planned."""
