"""Whether an architecture runs here with transformers' own results, decided by trying it.

A shrunken model of the checkpoint's own configuration with random weights runs both ways: prompts
alone through transformers' eager model, and packed together in slices through StageModel.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from headrace.runtime.batch import Batch
from headrace.runtime.conversion.quantize import STORE_DTYPES
from headrace.runtime.conversion.shrink import VOCABULARY, shrink
from headrace.runtime.kv.store import KVStore
from headrace.runtime.latents import keeps_latents
from headrace.runtime.manifest import ALIGN_TENSOR, Block, TensorSpec, WeightSpec
from headrace.runtime.model import StageModel
from headrace.runtime.skeleton import BlockKey, Skeleton
from headrace.scheduler.errors import HeadraceError, UnsupportedModelError
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest error of a logit, relative to the largest logit, in float32."""

_LENGTHS = (37, 70, 9)
"""Prompt tokens: past the shrunken window, past one page, and short."""
_STEPS = (
    ((0, 0, 20), (1, 0, 66), (2, 0, 8)),
    ((1, 66, 67), (0, 20, 36), (2, 8, 9)),
    ((0, 36, 37), (1, 67, 70)),
)
"""Micro-batches of (prompt, start, end): chunks of prefill and single-token decodes, mixed."""


def check(config: PretrainedConfig) -> bool:
    """Whether pages may keep latents where the model has any (latents.py).

    Raises UnsupportedModelError, saying why, when results would differ from transformers'.
    """
    name = config.model_type
    try:
        small = shrink(config)
        latents = any(map(keeps_latents, Skeleton(small, torch.float32).layers))
        trouble = _trouble_with_latents(small) if latents else None
        if latents and trouble is None:
            return True
        error = _largest_error(small, expand=True)
    except HeadraceError as failure:
        raise UnsupportedModelError(f"{name} is not supported: {failure}") from failure
    except Exception as failure:
        raise UnsupportedModelError(
            f"{name} is not supported: a small model of it fails with "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    if not error.value < TOLERANCE:
        raise UnsupportedModelError(
            f"{name} is not supported: {error.where}, logits are off by {error.value:.1e} of their "
            f"range (at most {TOLERANCE:.0e} is rounding). Its attention may depend on a mask that "
            "attention functions are not told about"
        )
    if trouble is not None:
        log.warning("%s: pages keep keys and values, for with latents %s", name, trouble)
    return False


def _trouble_with_latents(config: PretrainedConfig) -> str | None:
    """Why pages may not keep the latents of a small model; None: they may."""
    try:
        error = _largest_error(config, expand=False)
    except Exception as failure:  # noqa: BLE001 - whatever latents are in the way of
        return f"a small model fails with {type(failure).__name__}: {failure}"
    if error.value < TOLERANCE:
        return None
    return f"{error.where}, logits are off by {error.value:.1e} of their range"


@dataclass(frozen=True, slots=True)
class _Error:
    value: float
    where: str


class _Memory:
    """A store in memory: every block packed the way a store packs it."""

    def __init__(self, skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> None:
        self.config: Mapping[str, Any] = skeleton.config.to_dict()
        roles = skeleton.classify(tensors)
        ordered = sorted(tensors, key=lambda name: roles[name].order)
        grouped: dict[BlockKey, dict[str, Tensor]] = {"embed": {}, "head": {}}
        for i in range(len(skeleton.layers)):
            grouped[i] = {}
        for name in ordered:
            grouped[roles[name].block][name] = tensors[name]
        self.layer_shapes = skeleton.layer_shapes()
        self._data: dict[str, bytearray] = {}
        self.embed = self._pack("embed", grouped["embed"])
        self.head = self._pack("head", grouped["head"])
        self.layers = [self._pack(str(i), grouped[i]) for i in range(len(skeleton.layers))]

    def read_block(self, block: Block) -> bytearray:
        return self._data[block.name]

    def _pack(self, name: str, tensors: Mapping[str, Tensor]) -> Block:
        data, weights = bytearray(ALIGN_TENSOR), {}
        for key, tensor in tensors.items():
            shape = tuple(tensor.shape)
            part = TensorSpec(STORE_DTYPES[tensor.dtype], shape, len(data), tensor.nbytes)
            weights[key] = WeightSpec("raw", shape, {"data": part})
            data += tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            data += bytes(-len(data) % ALIGN_TENSOR)
        self._data[name] = data
        return Block(name, Path(name), 0, len(data), "", weights)


def _largest_error(config: PretrainedConfig, *, expand: bool) -> _Error:
    generator = torch.Generator().manual_seed(0)
    # Token ids differ between prompts and avoid the low ones, which are often special.
    prompts = [torch.randint(4, VOCABULARY, (n,), generator=generator) for n in _LENGTHS]
    with torch.no_grad():
        reference = _reference(config, generator)
        expected = [reference(prompt[None], use_cache=False).logits[0] for prompt in prompts]
        store = _Memory(Skeleton(config, torch.float32, expand=expand), _on_disk(reference))
        return _compare(store, prompts, expected)


def _reference(config: PretrainedConfig, generator: torch.Generator) -> Any:
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:
            # Norm weights and biases: near what they start as, but never neutral.
            tensor.copy_(tensor + 0.1 * noise)
        else:
            tensor.copy_(noise * (1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5))
    model.tie_weights()
    return model


def _persistent_buffers(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    saved = model.state_dict()
    return [(n, b) for n, b in model.named_buffers() if n in saved and b.is_floating_point()]


def _on_disk(model: Any) -> dict[str, Tensor]:
    """The tensors of the model as save_pretrained would write them."""
    return dict(revert_weight_conversion(model, model.state_dict()))


def _compare(store: _Memory, prompts: list[Tensor], expected: list[Tensor]) -> _Error:
    device = torch.device("cpu")
    shapes = store.layer_shapes
    model = StageModel(
        store,
        range(len(shapes)),
        device=device,
        dtype=torch.float32,
        with_embedding=True,
        with_head=True,
    )
    pages = -(-max(_LENGTHS) // PAGE_TOKENS)
    worst = _Error(0.0, "")
    with KVStore(dict(enumerate(shapes)), pages * len(prompts) + 1, torch.float32, device) as kv:
        for layer, block in enumerate(store.layers):
            data = torch.frombuffer(store.read_block(block), dtype=torch.uint8)
            model.bind(layer, data)
        for step, pieces in enumerate(_STEPS):
            logits = _run(model, kv, prompts, pieces, pages)
            wanted = torch.cat([expected[p][start:end] for p, start, end in pieces])
            worst = max(worst, _difference(step, logits, wanted), key=lambda error: error.value)
    return worst


def _run(
    model: StageModel,
    kv: KVStore,
    prompts: list[Tensor],
    pieces: tuple[tuple[int, int, int], ...],
    pages: int,
) -> Tensor:
    slices = tuple(
        Slice(
            request=p,
            start=start,
            tokens=tuple(prompts[p][start:end].tolist()),
            # Page 0 stays unused and pages run backwards, so that ids matter.
            pages=tuple(range(pages * (p + 1), pages * p, -1)),
            sampling=None,
        )
        for p, start, end in pieces
    )
    micro_batch = MicroBatch(slices)
    prepared = model.prepare(Batch.build(micro_batch, model.device))
    x = prepared.x
    for layer in range(model.config.num_hidden_layers):
        x = model.run_layer(layer, x, prepared, kv)
    return model.logits(x)


def _difference(step: int, logits: Tensor, wanted: Tensor) -> _Error:
    error = ((logits - wanted).abs().max() / wanted.abs().max()).item()
    if error < TOLERANCE and not torch.equal(logits.argmax(-1), wanted.argmax(-1)):
        error = float("inf")
    what = ("in a first slice of each prompt", "in later slices", "in the last slices")[step]
    return _Error(float("inf") if math.isnan(error) else error, what)
