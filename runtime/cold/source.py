"""Which model of which cold tier: URL#NAME, as users write it and as a pulled store remembers it.

Light to import: every store is looked at for where it came from.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from headrace.scheduler.errors import ColdTierError, StoreError

ORIGIN = "headrace-origin.json"
"""In a store's directory: where its blocks come from. With it, a store may lack some of them."""

PEERS = "peers:"
"""In place of a URL where blocks come from the cluster's other nodes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ColdModel:
    """The model `name` at `url`, which names a filesystem ("s3://bucket/models")."""

    url: str
    name: str

    def __str__(self) -> str:
        return f"{self.url}#{self.name}"


@dataclass(frozen=True, slots=True)
class Hydration:
    """What a stage needs in the directory `store` of its node: some layers, the `first` or `last` one's
    ends with them, and what every node needs; from other nodes where `cold` is None."""

    store: str
    cold: ColdModel | None
    layers: tuple[int, ...] = ()
    first: bool = False
    last: bool = False


def parse_cold(text: str, store: Path) -> ColdModel:
    """ "URL#NAME" or "URL", where the name is that of the directory `store`.

    A path without "://" is made absolute: stages have other working directories. ColdTierError for what
    is no name, and for secrets in a URL.
    """
    url, _, name = text.partition("#")
    name = name or store.resolve().name
    check_name(name)
    if "://" not in url:
        url = Path(url).absolute().as_uri()
    if "@" in urlsplit(url.rpartition("::")[2]).netloc:
        raise ColdTierError(
            "the URL of a cold tier has a user or a password in it, which process lists and logs would"
            " show: leave it out, and give credentials as the filesystem's own library takes them"
            " (environment variables, or ~/.config/fsspec/conf.json)"
        )
    return ColdModel(url.rstrip("/"), name)


def check_name(name: str) -> None:
    """ColdTierError unless it can be a file's name anywhere."""
    if not _NAME.fullmatch(name):
        raise ColdTierError(
            f"{name!r} cannot name a model in a cold tier: use letters, digits, '.', '_' and '-', and"
            " write URL#NAME"
        )


def read_origin(store: Path) -> ColdModel | None:
    """Where the blocks of `store` come from, maybe PEERS; None for a store that was made here."""
    file = store / ORIGIN
    try:
        origin = json.loads(file.read_bytes())
        return ColdModel(str(origin["url"]), str(origin["name"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file} is damaged ({error!r}): pull the store again, which writes it anew"
        ) from error
