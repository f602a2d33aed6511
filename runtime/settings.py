"""What a configuration says of the whole model, as the planner wants it."""

from transformers import PretrainedConfig

from headrace.runtime.manifest import ModelSettings
from headrace.runtime.names import experts_per_token
from headrace.runtime.rope import context_limit


def model_settings(config: PretrainedConfig) -> ModelSettings:
    return ModelSettings(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        intermediate_size=_intermediate_size(config),
        attention_heads=int(config.num_attention_heads),
        experts_per_token=experts_per_token(config),
        max_context=_max_context(config),
    )


def _max_context(config: PretrainedConfig) -> int:
    """What the model was made for, and no further than where its rotary embedding starts to depend
    on the other sequences of a call."""
    limits = (getattr(config, "max_position_embeddings", None), context_limit(config))
    return min((limit for limit in limits if limit), default=1 << 20)


def _intermediate_size(config: PretrainedConfig) -> int:
    """MLP columns of one token: its experts' together where there are any."""
    top_k = experts_per_token(config)
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    expert = getattr(config, "moe_intermediate_size", None)
    if isinstance(expert, int):
        return max(int(dense), expert * top_k)
    return int(dense) * top_k
