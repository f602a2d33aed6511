"""How far a model's predictions are from a text's tokens, and from another model's."""
