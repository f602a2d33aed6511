"""Token sequences through a model layer by layer: each layer is read once for all of them."""
