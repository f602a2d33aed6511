"""Tokenizers are those that transformers would load, without the model's code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from headrace.cluster.tokenizer import load_tokenizer

CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None)


def change(file: Path, **values: str | None) -> None:
    read = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in read.items() if value is not None}))


@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma3_text", "deepseek_v3", "phi3"])
def test_the_class_is_the_one_that_transformers_chooses(
    stories: Path, tmp_path: Path, model: str
) -> None:
    path = tmp_path / "store"
    shutil.copytree(stories, path, ignore=shutil.ignore_patterns("*.safetensors"))
    change(path / "config.json", model_type=model)
    for name in CLASSES:
        change(path / "tokenizer_config.json", tokenizer_class=name)
        loaded, expected = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
        assert type(loaded) is type(expected)
        assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert loaded.special_tokens_map == expected.special_tokens_map
        assert loaded.chat_template == expected.chat_template


def test_no_models_code_is_imported(stories: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from headrace.cluster.tokenizer import load_tokenizer;"
        "load_tokenizer(Path(sys.argv[1])); print('transformers.modeling_utils' in sys.modules,"
        "'transformers.integrations.hub_kernels' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(stories)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("False False\n", "")
