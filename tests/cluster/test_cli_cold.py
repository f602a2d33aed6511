"""push, pull and cold as users type them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cold_stores import everywhere, fine_tune, make_store
from commands import headrace

from headrace.cluster.cli.main import main

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process and `tmp_path`: the exit status, and all that was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return int(ended.value.code or 0), "".join(capfd.readouterr())

    return run


def test_a_model_comes_and_goes(run: Run, tmp_path: Path) -> None:
    made = make_store(tmp_path / "llama")
    tuned = fine_tune(made.path, tmp_path / "tuned", everywhere(0.01))
    with headrace(tmp_path, "push", "llama", "tier") as command:  # where nobody looks on
        assert command.wait() == 0
        text = command.stdout + command.stderr
    assert "sent" in text and "\x1b" not in text and "━" not in text
    code, text = run("push", "tuned", "tier#chat", "--base", "llama")
    assert code == 0 and "from llama" in text
    digest = tuned.digest
    shutil.rmtree(tuned.path)

    code, text = run("pull", "tier#chat", "back", "--layers", "1-2,3")
    assert code == 0 and "4 of 6 blocks" in text
    code, text = run("inspect", "back", "--json", "--verify")
    found = json.loads(text)
    assert found["digest"] == digest and found["origin"].endswith("/tier#chat")
    assert [block["here"] for block in found["blocks"]] == [False, False, True, True, True, True]
    code, text = run("pull", "tier#chat", "back")
    assert code == 0 and "all 6 blocks" in text

    code, text = run("cold", "list", "tier", "--json")
    listed = {each["name"]: each for each in json.loads(text)["models"]}
    assert (
        listed["chat"]["base"] == "llama" and listed["chat"]["own"] < listed["llama"]["nbytes"] / 10
    )
    code, text = run("cold", "remove", "tier#chat")
    assert code == 0 and "removed" in text
    code, text = run("cold", "list", "tier")
    assert code == 0 and "llama" in text and "chat" not in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("push", "nothing", "tier"), "there is no store at nothing"),
        (("pull", "tier#nothing", "back"), "there is no model nothing in file"),
        (("pull", "nosuch://tier#x", "back"), "Protocol not known: nosuch"),
        (("cold", "remove", "tier"), "Write URL#NAME"),
        (("plan", "empty", "--cold", "tier"), "there is no model empty in file"),
    ],
)
def test_mistakes_are_one_message(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    code, text = run(*arguments)
    assert code == 1 and text.startswith("error: ") and text.count("\n") == 1
    assert complaint in text
