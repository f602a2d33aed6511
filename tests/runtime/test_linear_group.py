"""Linears that get the same tensor: found without knowing architectures, computed by one call."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from whole import WholeModel

from headrace.runtime.conversion import layer_facts
from headrace.runtime.conversion.convert import convert
from headrace.runtime.linear import QuantLinear
from headrace.runtime.linear_group import LinearGroup
from headrace.runtime.matmul.configs import Product
from headrace.runtime.skeleton import Skeleton
from headrace.runtime.weights.plain import RawWeight
from headrace.runtime.weights.weight import Scratch, Weight
from headrace.scheduler.plan import Slice

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


class Together(RawWeight):
    """Multiplies with others at once where `able`, and keeps count."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(data)
        self.calls = 0
        self.able = True

    def together(
        self,
        others: Sequence[Weight],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, ...] | None:
        if not self.able:
            return None
        self.calls += 1
        weights = (self, *others)
        return tuple(w.linear(x, b, scratch) for w, b in zip(weights, biases, strict=True))


class Linears:
    """Three linears of one group."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.plain = [nn.Linear(8, n).requires_grad_(False) for n in (6, 4, 2)]
        scratch = Scratch(0, torch.float32, torch.device("cpu"))
        self.packed = [QuantLinear(linear, scratch) for linear in self.plain]
        self.first = Together(self.plain[0].weight)
        weights = (self.first, *(RawWeight(linear.weight) for linear in self.plain[1:]))
        for linear, weight in zip(self.packed, weights, strict=True):
            linear.weight = weight
        self.group = LinearGroup(self.packed)

    def check(self, x: Tensor, order: Sequence[int]) -> None:
        for i in order:
            assert torch.equal(self.packed[i](x), self.plain[i](x))


def test_one_call_for_all() -> None:
    linears = Linears()
    for calls in (1, 2, 3):
        linears.check(torch.randn(3, 8), (0, 1, 2))
        assert linears.first.calls == calls


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (0, 0, 1, 2), (2, 2), (0, 1, 1, 2), (0,)])
def test_any_order_and_any_number_of_calls(order: tuple[int, ...]) -> None:
    linears = Linears()
    for _ in range(2):
        linears.check(torch.randn(3, 8), order)


def test_equal_is_not_the_same() -> None:
    linears = Linears()
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    linears.check(x, (0,))
    linears.check(x.clone(), (1,))
    linears.check(other, (2, 0))
    linears.check(x, (1, 2))


def test_results_are_dropped_with_the_last_and_when_a_layer_has_run() -> None:
    linears = Linears()
    x = torch.randn(3, 8)
    held = sys.getrefcount(x)
    linears.check(x, (0, 1))
    assert sys.getrefcount(x) > held
    linears.check(x, (2,))
    assert sys.getrefcount(x) == held
    linears.check(x, (0,))
    linears.group.forget()
    assert sys.getrefcount(x) == held
    x.mul_(2)
    linears.check(x, (1, 2))


def test_alone_where_weights_cannot_be_multiplied_together() -> None:
    linears = Linears()
    linears.first.able = False
    linears.check(torch.randn(3, 8), (0, 1, 2))
    assert linears.first.calls == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {(QKV, GATE_UP)}),
        ("mixtral", {(QKV,)}),
        ("phi3", {()}),
        ("cohere", {((*QKV, *GATE_UP),)}),
        ("gpt_neox", {()}),
    ],
)
def test_found_by_running_a_layer(name: str, expected: set[Any]) -> None:
    assert set(Skeleton(tiny_config(name), torch.float32).shared_inputs()) == expected


class Writes(nn.Module):
    """Writes to what it has multiplied, and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4, device="meta") for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        self.a(x), self.b(x)
        x.mul_(2)
        self.c(x)
        if x.sum():  # a value, which nothing on the meta device has
            self.d(x)
        return x


def test_a_tensor_that_was_written_to_is_another() -> None:
    assert layer_facts.shared_inputs(Writes(), torch.zeros(1, 4), (), {}) == (("a", "b"),)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = tiny_config("llama", hidden_size=256, intermediate_size=640, head_dim=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="nf4", allow_missing_tokenizer=True)
    return folder / "store"


def test_products_of_a_model(store: Path) -> None:
    qkv, out, gate_up, down = (256, 128, 128), (256,), (640, 640), (256,)
    found = WholeModel(store).model.four_bit_products()
    sizes = ((qkv, 256), (out, 256), (gate_up, 256), (down, 640))
    assert found == {Product("nf4", 64, widths, depth) for widths, depth in sizes}


def test_products_of_a_mixture(tmp_path: Path) -> None:
    config = tiny_config("mixtral", hidden_size=256, intermediate_size=640, head_dim=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "from")
    convert(tmp_path / "from", tmp_path / "store", format="nf4", allow_missing_tokenizer=True)
    found = WholeModel(tmp_path / "store").model.four_bit_products()
    assert Product("nf4", 64, (640, 640), 256) in found and Product("nf4", 64, (256,), 640) in found
    assert Product("nf4", 64, (640,), 256) not in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens", [1, 8, 40, 200])
def test_logits_on_a_gpu_are_those_on_a_cpu(store: Path, tokens: int) -> None:
    slices = [Slice(0, 0, tuple(range(3, 3 + tokens)), (0, 1, 2, 3), None)]
    expected = WholeModel(store).logits(slices)
    model = WholeModel(store, dtype=torch.bfloat16, device=torch.device("cuda"))
    try:
        for _ in range(2):
            assert (model.logits(slices).cpu() - expected).norm() < 0.05 * expected.norm()
    finally:
        model.model.close()  # else the next one's table may lie where pages are still pinned
