import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import stored_weights
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from headrace.runtime.bnb import functional as bnb
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError, UnsupportedModelError

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.arange(12)[None]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_checkpoint(path, model_type="llama", dtype=torch.float32, shard="1GB", **changes):
    torch.manual_seed(0)
    base = MIXTRAL if model_type == "mixtral" else LLAMA
    config = AutoConfig.for_model(model_type, **(base | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text("{}")
    return model


def load_tensors(path):
    """The tensors of a checkpoint by name."""
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def decoded(store):
    """Every weight of a store by name, in float32."""
    return {n: w for block in store.blocks for n, w in stored_weights(store, block).items()}


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keep_keeps_every_byte(tmp_path, tied, shard, dtype):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source, dtype=dtype, shard=shard, tie_word_embeddings=tied)
    assert len(list(source.glob("*.safetensors"))) == 1 or shard != "1GB"
    store = convert(source, dest, format="keep")
    store.verify()
    stored, original = decoded(store), load_tensors(source)
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name].float()) for name in original)
    assert store.tied is tied
    assert ("lm_head.weight" in store.head.weights) is not tied
    assert list(store.embed.weights) == ["model.embed_tokens.weight"]
    assert "model.norm.weight" in store.head.weights
    assert len(store.layers) == 3 and len(store.layer_shapes) == 3
    shape = store.layer_shapes[0]
    assert (shape.kv_heads, shape.k_dim, shape.v_dim) == (2, 16, 16)
    assert not list(dest.glob("*.tmp")) and not list(dest.glob("*.jsonl"))


def open_with_transformers(path, caplog, capfd):
    """from_pretrained, which must have nothing to say about missing or unexpected weights."""
    caplog.clear()
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    said = caplog.text + "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "MISSING" not in said
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("fmt", "double_quant", "dtype", "tolerance"),
    [
        ("keep", False, torch.float32, 1e-6),
        ("bf16", False, torch.float32, 2e-2),
        # bitsandbytes' CPU kernel rounds the scales to bfloat16; the weights are compared exactly.
        ("nf4", False, torch.float32, 1e-2),
        ("nf4", True, torch.float32, 1e-2),
        ("nf4", True, torch.bfloat16, 4e-2),
        ("int8", False, torch.float16, 4e-2),
    ],
)
def test_from_pretrained_opens_the_store(
    tmp_path, caplog, capfd, fmt, double_quant, dtype, tolerance, tied
):
    source, dest = tmp_path / "src", tmp_path / "store"
    reference = make_checkpoint(source, dtype=dtype, tie_word_embeddings=tied).float()
    store = convert(source, dest, format=fmt, double_quant=double_quant)
    assert (dest / "tokenizer.json").exists() and (dest / "generation_config.json").exists()
    weights = decoded(store)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    reference.load_state_dict(weights)
    model = open_with_transformers(dest, caplog, capfd)
    if fmt in ("nf4", "int8"):
        layer = model.model.layers[0].mlp
        assert type(layer.up_proj).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[fmt]
        assert type(model.lm_head) is torch.nn.Linear
        if fmt == "nf4":
            theirs = bnb.dequantize_4bit(
                layer.up_proj.weight.data, layer.up_proj.weight.quant_state
            )
            ours = weights["model.layers.0.mlp.up_proj.weight"].to(theirs.dtype)
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        expected, got = reference(IDS).logits, model(IDS).logits.float()
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_nf4_bytes_are_those_transformers_would_save(tmp_path):
    source, theirs, ours = tmp_path / "src", tmp_path / "theirs", tmp_path / "ours"
    make_checkpoint(source)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
    model.save_pretrained(theirs)
    convert(source, ours, format="nf4", double_quant=True)
    expected, got = load_tensors(theirs), load_tensors(ours)
    got = {name: tensor for name, tensor in got.items() if not name.startswith("pad.")}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert json.loads(bytes(got[name].numpy())) == json.loads(bytes(tensor.numpy()))
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("fmt", ["keep", "nf4"])
def test_quantized_checkpoint_is_not_requantized(tmp_path, caplog, capfd, fmt):
    source, four_bit, dest = tmp_path / "src", tmp_path / "nf4", tmp_path / "store"
    make_checkpoint(source)
    for kind in ("nf4", "fp4"):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
        model.save_pretrained(four_bit / kind)
        (four_bit / kind / "tokenizer.json").write_text("{}")
        store = convert(four_bit / kind, dest / kind, format=fmt)
        assert store.format == kind
        original = load_tensors(four_bit / kind)
        stored = load_tensors(dest / kind)
        assert all(torch.equal(stored[name], original[name]) for name in original)
        again = open_with_transformers(dest / kind, caplog, capfd)
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(StoreError, match="already quantized to nf4"):
        convert(four_bit / "nf4", tmp_path / "other", format="int8")


def test_int8_checkpoint_is_kept(tmp_path, caplog, capfd):
    source, int8, dest = tmp_path / "src", tmp_path / "int8", tmp_path / "store"
    make_checkpoint(source, dtype=torch.float16)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization)
    model.save_pretrained(int8)
    (int8 / "tokenizer.json").write_text("{}")
    store = convert(int8, dest, format="keep")
    assert (store.format, store.dtype) == ("int8", "F16")
    original, stored = load_tensors(int8), load_tensors(dest)
    assert all(torch.equal(stored[name], original[name]) for name in original)
    weight = "model.layers.0.mlp.up_proj.weight"
    error = decoded(store)[weight] - load_tensors(source)[weight].float()
    assert error.abs().max() < 1e-3
    open_with_transformers(dest, caplog, capfd)


def test_experts_lie_one_after_the_other(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source, "mixtral")
    store = convert(source, dest, format="nf4")
    weights = store.layers[1].weights
    experts = [name for name in weights if ".experts." in name]
    order = [(name.split(".experts.")[1]) for name in experts]
    assert order == [f"{e}.{w}.weight" for e in range(4) for w in ("w1", "w3", "w2")]
    ends = [
        (min(p.offset for p in parts), max(p.offset + p.nbytes for p in parts))
        for parts in (weights[name].parts.values() for name in experts)
    ]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all(weights[name].format == "nf4" for name in experts)
    router = next(name for name in weights if name.endswith(".gate.weight"))
    assert weights[router].format == "raw"
    shape = store.layer_shapes[1]
    assert shape.active_parameters < shape.parameters
    original, got = load_tensors(source), decoded(store)
    name = experts[0]
    assert (got[name] - original[name]).norm() < 0.12 * original[name].norm()


def test_policy_decides_by_first_match(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source)
    policy = [
        ("model.layers.0.mlp.*", "keep"),
        ("*.down_proj.weight", "int8"),
        ("lm_head.weight", "int8"),
        ("*embed_tokens*", "bf16"),
    ]
    store = convert(source, dest, format="nf4", policy=policy)
    formats = {n: s.format for block in store.blocks for n, s in block.weights.items()}
    assert formats["model.layers.0.mlp.down_proj.weight"] == "raw"
    assert formats["model.layers.1.mlp.down_proj.weight"] == "int8"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "nf4"
    assert formats["lm_head.weight"] == "int8"
    table = store.embed.weights["model.embed_tokens.weight"].parts["data"]
    assert table.dtype == "BF16"
    skipped = store.config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.up_proj" in skipped and "lm_head" not in skipped


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([("model.norm.weight", "int8")], r"model\.norm\.weight cannot be stored as int8"),
        ([("*.nothing", "keep")], r"pattern '\*\.nothing' decides about no tensor"),
        ([("*", "int5")], "unknown format 'int5'"),
    ],
)
def test_policies_that_cannot_be_followed(tmp_path, policy, message):
    make_checkpoint(tmp_path / "src")
    with pytest.raises(StoreError, match=message):
        convert(tmp_path / "src", tmp_path / "store", format="nf4", policy=policy)


def test_bf16_leaves_what_is_stored_more_precisely(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source, dtype=torch.float16)
    tensors = load_tensors(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    store = convert(source, dest, format="bf16")
    assert store.head.weights["model.norm.weight"].parts["data"].dtype == "F32"
    assert store.head.weights["lm_head.weight"].parts["data"].dtype == "BF16"
    assert store.config["dtype"] == "bfloat16"


def refused(source, dest, message, **options):
    with pytest.raises(StoreError, match=message):
        convert(source, dest, **options)


def test_sources_that_are_no_checkpoint(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    refused(source, dest, "src is no directory")
    make_checkpoint(source, shard="100KB")
    shards = sorted(source.glob("*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-10])
    refused(source, dest, rf"{shards[0].name} is truncated: .* {len(whole)} bytes")
    shards[0].write_bytes(b"\xff" * 100)
    refused(source, dest, f"{shards[0].name} is damaged or no safetensors")
    shards[0].unlink()
    refused(source, dest, f"lacks 1 of the {len(shards)} files.*{shards[0].name}")
    (source / "model.safetensors.index.json").unlink()
    refused(source, dest, "has no model.safetensors")
    (source / "pytorch_model.bin").write_bytes(b"")
    refused(source, dest, "as pickles")
    (source / "config.json").unlink()
    refused(source, dest, "no config.json")
    assert not dest.exists()


def test_checkpoints_that_lack_something(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source)
    tensors = load_tensors(source)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, dest, r"lacks 1 of the weights.*model\.layers\.1\.mlp\.up_proj\.weight")
    (source / "tokenizer.json").unlink()
    refused(source, dest, "has no tokenizer")
    make_checkpoint(source)
    (source / "tokenizer.json").unlink()
    convert(source, dest, allow_missing_tokenizer=True, format="keep")


def test_self_check_refuses_before_anything_is_written(tmp_path):
    make_checkpoint(tmp_path / "src")

    def refuse(config):
        raise UnsupportedModelError(f"{config.model_type} is wrong")

    with pytest.raises(UnsupportedModelError, match="llama is wrong"):
        convert(tmp_path / "src", tmp_path / "store", self_check=refuse)
    assert list((tmp_path / "store").iterdir()) == []


def test_finished_store_is_left_alone(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source)
    first = convert(source, dest, format="keep")
    reports = []
    assert convert(source, dest, format="keep", progress=reports.append).digest == first.digest
    assert reports == []
    refused(source, dest, "already a store", format="bf16")
    refused(dest, tmp_path / "other", "is a store already")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(source, tmp_path / "full", r"not empty \(it holds notes\.txt\)", format="keep")


class Stop(Exception):
    pass


def stop_at(block):
    def progress(report):
        if report.block == block:
            raise Stop

    return progress


def test_resumes_with_the_same_options_only(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source)
    with pytest.raises(Stop):
        convert(source, dest, format="nf4", progress=stop_at("layer-00002"))
    with pytest.raises(StoreError, match=r"unfinished conversion \(3 blocks"):
        Store.open(dest)
    refused(source, dest, "with other options", format="int8")
    other = tmp_path / "other"
    make_checkpoint(other, vocab_size=301)
    refused(other, dest, "from another checkpoint", format="nf4")
    reports = []
    store = convert(source, dest, format="nf4", progress=reports.append)
    assert {report.block for report in reports} == {"layer-00002", "head"}
    assert reports[0].resumed > 0
    assert reports[-1].done == reports[-1].total
    store.verify()


def test_two_conversions_do_not_meet(tmp_path):
    source, dest = tmp_path / "src", tmp_path / "store"
    make_checkpoint(source)
    messages = []

    def meet(_):
        with pytest.raises(StoreError) as info:
            convert(source, dest, format="keep")
        messages.append(str(info.value))
        raise Stop

    with pytest.raises(Stop):
        convert(source, dest, format="keep", progress=meet)
    assert "another conversion is writing" in messages[0]


FORKS = """
import os, sys
import headrace.runtime.bnb
from headrace.runtime.conversion.convert import convert
for _ in sys.stdin:
    child = os.fork()
    if not child:
        convert(sys.argv[1], sys.argv[2], format="nf4", double_quant=True)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_instant_resumes_to_the_same_bytes(tmp_path):
    source, dest, whole = tmp_path / "src", tmp_path / "store", tmp_path / "whole"
    make_checkpoint(source, num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    convert(source, whole, format="nf4", double_quant=True)
    instants, kills = random.Random(0), 0
    # One process pays for the imports and forks the conversions that are killed.
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, str(source), str(dest)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        while not (dest / "headrace.json").exists():
            print(file=forks.stdin, flush=True)
            child = int(forks.stdout.readline())
            # Up to the first sign of work or somewhat further, so that every run gets somewhere.
            wait_for_change(dest, timeout=5)
            time.sleep(instants.uniform(0.0, 0.04))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            kills += int(forks.stdout.readline()) == signal.SIGKILL
        forks.stdin.close()
    assert kills >= 3
    convert(source, dest, format="nf4", double_quant=True).verify()
    assert files_of(dest) == files_of(whole)


def wait_for_change(dest, timeout):
    """Until a file appears in the directory that was not there before."""
    deadline = time.monotonic() + timeout
    before = {file.name for file in dest.iterdir()} if dest.exists() else set()
    while time.monotonic() < deadline:
        if dest.exists() and {file.name for file in dest.iterdir()} - before:
            return
        time.sleep(0.001)


def test_torn_journal_line_is_forgotten(tmp_path):
    source, dest, whole = tmp_path / "src", tmp_path / "store", tmp_path / "whole"
    make_checkpoint(source)
    convert(source, whole, format="keep")
    with pytest.raises(Stop):
        convert(source, dest, format="keep", progress=stop_at("head"))
    journal = dest / "headrace-convert.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    (dest / "head.safetensors.tmp").write_bytes(b"half")
    convert(source, dest, format="keep")
    assert files_of(dest) == files_of(whole)


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_disk_that_is_too_small_or_fills_up(tmp_path, small_disk):
    source, dest = tmp_path / "src", small_disk / "store"
    make_checkpoint(source)
    filler: Path = small_disk / "filler"
    filler.write_bytes(bytes(700_000))
    refused(source, dest, r"needs [\d,]+ more bytes at .*free [\d,]+ bytes or", format="keep")
    filler.unlink()

    def fill(report):
        if report.block == "layer-00001" and not filler.exists():
            filler.touch()
            with pytest.raises(OSError), filler.open("wb", buffering=0) as out:
                while True:
                    out.write(bytes(4096))

    refused(source, dest, r"is full: [\d,]+ more bytes.*same command", format="keep", progress=fill)
    with pytest.raises(StoreError, match="unfinished conversion"):
        Store.open(dest)
    filler.unlink()
    store = convert(source, dest, format="keep")
    store.verify()
