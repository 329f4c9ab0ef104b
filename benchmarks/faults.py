"""Disturbs training, saving, preparing and evaluating at random, gives the command again, and compares bit for bit.

python -m benchmarks.faults [--runs=100] [--seed=1] [--only=NUMBER] [--out=DIR] [--jobs=1]

Run n of a seed is always the same: a program, what reads its data, how its ranks talk, what happens, and where. When it
has ended the same command runs to its end, undisturbed, and what it leaves must be that of a run which never was
disturbed: of a training all that the last checkpoint holds but the settings, of a preparation the bytes of the
directory, of an evaluation the result.

After each run DIR (benchmarks/results) gets faults.json, with a row for each, and faults.md, a table by what happened;
given again, the command goes on behind the last row, unless that is of other code. Exit code 1: a run did not survive.
It takes about 25 seconds a run on two cores.

survived    none of what follows
lost        other bits, or a step that was saved is not gone on from, or the command does not work again, or its exit
            code was not one that is right, such as 0 before all was done
hung        a run did not end within HANG seconds after the fault, or LIMIT seconds of its start
traceback   one was printed where there is a better message: anywhere but where the harness raises, or takes the memory
orphan      a process of the run was there ORPHAN seconds after the launcher had ended
half        a file that is not whole was left in the directory, after the second run or a fault that kills nothing
missed      nothing happened, also when it was tried sooner in the run
"""

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks import report
from benchmarks.disturbed import MARK, ROOT, kill_all, processes
from nvcnn import checkpoint
from nvcnn.doctor import mpi_flags
from nvcnn.prepare.fashion_mnist import png
from nvcnn.program import SAVED_AND_STOPPED, InputError
from nvcnn.settings import Evaluation, Settings

HANG, LIMIT, ORPHAN = 90, 300, 10  # seconds
RANK_TIMEOUT = 20  # seconds
RESULTS = ROOT / "benchmarks" / "results"
IMAGES, VALIDATION, EPOCHS, BATCH = 480, 100, 2, 8
TRAINING, RANKED = ("train", "save"), ("train", "save", "evaluate")
STEPS = {2: EPOCHS * (IMAGES // (2 * BATCH)), 3: EPOCHS * (IMAGES // (3 * BATCH))}
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # that ask to stop
# Files that decide what a run does.
CODE = ("nvcnn", "kernels", "launch", "benchmarks/faults.py", "benchmarks/disturbed.py", "tests/end_to_end/tiny.py")
PLACES = {
    "train": ("start", "step", "save", "evaluate", "any"),
    "save": ("step", "save", "any"),
    "evaluate": ("start", "evaluate", "any"),
    "prepare": ("shard", "any"),
}
VERDICTS = ("survived", "lost", "hung", "traceback", "orphan", "half", "missed")


@dataclass(frozen=True)
class Kind:
    """Is something that happens.

    event: one of `disturbed.EVENTS`, or a signal. places: where, if not wherever the program can be. rank: to which
    one, None for any. flag: the flag of train.py without which it makes no sense. raises: a traceback is right.
    after: what is done to the directory, once the run has ended. codes: what the disturbed run may end with, empty for
    anything but 0; a signal's, where one is waited for. 0 is right only once all was done.
    """

    title: str
    event: str
    programs: tuple[str, ...]
    places: tuple[str, ...] = ()
    rank: int | None = None
    flag: str = ""
    raises: bool = False
    after: str = ""
    codes: tuple[int, ...] = ()


EVERYWHERE = (*RANKED, "prepare")
SAVED = (SAVED_AND_STOPPED, 0)  # it may have been at its end
ENOUGH = (0, 1, 2, 128 + signal.SIGABRT)  # there may be memory enough; C++ aborts without
KINDS = (
    Kind("SIGKILL of a rank", "SIGKILL", RANKED),
    Kind("SIGKILL of mpiexec", "mpiexec", RANKED),
    Kind("SIGKILL of all", "all", EVERYWHERE),
    Kind("SIGSTOP of a rank", "SIGSTOP", RANKED, ("start", "step", "save", "evaluate"), flag="rank_timeout"),
    Kind("SIGTERM", "SIGTERM", EVERYWHERE, codes=SAVED),
    Kind("SIGINT", "SIGINT", EVERYWHERE, codes=SAVED),
    Kind("SIGUSR1", "SIGUSR1", TRAINING, codes=SAVED),
    Kind("an exception on a rank", "raise", RANKED, ("start", "step", "save", "evaluate"), raises=True, codes=(1,)),
    Kind("no memory on a rank", "memory", RANKED, ("step", "evaluate"), raises=True, codes=ENOUGH),
    Kind("SIGKILL of a data worker", "worker", ("train", "prepare"), ("step", "shard"), codes=(0, 2)),
    Kind("the disk is full", "write", (*TRAINING, "prepare"), ("step", "start"), rank=0, codes=(2,)),
    Kind("files cannot be renamed", "rename", TRAINING, ("step", "save"), rank=0, codes=(2,)),
    Kind("the directory becomes read-only", "readonly", (*TRAINING, "prepare"), ("step", "shard"), 0, codes=(2,)),
    Kind("the directory vanishes", "vanish", (*TRAINING, "prepare"), ("step", "shard"), rank=0, codes=(2,)),
    Kind("a bit of the newest checkpoint flips", "all", ("save",), ("step",), after="flip"),
    Kind("the newest checkpoint is cut", "all", ("save",), ("step",), after="cut"),
    Kind("a stale part is left", "all", ("save", "prepare"), after="part"),
)


@dataclass(frozen=True)
class Fault:
    """Is what run `number` is. at: which time it comes to `place`; with "any", thousandths of an undisturbed run."""

    number: int
    kind: Kind
    program: str
    backend: str
    transport: str
    ranks: int
    place: str
    at: int
    rank: int
    on_save_error: str
    chance: int  # decides what is left: which bit flips

    @property
    def setting(self) -> tuple[str, str, str, int]:
        """What decides the bits."""
        return "train" if self.program in TRAINING else self.program, self.backend, self.transport, self.ranks


def missing(kind: Kind) -> str:
    """Returns why a kind cannot be tried here; empty if it can."""
    if kind.flag and kind.flag not in {f.name for f in fields(Settings)}:
        return f"there is no --{kind.flag}"
    if kind.event == "readonly" and os.geteuid() == 0 and not shutil.which("setpriv"):
        return "root may write everywhere, and there is no setpriv to take that right away"
    return ""


def draw(seed: int, number: int) -> Fault:
    """Returns run `number` of a seed."""
    chance = random.Random(f"faults {seed} {number}")
    kind = KINDS[(number + seed) % len(KINDS)] if number <= len(KINDS) else chance.choice(KINDS)
    while missing(kind):
        kind = chance.choice(KINDS)
    program = chance.choice(kind.programs)
    possible = kind.places or PLACES[program]
    own = (*PLACES[program], *(("start",) if program == "prepare" and kind.event == "write" else ()))
    places = [place for place in possible if place in own]
    if kind.event == "write" and program == "prepare":
        places = ["start"]
    ranks = 1 if program == "prepare" else chance.choice((2, 2, 3))
    place = chance.choice(places)
    steps = STEPS.get(ranks, 0)
    most = {"start": 1, "step": steps, "save": 3 if program == "train" else 20, "evaluate": 4, "shard": 12, "any": 950}
    first = 6 if kind.after in ("flip", "cut") else 1  # there must be one before
    return Fault(
        number,
        kind,
        program,
        "torch" if kind.event == "worker" else chance.choice(("dali_cpu", "torch")),
        chance.choice(("horovod", "torch")),
        ranks,
        place,
        chance.randint(first, max(first, most[place])),
        chance.randrange(ranks) if kind.rank is None else kind.rank,
        chance.choice(("stop", "continue")),
        chance.randrange(2**32),
    )


@dataclass
class Ended:
    """Is what a run has left: its exit code (None: it was ended, as it hung), what it printed, and what was wrong."""

    code: int | None
    text: str
    seconds: float  # from the fault, or else the start, to the end
    happened: bool
    orphans: int


def has_flag(program: str, name: str) -> bool:
    return name in {f.name for f in fields(Evaluation if program == "evaluate" else Settings)}


def command(fault: Fault, work: Path, data: Path, log_dir: Path, quiet: bool = False) -> list[str]:
    """Returns the command of a run. quiet: nothing happens in it."""
    what = "none" if quiet or fault.place == "any" else fault.kind.event
    rank, program = str(fault.rank), "train" if fault.program == "save" else fault.program
    words = [sys.executable, str(ROOT / "benchmarks/disturbed.py"), program, what, fault.place, str(fault.at), rank]
    if program == "prepare":
        train, val = (f"--{split}={work / 'pictures' / split}" for split in ("train", "val"))
        words += ["folder", train, val, f"--out={log_dir}", "--shards=16,4", "--workers=2"]
    else:
        words += [f"--data_dir={data}", f"--log_dir={log_dir}", f"--transport={fault.transport}"]
        words += [f"--data_backend={fault.backend}", f"--batch_size={BATCH}"]
        if has_flag(program, "rank_timeout"):
            words.append(f"--rank_timeout={RANK_TIMEOUT}")
    if program == "train":
        words += ["--model=tiny", f"--num_epochs={EPOCHS}", "--display_every=1", "--image_size=28"]
        words += ["--save_interval=0"] * (fault.program == "save")
        if has_flag(program, "on_save_error"):
            words.append(f"--on_save_error={fault.on_save_error}")
    if program == "evaluate":
        words.append("--json")
    if fault.ranks > 1:
        words = ["mpiexec", *mpi_flags("mpiexec", fault.ranks), "--oversubscribe", *words]
    if fault.kind.event == "readonly" and os.geteuid() == 0:
        words = ["setpriv", "--bounding-set=-dac_override", *words]
    return words


def strike(fault: Fault, mark: Path, process: subprocess.Popen) -> None:
    """Sends the signal of a fault that is not tied to a place."""
    mark.write_text(str(time.time()))
    event = fault.kind.event
    if event == "all":
        kill_all(str(mark))
        return
    number = signal.SIGKILL if event == "mpiexec" else signal.Signals[event]
    pid = process.pid if event == "mpiexec" else ranks_of(processes(str(mark))).get(fault.rank, process.pid)
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def ranks_of(found: dict[int, dict[str, str]]) -> dict[int, int]:
    """Returns the process of each rank. found: environments by process; a rank's workers have that of the rank."""
    ranks = {pid: int(e["OMPI_COMM_WORLD_RANK"]) for pid, e in found.items() if "OMPI_COMM_WORLD_RANK" in e}
    own = {}
    for pid, rank in ranks.items():
        with suppress(OSError):  # it has just ended
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if ranks.get(parent) != rank:
                own[rank] = pid
    return own


def run(words: list[str], output: Path, mark: Path, fault: Fault | None = None, after: float = 0.0) -> Ended:
    """Runs a command to its end, and ends what is left of it. fault: comes after so many seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NVCNN_KERNELS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: str(mark)}
    environment["PYTHONUNBUFFERED"] = "1"
    mark.unlink(missing_ok=True)
    start = time.time()
    with output.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=output.parent, start_new_session=True
        )
    code = None
    while time.time() < start + LIMIT:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(0.05)
            break
        if fault and time.time() > start + after and not mark.exists():
            strike(fault, mark, process)
        if mark.exists() and time.time() > (mark.stat().st_mtime + HANG):
            break
    end = time.time()
    happened = mark.exists()
    since = mark.stat().st_mtime if happened else start
    while (left := processes(str(mark))) and code is not None and time.time() < end + ORPHAN:
        time.sleep(0.1)
    kill_all(str(mark))
    process.wait()
    return Ended(code, output.read_text(errors="replace"), end - since, happened, len(left) if code is not None else 0)


def contents(directory: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def difference(one: Any, other: Any, where: str = "checkpoint") -> str:
    """Returns the first place where two checkpoints differ by a bit, but for their settings; empty if there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return where
        pairs = [(f"{where}, {name}", one[name], other[name]) for name in one.keys() - {"settings"}]
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        pairs = [(f"{where}, {i}", *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    else:
        return "" if type(one) is type(other) and bits(one) == bits(other) else where
    return next((found for name, a, b in pairs if (found := difference(a, b, name))), "")


def bits(value: Any) -> Any:
    """Returns what is equal for the same bits: zero has a sign, and what is not a number equals itself."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, value.shape, data.numpy().tobytes()
    return value.hex() if isinstance(value, float) else value


def half_written(directory: Path) -> list[str]:
    """Returns the names of files that are not whole."""
    return [str(p.relative_to(directory)) for p in directory.rglob("*") if p.name == ".part" or p.suffix == ".tmp"]


def newest(log_dir: Path) -> tuple[int, Any]:
    """Returns step and content of the checkpoint from which a run would go on; -1 without one."""
    with suppress(InputError):
        if found := checkpoint.newest(log_dir, warn=lambda line: None):
            return int(found[1]["optimizer"]["counters"][0]), found[1]
    return -1, None


def result_of(text: str) -> dict[str, Any]:
    """Returns what eval.py printed as JSON, without where the weights were."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    found.pop("checkpoint", None)
    return found


def last_saved(log_dir: Path) -> int:
    """Returns the last step of which metrics.jsonl says that it was saved; -1 without one."""
    step = -1
    with suppress(OSError):
        for line in (log_dir / "metrics.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if event["event"] == "checkpoint" and Path(event["path"]).name != checkpoint.BEST:
                    step = event["step"]
    return step


def damage(fault: Fault, log_dir: Path) -> None:
    """Does to the directory what comes after the run."""
    chance = random.Random(fault.chance)
    if fault.kind.after == "part":
        name = ".train-00001-of-00016.0123.tmp" if fault.program == "prepare" else ".part"
        if log_dir.is_dir():
            (log_dir / name).write_bytes(chance.randbytes(chance.randint(0, 50_000)))
    elif fault.kind.after and (found := checkpoint.in_directory(log_dir)):
        data = bytearray(found[0].read_bytes())
        if fault.kind.after == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[chance.randrange(len(data)) :]
        found[0].write_bytes(data)


def wrong_code(fault: Fault, code: int | None) -> str:
    """Returns why a run in which it happened must not end with that code; empty if it may."""
    codes = fault.kind.codes
    if fault.kind.event in SIGNALS:
        if fault.place == "any":  # also before it waits for one, and once all is done
            return ""
        if fault.place == "start" or fault.program == "evaluate":
            codes = ()
    if code is None or (code in codes if codes else code != 0):
        return ""
    return f"exit code {code}, which must be {' or '.join(map(str, codes)) or 'another'}"


class Harness:
    """Has what all runs share: pictures, the data made from them, and what undisturbed runs leave.

    work: a directory of its own. keep: also what a run that survived has left and printed.
    """

    def __init__(self, work: Path, keep: bool = False):
        self.work, self.keep, self.lock = work, keep, Lock()
        for split, images in (("train", IMAGES), ("val", VALIDATION)):
            for i in range(images):
                path = work / "pictures" / split / f"class{i % 10}" / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(i, i % 10))
        self.undisturbed = cache(self.undisturbed)  # type: ignore[method-assign]
        self.pool = ThreadPoolExecutor()

    def undisturbed(self, program: str, backend: str, transport: str, ranks: int) -> tuple[float, Any, Path]:
        """Returns seconds, what is left to compare, and the directory, of a run in which nothing happens."""
        name = f"{program}-{backend}-{transport}-{ranks}"
        directory = self.work / name
        fault = Fault(0, KINDS[0], program, backend, transport, ranks, "start", 1, 0, "stop", 0)
        if program == "evaluate":
            shutil.copytree(self.trained(), directory)
        words = command(fault, self.work, self.data(program), directory, quiet=True)
        ended = run(words, self.work / f"{name}.txt", self.work / f"{name}.mark")
        if ended.code != 0:
            raise RuntimeError(f"an undisturbed run fails:\n{shlex.join(words)}\n{ended.text}")
        return ended.seconds, left(program, directory, ended), directory

    def locked(self, *setting: Any) -> tuple[float, Any, Path]:
        with self.lock:
            return self.undisturbed(*setting)

    def data(self, program: str) -> Path:
        return Path() if program == "prepare" else self.undisturbed("prepare", "", "", 1)[2]

    def trained(self) -> Path:
        return self.undisturbed("train", "torch", "torch", 2)[2]

    def disturb(self, fault: Fault) -> dict[str, Any]:
        """Does one run, and the one after it. Returns a row."""
        program = fault.setting[0]
        setting = ("prepare", "", "", 1) if program == "prepare" else fault.setting
        with self.lock:
            data, weights = self.data(program), self.trained() if program == "evaluate" else None
        undisturbed = self.pool.submit(self.locked, *setting)  # the first of a setting takes as long as the others
        directory = self.work / f"run-{fault.number}"
        directory.mkdir()
        log_dir, mark = directory / "run", directory / "mark"
        if weights:
            shutil.copytree(weights, log_dir)
        struck = (fault, undisturbed.result()[0] * fault.at / 1000) if fault.place == "any" else (None, 0.0)
        words = command(fault, self.work, data, log_dir)
        first = run(words, directory / "first.txt", mark, *struck)
        expected = undisturbed.result()[1]
        if not first.happened and fault.at > 1:  # it was over before
            shutil.rmtree(directory)
            return self.disturb(replace(fault, at=fault.at // 2))
        wrong: dict[str, str] = {}
        if (away := log_dir.with_name("run.away")).exists():
            shutil.rmtree(log_dir, ignore_errors=True)
            away.rename(log_dir)
        if log_dir.exists():
            log_dir.chmod(0o755)
        kills = fault.kind.event in ("SIGKILL", "mpiexec", "all", "memory", "SIGSTOP", "vanish", "readonly", "raise")
        if half_written(log_dir) and not kills:
            wrong["half"] = f"{half_written(log_dir)} after the first run"
        saved = last_saved(log_dir)
        if first.happened and (found := wrong_code(fault, first.code)):
            wrong["lost"] = found
        elif first.code == 0 and (found := unlike(expected, left(program, log_dir, first))):
            wrong["lost"] = f"exit code 0, though not all is done: {found}"
        damage(fault, log_dir)
        step, _ = newest(log_dir) if program == "train" else (-1, None)
        allowed = 1 if fault.kind.after in ("flip", "cut") else 0
        if program == "train" and saved > step + allowed:
            wrong["lost"] = f"step {saved} was saved, {step} is what is there"
        again = run(command(fault, self.work, data, log_dir, quiet=True), directory / "again.txt", mark)
        for name, ended in (("first", first), ("second", again)):
            if ended.code is None:
                wrong["hung"] = f"the {name} run"
            if ended.orphans:
                wrong["orphan"] = f"{ended.orphans} of the {name} run"
        if "Traceback" in again.text or ("Traceback" in first.text and not fault.kind.raises):
            wrong["traceback"] = "in the second run" if "Traceback" in again.text else "in the first run"
        if half_written(log_dir):
            wrong["half"] = f"{half_written(log_dir)} after the second run"
        if again.code not in (0, None):
            wrong["lost"] = f"the same command ends with {again.code}"
        elif again.code == 0 and (found := unlike(expected, left(program, log_dir, again))):
            wrong["lost"] = f"other bits: {found}"
        restored = re.search(r"Restored checkpoint \S+-(\d+)\.pt", again.text)
        if program == "train" and (int(restored[1]) if restored else -1) != step and again.code == 0 and step >= 0:
            trained = "is trained" in again.text
            if not trained:
                wrong["lost"] = f"goes on from {restored and restored[1]}, not {step}"
        if not first.happened:
            wrong["missed"] = f"{fault.place} {fault.at}"
        if not wrong and not self.keep:
            shutil.rmtree(directory)
        row = {k: v for k, v in asdict(fault).items() if k not in ("kind", "chance")} | {"kind": fault.kind.title}
        verdict = next((v for v in ("hung", "lost", *VERDICTS[3:]) if v in wrong), "survived")
        row |= {"happened": first.happened, "code": first.code, "seconds": round(first.seconds, 1), "saved": saved}
        row |= {"from": step, "verdict": verdict, "wrong": wrong}
        return row


def left(program: str, directory: Path, ended: Ended) -> Any:
    """Returns what of a run is compared."""
    if program == "prepare":
        return contents(directory)
    return newest(directory)[1] if program == "train" else result_of(ended.text)


def unlike(expected: Any, found: Any) -> str:
    return difference(expected, found, "result")


def picture(seed: int, label: int) -> bytes:
    """Returns a 28 x 28 PNG of noise with a bright bar at the label's place."""
    pixels = torch.randint(0, 100, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels[2 * label + 4 : 2 * label + 6] = 250
    return png(pixels.numpy().tobytes(), 28, 28)


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a line for each kind of fault, and one for all."""
    rows = list(rows)
    lines = []
    for title in [kind.title for kind in KINDS] + ["all"]:
        of_kind = [row for row in rows if title in ("all", row["kind"])]
        if not of_kind:
            continue
        seconds = sorted(row["seconds"] for row in of_kind if row["happened"] and row["code"] is not None)
        line: dict[str, Any] = {"what happens": title, "runs": len(of_kind)}
        line |= {"happened": sum(row["happened"] for row in of_kind)}
        line |= {"survived": sum(row["verdict"] == "survived" for row in of_kind)}
        line |= {verdict: sum(verdict in row["wrong"] for row in of_kind) for verdict in VERDICTS[1:]}
        line["seconds to end, median"] = statistics.median(seconds) if seconds else "-"
        line["longest"] = seconds[-1] if seconds else "-"
        lines.append(line)
    return lines


def code_version() -> str:
    """Returns the last commit of the code that runs, and a digest of what has changed since."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words, "--", *CODE], cwd=ROOT, check=True, capture_output=True).stdout

    changes = git("diff", "HEAD")
    return git("log", "-1", "--format=%h").decode().strip() + (
        f", changed ({hashlib.sha256(changes).hexdigest()[:8]})" if changes else ""
    )


def rows_before(file: Path, seed: int, code: str) -> list[dict[str, Any]]:
    """Returns the rows to go on behind. Raises InputError if they are of another seed, or of other code."""
    if not file.exists():
        return []
    content = json.loads(file.read_text())
    if others := {row["seed"] for row in content["rows"]} - {seed}:
        raise InputError(f"{file} has runs of --seed={others.pop()}: give that, or another --out")
    if (other := content["machine"].get("code")) != code:
        raise InputError(f"{file} has runs of the code at {other}, this is {code}: remove it, or give another --out")
    return content["rows"]


def write(out: Path, rows: list[dict[str, Any]], code: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report.write(str(out / "faults.json"), "faults", rows, code=code)
    report.write_page(out / "faults.md", f"Faults, of the code at {code}", "faults", summary(rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="so many in all (100)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (1)")
    parser.add_argument("--only", type=int, help="this run alone; nothing is written, and its files are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results (benchmarks/results)")
    options = parser.parse_args()
    for kind in KINDS:
        if why := missing(kind):
            print(f"left out: {kind.title}: {why}")
    code = code_version()
    try:
        rows = [] if options.only else rows_before(options.out / "faults.json", options.seed, code)
    except InputError as error:
        parser.error(str(error))
    done = {row["number"] for row in rows}
    numbers = [options.only] if options.only else [n for n in range(1, options.runs + 1) if n not in done]
    work = Path(tempfile.mkdtemp(prefix="nvcnn-faults-"))
    harness = Harness(work, keep=bool(options.only))

    def one(number: int) -> None:
        row = {"seed": options.seed} | harness.disturb(draw(options.seed, number))
        with harness.lock:
            rows.append(row)
            rows.sort(key=lambda row: row["number"])
            if not options.only:
                write(options.out, rows, code)
        what = [row[k] for k in ("program", "backend", "transport", "ranks", "place", "at", "rank")]
        print(f"{number:4d} {row['verdict']:9s} {row['seconds']:6.1f} s  {row['kind']}:", *what, row["wrong"] or "")
        sys.stdout.flush()

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, numbers))
    print(report.table(summary(rows)))
    failed = any(row["verdict"] != "survived" for row in rows)
    if failed or options.only:
        print(f"What they have left and printed is in {work}")
    else:
        shutil.rmtree(work)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
