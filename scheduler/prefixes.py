"""Keys of full pages: equal where and only where every token from the sequence's first on is."""

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

from headrace.scheduler.plan import PAGE_TOKENS

KEY_BYTES = 16

_pack_page = Struct(f"<{PAGE_TOKENS}i").pack


def root_key(identity: str, tenant: str, adapter: str = "") -> bytes:
    """What the first page's key is chained to.

    `identity` is all that keys and values depend on besides tokens and an `adapter`, by its digest. No page
    is found by two tenants, or with two adapters, or with one and without any.
    """
    if not adapter:
        return _digest(f"{len(identity)}:{identity}{tenant}".encode())
    # No root without an adapter begins with a dash.
    return _digest(f"-{len(identity)}:{identity}{len(tenant)}:{tenant}{adapter}".encode())


def extend_keys(
    keys: list[bytes],
    identity: str,
    tenant: str,
    tokens: Sequence[int],
    count: int,
    adapter: str = "",
) -> None:
    """Append what `keys` lacks of the keys of the first `count` pages of `tokens`."""
    if count <= len(keys):
        return
    assert count * PAGE_TOKENS <= len(tokens), (count, len(tokens))
    key = keys[-1] if keys else root_key(identity, tenant, adapter)
    for start in range(len(keys) * PAGE_TOKENS, count * PAGE_TOKENS, PAGE_TOKENS):
        key = _digest(key + _pack_page(*tokens[start : start + PAGE_TOKENS]))
        keys.append(key)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES).digest()
