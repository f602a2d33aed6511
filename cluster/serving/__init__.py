"""`headrace serve`: an engine behind HTTP, as OpenAI's clients speak it."""
