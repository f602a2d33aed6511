"""Held-out perplexity of the bundled model in each format, through Headrace's own layers.

    python benchmarks/perplexity.py [--model CHECKPOINT] [--tokens 40000]

Texts are cut into windows of 1024 tokens, and each token but a window's first is predicted from
those before it in the window. Everything is computed in float32 on the CPU. The first row of a text
is transformers' own number for the checkpoint.
"""

import argparse
import logging
import math
import tempfile
import time
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
from headrace.runtime.kv_store import KVStore
from headrace.runtime.model import StageModel
from headrace.runtime.store import Store
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

    def __init__(self, path: Path) -> None:
        store = Store.open(path)
        self._layers = range(len(store.layers))
        self._model = StageModel(
            store,
            self._layers,
            device=CPU,
            dtype=torch.float32,
            with_embedding=True,
            with_head=True,
        )
        for layer in self._layers:
            data = torch.frombuffer(store.read_block(store.layers[layer]), dtype=torch.uint8)
            self._model.bind(layer, data)
        shapes = dict(enumerate(store.layer_shapes))
        self._kv = KVStore(shapes, WINDOW // PAGE_TOKENS, torch.float32, CPU)

    def __call__(self, tokens: list[int]) -> Iterator[Tensor]:
        piece = Slice(0, 0, tuple(tokens), tuple(range(WINDOW // PAGE_TOKENS)), None)
        prepared = self._model.prepare(Batch.build(MicroBatch((piece,)), CPU))
        x = prepared.x
        for layer in self._layers:
            x = self._model.run_layer(layer, x, prepared, self._kv)
        for rows in x.split(LOGIT_ROWS):
            yield self._model.logits(rows)


class Reference:
    """transformers' model."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def __call__(self, tokens: list[int]) -> Iterator[Tensor]:
        yield self._model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def perplexity(logits: Logits, tokens: list[int]) -> float:
    total, count = 0.0, 0
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        if len(window) < 2:
            break
        wanted = torch.tensor(window[1:])
        done = 0
        for rows in logits(window):
            some = wanted[done : done + len(rows)]
            total += F.cross_entropy(rows[: len(some)].float(), some, reduction="sum").item()
            done += len(rows)
        count += len(wanted)
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "stories-9m")
    parser.add_argument("--tokens", type=int, default=40000, help="of each text")
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = {
        name: tokenizer(path.read_text(), add_special_tokens=False).input_ids[: arguments.tokens]
        for name, path in TEXTS.items()
    }
    table = Table("weights", *(f"{name}, {len(text)} tokens" for name, text in texts.items()))
    table.add_column("bytes of the layers", justify="right")
    table.add_column("seconds", justify="right")

    def measure(name: str, logits: Logits, nbytes: int | None) -> None:
        start = time.perf_counter()
        found = [f"{perplexity(logits, text):.3f}" for text in texts.values()]
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
