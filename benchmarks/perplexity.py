"""Held-out perplexity of the bundled model in each format, through Headrace's own layers.

    python benchmarks/perplexity.py [--model CHECKPOINT] [--tokens 40000] [--kv-format bf16 int8 int4]

Texts are cut into windows of 1024 tokens, and each token but a window's first is predicted from
those before it in the window. Everything is computed in float32 on the CPU. The first row of a text
is transformers' own number for the checkpoint.

With --kv-format the weights stay as they are and each row is a format of KV pages. `agree` is the share
of tokens whose most likely one is the first row's. A second table says why keys are rotated and values
are not.
"""

import argparse
import itertools
import logging
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.runtime.batch import Batch
from headrace.runtime.conversion.convert import convert
from headrace.runtime.dtypes import name_of
from headrace.runtime.kv.codes import Rotation, dequantize, quantize
from headrace.runtime.kv.store import KVStore, LayerKV
from headrace.runtime.model import StageModel
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS as KV
from headrace.scheduler.kv_format import KV_FORMATS, resolve_kv_format
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = {
    "stories": EXAMPLES / "text" / "held_out_stories.txt",
    "public domain": EXAMPLES / "text" / "held_out_public_domain.txt",
}
FORMATS = {
    "as it is": ("keep", False),
    "bf16": ("bf16", False),
    "int8": ("int8", False),
    "nf4": ("nf4", False),
    "nf4, scales quantized": ("nf4", True),
}
WINDOW = 1024
LOGIT_ROWS = 256
CPU = torch.device("cpu")

Logits = Callable[[list[int]], Iterator[Tensor]]
"""A window of tokens to its logits, some rows at a time."""


class Ours:
    """Every layer of a store, bound for good; a window is one slice of one micro-batch."""

    def __init__(
        self,
        path: Path,
        kv_format: str = "auto",
        *,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        fp8_products: bool = True,
    ) -> None:
        store = Store.open(path)
        self._device = device
        self._layers = range(len(store.layers))
        self._model = StageModel(
            store,
            self._layers,
            device=device,
            dtype=dtype,
            with_embedding=True,
            with_head=True,
            fp8_products=fp8_products,
        )
        for layer in self._layers:
            data = torch.frombuffer(store.read_block(store.layers[layer]), dtype=torch.uint8)
            self._model.bind(layer, data.to(device))
        shapes = dict(enumerate(store.layer_shapes))
        fmt = resolve_kv_format(kv_format, name_of(dtype))
        self._kv = KVStore(shapes, WINDOW // PAGE_TOKENS, dtype, device, fmt, num_tails=1)

    def __call__(self, tokens: list[int]) -> Iterator[Tensor]:
        piece = Slice(0, 0, tuple(tokens), tuple(range(WINDOW // PAGE_TOKENS)), None)
        prepared = self._model.prepare(Batch.build(MicroBatch((piece,)), self._device))
        x = prepared.x
        for layer in self._layers:
            x = self._model.run_layer(layer, x, prepared, self._kv)
        for rows in x.split(LOGIT_ROWS):
            yield self._model.logits(rows)

    def close(self) -> None:
        self._model.close()

    def keys_and_values(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the last window, layer by layer. Pages have to be of the compute type."""
        for layer in self._layers:
            kv = self._kv.layer(layer)
            assert isinstance(kv, LayerKV)
            yield "keys", kv.k
            yield "values", kv.v


class Reference:
    """transformers' model."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def __call__(self, tokens: list[int]) -> Iterator[Tensor]:
        yield self._model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def perplexity(logits: Logits, tokens: list[int]) -> tuple[float, Tensor]:
    """And the most likely token after each."""
    total, count, likeliest = 0.0, 0, []
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        if len(window) < 2:
            break
        wanted = torch.tensor(window[1:])
        done = 0
        for rows in logits(window):
            some = wanted[done : done + len(rows)]
            total += F.cross_entropy(rows[: len(some)].float(), some, reduction="sum").item()
            likeliest.append(rows[: len(some)].argmax(-1))
            done += len(rows)
        count += len(wanted)
    return math.exp(total / count), torch.cat(likeliest)


def measure_kv(model: Path, kv_formats: list[str], texts: dict[str, list[int]]) -> Table:
    table = Table("KV pages", *(f"{name}, {len(text)} tokens" for name, text in texts.items()))
    table.add_column("agree", justify="right")
    table.add_column("seconds", justify="right")
    first: Tensor | None = None
    with tempfile.TemporaryDirectory() as folder:
        convert(model, Path(folder) / "store", format="keep")
        for kv_format in kv_formats:
            start = time.perf_counter()
            ours = Ours(Path(folder) / "store", kv_format)
            found = [perplexity(ours, text) for text in texts.values()]
            likeliest = torch.cat([tokens for _, tokens in found])
            first = likeliest if first is None else first
            agree = (likeliest == first).float().mean().item()
            seconds = f"{time.perf_counter() - start:.0f}"
            table.add_row(kv_format, *(f"{p:.4f}" for p, _ in found), f"{agree:.2%}", seconds)
    return table


def measure_errors(model: Path, texts: dict[str, list[int]]) -> Table:
    """What quantizing does to the keys and values of the texts' first windows, rotated before or not."""
    squares: dict[tuple[str, str, bool], float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        convert(model, Path(folder) / "store", format="keep")
        ours = Ours(Path(folder) / "store")
        for text in texts.values():
            perplexity(ours, text[:WINDOW])
            for name, x in ours.keys_and_values():
                squares[name, "", False] += x.square().sum().item()
                for fmt, turned in itertools.product(("int8", "int4"), (False, True)):
                    y = Rotation.of(x.shape[-1], x.dtype, CPU).keys(x) if turned else x
                    error = dequantize(*quantize(y, KV[fmt]), KV[fmt]) - y
                    scale = y.square().sum() / x.square().sum()
                    squares[name, fmt, turned] += (error.square().sum() / scale).item()
    table = Table("relative error of", "int8", "int8, rotated", "int4", "int4, rotated")
    for name in ("keys", "values"):
        found = (
            math.sqrt(squares[name, fmt, turned] / squares[name, "", False])
            for fmt, turned in itertools.product(("int8", "int4"), (False, True))
        )
        table.add_row(name, *(f"{error:.2%}" for error in found))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "stories-9m")
    parser.add_argument("--tokens", type=int, default=40000, help="of each text")
    parser.add_argument("--kv-format", nargs="+", choices=KV_FORMATS, help="rows of the table")
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        name: tokenizer(path.read_text(), add_special_tokens=False).input_ids[: arguments.tokens]
        for name, path in TEXTS.items()
    }
    if arguments.kv_format:
        Console().print(measure_kv(arguments.model, arguments.kv_format, texts))
        Console().print(measure_errors(arguments.model, texts))
        return
    table = Table("weights", *(f"{name}, {len(text)} tokens" for name, text in texts.items()))
    table.add_column("bytes of the layers", justify="right")
    table.add_column("seconds", justify="right")

    def measure(name: str, logits: Logits, nbytes: int | None) -> None:
        start = time.perf_counter()
        found = [f"{perplexity(logits, text)[0]:.3f}" for text in texts.values()]
        size = "" if nbytes is None else f"{nbytes:,}"
        table.add_row(name, *found, size, f"{time.perf_counter() - start:.0f}")

    measure("transformers", Reference(arguments.model), None)
    with tempfile.TemporaryDirectory() as folder:
        for name, (fmt, double_quant) in FORMATS.items():
            path = Path(folder) / name.replace(" ", "-")
            store = convert(arguments.model, path, format=fmt, double_quant=double_quant)
            measure(name, Ours(path), sum(block.nbytes for block in store.layers))
    Console().print(table)


if __name__ == "__main__":
    main()
