"""What the planner is told of a store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_shapes import small_config

from headrace.cluster.bench.random_store import write_store
from headrace.runtime.manifest import ALIGN_BLOCK, MANIFEST
from headrace.runtime.settings import model_settings
from headrace.runtime.shape import model_shape
from headrace.runtime.skeleton import parse_config
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS


@pytest.mark.parametrize("fmt", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-235b", "deepseek-v3"])
def test_experts_can_be_read_alone(tmp_path: Path, name: str, fmt: str) -> None:
    store = write_store(tmp_path / "store", small_config(name), fmt)
    shape = model_shape(store, "float32")
    assert shape.can_split
    dense = 1 if name == "deepseek-v3" else 0
    assert [experts is None for experts in shape.experts] == [i < dense for i in range(2)]
    held = shape.held_bytes(split=True)
    for layer in range(dense, 2):
        experts, block = shape.experts_of(layer), store.layers[layer]
        assert experts is not None
        assert (experts.count, experts.per_token) == (8, 2)
        assert held[layer] == experts.dense_bytes < shape.layer_bytes[layer]
        # Neighbours may share a page.
        pages = experts.dense_bytes + experts.count * experts.expert_bytes
        assert 0 <= pages - block.nbytes <= 2 * experts.count * ALIGN_BLOCK
        assert experts.expert_bytes % ALIGN_BLOCK == experts.dense_bytes % ALIGN_BLOCK == 0
    assert shape.held_bytes(split=False) == shape.layer_bytes


def test_a_model_without_experts(tmp_path: Path) -> None:
    shape = model_shape(write_store(tmp_path / "store", small_config("8b"), "nf4"), "float32")
    assert not shape.can_split and shape.expert_bytes == 0
    assert shape.held_bytes(split=True) == shape.layer_bytes


def test_pages_and_tails_in_each_format(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", small_config("8b"), "nf4")
    layer, layers = store.layer_shapes[0], len(store.layers)
    numbers = 64 * layer.kv_heads * (layer.k_dim + layer.v_dim)
    plain = model_shape(store, "bfloat16")
    assert (plain.kv_format, plain.layer_tail_bytes) == ("bf16", ())
    assert plain.layer_kv_bytes == (2 * numbers,) * layers
    assert model_shape(store, "float32").kv_format == "fp32"
    assert model_shape(store, "float32", FORMATS["bf16"]).layer_kv_bytes == plain.layer_kv_bytes
    int8 = model_shape(store, "float32", FORMATS["int8"])
    assert int8.layer_kv_bytes == (numbers + 64 * layer.kv_heads * 4,) * layers
    assert int8.layer_tail_bytes == (4 * numbers,) * layers


@pytest.mark.parametrize("name", ["8b", "mixtral-8x7b", "qwen3-235b", "deepseek-v3"])
def test_a_store_from_before_settings_has_the_same_shape(tmp_path: Path, name: str) -> None:
    path = tmp_path / "store"
    store = write_store(path, small_config(name), "nf4")
    assert store.settings == model_settings(parse_config(store.config, name))
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["settings"]
    (path / MANIFEST).write_text(json.dumps(manifest))
    before = Store.open(path)
    assert before.settings is None
    assert (before.digest, model_shape(before, "bfloat16")) == (
        store.digest,
        model_shape(store, "bfloat16"),
    )


def test_planning_imports_no_models_code(tmp_path: Path) -> None:
    """A driver plans while Ray starts, which needs its core and its interpreter."""
    write_store(tmp_path / "store", small_config("8b"), "nf4")
    code = (
        "import sys; from headrace.cluster import launch; from headrace.runtime.store import Store;"
        "from headrace.cluster.run_plan import resolve_device, shape_in;"
        "shape_in(Store.open(sys.argv[1]), 'float32', 'int8'); resolve_device('cpu');"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
