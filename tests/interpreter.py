"""Triton's interpreter, which is chosen when Triton is imported and so needs a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="in a subprocess")),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                INTERPRETED or not HAS_TRITON or not torch.cuda.is_available(),
                reason="needs CUDA and Triton",
            ),
        ],
    ),
]


def slow(*values: object) -> ParameterSet:
    """Parameters of a case that takes the interpreter long."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run_interpreted(file: str, chosen: str, *, slow: bool = False) -> None:
    """Run the tests of `file` whose names hold `chosen` in the interpreter; some have to pass."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "--import-mode=importlib", "-k", chosen, "-m", f"{'' if slow else 'not '}slow and not gpu", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "src"),
                          "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    # pytest is content when all that it found was skipped.
    assert " passed" in run.stdout, run.stdout
