"""A context that is opened before torch is imported."""

import subprocess
import sys

import pytest

TAKEN_BY_TORCH = """
import ctypes, sys
from headrace.runtime.cuda_context import begin_context
begin_context().join()
cuda, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
assert "torch" not in sys.modules
assert cuda.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
import torch
print(active.value, torch.arange(4, device="cuda:0").sum().item(), torch.cuda.mem_get_info()[0] > 0)
"""


def test_nothing_happens_without_a_device() -> None:
    code = "from headrace.runtime.cuda_context import begin_context; begin_context().join()"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, env=environment
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


@pytest.mark.gpu
def test_torch_takes_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", TAKEN_BY_TORCH], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "1 6 True\n"
