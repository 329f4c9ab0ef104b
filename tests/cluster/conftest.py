"""Hosts made of namespaces, and what starts ranks on them. Without root, namespaces or sshd all tests are skipped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, cluster, missing
from tests.end_to_end.conftest import ROOT, write_records

PATIENCE = 300  # seconds for a run, which takes ten on two cores that nobody else wants
# Seconds after which mpiexec takes a host for lost from which nothing comes: 6 of silence, 3 unanswered probes.
KEEPALIVE = {"oob_tcp_keepalive_time": 6, "oob_tcp_keepalive_intvl": 2, "oob_tcp_keepalive_probes": 3}
LOST_AFTER = 6 + 2 * 3
RANK_TIMEOUT = 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if why := missing():
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with cluster(2, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(nodes: list[Host]) -> Iterator[list[Host]]:
    """Returns two hosts; afterwards nothing of the test runs there, and the link is whole again."""
    yield nodes
    for host in nodes:
        host.limit("")
        host.link("up")
        host.kill_all()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records") / "bars", train=128, validation=33)


@dataclass
class Job:
    """Programs that were started together, and what they print."""

    programs: list[subprocess.Popen] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)

    def text(self) -> str:
        return "\n".join(output.read_text(errors="replace") for output in self.outputs)

    def over(self) -> bool:
        return all(program.poll() is not None for program in self.programs)

    def until(self, condition: Callable[[], bool], seconds: float = PATIENCE, ends: bool = False) -> float:
        """Waits until the condition holds; returns how long that took. ends: the programs may end before."""
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > seconds or (self.over() and not ends and not condition()):
                pytest.fail(f"{time.monotonic() - begin:.0f} s passed, or it ended:\n{self.text()}")
            time.sleep(0.05)
        return time.monotonic() - begin

    def codes(self, seconds: float = PATIENCE) -> list[int]:
        self.until(self.over, seconds)
        return [program.wait() for program in self.programs]


@dataclass
class Ranks:
    """Starts ranks on hosts, in this process' environment."""

    directory: Path
    jobs: list[Job] = field(default_factory=list)

    def start(self, commands: dict[Host, list[object]]) -> Job:
        job = Job()
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        for name in ("TRITON_INTERPRET", "NVCNN_KERNELS"):
            env.pop(name, None)
        for host, command in commands.items():
            job.outputs.append(self.directory / f"output-{len(self.jobs)}-{host.name}.txt")
            with job.outputs[-1].open("wb") as file:
                # A session of its own, as a terminal's Ctrl-C is not for it.
                job.programs.append(
                    subprocess.Popen(
                        host.enter(*command), env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        self.jobs.append(job)
        return job

    def mpiexec(
        self,
        hosts: list[Host],
        *command: object,
        each: int = 1,
        flags: tuple = (),
        names: tuple = (),
        under: tuple = (),
    ) -> Job:
        """Starts ranks by the mpiexec of the first host; names: instead of those of the hosts in the host file.

        under: the command that is given mpiexec's.
        """
        listed = self.directory / f"hostfile-{len(self.jobs)}"
        listed.write_text("".join(f"{name} slots={each}\n" for name in names or [host.name for host in hosts]))
        keepalive = [word for name, value in KEEPALIVE.items() for word in ("--prtemca", name, value)]
        variables = [word for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", name)]
        keepalive += ["--mca", "mpi_yield_when_idle", 1]  # the hosts share this machine's cores
        start = [
            *under,
            "mpiexec",
            "--allow-run-as-root",
            "--hostfile",
            listed,
            "-np",
            each * max(len(hosts), len(names)),
        ]
        return self.start({hosts[0]: [*start, "--bind-to", "none", *keepalive, *flags, *variables, "python", *command]})

    def torchrun(self, hosts: list[Host], *command: object) -> Job:
        """Starts a rank on each host by a torchrun there."""
        meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].name}:29400")
        return self.start({host: ["torchrun", f"--nnodes={len(hosts)}", *meet, *command] for host in hosts})

    def by(self, launcher: str, hosts: list[Host], *command: object, each: int = 1) -> Job:
        if launcher == "torchrun":
            assert each == 1
            return self.torchrun(hosts, *command)
        return self.mpiexec(hosts, *command, f"--transport={launcher}", each=each)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    yield (started := Ranks(tmp_path))
    for job in started.jobs:
        for program in job.programs:
            program.kill()
            program.wait()


@pytest.fixture(scope="session")
def undisturbed(nodes: list[Host], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Returns what returns the log directory of a run of so many ranks on one host."""
    known: dict[tuple[str, int], Path] = {}

    def run(transport: str, number: int) -> Path:
        if (transport, number) not in known:
            directory = tmp_path_factory.mktemp("one-host")
            job = Ranks(directory).by(transport, nodes[:1], *training(data, directory / "run", number), each=number)
            assert job.codes() == [0], job.text()
            known[transport, number] = directory / "run"
        return known[transport, number]

    return run


def training(data: Path, log_dir: Path, ranks: int = 2) -> list[str]:
    """Returns the command of two epochs: of 8 steps, or 4 where there are four ranks. It evaluates in the end."""
    return [
        *(
            str(ROOT / "launch/train.py"),
            "--model=lenet",
            "--num_classes=10",
            f"--data_dir={data}",
            f"--log_dir={log_dir}",
        ),
        *("--batch_size=8", f"--num_batches={32 // ranks}", "--save_every=1", "--eval_every=9", "--display_every=4"),
        *("--keep=100", "--learning_rate=0.05", f"--rank_timeout={RANK_TIMEOUT}"),
    ]


def events(log_dir: Path, event: str) -> list[dict]:
    lines = map(json.loads, (log_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]
