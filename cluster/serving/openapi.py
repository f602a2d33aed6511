"""What clients' tools are told of the routes (OpenAPI 3.1), from the models that read what comes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from headrace import __version__
from headrace.cluster.serving.errors import ErrorAnswer

PATH = "/openapi.json"

Method = Literal["GET", "POST", "DELETE"]

_REFERENCE = "#/components/schemas/{model}"

_JSON = "application/json"
_FORM = "multipart/form-data"

READS = (400, 408, 413, 415)
"""What may be wrong with a body."""

WORKS = (404, 500, 503, 504)
"""What may become of work for the model."""

_ANY = (401, 403, 429)


@dataclass(frozen=True, slots=True)
class Route:
    """What is answered by whom, and what is said `about` it; nothing of one without. A body is a `form` with
    a file, or JSON."""

    method: Method
    path: str
    endpoint: Callable[..., Any]
    about: str = ""
    body: type[BaseModel] | None = None
    form: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    kinds: tuple[str, ...] = (_JSON,)
    errors: tuple[int, ...] = ()
    needs_key: bool = True

    @property
    def models(self) -> Iterator[type[BaseModel]]:
        yield from (each for each in (self.body, self.form, self.query) if each is not None)


def describe(routes: Iterable[Route], *, with_keys: bool) -> dict[str, Any]:
    told = [route for route in routes if route.about]
    models = {model for route in told for model in route.models}
    mode: JsonSchemaMode = "validation"
    inputs = sorted(((model, mode) for model in models), key=lambda each: each[0].__name__)
    _, found = models_json_schema([*inputs, (ErrorAnswer, mode)], ref_template=_REFERENCE)
    schemas = found["$defs"]
    paths: dict[str, Any] = {}
    for route in told:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas, with_keys)
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "headrace serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def _operation(route: Route, schemas: dict[str, Any], with_keys: bool) -> dict[str, Any]:
    common = _ANY if route.needs_key else (403,)
    answers = {
        "200": {"description": "OK", "content": {kind: _answer(kind) for kind in route.kinds}}
    }
    for status in sorted({*route.errors, *common} - ({401} if not with_keys else set())):
        phrase = HTTPStatus(status).phrase
        answers[str(status)] = {"description": phrase, "content": {_JSON: _schema(ErrorAnswer)}}
    told: dict[str, Any] = {"summary": route.about, "responses": answers}
    if parameters := [*_in_path(route.path), *_in_query(route.query, schemas)]:
        told["parameters"] = parameters
    if route.body is not None:
        told["requestBody"] = {"required": True, "content": {_JSON: _schema(route.body)}}
    elif route.form is not None:
        fields = schemas[route.form.__name__]
        form = {
            **fields,
            "properties": {"file": {"type": "string", "format": "binary"}, **fields["properties"]},
            "required": ["file", *fields["required"]],
        }
        told["requestBody"] = {"required": True, "content": {_FORM: {"schema": form}}}
    if with_keys and route.needs_key:
        told["security"] = [{"key": []}]
    return told


def _answer(kind: str) -> dict[str, Any]:
    return {"schema": {"type": "object"} if kind == _JSON else {"type": "string"}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}


def _in_path(path: str) -> Iterator[dict[str, Any]]:
    for part in path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}").removesuffix(":path")
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(model: type[BaseModel] | None, schemas: dict[str, Any]) -> Sequence[dict[str, Any]]:
    if model is None:
        return []
    properties = schemas[model.__name__]["properties"]
    return [{"name": name, "in": "query", "schema": each} for name, each in properties.items()]
