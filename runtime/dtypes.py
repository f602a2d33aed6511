"""PyTorch's types by their names, which configurations and plans have."""

import torch


def name_of(dtype: torch.dtype) -> str:
    """ "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
