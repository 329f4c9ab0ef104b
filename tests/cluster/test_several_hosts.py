"""Ranks on two hosts train to the bits of ranks on one: undisturbed, over a slow link, and cut off and resumed."""

import json
import os
import signal

import pytest

from tests.cluster.conftest import LOST_AFTER, RANK_TIMEOUT, ROOT, events, training
from tests.end_to_end.conftest import assert_same_bits, last_checkpoint

LAUNCHERS = ("horovod", "torch", "torchrun")  # mpiexec with either transport; a torchrun on each host


def transport(launcher: str) -> str:
    return "torch" if launcher == "torchrun" else launcher


def assert_same_run(log_dir, other):
    """Compares weights, momentum, statistics, readers and generators to the bit, and the accuracy."""
    assert_same_bits(last_checkpoint(log_dir), last_checkpoint(other))
    found, expected = (events(place, "eval")[-1] for place in (log_dir, other))
    assert {name: found[name] for name in ("step", "top1", "top5")} == {
        name: expected[name] for name in ("step", "top1", "top5")
    }


@pytest.mark.parametrize(("launcher", "each"), [("horovod", 2), ("torch", 2), ("torchrun", 1)])
def test_two_hosts_train_and_evaluate_to_the_bits_of_one(ranks, hosts, data, undisturbed, tmp_path, launcher, each):
    job = ranks.by(launcher, hosts, *training(data, tmp_path / "run", 2 * each), each=each)
    assert set(job.codes()) == {0}, job.text()
    one_host = undisturbed(transport(launcher), 2 * each)
    assert_same_run(tmp_path / "run", one_host)
    evaluation = (
        ROOT / "launch/eval.py",
        f"--log_dir={tmp_path}/run",
        f"--data_dir={data}",
        "--batch_size=8",
        "--json",
    )
    job = ranks.by(launcher, hosts, *evaluation, each=each)
    assert set(job.codes()) == {0}, job.text()
    found = next(json.loads(line) for line in job.text().splitlines() if line.startswith("{"))
    expected = events(one_host, "eval")[-1]
    assert (found["images"], found["top1"], found["top5"]) == (33, expected["top1"], expected["top5"])


@pytest.mark.parametrize("launcher", ["horovod", "torch"])
def test_a_slow_link_slows_training_and_changes_nothing_else(ranks, hosts, data, undisturbed, tmp_path, launcher):
    hosts[1].limit("100mbit")
    job = ranks.by(launcher, hosts, *training(data, tmp_path / "run"))
    assert set(job.codes()) == {0}, job.text()
    one_host = undisturbed("torch", 2)  # two transports give the same bits on two ranks
    assert_same_run(tmp_path / "run", one_host)
    slow, fast = (events(place, "train")[-1]["images_per_second"] for place in (tmp_path / "run", one_host))
    print(f"{launcher}: {slow:.0f} images/s over 100 Mbit/s, {fast:.0f} on one host")
    assert slow < fast / 2


def test_sigterm_to_the_loop_has_all_hosts_save(ranks, hosts, data, tmp_path):
    """As Kubernetes sends it to a launcher, and Slurm's sbatch to a script."""
    run = tmp_path / "run"
    hosts[1].limit("100mbit")  # else it may be done before
    job = ranks.mpiexec(hosts, *training(data, run), under=("bash", ROOT / "docs/restart.sh", 3, run))
    job.until((run / "checkpoint-00000008.pt").exists)
    (loop,) = (process for process, command in hosts[0].processes().items() if command.startswith("bash "))
    os.kill(loop, signal.SIGTERM)
    assert job.codes() == [3], job.text()
    step = int(max(run.glob("checkpoint-[0-9]*.pt")).stem.removeprefix("checkpoint-"))
    assert f"Stopped by a signal after step {step}: saved" in job.text()
    assert step < 16
    assert "restart.sh: ended with 3, 0 times started again" in job.text()
    assert not any(host.processes() for host in hosts)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_link_that_is_cut_ends_the_job_and_it_resumes(ranks, hosts, data, undisturbed, tmp_path, launcher):
    run = tmp_path / "run"
    hosts[1].limit("100mbit")  # else it may be done before it is cut
    job = ranks.by(launcher, hosts, *training(data, run))
    job.until((run / "checkpoint-00000008.pt").exists)
    hosts[1].link("down")
    # mpiexec finds a host that is lost by itself, and its ranks end with it; else they find it themselves. A torchrun
    # that has lost the one that serves it stays until TCP gives up: that one is ended here.
    stated = RANK_TIMEOUT if launcher == "torchrun" else LOST_AFTER

    def gone() -> bool:
        left = [command for host in hosts for command in host.processes().values()]
        return not [command for command in left if launcher != "torchrun" or "bin/torchrun" not in command]

    took = job.until(gone, stated + 60, ends=True)
    codes = [program.poll() for program in job.programs]
    print(f"{launcher}: exit codes {codes}, no rank left {took:.0f} s after the cut, {stated} s are stated")
    assert took < stated + 30, job.text()
    for host in hosts:
        host.kill_all()
    assert "node2" in job.text()
    assert not (run / "checkpoint-00000016.pt").exists()
    hosts[1].limit("")
    hosts[1].link("up")
    job = ranks.by(launcher, hosts, *training(data, run))
    assert set(job.codes()) == {0}, job.text()
    assert "Restored checkpoint" in job.text()
    assert_same_run(run, undisturbed("torch", 2))
