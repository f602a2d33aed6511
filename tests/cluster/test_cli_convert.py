import json

import pytest
import torch
from rich.console import Console
from small_shapes import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.cluster.bench.random_store import write_store
from headrace.cluster.cli.convert import parse_policy, run_convert, run_inspect
from headrace.scheduler.errors import HeadraceError, StoreError


@pytest.fixture
def checkpoint(tmp_path):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    return tmp_path / "src"


def convert(console, source, dest, policy=()):
    return run_convert(
        console,
        source,
        dest,
        format="nf4",
        policy=policy,
        double_quant=False,
        allow_missing_tokenizer=False,
        self_check=None,
    )


def test_convert_and_inspect_print_tables(checkpoint, tmp_path):
    console = Console(record=True, width=120)
    store = convert(console, checkpoint, tmp_path / "store", [("model.layers.3.*_proj.*", "keep")])
    text = console.export_text()
    assert "4 layers" in text and store.digest in text and "nf4, the rest in bf16" in text
    run_inspect(console, tmp_path / "store", verify=True, as_json=False)
    text = console.export_text()
    assert "layer-00000 ... layer-00002" in text and "layer-00003" in text
    assert "verified: all 6 blocks" in text


def test_inspect_as_json(checkpoint, tmp_path):
    store = convert(Console(quiet=True), checkpoint, tmp_path / "store")
    console = Console(record=True, width=120)
    run_inspect(console, tmp_path / "store", verify=False, as_json=True)
    facts = json.loads(console.export_text())
    assert facts["digest"] == store.digest and facts["format"] == "nf4"
    assert sum(block["nbytes"] for block in facts["blocks"]) == facts["nbytes"] == store.nbytes


def test_inspect_says_how_layers_are_split(checkpoint, tmp_path):
    dense = convert(Console(quiet=True), checkpoint, tmp_path / "dense")
    store = write_store(tmp_path / "store", small_config("deepseek-v3"), "nf4")
    console = Console(record=True, width=120)
    run_inspect(console, store.path, verify=False, as_json=False)
    text = console.export_text()
    assert "dense + experts" in text and "8 x 12.3 kB" in text
    run_inspect(console, store.path, verify=False, as_json=True)
    blocks = json.loads(console.export_text())["blocks"]
    assert [block["experts"] is None for block in blocks] == [True, True, False, True]
    split = blocks[2]["experts"]
    assert split["count"] == 8
    assert 0 <= split["dense_bytes"] + 8 * split["expert_bytes"] - blocks[2]["nbytes"] < 16 * 4096
    run_inspect(console, dense.path, verify=False, as_json=False)
    assert "experts" not in console.export_text()


def test_inspect_names_the_damaged_block(checkpoint, tmp_path):
    store = convert(Console(quiet=True), checkpoint, tmp_path / "store")
    data = bytearray(store.layers[2].file.read_bytes())
    data[-4000] ^= 1
    store.layers[2].file.write_bytes(data)
    with pytest.raises(StoreError, match="'layer-00002' is damaged"):
        run_inspect(Console(quiet=True), tmp_path / "store", verify=True, as_json=False)


def test_policy_rules():
    assert parse_policy(["a=b=int8", "*=keep"]) == (("a=b", "int8"), ("*", "keep"))
    for rule in ("nf4", "=nf4", "*="):
        with pytest.raises(HeadraceError, match="PATTERN=FORMAT"):
            parse_policy([rule])
