"""`headrace prune` as users run it: what it prints, writes and refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from commands import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.cluster.cli.main import main
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError

TEXTS = STORIES.parent / "text"
STORY = str(TEXTS / "held_out_stories.txt")
OTHER = str(TEXTS / "held_out_public_domain.txt")
SHORT = ["--calibration-tokens", "512", "--calibration-context", "128"]


def run(*arguments: object) -> int:
    """The exit code."""
    try:
        main(["prune", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@torch.no_grad()
def perplexity(path: Path, tokens: int, context: int) -> float:
    """transformers', over windows."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = Path(OTHER).read_text()[: tokens * 16]
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text).input_ids[:tokens])
    total = count = 0
    for window in ids.split(context):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum")
        total, count = total + loss.item(), count + len(window) - 1
    return math.exp(total / count)


def test_layers_and_neurons_go_and_the_report_says_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "pruned"
    options = ["--drop-layers", 2, "--mlp-neurons", "25%", "--calibrate", STORY, *SHORT]
    gate = tmp_path / "gate.yaml"
    gate.write_text("max_perplexity_ratio: 1.01\n")
    compared = ["--text", OTHER, "--tokens", 512, "--context", 256, "--prompts", 0]
    assert run(STORIES, dest, *options, *compared, "--gate", gate) == 3
    said = capsys.readouterr().out
    assert said.count("dropped") == 2 and said.count("160") == 10 and "influence" in said
    report = json.loads((dest / "headrace-prune.json").read_text())
    found = report["cost"]
    before, after = found["perplexity_before"], found["perplexity_after"]
    assert before == pytest.approx(perplexity(STORIES, 512, 256), rel=1e-4)
    assert after == pytest.approx(perplexity(dest, 512, 256), rel=1e-4)
    assert f"{before:.4f}" in said and f"{after:.4f}" in said
    assert f"max_perplexity_ratio is 1.01, found {after / before:.6g}" in said
    assert "is held back" in said and found["mean_kld"] > 0.1 and 0 < found["top1"] < 1
    # It is held back, and the command without the gate takes it.
    with pytest.raises(StoreError, match="gate"):
        Store.open(dest)
    assert run(STORIES, dest, *options) == 0
    store = Store.open(dest)
    assert (len(store.layers), store.config["intermediate_size"]) == (10, 480)
    assert report["after"] == report["stored"] < 0.8 * report["before"]
    # Again: nothing is done, and the same is said.
    written = (dest / "layer-00003.safetensors").stat().st_mtime_ns
    assert run(STORIES, dest, *options) == 0
    assert (dest / "layer-00003.safetensors").stat().st_mtime_ns == written


def test_zeros_are_said_to_bring_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(STORIES, tmp_path / "p", "--sparsity", "2:4", "--method", "magnitude") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0.0% less" in said and "no fewer bytes" in said and "Headrace has none" in said
    assert "measured on layers 0, 6, 11" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is to be pruned"),
        (["--drop-layers", "2"], "give --calibrate FILE"),
        (["--drop-layers", "2", "--calibrate", "/nowhere.txt"], "--calibrate /nowhere.txt"),
        (["--drop-layers", "12,"], "layers 0 to 11"),
        (["--heads", "25%", "--calibrate", STORY], "one is 50%"),
        (["--drop-layers", "1,", "--gate", "gate.yaml"], "give --text FILE"),
        (["--sparsity", "half"], "--sparsity is a share"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(STORIES, tmp_path / "p", *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error:") and message in said
    assert not (tmp_path / "p").exists()
