"""`headrace convert --calibrate`: its options, the text, and what is said of the roundings."""

from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig

from headrace.cluster.cli.calibrate_options import CalibrationOptions
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.evaluation.corpus import CHARACTERS, special_prefix, tokenizer_of
from headrace.cluster.given_files import read_text
from headrace.cluster.run_plan import resolve_device
from headrace.runtime.calibration.calibrate import Calibration
from headrace.runtime.calibration.encoding import CALIBRATED
from headrace.runtime.calibration.layer import Tally
from headrace.runtime.rope import context_limit
from headrace.runtime.sensitivity.layer import Rounding
from headrace.runtime.skeleton import parse_config
from headrace.runtime.sweep.source import CheckpointModel
from headrace.scheduler.errors import HeadraceError

CONTEXT = 2048
"""Tokens of a sequence, where the model goes as far."""

SHOWN = 3
"""Experts that are named of those that saw too few tokens."""


def chosen(
    options: CalibrationOptions, where: CorpusOptions, checkpoint: Path, formats: frozenset[str]
) -> Calibration | None:
    """None without --calibrate. Raises HeadraceError for options that do not go together, a text that cannot be
    read, or one with less than a sequence; StoreError without a tokenizer."""
    if options.calibrate is None:
        if options != CalibrationOptions():
            raise HeadraceError(
                "--method, --calibration-tokens and --calibration-context say how a text is used: give --calibrate TEXT "
                "with them"
            )
        return None
    if not formats & set(CALIBRATED):
        raise HeadraceError(
            f"--calibrate is for --format {', '.join(CALIBRATED)}; {', '.join(sorted(formats))} rounds nothing"
        )
    return text_of(options, where, checkpoint).calibration()


@dataclass(frozen=True, slots=True)
class Text:
    """`tokens` [sequences, length] int64 that a model is to read, their hash, and on which device, in how many bytes of it."""

    tokens: Tensor
    digest: str
    method: Rounding
    device: torch.device
    device_memory: int | None

    def calibration(self) -> Calibration | None:
        """None where roundings do not follow the text."""
        if self.method == "nearest":
            return None
        return Calibration(self.tokens, self.digest, self.method, self.device, self.device_memory)


def text_of(options: CalibrationOptions, where: CorpusOptions, checkpoint: Path) -> Text:
    """The text of --calibrate. Raises HeadraceError as `sequences` does."""
    assert options.calibrate is not None
    tokens = sequences(
        checkpoint, options.calibrate, options.calibration_tokens, options.calibration_context
    )
    return Text(
        tokens=tokens,
        digest=xxhash.xxh3_128_hexdigest(tokens.numpy().tobytes()),
        method=options.method.value,
        device=torch.device(resolve_device(where.device.value)),
        device_memory=where.memory_bytes,
    )


def sequences(checkpoint: Path, file: Path, tokens: int, context: int | None) -> Tensor:
    """Token ids [sequences, context] int64: whole sequences from the text's beginning, each with what
    the tokenizer puts before a text. Raises HeadraceError, and StoreError without a tokenizer."""
    model = CheckpointModel(checkpoint, self_check=None)
    longest = _longest(parse_config(model.config, str(checkpoint)))
    if context is not None and context > longest:
        raise HeadraceError(
            f"--calibration-context {context} is longer than the {longest} tokens that the model was made for"
        )
    length = min(CONTEXT, longest, tokens) if context is None else context
    tokenizer = tokenizer_of(model)
    prefix = special_prefix(tokenizer)
    step = length - len(prefix)
    wanted = tokens // length
    if step < 1 or not wanted:
        raise HeadraceError(
            f"--calibration-tokens {tokens} make no sequence of {length} tokens: give more, or a smaller "
            "--calibration-context"
        )
    text = read_text("--calibrate", file, wanted * step * CHARACTERS)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = min(len(ids) // step, wanted)
    if not count:
        raise HeadraceError(
            f"--calibrate {file} has {len(ids)} tokens, fewer than one sequence of {length}: give a longer text "
            "(some ten thousand words), or a smaller --calibration-context"
        )
    rows = torch.tensor(ids[: count * step]).view(count, step)
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(count, -1), rows), dim=1)


def _longest(config: PretrainedConfig) -> int:
    limits = (getattr(config, "max_position_embeddings", None), context_limit(config))
    return min((limit for limit in limits if limit), default=CONTEXT)


def roundings(tally: Tally) -> RenderableType:
    """How matrices were rounded in this run."""
    table = Table("matrices", "rounded")
    for how, count in sorted(tally.counts.items(), key=lambda item: -item[1]):
        table.add_row(f"{count:,}", how)
    if tally.too_few:
        few = sorted(tally.too_few.items(), key=lambda item: item[1])[:SHOWN]
        table.caption = "fewest tokens: " + ", ".join(f"{name} ({n})" for name, n in few)
    return table
