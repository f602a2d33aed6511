"""Pieces of an answer, and what a server is doing, as messages."""

from headrace.cluster.rows import Tokenizer
from headrace.cluster.serving.choices import Piece
from headrace.cluster.serving.loop import EngineState
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.scheduler.kv_stats import PageCounts
from headrace.scheduler.plan import Sample

_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}


def piece_message(
    piece: Piece, reason: str | None, tokenizer: Tokenizer, *, logprobs: bool
) -> pb.Piece:
    message = pb.Piece(
        index=piece.index,
        text=_valid(piece.said.content),
        token_ids=[sample.token for sample in piece.samples],
        finish_reason=_REASONS[reason],
        reasoning_content=_valid(piece.said.reasoning),
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments=_valid(call.arguments))
            for call in piece.said.calls
        ],
    )
    if logprobs:
        message.logprobs.extend(_logprob(sample, tokenizer) for sample in piece.samples)
    return message


def _logprob(sample: Sample, tokenizer: Tokenizer) -> pb.TokenLogprob:
    def text(token: int) -> str:
        return _valid(tokenizer.decode([token]))

    return pb.TokenLogprob(
        token_id=sample.token,
        token=text(sample.token),
        logprob=sample.logprob,
        top=[
            pb.TopLogprob(token_id=token, token=text(token), logprob=logprob)
            for token, logprob in sample.top
        ],
    )


def loads_message(state: EngineState, num_open: int) -> pb.Loads:
    return pb.Loads(
        open_requests=num_open,
        running_sequences=state.running,
        waiting_sequences=state.waiting,
        pass_seconds=state.pace.recent,
        device_pages=_pages(state.kv.device),
        host_pages=_pages(state.kv.host),
        nvme_pages=state.kv.nvme,
    )


def _pages(counts: PageCounts) -> pb.PageCounts:
    return pb.PageCounts(
        free=counts.free,
        used=counts.used,
        cached=counts.cached,
        coming=counts.coming,
        leaving=counts.leaving,
    )


def _valid(text: str) -> str:
    """A lone surrogate, which UTF-8 cannot hold, becomes its escape, as over HTTP."""
    return text.encode("utf-8", "backslashreplace").decode()
