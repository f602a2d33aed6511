"""Adapters: low-rank changes of a model's matrices, as PEFT saves them, many in one batch."""
