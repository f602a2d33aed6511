"""What clients may ask of files and batches."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.cluster.serving.batches.catalog import Query

HOUR, MONTH = 3600, 30 * 86400

_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
_Id = Annotated[str, Field(max_length=128)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExpiresAfter(_Strict):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=HOUR, le=MONTH)]


class FileFields(_Strict):
    """The fields of an upload, as a form names them."""

    purpose: Literal["batch"]
    anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=HOUR, le=MONTH)] = None


class BatchOptions(_Strict):
    """What is said of a batch besides its input."""

    endpoint: Literal["/v1/completions", "/v1/chat/completions"]
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchRequest(BatchOptions):
    input_file_id: _Id
    completion_window: Literal["24h"]


class FilePage(_Strict):
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    after: _Id | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, Field(max_length=64)] | None = None

    @property
    def query(self) -> Query:
        return Query(self.limit, self.after, self.order == "asc", self.purpose)


class BatchPage(_Strict):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: _Id | None = None

    @property
    def query(self) -> Query:
        return Query(self.limit, self.after)
