"""GGUF files into stores: the logits of the values that the files hold."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import tiny_model
from gguf_files import write
from stored import stored_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole import WholeModel

from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.gguf.checkpoint import GGUFCheckpoint
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.plan import Slice

TOKENS = tuple(range(3, 40))
STORIES = Path(__file__).parents[2] / "examples" / "stories-9m"


def tiny(model_type: str, **more: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = tiny_model(model_type, **(sizes | {"head_dim": 64} | more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.3  # as wide layers have it: small errors stay small
    return model


def logits_of(path: Path) -> Tensor:
    model = WholeModel(path)
    return model.logits([Slice(0, 0, TOKENS, (0,), None)]).float()


@torch.inference_mode()
def converted(model: Any, kind: str, folder: Path, *, fuse: bool = False) -> tuple[Path, Tensor]:
    """The store made of a GGUF file, and what the plain model with the file's values computes."""
    file = folder / "model.gguf"
    write(model, file, kind, fuse=fuse)
    convert(file, folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store", model(torch.tensor([TOKENS])).logits[0].float()


def assert_near(found: Tensor, want: Tensor, bound: float = 1e-3) -> None:
    error = float((found - want).abs().max() / want.abs().max())
    assert error < bound


@pytest.mark.parametrize(
    "kind",
    [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "Q2_K",
        "Q3_K",
        "IQ4_XS",
        "IQ4_NL",
        "MXFP4",
        "F16",
        "BF16",
        "F32",
    ],
)
def test_logits_are_those_of_the_files_values(kind: str, tmp_path: Path) -> None:
    store, want = converted(tiny("llama", tie_word_embeddings=False), kind, tmp_path)
    assert_near(logits_of(store), want)
    formats = {"F1": "raw", "BF": "raw", "F3": "raw", "MX": "mxfp4"}
    formats |= dict.fromkeys(("Q2", "Q3", "Q4"), "int4")
    weights = Store.open(store).layers[0].weights
    assert weights["model.layers.0.mlp.up_proj.weight"].format == formats.get(kind[:2], "int8g")


LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 64 for i in range(32)],
    "long_factor": [1 + i / 4 for i in range(32)],
    "original_max_position_embeddings": 256,
}
GEMMA3 = {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen2_moe", {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}),
        ("qwen3", {}),
        ("qwen3_moe", {"moe_intermediate_size": 256, "norm_topk_prob": True}),
        ("gemma2", {"query_pre_attn_scalar": 64}),
        ("gemma3_text", {"query_pre_attn_scalar": 64, "num_hidden_layers": 7}),
        ("gemma3_text", {"query_pre_attn_scalar": 64, "num_hidden_layers": 7} | GEMMA3),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": LINEAR}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {}),
        ("phi3", {"sliding_window": 8}),
        ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.75}),
        ("phi3", {"rope_parameters": LONG}),
        ("starcoder2", {"sliding_window": None, "rope_parameters": LOCAL | {"rope_theta": 1e6}}),
    ],
)
def test_architectures(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(model_type, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim == 1:
                parameter.normal_(0, 0.1)
    store, want = converted(model, "Q4_K", tmp_path)
    assert_near(logits_of(store), want, 2e-3)


def test_experts_of_mxfp4(tmp_path: Path) -> None:
    """What llama-quantize's MXFP4_MOE is for."""
    model = tiny("qwen3_moe", moe_intermediate_size=256, norm_topk_prob=True)
    store, want = converted(model, "MXFP4", tmp_path)
    assert_near(logits_of(store), want)


@pytest.mark.parametrize(
    ("model_type", "more"), [("llama", {"attention_bias": True}), ("qwen3", {})]
)
def test_queries_keys_and_values_that_are_joined(
    model_type: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """As convert_hf_to_gguf.py's --fuse-qkv has it."""
    store, want = converted(tiny(model_type, **more), "Q8_0", tmp_path, fuse=True)
    assert_near(logits_of(store), want)


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"token_embd\.weight of .* is TQ2_0, .* there are F32"):
        converted(tiny("llama"), "TQ2_0", tmp_path)


@pytest.mark.parametrize(("model_type", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_attention_of_gemmas_of_27b_is_scaled_as_files_do_not_say(
    model_type: str, layers: int, tmp_path: Path
) -> None:
    more = {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    write(tiny(model_type, **more), tmp_path / "model.gguf", "F16")
    config = GGUFCheckpoint(tmp_path / "model.gguf").config
    assert config["query_pre_attn_scalar"] == 32 // 4


@pytest.mark.parametrize("model_type", ["mistral", "mixtral"])
def test_a_models_name_changes_nothing(model_type: str, tmp_path: Path) -> None:
    """transformers takes those that are called mistral for Mistral, whose window files do not have."""
    write(tiny(model_type), tmp_path / "model.gguf", "F16", name="mistral")
    config = GGUFCheckpoint(tmp_path / "model.gguf").config
    assert config["model_type"] == {"mistral": "llama"}.get(model_type, model_type)
    assert config.get("sliding_window") is None


def test_what_is_no_language_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StoreError, match=r"has no token_embd\.weight: it is no language model"):
        convert(tmp_path / "mmproj.gguf", tmp_path / "store", format="keep")


def test_configurations_read_as_the_original(tmp_path: Path) -> None:
    """Although files hold float32 numbers: 1e-6 does not become 9.999999974752427e-07."""
    model = tiny("phi3", rope_parameters=LONG, rms_norm_eps=1e-6, sliding_window=100)
    write(model, tmp_path / "model.gguf", "F16")
    config, want = GGUFCheckpoint(tmp_path / "model.gguf").config, model.config.to_dict()
    for name in ("rms_norm_eps", "rope_parameters", "sliding_window", "vocab_size", "hidden_size"):
        assert config[name] == want[name], name


def test_a_tokenizer_and_the_model_from_one_file(tmp_path: Path) -> None:
    """The bundled model's tokens and text from a file of its own."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    file = tmp_path / "stories.Q8_0.gguf"
    write(model, file, "Q8_0", tokenizer, pre="smollm")
    store = convert(tmp_path, tmp_path / "store", format="keep").path
    again = AutoTokenizer.from_pretrained(store)
    for text in (
        "Once upon a time there was a little girl named Lily.",
        "  In 1984 she had 12\u00bd apples\n\n and\t3 pears!  ",
        "<|im_start|>user\nTell me<|im_end|>",
    ):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    chat = [{"role": "user", "content": "Tell me"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )
    with torch.inference_mode():
        want = model(torch.tensor([TOKENS])).logits[0]
    assert_near(logits_of(store), want)


def test_formats_and_requantizing(tmp_path: Path) -> None:
    """What is plain becomes nf4 as it would from a checkpoint; what is quantized only when asked."""
    model = tiny("llama")
    write(model, tmp_path / "plain.gguf", "F16")
    model.half().save_pretrained(tmp_path / "checkpoint")
    for name in ("plain.gguf", "checkpoint"):
        convert(
            tmp_path / name, tmp_path / f"{name}.nf4", format="nf4", allow_missing_tokenizer=True
        )
    assert_near(
        logits_of(tmp_path / "plain.gguf.nf4"), logits_of(tmp_path / "checkpoint.nf4"), 1e-6
    )
    write(model.float(), tmp_path / "four.gguf", "Q4_K")
    options: dict[str, Any] = {"format": "nf4", "allow_missing_tokenizer": True}
    with pytest.raises(StoreError, match="requantize"):
        convert(tmp_path / "four.gguf", tmp_path / "four", **options)
    convert(tmp_path / "four.gguf", tmp_path / "four", **options, requantize=True)
    with torch.inference_mode():
        want = model.float()(torch.tensor([TOKENS])).logits[0]
    assert_near(logits_of(tmp_path / "four"), want, bound=0.3)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "MXFP4"])
def test_every_value_is_the_files(kind: str, tmp_path: Path) -> None:
    """Of embeddings, too, which are tied to the head here."""
    model = tiny("llama", tie_word_embeddings=True)
    path, _ = converted(model, kind, tmp_path)
    store = Store.open(path)
    stored = {n: w for block in store.blocks for n, w in stored_weights(store, block).items()}
    assert len(stored) == len(dict(model.named_parameters()))
    for name, values in stored.items():
        assert torch.equal(values.float(), model.get_parameter(name)), name
    assert not (path / "headrace-changes.json").exists()


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write(tiny("llama"), file, "Q4_0")
    data = file.read_bytes()
    (tmp_path / "other.gguf").write_bytes(data)
    with pytest.raises(StoreError, match="has 2 models in GGUF files: name one"):
        convert(tmp_path, tmp_path / "store", format="keep")
    for size in (3, 1000, len(data) - 100):
        file.write_bytes(data[:size])
        with pytest.raises(StoreError, match="no whole GGUF file"):
            convert(file, tmp_path / "store", format="keep")


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_in_parts(tied: bool, tmp_path: Path) -> None:
    """Any of them names the model, and so does their directory; transformers looks at the first alone."""
    model = tiny("llama", tie_word_embeddings=tied)
    write(model, tmp_path / "model.gguf", "Q8_0", split=7)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    with torch.inference_mode():
        want = model(torch.tensor([TOKENS])).logits[0].float()
    digests = set()
    for i, given in enumerate((parts[1], tmp_path)):
        dest = tmp_path / f"store-{i}"
        digests.add(convert(given, dest, format="keep", allow_missing_tokenizer=True).digest)
        assert_near(logits_of(dest), want)
    assert len(digests) == 1
    data = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(StoreError, match="model-00003-of-00003\\.gguf of them is not"):
        convert(parts[0], tmp_path / "other", format="keep")
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(StoreError, match="not parts of one file"):
        convert(parts[0], tmp_path / "other", format="keep")
    parts[2].write_bytes(data[:300])
    with pytest.raises(StoreError, match="no whole GGUF file"):
        convert(parts[0], tmp_path / "other", format="keep")
