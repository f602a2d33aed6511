"""What of --kv-directory and its companions goes together, what a plan makes of it, and what stages get."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import STORIES, headrace, wait_for
from kv_logs import segments

from headrace.cluster.bench.local import local_engine
from headrace.cluster.cli.kv_commands import list_pages
from headrace.cluster.cli.main import main
from headrace.cluster.cli.options import Device, RunOptions
from headrace.cluster.cli.sizes import parse_duration
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.job_files import JobFiles
from headrace.cluster.jobs import Job
from headrace.cluster.kv_options import check_kv_options, describe_costs, log_config
from headrace.cluster.rows import decode, prepare
from headrace.cluster.run_plan import local_plan
from headrace.cluster.stage_logs import held_by_all
from headrace.cluster.tokenizer import load_tokenizer
from headrace.runtime.store import Store
from headrace.scheduler.errors import DoesNotFitError, HeadraceError
from headrace.scheduler.inputs import KV_LOG_BYTES
from headrace.scheduler.kv_room import least_disk, segment_bytes
from headrace.scheduler.memory import slot_bytes
from headrace.scheduler.request import SamplingParams

MIB = 1 << 20
GOOD: dict[str, Any] = {
    "kv_host_memory": 4 * MIB,
    "kv_directory": Path("kv"),
    "kv_disk": 64 * MIB,
}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"kv_host_memory": 0}, "--kv-directory needs --kv-host-memory"),
        ({"kv_disk": 0}, "--kv-directory needs --kv-disk"),
        ({"kv_directory": None}, "--kv-disk is of --kv-directory"),
        ({"kv_directory": None, "kv_disk": 0, "kv_keep": True}, "--kv-keep is of --kv-directory"),
        ({"kv_directory": None, "kv_disk": 0, "kv_ttl": 5.0}, "--kv-ttl is of --kv-directory"),
        ({"kv_directory": None, "kv_disk": 0, "kv_tenant": "a"}, "--kv-tenant is of --kv-dir"),
        (
            {"kv_directory": None, "kv_disk": 0, "kv_hot_window": 0},
            "--kv-hot-window is of --kv-dir",
        ),
        ({"kv_hot_window": -1}, "--kv-hot-window is a number of tokens"),
        ({"kv_keep": True}, "--kv-keep needs --kv-key-file"),
        ({"kv_key_file": Path("k")}, "--kv-key-file is for pages that outlive the run"),
        ({"kv_key_file": Path("k"), "kv_plaintext": True}, "--kv-plaintext encrypts nothing"),
        ({"kv_ttl": 0.0}, "--kv-ttl must be more than 0"),
        ({"kv_daily_writes": 0}, "--kv-daily-writes must be more than 0"),
        ({"kv_tenant": ""}, "--kv-tenant: a tenant's name is 1 to 256 printable bytes"),
        ({"kv_directory": Path(__file__)}, "is not a directory"),
        ({"kv_keep": True, "kv_key_file": Path("no/where/k")}, "there is no such folder"),
    ],
)
def test_what_cannot_be_together_is_one_error(more: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadraceError, match=says) as error:
        check_kv_options(EngineOptions(Path(), **(GOOD | more)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kv_plaintext": True},
        {"kv_keep": True, "kv_plaintext": True},
        {"kv_keep": True, "kv_key_file": Path("k"), "kv_ttl": 5.0, "kv_daily_writes": 9},
    ],
)
def test_what_goes_together(more: dict[str, Any]) -> None:
    options = EngineOptions(Path(), **(GOOD | more))
    check_kv_options(options)
    config = log_config(options)
    assert config is not None and config.cap == 64 * MIB and Path(config.directory).is_absolute()
    assert config.keep == bool(more.get("kv_keep"))
    assert log_config(replace(options, kv_directory=None)) is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("90 min", 5400), ("12h", 43200), ("7d", 604800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1h", "3 weeks"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(HeadraceError, match="is not a duration: write 30s"):
        parse_duration(text)


@pytest.mark.parametrize("slot", [4096, 300_000 // 4096 * 4096, 20 << 20])
def test_every_file_holds_a_page_and_two_fit(slot: int) -> None:
    from headrace.runtime.kv_log.start import check_options, max_page

    for disk in (least_disk(slot), 100 * least_disk(slot), 1 << 40):
        segment = segment_bytes(disk, slot)
        check_options(disk, segment, None, False, None)
        assert max_page(segment) >= slot
        assert segment <= max(disk // 16, least_disk(slot) // 2)


def options_of(store: Path, **more: Any) -> EngineOptions:
    room = {"device": "cpu", "device_memory": 24 * MIB, "context": 256, "host_memory": 40 * MIB}
    return EngineOptions(store, **(room | GOOD | more))


def test_a_plan_counts_pages_memory_and_costs(stories: Path) -> None:
    store = Store.open(stories)
    plan = local_plan(options_of(stories, stages=2), store)
    slots = [slot_bytes(memory.kv // plan.num_pages) for memory in plan.memory]
    assert plan.nvme_pages == 64 * MIB // max(slots)
    assert [memory.host_log for memory in plan.memory] == [KV_LOG_BYTES] * 2
    assert all(memory.host >= memory.host_kv + KV_LOG_BYTES for memory in plan.memory)
    costs = plan.kv_costs
    assert 0 < costs.host_page < costs.nvme_page
    compute = plan.prediction.terms["compute"] / plan.prediction.sequences
    assert math.isclose(costs.computed_page, 64 * compute)
    assert "from NVMe" in describe_costs(plan)
    assert "NVMe" not in describe_costs(local_plan(options_of(stories, kv_directory=None, kv_disk=0), store))  # fmt: skip


def test_room_that_is_too_small_is_refused(stories: Path) -> None:
    store = Store.open(stories)
    with pytest.raises(DoesNotFitError, match=r"--kv-disk 1.00 MiB is too little: two files of KV"):
        local_plan(options_of(stories, kv_disk=MIB), store)
    with pytest.raises(DoesNotFitError, match=r"\(and 32.0 MiB for --kv-directory\) is not within"):
        local_plan(options_of(stories, host_memory=20 * MIB), store)


def test_the_command_line_shows_what_there_is_room_for(
    stories: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--device", "cpu", "--device-memory", "60MiB", "--kv-host-memory", "3MiB"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(stories), *options, "--kv-directory", "kv", "--kv-disk", "64MiB"])
    assert not ended.value.code and not Path("kv").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "more pages have room on NVMe" in said and "KV pages on their way to NVMe" in said
    assert "ms from host memory" in said and "ms to compute" in said
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(stories), *options, "--kv-directory", "kv"])
    assert ended.value.code == 1
    assert "--kv-directory needs --kv-disk" in capsys.readouterr().err


def test_an_engine_of_this_process_has_a_log(stories: Path, tmp_path: Path) -> None:
    run = RunOptions(
        device=Device.CPU,
        device_memory="60MiB",
        kv_host_memory="4MiB",
        kv_directory=tmp_path / "kv",
        kv_disk="64MiB",
        kv_ttl="1h",
        context=256,
    )
    with local_engine(run.engine(stories)) as engine:
        assert [path.name for path in (tmp_path / "kv").iterdir()] == ["stage-0"]
        assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
        engine.add(list(range(5, 150)), SamplingParams(max_tokens=3), seed=0, keep=True)
        while engine.has_work:
            engine.step()
        engine.save()
        assert engine.stats.kv.nvme == 2
        (report,) = engine.log_reports()
        assert report is not None and report.stats.pages == 2
    assert not any((tmp_path / "kv").iterdir())


def test_keys_that_all_stages_have() -> None:
    assert held_by_all([[b"a", b"b", b"c"], [b"c", b"a"], [b"a", b"c", b"d"]]) == [b"a", b"c"]
    assert held_by_all([[b"a"]]) == [b"a"] and held_by_all([[b"a"], []]) == []


@pytest.mark.parametrize(
    ("row", "keep"),
    [
        ({"prompt": "a"}, False),
        ({"prompt": "a", "keep_context": True}, True),
        ({"prompt": "a", "keep_context": None}, False),
        (
            {
                "custom_id": "x",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "a", "keep_context": True},
            },
            True,
        ),
    ],
)
def test_rows_say_whether_they_go_on(row: dict[str, Any], keep: bool) -> None:
    draft, encoder = decode(1, json.dumps(row).encode(), b""), Encoder(load_tokenizer(STORIES))
    assert prepare(draft, encoder, SamplingParams(), 64).keep_context == keep


ROWS = 24
STORY = "The old man had a boat and a dog. One day, there was a big storm and Tom said: "


@pytest.fixture
def job(stories: Path, tmp_path: Path) -> Callable[..., list[object]]:
    rows = [
        {"id": i, "prompt": f"Tom number {i} went out. {STORY * 8}", "keep_context": True}
        for i in range(ROWS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(output: str, *more: object) -> list[object]:
        fixed = ["--device", "cpu", "--device-memory", "12MiB", "--context", "256", "--stages", 2]
        fixed += ["--temperature", 0, "--max-tokens", 12, "--input", "in.jsonl"]
        return ["generate", stories, *fixed, "--output", output, *more]

    return arguments


def run_here(store: Path, folder: Path, output: str) -> None:
    """The same job on one stage of this process, where all pages stay."""
    options = EngineOptions(store, device="cpu", device_memory=60 * MIB, context=256)
    defaults = SamplingParams(temperature=0.0, max_tokens=12)
    digest = Store.open(store).digest
    with (
        JobFiles(folder / "in.jsonl", folder / output, digest, defaults) as files,
        local_engine(options) as engine,
    ):
        Job(engine, engine.tokenizer, files, model_name=store.name).run(lambda _: None)


def answers(folder: Path, output: str) -> dict[int, str]:
    lines = map(json.loads, (folder / output).read_text().splitlines())
    return {line["id"]: line["text"] for line in lines}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_and_the_pages_that_it_kept(
    job: Callable[..., list[object]], stories: Path, tmp_path: Path
) -> None:
    """On real stages, each killed with the run: another run reads what is there, and answers the same."""
    host = ["--host-memory", "36MiB", "--kv-host-memory", "4MiB"]
    tiers = [*host, "--kv-directory", "kv", "--kv-disk", "64MiB"]
    kept = [*tiers, "--kv-keep", "--kv-key-file", "keys"]
    with headrace(tmp_path, *job("killed.jsonl", *kept)) as command:
        wait_for(
            lambda: (
                (tmp_path / "killed.jsonl").exists()
                and (tmp_path / "killed.jsonl").read_bytes().count(b"\n") >= ROWS // 2
                and len(segments(tmp_path / "kv" / "stage-1")) > 2
            ),
            120.0,
            lambda: command.stderr,
        )
        command.kill()
    assert segments(tmp_path / "kv" / "stage-0")
    with headrace(tmp_path, *job("again.jsonl", *kept)) as command:
        assert command.wait() == 0, command.stderr
        said = " ".join(command.stdout.split())
    assert "KV pages" in said and "found" in said and "NVMe" in said and "tokens saved" in said
    run_here(stories, tmp_path, "whole.jsonl")
    assert answers(tmp_path, "again.jsonl") == answers(tmp_path, "whole.jsonl")
    assert answers(tmp_path, "killed.jsonl").items() <= answers(tmp_path, "whole.jsonl").items()
    with headrace(tmp_path, *job("last.jsonl", *tiers)) as command:
        assert command.wait() == 0, command.stderr
    assert answers(tmp_path, "last.jsonl") == answers(tmp_path, "whole.jsonl")
    assert not any((tmp_path / "kv").iterdir())  # a run that keeps nothing leaves nothing


@pytest.mark.slow
def test_a_directory_in_use_is_one_error(
    job: Callable[..., list[object]], stories: Path, tmp_path: Path
) -> None:
    run = RunOptions(
        device=Device.CPU,
        device_memory="60MiB",
        kv_host_memory="4MiB",
        kv_directory=tmp_path / "kv",
        kv_disk="64MiB",
        context=256,
    )
    tiers = ["--host-memory", "36MiB", "--kv-host-memory", "4MiB", "--kv-directory", "kv"]
    with (
        local_engine(run.engine(stories)),
        headrace(tmp_path, *job("out.jsonl", *tiers, "--kv-disk", "64MiB")) as command,
    ):
        assert command.wait() == 1
        said = command.stderr
    assert "stage-0 is in use by process" in said and "Traceback" not in said
    assert said.count("error:") == 1


def test_the_folder_of_all_stages_is_none_of_one(tmp_path: Path) -> None:
    (tmp_path / "stage-1").mkdir()
    with pytest.raises(HeadraceError, match=r"name one, such as .*stage-1"):
        list_pages(tmp_path, json=False)
