import json
import os

import pytest
import torch
from safetensors import safe_open

from headrace.runtime.block_file import BlockWriter, Entry, lay_out, read_header, write_durably
from headrace.runtime.manifest import (
    ALIGN_BLOCK,
    ALIGN_TENSOR,
    Block,
    LayerShape,
    TensorSpec,
    WeightSpec,
    block_from_json,
    block_to_json,
)
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError

ENTRIES = (
    Entry("a", "BF16", (3, 5)),
    Entry("b", "U8", ()),
    Entry("empty", "F32", (0, 4)),
    Entry("c", "F32", (1000, 3)),
)


def contents(entry):
    return os.urandom(entry.nbytes)


def write_block(file, entries=ENTRIES):
    layout = lay_out(entries)
    data = {entry.name: contents(entry) for entry in entries}
    with BlockWriter(file, layout) as writer:
        for entry in entries:
            half = entry.nbytes // 2
            for piece in (data[entry.name][:half], data[entry.name][half:]):
                if piece:
                    writer.write(entry.name, piece)
        written = writer.finish()
    return layout, written, data


def make_store(path):
    """A store of three blocks with one raw weight each, and its manifest."""
    path.mkdir()
    entries = []
    for name in ("embed", "layer-00000", "head"):
        file = path / f"{name}.safetensors"
        entry = Entry(f"{name}.weight", "F32", (300, 3))
        layout, written, _ = write_block(file, (entry,))
        spec = WeightSpec("raw", (300, 3), {"data": layout.tensors[entry.name]})
        block = Block(
            name, file, len(layout.header), layout.nbytes, written.data_hash, {entry.name: spec}
        )
        entries.append(block_to_json(block, written.header_hash))
    manifest = {
        "version": 1,
        "source": "f00",
        "options": {"format": "keep", "policy": [], "double_quant": False},
        "format": "fp32",
        "dtype": "F32",
        "tied": False,
        "layer_shapes": [
            {
                "kv_heads": 2,
                "k_dim": 16,
                "v_dim": 16,
                "parameters": 900,
                "active_parameters": 900,
                "largest_matrix": 900,
            }
        ],
        "blocks": entries,
    }
    write_durably(path / "headrace.json", json.dumps(manifest).encode())
    write_durably(path / "config.json", b'{"model_type": "llama"}')
    return Store.open(path)


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_block_is_aligned_and_any_reader_opens_it(tmp_path):
    file = tmp_path / "b.safetensors"
    layout, _, data = write_block(file)
    assert len(layout.header) % ALIGN_BLOCK == 0 and layout.nbytes % ALIGN_BLOCK == 0
    assert file.stat().st_size == layout.file_bytes
    whole = file.read_bytes()[len(layout.header) :]
    for entry in ENTRIES:
        spec = layout.tensors[entry.name]
        assert spec.offset % ALIGN_TENSOR == 0
        assert whole[spec.offset : spec.offset + spec.nbytes] == data[entry.name]
    with safe_open(file, framework="pt") as reader:
        assert bytes(reader.get_tensor("a").view(torch.uint8).flatten().numpy()) == data["a"]
        assert {entry.name for entry in ENTRIES} <= set(reader.keys())
    specs, start = read_header(file)
    assert start == len(layout.header)
    assert {name: specs[name] for name in layout.tensors} == layout.tensors


def test_unfinished_block_leaves_nothing(tmp_path):
    file = tmp_path / "b.safetensors"
    with pytest.raises(KeyboardInterrupt), BlockWriter(file, lay_out(ENTRIES)) as writer:
        writer.write("a", bytes(30))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_block_survives_json():
    spec = WeightSpec(
        "nf4", (2, 64), {"data": TensorSpec("U8", (64, 1), 0, 64)}, 64, 256, 0.12345678901234567
    )
    from pathlib import Path

    block = Block("layer-00001", Path("/s/layer-00001.safetensors"), 4096, 8192, "ab", {"w": spec})
    entry = json.loads(json.dumps(block_to_json(block, "cd")))
    assert block_from_json(Path("/s"), entry) == block


def test_open_gives_what_was_written(tmp_path):
    store = make_store(tmp_path / "s")
    assert (store.embed.name, store.head.name, len(store.layers)) == ("embed", "head", 1)
    assert store.layer_shapes == (LayerShape(2, 16, 16, 900, 900, 900),)
    assert store.nbytes == 3 * 4096
    data = store.read_block(store.layers[0])
    assert len(data) == 4096
    checked = []
    store.verify(lambda done, total: checked.append((done, total)))
    assert checked[-1] == (store.nbytes, store.nbytes)
    assert store.digest == Store.open(tmp_path / "s").digest


def test_digest_depends_on_weights_and_configuration(tmp_path):
    one, other = make_store(tmp_path / "a"), make_store(tmp_path / "b")
    assert one.digest != other.digest
    edit(tmp_path / "a" / "config.json", lambda config: config.update(rope_theta=1.0))
    assert Store.open(tmp_path / "a").digest != one.digest


@pytest.mark.parametrize("where", [8, 9, 4000, 4096, 5000, -1])
def test_verify_finds_any_flipped_byte(tmp_path, where):
    store = make_store(tmp_path / "s")
    file = store.layers[0].file
    data = bytearray(file.read_bytes())
    data[where] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"'layer-00000' is damaged: the (data|header) of .*layer"):
        Store.open(tmp_path / "s").verify()


def test_truncated_block_names_file_and_sizes(tmp_path):
    store = make_store(tmp_path / "s")
    os.truncate(store.head.file, 5000)
    with pytest.raises(StoreError, match=r"head\.safetensors has 5000 bytes instead of 8192"):
        Store.open(tmp_path / "s")


def test_missing_block_is_named(tmp_path):
    store = make_store(tmp_path / "s")
    store.embed.file.unlink()
    with pytest.raises(StoreError, match=r"'embed' is missing.*embed\.safetensors"):
        Store.open(tmp_path / "s")


def test_open_says_what_the_directory_is_instead(tmp_path):
    with pytest.raises(StoreError, match="no such directory"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"not a store: it has no headrace\.json"):
        Store.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"is a Hugging Face checkpoint.*run headrace convert"):
        Store.open(tmp_path)
    (tmp_path / "headrace-convert.jsonl").write_text("{}\n{}\n")
    with pytest.raises(
        StoreError, match=r"unfinished conversion \(1 blocks.*same headrace convert"
    ):
        Store.open(tmp_path)


def test_open_refuses_other_versions_and_damaged_manifests(tmp_path):
    make_store(tmp_path / "s")
    manifest = tmp_path / "s" / "headrace.json"
    text = manifest.read_text()
    edit(manifest, lambda value: value.update(version=2))
    with pytest.raises(StoreError, match="version 2, this release reads version 1"):
        Store.open(tmp_path / "s")
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(StoreError, match=r"headrace\.json is damaged"):
        Store.open(tmp_path / "s")
    manifest.write_text(text)
    edit(manifest, lambda value: value.pop("tied"))
    with pytest.raises(StoreError, match=r"headrace\.json is damaged"):
        Store.open(tmp_path / "s")
