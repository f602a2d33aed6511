"""LoRA adapters of tiny models, made by PEFT, and what transformers says with each of them merged."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import tiny_model
from commands import STORIES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")


def save_adapter(model: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random adapter of a tiny model, with changes large enough to be heard."""
    return adapt(tiny_model(model), folder, seed, **settings)


def adapt(model: Any, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random adapter of a model."""
    torch.manual_seed(seed + 1)
    wanted = {"target_modules": [*ATTENTION], "init_lora_weights": False, **settings}
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **wanted))
    for name, matrix in made.named_parameters():
        if "lora_B" in name:
            matrix.data.mul_(12)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def many_adapters(model: str, folder: Path, count: int = 8) -> list[Path]:
    """Of different ranks, scales and modules."""
    made = []
    for i in range(count):
        settings: dict[str, Any] = {"r": 1 + i, "lora_alpha": 4 + 3 * i}
        if i % 3 == 1:
            settings["target_modules"] = [*ATTENTION, *DENSE]
        if i % 3 == 2:
            settings |= {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
            settings |= {"rank_pattern": {"layers.1.mlp.down_proj": 12}}
            settings |= {"alpha_pattern": {"q_proj": 30}}
        made.append(save_adapter(model, folder / f"adapter-{i}", seed=i, **settings))
    return made


def merged_tokens(
    model: str, adapter: Path | None, prompts: Iterable[Sequence[int]], count: int
) -> list[list[int]]:
    """What transformers continues greedily, with the adapter merged into the model."""
    reference: Any = tiny_model(model)
    if adapter is not None:
        reference = PeftModel.from_pretrained(reference, adapter).merge_and_unload()
    reference.eval()
    found = []
    for prompt in prompts:
        out = reference.generate(
            torch.tensor([list(prompt)]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def stories_adapters(folder: Path, count: int = 2) -> dict[str, Path]:
    """Of the bundled model, by name."""
    found = {}
    for i in range(count):
        model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
        found[f"adapter-{i}"] = adapt(model, folder / f"adapter-{i}", seed=i, r=4 + i)
    return found
