"""Models that plans are made for and nothing is run of."""

from headrace.scheduler.inputs import ModelShape

LLAMA_70B = ModelShape(
    layer_bytes=(480_000_000 // 4096 * 4096,) * 80,
    kv_format="bf16",
    layer_kv_bytes=(64 * 8 * 128 * 4,) * 80,
    layer_parameters=(855_638_016,) * 80,
    layer_active_parameters=(855_638_016,) * 80,
    largest_matrix=8192 * 28672,
    embed_bytes=2_101_346_304,
    head_bytes=2_101_346_304,
    hidden_size=8192,
    vocab_size=128256,
    intermediate_size=28672,
    max_context=131072,
    compute_bytes=2,
    needs_scratch=True,
)
"""In NF4."""
