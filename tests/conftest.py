"""What has to hold before anything is imported."""

import os

# Models this small gain nothing from threads, and OpenMP's spin while they wait for each other:
# beside another process, that takes the runtime's tests three times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As headrace's own cluster has it: Ray's workers would yield to other tests.
os.environ.setdefault("RAY_worker_niceness", "0")
