"""The scheduler: requests in, passes out, samples in, tokens committed."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.batch_window import Gathered
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.draft import Draft
from headrace.scheduler.errors import RequestError
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.limits import check_request, token_limit
from headrace.scheduler.plan import PAGE_TOKENS, Adapter, MicroBatch, PageMove, Pass, Sample, Slice
from headrace.scheduler.policy import by_adapter
from headrace.scheduler.request import FinishReason, Request
from headrace.scheduler.room import Room
from headrace.scheduler.roster import Roster
from headrace.scheduler.selection import Selection
from headrace.scheduler.speculation import Speculation
from headrace.scheduler.update import Update, by_request


class Scheduler:
    """Continuous batching over one pool of KV pages.

    A live request waits (no pages) or runs (a tail, and pages for what is scheduled, on the device or, of
    guests, in host RAM). One that runs is in no pass while pages of its prefix are being loaded. Several passes
    may be in flight and are returned in order. A request is in at most one of them; passes made ahead may also
    hold requests of the oldest one, which continue by tokens that are not known yet, unless the next one's mask
    depends on them. What a request that has ended meanwhile gets in such a pass is ignored. Request ids are
    unique while a request lives or is in flight, and give precedence in a rank: lower ids are admitted first and
    preempted last. Where requests have several owners, shares of passes and admissions are fair between these.

    There is always a runnable request. `add` refuses what could not run alone, admission reserves
    the pages of all tokens that a request has, so that only decodes need more, and only younger
    requests give theirs up: at once, or when they come back if they are in flight, for which they are
    not scheduled again. With nothing in flight, the oldest running request can therefore always go
    on, and if none runs all pages and tails are free for the oldest one that waits. Either may have
    to wait for moves of pages, and waits for nothing else: a pass without slices ends when they have,
    and then no page is kept from being allocated but by requests that run.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.holdings = Holdings(config)
        self.pool, self.tails = self.holdings.pool, self.holdings.tails
        self._roster = Roster(config.max_sequences)
        self._room = Room(config, self.holdings, self._roster)
        self.speculation = Speculation(config, self.holdings)
        self._step = 0
        self._steps: deque[int] = deque()  # of the passes in flight
        self._selection = Selection(config, self.holdings, self._roster, self._room)

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a pass is still to be returned to `update`."""
        return bool(self._roster.live or self._steps)

    @property
    def gathered(self) -> Gathered | None:
        """What waits for its first pass while there is nothing else to do; None while there is."""
        return None if self._steps else self._roster.gathered

    @property
    def num_waiting(self) -> int:
        return self._roster.num_waiting

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def batch_counts(self) -> tuple[int, int]:
        """How many batch requests run, and how many wait."""
        return self._roster.num_running_batch, self._roster.num_waiting_batch

    @property
    def num_preemptions(self) -> int:
        return self.holdings.num_preemptions

    def kv_stats(self) -> KVStats:
        return self.holdings.stats()

    def adapter_stats(self) -> AdapterStats:
        if not self.config.adapter_slots:
            return AdapterStats()
        return self.holdings.adapters.stats(self._roster.waiting_adapters())

    def adopt(self, keys: Iterable[bytes]) -> None:
        """Take over what every stage's NVMe holds of an earlier run, oldest first."""
        self.holdings.adopt(keys)

    def add(self, request: Request) -> None:
        """Queue a new request. Output is clipped to `max_context`, then ends with LENGTH.

        Raises RequestError when the prompt is empty, leaves no room for output, or when prompt and
        output together need more pages than there are.
        """
        check_request(request, self.config)
        self._roster.add(request)

    def abort(self, request_id: int) -> Request | None:
        """End a request and keep its output; None when it has already ended."""
        request = self._roster.live.get(request_id)
        if request is None:
            return None
        return self.finish(request_id, FinishReason.ABORT, request.num_output)

    def finish(self, request_id: int, reason: FinishReason, num_output: int) -> Request | None:
        """End a request with its first `num_output` output tokens; None when it has already ended.

        If passes in flight hold it, their results for the request are ignored, and its pages are
        freed when the last of them is returned to `update`. The request is not in a later Update.
        """
        request = self._roster.live.get(request_id)
        if request is None:
            return None
        request.truncate(num_output)
        self._end(request, reason)
        return request

    def schedule(self) -> Pass | None:
        """The next pass, or None when nothing can run until a pass in flight returns.

        It has no slices when nothing can run until moves of pages have ended.
        """
        self._room.advance()
        # A pass that took every request would leave the others in flight without any.
        share = -(-len(self._roster.live) // self.config.passes_in_flight)
        draft = Draft(self.config, min(self.config.max_sequences, share))
        # Every group gets its pass before the requests of one get a second.
        can_follow = bool(self.config.ahead and self._steps)
        is_ahead = can_follow and len(self._steps) >= self.config.passes_in_flight
        if is_ahead and self.speculation.waits(self._roster.running.values()):
            return None
        oldest = self._steps[0] if can_follow else None
        self._selection.fill(draft, self._step + 1, oldest, at_once=is_ahead)
        if not draft.num_slices and (self._steps or not self._roster.live):
            return None
        assert draft.num_slices or self.holdings.is_moving, "idle with work to do"
        batches = draft.pack()
        ahead = any(piece.follows for batch in batches for piece in batch.slices)
        batches = self.speculation.extend(batches, self._roster.in_flight, ahead=ahead)
        follows = self._steps[0] if ahead else None
        self._step += 1
        self._steps.append(self._step)
        batches = tuple(map(by_adapter, batches))
        return self._pass(batches, follows, self.holdings.take_moves())

    def save(self) -> Pass | None:
        """A pass without slices that brings to NVMe what a later run may `adopt`; None when all that
        is worth it has been. For the end: nothing is in flight."""
        assert not self._steps
        moves = self.holdings.take_saves()
        return self._moves_alone(moves) if self.holdings.is_moving else None

    def settle(self) -> Pass | None:
        """A pass without slices that ends moves under way; None when there are none. Nothing is in
        flight."""
        assert not self._steps
        if not self.holdings.is_moving:
            return None
        return self._moves_alone(self.holdings.take_moves())

    def _moves_alone(self, moves: tuple[PageMove, ...]) -> Pass:
        self._step += 1
        self._steps.append(self._step)
        return self._pass((), None, moves)

    def _pass(
        self,
        batches: tuple[MicroBatch, ...],
        follows: int | None,
        moves: tuple[PageMove, ...],
    ) -> Pass:
        return Pass(self._step, batches, follows, moves, self.holdings.take_loads())

    @property
    def next_step(self) -> int:
        """Of the pass that is made next."""
        return self._step + 1

    def contexts(self) -> ContextIds:
        """All that a stage holds for requests or for whoever finds it; nothing is in flight or moves."""
        assert not self._steps
        return self.holdings.contexts()

    def lose(self, lost: ContextIds) -> int:
        """Take note that stages have lost what these ids held: it is computed again. Nothing is in flight
        or moves. Returns how many requests had it."""
        assert not self._steps
        losers = self.holdings.lose(lost, self._roster.running.values())
        for request in losers:
            self._roster.wait_again(request)
        return len(losers)

    def lose_adapters(self) -> None:
        """Take note that some stage has none of the adapters: they are brought once more. Nothing is in flight."""
        assert not self._steps
        self.holdings.adapters.lose()

    def abandon(self, passes: Iterable[Pass]) -> None:
        """Take back the passes in flight, which are `passes`: nothing that they computed counts, and moves of
        pages under way end nowhere. Stages still hold what earlier passes computed, until they `lose` it.

        A request whose newest page is in a tail computes that page from its beginning: the tail may have
        gone on to the next page.
        """
        starts: dict[int, int] = {}
        for a_pass in passes:
            for piece in (piece for batch in a_pass.micro_batches for piece in batch.slices):
                starts.setdefault(piece.request, piece.start)
        self._steps.clear()
        assert starts.keys() == self._roster.in_flight.keys()
        for number, start in starts.items():
            request = self._roster.in_flight[number]
            request.rewind(start - start % PAGE_TOKENS if self.config.num_tails else start)
            self._land(request)
        for request in self.holdings.abandon_moves():
            self._room.put_back(request)

    def take_over(self, requests: Iterable[Request]) -> list[tuple[Request, RequestError]]:
        """Queue live requests of another scheduler, which hold nothing there any more. Returns those that
        cannot be served here, and why."""
        refused = []
        for request in sorted(requests, key=lambda request: request.request_id):
            assert request.tail is None and not request.passes
            try:
                self.add(request)
            except RequestError as error:
                refused.append((request, error))
        return refused

    @property
    def live(self) -> list[Request]:
        """Requests that have not ended."""
        return [*self._roster.live.values()]

    def retain(self, keys: Collection[bytes]) -> None:
        """Take note that some stage's NVMe has no other pages than `keys`."""
        self.holdings.retain(keys)

    def update(
        self,
        a_pass: Pass,
        samples: Sequence[Sample],
        moved: Sequence[int] = (),
        lost: Sequence[int] = (),
        spoiled: Collection[int] = (),
    ) -> Update:
        """Commit what the oldest pass in flight computed: one sample for each slice that asks for one,
        and one more for each of its drafts that was right.

        `moved` and `lost` are the moves that have ended on every stage since the last update. Nothing
        is taken that the pass computed of requests that are `spoiled` on any stage, nor what later ones
        did that are in flight: these requests wait again when none of them is.
        """
        drawn = by_request(samples)
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        asked = {piece.request for piece in pieces if piece.sampling is not None}
        assert drawn.keys() == asked, (a_pass.step, drawn.keys() ^ asked)
        step = self._steps.popleft()
        assert step == a_pass.step, f"pass {a_pass.step} returned before pass {step}"
        update = Update([], [])
        # Of one that was cut the last part, which ends where all of it does.
        for piece in {piece.request: piece for piece in pieces}.values():
            request = self._roster.in_flight[piece.request]
            if piece.request in spoiled:
                self.holdings.spoil(request)
            if request.is_spoiled:
                request.num_drawing -= piece.sampling is not None
            else:
                self._take_in(request, piece, drawn.get(piece.request, ()), update)
            request.passes.remove(step)
            request.num_drafts -= piece.num_drafts
            if not request.passes:
                self._land(request)
        if moved or lost:
            moved, lost, failed = self.holdings.adapters.settle(moved, lost)
            self._end_without(failed, update)
            for request in self.holdings.settle(moved, lost):
                self._room.put_back(request)
        return update

    def _take_in(
        self, request: Request, piece: Slice, samples: Sequence[Sample], update: Update
    ) -> None:
        """What a pass computed of a request."""
        self._name(request, piece.known_end)
        if not samples or request.finish_reason is not None:
            return
        assert len(samples) <= piece.num_drawn, piece
        request.num_drawing -= 1
        before = request.num_output
        for sample in samples:
            # The draft that proved right is computed, too.
            request.num_scheduled += request.num_output > before
            self._commit(request, sample, update)
            if request.finish_reason is not None:
                update.finished.append(request)
                break
        self.speculation.count(piece, request.num_output - before)
        if piece.num_drafts:
            self._name(request, request.num_scheduled)

    def _end_without(self, failed: Mapping[Adapter, int], update: Update) -> None:
        """End those that hold a slot for an adapter that has not come; others will ask for it once more."""
        for request in [*self._roster.running.values()] if failed else ():
            adapter = request.adapter
            if adapter is not None and adapter in failed:
                update.without_adapter.append((request, failed[adapter]))
                self._end(request, FinishReason.ABORT)

    def _name(self, request: Request, end: int) -> None:
        if end >= (request.num_named + 1) * PAGE_TOKENS:
            self.holdings.name(request, end)

    def _commit(self, request: Request, sample: Sample, update: Update) -> None:
        request.tokens.append(sample.token)
        update.committed.append((request, sample))
        if sample.token in request.stop_ids:
            self._end(request, FinishReason.STOP)
        elif len(request.tokens) >= token_limit(request, self.config):
            self._end(request, FinishReason.LENGTH)

    def _land(self, request: Request) -> None:
        """No pass in flight holds the request any more."""
        del self._roster.in_flight[request.request_id]
        if request.finish_reason is not None:
            self.holdings.release(request)
        else:
            self._room.land(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self.speculation.forget(request)
        self._room.end(request)
        self._roster.end(request)
        if request.request_id not in self._roster.in_flight:
            self.holdings.release(request)
