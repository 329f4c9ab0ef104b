"""The watch over the ranks: it names one that has gone or does not move, and ends the job.

A thread of each rank tells rank 0's, on a TCP connection of its own, what the rank is at (`nvcnn.program.here`), and
hears from there that rank 0 goes on. It judges by that alone, on the host: so also where all wait for a device, or for
a library. A connection that ends without a word is a rank that was killed. (The store of torch.distributed tells
nobody who has gone, and who asks it waits without end for a rank 0 that stands still.)

Whatever a rank does it has to move within `timeout` seconds: begin a collective, a step, another activity, or count
`here.moves` up. Where no rank has, the one is named that has begun the fewest collectives: the others wait for it.
"""

import fcntl
import json
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nvcnn.program import BLAME, PARENT, Here, abort, here, leaving

BEAT = 2.0  # seconds between two messages of a rank; at most an eighth of the timeout
MEETING = 20.0  # seconds in which ranks must reach rank 0
KNOCK = 3.0  # seconds to try one address of it
LONGEST = 4096  # bytes of a message
SIOCGIFADDR = 0x8915  # linux/sockios.h
FOLLOWS = 1.0  # seconds in which the launcher ends all, and says by which rank
SHOWN = 4  # ranks in a message


class Gathers(Protocol):
    size: int
    rank: int

    def gather(self, value: Any) -> list[Any]: ...


@dataclass
class Other:
    """What is known of another rank. Times are those of the watch's clock."""

    name: str
    connection: socket.socket
    at: dict[str, Any] = field(default_factory=lambda: asdict(Here()))
    heard: float = 0.0
    moved: float = 0.0
    received: bytes = b""
    unsent: bytes = b""

    def __post_init__(self) -> None:
        self.connection.setblocking(False)

    def send(self, **message: Any) -> None:
        """Sends a message; what a rank is at it leaves out while the one before has not gone."""
        if not self.unsent or "ends" in message:
            self.unsent += json.dumps(message).encode() + b"\n"
        with suppress(OSError):  # that it has gone, `receive` finds
            self.unsent = self.unsent[self.connection.send(self.unsent) :]

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns the messages that have come, and whether the connection is still there."""
        try:
            new = self.connection.recv(2**16)
        except BlockingIOError:
            return [], True
        except OSError:
            new = b""
        *lines, self.received = (self.received + new).split(b"\n")
        return [json.loads(line) for line in lines], bool(new) and len(self.received) < LONGEST


class Watch:
    """Is the thread of one rank, which watches `others`: on rank 0 all, on another rank 0. timeout: in seconds.

    delay: seconds for which it leaves it to others to speak, who have lost rank 0 as well. They end this one meanwhile.
    """

    def __init__(self, rank: int, name: str, others: dict[int, Other], timeout: float, delay: float = 0.0):
        self.rank, self.name, self.others, self.timeout, self.delay = rank, name, others, timeout, delay
        self.beat = min(BEAT, timeout / 8)
        self.at, self.moved = asdict(here), 0.0
        self.ends: int | None = None  # the exit code
        self.reader, self.writer = os.pipe()
        self.poll = select.poll()
        self.poll.register(self.reader, select.POLLIN)
        self.ranks = {other.connection.fileno(): rank for rank, other in others.items()}
        for connection in self.ranks:
            self.poll.register(connection, select.POLLIN)
        self.thread = threading.Thread(target=self.run, name="watch over the ranks", daemon=True)
        self.thread.start()
        leaving.append(self.close)

    def close(self, code: int = 0) -> None:
        """Tells the others that this rank ends: with 0 well, else for a reason that it has said."""
        if self.ends is not None:
            return
        os.write(self.writer, b"\0")
        self.ends = code  # from here on the thread may close what was written to
        if threading.current_thread() is not self.thread:
            self.thread.join(1)

    def run(self) -> None:
        """Watches until this rank ends."""
        clock, before, sent = 0.0, time.monotonic(), -self.beat
        while self.ends is None:
            ready = self.poll.poll(1000 * max(0, sent + self.beat - clock))
            # A clock that stands while this process does: after a pause of the whole job nobody is late.
            clock, before = clock + min(time.monotonic() - before, 2 * self.beat), time.monotonic()
            for connection, _ in ready:
                if connection in self.ranks:
                    self.listen(self.ranks[connection], clock)
            if clock - sent < self.beat:
                continue
            sent = clock
            if (at := asdict(here)) != self.at:
                self.at, self.moved = at, clock
            self.tell(**at)
            if self.others and (reason := self.judged(clock)):
                self.end(reason)
        self.tell(ends=self.ends)
        os.close(self.reader)
        os.close(self.writer)

    def tell(self, **message: Any) -> None:
        for other in self.others.values():
            other.send(**message)

    def listen(self, rank: int, clock: float) -> None:
        """Takes what has come from a rank. Ends this one where that has ended, and not well."""
        other = self.others[rank]
        messages, there = other.receive()
        for message in messages:
            other.heard = clock
            if (code := message.get("ends")) is not None:
                if code:
                    self.follow(code)
                self.poll.unregister(other.connection)
                del self.others[rank]
                return
            if message != other.at:
                other.at, other.moved = message, clock
        if not there:
            log = "its launcher may say how it ended, and the kernel's log whether memory ran out"
            self.end(f"{last_seen(other.name, other.at)} has gone: {log}")

    def judged(self, clock: float) -> str:
        """Returns a clause that names the ranks that do not move; empty while all is well."""
        late = self.timeout + self.beat  # since a message may be that old
        silent = [other for other in self.others.values() if clock - other.heard > late]
        for_so_long = f"for {self.timeout:g} s (--rank_timeout)"
        if silent:
            names = listed(last_seen(other.name, other.at) for other in silent)
            return f"{names} did not answer {for_so_long}: stopped, or its machine or network is down"
        moved = max(self.moved, *(other.moved for other in self.others.values()))
        if self.rank != 0 or clock - moved < late:
            return ""
        ranks = {0: (self.name, self.at), **{rank: (other.name, other.at) for rank, other in self.others.items()}}
        fewest = behind({rank: at for rank, (_, at) in ranks.items()})
        if all(at["doing"] == "starts" and not at["waits"] for _, at in ranks.values()):
            return ""  # imports, and reading, may take long, and nobody waits
        names = listed(last_seen(*ranks[rank]) for rank in fewest)
        if len(fewest) == len(ranks):
            return f"no rank has moved {for_so_long}: {names}"
        return f"{names} did not move {for_so_long}, while the others wait"

    def remedy(self) -> str:
        """Returns a clause about where a run goes on; empty if there is no checkpoint."""
        checkpoint = here.checkpoint or next((other.at.get("checkpoint") for other in self.others.values()), "")
        return f"; the same command goes on from {checkpoint}" if checkpoint else ""

    def end(self, reason: str) -> None:
        """Says why, and ends the job."""
        time.sleep(self.delay)
        say(reason + self.remedy())
        self.tell(ends=1)
        abort(1)

    def follow(self, code: int) -> None:
        """Ends this rank after a line that says why, and has the others follow."""
        self.tell(ends=code)
        time.sleep(FOLLOWS)
        abort(code)


def say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)


def end_with_launcher(rank: int) -> None:
    """Has a thread end this rank when its launcher has gone. What the launcher prints for it is lost then."""

    def watch() -> None:
        while os.getppid() == PARENT:
            time.sleep(BEAT)
        say(f"rank {rank} ends, since its launcher has gone")
        abort(1)

    threading.Thread(target=watch, name="watch over the launcher", daemon=True).start()


def behind(at: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Returns the ranks that the others wait for: those that have begun the fewest collectives, or are in none."""
    order = {rank: (its["collectives"], its["waits"]) for rank, its in at.items()}
    return [rank for rank, its in order.items() if its == min(order.values())]


def last_seen(name: str, at: Mapping[str, Any]) -> str:
    """Returns the name of a rank with what it was at: "rank 1 on node7 (process 4711; computes, after step 7)"."""
    what = "waits for the others" if at["waits"] else at["doing"]
    return f"{name[:-1]}; {what}, after step {at['step']})"


def listed(names: Iterable[str]) -> str:
    """Returns some names, and how many there are more."""
    every = list(names)
    return "; ".join(every[:SHOWN]) + f"; and {len(every) - SHOWN} more" * (len(every) > SHOWN)


def watch_ranks(transport: Gathers, timeout: float) -> Watch | None:
    """Returns the watch of this rank; None for a timeout of 0 seconds. All ranks must call it.

    Where not all ranks reach rank 0 by TCP none is watched, and rank 0 says so.
    """
    rank, host = transport.rank, socket.gethostname()
    server = listening() if rank == 0 and timeout else None
    mine: dict[str, Any] = {"timeout": timeout, "host": host, "pid": os.getpid()}
    if server:
        mine |= {"places": places(), "port": server.getsockname()[1], "token": secrets.token_hex(16)}
    offers = transport.gather(mine)
    names = [f"rank {r} on {offer['host']} (process {offer['pid']})" for r, offer in enumerate(offers)]
    others: dict[int, socket.socket] = {}
    if all(offer["timeout"] for offer in offers):
        others = admit(server, transport.size, offers[0]["token"]) if server else knock(offers[0], rank, host)
        reached = transport.gather(bool(others))
        missing = [names[r] for r in range(1, transport.size) if not reached[r]]
        if missing:
            others = {}
            if rank == 0:
                reason = f"{listed(missing)} cannot reach rank 0 by TCP at {', '.join(mine['places'])}"
                print(f"the ranks are not watched (--rank_timeout): {reason}", file=sys.stderr)
    if server:
        server.close()
    known = {r: Other(names[r], connection) for r, connection in others.items()}
    first = [offer["host"] for offer in offers].index(host) == rank
    delay = 0 if rank < 2 else BLAME / 2 if first else BLAME * 3 / 4
    return Watch(rank, names[rank], known, timeout, delay) if known else None


def listening() -> socket.socket:
    """Returns a socket at which any machine reaches this one, at a port that is free."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=4096)


def places() -> list[str]:
    """Returns the names and addresses by which others may reach this machine."""
    found = [os.environ.get("MASTER_ADDR", ""), socket.gethostname(), *addresses().values()]
    return [place for place in dict.fromkeys(found) if place]


def addresses() -> dict[str, str]:
    """Returns the address (IPv4) of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, interface in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(s, SIOCGIFADDR, struct.pack("256s", interface.encode()))
                found[interface] = socket.inet_ntoa(answer[20:24])
    return found


def admit(server: socket.socket, ranks: int, token: str) -> dict[int, socket.socket]:
    """Returns the connections of the ranks that know the token, as far as they have come in time."""
    admitted: dict[int, socket.socket] = {}
    end = time.monotonic() + MEETING
    while len(admitted) < ranks - 1 and (left := end - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(TimeoutError, ConnectionError, ValueError):
            connection, _ = server.accept()
            connection.settimeout(KNOCK)
            its, rank = connection.recv(64).decode().split()  # so few bytes come at once
            if its == token and 0 < int(rank) < ranks:
                connection.sendall(token.encode())
                admitted[int(rank)] = connection
    return admitted


def knock(offer: dict[str, Any], rank: int, host: str) -> dict[int, socket.socket]:
    """Returns the connection to rank 0, by the first of its addresses where it answers; none if it does not."""
    end = time.monotonic() + MEETING
    for place in ["127.0.0.1"] * (host == offer["host"]) + offer["places"]:
        if time.monotonic() > end:
            break
        with suppress(OSError, ValueError):  # a name may be none
            connection = socket.create_connection((place, offer["port"]), timeout=KNOCK)
            connection.sendall(f"{offer['token']} {rank}".encode())
            if connection.recv(64).decode() == offer["token"]:
                return {0: connection}
    return {}
