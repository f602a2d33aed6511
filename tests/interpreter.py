"""Triton's interpreter, which is chosen when Triton is imported and so needs a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from _pytest.mark import ParameterSet

Test = TypeVar("Test", bound=Callable[..., Any])

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param(
        "cpu",
        marks=[
            pytest.mark.interpreted,
            pytest.mark.skipif(not INTERPRETED, reason="in a subprocess"),
        ],
    ),
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


def interpreted(test: Test) -> Test:
    """Of a test that only the interpreter runs."""
    skipped = pytest.mark.skipif(not INTERPRETED, reason="in a subprocess")
    marked: Test = pytest.mark.interpreted(skipped(test))
    return marked


def run_interpreted(*, slow: bool) -> None:
    """Run everything that is marked so, in one process of the interpreter."""
    root = Path(__file__).parents[1]
    folder = Path(__file__).parent / "runtime"
    files = [
        file for file in folder.glob("test_*.py") if "from interpreter import" in file.read_text()
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib",
         "-m", f"interpreted and not gpu and {'' if slow else 'not '}slow", *sorted(files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "src"),
                          "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    # pytest is content when all that it found was skipped.
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
