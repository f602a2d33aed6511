"""RMS norms in one kernel: transformers' own take seven or eight, four times a layer in some models.

Which modules are RMS norms is found by trying them, not by name. Where transformers rounds what it
has normalized to the compute type before it multiplies by the weight, this rounds once, at the end.
"""

import copy
import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.runtime import plugs

ROWS = 4
"""Rows of random numbers that a norm is tried with, the last ones so small that epsilon counts."""


_TYPES = torch.float32, torch.bfloat16, torch.float16
_REFUSALS = AttributeError, LookupError, RuntimeError, TypeError, ValueError


class FusedNorm(nn.Module):
    """Stands in for a module that computes x / sqrt(mean(x^2) + eps) * (offset + weight).

    The offset is 0 or 1. Its one parameter has the original's name, and is bound like it.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: int) -> None:
        super().__init__()
        self.weight = weight
        self._shape = tuple(weight.shape)
        self._eps, self._offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype and x.dtype in _TYPES:
            # Imported where it is needed: installations without a GPU have no Triton.
            from headrace.runtime import norms_triton

            return norms_triton.rms_norm(x, self.weight, self._eps, self._offset)
        if self._offset:
            # 1 + weight has no room for a small weight in 16 bits.
            normalized = F.rms_norm(x.float(), self._shape, None, self._eps)
            return torch.addcmul(normalized, normalized, self.weight, out=torch.empty_like(x))
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self._shape, self.weight, self._eps)
        return F.rms_norm(x, self._shape, None, self._eps) * self.weight

    def extra_repr(self) -> str:
        return f"{self._shape}, eps={self._eps}, offset={self._offset}"


class FusedNorms:
    """Makes the stand-ins; each kind of norm is tried once.

    Modules may be on the meta device. `dtype` is the type that they compute in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._learnt: dict[tuple[object, ...], tuple[float, int] | None] = {}

    def fused(self, module: nn.Module) -> FusedNorm | None:
        """A stand-in for `module`, with its parameter; None when it is not an RMS norm."""
        weight = _only_weight(module)
        if weight is None or weight.dtype != self._dtype:
            return None
        settings = sorted((k, repr(v)) for k, v in vars(module).items() if not k.startswith("_"))
        key = type(module), weight.shape, *settings
        if key not in self._learnt:
            self._learnt[key] = next(self._fits(module, len(weight)), None)
        learnt = self._learnt[key]
        return None if learnt is None else FusedNorm(weight, *learnt)

    def _fits(self, module: nn.Module, size: int) -> Iterator[tuple[float, int]]:
        """Each epsilon and offset with which a stand-in gives what the module gives."""
        generator = torch.Generator().manual_seed(size)
        weight = torch.randn(size, generator=generator)
        for eps in {value for value in vars(module).values() if isinstance(value, float)}:
            if not 0.0 < eps < 1.0:
                continue
            x = torch.randn(1, ROWS, size, generator=generator)
            x[:, ROWS // 2 :] *= eps**0.5
            for offset in (0, 1):
                if _agree(module, weight, x, eps, offset, 1e-5) and _agree(
                    module, weight.to(self._dtype), x.to(self._dtype), eps, offset, 3e-2
                ):
                    yield eps, offset


def _only_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight [n] of a module that has nothing else and is given nothing but hidden states."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or len(weight) < 2:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    return weight if len(inspect.signature(module.forward).parameters) == 1 else None


def _agree(
    module: nn.Module, weight: Tensor, x: Tensor, eps: float, offset: int, tolerance: float
) -> bool:
    original = copy.deepcopy(module)
    original.weight = plugs.no_grad_parameter(weight)
    try:
        wanted = original(x)
    except _REFUSALS:
        return False
    got = FusedNorm(plugs.no_grad_parameter(weight), eps, offset)(x)
    if not isinstance(wanted, Tensor) or (wanted.dtype, wanted.shape) != (got.dtype, got.shape):
        return False
    return torch.allclose(got, wanted, rtol=tolerance, atol=tolerance)
