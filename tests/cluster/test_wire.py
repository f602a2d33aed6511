"""Stage messages: what goes in comes out, on any thread."""

import subprocess
import sys
from pathlib import Path

FIRST_ON_MANY_THREADS = """
import sys, threading
sys.setswitchinterval(1e-6)
from headrace.cluster.wire import decode, encode
from headrace.scheduler.plan import MicroBatch, Pass, Slice

sent = Pass(1, (MicroBatch((Slice(1, 0, (1, 2), (0,), None),)),), None, ())
payload, start, right = encode(sent), threading.Barrier(4), []

def receive():
    start.wait()
    right.append(decode(payload, Pass) == sent)

threads = [threading.Thread(target=receive) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert right == [True] * 4, right
"""


def test_the_first_messages_of_a_kind_may_come_on_several_threads() -> None:
    """An actor decodes one pass while another one comes. Without a lock msgspec ends nearly every such
    process by a signal."""
    source = str(Path(__file__).parents[2] / "src")
    for _ in range(3):
        command = [sys.executable, "-c", FIRST_ON_MANY_THREADS]
        run = subprocess.run(
            command, check=False, env={"PYTHONPATH": source}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
