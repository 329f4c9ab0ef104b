"""A rank that has gone, stands still or does not answer is named; one that is slow, or ends well, is not."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from nvcnn import watch_ranks as module
from nvcnn.program import Here, here
from nvcnn.watch_ranks import Other, Watch, behind, watch_ranks

TIMEOUT = 0.4

# That of `abort` here, in place of the end of the process.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Watched:
    """Is a watch of which this test is the other rank. `said`, `code`: its last words."""

    def __init__(self, monkeypatch, capsys, rank=0):
        self.code, self.capsys, self.ended = None, capsys, threading.Event()
        monkeypatch.setattr(module, "abort", self.abort)
        monkeypatch.setattr(module.sys, "argv", ["launch/train.py"])
        monkeypatch.setattr(module, "FOLLOWS", 0)
        monkeypatch.setattr(module, "BLAME", 0)
        other, self.end = (1, 0)[rank], socket.socketpair()
        others = {other: Other(f"rank {other} on far (process 9)", self.end[0])}
        self.watch = Watch(rank, f"rank {rank} on near (process 8)", others, TIMEOUT)

    def abort(self, code):
        self.code = code
        self.ended.set()
        raise SystemExit

    def tell(self, **message):
        self.end[1].sendall(json.dumps(vars(Here()) | message).encode() + b"\n")

    def said(self, seconds=5.0) -> str:
        """What it says in the end; empty if that does not come."""
        self.ended.wait(seconds)
        return self.capsys.readouterr().err


@pytest.fixture
def watched(monkeypatch, capsys):
    made = []

    def start(**options):
        made.append(Watched(monkeypatch, capsys, **options))
        return made[-1]

    monkeypatch.setattr(module, "leaving", [])
    before = vars(here).copy()
    yield start
    for one in made:
        one.watch.close()
        for end in one.end:
            end.close()
    vars(here).update(before)


def at(collectives, waits):
    return {"collectives": collectives, "waits": waits}


@pytest.mark.parametrize(
    ("ranks", "guilty"),
    [
        ([at(7, True), at(6, False), at(7, True)], [1]),
        ([at(7, True), at(7, True), at(7, False)], [2]),  # it has begun to wait for none
        ([at(9, False), at(7, True), at(7, True)], [1, 2]),  # on the way to a collective that cannot come
        ([at(7, True), at(7, True)], [0, 1]),
    ],
)
def test_who_is_waited_for(ranks, guilty):
    assert behind(dict(enumerate(ranks))) == guilty


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_killed(watched, rank):
    one = watched(rank=rank)
    here.checkpoint = "run/checkpoint-00000002.pt" if rank == 0 else ""
    one.tell(doing="computes", step=3, checkpoint="run/checkpoint-00000002.pt")
    one.end[1].close()
    said = one.said()
    assert said.startswith(f"train.py: rank {1 - rank} on far (process 9; computes, after step 3) has gone: ")
    assert said.endswith("; the same command goes on from run/checkpoint-00000002.pt\n")
    assert one.code == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_answer(watched, rank):
    said = f"train.py: rank {1 - rank} on far (process 9; starts, after step 0) did not answer for 0.4 s (--r"
    assert watched(rank=rank).said().startswith(said)


def test_a_rank_that_stands_still(watched):
    here.waits, here.collectives = True, 8
    one, end = watched(), time.monotonic() + 20
    while not one.ended.is_set() and time.monotonic() < end:
        one.tell(doing="waits for input", step=3, collectives=7)
        one.ended.wait(TIMEOUT / 8)
    said = "rank 1 on far (process 9; waits for input, after step 3) did not move for 0.4 s (--rank_timeout), while the"
    assert said in one.said()


def test_a_rank_that_is_slow_and_ends(watched, monkeypatch):
    """It moves while another waits for it; then the whole job is paused; then it ends well."""
    here.waits = True
    now, late = time.monotonic, [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now() + late[0], sleep=time.sleep))
    one = watched()
    for moves in range(24):
        one.tell(doing="checks its data", moves=moves)
        assert one.said(TIMEOUT / 8) == ""
        late[0] = 1000 if moves > 12 else 0
    one.tell(ends=0)
    one.end[1].close()
    assert one.said(2 * TIMEOUT) == ""
    assert one.watch.thread.is_alive()


def test_a_rank_that_ends_after_its_own_words(watched):
    one = watched()
    one.tell(ends=2)
    assert (one.said(), one.code) == ("", 2)


def ranks(monkeypatch, timeouts):
    """Returns the watches of ranks that are threads here."""
    found, values, barrier = {}, {}, threading.Barrier(len(timeouts))

    def gather(rank, value):
        barrier.wait(10)
        values[rank] = value
        barrier.wait(10)
        return [values[r] for r in range(len(timeouts))]

    def start(rank):
        transport = SimpleNamespace(rank=rank, size=len(timeouts), gather=lambda value: gather(rank, value))
        found[rank] = watch_ranks(transport, timeouts[rank])

    monkeypatch.setattr(module, "leaving", [])
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(len(timeouts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [found[rank] for rank in range(len(timeouts))]


def test_ranks_meet(monkeypatch):
    """One that does not know the token is not let in."""
    knock = module.knock

    def stranger(offer, *rest):
        with socket.create_connection(("127.0.0.1", offer["port"])) as one:
            one.sendall(b"0123 1")
            assert one.recv(64) == b""
        return knock(offer, *rest)

    monkeypatch.setattr(module, "knock", stranger)
    zero, *others = watches = ranks(monkeypatch, [9, 9, 9])
    assert sorted(zero.others) == [1, 2]
    assert [sorted(other.others) for other in others] == [[0], [0]]
    for watch in watches:
        watch.close()
        assert not watch.thread.is_alive()


def test_ranks_that_cannot_meet_are_not_watched(monkeypatch, capsys):
    monkeypatch.setattr(module, "MEETING", 0.1)
    monkeypatch.setattr(module, "knock", lambda *_: {})
    assert ranks(monkeypatch, [9, 9]) == [None, None]
    assert "the ranks are not watched (--rank_timeout): rank 1 on " in capsys.readouterr().err
    assert ranks(monkeypatch, [0, 9]) == [None, None]  # where flags differ, as another check says
