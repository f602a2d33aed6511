"""Rotary embeddings in one kernel: found by trying, exact in float32, close in 16 bits.

Triton's interpreter has to be chosen before Triton is imported, so one test runs this file again in
a process of its own.
"""

import importlib
import importlib.util
import inspect
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, tiny_config, tiny_model
from interpreter import interpreted, slow
from torch import Tensor, nn

from headrace.runtime import plugs
from headrace.runtime.conversion import layer_facts
from headrace.runtime.rotary import Form, FusedRotary, Pairs, Rotary, find_form, rotate_on_cuda
from headrace.runtime.skeleton import Skeleton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEFT_ALONE = {"deepseek_v2"}
"""It multiplies complex numbers, in a function of another name."""

UNROTATED = {"cohere2": 1}
"""Layers without a rotary embedding."""

HALVES = Pairs.HALVES, Pairs.HALVES, Pairs.HALVES
SPLIT = Pairs.HALVES, Pairs.SHARED, Pairs.HALVES
MIXED = Pairs.NEIGHBOURS, Pairs.NEIGHBOURS, Pairs.NEIGHBOURS
ONE_ANGLE = Pairs.NEIGHBOURS, Pairs.SHARED, Pairs.NEIGHBOURS
SORTED = Pairs.NEIGHBOURS, Pairs.HALVES, Pairs.HALVES

KINDS: list[tuple[str, tuple[Pairs, Pairs, Pairs], int, int]] = [
    ("llama", HALVES, 128, 128),
    ("qwen3", HALVES, 48, 48),
    ("gemma3", HALVES, 256, 256),
    ("gpt_oss", SPLIT, 64, 32),
    ("phi3", HALVES, 96, 72),
    ("nemotron", HALVES, 80, 40),
    ("stablelm", HALVES, 20, 20),
    ("olmo2", HALVES, 64, 64),
    ("glm", ONE_ANGLE, 64, 32),
    ("cohere", MIXED, 64, 64),
    ("ernie4_5", ONE_ANGLE, 16, 16),
]
"""A model, the form of its function, a head's size and the tables' width."""


class Counted:
    """Form.rotated, as a kernel would do it."""

    def __init__(self) -> None:
        self.forms: list[Form] = []

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form
    ) -> tuple[Tensor, Tensor]:
        self.forms.append(form)
        return form.rotated(q, cos, sin), form.rotated(k, cos, sin)


def modeling(name: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def function_of(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    function: Callable[..., tuple[Tensor, Tensor]] = modeling(name).apply_rotary_pos_emb
    return function


def make(
    dim: int,
    width: int,
    tokens: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as parts of one projection's rows, cos transposed and sin not: strides of all kinds."""
    generator = torch.Generator().manual_seed(dim + tokens)
    rows = torch.randn(1, tokens, sum(heads), dim, generator=generator).to(device, dtype)
    q, k = rows.transpose(1, 2).split(heads, dim=1)
    angles = torch.randn(1, width, tokens, generator=generator).to(device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return q, k, cos.transpose(1, 2), sin.transpose(1, 2).contiguous()


@pytest.mark.parametrize(("name", "layouts", "dim", "width"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(
    name: str, layouts: tuple[Pairs, Pairs, Pairs], dim: int, width: int, dtype: torch.dtype
) -> None:
    rotated = 2 * width if layouts == SPLIT else width
    form = find_form(function_of(name), dim, width, dtype, dtype, dtype, dtype)
    assert form == Form(rotated // 2, *layouts)


def test_pairs_that_come_out_sorted() -> None:
    def sort_then_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        parts = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
        return function_of("llama")(*parts, cos, sin)

    form = find_form(sort_then_rotate, 16, 16, *[torch.float32] * 4)
    assert form == Form(8, *SORTED)


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos[:, None], k * cos[:, None]


def promoted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return function_of("llama")(q.float(), k.float(), cos.float(), sin.float())


def alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return function_of("llama")(q, k, cos, sin)[:1]


def refusing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError("no")


@pytest.mark.parametrize("function", [scaled, promoted, alone, refusing])
def test_what_is_something_else_is_left_alone(function: Callable[..., Any]) -> None:
    assert find_form(function, 16, 16, *[torch.bfloat16] * 4) is None


def test_each_shape_is_tried_once_and_other_calls_go_to_the_original() -> None:
    calls = []

    def original(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(kwargs)
        return function_of("llama")(*args, **kwargs)

    rotate = Counted()
    rotary = Rotary(original, rotate, "cpu")
    q, k, cos, sin = make(16, 16, 3, (4, 2), torch.float32)
    for tokens in (3, 2):
        part = q[:, :, :tokens], k[:, :, :tokens], cos[:, :tokens], sin[:, :tokens]
        for mine, theirs in zip(rotary(*part), function_of("llama")(*part), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert len(rotate.forms) == 2 and len(calls) == 2  # once in float32 and once in the given types
    rows = q.transpose(1, 2), k.transpose(1, 2)
    rotary(*rows, cos, sin, unsqueeze_dim=2)
    rotary(*rows, cos, sin, 2)
    rotary(q=q, k=k, cos=cos, sin=sin)
    rotary(*(x.to("meta") for x in (q, k, cos, sin)))
    rotary(*(x.double() for x in (q, k, cos, sin)))
    rotary(*(torch.cat([x, x]) for x in (q, k, cos, sin)))
    rotary(q[0], k[0], cos[:, None], sin[:, None])
    assert len(rotate.forms) == 2 and len(calls) == 9
    assert calls[2:] == [
        {"unsqueeze_dim": 2},
        {},
        {"q": q, "k": k, "cos": cos, "sin": sin},
        *[{}] * 4,
    ]


@pytest.mark.parametrize("name", SUPPORTED)
@torch.inference_mode()
def test_architectures(name: str) -> None:
    model, tokens = tiny_model(name), torch.arange(3, 14)[None]
    wanted = model(tokens).logits
    rotate = Counted()
    rotary = FusedRotary(rotate, "cpu")
    modules = plugs.attention_modules(model)
    taken = [module for module in modules if rotary.install(module)]
    assert [type(module).__name__[-9:] for module in taken] == (
        [] if name in LEFT_ALONE else ["Attention"] * model.config.num_hidden_layers
    )
    got = model(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert len(rotate.forms) == len(taken) - UNROTATED.get(name, 0)
    assert not any(rotary.install(module) for module in modules)


def test_nothing_beside_the_module_changes() -> None:
    layers = Skeleton(tiny_config("llama"), torch.float32).layers
    mine, other = (plugs.attention_modules(layer)[0] for layer in layers[:2])
    kind = type(mine)
    before = dict(vars(modeling("llama"))), dict(vars(kind)), dict(vars(mine))
    assert FusedRotary().install(mine)
    assert (dict(vars(modeling("llama"))), dict(vars(kind)), dict(vars(mine))) == before
    assert type(other) is kind and isinstance(mine, kind) and type(mine).__name__ == kind.__name__
    assert inspect.signature(mine.forward) == inspect.signature(other.forward)


def test_a_module_is_gone_when_its_owner_is() -> None:
    module = modeling("llama").LlamaAttention(tiny_config("llama"), 0)
    assert FusedRotary().install(module)
    gone = weakref.ref(module)
    del module
    assert gone() is None


def test_wrapped_forwards_are_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    inner = modeling("llama").LlamaAttention.forward

    class Wrapped(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return inner(self, *args, **kwargs)

    assert not FusedRotary().install(Wrapped())
    assert not FusedRotary().install(Plain())
    own = Plain()
    own.forward = inner.__get__(own)
    assert not FusedRotary().install(own)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_layers_without_weights_still_run(name: str) -> None:
    """On the meta device, up to their attention, as their shapes are learnt."""
    skeleton = Skeleton(tiny_config(name), torch.float32)
    wanted, shared = skeleton.layer_shapes(), skeleton.shared_inputs()
    rotate = Counted()
    rotary = FusedRotary(rotate, "cuda")
    for layer in skeleton.layers:
        assert [rotary.install(m) for m in plugs.attention_modules(layer)] == [True]
    assert skeleton.layer_shapes() == wanted
    assert skeleton.shared_inputs() == shared
    assert len({layer_facts.signature(layer) for layer in skeleton.layers}) == len(
        {
            layer_facts.signature(layer)
            for layer in Skeleton(tiny_config(name), torch.float32).layers
        }
    )
    assert not rotate.forms


@interpreted
@pytest.mark.parametrize(("name", "layouts", "dim", "width"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, *map(slow, DTYPES[1:])])
def test_interpreted(
    name: str, layouts: tuple[Pairs, Pairs, Pairs], dim: int, width: int, dtype: torch.dtype
) -> None:
    check(function_of(name), make(dim, width, 3, (5, 2), dtype))


@interpreted
@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (9, 3), (40, 1)])
def test_interpreted_heads(heads: tuple[int, int]) -> None:
    check(function_of("llama"), make(64, 64, 2, heads, torch.float32))


@interpreted
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "glm4_moe"])
@torch.inference_mode()
def test_interpreted_model(name: str) -> None:
    model, tokens = tiny_model(name), torch.arange(3, 10)[None]
    wanted = model(tokens).logits
    rotary = FusedRotary(rotate_on_cuda, "cpu")
    installed = [rotary.install(m) for m in plugs.attention_modules(model)]
    assert all(installed)
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)


def check(function: Callable[..., Any], given: tuple[Tensor, ...]) -> None:
    """The kernel against the function itself, in float64."""
    rotary = Rotary(function, rotate_on_cuda, given[0].device.type)
    q, k, cos, sin = given
    assert rotary._form(q, k, cos, sin) is not None
    exact = function(*(x.double() for x in given))
    for mine, theirs, x in zip(rotary(*given), exact, (q, k), strict=True):
        assert mine.dtype == x.dtype and mine.shape == x.shape
        assert mine[0].transpose(0, 1).is_contiguous()
        step = torch.finfo(x.dtype).eps
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=step, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "layouts", "dim", "width"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 128, 1000])
def test_on_cuda(
    name: str, layouts: tuple[Pairs, Pairs, Pairs], dim: int, width: int, dtype: torch.dtype,
    tokens: int,
) -> None:  # fmt: skip
    with torch.inference_mode():
        check(function_of(name), make(dim, width, tokens, (32, 8), dtype, "cuda"))


@pytest.mark.gpu
@torch.inference_mode()
def test_graph_on_cuda() -> None:
    given = make(128, 128, 4, (32, 8), torch.bfloat16, "cuda")
    rotary = Rotary(function_of("llama"), rotate_on_cuda, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rotary(*given)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            rotary(*given)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        got = rotary(*given)
        graph.capture_end()
        for x in given[:2]:
            x.mul_(-3)
        graph.replay()
    torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]
    for mine, theirs in zip(got, rotary(*given), strict=True):
        assert torch.equal(mine, theirs)
