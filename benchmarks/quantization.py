"""What formats and methods of rounding cost: python benchmarks/quantization.py [--checkpoint PATH] [--text FILE ...]

The first half of each text is for calibration, the second half is predicted. The first row is the checkpoint as it
is; divergence and agreement are of the others beside it. Bits are of the layers' matrices, with scales.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
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
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.evaluation.figures import divergence_figures, perplexity
from headrace.runtime.evaluation.measure import Predictions, measure
from headrace.runtime.evaluation.windows import Windows
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = sorted((EXAMPLES / "text").glob("*.txt"))

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"format": "int8"},
    "nf4": {"format": "nf4"},
    "nf4, scales quantized": {"format": "nf4", "double_quant": True},
    "int4, groups of 64": {"format": "int4", "group_size": 64},
    "int4, groups of 128": {"format": "int4", "group_size": 128},
}
METHODS: tuple[Method, ...] = ("gptq", "awq")


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
    checkpoint: Path, folder: Path, calibration: Tensor, device: str
) -> Iterator[tuple[str, Path]]:
    """Each row's name, and its store once it is made."""
    convert(checkpoint, folder / "bf16", format="bf16", self_check=check)
    yield "bf16", folder / "bf16"
    text = xxhash.xxh3_128_hexdigest(calibration.numpy().tobytes())
    for name, options in FORMATS.items():
        run: Callable[..., Store] = partial(convert, self_check=check, **options)
        run(checkpoint, folder / name)
        yield f"{name}, to nearest", folder / name
        for method in METHODS:
            chosen = Calibration(calibration, text, method, torch.device(device))
            convert_calibrated(checkpoint, folder / f"{name} {method}", chosen, run)
            yield f"{name}, {method}", folder / f"{name} {method}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=EXAMPLES / "stories-9m")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=40960, help="of each half of each text")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    calibration, tests = halves(chosen.checkpoint, chosen.text, chosen.context, chosen.tokens)
    windows = Windows(tests, (chosen.context,) * len(tests), 0)
    table = Table("weights", "bytes", "bits", "perplexity", "mean KLD", "p99 KLD", "agree")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in stores(chosen.checkpoint, Path(folder), calibration, chosen.device):
            both = predictions([chosen.checkpoint, path], windows, chosen.device)
            if not table.row_count:
                table.add_row("as it is", "", "", f"{perplexity(windows, both[0]):.4f}")
            figures = divergence_figures(windows, *both)
            store = Store.open(path)
            table.add_row(
                name,
                f"{store.nbytes:,}",
                f"{bits(store):.2f}",
                f"{perplexity(windows, both[1]):.4f}",
                f"{figures.mean:.5f}",
                f"{figures.p99:.5f}",
                f"{figures.top1:.2%}",
            )
    Console().print(
        f"{windows.count:,} tokens predicted, {calibration.numel():,} to calibrate with"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
