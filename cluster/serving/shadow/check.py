"""What has to hold of a shadow before its server starts, and what fits its memory."""

import torch

from headrace.cluster.evaluation.alike import refuse_other_model
from headrace.cluster.evaluation.corpus import tokenizer_of
from headrace.cluster.serving.shadow.messages import Setup
from headrace.cluster.serving.shadow.options import ShadowOptions
from headrace.cluster.serving.shadow.ties import TIES
from headrace.runtime.shape import model_shape
from headrace.runtime.sweep.room import FEWEST_TOKENS, sweep_bytes
from headrace.runtime.sweep.source import CheckpointModel, SweptModel, open_model
from headrace.runtime.sweep.sweep import MOST_TOKENS
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.sizes import format_size

STATES_SHARE = 4
"""One part in so many of the memory is for hidden states, the rest for what a sweep has on its device."""


def check_shadow(options: ShadowOptions) -> Setup:
    """Takes seconds. HeadraceError when the models cannot be compared, or not in that memory."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise HeadraceError(
            "--shadow-device cuda: PyTorch sees no CUDA device on this machine; use --shadow-device cpu"
        )
    dtype_name = compute_type(options.dtype, options.device)
    dtype: torch.dtype = getattr(torch, dtype_name)
    reference, store = open_model(options.reference), open_model(options.store)
    shapes = [model_shape(model, dtype_name) for model in (reference, store)]
    refuse_other_model(store, shapes[1], reference, shapes[0])
    _refuse_other_tokenizer(store, reference)
    contexts = [shape.max_context for shape in shapes]
    if options.context is not None:
        contexts.append(options.context)
    widths = sum(shape.hidden_size for shape in shapes)
    padded = options.memory // STATES_SHARE // (widths * dtype.itemsize)
    longest = min(*contexts, padded)
    return Setup(
        store=str(options.store),
        reference=str(options.reference),
        device=options.device,
        dtype=dtype_name,
        memory=options.memory,
        longest=longest,
        padded=padded,
        micro_batch=_fitting(options, shapes, longest),
        tie=TIES[options.dtype],
        latents=isinstance(reference, CheckpointModel) and reference.latents,
    )


def compute_type(dtype: str, device: str) -> str:
    """The ring's own, but for float16 on CPUs, which is slow there."""
    return "float32" if dtype == "float16" and device == "cpu" else dtype


def _fitting(options: ShadowOptions, shapes: list[ModelShape], longest: int) -> int:
    """Tokens of a micro-batch of sequences of up to `longest`. HeadraceError when none is small enough."""
    budget = options.memory - options.memory // STATES_SHARE
    tokens = MOST_TOKENS[options.device]
    while longest and _needed(shapes, longest, tokens) > budget and tokens > FEWEST_TOKENS:
        tokens //= 2
    needed = _needed(shapes, max(longest, FEWEST_TOKENS), tokens)
    if not longest or needed > budget:
        whole = -(-needed * STATES_SHARE // (STATES_SHARE - 1) // (1 << 20)) << 20
        raise HeadraceError(
            f"--shadow-memory {format_size(options.memory)} is too little: two layers of both {options.store} and "
            f"{options.reference}, their heads and a micro-batch of {tokens} tokens take {format_size(needed)}, "
            f"and hidden states a part in {STATES_SHARE} beside them. Give it {format_size(whole)} or more"
        )
    return tokens


def _needed(shapes: list[ModelShape], longest: int, tokens: int) -> int:
    """Short sequences fill pages worse than long ones or better: whichever takes more."""
    lengths = {longest, min(longest, PAGE_TOKENS)}
    return max(sum(sweep_bytes(shape, length, tokens) for shape in shapes) for length in lengths)


def _refuse_other_tokenizer(store: SweptModel, reference: SweptModel) -> None:
    """The reference's may have tokens that the store's has not, such as padding."""
    if reference.path.resolve() == store.path.resolve():
        return
    own, other = (tokenizer_of(model).get_vocab() for model in (store, reference))
    if differing := own.items() - other.items():
        raise HeadraceError(
            f"--shadow {reference.path} has another tokenizer than {store.path}: {len(differing)} of {len(own)} tokens "
            "are missing there or have other numbers. Give a store or a checkpoint of the same model"
        )
