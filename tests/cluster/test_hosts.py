"""What tests/cluster/hosts.py makes goes with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT


def in_namespace(namespace: str) -> list[str]:
    """Returns the processes in a namespace of processes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/pid") == namespace:
                found.append(process.name)
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_hosts_end_with_what_made_them(how, tmp_path):
    network = Path("/proc/self/net/dev").read_text().count("\n")
    command = "readlink /proc/self/ns/pid; ssh node2 readlink /proc/self/ns/pid; sleep 1000 & wait"
    # Elsewhere an interrupted shell would end before its parent.
    run = [sys.executable, ROOT / "tests/cluster/hosts.py", "setsid", "sh", "-c", command]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as program:
        namespaces = [program.stdout.readline().strip() for _ in range(2)]
        assert len({*namespaces, os.readlink("/proc/self/ns/pid")}) == 3
        assert all(map(in_namespace, namespaces))
        program.send_signal(how)
    end = time.monotonic() + 10
    while any(map(in_namespace, namespaces)) and time.monotonic() < end:
        time.sleep(0.02)
    assert [in_namespace(namespace) for namespace in namespaces] == [[], []]
    assert Path("/proc/self/net/dev").read_text().count("\n") == network


def test_what_is_missing_is_said(monkeypatch):
    from tests.cluster import hosts

    assert hosts.missing() == ""
    monkeypatch.setitem(hosts.TOOLS, "openssh-server", "sshd no-such-program")
    assert hosts.missing() == "no openssh-server (Debian: apt install openssh-server)"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert hosts.missing() == "needs root, for namespaces"
