"""What is predicted of mixed stores, beside what is measured of them; and stores of all kinds within a budget."""

import json
from itertools import pairwise

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from foreign import fp8, write, write_gpt_oss

from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.evaluation.measure import measure as compare
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.manifest import MANIFEST
from headrace.runtime.sensitivity.candidates import Candidates
from headrace.runtime.sensitivity.choose import choose, options_of, rules_of
from headrace.runtime.sensitivity.factors import Factors, kind_of
from headrace.runtime.sensitivity.measure import measure, probed_layers, split
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep
from headrace.scheduler.errors import DoesNotFitError, HeadraceError, StoreError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(vocabulary=256, sequences=8, length=64):
    random = torch.Generator().manual_seed(1)
    return torch.randint(4, vocabulary, (sequences, length), generator=random)


def stories(first, count):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    whole = (STORIES.parent / "text" / "held_out_stories.txt").read_text()
    ids = tokenizer(whole[first : first + count * 1500], add_special_tokens=False).input_ids
    return torch.tensor(ids[: count * 128]).view(count, 128)


def converted(source, dest, candidates, groups, formats):
    policy, group_size = options_of(rules_of(groups, formats), candidates.group_size)
    return convert(
        source, dest, format="keep", policy=policy, group_size=group_size,
        allow_missing_tokenizer=True, requantize=candidates.requantize,
    )  # fmt: skip


def divergence(source, store, tokens):
    windows = Windows(tokens, (tokens.shape[1],) * len(tokens), 0)
    sweeps = [
        Sweep(open_model(path), CPU, torch.float32, context=tokens.shape[1])
        for path in (source, store)
    ]
    try:
        found = compare(sweeps, windows, lambda *_: None)[1]
    finally:
        for sweep in sweeps:
            sweep.close()
    return float(found.kld[windows.counted].mean())


@pytest.mark.slow
def test_divergences_add_up_to_what_a_mixed_store_has(tmp_path):
    """On other text than they were measured with, from all of three bits to hardly anything."""
    candidates = Candidates(open_checkpoint(STORIES), 128)
    sensitivity = measure(candidates, stories(0, 6), "nearest", CPU)
    assert sensitivity.sample == 6 * 128 and len(sensitivity.groups) == 12 * 4 + 1
    measured = []
    for bits in (3.6, 4.5, 6):
        limit = int(candidates.parameters * bits / 8)
        mix = choose(candidates, sensitivity, limit)
        assert mix.nbytes <= limit and 0 <= mix.kld - mix.bound <= 0.05 * mix.kld
        store = converted(
            STORIES, tmp_path / f"{bits}", candidates, sensitivity.groups, mix.formats
        )
        assert store.nbytes + sum(b.data_offset for b in store.blocks) == mix.nbytes
        measured.append(divergence(STORIES, store.path, stories(80_000, 6)))
        assert 0.5 < mix.kld / measured[-1] < 2, (bits, mix.kld, measured[-1])
    assert all(one > 2 * other for one, other in pairwise(measured)), measured


# A head of its own; one matrix for queries, keys and values; latents; experts one by one and in stacks.
@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("llama", "gptq"), ("phi3", "awq"), ("gemma2", "nearest"), ("deepseek_v3", "nearest"),
        ("qwen3_moe", "gptq"), ("granitemoe", "nearest"), ("gpt_oss", "nearest"),
    ],
)  # fmt: skip
def test_all_kinds_of_models_are_mixed_within_their_budget(name, rounding, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "source")
    candidates = Candidates(open_checkpoint(tmp_path / "source"), 32)
    sensitivity = measure(candidates, text(), rounding, CPU)
    experts = name in ("deepseek_v3", "qwen3_moe", "granitemoe", "gpt_oss")
    assert sensitivity.rounding == ("nearest" if experts else rounding)
    # Everything that a format can be chosen for is in one group, and larger formats change less.
    names = [name for group in sensitivity.groups for name in group.names]
    assert len(names) == len(set(names))
    assert set(names) == {name for name in candidates.roles if candidates.is_open(name)}
    for group in sensitivity.groups:
        int3, int4, int8 = (group.kld[fmt] for fmt in ("int3", "int4", "int8"))
        assert int3 >= int4 >= int8 >= group.kld["keep"] == 0
        # In a model with random weights, what is routed elsewhere for a small error changes much.
        assert 0 <= int8 < (0.5 if experts else 0.1) * int3
    least = candidates.plan.nbytes
    most = choose(candidates, sensitivity, 1 << 40).nbytes
    for share in (0.1, 0.5):
        limit = int(least + share * (most - least))
        mix = choose(candidates, sensitivity, limit)
        assert mix.nbytes <= limit and len(set(mix.formats)) > 1
        store = converted(
            tmp_path / "source",
            tmp_path / f"{share}",
            candidates,
            sensitivity.groups,
            mix.formats,
        )
        assert sum(b.file.stat().st_size for b in store.blocks) == mix.nbytes
        formats = {n: spec.format for block in store.blocks for n, spec in block.weights.items()}
        for group, fmt in zip(sensitivity.groups, mix.formats, strict=True):
            assert {formats[n] for n in group.names} == {
                fmt.replace("keep", "raw")
            } or fmt == "bf16"


def test_a_budget_below_the_least_is_refused_with_what_is_needed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    candidates = Candidates(open_checkpoint(tmp_path / "source"), 32)
    sensitivity = measure(candidates, text(), "nearest", CPU)
    with pytest.raises(HeadraceError, match=r"give at least --budget (\d+\.\d\d)bits") as refused:
        choose(candidates, sensitivity, 10_000)
    bits = float(str(refused.value).rpartition("--budget ")[2].removesuffix("bits"))
    mix = choose(candidates, sensitivity, int(bits * candidates.parameters / 8))
    # Rounded up to a hundredth of a bit, which may pay for one group more.
    assert mix.formats.count("int3") >= len(mix.formats) - 2


def test_device_memory_is_enough_or_refused_with_a_figure(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    candidates = Candidates(open_checkpoint(tmp_path / "source"), 32)
    with pytest.raises(DoesNotFitError, match=r"needs .* \((\d+) bytes\)") as refused:
        measure(candidates, text(), "gptq", CPU, device_memory=100_000)
    needed = int(str(refused.value).split(" (")[1].split(" ")[0])
    found = measure(candidates, text(), "gptq", CPU, device_memory=needed)
    # Second moments of one group at a time, and small micro-batches, give the same.
    plain = measure(candidates, text(), "gptq", CPU)
    for one, other in zip(found.groups, plain.groups, strict=True):
        assert one.names == other.names
        assert one.kld == pytest.approx(other.kld, rel=0.02)


@pytest.mark.parametrize(
    ("name", "rounding"), [("llama", "gptq"), ("deepseek_v3", "nearest"), ("gpt_oss", "nearest")]
)
def test_a_quantized_checkpoint_is_mixed_where_that_is_asked_for(name, rounding, tmp_path):
    """What keeps its format has no second error, and matrices that its maker left alone stay so."""
    if name == "gpt_oss":
        source, _ = write_gpt_oss(tmp_path)
    else:
        settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
        source, _ = write(tmp_path, name, settings, fp8((32, 32), "scale_inv"))
    candidates = Candidates(open_checkpoint(source), 32, requantize=True)
    sensitivity = measure(candidates, text(), rounding, CPU)
    for group in sensitivity.groups:
        klds = [group.kld[fmt] for fmt in candidates.formats]
        assert klds == sorted(klds, reverse=True) and klds[0] > klds[-1] == 0
    most = choose(candidates, sensitivity, 1 << 40)
    limit = (7 * candidates.plan.nbytes + most.nbytes) // 8
    mix = choose(candidates, sensitivity, limit)
    assert mix.kld > 0 == most.kld and {"int3", "keep"} & {*mix.formats}
    store = converted(source, tmp_path / "store", candidates, sensitivity.groups, mix.formats)
    assert sum(b.file.stat().st_size for b in store.blocks) == mix.nbytes <= limit
    formats = {n: spec.format for block in store.blocks for n, spec in block.weights.items()}
    for group, fmt in zip(sensitivity.groups, mix.formats, strict=True):
        for each in group.names:
            was = candidates.of(each, "keep").format
            assert formats[each] == (was if fmt == "keep" else fmt)
    changed = json.loads((store.path / "headrace-changes.json").read_text())["requantized"]
    assert {c["from"] for c in changed.values()} == {"mxfp4" if name == "gpt_oss" else "fp8"}


def test_a_quantized_checkpoint_is_left_alone(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "store", format="int8", allow_missing_tokenizer=True)
    # A store in bitsandbytes' formats is a checkpoint of transformers', too.
    (tmp_path / "store" / MANIFEST).unlink()
    with pytest.raises(StoreError, match=r"is quantized to int8 already.* say --requantize"):
        Candidates(open_checkpoint(tmp_path / "store"), None)


def test_factors_between_probed_layers_are_interpolated():
    assert probed_layers(80) == {0, 11, 23, 34, 45, 56, 68, 79}
    assert probed_layers(3) == {0, 1, 2} and probed_layers(1) == {0}
    sample, followed = split(torch.arange(100)[:, None].expand(-1, 1024))
    assert sample.shape == (4, 512) and followed.shape == (96, 1024)
    assert not set(sample[:, 0].tolist()) & set(followed[:, 0].tolist())
    assert [len(part) for part in split(torch.zeros(8, 512))] == [4, 8]
    kind = kind_of(("model.layers.4.mlp.experts.17.up_proj.weight",))
    assert kind == {"model.layers.*.mlp.experts.*.up_proj.weight"}
    factors = Factors()
    factors.add(2, kind, 4.0, 2.0)
    factors.add(6, kind, 8.0, 1.0)
    factors.add(4, kind, 0.0, 1.0)
    found = [factors.at(layer, kind) for layer in (0, 2, 4, 6, 9)]
    assert found == pytest.approx([2.0, 2.0, 4.0, 8.0, 8.0])
    assert factors.at(0, kind_of(("other",))) == 0.0
