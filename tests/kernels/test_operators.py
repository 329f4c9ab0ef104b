"""An operator made of an op of the test's own: y = factor x."""

import pytest
import torch
from torch import Tensor

from kernels.operators import operator, operators


@operator("test_scaled")
def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    """Its launcher's docstring."""
    return x * factor


@scaled.register_fake
def _(x, factor=2.0):
    return torch.empty_like(x)


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
