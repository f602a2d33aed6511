"""Many small pieces of work at once, with a bound on how many are held in memory."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

JOBS = 8
"""Chunks under way at once: a store like S3 answers after tens of milliseconds."""


def run_all(work: Callable[[T], None], items: Iterable[T], jobs: int = JOBS) -> None:
    """`work` on each item, by `jobs` threads. As many items more wait, at most, and the next one is not made before.

    The first error ends it, when the work that was begun has ended.
    """
    under_way: set[Future[None]] = set()
    with ThreadPoolExecutor(jobs, thread_name_prefix="headrace-cold") as pool:
        try:
            for item in items:
                under_way.add(pool.submit(work, item))
                if len(under_way) >= 2 * jobs:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    _raise_first(done)
            _raise_first(under_way)
        finally:
            pool.shutdown(cancel_futures=True)


def _raise_first(done: Iterable[Future[None]]) -> None:
    for future in done:
        future.result()
