"""What formats and methods of rounding cost: python benchmarks/quantization.py [--checkpoint PATH] [--text FILE ...]

The first half of each text is for calibration, the second half is predicted. The first row is the checkpoint as it
is; divergence and agreement are of the others beside it. Bits are of the layers' matrices with scales, and of all weights
as they are stored. Mixed stores have the formats that --budget chooses, by what gptq's rounding costs.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from headrace.runtime.calibration.calibrate import Calibration, convert_calibrated
from headrace.runtime.calibration.encoding import Method
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.evaluation.figures import divergence_figures, perplexity
from headrace.runtime.evaluation.measure import Predictions, measure
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.sensitivity.candidates import Candidates
from headrace.runtime.sensitivity.choose import choose, options_of, rules_of
from headrace.runtime.sensitivity.measure import measure as sensitivities
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = sorted((EXAMPLES / "text").glob("*.txt"))

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "nf4": {"format": "nf4"},
    "nf4, scales quantized": {"format": "nf4", "double_quant": True},
    "int3, groups of 128": {"format": "int3", "group_size": 128},
    "int4, groups of 64": {"format": "int4", "group_size": 64},
    "int4, groups of 128": {"format": "int4", "group_size": 128},
}
METHODS: tuple[Method, ...] = ("gptq", "awq")
BUDGETS = (3.6, 4.5, 6.0)
"""Bits a weight, embeddings and head with the others."""

GROUP_SIZE = 128
"""Of mixed stores."""

AT_ONCE = 4
"""Models that are compared with the checkpoint at a time."""


def halves(checkpoint: Path, files: list[Path], context: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Sequences [n, context] to calibrate with, and to predict, at most `tokens` tokens of each text."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for file in files:
        text = file.read_text()
        for part, half in zip(parts, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True):
            ids = tokenizer(half, add_special_tokens=False, verbose=False).input_ids
            count = min(len(ids), tokens) // context
            part.append(torch.tensor(ids[: count * context]).view(count, context))
    first, second = (torch.cat(part) for part in parts)
    return first, second


def stores(
    checkpoint: Path, folder: Path, calibration: Tensor, device: str, only: str | None
) -> Iterator[tuple[str, Path]]:
    """Each row's name, and its store once it is made."""
    convert(checkpoint, folder / "bf16", format="bf16", self_check=check)
    yield "bf16", folder / "bf16"
    text = xxhash.xxh3_128_hexdigest(calibration.numpy().tobytes())
    gptq = Calibration(calibration, text, "gptq", torch.device(device))
    if only != "uniform":
        yield from mixed(checkpoint, folder, gptq)
    if only != "mixed":
        yield from uniform(checkpoint, folder, gptq)


def uniform(checkpoint: Path, folder: Path, gptq: Calibration) -> Iterator[tuple[str, Path]]:
    """One format for all matrices of layers."""
    for name, options in FORMATS.items():
        run: Callable[..., Store] = partial(convert, self_check=check, **options)
        run(checkpoint, folder / name)
        yield f"{name}, to nearest", folder / name
        for method in METHODS:
            chosen = replace(gptq, method=method)
            convert_calibrated(checkpoint, folder / f"{name} {method}", chosen, run)
            yield f"{name}, {method}", folder / f"{name} {method}"


def mixed(checkpoint: Path, folder: Path, calibration: Calibration) -> Iterator[tuple[str, Path]]:
    """Stores of several formats, as many bits as a budget has; those that cannot be had are left out."""
    candidates = Candidates(open_checkpoint(checkpoint), GROUP_SIZE)
    sensitivity = sensitivities(candidates, calibration.tokens, "gptq", calibration.device)
    for bits in BUDGETS:
        limit = int(bits * candidates.parameters / 8)
        if candidates.plan.nbytes > limit:
            continue
        mix = choose(candidates, sensitivity, limit)
        policy, group_size = options_of(
            rules_of(sensitivity.groups, mix.formats), candidates.group_size
        )
        run: Callable[..., Store] = partial(
            convert, format="keep", policy=policy, group_size=group_size, self_check=check
        )
        name = f"mixed, {bits} bits in all (predicted {mix.kld:.5f})"
        run(checkpoint, folder / f"{bits}")
        yield f"{name}, to nearest", folder / f"{bits}"
        convert_calibrated(checkpoint, folder / f"{bits} gptq", calibration, run)
        yield f"{name}, gptq", folder / f"{bits} gptq"


def predictions(paths: list[Path], windows: Windows, device: str) -> list[Predictions]:
    """Of the models in lock step, the first of which is the reference."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    place = torch.device(device)
    sweeps = [Sweep(open_model(p), place, dtype, context=windows.context) for p in paths]
    try:
        return measure(sweeps, windows, lambda *_: None)
    finally:
        for sweep in sweeps:
            sweep.close()


def bits(store: Store) -> float:
    """A weight of the layers' matrices takes so many, scales and norms counted in."""
    layers = sum(block.nbytes for block in store.layers)
    return 8 * layers / sum(shape.parameters for shape in store.layer_shapes)


def bits_in_all(store: Store) -> float:
    """A weight of any kind."""
    weights = (spec for block in store.blocks for spec in block.weights.values())
    files = sum(block.file.stat().st_size for block in store.blocks)
    return 8 * files / sum(prod(spec.shape) for spec in weights)


def row(store: Store, windows: Windows, reference: Predictions, found: Predictions) -> list[str]:
    figures = divergence_figures(windows, reference, found)
    return [
        f"{store.nbytes:,}",
        f"{bits(store):.2f}",
        f"{bits_in_all(store):.2f}",
        f"{perplexity(windows, found):.4f}",
        f"{figures.mean:.5f}",
        f"{figures.p99:.5f}",
        f"{figures.top1:.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLES / "stories-9m")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40960, help="of each half of each text")
    parser.add_argument("--only", choices=("mixed", "uniform"), help="rows of the table")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    calibration, tests = halves(chosen.checkpoint, chosen.text, chosen.context, chosen.tokens)
    windows = Windows(tests, (chosen.context,) * len(tests), 0)
    table = Table(
        "weights", "bytes", "bits", "bits in all", "perplexity", "mean KLD", "p99 KLD", "agree"
    )
    with tempfile.TemporaryDirectory() as folder:
        made = stores(chosen.checkpoint, Path(folder), calibration, chosen.device, chosen.only)
        while some := list(islice(made, AT_ONCE)):
            paths = [chosen.checkpoint, *(path for _, path in some)]
            reference, *found = predictions(paths, windows, chosen.device)
            if not table.row_count:
                table.add_row("as it is", "", "", "", f"{perplexity(windows, reference):.4f}")
            for (name, path), one in zip(some, found, strict=True):
                table.add_row(name, *row(Store.open(path), windows, reference, one))
    Console().print(
        f"{windows.count:,} tokens predicted, {calibration.numel():,} to calibrate with"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
