"""A multipart form with one file, taken apart as it comes: the file's bytes are handed on, not kept."""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from headrace.cluster.serving.errors import ApiError

MAX_FIELDS = 16
MAX_VALUE = 1024
MAX_NAME = 255


@dataclass(slots=True)
class _Part:
    disposition: bytes = b""
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


class FileForm:
    """Raises ApiError for what is no such form. `take` has the bytes of the part `file` since it was last
    called; `filename` is the last part of the path that the client gave."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise ApiError(
                415, "send a form, with Content-Type: multipart/form-data and its boundary"
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._fresh = bytearray()
        self._part, self._header, self._value = _Part(), b"", b""
        self._has_ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finished,
                },
            )
        except FormParserError as error:
            raise _malformed(error) from error

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(error) from error

    def take(self) -> bytes:
        taken, self._fresh = bytes(self._fresh), bytearray()
        return taken

    def check_whole(self) -> None:
        """ApiError unless the form has ended, with a file in it."""
        if not self._has_ended:
            raise ApiError(400, "the form ends in the middle", code="invalid_form")
        if self.filename is None:
            raise ApiError(400, "the form has no file", param="file", code="missing_parameter")

    def _begin(self) -> None:
        self._part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._part.disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        part = self._part
        part.name = _text(options.get(b"name", b""))
        part.is_file = part.name == "file"
        if part.is_file:
            if self.filename is not None:
                raise ApiError(400, "send one file at a time", param="file", code="invalid_form")
            if b"filename" not in options:
                told = "file must be a file: give the part a filename"
                raise ApiError(400, told, param="file", code="invalid_form")
            self.filename = _last_part(_text(options[b"filename"]))
        elif part.name in self.fields or len(self.fields) == MAX_FIELDS:
            raise ApiError(400, "the form has too many fields", code="invalid_form")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._fresh += memoryview(data)[start:end]
            return
        if len(self._part.value) + end - start > MAX_VALUE:
            name = self._part.name[:MAX_NAME]
            raise ApiError(400, f"{name!r} is too long", param=name, code="invalid_value")
        self._part.value += memoryview(data)[start:end]

    def _end(self) -> None:
        if not self._part.is_file:
            self.fields[self._part.name] = _text(bytes(self._part.value))

    def _finished(self) -> None:
        self._has_ended = True


def _malformed(error: FormParserError) -> ApiError:
    return ApiError(400, f"the form is malformed: {str(error)[:200]}", code="invalid_form")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _last_part(name: str) -> str:
    """Names are only ever shown; but who downloads a file may use its name."""
    name = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(letter for letter in name if letter.isprintable())[:MAX_NAME]
    return "file" if shown in ("", ".", "..") else shown
