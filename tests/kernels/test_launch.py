"""What a launcher did is repeated for other tensors of the same form, to the same values, and for no others."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.convolution import convolution
from kernels.launch import launch, silent
from kernels.operators import operator
from tests.kernels.convolutions import OF_ONE_IMAGE, configured

calls: list[str] = []


@triton.jit
def scale_kernel(x, bias, y, n, stride, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, mask=at < n) * factor
    if bias is not None:
        value += tl.load(bias)
    if TWICE:
        value *= 2
    tl.store(y + at, value, mask=at < n)


@operator("test_rows")
def rows(x: Tensor, factor: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns factor x + bias, as the second row of a new tensor, by way of another tensor; and twice as much."""
    calls.append("rows")
    if x.dim() != 1:
        raise ValueError("test_rows: x has one dimension")
    n, grid = len(x), (triton.cdiv(len(x), 16),)
    between, result = x.new_empty(n), x.new_empty((2, n))
    launch(scale_kernel, grid, x, bias, between, n, x.stride(0), factor, BLOCK=16, num_warps=1)
    launch(scale_kernel, grid, between, None, result[1], n, 1, 1.0, BLOCK=16)
    twice = torch.empty(n, dtype=x.dtype, device=x.device)
    launch(scale_kernel, grid, between, None, twice, n, 1, 1.0, BLOCK=16, TWICE=True)
    return result, twice


@operator("test_tails")
def tails(x: Tensor, factor: float) -> Tensor:
    """Returns factor x of the second half of x."""
    calls.append("tails")
    half = len(x) // 2
    y = torch.empty(half, dtype=x.dtype, device=x.device)
    launch(scale_kernel, (triton.cdiv(half, 16),), x[half:], None, y, half, 1, factor, BLOCK=16)
    return y


@operator("test_computes")
def computes(x: Tensor, in_place: bool) -> Tensor:
    """Returns 3 x + 1, of which PyTorch does the addition."""
    calls.append("computes")
    y = torch.empty_like(x)
    launch(scale_kernel, (triton.cdiv(len(x), 16),), x, None, y, len(x), 1, 3.0, BLOCK=16)
    return y.add_(1) if in_place else y + 1


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    calls.clear()


def check(x: Tensor, bias: Tensor | None = None, **named: Tensor) -> None:
    result, twice = rows(x, 3.0, bias, **named) if named or bias is not None else rows(x, 3.0)
    expected = 3 * x if bias is None else 3 * x + bias
    torch.testing.assert_close(result[1], expected)
    torch.testing.assert_close(twice, 2 * expected)


def test_the_launcher_runs_once_for_all_tensors_of_a_form(device):
    for _ in range(3):
        check(torch.randn(40, device=device))
    assert calls == ["rows"]


def test_another_form_has_the_launcher_run_again(device):
    x, bias = torch.randn(40, device=device), torch.randn(1, device=device)
    forms = [(x,), (x[:39],), (x[1:40],), (x.half(),), (x, bias), (torch.randn(80, device=device)[::2],)]
    for _ in range(2):
        for arguments in forms:
            check(*arguments)
    assert len(calls) == len(forms)
    rows(x, 4.0)
    torch.testing.assert_close(rows(x, bias=bias, factor=2.0)[0][1], 2 * x + bias)
    assert len(calls) == len(forms) + 2


def test_a_tensor_given_twice_need_not_be_the_next_time(device):
    one, other = torch.randn(1, device=device), torch.randn(1, device=device)
    for bias in (one, other):
        torch.testing.assert_close(rows(one, 3.0, bias)[0][1], 3 * one + bias)
    assert calls == ["rows"]


def test_views_are_of_the_tensors_that_are_given(device):
    """Tensors of one form may lie anywhere in their storage, as weights and their gradients do."""
    whole = torch.randn(4, 40, device=device)
    for x in (whole[2], whole[0], torch.randn(40, device=device), whole[3]):
        torch.testing.assert_close(tails(x, 3.0), 3 * x[20:])
    assert calls == ["tails"]


def test_results_are_new_each_time(device):
    x = torch.randn(40, device=device)
    first, second, third = (rows(x, 3.0) for _ in range(3))
    assert len({t.data_ptr() for pair in (first, second, third) for t in pair}) == 6


@pytest.mark.parametrize("in_place", [False, True])
def test_what_computes_otherwise_is_not_repeated(device, in_place):
    for _ in range(3):
        x = torch.randn(40, device=device)
        torch.testing.assert_close(computes(x, in_place), 3 * x + 1)
    assert calls == ["computes"] * 3


def test_arguments_of_other_names_are_another_form(device):
    x, weight = (torch.ones(shape, device=device) for shape in ((1, 16, 2, 2), (16, 16, 1, 1)))
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    two = torch.full((16,), 2.0, device=device)
    for _ in range(2):
        assert (convolution(x, weight, (1, 1), (0, 0), scale=two)[0] == 32).all()
        assert (convolution(x, weight, (1, 1), (0, 0), shift=two)[0] == 18).all()


def test_an_error_leaves_nothing_behind(device):
    for _ in range(2):
        with pytest.raises(ValueError, match="one dimension") as caught:
            rows(torch.zeros(2, 2, device=device), 3.0)
        assert caught.value.__context__ is None
    check(torch.randn(40, device=device))
    assert calls == ["rows"] * 3


def test_a_list_is_looked_at_each_time(device):
    x = torch.randn(1, 16, 4, 4, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 1, 1, device=device).to(memory_format=torch.channels_last)
    stride = [1, 1]
    assert convolution(x, weight, stride, [0, 0])[0].shape == (1, 16, 4, 4)
    stride[:] = 2, 2
    assert convolution(x, weight, stride, [0, 0])[0].shape == (1, 16, 2, 2)


def test_descriptors_are_those_of_the_tensors_that_are_given(device):
    made = []
    for again in (True, False):
        torch.manual_seed(1)
        with configured(**OF_ONE_IMAGE):
            for _ in range(2):
                x = torch.randn(2, 16, 5, 6, device=device, dtype=torch.float16)
                weight = torch.randn(16, 16, 3, 3, device=device, dtype=torch.float16)
                x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
                call = convolution if again else convolution.launcher
                made.append(call(x, weight, (1, 1), (1, 1))[0])
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[3])
    assert not torch.equal(made[0], made[1])


def test_what_is_no_argument_of_a_kernel_is_refused(device):
    """Triton's interpreter would take it."""
    x = torch.ones(1, device=device)
    with pytest.raises(KeyError, match="PERSISTENT"):
        launch(scale_kernel, (1,), x, None, x, 1, 1, 2.0, BLOCK=16, PERSISTENT=0)


def test_silent_launches_start_nothing(device):
    with silent():
        launch(scale_kernel, (1,), torch.zeros(1, device=device))
    with pytest.raises(TypeError):  # arguments are missing
        launch(scale_kernel, (1,), torch.zeros(1, device=device))
