"""BatchNorm's two ops, statistics and normalisation with its gradients, against PyTorch in float64."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import (
    batch_norm,
    batch_norm_backward,
    batch_norm_data_gradient,
    batch_norm_gradient_sums,
    batch_norm_into,
    batch_norm_statistics,
    norm_from_sums,
    norm_gradient,
    norm_of,
)
from kernels.batch_norm import backward_reference
from kernels.checks import pitch_of, single_or_double
from kernels.norm_rows import D_BETA, D_GAMMA, FACTORS, MEAN, MEAN_LOW, RSTD, SCALE, SHIFT
from kernels.partial_sums import NORM_CONFIG, parts_of_rows
from kernels.tiles import configured_for_rows
from tests.kernels.images import (
    DTYPES,
    SHAPES,
    SLICES,
    SMALLEST,
    channels_last,
    integers,
    poisoned,
    randn,
    slice_of,
    unit,
)

EPS = 1e-4
U = 2.0**-24  # half a unit in the last place of fp32
variants = pytest.mark.parametrize(("joins", "relu"), [(False, False), (False, True), (True, False), (True, True)])


class Case:
    """Holds x, residual and dy; gamma and beta. Their twins in float64 go through PyTorch's own operators."""

    def __init__(self, shape, dtype, device, *, joins=False, relu=False, mean=0.0, deviation=1.0):
        c = shape[1]
        self.relu = relu
        self.x = channels_last((randn(shape, torch.float32, device) * deviation + mean).to(dtype))
        self.residual = randn(shape, dtype, device) if joins else None
        self.dy = randn(shape, dtype, device)
        self.gamma, self.beta = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device)

    def ours(self, running=None):
        """Returns y, the batch's mean and variance, norm, and the gradients of x, gamma, beta (and residual)."""
        double = single_or_double(self.x)
        leaves = {"x": self.x, "gamma": self.gamma.to(double), "beta": self.beta.to(double)}
        if self.residual is not None:
            leaves["residual"] = self.residual
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
        mean, var = torch.empty(2, len(self.gamma), dtype=double, device=self.x.device)
        with torch.no_grad():
            if running is None:
                norm = batch_norm_statistics(self.x, leaves["gamma"], leaves["beta"], mean, var, EPS)
            else:
                norm = norm_of(*running, leaves["gamma"], leaves["beta"], EPS)
        y = batch_norm(
            leaves["x"], leaves["gamma"], leaves["beta"], norm, leaves.get("residual"), self.relu, running is None
        )
        y.backward(self.dy.to(y.dtype))
        out = {"y": y.detach(), "mean": mean, "var": var, "norm": norm}
        return out | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}

    def exact(self, running=None):
        """Returns the same from PyTorch's operators in float64; `v` is what ReLU is applied to."""
        c = len(self.gamma)
        given = {"x": self.x, "gamma": self.gamma, "beta": self.beta, "residual": self.residual}
        leaves = {k: v.double().detach().requires_grad_() for k, v in given.items() if v is not None}
        mean, var = torch.zeros(2, c, dtype=torch.float64, device=self.x.device) if running is None else running
        names = (leaves[name] for name in ("gamma", "beta"))
        v = F.batch_norm(leaves["x"], mean, var, *names, training=running is None, momentum=1.0, eps=EPS)
        if self.residual is not None:
            v = v + leaves["residual"]
        y = F.relu(v) if self.relu else v
        y.backward(self.dy.double())
        out = {"y": y.detach(), "v": v.detach(), "mean": mean, "var": var}
        return out | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}

    def leave_the_kink(self):
        """Lets no gradient come where ReLU's argument is too near 0 to tell its sign."""
        self.dy[self.exact()["v"].abs() < 1e-2] = 0


def check(case, implementation):
    """Checks that every result is within the roundings that lead to it."""
    got, exact, x = case.ours(), case.exact(), case.x.double()
    n = x.numel() // x.shape[1]
    out = unit(case.x.dtype, implementation)

    def over(values):
        return values.sum((0, 2, 3))

    def spread(vector):
        return vector.view(1, -1, 1, 1)

    # No value passes through more additions than tiles in a part, rows in a tile, and as much again for the parts.
    config = configured_for_rows("batch_norm", case.x)
    parts, rows_a_part = parts_of_rows(n, x.shape[1], config)
    block = NORM_CONFIG["BLOCK_PARTS"]
    additions = rows_a_part / config["BLOCK_ROWS"] + config["BLOCK_ROWS"] + parts / block + block
    if implementation == "reference":
        additions = n
    mean, var = over(x) / n, over((x - spread(over(x) / n)).square()) / n
    rstd = (var + EPS).rsqrt()
    gamma = case.gamma.double()
    # Sums are of x - center; the center is in the channel, or, for PyTorch's, the sums are of x itself.
    center = x[0, :, 0, 0] if implementation == "triton" else torch.zeros_like(mean)
    d = (x - spread(center)).abs()
    mean_error = (additions + 3) * U * (over(d) / n) + (U * mean.abs() if implementation == "reference" else 0)
    var_error = (additions + 6) * U * (over(d.square()) / n + 2 * (over(d) / n).square()) + mean_error.square()
    rstd_error = 0.5 * rstd.pow(3) * var_error + 3 * U * rstd
    assert ((got["mean"].double() - mean).abs() <= mean_error + U * mean.abs()).all()
    assert ((got["var"].double() - exact["var"]).abs() <= (var_error + 3 * U * var) * n / (n - 1)).all()

    centred = (x - spread(mean)).abs()
    value_error = spread(gamma * rstd_error) * centred + spread(gamma * rstd * mean_error)
    terms = spread(gamma * rstd) * centred + spread(case.beta.double()).abs()
    if case.residual is not None:
        terms = terms + case.residual.double().abs()
    value_error = value_error + 4 * U * terms
    roundings = 2 if implementation == "reference" and case.residual is not None else 1  # before the sum, and after
    bound = value_error + roundings * out * (terms + value_error) + 2 * SMALLEST[case.x.dtype]
    assert ((got["y"].double() - exact["y"]).abs() <= bound).all()

    g = case.dy.double() if not case.relu else case.dy.double() * (exact["v"] > 0)
    sum_error = (additions + 1) * U * over(g.abs())
    product_error = (additions + 4) * U * over(g.abs() * centred) + mean_error * over(g).abs()
    gamma_error = rstd * product_error + rstd_error * over(g * (x - spread(mean))).abs() + sum_error * rstd * mean_error
    gamma_error = gamma_error + 4 * U * rstd * (over(g.abs() * centred) + U * mean.abs() * over(g.abs()))
    assert ((got["d_beta"].double() - exact["d_beta"]).abs() <= sum_error).all()
    assert ((got["d_gamma"].double() - exact["d_gamma"]).abs() <= gamma_error).all()

    scale, slope = gamma * rstd, gamma * rstd * rstd * exact["d_gamma"].abs() / n
    relative = rstd_error / rstd + 4 * U
    dx_terms = spread(scale) * (g.abs() + spread(over(g).abs() / n)) + centred * spread(slope)
    dx_error = spread(3 * relative) * dx_terms + spread(scale * sum_error / n) + spread(slope * mean_error)
    dx_error = dx_error + centred * spread(scale * rstd * gamma_error / n)
    bound = dx_error + out * (exact["d_x"].abs() + dx_error) + SMALLEST[case.x.dtype]
    assert ((got["d_x"].double() - exact["d_x"]).abs() <= bound).all()
    if case.residual is not None:
        assert torch.equal(got["d_residual"].double(), exact["d_residual"])


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_close_as_its_dtypes_allow(implementation, device, dtype, joins):
    torch.manual_seed(0)
    case = Case((3, 37, 5, 7), dtype, device, joins=joins, relu=True, mean=0.5, deviation=2.0)
    case.leave_the_kink()
    check(case, implementation)


@given(
    shape=SHAPES.filter(lambda s: s[0] * s[2] * s[3] > 1),
    dtype=st.sampled_from(DTYPES),
    joins=st.booleans(),
    relu=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 2**32),
)
def test_any_shape(implementation, device, shape, dtype, joins, relu, mean, seed):
    torch.manual_seed(seed)
    case = Case(shape, dtype, device, joins=joins, relu=relu, mean=mean)
    case.leave_the_kink()
    check(case, implementation)


@variants
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_exact_on_integers(implementation, device, dtype, joins, relu):
    """With vectors of small integers, normalising and its gradients are exact."""
    x, residual, dy = (integers((2, 35, 3, 6), dtype, device, -3, 3) for _ in range(3))
    rows = [torch.randint(-2, 3, (35,), device=device).float() for _ in range(3)]
    norm = torch.stack([*rows, torch.ones(35, device=device), torch.zeros(35, device=device)])
    leaves = [t.requires_grad_() for t in (x, rows[SCALE.value].clone(), rows[SHIFT.value].clone(), residual)]
    y = batch_norm(*leaves[:3], norm, residual if joins else None, relu, False)
    y.backward(dy)
    mean, scale, shift = (v.view(1, -1, 1, 1).double() for v in rows)
    v = (x.double() - mean) * scale + shift + (residual.double() if joins else 0)
    g = dy.double() * (v > 0) if relu else dy.double()
    assert torch.equal(y.double(), v.relu() if relu else v)
    assert torch.equal(x.grad.double(), g * scale)
    assert torch.equal(leaves[2].grad.double(), g.sum((0, 2, 3)))
    assert torch.equal(leaves[1].grad.double(), (g * (x.double() - mean)).sum((0, 2, 3)))
    assert not joins or torch.equal(residual.grad.double(), g)


@pytest.mark.parametrize("of", ["dy", "x", "y", "y and more", "y and sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_and_dx_apart_are_exact_on_integers(implementation, device, dtype, of):
    """The mask of relu is that of x, or that of y where a residual was added; without relu there is none.

    More is a gradient that is added, at every pixel or at every second both ways, and a branch with sums of its own.
    """
    x, dy, y, skip, branch = (integers((2, 35, 3, 6), dtype, device, -3, 3) for _ in range(5))
    rows = [torch.randint(-2, 3, (35,), device=device).float() for _ in range(5)]
    norm, (mean, scale, shift) = torch.stack(rows), (v.view(1, -1, 1, 1).double() for v in rows[:3])
    stride = 2 if of == "y and sparse" else 1
    skip = channels_last(skip[:, :, ::stride, ::stride])
    more = (skip, branch, norm.flip(0), stride) if "and" in of else ()
    g, sums, branch_sums = batch_norm_gradient_sums(dy, x, y if of[0] == "y" else None, norm, of != "dy", *more)
    expected = dy.double()
    if more:
        expected[:, :, ::stride, ::stride] += skip.double()
        products = expected * (y > 0) * (branch.double() - rows[4].view(1, -1, 1, 1).double())
        assert torch.equal(branch_sums[0], sums[0])
        assert torch.equal(branch_sums[1].sum(0).double(), products.sum((0, 2, 3)))
    if of != "dy":
        expected = expected * ((y.double() if of[0] == "y" else (x.double() - mean) * scale + shift) > 0)
        assert torch.equal(g.double(), expected)
    assert torch.equal(sums[0].sum(0).double(), expected.sum((0, 2, 3)))
    assert torch.equal(sums[1].sum(0).double(), (expected * (x.double() - mean)).sum((0, 2, 3)))

    factors = torch.randint(-2, 3, (2, 35), device=device).float()
    slope, offset = (v.view(1, -1, 1, 1).double() for v in factors)
    assert torch.equal(batch_norm_data_gradient(dy, x, norm, None).double(), dy.double() * scale)
    dx = batch_norm_data_gradient(dy, x, norm, factors)
    assert torch.equal(dx.double(), dy.double() * scale + slope * (x.double() - mean) + offset)


@pytest.mark.parametrize(("pitch", "channels", "first"), SLICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_slice_is_written_and_no_more(implementation, device, dtype, pitch, channels, first):
    """Two of one tensor, the second by a launch that is repeated; then one that is a whole tensor."""
    x, norm = (
        integers((2, channels, 3, 6), dtype, device, -3, 3),
        torch.randint(-2, 3, (5, channels)).to(device).float(),
    )
    y = batch_norm(x, norm[0], norm[0], norm, None, True, True)
    whole, others = poisoned(x, pitch), torch.ones(pitch, dtype=torch.bool, device=device)
    for at in (first, first % 8):
        batch_norm_into(x, norm, True, whole[:, at : at + channels])
        others[at : at + channels] = False
        assert torch.equal(whole[:, at : at + channels], y)
    assert whole[:, others].isnan().all()
    batch_norm_into(x, norm, True, x)
    assert torch.equal(x, y)


@pytest.mark.parametrize(("pitch", "channels", "first"), SLICES)
def test_the_gradient_may_be_a_slice(implementation, device, pitch, channels, first):
    torch.manual_seed(0)
    case = Case((2, channels, 3, 6), torch.float16, device, relu=True)
    norm, results = case.ours()["norm"], []
    for dy in (case.dy, slice_of(poisoned(case.dy, pitch), case.dy, first)):
        whole = (batch_norm_backward(dy, case.x, None, norm, True, True, with_g) for with_g in (False, True))
        results.append([*batch_norm_gradient_sums(dy, case.x, None, norm, True), *chain(*whole)])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
        assert got.is_contiguous() or got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (2, 9, 1, 4), (2, 9, 3, 1), (2, 9, 1, 1)])
def test_the_pitch_of_a_tensor(shape):
    """Whatever the stride is of an axis of one value."""
    x = channels_last(torch.empty(shape))
    assert [pitch_of(t) for t in (x, x[:, 2:7], x[:, 8:], x[:1, 2:7, :1, :1])] == [9, 9, 9, 5]
    assert pitch_of(x[:, :1].expand(-1, 2, -1, -1)) is None  # the channels are one
    assert pitch_of(x[:, :1, :1, :1].expand(-1, -1, 3, 4)) is None  # the pixels are
    large = channels_last(torch.empty(2, 9, 6, 8))
    assert pitch_of(large[..., :4]) is pitch_of(large[:, :, :3]) is None  # rows have a pitch of their own, or images
    assert pitch_of(torch.empty(2, 9, 3, 4)) is None


def test_sums_are_of_the_added_gradient_as_it_is_stored(implementation, device):
    x = channels_last(torch.ones(1, 8, 1, 1, dtype=torch.float16, device=device))
    norm = torch.zeros(5, 8, device=device)
    g, sums, _ = batch_norm_gradient_sums(x, x, x, norm, True, x * 2**-12)
    assert torch.equal(g, x)
    assert torch.equal(sums[0].sum(0), torch.ones(8, device=device))


@pytest.mark.parametrize("joins", [False, True])
def test_the_sums_and_dx_apart_are_those_of_the_whole_backward(implementation, device, joins):
    case = Case((3, 37, 5, 7), torch.float16, device, joins=joins, relu=True, mean=0.5, deviation=2.0)
    case.leave_the_kink()
    whole = case.ours()
    g, sums, _ = batch_norm_gradient_sums(case.dy, case.x, whole["y"] if joins else None, whole["norm"], True)
    rows = norm_gradient(sums, whole["norm"], 3 * 5 * 7)
    d_gamma, d_beta = rows[D_GAMMA], rows[D_BETA]
    assert not rows[4].any()
    dx = batch_norm_data_gradient(g, case.x, whole["norm"], rows[FACTORS])
    bound = 8 * U + (2 if implementation == "reference" else 0) * unit(torch.float16, implementation)  # its own order
    for got, name in ((dx, "d_x"), (d_gamma, "d_gamma"), (d_beta, "d_beta")):
        if implementation == "triton":
            assert torch.equal(got, whole[name]), name
        else:
            exact = case.exact()[name]
            assert (got.double() - exact).abs().max() <= 16 * bound * exact.abs().max(), name


def test_statistics_are_exact_on_integers(implementation, device):
    x = integers((4, 35, 4, 8), torch.float16, device) * 2 + 64  # 128 values a channel: a mean of few binary digits
    gamma, beta = torch.ones(35, device=device), torch.zeros(35, device=device)
    mean, var = torch.empty(2, 35, device=device)
    norm = batch_norm_statistics(x, gamma, beta, mean, var, EPS)
    assert torch.equal(mean.double(), x.double().mean((0, 2, 3)))
    additions = 1 if implementation == "triton" else 128  # PyTorch's squares are about a mean that may be rounded
    if implementation == "triton":
        assert torch.equal(norm[MEAN.value], mean)
        assert not norm[MEAN_LOW.value].any()
    exact = x.double().var((0, 2, 3))
    assert ((var - exact).abs() <= (additions + 4) * U * exact).all()
    rstd = (exact * 127 / 128 + EPS).rsqrt()
    assert ((norm[RSTD.value] - rstd).abs() <= (additions + 8) * U * rstd).all()


def test_a_mean_far_above_the_deviation_keeps_three_digits(device, monkeypatch):
    """In fp32, mean 1000, deviation 0.01, PyTorch's mean, and with it the reference's, is off by 1 % of the latter."""
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    torch.manual_seed(0)
    case = Case((4, 5, 15, 17), torch.float32, device, mean=1000.0, deviation=0.01)
    got, exact = case.ours(), case.exact()
    for name in ("y", "d_x", "d_gamma", "d_beta", "var"):
        worst = 1e-4 if name == "y" else 5e-4
        assert (got[name].double() - exact[name]).abs().max() < worst * exact[name].abs().max(), name


@pytest.mark.parametrize("parts", [3, 75, 600])
def test_the_producer_s_sums(implementation, device, parts):
    """They are about a center of their own, and over few parts, more than a tile has, or more than MOST_PARTS."""
    torch.manual_seed(0)
    case = Case((6, 37, 10, 10), torch.float32, device, mean=3.0)
    center = case.x.mean((0, 2, 3)) + 0.25
    d = (case.x.permute(0, 2, 3, 1) - center).reshape(parts, -1, 37)
    mean, var = torch.empty(2, 37, device=device)
    sums = torch.stack((d.sum(1), d.square().sum(1)))
    norm = norm_from_sums(sums, center, 600, case.gamma, case.beta, mean, var, EPS)
    exact = case.ours()
    assert torch.allclose(mean, exact["mean"], rtol=0, atol=1e-5)
    assert torch.allclose(var, exact["var"], rtol=1e-4)
    assert torch.allclose(norm[:4], exact["norm"][:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_evaluation(implementation, device, relu):
    torch.manual_seed(0)
    case = Case((3, 37, 4, 5), torch.float32, device, joins=True, relu=relu)
    running = torch.randn(37, device=device), torch.rand(37, device=device) + 0.5
    got, exact = case.ours(running), case.exact(tuple(t.double() for t in running))
    for name in ("y", "d_x", "d_gamma", "d_beta", "d_residual"):
        assert torch.allclose(got[name].double(), exact[name], rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_channel_alone(implementation, device, value, joins):
    case = Case((2, 33, 3, 5), torch.float16, device, joins=joins, relu=True)
    case.x[1, 32, 2, 4] = value
    got = case.ours()
    for name in ("y", "d_x"):
        finite = got[name].isfinite().all(dim=3).all(dim=2).all(dim=0)
        assert finite[:32].all(), name
        assert not finite[32], name
    assert not got["d_gamma"].isfinite()[32]
    assert not got["var"].isfinite()[32]


@pytest.mark.parametrize("by_y", [False, True], ids=["x", "y"])
def test_a_nan_lets_the_gradient_pass(implementation, device, by_y):
    case = Case((2, 5, 3, 3), torch.float32, device)
    norm = case.ours()["norm"]
    case.x[1, 4, 2, 0] = torch.nan
    y = torch.full_like(case.x, torch.nan) if by_y else None
    g, _, _ = batch_norm_gradient_sums(case.dy, case.x, y, norm, True)
    assert torch.equal(g[1, 4, 2, 0], case.dy[1, 4, 2, 0])


def test_a_constant_channel(implementation, device):
    case = Case((2, 3, 4, 4), torch.float32, device)
    case.x[:, 1] = 7.0
    got = case.ours()
    # PyTorch on the CPU has x scale + (shift - mean scale), which is rounded at the size of x scale.
    bound = 4 * U * 7 * got["norm"][SCALE.value, 1] if implementation == "reference" else 0
    assert ((got["y"][:, 1] - case.beta[1]).abs() <= bound).all()
    assert got["var"][1] == 0
    assert all(t.isfinite().all() for t in got.values())


def test_two_runs_give_the_same_bits(implementation, device):
    case = Case((3, 40, 9, 9), torch.float16, device, joins=True, relu=True)
    first, second = case.ours(), case.ours()
    assert all(torch.equal(first[name], second[name]) for name in first)


@variants
@pytest.mark.parametrize("batch", [True, False])
def test_gradcheck(device, monkeypatch, joins, relu, batch):
    """In float64 the reference's gradient goes through the statistics as well, of which batch_norm knows by itself."""
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    torch.manual_seed(0)
    case = Case((2, 2, 2, 3), torch.float64, device, joins=joins, relu=relu)
    running = torch.randn(2, device=device).double(), torch.rand(2, device=device).double() + 0.5

    def normalised(x, gamma, beta, residual):
        scratch = torch.empty_like(gamma), torch.empty_like(gamma)
        with torch.no_grad():
            norm = (
                batch_norm_statistics(x, gamma, beta, *scratch, EPS) if batch else norm_of(*running, gamma, beta, EPS)
            )
        return batch_norm(x, gamma, beta, norm, residual, relu, batch)

    leaves = [case.x, case.gamma.double(), case.beta.double(), case.residual]
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(normalised, leaves)


@pytest.mark.parametrize("relu", [False, True])
def test_the_mask_of_the_reference_may_come_from_x_or_y(device, monkeypatch, relu):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    case = Case((2, 5, 3, 4), torch.float64, device, relu=relu)
    got = case.ours()
    norm = got["norm"]
    for y in (None, got["y"]):
        dx, *_ = backward_reference(case.dy, case.x, y, norm, relu, True)
        assert torch.equal(dx, got["d_x"])


def test_opcheck(implementation, device):
    case = Case((2, 5, 3, 3), torch.float32, device, joins=True, relu=True)
    mean, var = torch.zeros(2, 5, device=device)
    norm = case.ours()["norm"]
    leaves = [t.detach().requires_grad_() for t in (case.x, case.gamma, case.beta, case.residual)]
    sums = torch.rand(2, 3, 5, device=device)
    for op, arguments in (
        (batch_norm_statistics.overload, (case.x, case.gamma, case.beta, mean, var, EPS)),
        (norm_from_sums.overload, (sums, mean, 30, case.gamma, case.beta, mean.clone(), var, EPS)),
        (batch_norm.overload, (*leaves[:3], norm, leaves[3], True, True)),
        (batch_norm.overload, (*leaves[:3], norm, None, False, False)),
        (batch_norm_into.overload, (case.x, norm, True, poisoned(case.x, 8)[:, 2:7])),
        (torch.ops.nvcnn.batch_norm_backward, (case.dy, case.x, case.dy, norm, True, True, True)),
        (torch.ops.nvcnn.batch_norm_backward, (case.dy, case.x, None, norm, True, True, False)),
        (batch_norm_gradient_sums.overload, (case.dy, case.x, None, norm, True)),
        (batch_norm_gradient_sums.overload, (case.dy, case.x, None, norm, False)),
        (batch_norm_gradient_sums.overload, (case.dy, case.x, case.dy, norm, True, case.x, case.residual, norm)),
        (norm_gradient.overload, (sums, norm, 18)),
        (batch_norm_data_gradient.overload, (case.dy, case.x, norm, None)),
        (batch_norm_data_gradient.overload, (case.dy, case.x, norm, norm[:2].clone())),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t.contiguous()}, "batch_norm: x must be channels-last"),
        ({"residual": lambda t: t.half()}, r"batch_norm: residual must be \(2, 4, 3, 3\), torch.float32.*float16"),
        ({"gamma": lambda t: t.half()}, r"gamma must be \(4,\), torch.float32"),
        ({"beta": lambda t: t[1:]}, r"beta must be \(4,\).*got \(3,\)"),
        ({"norm": lambda t: t[:4]}, r"norm must be \(5, 4\)"),
    ],
)
def test_refuses(device, change, message):
    case = Case((2, 4, 3, 3), torch.float32, device, joins=True)
    arguments = {"x": case.x, "gamma": case.gamma, "beta": case.beta, "norm": torch.rand(5, 4, device=device)}
    arguments |= {"residual": case.residual}
    ((name, broken),) = change.items()
    arguments[name] = broken(arguments[name])
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments, relu=True, batch=True)


def test_refuses_gradients_that_do_not_belong_together(device):
    x, norm = channels_last(torch.randn(2, 4, 3, 3, device=device)), torch.rand(5, 4, device=device)
    with pytest.raises(ValueError, match=r"batch_norm_gradient_sums: dy must be \(2, 4, 3, 3\).*got \(1, 4, 3, 3\)"):
        batch_norm_gradient_sums(x[:1], x, None, norm, True)
    with pytest.raises(ValueError, match="dy must be channels-last or a slice of such channels, got strides"):
        batch_norm_gradient_sums(x.contiguous(), x, None, norm, True)
    with pytest.raises(ValueError, match=r"batch_norm_into: y must be \(2, 4, 3, 3\).*got \(2, 3, 3, 3\)"):
        batch_norm_into(x, norm, True, x[:, 1:])
    with pytest.raises(ValueError, match=r"batch_norm_gradient_sums: y must be .*float16"):
        batch_norm_gradient_sums(x, x, x.half(), norm, True)
    with pytest.raises(ValueError, match=r"batch_norm_gradient_sums: branch, branch_norm come together"):
        batch_norm_gradient_sums(x, x, x, norm, True, None, x)
    with pytest.raises(ValueError, match=r"batch_norm_gradient_sums: skip is added .* with relu only"):
        batch_norm_gradient_sums(x, x, None, norm, False, x)
    with pytest.raises(ValueError, match=r"batch_norm_data_gradient: norm must be \(5, 4\)"):
        batch_norm_data_gradient(x, x, norm[:4], None)
    with pytest.raises(ValueError, match=r"batch_norm_data_gradient: factors must be \(2, 4\)"):
        batch_norm_data_gradient(x, x, norm, norm)


def test_refuses_statistics_of_one_value(device):
    x, gamma = torch.randn(1, 4, 1, 1, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match="at least 2 values to have a variance, got 1"):
        batch_norm_statistics(x, gamma, gamma, gamma.clone(), gamma.clone(), EPS)
