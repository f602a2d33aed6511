"""What has to hold before anything is imported."""

import os

# Models this small gain nothing from threads, and OpenMP's spin while they wait for each other:
# beside another process, that takes the runtime's tests three times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
