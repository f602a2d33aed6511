"""`headrace convert --budget` and `--recipe` as users see them."""

import json
import shutil
from math import prod

import pytest
import yaml
from commands import STORIES
from transformers import AutoModelForCausalLM

from headrace.cluster.cli.main import main
from headrace.runtime.store import Store

TEXT = STORIES.parent / "text" / "held_out_stories.txt"
CALIBRATE = ("--calibrate", TEXT, "--calibration-tokens", 256, "--calibration-context", 64,
             "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The first layers of the bundled model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = AutoModelForCausalLM.from_pretrained(STORIES, num_hidden_layers=3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, folder)
    return folder


def run(command, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([command, *map(str, arguments)])
    return ended.value.code


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_budget_makes_a_recipe_that_makes_the_same_store(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert not run("convert", checkpoint, "store", "--budget", "4.5bits", *CALIBRATE, "--group-size", 128,
                   "--write-recipe", "recipe.yaml")  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "predicted KL divergence" in printed and "rounded by gptq" in printed
    store = Store.open(tmp_path / "store")
    store.verify()
    nbytes = sum(block.file.stat().st_size for block in store.blocks)
    parameters = sum(prod(spec.shape) for block in store.blocks for spec in block.weights.values())
    assert nbytes <= 4.5 * parameters / 8 < nbytes * 1.05
    assert f"{nbytes:,} bytes" in printed
    assert store.options["calibration"]["method"] == "gptq"
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["made"]["text"] == store.options["calibration"]["text"]
    assert recipe["made"]["bytes"] == nbytes and recipe["group_size"] == 128
    formats = {n: spec.format for block in store.blocks for n, spec in block.weights.items()}
    named = {n: line["format"] for line in recipe["weights"] for n in line["names"]}
    assert {n: f for n, f in formats.items() if f != "raw"} == {
        n: f for n, f in named.items() if f != "keep"
    }
    assert not run("convert", checkpoint, "again", "--recipe", "recipe.yaml", *CALIBRATE)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "store")
    # Without a text the same formats are rounded to nearest.
    assert not run("convert", checkpoint, "nearest", "--recipe", "recipe.yaml")
    nearest = Store.open(tmp_path / "nearest")
    assert nearest.nbytes == store.nbytes and nearest.digest != store.digest
    assert "calibration" not in nearest.options
    # An edited one is followed.
    recipe["weights"] = [{"names": ["*.mlp.*"], "format": "int8"}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert not run("convert", checkpoint, "own", "--recipe", "own.yaml")
    capsys.readouterr()
    assert not run("inspect", "own", "--json")
    found = json.loads(capsys.readouterr().out)["blocks"][1]["formats"]
    assert set(found) == {"int8", "bf16"}
    assert not run("plan", "store", "--device", "cpu", "--device-memory", "1GiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "4.5bits"), "give --calibrate TEXT with it"),
        (("--budget", "lots", *CALIBRATE), "write 40GB, 12GiB or 4.5bits"),
        (("--budget", "1MB", *CALIBRATE), "give at least --budget 3."),
        (("--budget", "2bits", *CALIBRATE), "give at least --budget 3."),
        (("--budget", "5bits", *CALIBRATE, "--format", "int8"), "leave out --format"),
        (("--budget", "5bits", *CALIBRATE, "--policy", "*=int8"), "leave out --policy"),
        (("--budget", "5bits", *CALIBRATE, "--write-recipe", "taken.yaml"), "is there already"),
        (("--budget", "5bits", *CALIBRATE, "--write-recipe", "no/r.yaml"), "there is no folder"),
        (("--budget", "5bits", "--recipe", "taken.yaml"), "give one of the two"),
        (("--write-recipe", "r.yaml"), "give --budget with it"),
        (("--recipe", "nowhere.yaml"), "cannot read --recipe nowhere.yaml"),
        (("--recipe", "taken.yaml"), "--recipe taken.yaml: weights"),
        (("--recipe", "wrong.yaml"), "weights.0.format"),
        (("--recipe", "taken.yaml", "--group-size", 64), "leave out --group-size"),
        (("--method", "nearest", *CALIBRATE), "give --budget"),
    ],
)
def test_mistakes_get_one_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.yaml").write_text("recipe: 1\n")
    (tmp_path / "wrong.yaml").write_text("recipe: 1\nweights: [{names: ['*'], format: int9}]\n")
    assert run("convert", STORIES, "store", *arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "store").exists()
