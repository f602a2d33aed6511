"""Whether huggingface_hub may use the network, which it is told before it is imported."""

import os

OFFLINE = "HF_HUB_OFFLINE"

OURS = "yes"
"""What the command line sets it to, as true as what people write there: 1."""


def is_by_user() -> bool:
    return os.environ.get(OFFLINE, OURS) != OURS
