"""OpenAI's files and batches: jobs of many requests that a server works off beside its clients."""
