"""Pages are handed over as they are, or refused, or lost; a request goes on from them to the same tokens."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from kv_logs import environment, script
from kv_runs import NoText, prompt
from rings import local_ring, manual_plan
from stored import tiny_store

from headrace.cluster.engine import Engine
from headrace.cluster.pipeline import LocalPipeline, Pending
from headrace.cluster.ring import Ring
from headrace.runtime.kv.handover import Contexts, Manifest, Part, take_chunk
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.identity import PageIdentity
from headrace.runtime.kv.payload import read_payload, write_payload
from headrace.runtime.kv.shared_payload import SharedPayload
from headrace.runtime.kv.store import KVStore
from headrace.runtime.kv_log.stage_log import StageLog
from headrace.runtime.manifest import LayerShape
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import LogConfig, StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.contexts import ContextIds, Taken
from headrace.scheduler.errors import HandoverError
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import MicroBatch, Pass, Sampling, Slice
from headrace.scheduler.request import SamplingParams

SHAPES = {
    3: LayerShape(2, 16, 16, 0, 0, 0),
    7: LayerShape(1, 32, 16, 0, 0, 0, latent=True),
}
IDENTITY = PageIdentity(1, "digest", "int8", "bfloat16", "cpu", (3, 7), (1, 2))
PAGES, TAILS, SLOTS = 24, 5, 6
SOME = ContextIds(pages=(4, 0, 23, 7, 8), tails=(1, 4), slots=(5, 2))
OTHERS = ContextIds(pages=(1, 2, 3, 20, 19), tails=(0, 2), slots=(0, 1))


class Holder:
    """Pages, tails and slots of random bytes."""

    def __init__(self, fmt: str, seed: int, identity: PageIdentity = IDENTITY) -> None:
        dtype = torch.float32 if fmt == "fp32" else torch.bfloat16
        device = torch.device("cpu")
        self.kv = KVStore(SHAPES, PAGES, dtype, device, FORMATS[fmt], num_tails=TAILS)
        self.host = HostPages({i: self.kv.page_bytes(i) for i in SHAPES}, SLOTS, device)
        generator = torch.Generator().manual_seed(seed)
        for memory in self.memory().values():
            memory.random_(generator=generator)
        page = sum(map(self.kv.page_bytes, SHAPES))
        self.contexts = Contexts(self.kv, self.host, identity, chunk_bytes=2 * page)

    def memory(self) -> dict[tuple[Part, int, int], torch.Tensor]:
        """All of it, by part, layer and tensor: the first dimension counts pages, tails or slots."""
        found = {}
        for i, layer in enumerate(SHAPES):
            found[Part.PAGES, layer, 0] = self.kv.pages(layer)
            found[Part.SLOTS, layer, 0] = self.host.pages(i)
            for j, tail in enumerate(self.kv.tails(layer)):
                found[Part.TAILS, layer, j] = tail.flatten(1).view(torch.uint8)
        return found

    def copy(self) -> dict[tuple[Part, int, int], torch.Tensor]:
        return {place: memory.clone() for place, memory in self.memory().items()}


@pytest.fixture
def payload() -> Iterator[SharedPayload]:
    with SharedPayload() as made:
        yield made


def check(
    before: Holder, after: Holder, untouched: dict, source: ContextIds, target: ContextIds
) -> None:
    """`target` of `after` is `source` of `before`, and everything else is as it was."""
    for place, memory in after.memory().items():
        wanted = untouched[place].clone()
        ids = getattr(source, place[0].value), getattr(target, place[0].value)
        wanted[list(ids[1])] = before.memory()[place][list(ids[0])]
        assert torch.equal(memory, wanted), place


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("targets", [None, OTHERS])
def test_what_is_handed_over_is_the_same_and_nothing_else_changes(
    fmt: str, targets: ContextIds | None, payload: SharedPayload
) -> None:
    quantized = FORMATS[fmt].is_quantized
    some, others = (ids if quantized else replace(ids, tails=()) for ids in (SOME, targets or SOME))
    before, after = Holder(fmt, 1), Holder(fmt, 2)
    untouched = after.copy()
    manifest = Manifest.decode(write_payload(before.contexts, some, payload.path).encode())
    assert manifest.ids == some and len(manifest.chunks) == 4 + 2 * quantized
    assert manifest.nbytes == before.contexts.nbytes(some) == os.stat(payload.path).st_size
    taken = read_payload(after.contexts, manifest, payload.path, targets and others)
    assert taken == Taken(manifest.nbytes)
    check(before, after, untouched, some, others)


def test_chunks_are_taken_over_one_by_one() -> None:
    before, after = Holder("int8", 1), Holder("int8", 2)
    untouched, nbytes = after.copy(), 0
    for cut in before.contexts.cuts(SOME):
        chunk, payload = before.contexts.export(cut)
        given = memoryview(bytes(payload))
        nbytes += take_chunk(after.contexts, IDENTITY, chunk, given).nbytes
    assert nbytes == before.contexts.nbytes(SOME)
    check(before, after, untouched, SOME, SOME)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (3, 8)}, "layers 3, 7, not 3, 8"),
        ({"kv_format": "int4", "page_bytes": (1, 1)}, "kv_format int8, not int4; page_bytes 1, 2"),
        ({"dtype": "float16"}, "dtype bfloat16, not float16"),
        ({"store": "other"}, "store digest, not other"),
        ({"device": "cuda"}, "device cpu, not cuda"),
    ],
)
def test_a_stage_where_pages_mean_something_else_refuses_them(
    change: dict, said: str, payload: SharedPayload
) -> None:
    before, after = Holder("int8", 1), Holder("int8", 2, replace(IDENTITY, **change))
    untouched = after.copy()
    manifest = write_payload(before.contexts, SOME, payload.path)
    chunk, data = before.contexts.export(before.contexts.cuts(SOME)[0])
    with pytest.raises(HandoverError, match=f"same layers, in the same formats.*{said}"):
        read_payload(after.contexts, manifest, payload.path)
    with pytest.raises(HandoverError, match=said):
        take_chunk(after.contexts, manifest.identity, chunk, data)
    check(before, after, untouched, ContextIds(), ContextIds())


def test_ids_that_are_not_there_are_refused(payload: SharedPayload) -> None:
    before, after = Holder("int8", 1), Holder("int8", 2)
    untouched = after.copy()
    with pytest.raises(HandoverError, match=r"pages 24 to 24 .* and this stage has 24"):
        write_payload(before.contexts, ContextIds(pages=(24,)), payload.path)
    manifest = write_payload(before.contexts, SOME, payload.path)
    for targets, said in (
        (replace(SOME, slots=(0, 6)), "slots 0 to 6 .* and this stage has 6"),
        (replace(SOME, tails=(1,)), "9 KV pages .* targets for 8: name one for each"),
    ):
        with pytest.raises(HandoverError, match=said):
            read_payload(after.contexts, manifest, payload.path, targets)
    plain = Contexts(Holder("bf16", 1).kv, None, IDENTITY)
    for ids in (ContextIds(tails=(0,)), ContextIds(slots=(0,))):
        with pytest.raises(HandoverError, match="this stage has 0"):
            plain.cuts(ids)
    with pytest.raises(HandoverError, match="no manifest"):
        Manifest.decode(manifest.encode()[:-3])
    check(before, after, untouched, ContextIds(), ContextIds())


@pytest.mark.parametrize("chunk", range(6))
def test_a_flipped_bit_loses_its_chunk_alone(chunk: int, payload: SharedPayload) -> None:
    before, after = Holder("int8", 1), Holder("int8", 2)
    untouched = after.copy()
    manifest = write_payload(before.contexts, SOME, payload.path)
    with open(payload.path, "r+b", buffering=0) as file:
        at = sum(each.nbytes for each in manifest.chunks[:chunk]) + 77
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))
    cut = manifest.chunks[chunk].cut
    lost = ContextIds(**{cut.part.value: cut.ids})
    taken = read_payload(after.contexts, manifest, payload.path)
    assert taken == Taken(manifest.nbytes - manifest.chunks[chunk].nbytes, lost)
    rest = {
        part.value: tuple(i for i in getattr(SOME, part.value) if i not in getattr(lost, part))
        for part in Part
    }
    check(before, after, untouched, ContextIds(**rest), ContextIds(**rest))


@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_what_was_cut_off_is_lost(left: float, payload: SharedPayload) -> None:
    before, after = Holder("int8", 1), Holder("int8", 2)
    untouched = after.copy()
    manifest = write_payload(before.contexts, SOME, payload.path)
    os.truncate(payload.path, int(manifest.nbytes * left))
    taken = read_payload(after.contexts, manifest, payload.path, OTHERS)
    ends = accumulate(chunk.nbytes for chunk in manifest.chunks)
    assert taken.nbytes == max((end for end in ends if end <= manifest.nbytes * left), default=0)
    assert taken.lost.slots == OTHERS.slots and bool(taken.nbytes) == (left > 0)
    if not left:
        assert taken.lost == OTHERS
        check(before, after, untouched, ContextIds(), ContextIds())


def test_a_machine_without_memory_for_it(
    payload: SharedPayload, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Full)
    with pytest.raises(HandoverError, match=r"9 KV pages take .* KiB .* has 1000 B available"):
        write_payload(Holder("int8", 1).contexts, SOME, payload.path)
    assert os.stat(payload.path).st_size == 0


def test_shared_memory_has_no_name_and_goes_with_its_process() -> None:
    before = set(os.listdir("/dev/shm"))
    keep = (
        "import sys; from headrace.runtime.kv.shared_payload import SharedPayload\n"
        "payload = SharedPayload(); print(payload.path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        script(keep), env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        path = keeper.stdout.readline().strip()
        assert os.stat(path).st_mode & 0o777 == 0o600
        holder = Holder("int8", 1)
        manifest = write_payload(holder.contexts, SOME, path)
        # Who takes it over dies with it open: it is there for the next one.
        take = (
            f"import os, signal; open({path!r}, 'rb').read(9); os.kill(os.getpid(), signal.SIGKILL)"
        )
        assert subprocess.run(script(take), check=False).returncode == -9
        assert read_payload(Holder("int8", 2).contexts, manifest, path) == Taken(manifest.nbytes)
        assert set(os.listdir("/dev/shm")) == before
        keeper.kill()
        keeper.wait()
    with pytest.raises(HandoverError, match="could not be handed over"):
        read_payload(holder.contexts, manifest, path)
    assert set(os.listdir("/dev/shm")) == before


MODELS = ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow), "deepseek_v3"]
PROMPTS = [prompt(i, length) for i, length in enumerate((3, 70, 150, 64))]
PARAMS = [SamplingParams(temperature=t, max_tokens=70, ignore_eos=True) for t in (0.0, 0.9)]


@pytest.fixture(scope="module", params=MODELS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values; windows beside them; latents."""
    return tiny_store(request.param, tmp_path_factory.mktemp(request.param))


def stage_at(store: Path, plan: Plan, stage: int = 0) -> StageConfig:
    return StageConfig(
        store=str(store),
        stage=stage,
        plan=plan,
        device="cpu",
        device_memory=0,
        dtype="float32",
        storage="auto",
        deadline=60.0,
        threads=torch.get_num_threads(),
    )


class Counted:
    """A ring that counts the tokens that it computes."""

    def __init__(self, ring: LocalPipeline) -> None:
        self._ring, self.computed = ring, 0

    def submit(self, a_pass: Pass) -> Pending:
        self.computed += a_pass.num_tokens
        return self._ring.submit(a_pass)

    def wait_host_tier(self) -> None:
        self._ring.wait_host_tier()

    def close(self) -> None:
        self._ring.close()


def hand_over(
    engine: Engine, old: LocalPipeline, new: LocalPipeline, damage: Sequence[float] = ()
) -> Taken:
    """All that the stage holds, as an engine does it whose stages are processes.

    The payload is damaged at these shares of its size.
    """
    engine._come_to_rest()
    with SharedPayload() as payload:
        with old._stages[0].contexts() as contexts:
            contexts._chunk_bytes = 1  # a chunk each
            manifest = write_payload(contexts, engine._scheduler.contexts(), payload.path)
        with open(payload.path, "r+b", buffering=0) as file:
            for share in damage:
                file.seek(int(share * manifest.nbytes))
                file.write(b"damaged")
        with new._stages[0].contexts() as contexts:
            taken = read_payload(contexts, manifest, payload.path)
    return taken


@pytest.mark.parametrize(("fmt", "ahead"), [("fp32", 1), ("int8", 0)])
def test_requests_go_on_in_another_stage_to_the_same_tokens(
    store: Path, fmt: str, ahead: int
) -> None:
    room = {"num_pages": 20, "host_pages": 12, "num_tails": 6, "max_sequences": 4}
    plan = manual_plan(
        Store.open(store), tier=Tier.DEVICE, token_budget=100, kv_format=fmt, ahead=ahead, **room
    )
    found, computed = [], []
    for at in (None, 3, 60):
        with ExitStack() as stack:
            rings = [stack.enter_context(local_ring(store, plan)) for _ in range(1 + bool(at))]
            counted = [Counted(ring) for ring in rings]
            engine = stack.enter_context(engine_over(store, plan, counted[0]))
            for i, tokens in enumerate(PROMPTS):
                engine.add(tokens, PARAMS[i % 2], seed=i, keep=True)
            done, steps = {}, 0
            while engine.has_work:
                steps += 1
                if steps == at:
                    taken = hand_over(engine, *rings)
                    assert taken.nbytes and not len(taken.lost)
                    rings[0].close()
                    engine._pipeline = counted[1]
                done |= {each.request_id: each.token_ids for each in engine.step()}
            found.append(done)
            computed.append(sum(each.computed for each in counted))
            assert all(each.computed for each in counted)
    assert found[0] == found[1] == found[2] and len(found[0]) == len(PROMPTS)
    assert computed[0] == computed[1] == computed[2]


@pytest.mark.parametrize("fmt", ["fp32", "int8"])
def test_what_does_not_arrive_is_computed_again(tmp_path: Path, fmt: str) -> None:
    """Device pages, tails and host slots, guests' among them; each time others."""
    store = tiny_store("llama", tmp_path)
    plan = manual_plan(
        Store.open(store),
        tier=Tier.DEVICE,
        token_budget=100,
        kv_format=fmt,
        num_pages=6,
        num_tails=6,
        max_sequences=6,
        host_pages=12,
        kv_ring_pages=6,
        cold_micro_batches=1,
    )
    found, again, lost = [], 0, ContextIds()
    for damages in ((), ((0.1, 0.7), (0.3, 0.99), (0.5, 0.8), (0.0, 0.6))):
        with ExitStack() as stack:
            ring = Counted(stack.enter_context(local_ring(store, plan)))
            engine = stack.enter_context(engine_over(store, plan, ring))
            for i, tokens in enumerate(PROMPTS):
                engine.add(tokens, PARAMS[i % 2], seed=i)
            done, steps, left = {}, 0, list(damages)
            while engine.has_work:
                steps += 1
                if left and not steps % 14:
                    new = stack.enter_context(local_ring(store, plan))
                    taken = hand_over(engine, ring._ring, new, left.pop())
                    again += engine._scheduler.lose(taken.lost)
                    lost = lost.plus(taken.lost)
                    ring._ring = new
                done |= {each.request_id: each.token_ids for each in engine.step()}
            assert not left
            found.append((done, ring.computed))
    assert found[0][0] == found[1][0]
    assert again and found[1][1] > found[0][1]
    assert lost.pages and lost.slots and bool(lost.tails) == (fmt == "int8")


def engine_over(store: Path, plan: Plan, ring: Counted) -> Engine:
    digest = Store.open(store).digest
    return Engine(Ring(plan, ring), NoText(), stop_ids=frozenset(), digest=digest, dtype="float32")


GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())


@pytest.mark.parametrize("fmt", ["fp32", "int8"])
def test_one_request_goes_on_under_other_ids(store: Path, fmt: str) -> None:
    plan = manual_plan(Store.open(store), tier=Tier.DEVICE, kv_format=fmt, num_pages=12)
    tokens, others = prompt(5, 150), prompt(6, 150)
    ids = [ContextIds((7, 2, 9), (3,)), ContextIds((1, 9, 4), (5,))]
    if fmt == "fp32":
        ids = [replace(each, tails=()) for each in ids]

    def run(stage: Stage, step: int, some: Sequence[int], start: int, own: ContextIds) -> int:
        tail = own.tails[0] if own.tails else 0
        piece = Slice(0, start, tuple(some), own.pages, GREEDY, tail)
        result = stage.run(stage.prepare(Pass(step, (MicroBatch((piece,)),))))
        return result.samples[0].token

    with Stage(stage_at(store, plan)) as here, Stage(stage_at(store, plan)) as there:
        run(there, 1, others, 0, ContextIds((2, 0, 3), (0,)))
        drawn = [run(here, 1, tokens, 0, ids[0])]
        with SharedPayload() as payload:
            with here.contexts() as contexts:
                manifest = write_payload(contexts, ids[0], payload.path)
            with there.contexts() as contexts:
                assert read_payload(contexts, manifest, payload.path, ids[1]).lost == ContextIds()
        went_on = drawn[:]
        for step in range(30):
            drawn.append(run(here, step + 2, drawn[-1:], 150 + step, ids[0]))
            went_on.append(run(there, step + 2, went_on[-1:], 150 + step, ids[1]))
        assert went_on == drawn


def test_stages_of_other_layers_are_refused(tmp_path: Path, payload: SharedPayload) -> None:
    store = tiny_store("llama", tmp_path)
    plan = manual_plan(Store.open(store), stages=2, tier=Tier.DEVICE, num_pages=4)
    with Stage(stage_at(store, plan)) as here, Stage(stage_at(store, plan, 1)) as there:
        with here.contexts() as contexts:
            manifest = write_payload(contexts, ContextIds(pages=(1,)), payload.path)
        with there.contexts() as contexts, pytest.raises(HandoverError, match="layers 0"):
            read_payload(contexts, manifest, payload.path)


@pytest.mark.parametrize("kind", ["ephemeral", "plaintext", "kept"])
def test_a_log_goes_on_in_another_process(tmp_path: Path, kind: str) -> None:
    store = tiny_store("llama", tmp_path)
    plan = manual_plan(Store.open(store), num_pages=4, host_pages=4, nvme_pages=500)
    log = LogConfig(
        str(tmp_path / "kv"),
        64 << 20,
        plaintext=kind == "plaintext",
        keep=kind == "kept",
        key_file=str(tmp_path / "keys") if kind == "kept" else None,
    )
    config = replace(stage_at(store, plan), kv_log=log)
    nbytes = 4096
    names = [bytes([i]) * 16 for i in range(9)]
    with StageLog(config) as first:
        first.put(3, [(key, memoryview(key * (nbytes // 16))) for key in names])
        keys = first.hand_over()
    assert bool(keys) == (kind == "ephemeral")
    with StageLog(config, keys) as second:
        assert set(second.keys()) == set(names)
        dest = bytearray(nbytes)
        for key in names:
            assert second.get(key, memoryview(dest)) and dest == key * (nbytes // 16)
        assert second.put(3, [(b"x" * 16, memoryview(b"x" * nbytes))])
        if kind == "ephemeral":
            second.hand_over()
    if kind == "ephemeral":  # whose keys nobody has any more
        with StageLog(config) as third:
            assert not third.keys()
    assert (tmp_path / "kv" / "stage-0").exists() == (kind == "kept")
