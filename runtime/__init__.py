"""Executes one stage's part of a plan on one device: weights, layers, KV pages, sampling. Knows no Ray."""

import logging
import os

# Intel MKL otherwise picks kernels that sum in another order by a product's number of rows and of
# threads; so asked, it gives a row the same bits whatever stands beside it, in one thread or many.
# It reads this once, at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# It recommends a package that would download kernels from a hub while it is imported.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
