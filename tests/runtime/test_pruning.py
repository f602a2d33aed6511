"""Pruned stores, compared with transformers' models that were cut by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from stored import stored_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole import WholeModel

from headrace.runtime.conversion.convert import convert
from headrace.runtime.pruning.choice import Request, parse_request
from headrace.runtime.pruning.pattern import Pattern, parse_pattern, zeroed
from headrace.runtime.pruning.prune import STATISTICS, Calibration, prune
from headrace.runtime.store import JOURNAL, Store
from headrace.scheduler.errors import (
    DoesNotFitError,
    HeadraceError,
    StoreError,
    UnsupportedModelError,
)
from headrace.scheduler.plan import Slice

CPU = torch.device("cpu")
TEXT = STORIES.parent / "text" / "held_out_stories.txt"
IDS = torch.arange(5, 35)[None]


def story_tokens(sequences: int = 4, length: int = 128) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer(TEXT.read_text()[:20_000]).input_ids
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def calibrated(tokens: Tensor) -> Callable[[], Calibration]:
    return lambda: Calibration(tokens, CPU, torch.float32)


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits[0]
    return found


def ours(path: Path, ids: Tensor = IDS) -> Tensor:
    piece = Slice(0, 0, tuple(ids[0].tolist()), tuple(range(8)), None)
    return WholeModel(path).logits([piece])


def assert_same(found: Tensor, expected: Tensor, error: float = 1e-6) -> None:
    assert (found - expected).abs().max() <= error * expected.abs().max()


def silence(linear: torch.nn.Linear, stays: Tensor) -> None:
    """Columns that do not stay become zero."""
    gone = torch.ones(linear.in_features, dtype=torch.bool)
    gone[stays] = False
    with torch.no_grad():
        linear.weight[:, gone] = 0


def inputs_of(model: Any, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, features] of modules, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: found.__setitem__(name, given[0].flatten(0, 1))
        )
        for name in names
    ]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_named_layers_are_dropped(tmp_path: Path) -> None:
    store, report = prune(STORIES, tmp_path / "pruned", Request(layers=(3, 7)))
    model = opened(STORIES)
    del model.model.layers[7], model.model.layers[3]
    assert_same(logits(opened(store.path)), logits(model))
    assert_same(ours(store.path), logits(model), 1e-4)
    assert store.config["num_hidden_layers"] == 10 == len(store.layers)
    assert [layer.became for layer in report.layers][2:9] == [2, None, 3, 4, 5, None, 6]
    assert report.after == report.stored < report.before
    assert json.loads((store.path / "headrace-prune.json").read_text())["after"] == report.after
    store.verify()


def test_the_least_influential_layers_are_found(tmp_path: Path) -> None:
    tokens = story_tokens()
    store, report = prune(STORIES, tmp_path / "pruned", Request(layers=2), calibrated(tokens))
    with torch.no_grad():
        states = opened(STORIES).model(tokens, output_hidden_states=True, use_cache=False)
    names = [f"model.layers.{i}" for i in range(12)]
    given = inputs_of(opened(STORIES), [*names, "model.norm"], tokens)
    assert torch.equal(given[names[5]], states.hidden_states[5].flatten(0, 1))
    expected = [
        1 - torch.cosine_similarity(given[a], given[b], dim=-1).double().mean().item()
        for a, b in zip(names, [*names[1:], "model.norm"], strict=True)
    ]
    found = [layer.influence for layer in report.layers]
    assert found == pytest.approx(expected, rel=1e-4)
    gone = sorted(sorted(range(12), key=lambda i: expected[i])[:2])
    assert [layer.layer for layer in report.layers if layer.became is None] == gone
    assert len(Store.open(store.path).layers) == 10


def test_a_quarter_of_the_neurons_and_half_of_the_heads(tmp_path: Path) -> None:
    tokens = story_tokens()
    request = Request(layers=(1,), neurons=0.25, heads=0.5)
    store, report = prune(STORIES, tmp_path / "pruned", request, calibrated(tokens))
    model = opened(STORIES)
    names = [
        f"model.layers.{i}.{n}" for i in range(12) for n in ("mlp.down_proj", "self_attn.o_proj")
    ]
    given = inputs_of(model, names, tokens)
    for i, layer in enumerate(model.model.layers):
        down, out = layer.mlp.down_proj, layer.self_attn.o_proj
        scores = given[f"model.layers.{i}.mlp.down_proj"].abs().mean(0) * down.weight.norm(dim=0)
        silence(down, scores.topk(480).indices)
        x = given[f"model.layers.{i}.self_attn.o_proj"]
        added = [
            (x[:, c : c + 128] @ out.weight[:, c : c + 128].T).square().sum(1).mean()
            for c in (0, 128)
        ]
        best = int(added[1] > added[0])
        silence(out, torch.arange(best * 128, best * 128 + 128))
        assert i == 1 or report.layers[i].groups_gone == (1 - best,)
    del model.model.layers[1]
    assert_same(logits(opened(store.path)), logits(model), 1e-5)
    assert_same(ours(store.path), logits(model), 1e-4)
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [store.config[key] for key in sizes] == [480, 2, 1, 64]
    assert {layer.neurons_gone for layer in report.layers} == {0, 160}


# Biases; norms of single heads; gates and up in one matrix; no gate; a window; tied and scaled.
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "starcoder2", "mistral", "gemma3_text"])
def test_architectures(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(tmp_path / "src")
    tokens = torch.randint(4, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    request = Request(layers=(1,), neurons=0.25, heads=0.5)
    store, report = prune(
        tmp_path / "src",
        tmp_path / "pruned",
        request,
        calibrated(tokens),
        allow_missing_tokenizer=True,
    )
    for i, layer in enumerate(model.model.layers):
        if report.layers[i].became is None:
            continue
        kept = stored_weights(store, store.layers[report.layers[i].became])
        out = next(w for n, w in kept.items() if n.endswith(("down_proj.weight", "c_proj.weight")))
        linear = getattr(layer.mlp, "down_proj", None) or layer.mlp.c_proj
        silence(linear, _columns(linear.weight, out))
        head = layer.self_attn.o_proj.in_features // 2
        [gone] = report.layers[i].groups_gone
        silence(layer.self_attn.o_proj, torch.arange((1 - gone) * head, (2 - gone) * head))
    del model.model.layers[1]
    _renumber(model)
    assert_same(logits(opened(store.path)), logits(model), 1e-5)
    assert_same(ours(store.path), logits(model), 1e-4)


def _columns(whole: Tensor, kept: Tensor) -> Tensor:
    """Which columns of `whole` are left in `kept`."""
    return torch.tensor([int((whole == column[:, None]).all(0).nonzero()) for column in kept.T])


def _renumber(model: Any) -> None:
    """Models look at what is said of a layer by its place."""
    count = len(model.model.layers)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kinds[0], *kinds[2:]]
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = count


def test_wanda_and_two_of_four_as_in_its_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, norms = torch.randn(24, 32), torch.rand(32) * 5
    # What Wanda's repository does (lib/prune.py, prune_wanda).
    metric = weight.abs() * norms[None]
    expected = weight.clone()
    order = torch.sort(metric, dim=-1, stable=True)[1]
    expected.scatter_(1, order[:, : int(32 * 0.6)], 0)
    assert torch.equal(zeroed(weight, Pattern(0.6), norms), expected)
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for first in range(0, 32, 4):
        least = torch.topk(metric[:, first : first + 4], 2, dim=1, largest=False)[1]
        mask.scatter_(1, first + least, True)
    assert torch.equal(zeroed(weight, parse_pattern("2:4"), norms), weight.masked_fill(mask, 0))
    assert torch.equal(
        zeroed(weight, Pattern(0.5), None) == 0,
        weight.abs() < weight.abs().sort(dim=1).values[:, 16:17],
    )
    # Equal scores: exactly as many go.
    assert (zeroed(torch.ones(3, 8), parse_pattern("2:4"), None) == 0).sum() == 12


@pytest.mark.parametrize("format", ["keep", "nf4"])
def test_zeros_are_stored_and_what_they_save_is_measured(tmp_path: Path, format: str) -> None:
    tokens = story_tokens()
    request = Request(layers=(2,), neurons=0.25, pattern=parse_pattern("2:4"))
    store, report = prune(STORIES, tmp_path / "pruned", request, calibrated(tokens), format=format)
    for block in store.layers:
        for name, weight in stored_weights(store, block).items():
            if weight.dim() == 2:
                assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2, name
    cold = report.cold_tier
    assert report.zeros == "2:4" and cold is not None
    assert cold.layers == (0, 5, 10) and cold.with_zeros < 0.9 * cold.without < cold.nbytes
    if format == "keep":
        given = inputs_of(opened(STORIES), ["model.layers.4.self_attn.k_proj"], tokens)
        norms = given["model.layers.4.self_attn.k_proj"].norm(dim=0)
        whole = opened(STORIES).model.layers[4].self_attn.k_proj.weight.detach()
        found = opened(store.path).model.layers[3].self_attn.k_proj.weight
        same = found == zeroed(whole, request.pattern, norms)
        # Scores that are nearly equal may be the other way round.
        assert same.float().mean() > 0.999


def test_a_store_is_pruned_too_and_quantized_ones_lose_whole_layers(tmp_path: Path) -> None:
    whole = convert(STORIES, tmp_path / "keep", format="keep")
    again, _ = prune(whole.path, tmp_path / "again", Request(layers=(0, 11)))
    model = opened(STORIES)
    del model.model.layers[11], model.model.layers[0]
    assert_same(logits(opened(again.path)), logits(model))
    packed = convert(STORIES, tmp_path / "nf4", format="nf4")
    fewer, _ = prune(packed.path, tmp_path / "fewer", Request(layers=(4,)))
    assert fewer.format == "nf4"
    before, after = (stored_weights(s, s.layers[i]) for s, i in ((packed, 5), (fewer, 4)))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(before[name.format(5)], after[name.format(4)])
    with pytest.raises(StoreError, match="is nf4 already"):
        prune(
            packed.path, tmp_path / "no", Request(pattern=parse_pattern("50%"), method="magnitude")
        )
    assert not (tmp_path / "no").exists()


def test_layers_of_a_mixture(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", num_hidden_layers=4)
    model.save_pretrained(tmp_path / "src")
    store, _ = prune(
        tmp_path / "src", tmp_path / "pruned", Request(layers=(0, 2)), allow_missing_tokenizer=True
    )
    assert store.config["first_k_dense_replace"] == 0
    del model.model.layers[2], model.model.layers[0]
    assert_same(logits(opened(store.path)), logits(model))
    assert_same(ours(store.path), logits(model), 1e-4)


def test_heads_of_a_mixture(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "src")
    tokens = torch.randint(4, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    store, report = prune(
        tmp_path / "src",
        tmp_path / "pruned",
        Request(heads=0.5),
        calibrated(tokens),
        allow_missing_tokenizer=True,
    )
    for layer, found in zip(model.model.layers, report.layers, strict=True):
        [gone] = found.groups_gone
        silence(layer.self_attn.o_proj, torch.arange((1 - gone) * 32, (2 - gone) * 32))
    assert_same(logits(opened(store.path)), logits(model), 1e-5)
    assert_same(ours(store.path), logits(model), 1e-4)


@pytest.mark.parametrize(
    ("model", "request_", "message"),
    [
        ("mixtral", Request(neurons=0.25), "mixture of experts"),
        ("mixtral", Request(pattern=Pattern(0.5), method="magnitude"), "mixture of experts"),
        ("olmo2", Request(heads=0.5), "olmo2 cannot be pruned so: .*q_norm"),
        ("gpt_neox", Request(heads=0.5), "heads cannot be cut"),
        ("llama", Request(layers=(3,)), "layers 0 to 2"),
        ("llama", Request(layers=3), "1 to 2 can go"),
        ("llama", Request(heads=0.25), "is less than one"),
        ("llama", Request(neurons=0.25, pattern=Pattern(0.5, 32)), "no whole groups of 32"),
    ],
)
def test_refusals(model: str, request_: Request, message: str, tmp_path: Path) -> None:
    tiny_model(model).save_pretrained(tmp_path / "src")
    with pytest.raises((UnsupportedModelError, HeadraceError), match=message):
        prune(
            tmp_path / "src",
            tmp_path / "pruned",
            request_,
            calibrated(torch.arange(40).view(1, 40)),
            allow_missing_tokenizer=True,
        )
    assert not (tmp_path / "pruned").exists()


def test_kinds_of_layers_that_follow_from_the_index_are_not_shifted(tmp_path: Path) -> None:
    # Every second layer has experts.
    tiny_model("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2).save_pretrained(
        tmp_path / "src"
    )
    with pytest.raises(UnsupportedModelError, match="follows from its index"):
        prune(tmp_path / "src", tmp_path / "no", Request(layers=(0,)), allow_missing_tokenizer=True)
    prune(tmp_path / "src", tmp_path / "yes", Request(layers=(0, 1)), allow_missing_tokenizer=True)


def test_what_turns_out_impossible_leaves_room_for_another_attempt(tmp_path: Path) -> None:
    enough = calibrated(story_tokens())()
    small = Calibration(enough.tokens, CPU, torch.float32, device_memory=1000)
    with pytest.raises(DoesNotFitError, match="--device-memory"):
        prune(STORIES, tmp_path / "p", Request(layers=2), lambda: small)
    assert not list((tmp_path / "p").iterdir())
    prune(STORIES, tmp_path / "p", Request(layers=3), lambda: enough)


def test_a_request_that_means_nothing_is_explained() -> None:
    for given in ({"drop_layers": "two"}, {"mlp_neurons": "0.25"}, {"sparsity": "4:2"}, {}):
        options = {"drop_layers": None, "mlp_neurons": None, "heads": None, "sparsity": None}
        with pytest.raises(HeadraceError, match="--"):
            parse_request(**(options | given), method=None)
    assert parse_request("3,", None, None, None, None).layers == (3,)
    assert parse_request("3", None, None, None, None).layers == 3
    with pytest.raises(HeadraceError, match="give that, too"):
        parse_request("3", None, None, None, "wanda")
    with pytest.raises(HeadraceError, match="--calibrate"):
        prune(STORIES, Path("/nonexistent"), Request(layers=2))


KILLED = """
import sys, torch
from pathlib import Path
from headrace.runtime.pruning.choice import Request
from headrace.runtime.pruning.prune import Calibration, Reporter, prune
def stop(progress):
    if progress.done > progress.total // 2:
        print("half", flush=True)
        sys.stdin.read()
tokens = torch.load(sys.argv[2])
prune(Path(sys.argv[1]), Path(sys.argv[3]), Request(layers=2, neurons=0.25),
      lambda: Calibration(tokens, torch.device("cpu"), torch.float32), reporter=Reporter(writing=stop))
"""


@pytest.mark.slow
def test_killed_and_run_again_it_writes_the_same(tmp_path: Path) -> None:
    tokens = story_tokens()
    torch.save(tokens, tmp_path / "tokens")
    request = Request(layers=2, neurons=0.25)
    once, _ = prune(STORIES, tmp_path / "once", request, calibrated(tokens))
    dest = tmp_path / "twice"
    command = [sys.executable, "-c", KILLED, str(STORIES), str(tmp_path / "tokens"), str(dest)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert (dest / JOURNAL).exists() and (dest / STATISTICS).exists()
    with pytest.raises(StoreError, match="other options"):
        prune(STORIES, dest, Request(layers=3), calibrated(tokens))
    written = {f: f.stat().st_mtime_ns for f in dest.glob("layer-0000[0-2].safetensors")}
    time.sleep(0.01)
    again, _ = prune(STORIES, dest, request, calibrated(tokens))
    assert written and all(file.stat().st_mtime_ns == at for file, at in written.items())
    assert again.digest == once.digest
    assert sorted(os.listdir(dest)) == sorted(os.listdir(once.path))
    # A finished one is opened.
    _, report = prune(STORIES, dest, request, calibrated(tokens))
    assert report.layers[0].neurons_gone == 160
