import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    batch_norm,
    batch_norm_gradient_sums,
    max_pool,
    max_pool_backward,
    max_pool_into,
    max_pool_with_argmax,
)
from tests.kernels.images import (
    DTYPES,
    SLICES,
    SMALLEST,
    channels_last,
    integers,
    on,
    poisoned,
    randn,
    slice_of,
    unit,
)

STEM, INCEPTION, LENET, GOOGLENET = (3, 2, 1), (3, 2, 0), (2, 2, 0), (3, 1, 1)
FLOORED = (STEM, INCEPTION, LENET, GOOGLENET, (1, 2, 0), (5, 2, 2), (5, 3, 0), (2, 3, 1), (4, 5, 2))
# Those with ceil_mode end in True. The last has no window that begins in the padding behind 6 or 13 pixels.
WINDOWS = (*FLOORED, (*INCEPTION, True), (*LENET, True), (4, 5, 2, True))
# (N, C, H, W): the widths of a vector of channels and of none, rows and columns that are left over, single pixels.
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 17]), st.integers(1, 9), st.integers(1, 9))


@st.composite
def cases(draw):
    """Draws a window, and a shape that it fits into."""
    kernel_size, stride, padding, *ceil_mode = window = draw(st.sampled_from(WINDOWS))
    n, c, h, w = draw(SHAPES)
    least = kernel_size - 2 * padding - (stride - 1 if ceil_mode else 0)
    return window, (n, c, max(h, least), max(w, least))


def pooled(pool, x, dy=None):
    """Returns y and dx, of a dy of ones or of this one."""
    x = x.clone().requires_grad_()
    y = pool(x)
    y.backward(torch.ones_like(y) if dy is None else dy)
    return y.detach(), x.grad


def peer(window):
    return lambda x: F.max_pool2d(x, *window[:3], ceil_mode=len(window) == 4)


def ours(window):
    return lambda x: max_pool(x, *window)


@pytest.mark.parametrize(("window", "dtype"), [*zip(WINDOWS, 4 * DTYPES, strict=True)])
def test_is_exact_on_integers(implementation, device, window, dtype):
    x = integers((2, 17, 9, 6), dtype, device, -3, 3)  # many equal ones in a window
    dy = integers(peer(window)(x).shape, dtype, device)
    y, dx = pooled(ours(window), x, dy)
    exact = pooled(peer(window), x.double(), dy.double())
    assert torch.equal(y.double(), exact[0])
    assert torch.equal(dx.double(), exact[1])
    assert y.dtype == dx.dtype == dtype
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx))
    assert torch.equal(max_pool(x, *window), y)  # without a gradient


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_is_as_close_as_its_dtypes_allow(implementation, device, case, dtype, seed):
    torch.manual_seed(seed)
    window, shape = case
    x = randn(shape, dtype, device)
    dy = randn(peer(window)(x).shape, dtype, device)
    y, dx = pooled(ours(window), x, dy)
    exact, gradient = pooled(peer(window), x.double(), dy.double())
    terms = pooled(peer(window), x.double(), dy.double().abs())[1]
    assert torch.equal(y.double(), exact)
    # As many windows over a pixel, each an addition: of fp32 here, of dtype in PyTorch. Then the cast.
    windows, rounding = (-(-window[0] // window[1])) ** 2, unit(dtype, implementation)
    addition = 2.0**-24 if implementation == "triton" else rounding
    bound = (windows - 1) * addition * terms * (1 + rounding) ** windows + rounding * gradient.abs() + SMALLEST[dtype]
    assert ((dx.double() - gradient).abs() <= bound).all()
    if dtype == torch.float32:  # the windows are added in PyTorch's order
        assert torch.equal(dx, pooled(peer(window), x, dy)[1])


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_values_that_are_not_finite_are_as_in_pytorch(implementation, device, case, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    window, shape = case
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf, -0.0, 0.0, 1.0])
    chosen = torch.randint(len(values), shape, generator=generator)
    x = channels_last(values[chosen].to(device, dtype))
    # In a window of -inf alone PyTorch's CPU kernel, as ours, takes the first value; its CUDA one takes the image's.
    expected = pooled(peer(window), x.cpu() if implementation == "triton" else x)
    for got, value in zip(pooled(ours(window), x), expected, strict=True):
        torch.testing.assert_close(got, value.to(device), rtol=0, atol=0, equal_nan=True)


def pooled_raw(window, x, norm, dy):
    """Returns y, the places of the maxima, g and its sums, of a raw x."""
    y, argmax = max_pool_with_argmax(x, *window[:3], True, norm, *window[3:])
    return y, argmax, *max_pool_backward(dy, argmax, *x.shape[2:], *window[:3], x, norm)


@pytest.mark.parametrize(("window", "dtype"), [*zip(WINDOWS, 4 * DTYPES, strict=True)])
def test_a_raw_tensor_is_exact_on_integers(implementation, device, window, dtype):
    """Scales are of either sign and 0, so that padding is seen where it is normalised, too."""
    x, rows = integers((3, 17, 9, 13), dtype, device, -3, 3), torch.randint(-2, 3, (5, 17), device=device).float()
    mean, scale, shift = (row.view(-1, 1, 1).double() for row in rows[:3])
    dy = integers(peer(window)(x).shape, dtype, device)
    v = ((x.double() - mean) * scale + shift).requires_grad_()
    exact = peer(window)(v.relu())
    exact.backward(dy.double())
    y, _, g, sums = pooled_raw(window, x, rows, dy)
    assert torch.equal(y.double(), exact)
    assert torch.equal(g.double(), v.grad)
    products = v.grad * (x.double() - mean)
    assert torch.equal(sums.double().sum(1), torch.stack([t.sum((0, 2, 3)) for t in (v.grad, products)]))
    assert y.dtype == g.dtype == dtype
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, g))
    assert torch.equal(max_pool_with_argmax(x, *window[:3], False, rows, *window[3:])[0], y)


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_a_raw_tensor_gives_the_bits_of_its_activation(implementation, device, case, dtype, seed):
    """Values are equal once they are rounded, and some are not finite."""
    torch.manual_seed(seed)
    window, shape = case
    x = randn(shape, dtype, device)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device, dtype=dtype)
    chosen = torch.rand(shape, device=device) < 0.02
    x = channels_last(torch.where(chosen, special[torch.randint(3, shape, device=device)], x))
    norm = torch.randn(5, shape[1], device=device)
    norm[1] *= 2.0 ** -torch.randint(9, (shape[1],), device=device)
    norm[2] += 1
    a = batch_norm(x, norm[0], norm[0], norm, None, True, True)
    y, argmax = max_pool_with_argmax(a, *window[:3], True, None, *window[3:])
    dy = randn(y.shape, dtype, device)
    dx, _ = max_pool_backward(dy, argmax, *shape[2:], *window[:3])
    g, sums, _ = batch_norm_gradient_sums(dx, x, None, norm, True)
    *got, got_sums = pooled_raw(window, x, norm, dy)
    for ours, theirs in zip(got, (y, argmax, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    terms = torch.stack([t.double().abs().sum((0, 2, 3)) for t in (g, g * (x.float() - norm[0].view(-1, 1, 1)))])
    difference = (got_sums.double().sum(1) - sums.double().sum(1)).abs()
    assert (difference <= 2.0**-20 * terms)[terms.isfinite()].all()
    assert torch.equal(got_sums.sum(1).isfinite(), sums.sum(1).isfinite())


def test_sums_are_of_the_gradient_as_it_is_stored(implementation, device):
    x = channels_last(torch.zeros(1, 8, 3, 3, dtype=torch.float16, device=device))
    dy, norm = x.clone(), torch.ones(5, 8, device=device)
    x[..., 1, 1], norm[0] = 1, 0
    dy[..., 0, 0], dy[..., 2, 2] = 1, 2**-12
    *_, g, sums = pooled_raw(GOOGLENET, x, norm, dy)
    assert torch.equal(g, x)
    assert torch.equal(sums.sum(1), torch.ones(2, 8, device=device))


def test_a_gradient_that_is_not_finite_stays_with_its_maximum(implementation, device):
    x = channels_last(torch.arange(2 * 3 * 7 * 7, device=device).view(2, 3, 7, 7).float())
    dy = torch.ones_like(max_pool(x, *STEM))
    dy[0, 1, 2, 2] = torch.nan
    dx = pooled(ours(STEM), x, dy)[1]
    assert dx.isnan().nonzero().tolist() == [[0, 1, 5, 5]]


def test_a_gradient_may_have_another_layout(implementation, device):
    x, weight = randn((2, 5, 6, 6), torch.float32, device).requires_grad_(), torch.randn(45, 2, device=device)
    gradients = [torch.autograd.grad((pool(x).flatten(1) @ weight).sum(), x)[0] for pool in (ours(STEM), peer(STEM))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("pitch", "channels", "first"), SLICES)
def test_a_gradient_may_be_a_slice(implementation, device, pitch, channels, first):
    x, dy = (randn((2, channels, *size), torch.float16, device) for size in ((7, 6), (4, 3)))
    sliced, norm = slice_of(poisoned(dy, pitch), dy, first), torch.rand(5, channels, device=device)
    for raw in (None, norm):
        _, argmax = max_pool_with_argmax(x, *STEM, True, raw)
        others = (argmax, 7, 6, *STEM, None if raw is None else x, raw)
        for got, expected in zip(max_pool_backward(sliced, *others), max_pool_backward(dy, *others), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("window", [INCEPTION, (*INCEPTION, True), STEM], ids=str)
@pytest.mark.parametrize(("pitch", "channels", "first"), SLICES)
def test_what_is_pooled_may_be_written_to_a_slice(implementation, device, pitch, channels, first, window):
    """It is what is returned without, values that are not finite, too; its neighbours are left alone."""
    x = integers((2, channels, 8, 7), torch.float16, device, -3, 3)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.inf], device=device, dtype=x.dtype)
    drawn = torch.rand(x.shape, device=device) < 0.5
    x = channels_last(torch.where(drawn, special[torch.randint(4, x.shape, device=device)], x))
    x[0, :, :3, :3] = -torch.inf
    others = [*range(first), *range(first + channels, pitch)]
    for with_argmax, norm in ((True, None), (False, None), (True, torch.rand(5, channels, device=device))):
        how = *window[:3], with_argmax, norm, len(window) == 4
        y, argmax = max_pool_with_argmax(x, *how)
        whole = poisoned(y, pitch).fill_(1e4)  # y has NaN, and no 1e4
        written = whole[:, first : first + channels]
        assert torch.equal(max_pool_into(x, *how, written), argmax)
        torch.testing.assert_close(written, y, rtol=0, atol=0, equal_nan=True)
        assert (whole[:, others] == 1e4).all()


def test_the_largest_window(implementation, device):
    window, x = (15, 15, 7), integers((1, 2, 31, 16), torch.float32, device)
    for got, expected in zip(pooled(ours(window), x), pooled(peer(window), x), strict=True):
        assert torch.equal(got, expected)


class Calls(TorchDispatchMode):
    """Keeps the arguments of each call of max_pool's op."""

    def __init__(self):
        super().__init__()
        self.arguments = []

    def __torch_dispatch__(self, op, types, arguments=(), others=None):
        if op is torch.ops.nvcnn.max_pool.default:
            self.arguments.append(arguments)
        return op(*arguments, **(others or {}))


def test_the_backward_keeps_one_byte_a_value_and_nothing_without_a_gradient(implementation, device):
    saved = []
    x = randn((2, 16, 8, 8), torch.float16, device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), Calls() as calls:
        max_pool(x, *STEM)
        max_pool(x.detach(), *STEM)
        with torch.no_grad():
            max_pool(x, *STEM)
    assert [with_argmax for *_, with_argmax in calls.arguments] == [True, False, False]
    assert [t.shape for t in saved] == [(2, 16, 4, 4)]
    assert saved[0].dtype == (torch.uint8 if implementation == "triton" else torch.int64)
    assert torch.ops.nvcnn.max_pool(x, *STEM, False)[1].shape == (0,)


def test_two_runs_give_the_same_bits(implementation, device):
    x = randn((3, 40, 9, 9), torch.float16, device)
    norm, dy = torch.rand(5, 40, device=device), randn((3, 40, 5, 5), torch.float16, device)
    one, other = ((*pooled(ours(STEM), x), *pooled_raw(STEM, x, norm, dy)) for _ in range(2))
    assert all(map(torch.equal, one, other))


def test_gradcheck(device, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    x = torch.randperm(2 * 5 * 4, device=device).view(1, 2, 5, 4).double()  # none near another
    assert torch.autograd.gradcheck(ours(STEM), channels_last(x).requires_grad_())


def test_opcheck(implementation, device):
    x = randn((2, 5, 6, 5), torch.float32, device)
    y, argmax = torch.ops.nvcnn.max_pool(x, *STEM, True)
    norm = torch.rand(5, 5, device=device)
    for op, arguments in (
        (torch.ops.nvcnn.max_pool, (x.requires_grad_(), *STEM, True)),
        (torch.ops.nvcnn.max_pool, (x.detach(), *STEM, False)),
        (torch.ops.nvcnn.max_pool, (x.detach(), *STEM, True, norm)),
        (torch.ops.nvcnn.max_pool, (x.detach().requires_grad_(), *INCEPTION, True, None, True)),
        (torch.ops.nvcnn.max_pool_into, (x.detach(), *STEM, True, norm, False, poisoned(y, 16)[:, 8:13])),
        (torch.ops.nvcnn.max_pool_backward, (y, argmax, 6, 5, *STEM)),
        (torch.ops.nvcnn.max_pool_backward, (y, argmax, 6, 5, *STEM, x.detach(), norm)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("x", "window", "message"),
    [
        (torch.randn(2, 4, 3, 3), STEM, "x must be channels-last, got strides"),
        (channels_last(torch.ones(2, 4, 3, 3)), (3, 2, 2), "padding 0 .. kernel_size // 2; got 3, 2, 2"),
        (channels_last(torch.ones(2, 4, 3, 3)), (3, 2, -1), "padding 0 .. kernel_size // 2; got 3, 2, -1"),
        (channels_last(torch.ones(2, 4, 20, 20)), (16, 2, 0), "kernel_size and stride must be 1 .. 15.*got 16, 2, 0"),
        (channels_last(torch.ones(2, 4, 20, 20)), (0, 1, 0), "kernel_size and stride must be 1 .. 15.*got 0, 1, 0"),
        (channels_last(torch.ones(2, 4, 20, 20)), (2, 0, 0), "kernel_size and stride must be 1 .. 15.*got 2, 0, 0"),
        (channels_last(torch.ones(2, 4, 20, 20)), (2, 16, 0), "kernel_size and stride must be 1 .. 15.*got 2, 16, 0"),
        (channels_last(torch.ones(2, 4, 3, 2)), (3, 2, 0), "a window of 3 does not fit into 3 x 2 pixels"),
    ],
)
def test_refuses(device, x, window, message):
    with pytest.raises(ValueError, match=message):
        max_pool(on(x, device), *window)


def test_the_backward_refuses_what_a_forward_without_a_gradient_gave(implementation, device):
    x = randn((2, 4, 6, 6), torch.float32, device).requires_grad_()
    y, _ = torch.ops.nvcnn.max_pool(x, *STEM, False)
    with pytest.raises(ValueError, match=r"the backward needs argmax, \(2, 4, 3, 3\), got \(0,\)"):
        y.sum().backward()


def test_what_comes_with_a_raw_tensor_is_refused(implementation, device):
    x, norm = randn((2, 4, 6, 6), torch.float32, device), torch.ones(5, 4, device=device)
    y, argmax = max_pool_with_argmax(x, *STEM, True, norm)
    for bad in (norm[:4], norm.half(), norm.double()):
        with pytest.raises(ValueError, match=r"max_pool: norm must be \(5, 4\), torch.float32"):
            max_pool_with_argmax(x, *STEM, True, bad)
        with pytest.raises(ValueError, match=r"max_pool_backward: norm must be \(5, 4\), torch.float32"):
            max_pool_backward(y, argmax, 6, 6, *STEM, x, bad)
    with pytest.raises(ValueError, match=r"max_pool_backward: x must be \(2, 4, 6, 6\).*got \(2, 4, 3, 3\)"):
        max_pool_backward(y, argmax, 6, 6, *STEM, y, norm)
    with pytest.raises(ValueError, match=r"max_pool_backward: x, norm come together .* got no norm"):
        max_pool_backward(y, argmax, 6, 6, *STEM, x)
    for differentiable in (max_pool_with_argmax, torch.ops.nvcnn.max_pool):
        with pytest.raises(ValueError, match="max_pool: with norm there is no autograd"):
            differentiable(x.requires_grad_(), *STEM, True, norm)


def test_where_it_cannot_be_written_is_refused(implementation, device):
    x, y = (randn((2, 4, *size), torch.float32, device) for size in ((6, 6), (3, 3)))
    for bad, message in (
        (y[:, :3], r"y must be \(2, 4, 3, 3\), torch.float32, on .*; got \(2, 3, 3, 3\)"),
        (y.half(), r"y must be \(2, 4, 3, 3\), torch.float32, on .*; got .*, torch.float16"),
        (y.contiguous(), "y must be channels-last or a slice of such channels"),
    ):
        with pytest.raises(ValueError, match=f"max_pool_into: {message}"):
            max_pool_into(x, *STEM, True, None, False, bad)
