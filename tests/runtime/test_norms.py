"""RMS norms in one kernel: found by trying, exact in float32, close in 16 bits."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from architectures import SUPPORTED, tiny_config, tiny_model
from interpreter import interpreted
from torch import nn
from whole import WholeModel

from headrace.runtime.binding import Binder
from headrace.runtime.conversion.convert import convert
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.norms import FusedNorm, FusedNorms
from headrace.runtime.plugs import no_grad_parameter
from headrace.runtime.recording import Interruptions
from headrace.runtime.skeleton import BlockKey, Skeleton, parse_config
from headrace.runtime.store import Store
from headrace.runtime.weights.weight import Scratch
from headrace.scheduler.plan import Slice

NO_RMS_NORM = {"cohere", "cohere2", "gpt_neox", "nemotron", "phi", "stablelm", "starcoder2"}
"""They subtract the mean, or add a bias."""


@pytest.mark.parametrize("name", SUPPORTED)
def test_norms_are_found_in_every_architecture(name: str) -> None:
    norms, modules = FusedNorms(torch.bfloat16), Skeleton(tiny_config(name), torch.bfloat16).model
    found = {path: norms.fused(module) for path, module in modules.named_modules()}
    fused = [path for path, norm in found.items() if norm is not None]
    assert all("norm" in path for path in fused)
    if name in NO_RMS_NORM:
        assert not fused
    else:
        assert [path for path in found if path.endswith("norm")] == fused
    offset = {norm._offset for norm in found.values() if norm is not None}
    assert offset == (set() if not fused else {int(name.startswith("gemma"))})


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "glm4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(name: str, dtype: torch.dtype) -> None:
    model = Skeleton(tiny_config(name), dtype).model
    module = next(m for path, m in model.named_modules() if path.endswith("norm"))
    fused = FusedNorms(dtype).fused(module)
    assert fused is not None
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(len(fused.weight), generator=generator).to(dtype)
    x = (torch.randn(2, 5, len(weight), generator=generator) * 3).to(dtype)
    results = []
    for one, kind in ((fused, dtype), (module, dtype), (module, torch.float32)):
        one.weight = no_grad_parameter(weight.to(kind))
        results.append(one(x.to(kind)))
        assert results[-1].dtype == kind
    mine, theirs, exact = results
    step = torch.finfo(dtype).eps
    assert torch.allclose(mine.float(), exact, rtol=step, atol=1e-6)
    assert torch.allclose(theirs.float(), exact, rtol=2 * step, atol=1e-6)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * self.weight * gate


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Grouped(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (2, -1))
        return (
            nn.functional.rms_norm(groups, groups.shape[-1:], None, self.eps).flatten(-2)
            * self.weight
        )


class Refuses(Scale):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


@pytest.mark.parametrize(
    "module", [Gated(), Scale(8), Scale(1), Grouped(8), Refuses(8), nn.LayerNorm(8, bias=False)]
)
def test_what_is_something_else_is_left_alone(module: nn.Module) -> None:
    assert FusedNorms(torch.float32).fused(module) is None


def test_weights_of_another_type_are_left_alone() -> None:
    module = nn.RMSNorm(8, eps=1e-6)
    assert FusedNorms(torch.float32).fused(module) is not None
    assert FusedNorms(torch.bfloat16).fused(module) is None


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_model_with_fused_norms(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "store"
    convert(tmp_path / "checkpoint", path, format="keep", allow_missing_tokenizer=True)
    store = Store.open(path)
    skeleton = Skeleton(parse_config(store.config, "test"), torch.float32)
    scratch = Scratch(0, torch.float32, torch.device("cpu"))
    weights: dict[BlockKey, Mapping[str, WeightSpec]] = {
        "embed": store.embed.weights,
        0: store.layers[0].weights,
        "head": store.head.weights,
    }
    binder = Binder(skeleton, weights, scratch, Interruptions(), FusedNorms(torch.float32))
    for key, block in ((0, store.layers[0]), ("head", store.head)):
        data = torch.frombuffer(store.read_block(block), dtype=torch.uint8)
        for binding in binder.bindings(key):
            binding.bind(data)
    norms = {p: m for p, m in skeleton.model.named_modules() if isinstance(m, FusedNorm)}
    assert "model.norm" in norms and "model.layers.0.input_layernorm" in norms
    assert not any(p.startswith("model.layers.1.") for p in norms)
    for norm_path, norm in norms.items():
        original = model.get_submodule(norm_path)
        x = torch.randn(1, 3, len(norm.weight))
        assert torch.allclose(norm(x), original(x), rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("size", [24, 128, 1536])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted(size: int, offset: int, dtype: torch.dtype) -> None:
    from headrace.runtime.norms_triton import rms_norm

    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, generator=generator).to(dtype)
    wide = torch.randn(1, 3, 5, 2 * size, generator=generator).to(dtype)
    for x in (wide[..., :size], wide[:, 1:].transpose(1, 2)[..., size:], wide[0, 0, :1, ::2]):
        wanted = nn.functional.rms_norm(x.double(), (size,), None, 1e-6)
        wanted = wanted * (weight.double() + offset)
        got = rms_norm(x, weight, 1e-6, offset)
        assert got.is_contiguous() and (got.shape, got.dtype) == (x.shape, dtype)
        assert torch.allclose(got.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_on_cpus_norms_stay_as_they_are_in_float32_only(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "store"
    convert(tmp_path / "checkpoint", path, format="keep", allow_missing_tokenizer=True)
    slices = [Slice(0, 0, tuple(range(3, 20)), (0,), None)]
    exact, rounded = WholeModel(path), WholeModel(path, dtype=torch.bfloat16)
    for whole, fused in ((exact, False), (rounded, True)):
        modules = whole.model._skeleton.model.modules()
        assert any(isinstance(module, FusedNorm) for module in modules) == fused
    want = exact.logits(slices)
    assert (rounded.logits(slices) - want).norm() < 0.03 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_kernels_on_cuda(size: int, dtype: torch.dtype, offset: int) -> None:
    weight = no_grad_parameter(torch.randn(size, device="cuda").to(dtype))
    x = torch.randn(1, 3, 5, size, device="cuda").to(dtype)
    norm = FusedNorm(weight, 1e-6, offset)
    wanted = nn.functional.rms_norm(x.double(), (size,), None, 1e-6) * (weight.double() + offset)
    with torch.inference_mode():
        norm(x)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            got = norm(x)
            torch.cuda.synchronize()
    step = torch.finfo(dtype).eps
    assert torch.allclose(got.double(), wanted, rtol=4 * step, atol=1e-6)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [e.name for e in kernels]
