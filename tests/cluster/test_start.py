"""A job that cannot start on several hosts ends soon, and a line says why, and on which host."""

import pytest

from tests.cluster.conftest import ROOT, training

SSH = ("--prtemca", "plm_ssh_args", "-o ConnectTimeout=5")


def refuse(host):
    host.run("sh", "-c", "kill $(cat /run/sshd.pid)")


def bring_back(host):
    host.run("/usr/sbin/sshd")


@pytest.mark.parametrize(
    ("names", "breaks", "mends", "said"),
    [
        (("node1", "node9"), None, None, "ssh: Could not resolve hostname node9: "),
        (("node1", "node2"), refuse, bring_back, "ssh: connect to host node2 port 22: Connection refused"),
        (("node1", "node2"), lambda host: host.link("down"), None, "ssh: connect to host node2 port 22: "),
    ],
    ids=["no such name", "no sshd", "host down"],
)
def test_a_host_that_cannot_be_reached_is_named(ranks, hosts, data, tmp_path, names, breaks, mends, said):
    if breaks:
        breaks(hosts[1])
    job = ranks.mpiexec(hosts, *training(data, tmp_path / "run"), names=names, flags=SSH)
    codes = job.codes(60)
    if mends:
        mends(hosts[1])
    assert codes != [0]
    assert len([line for line in job.text().splitlines() if said in line]) == 1, job.text()
    assert not (tmp_path / "run").exists()
    assert hosts[0].processes() == {}


def another_version(host, data, tmp_path):
    (tmp_path / "__init__.py").write_text((ROOT / "nvcnn/__init__.py").read_text() + '\n__version__ = "0.0.1"\n')
    host.run("mount", "--bind", tmp_path / "__init__.py", ROOT / "nvcnn/__init__.py")
    return ROOT / "nvcnn/__init__.py", "train.py: rank 1 differs: nvcnn is 0.0.1, on rank 0 "


def no_data(host, data, tmp_path):
    host.run("mount", "-t", "tmpfs", "tmpfs", data)
    return data, f"train.py: rank 1 on node2: --data_dir={data}: is empty"


def no_program(host, data, tmp_path):
    host.run("mount", "-t", "tmpfs", "tmpfs", ROOT / "launch")
    return ROOT / "launch", "can't open file"


@pytest.mark.parametrize("differs", [another_version, no_data, no_program])
def test_hosts_that_differ_are_said(ranks, hosts, data, tmp_path, differs):
    mounted, said = differs(hosts[1], data, tmp_path)
    try:
        job = ranks.mpiexec(hosts, *training(data, tmp_path / "run"))
        codes = job.codes()
    finally:
        hosts[1].run("umount", mounted)
    assert codes != [0]
    assert len([line for line in job.text().splitlines() if said in line]) == 1, job.text()
    assert not (tmp_path / "run").exists()
