"""What may be said of an answer's form: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.scheduler.errors import RequestError
from headrace.scheduler.structured import StructuredOutputsParams

Schema = dict[str, Any] | bool
"""A JSON schema."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    """An answer follows the schema whether or not it is `strict`."""

    name: str
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(_Strict):
    json_: Annotated[str | Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def wanted_form(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> StructuredOutputsParams | None:
    """What an answer is bound to, of the two ways to say it. RequestError when both do, or wrongly."""
    if response_format is None or isinstance(response_format, TextFormat):
        given = structured.model_dump(by_alias=True) if structured else None
        return StructuredOutputsParams(**given) if given else None
    param = "response_format"
    schema = None
    if isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
    if structured is not None:
        raise RequestError("give either response_format or structured_outputs", param)
    if schema is None:
        return StructuredOutputsParams(json_object=True, param=param)
    return StructuredOutputsParams(json=schema, param=param)
