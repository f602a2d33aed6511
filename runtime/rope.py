"""How far rotary embeddings are a function of the position alone."""

from transformers import PretrainedConfig


def context_limit(config: PretrainedConfig) -> int | None:
    """The longest context, in tokens, up to which a token's rotation depends on its position only.

    "longrope" and "dynamic" change their frequencies with the longest position of a call, in
    transformers: beyond this limit a request's results would depend on its neighbours in the batch
    and on how its prompt was cut, and would not equal those of the request alone. None: no limit.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in (parameters, *parameters.values()):
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            limits.append(int(original or config.max_position_embeddings))
        elif kind is not None and "dynamic" in kind:
            limits.append(int(config.max_position_embeddings))
    return min(limits, default=None)
