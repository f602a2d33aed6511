"""A ring over three hosts that are namespaces of this machine, and a host that is cut off from the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SKIPPED = 77

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_three_hosts_give_the_tokens_of_one_and_heal(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "hosts.py", "--directory", tmp_path]
    done = subprocess.run(
        [*command, "--only", "ring", "machine"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip().removeprefix("skipped: "))
    assert done.returncode == 0, done.stdout
    said = done.stdout
    assert "ring: same tokens as one host: True" in said
    assert "rendezvous at 10.77.0.1, 10.77.0.2, 10.77.0.3" in said
    assert "edges at 10.77.0.1, 10.77.0.2, 10.77.0.3" in said
    assert "machine: cut for 20 s" in said
