"""Shadows of servers in this process: their child processes, and engines whose answers can be looked at."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from commands import STORIES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.cluster.serving.shadow.child import WORKER
from headrace.runtime.conversion.convert import convert


def shadow_processes() -> list[psutil.Process]:
    """That this process started and that are alive."""
    return [one for one in psutil.Process().children(recursive=True) if _is_shadow(one)]


def _is_shadow(process: psutil.Process) -> bool:
    try:
        return WORKER in process.cmdline()
    except psutil.Error:
        return False


@dataclass
class Heard:
    """An engine, and what it answered to which prompt."""

    engine: Engine
    said: list[tuple[list[int], Completion]] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def add(self, token_ids: list[int], *arguments: Any, **more: Any) -> int:
        request_id = self.engine.add(token_ids, *arguments, **more)
        self.prompts[request_id] = token_ids
        return request_id

    def step(self) -> list[Completion]:
        completions = self.engine.step()
        self.said += [(self.prompts[each.request_id], each) for each in completions]
        return completions


def other_stories(folder: Path) -> Path:
    """A store like the bundled model's, with its tokenizer and random weights."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(STORIES))
    model.save_pretrained(folder / "checkpoint")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "random", format="bf16")
    return folder / "random"
