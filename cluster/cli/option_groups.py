"""Options that several commands share, or that belong together, in dataclasses."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command options for the fields of those of its parameters that are dataclasses, in their place."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    shared = {name: _parameters(group) for name, group in groups.items()}
    parameters = [
        each
        for p in own
        for each in shared.get(p.name, [p.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
    ]

    def call(**given: Any) -> None:
        made = {
            name: groups[name](**{parameter.name: given.pop(parameter.name) for parameter in some})
            for name, some in shared.items()
        }
        command(**made, **given)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
