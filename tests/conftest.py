"""What has to hold before anything is imported."""

import os
import sys

# Models this small gain nothing from threads, and OpenMP's spin while they wait for each other:
# beside another process, that takes the runtime's tests three times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Stages and some tests ask for two threads all the same: these sleep while they wait for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# As headrace's own cluster has it: Ray's workers would yield to other tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# Tests are processes by the hundred: each would compile all modules and rewrite all assertions again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
