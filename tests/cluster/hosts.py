"""Makes hosts of namespaces on this machine, and runs a command on the first: `python tests/cluster/hosts.py bash`.

Each host has a network card, processes, a name, /etc/hosts, /run, /dev/shm and an sshd of its own, and shares the file
system with the others, as machines do that mount one. Their switch is in a namespace of its own, too: nothing of this
machine's network is changed or reached. All that there is ends with the process that made it, however that ends: the
kernel kills the first process of the namespaces then, with it all others in them, and networks that nobody is in go.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TOOLS = {  # by Debian's package
    "openssh-server": "sshd",
    "openssh-client": "ssh ssh-keygen",
    "iproute2": "ip tc",
    "util-linux": "unshare nsenter setpriv",
}
LASTING = "while sleep 1000; do :; done"  # of a shell, which reaps the processes that lost their parents

# $1: the host's directory. Debian gives a machine's own name the address 127.0.1.1.
BOOT = f"""
set -e
hostname "$(cat "$1/hostname")"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
ip link set lo up
while ! ip link set eth0 up 2>/dev/null; do sleep 0.02; done
ip address add "$(cat "$1/address")/24" dev eth0
/usr/sbin/sshd
{LASTING}
"""

TBF = ["tbf", "burst", "256kb", "latency", "400ms", "rate"]
SSHD = "HostKey /etc/ssh/key\nAuthorizedKeysFile /etc/ssh/key.pub\nPermitRootLogin yes\nStrictModes no\n"
SSHD += "SetEnv TMPDIR=/run\nClientAliveInterval 3\nClientAliveCountMax 2\n"
SSH = "Host *\nIdentityFile /etc/ssh/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"


def missing() -> str:
    """Returns why there can be no hosts here, and what to do; "" if there can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [
        package
        for package, names in TOOLS.items()
        if not all(any(Path(place, name).exists() for place in path.split(":")) for name in names.split())
    ]
    if absent:
        return f"no {' and no '.join(absent)} (Debian: apt install {' '.join(absent)})"
    probe = "ip link add one type veth peer name two && ip link add three type bridge && mount -t tmpfs tmpfs /run"
    tried = subprocess.run([*namespaces(), "sh", "-c", probe], capture_output=True, text=True)
    return f"no namespaces for root here: {tried.stderr.strip()}" if tried.returncode else ""


def namespaces(*more: str) -> list[str]:
    """Returns what runs a command as first process of new namespaces, which end with this process."""
    return [
        *("setpriv", "--pdeathsig=KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc"),
        *("--kill-child", *more),
    ]


@dataclass(frozen=True)
class Place:
    """The namespaces of a process."""

    pid: int

    def enter(self, *command: object) -> list[str]:
        into = ("nsenter", f"--target={self.pid}", "--all", f"--wdns={os.getcwd()}", "env", "TMPDIR=/run")
        return [*into, *map(str, command)]

    def run(self, *command: object) -> str:
        done = subprocess.run(self.enter(*command), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@dataclass(frozen=True)
class Host(Place):
    name: str
    address: str
    switch: Place

    @property
    def port(self) -> str:
        """The name of the switch's end of the cable."""
        return f"to-{self.name}"

    def link(self, state: str) -> None:
        """Pulls the cable out ("down"), or puts it in again ("up")."""
        self.switch.run("ip", "link", "set", self.port, state)

    def limit(self, rate: str) -> None:
        """Limits what comes in by the cable, and what goes out, to "2mbit" say; "" ends that."""
        for place, device in ((self.switch, self.port), (self, "eth0")):
            place.run("tc", "qdisc", "replace", "dev", device, "root", *([*TBF, rate] if rate else ["noqueue"]))

    def processes(self) -> dict[int, str]:
        """Returns the command of each process, by number, without what belongs to the host itself."""
        found = {}
        mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                command = (process / "cmdline").read_text().replace("\0", " ").strip()
                own = command.startswith(("sshd: /usr/sbin/sshd", "sleep 1000")) or process.name == str(self.pid)
                if os.readlink(process / "ns/pid") == mine and command and not own:
                    found[int(process.name)] = command
        return found

    def kill_all(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)


def first_child(process: subprocess.Popen) -> int:
    """Returns the first process of the namespaces that `process` has made, or is about to make."""

    def child() -> int:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() or 0)

    return waited(child)


def waited(found: Callable[[], int], seconds: float = 20) -> int:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "the hosts do not come up"
        time.sleep(0.02)
    return value


@contextmanager
def cluster(number: int, directory: Path) -> Iterator[list[Host]]:
    """Yields hosts node1, node2 ..., between which ssh needs no password. directory: for their files, an empty one."""
    addresses = {f"node{n}": f"10.77.0.{n}" for n in range(1, number + 1)}
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
    started = []

    def start(*command: str) -> int:
        # With a session of its own Ctrl-C reaches who made it alone, and this ends in order.
        started.append(subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL))
        return first_child(started[-1])

    try:
        switch = Place(start(*namespaces(), "sh", "-c", LASTING))
        switch.run("sh", "-c", "ip link add switch type bridge && ip link set switch up")
        hosts = []
        for name, address in addresses.items():
            own = directory / name
            (own / "ssh").mkdir(parents=True)
            (own / "hostname").write_text(name)
            (own / "address").write_text(address)
            others = (f"{there} {other}" for other, there in addresses.items() if other != name)
            (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
            for file, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
                (own / "ssh" / file).write_text(text)
            for key in directory.glob("key*"):
                (own / "ssh" / key.name).write_bytes(key.read_bytes())
                (own / "ssh" / key.name).chmod(0o600)
            booting = start(*namespaces("--uts", "--ipc"), "sh", "-c", BOOT, "boot", str(own))
            host = Host(booting, name, address, switch)
            cable = ("type", "veth", "peer", "name", "eth0", "netns", booting)
            into = ("nsenter", f"--target={switch.pid}", "--net")  # not its processes: ip knows netns by their number
            subprocess.run([*into, *map(str, ("ip", "link", "add", host.port, *cable))], check=True)
            switch.run("ip", "link", "set", host.port, "master", "switch", "up")
            hosts.append(host)
        for host in hosts:
            waited(lambda host=host: len(host.run("ss", "-Hltn", "sport = 22")))
        yield hosts
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="how many (2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what runs on the first (bash)")
    options = parser.parse_args()
    if why := missing():
        print(f"hosts.py: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory, cluster(options.hosts, Path(directory)) as hosts:
        print(*(f"{host.name} {host.address}" for host in hosts), sep="\n", file=sys.stderr)
        return subprocess.run(hosts[0].enter(*(options.command or ["bash"]))).returncode


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
