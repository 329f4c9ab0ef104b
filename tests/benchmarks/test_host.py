"""The host's time is that of the real launches: as many as the step's ops start, of kernels that are not compiled."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json
import torch
from triton.runtime.jit import JITFunction
from benchmarks import host
from benchmarks.trace import launches, meta_step, step_calls
from kernels import operators

before = JITFunction._do_compile, operators.traced, torch.empty_like
times, count = host.measure(meta_step("resnet18", host.BATCH, torch.float16, conv="triton"), steps=2)
ours = [call for call in step_calls("resnet18", host.BATCH, torch.float16, "triton") if call.name.startswith("nvcnn::")]
expected = sum(len(launches(call, 90)) for call in ours)
restored = before == (JITFunction._do_compile, operators.traced, torch.empty_like)
print(json.dumps({"times": times, "count": count, "expected": expected, "restored": restored}))
"""


def test_a_step_makes_its_launches():
    """In a process of its own: in this one the interpreter stands in for the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["count"] == found["expected"] > 100
    assert len(found["times"]) == 2
    assert min(found["times"]) > 0
    assert found["restored"]
