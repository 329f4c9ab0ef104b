import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import global_average
from kernels.global_average import backward_reference, reference
from tests.kernels.images import DTYPES, SHAPES, SMALLEST, channels_last, integers, on, randn, unit


def gradient(x, dy):
    x = x.clone().requires_grad_()
    y = global_average(x)
    y.backward(dy)
    return x.grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_exact_on_integers(implementation, device, dtype):
    x = 16 * integers((3, 37, 4, 8), dtype, device, -2, 2)
    dy = 32 * integers((3, 37, 1, 1), dtype, device)[..., 0, 0]
    assert torch.equal(global_average(x), x.double().mean((2, 3)).to(dtype))
    assert torch.equal(gradient(x, dy), (dy / 32)[..., None, None].expand_as(x))


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_is_as_close_as_its_dtypes_allow(implementation, device, shape, dtype, seed):
    torch.manual_seed(seed)
    x, dy = randn(shape, dtype, device), torch.randn(shape[:2], device=device).to(dtype)
    rounding, pixels = unit(dtype, implementation), shape[2] * shape[3]
    exact, terms = reference(x.double()), reference(x.double().abs())
    # The sum carries a rounding for each addition, at most one per pixel; then the inverse, the product, the result.
    bound = (pixels + 2) * 2.0**-24 * terms + rounding * exact.abs() + SMALLEST[dtype]
    assert ((global_average(x).double() - exact).abs() <= bound).all()
    exact = backward_reference(dy.double(), *shape[2:])
    bound = (rounding + 2 * 2.0**-24) * exact.abs() + SMALLEST[dtype]
    got = gradient(x, dy)
    assert ((got.double() - exact).abs() <= bound).all()
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_channel_alone(implementation, device, value):
    x = randn((2, 33, 3, 5), torch.float16, device)
    x[1, 32, 2, 4] = value
    y = global_average(x)
    assert torch.equal(y[1, 32], torch.tensor(value, device=device, dtype=x.dtype)) or y[1, 32].isnan()
    assert y.isfinite().sum() == y.numel() - 1


def test_the_sum_may_leave_fp16(implementation, device):
    x = channels_last(torch.full((1, 3, 7, 7), 60000.0, device=device).half())
    assert torch.equal(global_average(x), x[..., 0, 0])


def test_two_runs_give_the_same_bits(implementation, device):
    x = randn((3, 40, 9, 9), torch.float32, device)
    assert torch.equal(global_average(x), global_average(x))


def test_gradcheck(device, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    x = channels_last(torch.randn(2, 3, 4, 2, dtype=torch.float64, device=device)).requires_grad_()
    assert torch.autograd.gradcheck(global_average, x)


def test_opcheck(implementation, device):
    for op, arguments in (
        (global_average.overload, (randn((2, 5, 3, 3), torch.float32, device).requires_grad_(),)),
        (torch.ops.nvcnn.global_average_backward, (torch.randn(2, 5, device=device), 3, 4)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 4, 3, 3), "x must be channels-last, got strides"),
        (torch.randn(2, 4, 3), r"x must be \(N, C, H, W\)"),
        (channels_last(torch.randn(2, 4, 3, 0)), "none of them 0"),
        (channels_last(torch.ones(2, 4, 3, 3).long()), "x must be one of torch.float16.*got torch.int64"),
        (torch.randn(1, 4, 1, 1).expand(2, 4, 3, 3), "x must be channels-last"),
    ],
)
def test_refuses(device, x, message):
    with pytest.raises(ValueError, match=message):
        global_average(on(x, device))
