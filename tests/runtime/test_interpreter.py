"""Triton's kernels on a CPU: the tests that are marked `interpreted`, all in one process of its own."""

import pytest
from interpreter import HAS_TRITON, INTERPRETED, run_interpreted


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(slow: bool) -> None:
    run_interpreted(slow=slow)
