"""Seeds that depend on what is generated and on nothing else, so that any rerun draws the same."""

import hashlib

from headrace.cluster.rows import Row

SEED_BITS = 63  # non-negative in a signed 64-bit tensor


def derive_seed(model_digest: str, identity: str | int, index: int) -> int:
    """The seed of sample `index` of a request: a hash, below 2^63.

    `identity` is the user's seed where one was given, else what names the request.
    """
    text = f"{model_digest}\n{identity}\n{index}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def row_seed(digest: str, row: Row, default_seed: int | None, index: int) -> int:
    """Of a row's sample `index`: by its own seed or, without one, by its id."""
    own: str | int | None = row.params.seed
    if own is None:
        own = own_identity(row.id, default_seed)
    return derive_seed(digest, own, index)


def own_identity(row_id: str | int, default_seed: int | None = None) -> str:
    """What a row's seeds are derived from where it has no seed."""
    return f"{default_seed} {row_id}"
