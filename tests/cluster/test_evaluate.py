"""`headrace eval` and `headrace convert --gate` as users run them: figures, page, gates and mistakes."""

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from gguf_files import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.cluster.cli.main import main
from headrace.cluster.evaluation.corpus import Corpus
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import open_model
from headrace.scheduler.errors import StoreError

TEXT = STORIES.parent / "text" / "held_out_stories.txt"
SMALL = ["--text", TEXT, "--tokens", "400", "--context", "128"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for fmt in ("nf4", "int8"):
        convert(STORIES, folder / fmt, format=fmt)
    return folder


def run(*arguments: object) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return int(ended.value.code or 0)


class Links(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_stores_are_compared_in_a_table_as_json_and_on_a_page(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ["--json", tmp_path / "found.json", "--html", tmp_path / "found.html"]
    options = [*SMALL, *outputs, "--prompts", "2", "--new-tokens", "4"]
    assert run("eval", stores / "nf4", stores / "int8", "--reference", STORIES, *options) == 0
    printed = capsys.readouterr().out
    for name in (
        "bits a weight",
        "perplexity",
        "KLD p99",
        "same top-1",
        "equal tokens",
        "this run",
    ):
        assert name in printed
    found = json.loads((tmp_path / "found.json").read_text())
    nf4, int8 = found["stores"]
    assert found["reference"]["perplexity"] < nf4["model"]["perplexity"]
    assert 0 < int8["divergence"]["mean"] < nf4["divergence"]["mean"]
    assert len(nf4["layer_errors"]) == 12 and nf4["model"]["bits_a_weight"] < 5
    assert nf4["octaves"][-1]["last"] == 127 and found["predicted"] == 396
    assert nf4["generation"]["prompts"] == 2 and nf4["worst"][0]["tokens"]
    _check_page((tmp_path / "found.html").read_text())


def _check_page(html: str) -> None:
    page = Links()
    page.feed(html)
    text = "".join(page.text)
    assert not page.fetched and not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert page.tags.count("svg") == 3 + 2  # two lines by position, one by layer; a histogram each
    for title in ("hidden states after each layer", "by position", "Worst windows: nf4", "int8"):
        assert title in text
    assert "prefers-color-scheme: dark" in html


def test_without_a_reference_there_is_perplexity_alone(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run("eval", stores / "int8", *SMALL, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "KLD" not in printed
    assert "<svg" not in page.read_text()


def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(STORIES, checkpoint)
    plain = Corpus(open_model(checkpoint), [TEXT], 50).windows(20)
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [7], "tokens": ["<|im_start|>"]}
        },
    }
    file.write_text(json.dumps(tokenizer))
    windows = Corpus(open_model(checkpoint), [TEXT], 50).windows(20)
    assert windows.prefix == 1 and windows.tokens[:, 0].tolist() == [7, 7, 7]
    assert windows.lengths == (20, 20, 13) and windows.count == 50  # the first of each, too
    assert torch.equal(windows.tokens[0, 1:], plain.tokens[0, :19]) and plain.prefix == 0


@pytest.mark.slow
def test_a_gguf_file_is_compared_by_its_own_tokenizer(stores: Path, tmp_path: Path) -> None:
    file, found = tmp_path / "stories.gguf", tmp_path / "found.json"
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    write(model, file, "Q8_0", AutoTokenizer.from_pretrained(STORIES), pre="smollm")
    options = [*SMALL, "--prompts", "0", "--json", found]
    assert run("eval", file, stores / "int8", "--reference", STORIES, *options) == 0
    gguf, int8 = json.loads(found.read_text())["stores"]
    assert gguf["divergence"]["mean"] < 2 * int8["divergence"]["mean"]
    assert run("eval", stores / "int8", "--reference", file, *options) == 0


def test_a_model_that_reads_text_otherwise_is_no_reference(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    assert run("eval", stores / "nf4", "--reference", tmp_path / "tiny", *SMALL) == 1
    assert "has no tokenizer" in capsys.readouterr().err
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "tiny")
    assert run("eval", stores / "nf4", "--reference", tmp_path / "tiny", *SMALL) == 1
    assert "cannot be compared with" in capsys.readouterr().err


def test_gates_say_what_is_crossed_and_end_with_code_3(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("max_perplexity_ratio: 1.5\nmax_mean_kld: 0.01\nmin_top1: 0.5\n")
    judged = ["--reference", STORIES, *SMALL, "--prompts", "0", "--gate", gate]
    assert run("eval", stores / "nf4", stores / "int8", *judged) == 3
    crossed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gate:")]
    assert len(crossed) == 1 and "nf4: max_mean_kld is 0.01, found 0." in crossed[0]
    assert run("eval", stores / "int8", *judged) == 0
    assert "gate: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ("max_kld_mean: 1\n", "max_kld_mean: Extra inputs are not permitted; thresholds are max_p"),
        ("min_top1: 98\n", "min_top1: Input should be less than or equal to 1"),
        ("", "holds no thresholds"),
        ("a: [", "is no YAML"),
        ("min_equal_tokens: 0.5\n", "which --prompts 0 leaves out"),
        (None, "cannot read --gate"),
    ],
)
def test_a_gate_that_cannot_judge_is_refused_before_anything_is_read(
    thresholds: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.yaml"
    if thresholds is not None:
        gate.write_text(thresholds)
    nowhere = tmp_path / "nowhere"
    options = [*SMALL, "--reference", STORIES, "--prompts", "0", "--gate", gate]
    assert run("eval", nowhere, *options) == 1
    assert message in capsys.readouterr().err


def test_mistakes_are_one_message(
    stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    store = stores / "nf4"
    for arguments, message in (
        ([store], "give one or more --text FILE"),
        ([store, "--text", tmp_path / "none"], "cannot read --text"),
        ([store, "--text", binary], "is no UTF-8 text"),
        ([store, "--text", tmp_path / "empty"], "not two tokens of text"),
        ([store, *SMALL, "--json", tmp_path / "no" / "x.json"], "there is no folder"),
        ([store, *SMALL, "--device-memory", "1MiB"], "bytes) of device memory"),
        ([tmp_path, *SMALL], "is not a store"),
    ):
        assert run("eval", *arguments) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_conversion_that_crosses_its_gate_is_held_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, gate = tmp_path / "store", tmp_path / "gate.yaml"
    gate.write_text("max_mean_kld: 1e-9\n")
    gated = ["--gate", gate, *SMALL, "--prompts", "0"]
    assert run("convert", STORIES, store, *gated) == 3
    assert "is held back" in capsys.readouterr().out
    with pytest.raises(StoreError, match="has not passed its --gate"):
        Store.open(store)
    written = (store / "layer-00003.safetensors").stat().st_mtime_ns
    # Other options are another conversion's, and lose nothing either.
    assert run("convert", STORIES, store, "--format", "int8") == 1
    assert "holds another conversion" in capsys.readouterr().err
    # A gate that it passes, and none, make it a store without writing it again.
    gate.write_text("max_mean_kld: 10\n")
    assert run("convert", STORIES, store, *gated) == 0
    assert Store.open(store).format == "nf4"
    gate.write_text("max_mean_kld: 1e-9\n")
    assert run("convert", STORIES, store, *gated) == 3
    assert run("convert", STORIES, store) == 0
    assert Store.open(store).layers[3].file.stat().st_mtime_ns == written


def test_a_gated_conversion_with_a_mistake_converts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, gate = tmp_path / "store", tmp_path / "gate.yaml"
    gate.write_text("max_mean_kld: 1\n")
    assert run("convert", STORIES, store, "--gate", gate) == 1
    assert "give one or more --text" in capsys.readouterr().err
    assert run("convert", STORIES, store, "--text", TEXT) == 1
    assert "give --gate FILE with them" in capsys.readouterr().err
    assert not store.exists()
