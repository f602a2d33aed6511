"""From tensor names on disk to places in memory, through transformers' own conversion mapping."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from headrace.scheduler.errors import UnsupportedModelError

EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Attributes of transformers' experts modules that hold matrices, [experts, rows, columns]."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter in memory, or the piece of it (expert, and 0 gate or 1 up) that a tensor fills."""

    name: str
    expert: int | None = None
    part: int | None = None


def map_names(
    model: PreTrainedModel, on_disk: Iterable[str], places: Collection[str] | None = None
) -> dict[str, Target | None]:
    """The place of each tensor; None for tensors that the model has no use for. `places` are those of the model
    as transformers makes it, where some of its modules have been replaced since.

    Raises UnsupportedModelError for a conversion other than renaming or fusing expert matrices.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    places = model.state_dict(keep_vars=True) if places is None else places
    tied = tied_names(model)
    targets: dict[str, Target | None] = {}
    for name in on_disk:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, places
        )
        if renamed not in places and name in places:
            renamed, pattern = name, None
        if renamed not in places or renamed in tied:
            targets[name] = None
        elif pattern is None:
            targets[name] = Target(renamed)
        else:
            targets[name] = _piece(name, renamed, pattern, by_pattern[pattern])
    return targets


def tied_names(model: PreTrainedModel) -> set[str]:
    """Parameters that share another one's storage, by the model's configuration."""
    return set(model.all_tied_weights_keys or ())


def _piece(name: str, renamed: str, pattern: str, converter: WeightConverter) -> Target:
    """The piece of a fused expert matrix that one expert's own matrix fills."""
    merge, *join = converter.operations
    number = re.search(r"experts\.(\d+)\.", name)
    fuses_experts = (
        isinstance(merge, MergeModulelist)
        and merge.dim == 0
        and (not join or (len(join) == 1 and isinstance(join[0], Concatenate) and join[0].dim == 1))
        and len(converter.source_patterns) == (2 if join else 1)
        and len(converter.target_patterns) == 1
        and renamed.rpartition(".")[2] in EXPERT_MATRICES
    )
    if not fuses_experts or number is None:
        steps = ", ".join(type(step).__name__ for step in converter.operations)
        raise UnsupportedModelError(
            f"{name}: transformers rearranges this tensor while loading ({steps} into {renamed}), "
            "which Headrace cannot do with packed bytes"
        )
    part = converter.source_patterns.index(pattern) if join else None
    return Target(renamed, int(number[1]), part)


def experts_per_token(config: PretrainedConfig) -> int:
    """How many routed experts one token visits; the name of the setting differs between models."""
    for name in (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "num_experts_per_token",
        "top_k_experts",
    ):
        value = getattr(config, name, None)
        if isinstance(value, list):
            value = max(value)
        if isinstance(value, int):
            return value
    return 1
