"""Sizes of mixtures of experts as they lie in a store of NF4, computed from their configurations."""

from headrace.scheduler.inputs import Experts, ModelShape

NF4_BITS = 4.5


def packed(parameters: int) -> int:
    """Bytes of matrices in NF4 with a float32 scale for 64 weights, up to a page."""
    return -int(-parameters * NF4_BITS / 8 // 4096) * 4096


def mixture(
    layers: int,
    hidden: int,
    vocab: int,
    *,
    attention: int,
    shared: int = 0,
    expert_size: int,
    experts: int,
    per_token: int,
    kv_columns: int,
    dense_layers: int = 0,
    dense_size: int = 0,
    element: int = 2,
) -> ModelShape:
    """`attention` and `shared` are matrix elements of a layer that every token needs, `kv_columns`
    those of a token's keys and values; the first layers have an MLP of `dense_size` instead."""
    expert = 3 * hidden * expert_size
    held = packed(attention + shared) + experts * hidden * element // 4096 * 4096
    split = Experts(experts, per_token, held, packed(expert) + 4096)
    first = attention + 3 * hidden * dense_size
    active = attention + shared + per_token * expert
    mixed, plain = layers - dense_layers, dense_layers
    return ModelShape(
        layer_bytes=(packed(first),) * plain + (held + experts * packed(expert),) * mixed,
        kv_format="bf16",
        layer_kv_bytes=(64 * kv_columns * element,) * layers,
        layer_parameters=(first,) * plain + (attention + shared + experts * expert,) * mixed,
        layer_active_parameters=(first,) * plain + (active,) * mixed,
        largest_matrix=hidden * max(expert_size, dense_size, 2 * hidden),
        embed_bytes=vocab * hidden * element,
        head_bytes=vocab * hidden * element,
        hidden_size=hidden,
        vocab_size=vocab,
        intermediate_size=max(dense_size, per_token * expert_size),
        max_context=32768,
        compute_bytes=element,
        needs_scratch=True,
        experts=(None,) * plain + (split,) * mixed,
    )


MIXTRAL = mixture(
    32,
    4096,
    32000,
    attention=2 * 4096**2 + 2 * 4096 * 1024,
    expert_size=14336,
    experts=8,
    per_token=2,
    kv_columns=2 * 1024,
)
QWEN3_235B = mixture(
    94,
    4096,
    151936,
    attention=2 * 4096 * 8192 + 2 * 4096 * 512,
    expert_size=1536,
    experts=128,
    per_token=8,
    kv_columns=2 * 512,
)
DEEPSEEK_V3 = mixture(
    61,
    7168,
    129280,
    attention=7168 * (1536 + 576 + 16384) + 1536 * 24576 + 512 * 32768,
    shared=3 * 7168 * 2048,
    expert_size=2048,
    experts=256,
    per_token=8,
    kv_columns=128 * (192 + 128),
    dense_layers=3,
    dense_size=18432,
)
TINY_MIXTURE = mixture(
    6,
    64,
    512,
    attention=4 * 64**2,
    expert_size=128,
    experts=8,
    per_token=2,
    kv_columns=64,
    element=4,
)
