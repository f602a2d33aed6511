"""config.json of a model with fewer layers, neurons or heads."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_LEADING = ("first_k_dense_replace",)
"""Settings that say how many of the first layers are of another kind."""
_INDEXES = ("mlp_only_layers",)
"""Lists of layers' indexes."""


def with_layers(
    described: dict[str, Any], config: PretrainedConfig, kept: Sequence[int]
) -> dict[str, Any]:
    """`described`, the JSON of `config`, for a model of the layers `kept` (ascending) alone.

    What there is of each layer (layer_types, ...) is written out even where it was left to defaults, which
    go by a layer's index.
    """
    described, parsed = copy.deepcopy(described), config.to_dict()
    count = parsed["num_hidden_layers"]
    for key, value in parsed.items():
        if key in _INDEXES and isinstance(value, list):
            described[key] = [new for new, old in enumerate(kept) if old in value]
        elif key in _LEADING and isinstance(value, int):
            described[key] = sum(old < value for old in kept)
        elif isinstance(value, list) and len(value) == count and not key.endswith("token_id"):
            described[key] = [value[old] for old in kept]
        elif key != "id2label" and _goes_by_index(value):
            described[key] = {
                str(new): value[str(old)] for new, old in enumerate(kept) if str(old) in value
            }
    described["num_hidden_layers"] = len(kept)
    return described


def _goes_by_index(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def with_neurons(described: dict[str, Any], count: int) -> dict[str, Any]:
    """For MLPs of so many neurons."""
    return {**described, "intermediate_size": count}


def with_head_groups(
    described: dict[str, Any], config: PretrainedConfig, groups: int, head_dim: int
) -> dict[str, Any]:
    """For so many groups of as many heads each as before, of `head_dim`, which no longer follows."""
    heads = config.num_attention_heads // kv_heads(config) * groups
    return {
        **described,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def kv_heads(config: PretrainedConfig) -> int:
    """Heads of keys and values in each layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
