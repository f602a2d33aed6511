"""Quantized stores give the logits of transformers loading the same directory, on held-out text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from whole import WholeModel

from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.runtime.weights.view import view_weight
from headrace.scheduler.plan import Slice

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOWS, WINDOW = 4, 128
FORMATS = {
    "bf16": ("bf16", False),
    "int8": ("int8", False),
    "nf4": ("nf4", False),
    "nf4-double": ("nf4", True),
}


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Held-out stories [4, 128]."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "stories-9m")
    text = (EXAMPLES / "text" / "held_out_stories.txt").read_text()[:8000]
    ids = tokenizer(text, add_special_tokens=False).input_ids[: WINDOWS * WINDOW]
    return torch.tensor(ids).view(WINDOWS, WINDOW)


@pytest.fixture(scope="module", params=FORMATS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fmt, double_quant = FORMATS[request.param]
    path = tmp_path_factory.mktemp("stores") / request.param
    convert(EXAMPLES / "stories-9m", path, format=fmt, double_quant=double_quant)
    return path


def ours(store: Path, windows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """All windows as one micro-batch; logits [4, 128, vocabulary]."""
    model = WholeModel(store, dtype=dtype)
    slices = [
        Slice(i, 0, tuple(window.tolist()), (2 * i, 2 * i + 1), None)
        for i, window in enumerate(windows)
    ]
    return model.logits(slices).view(*windows.shape, -1)


@torch.inference_mode()
def theirs(model: PreTrainedModel, windows: Tensor) -> Tensor:
    logits: Tensor = model(windows).logits
    return logits.float()


def dequantized(store: Path) -> PreTrainedModel:
    """transformers' plain model with the values that the store's bytes stand for."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "stories-9m", dtype=torch.float32)
    values = {}
    opened = Store.open(store)
    for block in opened.blocks:
        data = torch.frombuffer(opened.read_block(block), dtype=torch.uint8)
        for name, spec in block.weights.items():
            values[name] = view_weight(spec, data).dense(torch.float32)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_logits_equal_those_of_the_dequantized_weights(store: Path, windows: Tensor) -> None:
    """In float32; from_pretrained runs a quantized checkpoint in its own type, which is bfloat16."""
    assert error(ours(store, windows), theirs(dequantized(store), windows)) < 1e-6


def test_logits_equal_those_of_transformers_on_the_same_directory(
    store: Path, windows: Tensor
) -> None:
    """The difference is transformers' rounding: it runs quantized layers in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
    assert error(ours(store, windows), theirs(model, windows)) < 1e-2


def test_bfloat16_is_as_close_as_transformers(store: Path, windows: Tensor) -> None:
    assert error(ours(store, windows, torch.bfloat16), ours(store, windows)) < 1e-2
