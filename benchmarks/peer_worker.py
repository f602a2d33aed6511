"""One run of one peer, in a process that peers.py starts with the job as JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headrace.cluster.bench.driver import Driver, random_prompts, steady
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS

PAD = 3
ERROR_CHARACTERS = 400


class PassClock:
    """A stopping criterion of transformers that never stops: it notes when each token was there."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self.times: list[float] = []

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def hold_memory(job: dict[str, Any]) -> None:
    if job["device"] == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["device_memory"] / total))


def generated(job: dict[str, Any], generate: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Times of a batched `generate` of transformers, by pass."""
    cuda = job["device"] == "cuda"
    ids = torch.tensor(random_prompts(job["batch"], job["prompt"], job["vocabulary"]))
    ids = ids.cuda() if cuda else ids
    clock = PassClock(cuda)
    started = clock.now()
    out = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job["new"],
        min_new_tokens=job["new"],
        do_sample=False,
        pad_token_id=PAD,
        stopping_criteria=[clock],
    )
    total = clock.now() - started
    assert out.shape == (job["batch"], job["prompt"] + job["new"]), out.shape
    passes = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "prefill_seconds": clock.times[0] - started,
        "pass_seconds": statistics.median(passes),
        "passes": passes,
        "tokens_per_second": job["batch"] * job["new"] / total,
    }


def run_accelerate(job: dict[str, Any]) -> dict[str, Any]:
    """transformers with device_map="auto": half of the device for weights, the rest for the run."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    hold_memory(job)
    options, started = job["options"], time.perf_counter()
    room: dict[int | str, int] = {"cpu": options["host"]}
    if job["device"] == "cuda":
        room[0] = job["device_memory"] // 2
    else:
        room["cpu"] = min(options["host"], job["device_memory"] // 2)
    arguments: dict[str, Any] = {}
    if options.get("nf4"):
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        job["path"],
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory=room,
        offload_folder=job["scratch"],
        **arguments,
    ).eval()
    # Absent where everything went to one device.
    places = [str(place) for place in getattr(model, "hf_device_map", {"": "one device"}).values()]
    spread = ", ".join(f"{places.count(place)} on {place}" for place in sorted(set(places)))
    ready = time.perf_counter() - started
    times = generated(job, model.generate)
    return {**times, "start_seconds": ready, "note": f"modules: {spread}"}


def run_airllm(job: dict[str, Any]) -> dict[str, Any]:
    """AirLLM's defaults. The start includes splitting the checkpoint into layers."""
    from airllm import AutoModel  # type: ignore[import-not-found, unused-ignore]

    hold_memory(job)
    started = time.perf_counter()
    Path(job["scratch"]).mkdir()
    model = AutoModel.from_pretrained(
        job["path"],
        device="cuda:0" if job["device"] == "cuda" else "cpu",
        compression=job["options"]["compression"],
        layer_shards_saving_path=job["scratch"],
    )
    ready = time.perf_counter() - started
    times = generated(job, model.generate)
    return {**times, "start_seconds": ready, "note": "start includes the split"}


def run_headrace(job: dict[str, Any]) -> dict[str, Any]:
    from headrace.cluster.cli.plan import describe
    from headrace.cluster.engine_options import EngineOptions
    from headrace.cluster.launch import running_engine

    options = EngineOptions(
        store=Path(job["path"]),
        device=job["device"],
        device_memory=job["device_memory"] - job["context_bytes"],
        host_memory=job["options"]["host"],
        max_sequences=job["batch"],
        # A page to spare, because admission leaves some free.
        context=(pages_for(job["prompt"] + job["new"]) + 1) * PAGE_TOKENS,
    )
    started = time.perf_counter()
    with running_engine(options) as engine:
        driver = Driver(engine)
        driver.add(random_prompts(1, job["prompt"], job["vocabulary"], seed=1), 2)
        driver.run()
        driver.steps.clear()
        ready = time.perf_counter() - started
        driver.add(random_prompts(job["batch"], job["prompt"], job["vocabulary"]), job["new"])
        driver.run()
        total = sum(step.seconds for step in driver.steps)
        plan = engine.plan
    times: dict[str, Any] = {"pass_seconds": None, "prefill_seconds": None}
    note = describe(plan)
    try:
        found = steady(driver.steps, job["batch"], plan.passes_in_flight)
        times = {"pass_seconds": found.seconds, "prefill_seconds": found.prefill_seconds}
    except HeadraceError:
        note += f"; KV for {plan.prediction.sequences} sequences, so not all decode at once"
    return {
        **times,
        "passes": [step.seconds for step in driver.steps],
        "tokens_per_second": job["batch"] * job["new"] / total,
        "start_seconds": ready,
        "bound_seconds": plan.prediction.pass_seconds,
        "bound_by": plan.prediction.bound_by,
        "note": f"{note}; bound {plan.prediction.pass_seconds:.3f} s ({plan.prediction.bound_by})",
    }


RUNS = {"accelerate": run_accelerate, "airllm": run_airllm, "headrace": run_headrace}


def main() -> None:
    job = json.loads(sys.argv[1])
    try:
        result = RUNS[job["runs"]](job)
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        Path(job["result"]).write_text(json.dumps({"error": message[:ERROR_CHARACTERS]}))
        raise
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
