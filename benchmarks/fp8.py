"""FP8 weights on a GPU: multiplied by rows in FP8, or dequantized and multiplied by rows in bf16.

    python benchmarks/fp8.py products [--rows 1,16,128,2048,8192]
    python benchmarks/fp8.py quality [--model CHECKPOINT] [--tokens 20000]
    python benchmarks/fp8.py ring FOLDER [--shape 8b] [--layers 32] [--batch 128]

`products` prints microseconds, the caches flushed before each call. `quality` makes FP8 checkpoints of
a model, with scales of rows and of 128 x 128 blocks, and compares next-token distributions on held-out
text with those of the same weights in float32: mean Kullback-Leibler divergence (nats) and share of equal
likeliest tokens. `ring` runs a model's shape with random weights in FP8, all on the device of one stage, and prints
seconds of a pass in which all sequences decode, and of all prompts; FOLDER keeps the checkpoints and stores.
"""

import argparse
import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from perplexity import EXAMPLES, TEXTS, WINDOW, Ours
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from headrace.cluster.bench.random_store import write_checkpoint
from headrace.cluster.bench.run import Work, run_work
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.cluster.engine_options import EngineOptions
from headrace.runtime.conversion.convert import convert
from headrace.runtime.matmul.fp8 import BLOCK, FP8, multiply, rounded, scales_of
from headrace.runtime.matmul.timing import Timer
from headrace.runtime.weights.small_floats import fp8_values

CUDA = torch.device("cuda", 0)
PRODUCTS = ((28672, 8192), (14336, 4096), (4096, 4096))
KINDS = ("rows", "blocks")
LARGEST = 448.0


def quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and float32 scales: [N, 1], or of blocks."""
    if kind == "rows":
        scale = weight.float().abs().amax(1, keepdim=True) / LARGEST
        return (weight / scale).to(FP8), scale
    rows, columns = weight.shape
    whole = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scale[:, None, :, None]).view(whole.shape)
    return codes[:rows, :columns].to(FP8), scale


def measure(shape: tuple[int, int], kind: str, count: int, timer: Timer) -> tuple[str, ...]:
    """Microseconds of each way for `count` rows, and how far rows in FP8 are off."""
    plain = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    x = torch.randn(count, shape[1], device=CUDA, dtype=torch.bfloat16)
    codes, scale = quantized(plain, kind)
    block = (1, shape[1]) if kind == "rows" else (BLOCK, BLOCK)
    scales = scales_of(shape, block)
    assert scales is not None
    dense = torch.empty_like(plain)

    def by_fp8() -> Tensor:
        return multiply(rounded(x, scales), codes, scale, scales)

    def by_bf16() -> Tensor:
        fp8_values(codes, scale, block, 0, dense)
        return x @ dense.T

    exact = by_bf16().float()
    error = (by_fp8().float() - exact).norm() / exact.norm()
    ways: list[Callable[[], Tensor]] = [by_fp8, by_bf16, lambda: x @ plain.T]
    return *(f"{timer(way):.1f}" for way in ways), f"{error:.2%}"


def products(counts: list[int]) -> Table:
    table = Table("weight", "scales of", "rows", "fp8", "dequantized", "bf16 weight", "fp8 error")
    timer = Timer(CUDA)
    for shape, kind, count in itertools.product(PRODUCTS, KINDS, counts):
        found = measure(shape, kind, count, timer)
        table.add_row(f"{shape[0]} x {shape[1]}", kind, str(count), *found)
    return table


def write_fp8(source: Path, dest: Path, kind: str) -> None:
    """A checkpoint like `source` with its layers' matrices in FP8 and dynamic activations."""
    dest.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    block = {} if kind == "rows" else {"weight_block_size": [BLOCK, BLOCK]}
    config["quantization_config"] = settings | block
    for file in source.iterdir():
        if file.name == "config.json":
            (dest / file.name).write_text(json.dumps(config))
        elif "safetensors" not in file.name:
            shutil.copy(file, dest)
    places: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(file, "pt", device=str(CUDA)) as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                tensor = opened.get_tensor(name)
                if ".layers." in name and tensor.dim() == 2:
                    tensor, tensors[f"{name}_scale_inv"] = quantized(tensor, kind)
                tensors[name] = tensor
        save_file({name: each.cpu() for name, each in tensors.items()}, dest / file.name)
        places |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {}, "weight_map": places}
    (dest / "model.safetensors.index.json").write_text(json.dumps(index))


def distributions(ours: Ours, tokens: list[int]) -> Iterator[Tensor]:
    with closing(ours):
        for start in range(0, len(tokens) - 1, WINDOW):
            for rows in ours(tokens[start : start + WINDOW]):
                yield rows.float().log_softmax(-1)


@torch.inference_mode()
def quality(model: Path, count: int) -> Table:
    text = TEXTS["stories"].read_text()
    ids = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False).input_ids[:count]
    table = Table("scales of", "rows in", "KL divergence", "same likeliest")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            checkpoint, store = Path(folder) / kind, Path(folder) / f"{kind}.store"
            write_fp8(model, checkpoint, kind)
            convert(checkpoint, store, format="keep")
            exact = list(distributions(Ours(store, device=CUDA, fp8_products=False), ids))
            for fp8 in (False, True):
                ours = Ours(store, device=CUDA, dtype=torch.bfloat16, fp8_products=fp8)
                pairs = list(zip(exact, distributions(ours, ids), strict=True))
                kld = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()
                same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs]).float().mean()
                name = "fp8" if fp8 else "bf16"
                table.add_row(kind, name, f"{kld:.5f}", f"{same.item():.2%}")
    return table


def ring(folder: Path, shape: str, layers: int | None, batch: int) -> Iterator[tuple[str, ...]]:
    """What each way takes: scales, rows in, graphs, decode and its share of the bound, prompts."""
    source = folder / shape
    write_checkpoint(source, config_of(shape, layers))
    work = Work(batch, prompt=240, new=32, tier="device")
    for kind in KINDS:
        checkpoint, path = folder / f"{shape}-{kind}", folder / f"{shape}-{kind}.store"
        if not checkpoint.exists():
            write_fp8(source, checkpoint, kind)
        store = convert(checkpoint, path, format="keep")
        for fp8, graphs in ((True, True), (True, False), (False, True)):
            found = run_work(EngineOptions(path, fp8_products=fp8, graphs=graphs), work, store)
            decode, prompts = found.decode, found.prefill
            rate = f"{prompts.tokens_per_second:,.0f}"
            taken = (
                f"{decode.seconds * 1e3:.2f}",
                f"{decode.share or 0:.2f}",
                f"{prompts.seconds:.3f}",
            )
            yield kind, "fp8" if fp8 else "bf16", "yes" if graphs else "no", *taken, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["products", "quality", "ring"])
    parser.add_argument("folder", type=Path, nargs="?", help="of checkpoints and stores, for ring")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rows", default="1,16,128,2048,8192")
    parser.add_argument("--model", type=Path, default=EXAMPLES / "stories-9m")
    parser.add_argument("--tokens", type=int, default=20000)
    given = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name(CUDA)}, torch {torch.__version__}")
    if given.what == "products":
        table = products([int(rows) for rows in given.rows.split(",")])
    elif given.what == "ring":
        if given.folder is None:
            parser.error("ring wants a FOLDER")
        table = Table(
            "scales of", "rows in", "graphs", "ms a pass", "share", "prompts, s", "tokens/s"
        )
        for row in ring(given.folder, given.shape, given.layers, given.batch):
            print(*row, flush=True)
            table.add_row(*row)
    else:
        table = quality(given.model, given.tokens)
    Console().print(table)


if __name__ == "__main__":
    main()
