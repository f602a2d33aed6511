"""The kernel that rounds a block of columns, against the same in PyTorch."""

import pytest
import torch
from interpreter import DEVICES

from headrace.runtime.bnb import functional as bnb
from headrace.runtime.calibration.gptq import Factor, gptq
from headrace.runtime.calibration.grids import affine_grid, row_grid, table_grid

NF4 = bnb.get_4bit_type("nf4", device="cpu")
GRIDS = {
    "int4": lambda w: affine_grid(w, 32),
    "int3": lambda w: affine_grid(w, 32, bits=3),
    "int8": row_grid,
    "nf4": lambda w: table_grid(w, NF4.to(w.device), 64),
}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_rounds_as_pytorch(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.runtime.calibration import gptq as module
    from headrace.runtime.calibration.gptq_triton import round_block

    random = torch.Generator().manual_seed(0)
    weight = torch.randn(21, 160, generator=random)
    weight[3, :64] = 0.0
    x = torch.randn(900, 160, generator=random) @ torch.randn(160, 160, generator=random)
    gram = x.T @ x / len(x)
    wanted, share = gptq(weight, Factor.of(gram), GRIDS[kind](weight))
    grid = GRIDS[kind](weight.to(device))
    monkeypatch.setattr(module, "_round_block", round_block)
    codes, found = gptq(weight.to(device), Factor.of(gram.to(device)), grid)
    # Where a value lies between two codes, another order of sums may choose the other one.
    assert (codes.cpu() == wanted).double().mean() > 0.98
    assert found == pytest.approx(share, rel=0.02)
