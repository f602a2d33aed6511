"""Tokenizing: whole and in pieces, what is found again of a long system prompt, and 50 MB.

    python benchmarks/tokenizing.py [--tokenizer FOLDER] [--text FILE]

Times are processor time. Each text is FILE (the bundled model's evaluation text) over and over with lines numbered, so that no piece comes twice.
Peaks are those of a process of its own, beside the text; in pieces they must stay below 200 MB.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.rows import prompt_tokens
from headrace.cluster.tokenizer import load_tokenizer
from headrace.scheduler.errors import ContextLengthError

ROOT = Path(__file__).parents[1]
REPEATS = 11
MOST = 200e6
"""Bytes that a text of 50 MB may take beside itself, its tokens among them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "stories-9m")
    parser.add_argument(
        "--text", type=Path, default=ROOT / "examples" / "text" / "held_out_public_domain.txt"
    )
    parser.add_argument(
        "--whole", action="store_true", help="50 MB whole, too: takes 10 GB and more"
    )
    parser.add_argument("--peak-of", choices=("pieces", "whole"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokenizer, lines = load_tokenizer(arguments.tokenizer), arguments.text.read_text().splitlines()
    if arguments.peak_of:
        print(*_peak(tokenizer, lines, arguments.peak_of))
        return
    encoder, console = Encoder(tokenizer), Console()
    console.print(_speed(encoder, lines), _beginnings(encoder, lines), sep="\n")
    _refusal(encoder, lines, console)
    ways = ("pieces", "whole") if arguments.whole else ("pieces",)
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of"]
    for way in ways:
        ran = subprocess.run([*command, way], capture_output=True, text=True, check=True)
        more, digest = ran.stdout.split()
        bound = f" of {MOST / 1e6:.0f} that there may be" if way == "pieces" else ""
        console.print(
            f"50 MB, {way}: {int(more) / 1e6:.0f} MB beside the text{bound}; tokens {digest}"
        )


def _text(lines: list[str], length: int) -> str:
    """Of about so many characters; built in parts, whose sum is the most that it takes."""
    parts, size, number = [], 0, 0
    while size < length:
        part = "".join(f"{number + i} {line}\n" for i, line in enumerate(lines))
        parts.append(part)
        size, number = size + len(part), number + len(lines)
    return "".join(parts)[:length]


def _speed(encoder: Encoder, lines: list[str]) -> Table:
    text = _text(lines, 4 << 20)
    ways: dict[str, Callable[[], Any]] = {
        "whole": lambda: list(encoder.tokenizer(text)["input_ids"]),
        "pieces": lambda: encoder.encode(text).tolist(),
    }
    table = Table("4 MB", "s", "MB/s", "tokens/s", "held other threads up, ms")
    found = []
    for way, work in ways.items():
        tokens, seconds, longest = _watched(work)
        found.append(tokens)
        rates = f"{len(text) / seconds / 1e6:.2f}", f"{len(tokens) / seconds:,.0f}"
        table.add_row(way, f"{seconds:.2f}", *rates, f"{longest * 1e3:.0f}")
    assert found[0] == found[1]
    return table


def _watched(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What the work makes, its seconds of processor time, and how long another thread could not run at a time."""
    gaps, is_done = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not is_done.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.process_time()
    made = work()
    seconds = time.process_time() - start
    is_done.set()
    watching.join()
    return made, seconds, max(gaps)


def _beginnings(encoder: Encoder, lines: list[str]) -> Table:
    table = Table("system prompt", "whole, ms", "first time, ms", "again, ms")
    for size in (2 << 10, 8 << 10, 32 << 10, 128 << 10):
        system = _text(lines[size % 97 :], size)
        asked = [f"{system}\nQuestion {i}?" for i in range(REPEATS)]
        whole = _median(encoder.tokenizer, asked)
        first = _median(partial(encoder.encode, tenant="new"), asked[:1])
        again = _median(partial(encoder.encode, tenant="new"), asked[1:])
        table.add_row(f"{size >> 10} KB", *(f"{each * 1e3:.2f}" for each in (whole, first, again)))
    return table


def _median(work: Callable[[str], object], texts: list[str]) -> float:
    """Seconds of processor time that the work takes for one of the texts."""
    times = []
    for text in texts:
        start = time.process_time()
        work(text)
        times.append(time.process_time() - start)
    return statistics.median(times)


def _refusal(encoder: Encoder, lines: list[str], console: Console) -> None:
    text, context = _text(lines, 50 << 20), 131072
    start = time.perf_counter()
    try:
        prompt_tokens(encoder, text, context=context, tenant="newer")
    except ContextLengthError as error:
        seconds = time.perf_counter() - start
        console.print(f"{len(text) / 1e6:.1f} MB, refused in {seconds:.2f} s: {error}")


def _peak(tokenizer: Any, lines: list[str], way: str) -> tuple[int, str]:
    """Bytes of memory that 50 MB take at most beside the text, and a digest of the tokens."""
    encoder, text = Encoder(tokenizer), _text(lines, 50 << 20)
    encode: Callable[[str], Any] = encoder.encode
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _high_water()
    token_ids = encode(text) if way == "pieces" else array("i", tokenizer(text)["input_ids"])
    more = _high_water() - before
    return more, hashlib.blake2b(token_ids, digest_size=8).hexdigest()


def _high_water() -> int:
    """The most bytes of memory that this process has had, since that was reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (each for each in status if each.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
