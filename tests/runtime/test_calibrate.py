"""Conversions whose roundings follow a text: of tiny models of all kinds, whole, killed and resumed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from foreign import fp8, write, write_gpt_oss
from stored import stored_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.runtime.calibration.calibrate import Calibration, convert_calibrated
from headrace.runtime.calibration.layer import FEWEST_TOKENS, LayerCalibration
from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.calibration.observed import batches
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.plan import Options, plan_conversion
from headrace.runtime.evaluation.figures import perplexity
from headrace.runtime.evaluation.measure import measure
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.skeleton import Skeleton, load_config
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import CheckpointModel, open_model
from headrace.runtime.sweep.sweep import Sweep
from headrace.runtime.weights.view import view_weight
from headrace.scheduler.errors import DoesNotFitError, StoreError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(sequences=6, length=64):
    """Sequences of ids; those of the second half begin with the same one."""
    tokens = torch.randint(4, 256, (sequences, length), generator=torch.Generator().manual_seed(1))
    tokens[sequences // 2 :, 0] = 7
    return tokens


def calibration(method="gptq", tokens=None, **options):
    tokens = text() if tokens is None else tokens
    return Calibration(tokens, "some text", method, CPU, **options)


def made(name, folder, **changes):
    """A checkpoint of a tiny model."""
    tiny_model(name, **changes).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


def calibrated(source, dest, chosen, **options):
    def run(*paths, **more):
        return convert(*paths, allow_missing_tokenizer=True, **options, **more)

    return convert_calibrated(source, dest, chosen, run)


@torch.inference_mode()
def logits(path, tokens):
    with (
        Sweep(open_model(path), CPU, torch.float32, context=tokens.shape[1]) as sweep,
        sweep.embed(tokens) as states,
    ):
        for layer in sweep.layers():
            layer.run(states)
        return sweep.logits(states.values.flatten(0, 1)[: sweep.logit_rows])


@torch.inference_mode()
def reference(path, tokens):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(tokens).logits.flatten(0, 1)


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def off(found, expected):
    """Squared error over square."""
    rows = expected[: len(found)]
    return float((found - rows).square().sum() / rows.square().sum())


# Plain; one matrix for queries, keys and values; latents; experts one by one, stacked, and the other way round.
@pytest.mark.parametrize(
    "name", ["llama", "phi3", "deepseek_v3", "qwen3_moe", "granitemoe", "gpt_oss"]
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_all_kinds_of_layers_are_calibrated(name, method, tmp_path):
    source = made(name, tmp_path)
    options = {"format": "int4", "group_size": 32}
    store, tally = calibrated(source, tmp_path / "store", calibration(method), **options)
    convert(source, tmp_path / "nearest", allow_missing_tokenizer=True, **options)
    store.verify()
    assert store.options["calibration"] == {
        "method": method, "text": "some text", "sequences": 6, "context": 64,
    }  # fmt: skip
    assert sum(tally.counts[how] for how in tally.counts if how.startswith(method)) > 10
    # The text that the roundings follow is predicted as the checkpoint predicts it, or better than without.
    expected = reference(source, text())
    nearest = off(logits(tmp_path / "nearest", text()), expected)
    found = off(logits(store.path, text()), expected)
    assert found < nearest * (1.0 if method == "gptq" else 1.1), (found, nearest)


@pytest.mark.parametrize(
    ("fmt", "options"), [("nf4", {}), ("nf4", {"double_quant": True}), ("int8", {})]
)
def test_other_formats_are_read_as_they_were_rounded(fmt, options, tmp_path):
    source = made("llama", tmp_path)
    store, _ = calibrated(source, tmp_path / "store", calibration(), format=fmt, **options)
    plain = convert(
        source, tmp_path / "nearest", format=fmt, allow_missing_tokenizer=True, **options
    )
    assert [b.nbytes for b in store.blocks] == [b.nbytes for b in plain.blocks]
    expected = reference(source, text())
    found = off(logits(store.path, text()), expected)
    nearest = off(logits(plain.path, text()), expected)
    assert found < nearest, (found, nearest)
    # Each weight stays near where it was: errors are made up for, not piled up.
    before = Checkpoint(source)
    for name, values in stored_weights(store, store.layers[1]).items():
        run = torch.cat(list(before.weights[name].data.rows())).view(values.shape).float()
        assert (values - run).abs().max() < 0.5 * run.abs().max(), name


# Shared key heads; a norm that adds one; norms with biases, before two at once; fused matrices.
@pytest.mark.parametrize("name", ["llama", "gemma", "stablelm", "phi", "phi3", "qwen3"])
@torch.inference_mode()
def test_dividing_channels_before_a_matrix_changes_no_output(name, tmp_path):
    source = made(name, tmp_path)
    model = CheckpointModel(source, self_check=None)
    plan = plan_conversion(Checkpoint(source), Options("int4", group_size=32))
    roles = Skeleton(load_config(source), torch.float32).classify(
        [weight for block in model.blocks for weight in block.weights]
    )
    random = torch.Generator().manual_seed(3)
    kinds = set()
    with Sweep(model, CPU, torch.float32, context=64) as sweep, sweep.embed(text()) as states:
        for layer in sweep.layers():
            weights = LayerWeights(model.layers[layer.index], layer.block, roles)
            shape = model.layer_shapes[layer.index]
            plans = plan.blocks[layer.index + 1].weights
            calibrating = LayerCalibration(layer, weights, plans, shape, "awq")
            groups = calibrating.linear_groups(states)
            folds = calibrating.folds(groups, states)
            before = sweep.embed(text())
            before.values.copy_(states.values)
            layer.rebind(view_weight)
            layer.run(before)
            for group in groups:
                if group[0] in folds:
                    fold = folds[group[0]]
                    kinds.add(type(fold).__name__)
                    columns = weights.shape(group[0][0])[-1]
                    scales = fold.shared(torch.rand(columns, generator=random) * 3 + 0.3)
                    real, changed = fold.divided(weights, scales)
                    for matrix, values in changed.items():
                        weights.raw(matrix).copy_(values)
                    for matrix, _ in group:
                        weights.raw(matrix).mul_(real)
            layer.rebind(view_weight)
            layer.run(states)
            torch.testing.assert_close(states.values, before.values, rtol=1e-5, atol=1e-5)
    assert kinds == {"NormFold", "RowsFold"} or name in ("phi", "stablelm"), kinds
    assert "NormFold" in kinds


def windows(half, count):
    """Of each example text `count` sequences of 256 tokens, from its first half or its last."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    found = []
    for name in ("held_out_stories.txt", "held_out_public_domain.txt"):
        whole = (STORIES.parent / "text" / name).read_text()
        part = whole[len(whole) // 2 :] if half else whole[: len(whole) // 2]
        ids = tokenizer(part[: count * 3000], add_special_tokens=False).input_ids
        found.append(torch.tensor(ids[: count * 256]).view(count, 256))
    return torch.cat(found)


def held_out(*paths):
    """Perplexities over text that no rounding followed."""
    tokens = windows(1, 8)
    tests = Windows(tokens, (256,) * len(tokens), 0)
    with ExitStack() as stack:
        sweeps = [
            stack.enter_context(Sweep(open_model(path), CPU, torch.float32, context=256))
            for path in paths
        ]
        return [perplexity(tests, found) for found in measure(sweeps, tests, lambda *_: None)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "group_size"),
    [
        ("gptq", 64),
        pytest.param("gptq", 128, marks=pytest.mark.slow),
        pytest.param("awq", 64, marks=pytest.mark.slow),
        pytest.param("awq", 128, marks=pytest.mark.slow),
    ],
)
def test_a_trained_model_loses_less_on_other_text_than_it_was_calibrated_with(
    method, group_size, tmp_path
):
    options = {"format": "int4", "group_size": group_size}
    convert(STORIES, tmp_path / "nearest", **options)
    calibrated(STORIES, tmp_path / "store", calibration(method, windows(0, 12)), **options)
    plain, nearest, found = held_out(STORIES, tmp_path / "nearest", tmp_path / "store")
    # More text would gain more.
    assert plain < found and found - plain < 0.9 * (nearest - plain), (plain, nearest, found)


def test_awq_says_what_nothing_can_divide(tmp_path):
    source = made("qwen3_moe", tmp_path)
    _, tally = calibrated(source, tmp_path / "store", calibration("awq"), format="int4")
    # A router sees what experts see.
    assert tally.counts["awq without scales, which nothing can divide"] > 0
    assert tally.counts["awq"] > 0


def test_experts_of_few_tokens_are_rounded_to_nearest(tmp_path):
    source = made("mixtral", tmp_path)
    tokens = text(2, 40)
    store, tally = calibrated(source, tmp_path / "store", calibration(tokens=tokens), format="int4")
    plain = convert(source, tmp_path / "nearest", format="int4", allow_missing_tokenizer=True)
    assert tally.too_few and max(tally.too_few.values()) < FEWEST_TOKENS
    nearest = stored_weights(plain, plain.layers[0])
    found = stored_weights(store, store.layers[0])
    for name in found:
        if name in tally.too_few:
            torch.testing.assert_close(found[name], nearest[name], rtol=1e-3, atol=1e-4)


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(method, tmp_path):
    source = made("qwen3_moe", tmp_path)
    options = {"format": "int4", "group_size": 32}
    calibrated(source, tmp_path / "whole", calibration(method), **options)
    for stop in ("layer-00001", "layer-00002", "head"):

        def progress(report, stop=stop):
            if report.block == stop:
                raise Stop

        with pytest.raises(Stop):
            calibrated(
                source, tmp_path / "store", calibration(method), progress=progress, **options
            )
        with pytest.raises(StoreError, match="unfinished"):
            Store.open(tmp_path / "store")
    with pytest.raises(StoreError, match="other options"):
        calibrated(source, tmp_path / "store", calibration(method, text(3)), **options)
    # Without the states that were kept, earlier layers are run once more.
    for states in (tmp_path / "store").glob("*.states"):
        states.unlink()
    calibrated(source, tmp_path / "store", calibration(method), **options)
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


KILLED = """
import sys, torch
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_calibrate import calibrated, calibration
torch.set_num_threads(1)
calibrated(Path(sys.argv[1]), Path(sys.argv[2]), calibration(), format="int4")
"""


def test_killed_in_the_middle_it_resumes_to_the_same_bytes(tmp_path):
    source = made("llama", tmp_path, num_hidden_layers=8, hidden_size=128)
    calibrated(source, tmp_path / "whole", calibration(), format="int4")
    tests = Path(__file__).parent
    script = KILLED.format(tests=str(tests))
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(tmp_path / "store")],
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:
        while not list((tmp_path / "store").glob("*-00003.states")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "store" / "headrace-convert.jsonl").exists()
    assert list((tmp_path / "store").glob("*.states"))
    calibrated(source, tmp_path / "store", calibration(), format="int4")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


def test_device_memory_is_enough_or_refused_with_a_figure(tmp_path):
    source = made("llama", tmp_path)
    with pytest.raises(DoesNotFitError, match=r"needs .* \((\d+) bytes\)") as refused:
        calibrated(source, tmp_path / "store", calibration(device_memory=100_000), format="int4")
    needed = int(str(refused.value).split(" (")[1].split(" ")[0])
    chosen = calibration(device_memory=needed)
    store, tally = calibrated(source, tmp_path / "store", chosen, format="int4")
    store.verify()
    assert tally.counts["gptq"] == 3 * 7
    # One set of second moments at a time.
    assert batches({("a", None): 8, ("b", None): 8}, 256) == [{("a", None): 8}, {("b", None): 8}]
    assert len(batches({("a", None): 8, ("b", None): 8}, 512)) == 1


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_what_is_quantized_already_is_calibrated_where_that_is_asked_for(name, tmp_path):
    """FP8 as DeepSeek publishes it, and gpt-oss' stacks, which are rounded to nearest."""
    if name == "gpt_oss":
        source, _ = write_gpt_oss(tmp_path)
    else:
        settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
        source, _ = write(tmp_path, name, settings, fp8((32, 32), "scale_inv"))
    options = {"format": "int4", "group_size": 32, "requantize": True}
    store, tally = calibrated(source, tmp_path / "store", calibration(), **options)
    rounded = "to nearest, in stacks that are not calibrated" if name == "gpt_oss" else "gptq"
    assert tally.counts[rounded]
    reference = logits(source, text())
    error = (logits(store.path, text()) - reference).norm() / reference.norm()
    assert 0 < float(error) < 0.5
