"""Searches for bytes that a target does not refuse as it should, by coverage (atheris, libFuzzer).

    python -m tests.fuzz.run [--seconds=60] [TARGET ...]

What it has tried goes into .fuzz/TARGET/, and what was found into .fuzz/: mend it, and keep the file as
tests/fuzz/found/TARGET-WHAT. Ends with exit code 1 if anything was found, and 2 where atheris is not installed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOUND = ROOT / ".fuzz"
SECONDS, MEGABYTES = 10, 3000  # of one input, beyond which it is a finding
INSTRUMENTED = ["nvcnn", "tests", "yaml", "tarfile"]  # torch as a whole would take a minute


def search(name: str, seconds: int) -> None:
    """Searches in this process, which ends with it."""
    import atheris
    from torch._weights_only_unpickler import Unpickler

    Unpickler.load = atheris.instrument_func(Unpickler.load)
    sys.modules.pop("tarfile")  # atheris has it already
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz import targets
    target = next(target for target in targets.TARGETS if target.__name__ == name)
    corpus = FOUND / name
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        folder = Path(directory)
        for n, seed in enumerate(targets.TARGETS[target](folder)):
            (corpus / f"seed-{n}").write_bytes(seed)

        def one(data: bytes) -> None:
            for file in folder.iterdir():
                file.unlink()
            with open(os.devnull, "w") as quiet, redirect_stderr(quiet), suppress(*targets.REFUSED):
                target(data, folder)

        limits = f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", "-max_len=65536"
        atheris.Setup([name, *limits, f"-artifact_prefix={FOUND}/{name}-", "-print_final_stats=1", str(corpus)], one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="those of targets.py; none: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.here:
        search(flags.targets[0], flags.seconds)
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        print(f"make fuzz needs atheris ({error}): pip install -c constraints.txt atheris", file=sys.stderr)
        return 2
    from tests.fuzz.targets import TARGETS

    bad = 0
    FOUND.mkdir(exist_ok=True)
    for name in flags.targets or [target.__name__ for target in TARGETS]:
        search_one = [sys.executable, "-m", "tests.fuzz.run", name, f"--seconds={flags.seconds}", "--here"]
        log = FOUND / f"{name}.log"
        with open(log, "w") as file:
            code = subprocess.run(["nice", "-n", "10", *search_one], cwd=ROOT, stdout=file, stderr=file).returncode
        tried = re.search(r"executed_units: (\d+)", log.read_text(errors="replace"))
        print(f"{name:16} {tried[1] if tried else '?':>9} inputs:", f"see {log}" if code else "nothing", flush=True)
        bad += code != 0
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
