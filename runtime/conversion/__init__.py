"""From a checkpoint to a store, and what an architecture has to be for it."""
