"""Models swept layer by layer, compared with transformers'."""

from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from gguf_files import write
from stored import tiny_store
from torch import Tensor
from transformers import AutoModelForCausalLM

from headrace.runtime.conversion.convert import convert
from headrace.runtime.linear import QuantLinear
from headrace.runtime.shape import model_shape
from headrace.runtime.sweep.room import sweep_bytes
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import Sweep
from headrace.scheduler.errors import DoesNotFitError, StoreError

CPU = torch.device("cpu")


def swept(path: Path, tokens: Tensor, context: int = 0, **options: int) -> Tensor:
    """Logits [sequences, length, vocabulary]."""
    model, context = open_model(path), context or tokens.shape[1]
    with (
        Sweep(model, CPU, torch.float32, context=context, **options) as sweep,
        sweep.embed(tokens) as states,
    ):
        for layer in sweep.layers():
            layer.run(states)
        rows = states.values.flatten(0, 1).split(sweep.logit_rows)
        logits = torch.cat([sweep.logits(some) for some in rows])
    return logits.unflatten(0, tokens.shape)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


# Plain, a window over sequences in parts, latents, experts, and layers of two kinds.
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3", "qwen3_moe", "gemma3_text"])
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    store = tiny_store(name, tmp_path)
    tokens = torch.randint(4, 256, (3, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
        expected = model(tokens).logits
    assert close(swept(store, tokens), expected)
    # From the checkpoint itself; in parts of sequences, which go on over keys and values.
    assert close(swept(tmp_path / "checkpoint", tokens, micro_batch_tokens=64), expected)


def test_sequences_may_be_shorter_than_the_context(tmp_path: Path) -> None:
    store, tokens = tiny_store("llama", tmp_path), torch.randint(4, 256, (14, 20))
    found = swept(store, tokens, context=128, micro_batch_tokens=256)
    assert close(found, swept(store, tokens))


def test_every_layer_is_shown_to_hooks_and_states_can_stay(tmp_path: Path) -> None:
    store = tiny_store("llama", tmp_path)
    tokens = torch.randint(4, 256, (4, 20))
    seen: dict[str, list[int]] = {}
    with (
        Sweep(open_model(store), CPU, torch.float32, context=20, micro_batch_tokens=64) as sweep,
        sweep.embed(tokens) as states,
    ):
        before = states.values.clone()
        for layer in sweep.layers():
            linears = {n: m for n, m in layer.named().items() if isinstance(m, QuantLinear)}
            handles = [
                module.register_forward_hook(
                    lambda _, inputs, __, name=f"{layer.index}.{name}": seen.setdefault(
                        name, []
                    ).append(inputs[0].shape[-2])
                )
                for name, module in linears.items()
            ]
            layer.run(states, keep=False)
            for handle in handles:
                handle.remove()
        assert torch.equal(states.values, before)
    assert len(seen) == 3 * 7 and "0.self_attn.q_proj" in seen
    assert set(map(tuple, seen.values())) == {(60, 20)}  # three sequences of 20 tokens, and one


def test_states_that_are_too_many_lie_in_a_file(tmp_path: Path) -> None:
    with States(
        (4, 8, 16), torch.bfloat16, torch.zeros(4, 8), directory=tmp_path, host_memory=0
    ) as s:
        assert s.in_file and not list(tmp_path.iterdir())
        s.values[2:].fill_(3)
        assert s.values.sum().item() == 3 * 2 * 8 * 16
    store = tiny_store("llama", tmp_path)
    tokens = torch.randint(4, 256, (3, 30))
    assert torch.equal(swept(store, tokens), swept(store, tokens, host_memory=0))


def test_memory_that_does_not_suffice_is_refused_with_what_would(tmp_path: Path) -> None:
    tokens = torch.randint(4, 256, (2, 100))
    model = open_model(tiny_store("llama", tmp_path))
    needed = sweep_bytes(model_shape(model, "float32"), 100, 64)
    assert swept(model.path, tokens, device_memory=needed).isfinite().all()
    with pytest.raises(DoesNotFitError, match=rf"\({needed} bytes\)"):
        swept(model.path, tokens, device_memory=needed - 1)


def test_a_checkpoint_is_the_store_that_it_would_be(tmp_path: Path) -> None:
    store = convert(STORIES, tmp_path / "kept", format="keep")
    model = open_model(STORIES)
    assert [block.weights for block in model.blocks] == [block.weights for block in store.blocks]
    assert all(
        model.read_block(ours) == store.read_block(theirs)
        for ours, theirs in zip(model.blocks, store.blocks, strict=True)
    )
    # A quantized checkpoint, too: bitsandbytes' own files.
    quantized = convert(STORIES, tmp_path / "nf4", format="nf4", double_quant=True)
    (tmp_path / "nf4" / "headrace.json").rename(tmp_path / "manifest")
    again = open_model(tmp_path / "nf4")
    (tmp_path / "manifest").rename(tmp_path / "nf4" / "headrace.json")
    assert again.read_block(again.layers[3]) == quantized.read_block(quantized.layers[3])
    with pytest.raises(StoreError, match="no such directory"):
        open_model(tmp_path / "nowhere")


def test_a_gguf_file_is_the_store_that_it_would_be(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, head_dim=64)
    write(model, file, "Q4_K")
    store = convert(file, tmp_path / "kept", format="keep", allow_missing_tokenizer=True)
    seen = open_model(file)
    assert seen.nbytes == store.nbytes and seen.format == store.format
    for ours, theirs in zip(seen.blocks, store.blocks, strict=True):
        assert ours.weights == theirs.weights and seen.read_block(ours) == store.read_block(theirs)
    tokens = torch.randint(4, 256, (2, 20))
    assert torch.equal(swept(file, tokens), swept(store.path, tokens))


def test_a_layer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = tiny_store("llama", tmp_path)
    model = open_model(store)
    tokens = torch.randint(4, 256, (2, 20))
    with Sweep(model, CPU, torch.float32, context=20) as sweep, sweep.embed(tokens) as states:
        model.layers[2].file.unlink()
        with pytest.raises(StoreError, match="layer-00002"):
            for layer in sweep.layers():
                layer.run(states)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_sweep_on_cuda_is_that_on_a_cpu(name: str, tmp_path: Path) -> None:
    store = tiny_store(name, tmp_path)
    tokens = torch.randint(4, 256, (3, 150))
    expected = swept(store, tokens)
    for path in (store, tmp_path / "checkpoint"):
        model = open_model(path)
        with (
            Sweep(
                model, torch.device("cuda"), torch.float32, context=150, micro_batch_tokens=64
            ) as sweep,
            sweep.embed(tokens) as states,
        ):
            for layer in sweep.layers():
                layer.run(states)
            rows = states.values.flatten(0, 1).split(sweep.logit_rows)
            found = torch.cat([sweep.logits(some).cpu() for some in rows])
        assert (found - expected.flatten(0, 1)).abs().max() < 1e-2 * expected.abs().max()
