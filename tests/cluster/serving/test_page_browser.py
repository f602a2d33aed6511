"""The page as a person uses it, in Chromium."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Tab, tab
from commands import wait_for
from local_engines import engine_of
from served import MODEL, Served, serving, stories_engine

from headrace.cluster.serving.keys import add_key
from headrace.scheduler.placement import Tier

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

READY = "!document.querySelector('#send').disabled"
IDLE = "document.querySelector('#stop').disabled"
ANSWER = "article:last-child .content"


def browse(folder: Path, url: str, visit: Callable[[Tab], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with tab(folder) as made:
            await made.goto(url)
            await visit(made)
            strange = [each for each in made.complaints if '"source": "network"' not in each]
            assert not strange
            assert all(asked.startswith(f"{url}/") for asked in made.requests), made.requests

    asyncio.run(run())


async def send(page: Tab, text: str) -> None:
    await page.click("#draft")
    await page.type(text)
    await page.press("Enter", 13, "\r")


def used_pages(served: Served) -> float:
    return served.metric('headrace_kv_pages{tier="device",state="used"}')


def test_one_answer(stories: Path, tmp_path: Path) -> None:
    with stories_engine(stories) as engine, serving(engine) as served:

        async def visit(page: Tab) -> None:
            await page.wait(READY)
            await page.click("#max_tokens")
            await page.type("5")
            await send(page, "Once upon a time")
            await page.wait("document.querySelectorAll('article').length === 2")
            await page.wait(IDLE)
            assert await page.text(ANSWER)
            assert "5 tokens · " in await page.text("article:last-child .times")

        browse(tmp_path, served.url, visit)


@pytest.mark.slow
def test_a_chat_and_the_ring(stories: Path, tmp_path: Path) -> None:
    ring = {"stages": 2, "cyclic": True, "num_pages": 16, "tier": [Tier.NVME, Tier.DEVICE] * 6}
    with engine_of(stories, ring) as engine, serving(engine) as served:

        async def visit(page: Tab) -> None:
            await page.wait(READY)
            assert MODEL in await page.text("#model")
            await page.wait("document.querySelectorAll('#stages li').length === 2")
            assert await page.get("document.querySelectorAll('.layers .nvme').length") == 6
            assert "no pass yet" in await page.text("#ring-state")
            await page.click("#temperature")
            await page.type("0")

            await send(page, "Once upon a time <b id='bold'>")
            await page.wait(f"document.querySelector({ANSWER!r})?.textContent.length > 20")
            await page.wait("document.querySelector('#ring-state').textContent === 'running'")
            await page.wait("parseFloat(document.querySelector('#rate').textContent) > 0")
            await page.click("#stop")
            await page.wait(IDLE)
            assert "stopped" in await page.text("article .times")
            assert await page.get("document.querySelector('#bold')") is None
            wait_for(lambda: used_pages(served) == 0, 5.0, lambda: "pages are held")
            so_far = await page.text(ANSWER)
            grown = "document.querySelector('.stage .computing').style.flexGrow"
            await page.wait(f"parseFloat({grown}) > 0")
            assert "computing" in await page.get(
                "document.querySelector('.stage .bar').getAttribute('aria-label')"
            )

            await page.click("#max_tokens")
            await page.type("5")
            await send(page, "What then?")
            await page.wait("document.querySelectorAll('article').length === 4")
            await page.wait(IDLE)
            times = await page.text("article:last-child .times")
            assert "5 tokens · " in times
            assert "tokens/s" in times
            assert "first token after" in times
            command = await page.text("#command")
            sent = json.loads(command.partition("-d '")[2].replace("'\\''", "'")[:-1])
            said = [each["content"] for each in sent["messages"]]
            assert said[0] == "Once upon a time <b id='bold'>"
            assert said[1].strip() == so_far
            assert (sent["temperature"], sent["max_tokens"]) == (0, 5)

        browse(tmp_path, served.url, visit)


@pytest.mark.slow
def test_keys_and_errors(stories: Path, tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys", "ann", None)
    with stories_engine(stories) as engine, serving(engine, api_keys=tmp_path / "keys") as served:

        async def visit(page: Tab) -> None:
            await page.wait("document.activeElement.id === 'key'")
            assert await page.text("#model") == ""
            for key in ("hr-wrong", secret):
                await page.click("#key")
                await page.type(key)
                await page.press("Enter", 13, "\r")
                if key != secret:
                    await page.wait("document.querySelector('#key-error').textContent !== ''")
                    assert "is not known here" in await page.text("#key-error")
            await page.wait(READY)
            await page.wait("document.activeElement.id === 'draft'")
            kept = "[JSON.stringify(sessionStorage), localStorage.length, document.cookie]"
            session, *elsewhere = await page.get(kept)
            assert secret in session
            assert elsewhere == [0, ""]
            assert secret not in await page.text("#command")
            assert "$HEADRACE_API_KEY" in await page.text("#command")

            await page.click("#temperature")
            await page.type("-1")
            await send(page, "Hello")
            await page.wait("document.querySelector('#error').textContent !== ''")
            assert "temperature" in await page.text("#error")
            assert await page.get("document.querySelector('#draft').value") == "Hello"
            assert await page.get("document.querySelectorAll('article').length") == 0

        browse(tmp_path / "profile", served.url, visit)
