"""Compiles kernels where there is no GPU, for a machine that has one, into one archive of Triton's cache.

python3 -m benchmarks.gpu pack [--out DIR] [--keys N] [--rings N] [--workers N]

The kernels that `benchmarks.gpu first` and `models` launch, and that `tune` tries first for the heaviest convolutions,
are collected on tensors without memory, compiled for sm_90 in parallel processes, and archived with a key that says
what compiled them. On the GPU machine `benchmarks.gpu` unpacks the archive, prints hits and misses, and compiles what
is missing, all at once; where the key differs, everything is missing. Triton finds an entry by its source, its
specialisation and the compiler's files, wherever the checkout lies. The archive holds no launchers, which are linked
where they run.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver

from benchmarks.instructions import resource_usage
from benchmarks.trace import Launch, compiled
from kernels.implementation import INTERPRETED

CHIP = 90  # H100 and H200
FOLDER = Path(__file__).parents[1] / "build" / "gpu"  # git ignores it
CACHE = FOLDER / "triton"
ARCHIVE = "kernels.tar.xz"
MOST_BYTES = 60_000_000  # of the archive
MOST_SECONDS = 60.0  # to compile one kernel: candidates whose tiles spill take minutes

Lists = dict[str, list[Launch]]  # what each part of `benchmarks.gpu` launches


def key() -> dict[str, str]:
    """Returns what must be equal for Triton to find an entry, in words and in digests."""
    version = sys.version_info
    compiler = str(make_backend(GPUTarget("cuda", CHIP, 32)).hash())  # it contains ptxas's long description of itself
    return {
        "python": f"{version.major}.{version.minor}",
        "triton": triton.__version__,
        "triton's files": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas and chip": " ".join(re.findall(r"\bV[\d.]+|-\d+$", compiler)) or compiler,
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
    }


@dataclass
class Outcome:
    """Counts what became of a list of kernels. `failed` has what the compiler said of each kernel it refused."""

    hits: int = 0
    compiled: int = 0
    failed: dict[Launch, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        words = f"{self.hits} hits, {self.compiled} misses compiled"
        return words + (f", {len(self.failed)} refused" if self.failed else "") + f", {self.seconds:.0f} s"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when the time is up. It works in a process's main thread only."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not compiled in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_one(launch: Launch, spilling: bool = True) -> tuple[bool, str]:
    """Returns whether the kernel was in the cache, and what the compiler said if it refused it.

    spilling: False refuses a kernel that spills registers, too. Where there is a GPU the kernel's launcher is built as
    well, which takes the C compiler 0.3 s.
    """
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        knobs.compilation.store_binary_only = True
        try:
            with limited(MOST_SECONDS):
                kernel = compiled(launch)
                if torch.cuda.is_available():
                    driver.active.launcher_cls(kernel.src, kernel.metadata)
        except Exception as error:  # the compiler raises many classes
            return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    spilled = 0 if spilling else resource_usage(kernel.asm["cubin"])[1]
    return hits == [True], f"{spilled} bytes of spills" if spilled else ""


def workers(count: int) -> ProcessPoolExecutor:
    """Returns a pool of compilers, which are forked from this process.

    Make and use it before this process touches a GPU.
    """
    pool = ProcessPoolExecutor(count, mp_context=get_context("fork"))
    pool.submit(os.getpid).result()  # forks all of them
    return pool


def compile_all(launches: Iterable[Launch], pool: ProcessPoolExecutor, spilling: bool = True) -> Outcome:
    """Compiles the launches in the pool's processes. `spilling` is that of `compile_one`."""
    start, every = time.monotonic(), list(dict.fromkeys(launches))
    outcome = Outcome()
    for launch, (hit, error) in zip(every, pool.map(partial(compile_one, spilling=spilling), every), strict=True):
        outcome.hits += hit
        outcome.compiled += not hit and not error
        if error:
            outcome.failed[launch] = error
    outcome.seconds = time.monotonic() - start
    return outcome


def write(lists: Lists, archive: Path, count: int) -> Outcome:
    """Compiles every launch of the lists, and archives cache, lists and key. Returns what became of the launches."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder, knobs.cache.scope():
        root = Path(folder)
        knobs.cache.dir = str(root / "cache")  # the workers inherit it
        with workers(count) as pool:
            outcome = compile_all((launch for launches in lists.values() for launch in launches), pool)
        (root / "key.json").write_text(json.dumps(key(), indent=1))
        content = {name: [asdict(launch) for launch in dict.fromkeys(found)] for name, found in lists.items()}
        (root / "launches.json").write_text(json.dumps(content))
        part = root / archive.name
        with tarfile.open(part, "w:xz") as tar:
            for name in ("key.json", "launches.json", "cache"):
                tar.add(root / name, name)
        os.replace(part, archive)
    return outcome


def read(archive: Path, cache: Path) -> tuple[Lists, str]:
    """Unpacks the archive into an empty `cache`. Returns its lists, and a line about it.

    There are no lists if there is no archive or its key differs.
    """
    if not archive.exists():
        return {}, f"no {archive.name}: every kernel is compiled here"
    shutil.rmtree(cache, ignore_errors=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder, tarfile.open(archive) as tar:
        root = Path(folder)
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
        # Other kinds, and names with .. or from /, would write elsewhere.
        plain = [one for one in tar if (one.isfile() or one.isdir()) and not {"", ".."} & set(one.name.split("/"))]
        tar.extractall(root, plain)
        theirs, ours = json.loads((root / "key.json").read_text()), key()
        if differing := [f"{name} {theirs.get(name)}, here {value}" for name, value in ours.items()
                         if theirs.get(name) != value]:  # fmt: skip
            return {}, f"{archive.name} does not fit: of {'; of '.join(differing)}: every kernel is compiled here"
        os.replace(root / "cache", cache)
        content = json.loads((root / "launches.json").read_text())
    for group in cache.glob("*/__grp__*"):  # Triton lists an entry's files there, by absolute paths
        files = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in files}}))
    lists = {name: [Launch(**launch) for launch in found] for name, found in content.items()}
    return lists, f"{archive.name}: {sum(1 for _ in cache.glob('*/__grp__*'))} kernels"


def launched(part: str, keys: int = 0, rings: int = 0) -> list[Launch]:
    """Returns what a part of `benchmarks.gpu` launches, of `tune` so many keys and rings."""
    from benchmarks import first, step, tune  # they use this module, too

    if part == "models":
        return [launch for model in step.OTHERS for launch in first.launched_by(model, step.BATCHES[model])]
    return tune.launched(keys, rings) if part == "tune" else first.launched()


def fill(names: Sequence[str], archive: Path, cache: Path, count: int) -> str:
    """Fills `cache` from the archive, and compiles what else these parts launch. Returns a line with hits and misses.

    Raises ValueError where Triton interprets kernels.
    """
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler: unset it")
    lists, line = read(archive, cache)
    if not names:
        return line
    with knobs.cache.scope():
        knobs.cache.dir = str(cache)
        with workers(count) as pool:
            wanted = [lists[name] if name in lists else launched(name) for name in names]
            outcome = compile_all(chain.from_iterable(wanted), pool)
    return f"{line}; {', '.join(names)}: {outcome}" + "".join(
        f"\n  refused: {launch.name[:100]}: {why}" for launch, why in outcome.failed.items()
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu pack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of kernels.tar.xz (build/gpu)")
    parser.add_argument("--keys", type=int, default=10, help="tune: so many configurations, the heaviest (10)")
    parser.add_argument("--rings", type=int, default=2, help="tune: so many steps from the computed one (2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="compilers at a time (one a core)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be compiled")
    asked = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    lists = {part: launched(part, asked.keys, asked.rings) for part in ("first", "tune", "models")}
    for name, launches in lists.items():
        print(f"{name}: {len(set(launches))} kernels, about {2.5 * len(set(launches)) / asked.workers:.0f} s")
    if asked.dry_run:
        return 0
    archive = asked.out / ARCHIVE
    outcome = write(lists, archive, asked.workers)
    size = archive.stat().st_size
    print(f"{archive}: {size / 1e6:.1f} MB; {outcome.compiled} compiled, {len(outcome.failed)} refused, "
          f"{outcome.seconds:.0f} s, for {', '.join(f'{k} {v}' for k, v in key().items())}")  # fmt: skip
    for launch, why in outcome.failed.items():
        print(f"  refused: {launch.name[:100]}: {why}")
    if size > MOST_BYTES:
        print(f"over {MOST_BYTES / 1e6:.0f} MB: give --keys or --rings fewer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # This runs on the GPU machine: it unpacks the archive and compiles what the named parts launch.
    print(fill(sys.argv[1:], FOLDER / ARCHIVE, CACHE, min(14, len(os.sched_getaffinity(0)))))
