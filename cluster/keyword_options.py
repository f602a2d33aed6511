"""An engine's options as keywords: from Python, from YAML, and as Ray's command line splits them."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from headrace.cluster.cli.options import parsed
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.row_models import reasons
from headrace.scheduler.errors import HeadraceError


def engine_options(store: str | Path, keywords: Mapping[str, Any]) -> EngineOptions:
    """EngineOptions of a store: memory in bytes or text such as "600MB" or "10GiB", `kv_ttl` in seconds or text
    such as "12h"; numbers and switches may be texts, too.

    HeadraceError for a keyword that there is not, and for a value that means nothing.
    """
    known = {field.name for field in fields(EngineOptions)} - {"store"}
    if unknown := sorted(keywords.keys() - known):
        raise HeadraceError(f"an engine has no option {', '.join(unknown)}")
    try:
        return TypeAdapter(EngineOptions).validate_python({"store": store, **parsed({**keywords})})
    except ValidationError as error:
        raise HeadraceError(f"options of an engine: {reasons(error)}") from error
