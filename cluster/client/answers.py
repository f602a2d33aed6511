"""What a server answers, as plain values."""

from dataclasses import dataclass, field

from headrace.cluster.serving.rpc import inference_pb2 as pb

_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and those of the most likely ones as (token id, log-probability)."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` are JSON, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Piece:
    """More of sequence `index`. `finish_reason` is None until its last piece."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None
    reasoning_content: str
    tool_calls: list[ToolCall]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(slots=True)
class Output:
    """One sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason
        self.reasoning_content += piece.reasoning_content
        self.tool_calls += piece.tool_calls


@dataclass(frozen=True, slots=True)
class Answer:
    """All of the sequences, in order."""

    request_id: str
    outputs: list[Output]
    usage: Usage | None

    @property
    def text(self) -> str:
        """Of the first one."""
        return self.outputs[0].text


class Gathering:
    """An answer that comes in pieces."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.usage: Usage | None = None
        self._outputs: dict[int, Output] = {}

    def take(self, response: pb.GenerateResponse) -> Piece | None:
        """None for what is not shown."""
        if response.HasField("usage"):
            used = response.usage
            self.usage = Usage(used.prompt_tokens, used.completion_tokens, used.total_tokens)
        return _piece(response.piece) if response.HasField("piece") else None

    def add(self, piece: Piece) -> None:
        self._outputs.setdefault(piece.index, Output(piece.index)).add(piece)

    @property
    def answer(self) -> Answer:
        outputs = sorted(self._outputs.values(), key=lambda output: output.index)
        return Answer(self.request_id, outputs, self.usage)


def _piece(message: pb.Piece) -> Piece:
    return Piece(
        message.index,
        message.text,
        list(message.token_ids),
        [_logprob(each) for each in message.logprobs],
        _REASONS[message.finish_reason],
        message.reasoning_content,
        [ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls],
    )


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((each.token_id, each.logprob) for each in message.top)
    return TokenLogprob(message.token_id, message.token, message.logprob, top)


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A LoRA adapter by its name, of the model that is called `base`; `digest` is of its files."""

    name: str
    base: str
    digest: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`max_model_len` are tokens of prompt and answer together; `adapters` are those that requests may name."""

    name: str
    digest: str
    max_model_len: int
    vocabulary_size: int
    has_chat_template: bool
    adapters: tuple[AdapterInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """`max_waiting` sequences of a key may wait for a first token; a request has `max_body` bytes at most."""

    version: str
    is_ready: bool
    uptime_seconds: float
    max_waiting: int
    max_body: int


@dataclass(frozen=True, slots=True)
class PageCounts:
    """KV pages by state."""

    free: int
    used: int
    cached: int
    coming: int
    leaving: int


@dataclass(frozen=True, slots=True)
class Loads:
    """Requests that are open, sequences that run and wait, what recent passes took, and KV pages by tier."""

    open_requests: int
    running_sequences: int
    waiting_sequences: int
    pass_seconds: float
    device_pages: PageCounts
    host_pages: PageCounts
    nvme_pages: int


def model_info(message: pb.ModelInfo) -> ModelInfo:
    return ModelInfo(
        message.name,
        message.digest,
        message.max_model_len,
        message.vocabulary_size,
        message.has_chat_template,
        tuple(AdapterInfo(each.name, each.base, each.digest) for each in message.adapters),
    )


def server_info(message: pb.ServerInfo) -> ServerInfo:
    return ServerInfo(
        message.version,
        message.is_ready,
        message.uptime_seconds,
        message.max_waiting,
        message.max_body,
    )


def loads(message: pb.Loads) -> Loads:
    return Loads(
        message.open_requests,
        message.running_sequences,
        message.waiting_sequences,
        message.pass_seconds,
        _pages(message.device_pages),
        _pages(message.host_pages),
        message.nvme_pages,
    )


def _pages(message: pb.PageCounts) -> PageCounts:
    return PageCounts(message.free, message.used, message.cached, message.coming, message.leaving)
