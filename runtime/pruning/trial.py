"""Whether neurons and heads can be cut out of an architecture, decided by trying it.

A shrunken random model of the checkpoint's own configuration is made twice as small: once by setting the
columns to zero through which a part of its neurons and heads reach the rest, and once by cutting these out.
Both must give the same logits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from headrace.runtime.conversion.shrink import VOCABULARY, shrink
from headrace.runtime.pruning.config import kv_heads, with_head_groups, with_neurons
from headrace.runtime.pruning.cut import Cut
from headrace.runtime.pruning.units import Units, head_groups, neurons
from headrace.runtime.skeleton import Skeleton
from headrace.scheduler.errors import HeadraceError, UnsupportedModelError

TOLERANCE = 1e-4
"""Largest error of a logit, relative to the largest logit, in float32."""


def check_cuts(config: PretrainedConfig, *, cut_neurons: bool, cut_heads: bool) -> None:
    """Raises UnsupportedModelError, saying why, when a cut model computes something else."""
    name = config.model_type
    try:
        error = _largest_error(shrink(config), cut_neurons, cut_heads)
    except HeadraceError as failure:
        raise UnsupportedModelError(f"{name} cannot be pruned so: {failure}") from failure
    except Exception as failure:
        raise UnsupportedModelError(
            f"{name} cannot be pruned so: a small model of it fails with {type(failure).__name__}: {failure}"
        ) from failure
    if not error < TOLERANCE:
        raise UnsupportedModelError(
            f"{name} cannot be pruned so: without some neurons or heads a small model's logits are off by "
            f"{error:.1e} of their range from what they are with those silenced (at most {TOLERANCE:.0e} is "
            "rounding): something reads all of them at once, such as a norm over all heads"
        )


@torch.no_grad()
def _largest_error(config: PretrainedConfig, cut_neurons: bool, cut_heads: bool) -> float:
    skeleton = Skeleton(config, torch.float32)
    whole = _random_model(config)
    described, state = config.to_dict(), whole.state_dict()
    cuts: dict[str, Cut] = {}
    silent: list[tuple[str, Tensor]] = []
    groups = kv_heads(config)
    for i, layer in enumerate(skeleton.layers):
        path = f"{skeleton.layers_path}.{i}"
        if cut_neurons:
            units = neurons(layer)
            described = with_neurons(described, len(_stay(units)))
            _note_cut(path, units, cuts, silent)
        # One group cannot be cut; the checkpoint's own number is looked at where its share is taken.
        if cut_heads and groups > 1:
            units = head_groups(layer, groups)
            head = units.each // (config.num_attention_heads // groups)
            described = with_head_groups(described, config, len(_stay(units)), head)
            _note_cut(path, units, cuts, silent)
    smaller = _random_model(type(config).from_dict(described))
    left = {n: cuts[n].apply(t) if n in cuts else t for n, t in state.items()}
    refuse_other_shapes(
        {name: tuple(t.shape) for name, t in left.items()},
        {name: tuple(t.shape) for name, t in smaller.state_dict().items()},
    )
    smaller.load_state_dict(left)
    for name, columns in silent:
        state[name][:, columns] = 0.0
    tokens = torch.arange(40)[None] * 5 % VOCABULARY
    wanted, got = (model(tokens, use_cache=False).logits for model in (whole, smaller))
    return float((wanted - got).abs().max() / wanted.abs().max())


def refuse_other_shapes(
    left: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]
) -> None:
    """Tensors that transformers would make of another shape than what is left of them."""
    for name, shape in left.items():
        if shape != built[name]:
            raise UnsupportedModelError(
                f"no config.json can describe it: transformers would make {name} {_by(built[name])}, "
                f"and {_by(shape)} is what is left of it"
            )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _stay(units: Units) -> Tensor:
    """Every third one goes, the first included, so that it matters which stay."""
    return (torch.arange(units.count) % 3 != 0).nonzero().flatten()


def _note_cut(
    path: str, units: Units, cuts: dict[str, Cut], silent: list[tuple[str, Tensor]]
) -> None:
    """How parameters are cut, and which columns do the same when they are zero."""
    cuts |= {f"{path}.{name}": cut for name, cut in units.cuts(_stay(units)).items()}
    gone = torch.arange(0, units.count, 3)
    silent.append((f"{path}.{units.out}.weight", units.out_columns(gone)))


def _random_model(config: PretrainedConfig) -> Any:
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:
            tensor.copy_(tensor + 0.1 * noise)
        else:
            tensor.copy_(noise * (1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5))
    model.tie_weights()
    return model
