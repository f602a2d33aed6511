"""`headrace convert --calibrate` as users see it."""

import json

import pytest
from commands import STORIES

from headrace.cluster.cli.main import main
from headrace.runtime.store import Store

TEXT = STORIES.parent / "text" / "held_out_stories.txt"


def run(*arguments):
    main(["convert", *map(str, arguments)])


def test_a_calibrated_store_says_how_it_was_made(tmp_path, capsys):
    folder = tmp_path / "store"
    with pytest.raises(SystemExit) as ended:
        run(STORIES, folder, "--format", "int4", "--calibrate", TEXT, "--calibration-tokens", 512,
            "--calibration-context", 128, "--device", "cpu")  # fmt: skip
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "gptq" in printed and "84" in printed
    store = Store.open(folder)
    store.verify()
    found = store.options["calibration"]
    assert (found["method"], found["sequences"], found["context"]) == ("gptq", 4, 128)
    assert len(found["text"]) == 32
    assert not list(folder.glob("*.states")) and json.loads((folder / "headrace.json").read_bytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "awq"), "give --calibrate TEXT"),
        (("--device", "cpu"), "or --calibrate TEXT"),
        (("--calibrate", "nowhere.txt"), "cannot read --calibrate nowhere.txt"),
        (("--calibrate", TEXT, "--format", "keep"), "keep rounds nothing"),
        (("--calibrate", TEXT, "--calibration-context", 4096), "longer than the 1024 tokens"),
        (
            ("--calibrate", TEXT, "--calibration-tokens", 9, "--calibration-context", 20),
            "make no sequence",
        ),
        (
            ("--calibrate", "short.txt", "--calibration-context", 512),
            "fewer than one sequence of 512",
        ),
        (("--calibrate", TEXT, "--device-memory", "1MB", "--device", "cpu"), "--device-memory is"),
    ],
)
def test_mistakes_get_one_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(SystemExit) as ended:
        run(STORIES, tmp_path / "store", *arguments)
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
