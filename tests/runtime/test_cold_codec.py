import os
from contextlib import suppress

import msgspec
import numpy as np
import pytest
from cold_stores import make_store, random_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.runtime.cold.chunks import LEAST_BYTES, MOST_BYTES, cut_block, cut_bytes
from headrace.runtime.cold.codec import DamagedObjectError, Header, decode, encode, encode_delta
from headrace.runtime.manifest import Block, TensorSpec, WeightSpec

RUNS = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 40)).map(lambda p: (p[0], p[0] * p[1])),
    min_size=1,
    max_size=4,
)


def header(stored: bytes) -> Header:
    length = int.from_bytes(stored[4:8], "little")
    return msgspec.msgpack.decode(stored[8 : 8 + length], type=Header)


@settings(deadline=None, max_examples=60)
@given(RUNS, st.randoms(use_true_random=False), st.floats(0, 1))
def test_what_was_encoded_comes_back(runs, random, share):
    data = random.randbytes(sum(nbytes for _, nbytes in runs))
    base = bytes(b if random.random() > share else random.randrange(256) for b in data)
    assert bytes(decode(encode(data, runs), len(data))) == data
    assert bytes(decode(encode_delta(data, base, runs), len(data), base)) == data


def test_each_kind_of_bytes_takes_what_pays():
    rng = np.random.default_rng(0)
    weights = random_bf16(rng, 500_000).tobytes()
    planes = encode(weights, [(2, len(weights))])
    assert header(planes).encoding == "planes"
    assert 0.6 < len(planes) / len(weights) < 0.75

    random = os.urandom(100_000)
    assert header(encode(random, [(1, len(random))])).encoding == "raw"
    text = b'{"word": 1}' * 1000
    assert header(encode(text, [(1, len(text))])).encoding == "zstd"


def test_a_few_changed_weights_take_little():
    rng = np.random.default_rng(0)
    base = random_bf16(rng, 1_000_000)
    tuned = base.copy()
    chosen = rng.random(base.size) < 0.05
    tuned[chosen] = random_bf16(rng, int(chosen.sum()))
    delta = encode_delta(tuned.tobytes(), base.tobytes(), [(2, base.nbytes)])
    assert len(delta) < 0.07 * base.nbytes


@pytest.mark.parametrize("kind", ["raw", "zstd", "planes", "delta"])
def test_a_damaged_object_is_an_error_or_other_bytes_but_no_crash(kind):
    rng = np.random.default_rng(0)
    data, runs = random_bf16(rng, 3000).tobytes(), [(2, 6000)]
    base = bytearray(data)
    base[100:120] = os.urandom(20)
    if kind == "zstd":
        data, runs = b"abc" * 2000, [(1, 6000)]
    if kind == "raw":
        data, runs = os.urandom(6000), [(1, 6000)]
    stored = encode_delta(data, base, runs) if kind == "delta" else encode(data, runs)
    assert header(stored).encoding == kind
    for place in [*range(60), *range(60, len(stored), 97)]:
        damaged = bytearray(stored)
        damaged[place] ^= 1 << int(rng.integers(8))
        with suppress(DamagedObjectError):
            assert len(decode(bytes(damaged), len(data), base)) == len(data)
    for length in (0, 3, 9, 40, len(stored) // 2):
        with pytest.raises(DamagedObjectError):
            decode(stored[:length], len(data), base)


def test_a_frame_that_promises_too_much_is_not_unpacked():
    stored = encode(bytes(5_000_000), [(1, 5_000_000)])
    small = Header("zstd", 10, ((1, 10),))
    packed = msgspec.msgpack.encode(small)
    length = int.from_bytes(stored[4:8], "little")
    forged = stored[:4] + len(packed).to_bytes(4, "little") + packed + stored[8 + length :]
    with pytest.raises(DamagedObjectError, match="5000000 bytes when decompressed"):
        decode(forged, 10)


def block_of(*sizes: tuple[str, int]) -> Block:
    weights, offset = {}, 0
    for i, (dtype, nbytes) in enumerate(sizes):
        parts = {"data": TensorSpec(dtype, (nbytes,), offset, nbytes)}
        weights[f"w{i}"] = WeightSpec("raw", (nbytes,), parts)
        offset = -(-(offset + nbytes) // 256) * 256
    return Block("b", None, 4096, -(-offset // 4096) * 4096, "", weights)


def test_chunks_cover_a_block_and_begin_at_tensors(tmp_path):
    big = MOST_BYTES * 2 + 1024
    block = block_of(
        ("U8", 3000), ("F32", 4000), ("U8", 0), ("BF16", big), ("U8", 700_000), ("U8", 700_000)
    )
    chunks = cut_block(block)
    end = 0
    for chunk in chunks:
        assert chunk.offset == end and 0 < chunk.nbytes <= MOST_BYTES
        assert sum(nbytes for _, nbytes in chunk.runs) == chunk.nbytes
        end += chunk.nbytes
    assert end == block.data_offset + block.nbytes
    starts = {chunk.offset - 4096 for chunk in chunks}
    assert block.weights["w3"].parts["data"].offset in starts
    assert chunks[1].runs == ((1, 3072), (4, 4096))

    (layer,) = make_store(tmp_path / "s", layers=1).layers
    sizes = [chunk.nbytes for chunk in cut_block(layer)]
    assert all(LEAST_BYTES <= size <= 2 * LEAST_BYTES for size in sizes[1:-1])


def test_plain_files_are_cut_too():
    assert cut_bytes(0) == []
    assert [c.nbytes for c in cut_bytes(MOST_BYTES + 5)] == [MOST_BYTES, 5]
