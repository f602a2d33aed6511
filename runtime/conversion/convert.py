"""Any Hugging Face checkpoint -> a store: one block at a time, resumable, never half done.

The destination holds a journal while a conversion is under way: one line says from what and how,
then one line is added for every block file that is complete and durable. The manifest, which makes
the directory a store, is written when all blocks are, and the journal goes after it. So a conversion
killed at any instant goes on where it was, and writes the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from headrace.runtime.conversion.destination import finished_store, locked, remove_notes
from headrace.runtime.conversion.encoder import Encoder
from headrace.runtime.conversion.journal import Journal
from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.conversion.plan import Options, plan_conversion
from headrace.runtime.conversion.source import AnyCheckpoint
from headrace.runtime.conversion.writer import Progress, StoreWriter
from headrace.runtime.manifest import VERSION
from headrace.runtime.skeleton import parse_config
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError


def convert(
    source: Path | str,
    dest: Path | str,
    *,
    format: str = "nf4",
    policy: Sequence[tuple[str, str]] = (),
    double_quant: bool = False,
    group_size: int | None = None,
    requantize: bool = False,
    progress: Callable[[Progress], None] | None = None,
    self_check: Callable[[PretrainedConfig], bool] | None = None,
    allow_missing_tokenizer: bool = False,
    encoder: Encoder | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Store:
    """Converts the checkpoint in `source` into a store in `dest` and opens it.

    `format` is "keep" (bytes as they are), "bf16", "int8", "nf4", "int4" or "int3"; the last four apply to
    the matrices of linear layers and experts, with `group_size` columns a scale in int4 and int3 (64), `policy` overrides by glob: (pattern, format) pairs, of
    which the first match decides. A checkpoint that is quantized already is kept, or, with
    `requantize`, brought into another format; headrace-changes.json then says what that changed.
    `self_check` may refuse the architecture before anything is
    written, and says whether pages may keep latents. Needs memory for a few row chunks of one matrix,
    and of a quantized one that changes its layout or format all codes, whatever the model's size.

    `encoder` may decide other bytes for layers' weights, as `calibration` describes in the manifest.

    Run again with the same arguments, it resumes; on a finished store it returns at once.
    Raises StoreError or UnsupportedModelError for whatever cannot be converted, and when the disk
    is full or another conversion is writing to `dest`.
    """
    pairs = tuple((glob, fmt) for glob, fmt in policy)
    options = Options(format, pairs, double_quant, group_size, requantize)
    checkpoint = open_checkpoint(Path(source))
    refuse_missing_tokenizer(checkpoint, allow_missing_tokenizer)
    described = {"calibration": calibration} if calibration else {}
    identity = identity_of(checkpoint, options.as_json() | described)
    with locked(Path(dest)):
        return write_store(checkpoint, Path(dest), options, identity, progress, self_check, encoder)


def refuse_missing_tokenizer(checkpoint: AnyCheckpoint, allowed: bool) -> None:
    if not (checkpoint.has_tokenizer or allowed):
        raise StoreError(
            f"{checkpoint.path} has no tokenizer (tokenizer.json, tokenizer.model, ...), without which the "
            "store cannot read or write text; copy it there, or say --allow-missing-tokenizer to feed "
            "token ids"
        )


def identity_of(checkpoint: AnyCheckpoint, options: dict[str, Any]) -> dict[str, Any]:
    """What tells a store, and an unfinished one, from others in the same place."""
    return {"version": VERSION, "source": checkpoint.fingerprint(), "options": options}


def write_store(
    checkpoint: AnyCheckpoint,
    dest: Path,
    options: Options,
    identity: dict[str, Any],
    progress: Callable[[Progress], None] | None = None,
    self_check: Callable[[PretrainedConfig], bool] | None = None,
    encoder: Encoder | None = None,
) -> Store:
    """The store of this identity in `dest`, which is locked: written, finished or found finished.

    Raises what `convert` does.
    """
    finished = finished_store(dest, identity)
    if finished is not None:
        return finished
    config = parse_config(checkpoint.config, str(checkpoint.path))
    latents = self_check is None or self_check(config)
    plan = plan_conversion(checkpoint, options, expand=not latents)
    with Journal(dest, identity) as journal:
        StoreWriter(checkpoint, dest, plan, journal, progress, encoder).run(identity)
    remove_notes(dest)
    return Store.open(dest)
