"""Measures what a checkpoint costs: from the weights on their device to a file that a power cut leaves.

python -m benchmarks.saving [MODEL ...] [--dir DIR] [--times 5] [--json FILE]

One rank saves as training does, into DIR (by default one of its own, below this one), whose disk counts. "copy" is the
state, from the device to the host; "digest" reads the file once, as loading it does, and is a part of saving. Times
are the least; "processor" is the mean time of the processor in saving, which others at work on the machine change less.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import report
from nvcnn import checkpoint
from nvcnn.distributed import Transport
from nvcnn.metrics import Metrics
from nvcnn.program import Launch
from nvcnn.settings import Settings
from nvcnn.train import Run


def seconds(call: Callable[[], object], times: int) -> tuple[float, float]:
    """Returns the least time of so many calls, behind one that does not count, and their mean of the processor's."""
    call()
    found, processor = [], time.process_time()
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found), (time.process_time() - processor) / times


def measure(model: str, log_dir: str, times: int) -> dict[str, Any]:
    """Returns the row of a model."""
    run = Run(Settings(model=model, conv="torch", batch_size=1, log_dir=log_dir), None, Transport(Launch()), None)
    metrics, path = Metrics(log_dir, steps=1, first_step=0, rank=0), checkpoint.path_of(Path(log_dir), 0)
    save, processor = seconds(lambda: run.save(metrics, must=True), times)
    copy, _ = seconds(run.train_step.state_dict, times)
    digest, _ = seconds(lambda: checkpoint.verified(path), times)
    row: dict[str, Any] = {"model": model, "device": str(run.device), "MB": f"{path.stat().st_size / 1e6:.1f}"}
    return row | {"save s": save, "processor s": processor, "copy s": copy, "digest s": digest}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet50", "lenet"])
    parser.add_argument("--dir", default=".", help="where the files are written (.)")
    parser.add_argument("--times", type=int, default=5, help="saves (5)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as log_dir, redirect_stdout(StringIO()):
            rows.append(measure(model, log_dir, arguments.times))
    if arguments.json:
        report.write(arguments.json, "saving", rows)
    print(report.table([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
