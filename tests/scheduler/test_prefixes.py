"""Keys of pages: a function of every token so far, of whose they are and of what computed them."""

import struct
from hashlib import blake2b

import pytest

from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.prefixes import extend_keys, root_key

TOKENS = [(7 * i) % 1000 for i in range(4 * PAGE_TOKENS)]


def keys_of(tokens: list[int], count: int, *, identity: str = "m", tenant: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, identity, tenant, tokens, count)
    return keys


def test_a_key_is_a_hash_of_the_key_before_and_of_32_bit_tokens() -> None:
    page = struct.pack(f"<{PAGE_TOKENS}i", *TOKENS[:PAGE_TOKENS])
    assert keys_of(TOKENS, 1) == [blake2b(root_key("m", "") + page, digest_size=16).digest()]


def test_keys_can_be_made_page_by_page() -> None:
    keys: list[bytes] = []
    for count in (0, 1, 1, 3, 2, 4):
        extend_keys(keys, "m", "", TOKENS, count)
    assert keys == keys_of(TOKENS, 4)
    assert len(set(keys)) == 4


@pytest.mark.parametrize("place", [0, PAGE_TOKENS - 1, PAGE_TOKENS])
def test_one_token_changes_its_page_and_all_behind(place: int) -> None:
    other = [*TOKENS[:place], TOKENS[place] + 1, *TOKENS[place + 1 :]]
    alike = [a == b for a, b in zip(keys_of(TOKENS, 3), keys_of(other, 3), strict=True)]
    assert alike == [number < place // PAGE_TOKENS for number in range(3)]


def test_identities_and_tenants_have_nothing_in_common() -> None:
    roots = {root_key(*pair) for pair in (("m", ""), ("m", "a"), ("ma", ""), ("", "ma"), ("n", ""))}
    assert len(roots) == 5


def test_a_page_that_is_not_full_has_no_key() -> None:
    with pytest.raises(AssertionError):
        keys_of(TOKENS[:-1], 4)
