"""The command line: one module a command, wired together in main."""
