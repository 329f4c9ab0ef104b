"""An operator made of an op of the test's own: y = factor x."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.operators import operator, operators


@operator("test_scaled")
def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    """Its launcher's docstring."""
    return x * factor


def setup_context(ctx, inputs, output):
    ctx.factor = inputs[1] if len(inputs) > 1 else 2.0
    ctx.save_for_backward(output)


def backward(ctx, dy):
    assert len(ctx.saved_tensors) == 1
    return dy * ctx.factor, None


scaled.register_autograd(backward, setup_context=setup_context)


def test_it_is_the_operator_and_its_launcher():
    x = torch.randn(3)
    assert torch.equal(torch.ops.nvcnn.test_scaled(x), 2 * x)
    assert torch.equal(scaled(x, factor=3.0), 3 * x)
    assert torch.equal(operators["nvcnn::test_scaled"].launcher(x), 2 * x)
    assert scaled.__doc__ == "Its launcher's docstring."


def test_gradients_by_position_by_name_and_by_default():
    for arguments, keywords, factor in (((5.0,), {}, 5), ((), {"factor": 3.0}, 3), ((), {}, 2)):
        x = torch.randn(3, requires_grad=True)
        scaled(x, *arguments, **keywords).backward(torch.tensor([1.0, 2.0, 3.0]))
        assert x.grad.tolist() == [factor, 2 * factor, 3 * factor]


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert scaled(x).grad_fn is None
    assert scaled(x.detach()).grad_fn is None
    assert scaled(x).grad_fn is not None


def test_opcheck():
    torch.library.opcheck(scaled.overload, (torch.randn(3, requires_grad=True), 3.0))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_compiler_traces_it(requires_grad):
    compiled = torch.compile(lambda x: scaled(x + 1).sum(), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, requires_grad=requires_grad)
    total = compiled(x)
    assert total.item() == pytest.approx(float(2 * (x.detach() + 1).sum()))
    if requires_grad:
        total.backward()
        assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_it_exports():
    class Module(torch.nn.Module):
        def forward(self, x):
            return scaled(x, 4.0)

    program = torch.export.export(Module(), (torch.randn(3),))
    assert "nvcnn.test_scaled" in str(program.graph)


HASHES = """
import pkgutil, sys
from importlib import import_module
import triton, kernels
modules = [import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
functions = [value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)]
for function in functions[:: int(sys.argv[1])]:
    function.cache_key
for function in functions:
    print(function.module, function.fn.__qualname__, function.cache_key)
"""


def test_a_kernel_has_the_same_name_in_tritons_cache_whatever_was_launched_before():
    """They are hashed from the first to the last, and the other way round."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", HASHES]
    one, other = (
        subprocess.run([*command, step], env=environment, capture_output=True, text=True, check=True).stdout
        for step in ("1", "-1")
    )
    assert one == other
    assert one.count("kernel ") > 15
