"""Stores to a cold tier and back, in files, in memory and over HTTP; killed, damaged, and at once."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from cold_stores import both, everywhere, fine_tune, make_store, whole_tensors

from headrace.runtime.cold.garbage import clean, list_tier, remove
from headrace.runtime.cold.lease import LEASE_SECONDS, PUSH, REMOVAL, Lease
from headrace.runtime.cold.objects import object_path
from headrace.runtime.cold.pull import hydrate, nothing, pull
from headrace.runtime.cold.push import push
from headrace.runtime.cold.ranges import parse_ranges, ranges
from headrace.runtime.cold.source import ColdModel, Hydration, parse_cold
from headrace.runtime.cold.tier import ColdTier
from headrace.runtime.store import Store
from headrace.scheduler.errors import ColdTierError, HeadraceError, StoreError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 4 layers, 16 MB. Tests that damage it copy it first."""
    return make_store(tmp_path_factory.mktemp("made") / "base").path


@pytest.fixture
def tier(tmp_path: Path) -> str:
    return (tmp_path / "tier").as_uri()


def layer(*indices: int):
    return lambda store: store.blocks_of(indices, first=False, last=False)


def assert_same(one: Path, other: Path) -> None:
    for file in one.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name


def objects(tier: str) -> list[Path]:
    return [file for file in (local(tier) / "objects").rglob("*") if file.is_file()]


def local(url: str) -> Path:
    return Path(url.removeprefix("file://"))


@pytest.mark.parametrize("place", ["file", "memory"])
def test_there_and_back(made: Path, tmp_path: Path, tier: str, place: str) -> None:
    url = tier if place == "file" else f"memory://{uuid4().hex}"
    model, seen = ColdModel(url, "base"), []
    report = push(made, model, progress=seen.append)
    size = sum(file.stat().st_size for file in made.iterdir())
    assert (report.nbytes, report.found) == (size, 0) and report.stored < 0.75 * size
    assert seen[-1].done == seen[-1].total == size

    again = push(made, model)
    assert (again.found, again.stored, again.objects) == (size, 0, 0)

    got = []
    back = pull(model, tmp_path / "back", progress=got.append)
    assert (back.fetched, back.resumed, back.damaged) == (size, 0, ())
    assert got[-1].done == got[-1].total == size
    assert_same(made, tmp_path / "back")
    opened = Store.open(tmp_path / "back")
    opened.verify()
    assert opened.origin == model and opened.present == opened.blocks
    assert not list((tmp_path / "back").glob("*.pulling"))
    assert pull(model, tmp_path / "back").fetched == 0


def test_over_http(made: Path, tmp_path: Path, tier: str) -> None:
    push(made, ColdModel(tier, "base"))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=local(tier))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            pull(ColdModel(url, "base"), tmp_path / "back")
            assert_same(made, tmp_path / "back")
            with pytest.raises(ColdTierError, match=r"no model other in http.*there are: base\."):
                pull(ColdModel(url, "other"), tmp_path / "other")
            with pytest.raises(ColdTierError, match="cannot write"):
                push(made, ColdModel(url, "base2"))
        finally:
            server.shutdown()
            thread.join()


def tuned_share(made: Path, tmp_path: Path, tier: str, change) -> float:
    """Bytes that the tier grows by, record and all, over the fine-tune's."""
    tuned = fine_tune(made, tmp_path / "tuned", change)
    push(made, ColdModel(tier, "base"))
    before = sum(f.stat().st_size for f in local(tier).rglob("*") if f.is_file())
    report = push(tuned.path, ColdModel(tier, "tuned"), base="base")
    grown = sum(f.stat().st_size for f in local(tier).rglob("*") if f.is_file()) - before
    assert report.deltas > 0 and grown >= report.stored
    pull(ColdModel(tier, "tuned"), tmp_path / "back")
    assert_same(tuned.path, tmp_path / "back")
    return grown / tuned.nbytes


def test_a_fine_tune_of_a_few_weights_everywhere(made: Path, tmp_path: Path, tier: str) -> None:
    assert tuned_share(made, tmp_path, tier, everywhere(0.05)) < 0.08


def test_a_fine_tune_of_a_few_tensors(made: Path, tmp_path: Path, tier: str) -> None:
    change = whole_tensors(Store.open(made).nbytes // 20)
    assert tuned_share(made, tmp_path, tier, change) < 0.06


def test_a_fine_tune_of_both(made: Path, tmp_path: Path, tier: str) -> None:
    change = both(everywhere(0.05), whole_tensors(Store.open(made).nbytes // 20))
    assert tuned_share(made, tmp_path, tier, change) < 0.15


def test_a_fine_tune_of_a_fine_tune(made: Path, tmp_path: Path, tier: str) -> None:
    """Its differences are from the first model: one read more brings any chunk."""
    one = fine_tune(made, tmp_path / "one", everywhere(0.02, seed=5))
    two = fine_tune(one.path, tmp_path / "two", everywhere(0.02, seed=6))
    push(made, ColdModel(tier, "base"))
    push(one.path, ColdModel(tier, "one"), base="base")
    report = push(two.path, ColdModel(tier, "two"), base="one")
    assert report.stored < 0.08 * report.nbytes
    remove(ColdModel(tier, "one"))
    pull(ColdModel(tier, "two"), tmp_path / "back")
    assert_same(two.path, tmp_path / "back")


def test_without_a_base_equal_chunks_are_stored_once(made: Path, tmp_path: Path, tier: str) -> None:
    change = whole_tensors(Store.open(made).nbytes // 20)
    tuned = fine_tune(made, tmp_path / "tuned", change)
    push(made, ColdModel(tier, "base"))
    report = push(tuned.path, ColdModel(tier, "tuned"))
    assert report.deltas == 0 and report.stored < 0.15 * report.nbytes


def killed(code: str, *arguments: object) -> None:
    """Run `code` in a process that kills itself."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


KILLED = """
import os, sys
from pathlib import Path
from headrace.runtime.cold.pull import pull
from headrace.runtime.cold.push import push
from headrace.runtime.cold.source import ColdModel
def half(seen):
    if seen.done > seen.total / 2 and seen.total > 10_000_000:
        os.kill(os.getpid(), 9)
url, path = sys.argv[1:]
"""


def test_a_killed_push_goes_on(made: Path, tmp_path: Path, tier: str) -> None:
    killed("push(Path(path), ColdModel(url, 'base'), jobs=2, progress=half)", tier, made)
    model = ColdModel(tier, "base")
    with pytest.raises(ColdTierError, match="there is no model base"):
        pull(model, tmp_path / "back")
    assert list_tier(tier).orphans > 3
    with pytest.raises(ColdTierError, match=r"a push is under way .*process \d+ on "):
        clean(tier, 0.0)  # nobody knows yet that it was killed
    report = push(made, model)
    assert 0.4 < report.found / report.nbytes < 0.7
    assert list_tier(tier).orphans == sum("partial" in file.name for file in objects(tier))
    pull(model, tmp_path / "back")
    assert_same(made, tmp_path / "back")


def test_a_killed_pull_goes_on(made: Path, tmp_path: Path, tier: str) -> None:
    model, back = ColdModel(tier, "base"), tmp_path / "back"
    push(made, model)
    killed("pull(ColdModel(url, 'base'), Path(path), jobs=2, progress=half)", tier, back)
    assert list(back.glob("*.pulling"))
    Store.open(back)  # what has its name is whole
    (pulling, *_) = back.glob("*.pulling")
    with pulling.open("r+b") as file:  # what was torn is not taken for whole
        file.write(b"torn")
    report = pull(model, back)
    size = sum(file.stat().st_size for file in made.iterdir())
    assert report.resumed and report.fetched < 0.7 * size
    assert_same(made, back)


def test_a_damaged_or_missing_object_is_named_and_repaired(
    made: Path, tmp_path: Path, tier: str
) -> None:
    model = ColdModel(tier, "base")
    push(made, model)
    largest, other = sorted(objects(tier), key=lambda file: -file.stat().st_size)[:2]
    content = bytearray(largest.read_bytes())
    content[-1000] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ColdTierError, match=r"a part of .*safetensors .*damaged") as caught:
        pull(model, tmp_path / "back")
    assert largest.name in str(caught.value) and "--repair" in str(caught.value)
    assert push(made, model).objects == 0  # its name is there
    other.unlink()
    assert [each.missing for each in list_tier(tier).models] == [1]
    assert push(made, model, repair=True).objects == 2
    with pytest.raises(ColdTierError, match="missing in"):
        other.unlink()
        pull(model, tmp_path / "again")
    push(made, model)
    pull(model, tmp_path / "back")
    assert_same(made, tmp_path / "back")


def test_a_damaged_difference_is_repaired_under_its_name(
    made: Path, tmp_path: Path, tier: str
) -> None:
    tuned = fine_tune(made, tmp_path / "tuned", everywhere(0.01))
    push(made, ColdModel(tier, "base"))
    push(tuned.path, ColdModel(tier, "tuned"), base="base")
    delta = next(file for file in objects(tier) if "." in file.name)
    whole = delta.read_bytes()
    delta.write_bytes(whole[:-9])
    assert push(tuned.path, ColdModel(tier, "tuned"), repair=True).objects == 1
    assert delta.read_bytes() == whole


def test_damaged_files_here_are_fetched_in_part(made: Path, tmp_path: Path, tier: str) -> None:
    model, back = ColdModel(tier, "base"), tmp_path / "back"
    push(made, model)
    pull(model, back)
    bad = back / "layer-00002.safetensors"
    with bad.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"damage")
    os.truncate(back / "embed.safetensors", 5000)
    (back / "tokenizer.json").write_text("{}")
    with pytest.raises(StoreError, match=r"truncated.*headrace pull file.*#base .*--verify"):
        Store.open(back)
    report = pull(model, back)
    assert report.damaged == ("embed.safetensors",)
    with pytest.raises(StoreError, match=r"layer-00002.*has changed.*--verify"):
        Store.open(back).verify()
    report = pull(model, back, verify=True)
    assert set(report.damaged) == {"tokenizer.json", bad.name}
    assert report.fetched < 3_000_000  # not all of the block
    assert_same(made, back)


def test_some_layers_make_a_store(made: Path, tmp_path: Path, tier: str) -> None:
    model, back = ColdModel(tier, "base"), tmp_path / "back"
    push(made, model)
    pull(model, back, layer(1, 2))
    store = Store.open(back)
    assert store.digest == Store.open(made).digest
    assert [block.name for block in store.present] == ["layer-00001", "layer-00002"]
    store.verify()
    store.require(store.layers[1:3])
    with pytest.raises(StoreError) as caught:
        store.require(store.blocks)
    message = str(caught.value)
    assert "lacks embed and head and layers 0,3 (" in message
    assert f"headrace pull {model} {back} --layers 0,3 " in message
    with pytest.raises(StoreError, match="lacks embed"):
        push(back, ColdModel(tier, "part"))

    wanted = Hydration(str(back), model, (0, 2), first=True)
    assert hydrate(wanted).fetched > 3_000_000
    local(tier).rename(tmp_path / "gone")
    assert hydrate(wanted).fetched == 0  # and nobody was asked
    assert [block.name for block in Store.open(back).present][:2] == ["embed", "layer-00000"]


def test_stages_of_a_node_fetch_a_layer_once(made: Path, tmp_path: Path, tier: str) -> None:
    push(made, ColdModel(tier, "base"))
    wanted = Hydration(str(tmp_path / "back"), ColdModel(tier, "base"), (0, 1, 2, 3))
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(hydrate(wanted).fetched)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reports)[:2] == [0, 0] and max(reports) > 14_000_000


def test_a_directory_of_another_model_stays(made: Path, tmp_path: Path, tier: str) -> None:
    other = make_store(tmp_path / "other", layers=1, seed=9)
    push(other.path, ColdModel(tier, "base"))
    shutil.copytree(made, tmp_path / "copy")
    with pytest.raises(StoreError, match="store of another model"):
        pull(ColdModel(tier, "base"), tmp_path / "copy")
    with pytest.raises(ColdTierError, match=r"is another model .* headrace cold remove file"):
        push(made, ColdModel(tier, "base"))


def test_a_damaged_store_is_not_pushed(made: Path, tmp_path: Path, tier: str) -> None:
    shutil.copytree(made, tmp_path / "copy")
    with (tmp_path / "copy" / "layer-00001.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(b"damage")
    with pytest.raises(StoreError, match=r"'layer-00001' is damaged.*not pushed"):
        push(tmp_path / "copy", ColdModel(tier, "base"))
    assert list_tier(tier).models == ()


def test_pushes_at_once(made: Path, tmp_path: Path, tier: str) -> None:
    tuned = fine_tune(made, tmp_path / "tuned", whole_tensors(2_000_000))
    pairs = [(made, "a"), (made, "b"), (tuned.path, "c"), (tuned.path, "c")]
    threads = [
        threading.Thread(target=push, args=(path, ColdModel(tier, name))) for path, name in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path, name in pairs[:3]:
        pull(ColdModel(tier, name), tmp_path / name)
        assert_same(path, tmp_path / name)
    assert not any("partial" in file.name for file in objects(tier))


def test_what_nobody_needs_goes(made: Path, tmp_path: Path, tier: str) -> None:
    tuned = fine_tune(made, tmp_path / "tuned", everywhere(0.01))
    base, other = ColdModel(tier, "base"), ColdModel(tier, "tuned")
    push(made, base)
    alone = {file.name for file in objects(tier)}
    push(tuned.path, other, base="base")
    listed = {each.record.name: each for each in list_tier(tier).models}
    assert listed["tuned"].own < 0.05 * tuned.nbytes and listed["tuned"].record.base == "base"
    removed = remove(base)
    assert removed.objects < 5  # what differences are from stays
    pull(other, tmp_path / "back")
    assert_same(tuned.path, tmp_path / "back")
    push(made, base)
    assert remove(other).objects > 5
    assert {file.name for file in objects(tier)} == alone
    assert remove(base).objects == len(alone) and not objects(tier)
    with pytest.raises(ColdTierError, match="no model base"):
        remove(base)


def test_what_killed_pushes_left_goes_when_it_is_old(made: Path, tier: str) -> None:
    model = ColdModel(tier, "base")
    push(made, model)
    (local(tier) / "models" / "base.json").unlink()
    (local(tier) / "objects" / "ab").mkdir(exist_ok=True)
    (local(tier) / "objects" / "ab" / ".partial-1").write_bytes(b"half")
    count = len(objects(tier))
    assert list_tier(tier).orphans == count
    assert clean(tier, 3600.0).objects == 0
    for file in objects(tier):
        os.utime(file, (time.time() - 7200,) * 2)
    assert clean(tier, 3600.0).objects == count
    assert not objects(tier)


def test_pushes_and_removals_keep_out_of_each_others_way(tmp_path: Path, tier: str) -> None:
    cold, now = ColdTier(tier), [1000.0]

    def clock() -> float:
        return now[0]

    with Lease(cold, PUSH, clock), Lease(cold, PUSH, clock) as second:
        with pytest.raises(ColdTierError, match="a push is under way"):
            Lease(cold, REMOVAL, clock)
        now[0] += 100.0
        second.refresh()
        now[0] += LEASE_SECONDS - 50.0  # the first one is taken for dead, the second is not
        with pytest.raises(ColdTierError, match="a push is under way"):
            Lease(cold, REMOVAL, clock)
        now[0] += 100.0
        with Lease(cold, REMOVAL, clock), pytest.raises(ColdTierError, match="a removal is under"):
            Lease(cold, PUSH, clock)
        with pytest.raises(ColdTierError, match="run the same command again"):
            second.refresh()
    assert not cold.entries("leases")


def test_a_damaged_record_is_an_error(made: Path, tmp_path: Path, tier: str) -> None:
    push(made, ColdModel(tier, "base"))
    record = local(tier) / "models" / "base.json"
    whole = record.read_bytes()
    assert b"../evil" not in whole
    for damaged in (b"", b"[]", b"{}", whole[:-9], whole.replace(b"config.json", b"../evil.json")):
        record.write_bytes(damaged)
        with pytest.raises(ColdTierError, match=r"models/base\.json .* is damaged"):
            pull(ColdModel(tier, "base"), tmp_path / "back")
    record.write_bytes(whole)
    pull(ColdModel(tier, "base"), tmp_path / "back", nothing)
    assert Store.open(tmp_path / "back").present == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("s3://user:secret@host/bucket", "a user or a password"),
        ("nosuch://place", "cannot use nosuch"),
        ("memory://x#../up", "cannot name a model"),
        ("memory://x#a/b", "cannot name a model"),
    ],
)
def test_urls_that_cannot_be(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ColdTierError, match=complaint) as caught:
        pull(parse_cold(text, tmp_path / "store"), tmp_path / "store")
    assert "secret" not in str(caught.value)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_cold("s3://bucket/models/", Path("x/llama")) == ColdModel(
        "s3://bucket/models", "llama"
    )
    assert parse_cold("tier#m", Path("x")) == ColdModel((tmp_path / "tier").as_uri(), "m")
    assert str(ColdModel("s3://b", "m")) == "s3://b#m"


def test_layer_ranges() -> None:
    assert ranges([7, 0, 1, 2, 5]) == "0-2,5,7"
    assert parse_ranges("0-2, 5,7", 8) == (0, 1, 2, 5, 7)
    for text in ("", "a", "3-1", "1-", "-1", "1,,2"):
        with pytest.raises(HeadraceError, match="layers are written as"):
            parse_ranges(text, 8)
    with pytest.raises(HeadraceError, match="no layer 8: the model has layers 0 to 7"):
        parse_ranges("2-8", 8)


def test_object_paths() -> None:
    assert object_path("abcd.ef") == "objects/ab/abcd.ef"
