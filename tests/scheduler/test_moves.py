"""Moves: numbered, carried once, and ended when every stage says so."""

import pytest

from headrace.scheduler.moves import MoveReports, Moves
from headrace.scheduler.nvme_index import NvmeIndex
from headrace.scheduler.plan import MoveKind, PassResult, StageTimes


def result(*moved: int, lost: tuple[int, ...] = ()) -> PassResult:
    return PassResult(1, (), StageTimes(0, 0.0, 0.0, 0.0, 0, 0), moved, lost)


def test_a_move_is_carried_once_and_under_way_until_it_has_ended() -> None:
    moves = Moves()
    moves.start(MoveKind.OUT, 3, 5, b"k", 7)
    [move] = moves.take()
    assert (move.number, move.kind, move.slot, move.page, move.key) == (1, MoveKind.OUT, 3, 5, b"k")
    assert moves.take() == ()
    assert len(moves) == 1
    assert moves.end(1, lost=False) is move
    assert (len(moves), moves.num_moved[MoveKind.OUT], moves.num_lost[MoveKind.OUT]) == (0, 1, 0)
    with pytest.raises(KeyError):
        moves.end(1, lost=False)


def test_a_move_has_ended_when_all_stages_have_reported_it() -> None:
    reports = MoveReports(2)
    assert reports.merge([result(1, 2), result(2)]) == ([2], [])
    assert reports.merge([result(), result(3)]) == ([], [])
    assert reports.merge([result(3), result(1)]) == ([1, 3], [])


def test_a_move_is_lost_when_one_stage_has_lost_it_but_not_before_all_have_ended() -> None:
    reports = MoveReports(3)
    assert reports.merge([result(lost=(4,)), result(4, 5), result(5)]) == ([], [])
    assert reports.merge([result(5), result(), result(4)]) == ([5], [4])
    # Numbers are not kept for ever.
    assert reports.merge([result(4), result(4), result(4)]) == ([4], [])


def test_more_reports_of_a_move_than_stages_are_our_error() -> None:
    with pytest.raises(AssertionError, match="ended twice"):
        MoveReports(1).merge([result(1, lost=(1,))])


def test_nvme_forgets_the_oldest_first() -> None:
    index = NvmeIndex(2)
    assert index.add([b"a", b"b"]) == []
    assert index.add([b"a"]) == []  # written again, and so the youngest
    assert index.add([b"c"]) == [b"b"]
    assert (b"a" in index, b"b" in index, len(index)) == (True, False, 2)
    index.discard(b"a")
    index.discard(b"a")
    assert len(index) == 1


def test_without_room_on_nvme_nothing_is_there() -> None:
    index = NvmeIndex(0)
    assert index.add([b"a"]) == []
    assert b"a" not in index
