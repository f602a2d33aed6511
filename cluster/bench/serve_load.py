"""Streamed completions for a server, at times that do not depend on its answers."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from headrace.scheduler.errors import HeadraceError

_SAMPLE = "One day a little girl went to the park with her dog and saw a big red ball in a tree."
_GIVE_UP = 600.0
"""Seconds after which a request counts as failed."""

_PAUSE = 0.1
"""Seconds after which somebody who is told nothing of when to come back does."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for: `rate` requests a second at random times, each of any of the `keys` (0: always
    `concurrency` under way, as many of each key), of `prompt` tokens and `output` more.

    Those due in the first `warmup` seconds are not counted; `duration` seconds are. What is due while
    `concurrency` requests are under way waits, and its times go on.
    """

    rate: float
    duration: float = 60.0
    warmup: float = 5.0
    concurrency: int = 256
    prompt: int = 64
    output: int = 64
    keys: tuple[str, ...] = ("",)
    priority: str | None = None
    max_ttft_ms: int | None = None
    deadline_ms: int | None = None
    seed: int = 0

    @property
    def end(self) -> float:
        return self.warmup + self.duration


@dataclass(slots=True)
class Sent:
    """A request and its answer; times in seconds since the load began. `reason` is why it failed: an
    error's code, else its status, else what went wrong with the connection."""

    key: int
    due: float
    began: float = 0.0
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    ended: float = 0.0
    status: int = 0
    reason: str | None = None
    retry_after: float = 0.0

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.pieces[0] - self.due

    @property
    def whole(self) -> float:
        return self.ended - self.due

    def is_good(self, load: Load) -> bool:
        """Whether all of it came in time."""
        if self.reason is not None or not self.pieces:
            return False
        first, whole = load.max_ttft_ms, load.deadline_ms
        in_time = first is None or self.first * 1e3 <= first
        return in_time and (whole is None or self.whole * 1e3 <= whole)


class Client:
    """One server's model. Prompts are random orders of the tokens of a short text."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, tokens: list[int]):
        self._session, self._url, self._model, self._tokens = session, url, model, tokens

    async def send(self, load: Load, sent: Sent, number: int, started: float) -> None:
        """Fills `sent`; raises nothing that a server can cause."""
        draw = random.Random(f"{load.seed} {number}")
        body = {
            "model": self._model,
            "prompt": draw.choices(self._tokens, k=load.prompt),
            "max_tokens": load.output,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "priority": load.priority,
            "max_ttft_ms": load.max_ttft_ms,
            "deadline_ms": load.deadline_ms,
        }
        given = {name: value for name, value in body.items() if value is not None}
        url, headers = f"{self._url}/v1/completions", _bearer(load.keys[sent.key])
        sent.began = time.monotonic() - started
        try:
            async with self._session.post(url, json=given, headers=headers) as answer:
                sent.status = answer.status
                if answer.status != 200:
                    sent.retry_after = float(answer.headers.get("Retry-After", 0))
                    sent.reason = _reason(await answer.read()) or str(answer.status)
                else:
                    await _follow(answer.content, sent, started)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            sent.reason = type(error).__name__
        sent.ended = time.monotonic() - started


@asynccontextmanager
async def connected(url: str, key: str) -> AsyncIterator[tuple[Client, int]]:
    """A client, and the longest sequence in tokens. HeadraceError when there is no such server, or it does
    not take the key."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_GIVE_UP)
    url = url.rstrip("/").removesuffix("/v1")
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        try:
            [model] = (await _ask(session, "GET", f"{url}/v1/models", key))["data"]
            text = await _ask(session, "POST", f"{url}/tokenize", key, {"prompt": _SAMPLE})
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
            told = str(error) or type(error).__name__
            raise HeadraceError(f"no server of ours answers at {url}: {told}") from error
        yield Client(session, url, model["id"], text["tokens"]), int(text["max_model_len"])


async def run_load(client: Client, load: Load) -> list[Sent]:
    """All requests that were due, when the last has been answered."""
    everything: list[Sent] = []
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        if load.rate:
            await _arrive(client, load, everything, started, group)
        else:
            for place in range(load.concurrency):
                group.create_task(_stay(client, load, everything, started, place))
    return everything


async def _arrive(
    client: Client, load: Load, everything: list[Sent], started: float, group: asyncio.TaskGroup
) -> None:
    """Requests at their times, each of any key."""
    free, keys = asyncio.Semaphore(load.concurrency), random.Random(load.seed)
    for number, due in enumerate(arrivals(load)):
        wait = due - (time.monotonic() - started)
        if wait > 0:
            await asyncio.sleep(wait)
        await free.acquire()
        if time.monotonic() - started > load.end:
            return
        sent = Sent(keys.randrange(len(load.keys)), due)
        everything.append(sent)
        task = group.create_task(client.send(load, sent, number, started))
        task.add_done_callback(lambda _: free.release())


async def _stay(
    client: Client, load: Load, everything: list[Sent], started: float, place: int
) -> None:
    """One request after the other, of one key. Who is turned away comes back when told to."""
    number = place
    while (now := time.monotonic() - started) < load.end:
        sent = Sent(place % len(load.keys), now)
        everything.append(sent)
        await client.send(load, sent, number, started)
        number += load.concurrency
        if sent.reason is not None:
            left = load.end - (time.monotonic() - started)
            await asyncio.sleep(max(0.0, min(max(sent.retry_after, _PAUSE), left)))


def arrivals(load: Load) -> Iterator[float]:
    """When requests are due: a Poisson process."""
    draw, at = random.Random(load.seed), 0.0
    while at < load.end:
        yield at
        at += draw.expovariate(load.rate)


async def _follow(stream: aiohttp.StreamReader, sent: Sent, started: float) -> None:
    """Note when pieces of a stream come. Only the last ones are looked into: a load is many tokens."""
    last = b""
    async for line in stream:
        if not line.startswith(b"data: {"):
            continue
        last = line
        if b'"choices":[]' not in line and b'"error":' not in line:
            sent.pieces.append(time.monotonic() - started)
    told = json.loads(last.removeprefix(b"data: ") or b"{}")
    if "error" in told:
        sent.reason = told["error"]["code"] or "error"
    elif "usage" not in told:
        sent.reason = "cut off"
    else:
        sent.tokens = told["usage"]["completion_tokens"]


async def _ask(
    session: aiohttp.ClientSession, method: str, url: str, key: str, body: Any = None
) -> Any:
    async with session.request(method, url, json=body, headers=_bearer(key)) as answer:
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {(await answer.text())[:200]}")
        return await answer.json()


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _reason(raw: bytes) -> str | None:
    try:
        return str(json.loads(raw)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None
