"""The checkpoint at a path, whatever it is."""

from pathlib import Path

from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.gguf.files import first_parts
from headrace.runtime.conversion.source import AnyCheckpoint
from headrace.scheduler.errors import StoreError


def open_checkpoint(path: Path) -> AnyCheckpoint:
    """A GGUF file or a part of one, or a directory with one or with safetensors. StoreError, saying what is wrong, for what is
    neither."""
    files = [path] if path.is_file() else first_parts(path.glob("*.gguf"))
    if (path / "config.json").exists() or not files:
        return Checkpoint(path)
    if len(files) > 1:
        raise StoreError(
            f"{path} has {len(files)} models in GGUF files: name one, as in {files[0]}"
        )
    if files[0].suffix != ".gguf":
        raise StoreError(f"{path} is no checkpoint: give a directory, or a .gguf file")
    # Imported late: only here is the package needed.
    from headrace.runtime.conversion.gguf.checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(files[0])
