"""The host's time is that of the real launches: as many as the step's ops start, of kernels that are not compiled.

And a step that repeats its launches starts what one that binds them anew does.
"""

import json
import os
import subprocess
import sys

PROGRAM = """
import json
from unittest import mock
import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from benchmarks import host
from benchmarks.trace import launches, meta_step, step_calls
from kernels import operators
from nvcnn.roofline import layouts

def layout_of(argument):
    if isinstance(argument, TensorDescriptor):
        return layouts((argument.base, argument.shape, argument.strides, argument.block_shape))
    return layouts(argument)

def layouts_of(step):
    # What each launch of three steps is started with.
    data, steps = host.batch_for(step), []

    def run(self, *arguments):
        grid, started = arguments[:3], arguments[9:]
        steps[-1].append((grid, [layout_of(argument) for argument in started]))

    with host.idle_gpu(), mock.patch.object(host.NoKernel, "run", run):
        for _ in range(3):
            steps.append([])
            step(data)
    return steps


before = JITFunction._do_compile, operators.traced, torch.empty_like
times, count = host.measure(meta_step("resnet18", host.BATCH, torch.float16, conv="triton"), steps=2)
ours = [call for call in step_calls("resnet18", host.BATCH, torch.float16, "triton") if call.name.startswith("nvcnn::")]
expected = sum(len(launches(call, 90)) for call in ours)
restored = before == (JITFunction._do_compile, operators.traced, torch.empty_like)
first, *later = layouts_of(meta_step("resnet18", host.BATCH, torch.float16, conv="triton"))
kinds = [repetition is not None for each in operators.operators.values() for repetition in each.repetitions.values()]
same = [first == step for step in later]
print(json.dumps({"same": same, "launches": len(first), "repeated": all(kinds), "kinds": len(kinds)}))
print(json.dumps({"times": times, "count": count, "expected": expected, "restored": restored}))
"""


def test_a_step_makes_its_launches():
    """It runs in a process of its own, since the interpreter stands in for the compiler in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    again, found = map(json.loads, run.stdout.splitlines()[-2:])
    assert again["same"] == [True, True]
    assert again["launches"] == found["count"]
    assert again["repeated"]
    assert again["kinds"] > 50
    assert found["count"] == found["expected"] > 100
    assert len(found["times"]) == 2
    assert min(found["times"]) > 0
    assert found["restored"]
