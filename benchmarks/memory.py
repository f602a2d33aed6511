"""What converting and running really take in memory, against what the plan says.

    python benchmarks/memory.py [--layers 27] [--format nf4] [--format keep] [--device-memory 600MB]

Writes a random bf16 Llama checkpoint (hidden 2048, 4 GB by default) under --directory, converts it
in a process of its own, runs a few rows on CPU stages and deletes everything. Sampled every 20 ms:
the resident memory of the converting process and of each stage; the plan's share is what it counts
as device, host layers, embedding and process.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from headrace.cluster.llm import LLM
from headrace.runtime.convert import convert
from headrace.scheduler.request import SamplingParams

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 32000
HEADS, KV_HEADS = 32, 8
MB = 1e6
TOKENIZER = Path(__file__).parents[1] / "examples" / "stories-9m"


class Peaks:
    """The highest resident memory of each process that looks like `title`, below `root`."""

    def __init__(self, root: psutil.Process, title: str) -> None:
        self._root, self._title = root, title
        self._highest: dict[int, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stopping.wait(0.02):
            for process in [self._root, *self._root.children(recursive=True)]:
                try:
                    if self._title in " ".join(process.cmdline()):
                        now = process.memory_info().rss
                        self._highest[process.pid] = max(now, self._highest.get(process.pid, 0))
                except psutil.Error:
                    continue

    def __enter__(self) -> "Peaks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def bytes(self) -> list[int]:
        """In the order in which the processes were first seen."""
        return list(self._highest.values())


def write_checkpoint(path: Path, layers: int) -> int:
    """A random model, a file a layer; its bytes."""
    path.mkdir(parents=True)
    head_dim = HIDDEN // HEADS
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, path / name)
    key_rows = KV_HEADS * head_dim
    matrices = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_rows, HIDDEN),
        "self_attn.v_proj": (key_rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    places: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(1.0 if len(shape) == 1 else 0.0, 0.02)
            for name, shape in shapes.items()
        }
        save_file(tensors, path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shapes, file))

    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}{name}.weight": shape for name, shape in matrices.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (HIDDEN,)
        save(f"model-{i:05}.safetensors", shapes)
    save(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
            "lm_head.weight": (VOCABULARY, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        },
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def converting(source: Path, dest: Path, fmt: str) -> tuple[int, int, float]:
    """Resident bytes of the process before and at most while it converts, and seconds."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_convert, args=(source, dest, fmt, child))
    process.start()
    before, peak, seconds = parent.recv()
    process.join()
    return before, peak, seconds


def _convert(source: Path, dest: Path, fmt: str, answer: "multiprocessing.connection.Connection") -> None:
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    with Peaks(psutil.Process(), "") as peaks:
        convert(source, dest, format=fmt)
    answer.send((before, max(peaks.bytes), time.perf_counter() - start))


def running(store: Path, arguments: argparse.Namespace, table: Table) -> None:
    """A few rows on all stages; one line a stage."""
    with (
        Peaks(psutil.Process(), "ray::") as peaks,
        LLM(
            store,
            stages=arguments.stages,
            device="cpu",
            device_memory=arguments.device_memory,
            host_memory="0",
            context=512,
        ) as llm,
    ):
        workers = _stage_pids(arguments.stages)
        prompts = [[5 + i] * 40 for i in range(arguments.rows)]
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True))
        seconds = time.perf_counter() - start
        memory, pages = llm.plan.memory, llm.plan.num_pages
    peaks_of = [peaks.of(pid) for pid in workers]
    for stage, (plan, real) in enumerate(zip(memory, peaks_of, strict=True)):
        said = plan.device + plan.host_layers + plan.embed + plan.process
        table.add_row(
            store.name,
            str(stage),
            *(f"{n / MB:.0f}" for n in (plan.device, plan.host_layers, plan.embed, plan.process)),
            f"{said / MB:.0f}",
            f"{real / MB:.0f}",
            f"{real / said - 1:+.1%}",
            f"{seconds:.0f} s, {pages} pages",
        )
