"""Files that a user names with an option, and what is wrong with them."""

from pathlib import Path
from typing import Any

import yaml

from headrace.scheduler.errors import HeadraceError


def read_text(option: str, file: Path, characters: int = -1) -> str:
    """At most so many characters of it. HeadraceError, naming option and file, when it is no text."""
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(characters)
    except OSError as error:
        raise HeadraceError(f"cannot read {option} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HeadraceError(
            f"{option} {file} is no UTF-8 text (byte {error.start}: {error.reason})"
        ) from error


def read_yaml(option: str, file: Path) -> Any:
    """What is in it. HeadraceError as for `read_text`."""
    try:
        return yaml.safe_load(read_text(option, file))
    except yaml.YAMLError as error:
        raise HeadraceError(f"{option} {file} is no YAML: {error}") from error
