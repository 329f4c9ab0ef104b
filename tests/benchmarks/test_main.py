"""`python -m benchmarks` lists all benchmarks and runs one."""

import subprocess
import sys


def benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], capture_output=True, text=True)


def test_it_lists_what_can_be_run_and_runs_it():
    listed = benchmarks()
    names = {line.split()[0] for line in listed.stdout.splitlines()[1:]}
    assert names >= {
        "codegen",
        "count",
        "data",
        "gpu",
        "host",
        "layers",
        "predict",
        "probes",
        "roofline",
        "step",
        "tune",
    }
    assert not names & {"instructions", "report", "timing", "trace", "conftest", "__main__"}
    assert all(len(line.split()) > 4 for line in listed.stdout.splitlines()[1:])
    counted = benchmarks("count")
    assert counted.returncode == listed.returncode == 0
    assert "product" in counted.stdout
    assert benchmarks("cuont").returncode == 2
