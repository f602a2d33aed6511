"""What an answer must look like, as a user says it. Only data: who knows grammars makes masks of it."""

import json as _json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.scheduler.errors import RequestError

MAX_GRAMMAR = 64 << 10
"""Characters of a schema or grammar. What some cost grows with the square of their length."""

MAX_REGEX = 8 << 10

MAX_CHOICES = 4096


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """One of these, by the names that vLLM's users know.

    `json` is a JSON schema (text, or what it parses to), `json_object` any JSON object, `regex` a
    regular expression for the whole answer, `choice` the answers to choose from, `grammar` a
    context-free grammar in Lark's or GBNF's notation. `param` is what the user called it, for errors.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    param: str = field(default="structured_outputs", compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.json is not None and not isinstance(self.json, str):
            object.__setattr__(self, "json", self._text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [kind for kind in ("json", "regex", "choice", "grammar") if self._has(kind)]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            found = ", ".join(given) or "none"
            self._refuse(f"takes one of json, regex, choice, grammar and json_object, not {found}")
        if self.choice is not None and not (self.choice and all(self.choice)):
            self._refuse("choice must be a list of non-empty strings")
        if len(self.choice or ()) > MAX_CHOICES:
            self._refuse(f"choice may have {MAX_CHOICES} strings at most")
        most = MAX_GRAMMAR if self.regex is None else MAX_REGEX
        if self.num_characters > most:
            self._refuse(f"has {self.num_characters} characters, {most} at most are read")

    @property
    def num_characters(self) -> int:
        texts = (self.json, self.regex, self.grammar, *(self.choice or ()))
        return sum(len(text) for text in texts if isinstance(text, str))

    def _has(self, kind: str) -> bool:
        return getattr(self, kind) is not None

    def _text(self, schema: Any) -> str:
        try:
            return _json.dumps(schema, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            self._refuse(f"json is no JSON schema: {error}")
            raise

    def _refuse(self, reason: str) -> None:
        raise RequestError(f"{self.param}: {reason}", self.param)
