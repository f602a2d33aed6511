"""Seeds that depend on what is generated and on nothing else, so that any rerun draws the same."""

import hashlib

SEED_BITS = 63  # non-negative in a signed 64-bit tensor


def derive_seed(model_digest: str, identity: str | int, index: int) -> int:
    """The seed of sample `index` of a request: a hash, below 2^63.

    `identity` is the user's seed where one was given, else what names the request.
    """
    text = f"{model_digest}\n{identity}\n{index}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)
