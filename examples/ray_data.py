"""Rows of a dataset through a ring: a store made by `headrace convert`, two stages."""

import sys
from pathlib import Path

import ray

from headrace.cluster.ray_data import HeadraceProcessorConfig, build_processor

store = sys.argv[1] if len(sys.argv) > 1 else ".demo/stories-9m.nf4"
prompts = Path(__file__).parent / "prompts.jsonl"

ray.init(num_cpus=4)  # of this machine: one a stage, and others for Ray Data's own tasks
ring = {"stages": 2, "device": "cpu", "device_memory": "8MiB", "host_memory": 0, "context": 128}
processor = build_processor(
    HeadraceProcessorConfig(model_source=store, engine_kwargs=ring, batch_size=4),
    preprocess=lambda row: {"sampling_params": {"seed": 1, "max_tokens": 30}},
    postprocess=lambda row: {"id": row["id"], "text": row["generated_text"]},
)
for row in processor(ray.data.read_json(str(prompts)).limit(8)).iter_rows():
    print(f"[{row['id']}] {row['text']!r}")
