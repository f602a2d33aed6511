"""`headrace convert --gate`: a store is one when it has passed."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from headrace.cluster.cli.evaluate import checked_gate, how, judge, measured, table
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.evaluation.corpus import Corpus
from headrace.runtime.conversion.destination import hold_back, release
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import open_model


class GatedConversion:
    """A conversion of `checkpoint` to `store`, which is compared with its checkpoint over texts.

    The store is held back while it is judged, so that nobody opens it before it has passed, and stays so when it
    has not or the process is killed. Nothing is lost: the same command judges again, and without a gate takes
    the store as it is. Raises HeadraceError, for what is wrong with gate or texts before anything is
    converted.
    """

    def __init__(
        self, console: Console, checkpoint: Path, store: Path, corpus: CorpusOptions, gate: Path
    ) -> None:
        self._gate = checked_gate(gate, checkpoint, corpus)
        self._reference = open_model(checkpoint)
        Corpus(self._reference, tuple(corpus.text or ()), corpus.tokens)
        self._console, self._store = console, store
        self._corpus = corpus

    def run(self, convert: Callable[[], Store]) -> int:
        """The exit code."""
        converted = convert()
        hold_back(self._store)
        found = measured(self._console, [converted], self._reference, self._corpus)
        self._console.print(table(found))
        self._console.print(how(found), style="dim", highlight=False)
        code = judge(self._console, self._gate, found)
        if code:
            self._console.print(
                f"{self._store} is held back: run the same command without --gate to take it as it is, or delete it",
                highlight=False,
                soft_wrap=True,
            )
        else:
            release(self._store)
        return code
