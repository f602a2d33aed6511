"""Who is served how much: fair shares of owners within a class, and what batches get in any case.

An owner's virtual time is the tokens computed for it over its weight; whoever has the least is next.
See Sheng et al., Fairness in Serving Large Language Models (2024), whose bound this keeps: of two owners
that both have requests waiting, neither gets more than the other, over their weights, by more than what
is admitted at once.
"""

from collections import Counter

from headrace.scheduler.request import Priority, Request

_UNIT = 1 << 20
"""Of virtual time, a token of weight one: weights divide it without a loss that would add up."""

BATCH_PART = 16
"""Of so many tokens that are computed while batch requests live, one at least is theirs."""

Line = tuple[int, str]
"""Where a request stands: rank and owner."""


def line_of(request: Request) -> Line:
    return request.rank, request.tenant


class Shares:
    """Virtual times, by rank and owner.

    An owner that had nothing to do begins where the least served one is: having been idle saves up
    nothing, and having been served before is not forgotten.
    """

    def __init__(self) -> None:
        self._times: dict[Line, int] = {}
        self._live: Counter[Line] = Counter()
        self._floors: dict[int, int] = {}  # of each rank, the time of who was the last to go

    def time(self, line: Line) -> int:
        return self._times[line]

    def join(self, request: Request) -> None:
        line = line_of(request)
        if not self._live[line]:
            others = [self._times[each] for each in self._live if each[0] == request.rank]
            least = min(others, default=self._floors.get(request.rank, 0))
            self._times[line] = max(self._times.get(line, 0), least)
        self._live[line] += 1

    def leave(self, request: Request) -> None:
        line = line_of(request)
        self._live[line] -= 1
        if not self._live[line]:
            del self._live[line]
            self._floors[request.rank] = self._times[line]
            if not self._live:  # nobody is there to be fair to
                self._times.clear()
                self._floors.clear()

    def charge(self, request: Request, end: int) -> None:
        """Its tokens up to `end` are computed now. Those that are computed again are nobody's fault."""
        fresh = end - request.num_charged
        if fresh > 0:
            request.num_charged = end
            self._times[line_of(request)] += fresh * _UNIT // request.weight


class Guarantee:
    """Keeps interactive requests from shutting batch requests out.

    Each interactive token is credit towards a batch token: BATCH_PART - 1 of them pay for one. What
    batches get without need pays, too, so that nothing is owed while passes have room for all. No more is
    owed than `most` tokens.
    """

    def __init__(self, most: int) -> None:
        self._most = most * (BATCH_PART - 1)
        self._credit = 0

    @property
    def owed(self) -> int:
        """Tokens that batch requests should have before interactive ones go on."""
        return self._credit // (BATCH_PART - 1)

    def note(self, tokens: Counter[Priority], *, is_wanted: bool) -> None:
        """A pass has these tokens; `is_wanted`: batch requests live."""
        if not is_wanted:
            self._credit = 0
            return
        paid = tokens[Priority.BATCH] * (BATCH_PART - 1)
        self._credit += tokens[Priority.INTERACTIVE] - paid
        self._credit = max(0, min(self._credit, self._most))
