"""BatchNorm behind a 1 x 1 from its input's Gram matrix: each op, and all of it against autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import (
    convolution,
    convolution_data_gradient,
    convolution_weight_gradient,
    gram_gradient,
    gram_matrix,
    gram_norm,
)
from kernels.norm_rows import Norm
from tests.kernels import convolutions as conv
from tests.kernels.images import channels_last, randn

EPS = 1e-4
ONE_BLOCK, BLOCKS = conv.Shape(2, 16, 5, 4, 40, 1, 1), conv.Shape(3, 37, 5, 5, 41, 1, 1)  # of 16 channels in tests
STRIDED = conv.Shape(2, 37, 5, 6, 41, 1, 1, (2, 2))
SHAPES = pytest.mark.parametrize("shape", [ONE_BLOCK, BLOCKS, STRIDED], ids=str)
DTYPES = pytest.mark.parametrize("dtype", conv.DTYPES)


def rows_of(x, shape):
    """Returns the pixels that are convolved, (pixels, channels), in float64."""
    strided = x[:, :, :: shape.stride[0], :: shape.stride[1]]
    return strided.permute(0, 2, 3, 1).flatten(0, 2).double()


def images_of(rows, shape):
    n, _, oh, ow = shape.y
    return rows.view(n, oh, ow, -1).permute(0, 3, 1, 2)


def exact_gram(a, shape):
    rows = rows_of(a, shape)
    return torch.cat((rows.T @ rows, rows.sum(0, keepdim=True)))


# gram_matrix


@SHAPES
@DTYPES
def test_gram_matrix_is_exact_on_integers(implementation, device, shape, dtype):
    x = conv.small_integers(shape.x, dtype, device)
    a, gram = gram_matrix(x, shape.stride)
    assert a.numel() == 0
    assert torch.equal(gram.double(), exact_gram(x, shape))


@pytest.mark.parametrize("shape", [ONE_BLOCK, BLOCKS], ids=str)
@DTYPES
def test_gram_matrix_is_of_the_activation_which_is_written(implementation, device, shape, dtype):
    x, norm = conv.small_integers(shape.x, dtype, device), conv.integer_norm(shape.c, device)
    a, gram = gram_matrix(x, (1, 1), norm)
    assert torch.equal(a.double(), conv.normalised(x, norm).relu())
    assert a.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gram.double(), exact_gram(a, shape))


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 6), st.integers(1, 6)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(conv.DTYPES),
    normal=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_gram_matrix_of_any_shape(implementation, device, size, stride, dtype, normal, seed):
    torch.manual_seed(seed)
    stride = (1, 1) if normal else stride
    shape = conv.Shape(*size, 1, 1, 1, stride)
    x, norm = randn(size, dtype, device), conv.random_norm(size[1], device) if normal else None
    a, gram = gram_matrix(x, stride, norm)
    if normal:
        expected = conv.activation(x, norm, implementation)
        conv.check_close(a, expected.exact, expected.error, "a")
    rows = rows_of(a if normal else x, shape)  # as it is stored
    bound = (len(rows) + 2) * conv.U * torch.cat((rows.abs().T @ rows.abs(), rows.abs().sum(0, keepdim=True)))
    conv.check_close(gram, exact_gram(a if normal else x, shape), bound, "gram")
    if implementation == "triton":
        assert torch.equal(gram[:-1], gram[:-1].T)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_spoils_its_channel_alone(implementation, device, value):
    x = randn(BLOCKS.x, torch.float16, device)
    x[2, 35, 4, 4] = value
    norm = conv.random_norm(BLOCKS.c, device)
    for gram in (gram_matrix(x, (1, 1))[1], gram_matrix(x, (1, 1), norm)[1]):
        finite = gram.isfinite()
        assert not finite[-1, 35]
        assert not finite[35, 35]
        others = torch.arange(BLOCKS.c, device=device) != 35
        assert finite[:-1][others][:, others].all()
        assert finite[-1, others].all()


# gram_norm


def made(shape, dtype, device, implementation, offset=0.0):
    """Returns a, its float64 Gram matrix rounded, a weight, gamma and beta."""
    a = (randn(shape.x, torch.float32, device).relu() + offset).to(dtype)
    weight = (randn(shape.weight, torch.float32, device) / shape.c**0.5).to(dtype)
    gamma, beta = torch.rand(shape.k, device=device) + 0.5, torch.randn(shape.k, device=device)
    return a, exact_gram(a, shape).float(), weight, gamma, beta


def batch_rows(k, device):
    return torch.empty(2, k, device=device)


@SHAPES
@DTYPES
@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_gram_norm_is_the_norm_of_y(implementation, device, shape, dtype, offset):
    """Where the mean is large, what the Gram matrix rounds off counts by the mean's square over the variance."""
    torch.manual_seed(0)
    a, gram, weight, gamma, beta = made(shape, dtype, device, implementation, offset)
    mean, var = batch_rows(shape.k, device)
    count = gram.new_tensor(rows_of(a, shape).shape[0]).int().item()
    norm, shift, spread = gram_norm(gram, count, weight, gamma, beta, mean, var, EPS)
    w, rows = weight.double().flatten(1), rows_of(a, shape)
    y = rows @ w.T
    exact_var = y.var(0, unbiased=False)
    # The mean: a sum of C products. The variance: C^2 of them, and cov is a difference of two rounded numbers.
    wide = w.abs() @ rows.abs().mean(0)
    squares = (w.abs() @ (rows.T @ rows / count) * w.abs()).sum(1) + wide**2
    of_mean = (shape.c + 4) * conv.U * wide
    of_var = (2 * shape.c + 16) * conv.U * squares + 1e-30
    conv.check_close(mean, y.mean(0), of_mean, "mean")
    conv.check_close(var, exact_var * count / (count - 1), of_var * count / (count - 1), "var")
    rstd = (exact_var + EPS).rsqrt()
    of_rstd = rstd * (of_var / (exact_var + EPS) + 4 * conv.U)
    found = Norm(*norm)
    conv.check_close(found.rstd, rstd, of_rstd, "rstd")
    conv.check_close(found.scale, gamma.double() * rstd, 2 * gamma * of_rstd, "scale")
    assert torch.equal(found.mean, mean)
    assert torch.equal(found.shift, beta)
    assert not found.mean_low.any()
    exact = beta.double() - found.mean.double() * found.scale.double()
    conv.check_close(shift, exact, 4 * conv.U * (beta.abs() + (found.mean * found.scale).abs()).double(), "shift")
    d = rows - rows.mean(0)
    exact = w @ (d.T @ d) / count
    bound = (2 * shape.c + 16) * conv.U * (w.abs() @ (rows.abs().T @ rows.abs()) / count * 2)
    conv.check_close(spread, exact, bound, "spread")


def test_a_channel_that_does_not_vary_has_no_negative_variance(implementation, device):
    a = channels_last(torch.full(ONE_BLOCK.x, 3.0, dtype=torch.float16, device=device))
    _, gram = gram_matrix(a, (1, 1))
    weight = randn(ONE_BLOCK.weight, torch.float16, device)
    mean, var = batch_rows(ONE_BLOCK.k, device)
    ones = torch.ones(ONE_BLOCK.k, device=device)
    norm = gram_norm(gram, 40, weight, ones, ones, mean, var, EPS)[0]
    assert (var >= 0).all()
    assert norm.isfinite().all()


# gram_gradient


@SHAPES
@DTYPES
def test_gram_gradient_has_the_gradients_of_weight_and_gamma(implementation, device, shape, dtype):
    torch.manual_seed(0)
    a, gram, weight, gamma, beta = made(shape, dtype, device, implementation)
    rows, k = rows_of(a, shape), shape.k
    count = len(rows)
    norm, _, spread = gram_norm(gram, count, weight, gamma, beta, *batch_rows(k, device), EPS)
    g = torch.randn(count, k, device=device).double()
    products, d_beta = (g.T @ rows).float().view(shape.weight), g.sum(0).float()
    out = channels_last(torch.empty(shape.weight, device=device))
    d_gamma, of_g, of_a, affine = gram_gradient(products, d_beta, norm, gram, spread, count, weight, out)

    w = weight.double().flatten(1).requires_grad_()
    leaf, of_gamma = rows.clone().requires_grad_(), gamma.double().requires_grad_()
    v = torch.nn.functional.batch_norm(leaf @ w.T, None, None, of_gamma, beta.double(), True, eps=EPS)
    dw, da, exact = torch.autograd.grad(v, (w, leaf, of_gamma), g)
    conv.check_close(out.flatten(1), dw, 1e-5 * dw.norm() / dw.numel() ** 0.5 * 4, "d_weight")
    conv.check_close(d_gamma, exact, 1e-5 * exact.norm(), "d_gamma")

    # The gradient of a, from the two matrices: off by their roundings.
    assert of_g.dtype == of_a.dtype == dtype
    factor, constant = affine.double()
    got = (g @ of_g.double().flatten(1) + rows @ of_a.double()) * factor + constant
    unit = conv.unit(dtype, implementation)
    size = (g.abs() @ of_g.double().flatten(1).abs() + rows.abs() @ of_a.double().abs()) * factor
    conv.check_close(got, da, unit * size + 2e-5 * da.abs().max(), "da")
    largest = torch.maximum(of_g.flatten(1).abs().amax(0), of_a.abs().amax(0)).float()
    assert (largest <= 2**13).all()
    assert (largest >= 2**11).all()  # 11 bits are left, and 24 powers of two below the largest
    assert of_a.shape == (shape.c, shape.c)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6])
def test_no_gradient_is_too_small_or_too_large_for_halves(implementation, device, size):
    """A gamma near 0, or a gradient that would make of_a an infinity, changes the power of two alone."""
    torch.manual_seed(0)
    a, gram, weight, gamma, beta = made(ONE_BLOCK, torch.float16, device, implementation)
    rows = rows_of(a, ONE_BLOCK)
    g = torch.randn(len(rows), ONE_BLOCK.k, device=device).double()
    found = []
    for factor, of_gradient in ((1.0, 1.0), (min(size, 1.0), max(size, 1.0))):
        scaled = gamma * factor
        norm, _, spread = gram_norm(gram, len(rows), weight, scaled, beta, *batch_rows(ONE_BLOCK.k, device), EPS)
        products, d_beta = ((g.T @ rows) * of_gradient).float().view(ONE_BLOCK.weight), (g.sum(0) * of_gradient).float()
        out = torch.empty_like(weight, dtype=torch.float32)
        _, of_g, of_a, affine = gram_gradient(products, d_beta, norm, gram, spread, len(rows), weight, out)
        assert of_g.isfinite().all()
        assert of_a.isfinite().all()
        inverse, constant = affine.double()
        da = ((of_gradient * g) @ of_g.double().flatten(1) + rows @ of_a.double()) * inverse + constant
        found.append(da / (factor * of_gradient))
    assert torch.allclose(*found, rtol=0, atol=2e-3 * found[0].abs().max().item())


def test_no_gradient_and_no_gamma_are_zero(implementation, device):
    _, gram, weight, gamma, beta = made(ONE_BLOCK, torch.float16, device, implementation)
    zeros = torch.zeros_like(gamma)
    norm, _, spread = gram_norm(gram, 40, weight, zeros, beta, *batch_rows(ONE_BLOCK.k, device), EPS)
    out = torch.empty_like(weight, dtype=torch.float32)
    products = torch.zeros(ONE_BLOCK.weight, device=device)
    results = gram_gradient(products, zeros, norm, gram, spread, 40, weight, out)
    assert all(not t.any() for t in (out, *results[:3], results[3][1]))
    assert results[3][0].isfinite().all()


# Together


def forward_and_backward(x, norm, weight, gamma, beta, add, g, shape):
    """Returns z, and the gradients of x (raw) or a, of weight and gamma, as a step of training calls the ops."""
    k, device = shape.k, x.device
    a, gram = gram_matrix(x, shape.stride, norm)
    a = x if norm is None else a
    count = g.numel() // k
    statistics = batch_rows(k, device).to(gram.dtype)
    of_y, shift, spread = gram_norm(gram, count, weight, gamma, beta, *statistics, EPS)
    z = convolution(a, weight, *shape.how, scale=Norm(*of_y).scale, shift=shift, add=add, relu=True)[0]
    g = channels_last(g * (z > 0))
    products = channels_last(torch.empty(shape.weight, dtype=gram.dtype, device=device))
    convolution_weight_gradient(g, a, products, *shape.how)
    dw = torch.empty_like(products)
    d_beta = g.to(gram.dtype).sum((0, 2, 3))
    d_gamma, of_g, of_a, affine = gram_gradient(products, d_beta, of_y, gram, spread, count, weight, dw)
    mask = {} if norm is None else {"x": x, "x_norm": norm}
    second = {"a": a, "of_a": of_a, "affine": affine}
    dx, sums, _ = convolution_data_gradient(g, of_g, (shape.h, shape.w), *shape.how, **mask, **second)
    return {"z": z, "d_weight": dw, "d_gamma": d_gamma, "dx": dx}, sums


def exact_step(positive, x, norm, weight, gamma, beta, add, g, shape):
    """positive: where the gradient of z gets through. A rounding of y may decide that, and rightly either way."""
    leaf = (x.double() if norm is None else conv.normalised(x, norm)).requires_grad_()
    w, of_gamma = weight.double().requires_grad_(), gamma.double().requires_grad_()
    y = conv.convolved(leaf if norm is None else leaf.relu(), w, shape)
    v = torch.nn.functional.batch_norm(y, None, None, of_gamma, beta.double(), True, eps=EPS) + add.double()
    dx, dw, d_gamma = torch.autograd.grad(v, (leaf, w, of_gamma), g.double() * positive)
    return {"z": v.detach().relu(), "d_weight": dw, "d_gamma": d_gamma, "dx": dx}


def step_of(shape, dtype, device, raw):
    torch.manual_seed(0)
    x, norm = randn(shape.x, dtype, device), conv.random_norm(shape.c, device) if raw else None
    gamma, beta = torch.rand(shape.k, device=device) + 0.5, torch.randn(shape.k, device=device)
    weight = (randn(shape.weight, torch.float32, device) / shape.c**0.5).to(dtype)
    return x, norm, weight, gamma, beta, randn(shape.y, dtype, device), randn(shape.y, dtype, device), shape


@pytest.mark.parametrize(("shape", "raw"), [(ONE_BLOCK, True), (BLOCKS, True), (STRIDED, False)], ids=str)
@DTYPES
def test_a_step_is_batch_norm_s(implementation, device, shape, raw, dtype):
    """In fp16 results are off by as many of their roundings as in a step that stores y and dy."""
    given = step_of(shape, dtype, device, raw)
    results, sums = forward_and_backward(*given)
    tolerance = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float32: 3e-6}[dtype]
    for name, exact in exact_step(results["z"] > 0, *given).items():
        got = results[name].double()
        if name == "dx":  # x's own mask
            agree = (got != 0) == (exact != 0)
            assert agree.double().mean() > 0.99
            got = torch.where(agree, got, exact)
        assert (got - exact).norm() <= tolerance * exact.norm(), name
    assert sums.numel() == 2 * sums.shape[1] * shape.c if raw else sums.numel() == 0


@pytest.mark.parametrize(("shape", "raw"), [(BLOCKS, True), (STRIDED, False)], ids=str)
def test_in_float64_it_is_batch_norm_to_1e_9(monkeypatch, shape, raw):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    given = [t.double() if isinstance(t, torch.Tensor) else t for t in step_of(shape, torch.float32, "cpu", raw)]
    results, _ = forward_and_backward(*given)
    for name, exact in exact_step(results["z"] > 0, *given).items():
        assert (results[name] - exact).norm() <= 1e-9 * exact.norm(), name


@pytest.mark.parametrize("shape", [BLOCKS, STRIDED], ids=str)
def test_two_products_are_exact_on_integers(implementation, device, shape):
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    a, of_a = conv.small_integers(shape.x, torch.float16, device), torch.randint(-2, 3, (shape.c, shape.c))
    of_a, affine = of_a.to(device).half(), conv.integer_norm(shape.c, device)[:2].clone()
    options = {"a": a, "of_a": of_a, "affine": affine, "x": given["x"], "x_norm": given["x_norm"]}
    dx, sums, _ = convolution_data_gradient(given["g"], given["weight"], (shape.h, shape.w), *shape.how, **options)
    exact = conv.of_input(given["g"], given["weight"], shape)
    at = slice(None), slice(None), slice(None, None, shape.stride[0]), slice(None, None, shape.stride[1])
    second = images_of(rows_of(a, shape) @ of_a.double(), shape)
    exact[at] = (exact[at] + second) * conv.spread(affine[0]) + conv.spread(affine[1])
    assert torch.equal(dx, (exact * (conv.normalised(given["x"], given["x_norm"]) > 0)).half())
    assert torch.equal(sums[0].double().sum(0), dx.double().sum((0, 2, 3)))


@pytest.mark.parametrize("choices", [{"TMA": 1}, {"PERSISTENT": 4}], ids=str)
def test_two_products_by_tma_give_the_same_bits(device, choices):
    shape = conv.TILES
    given = conv.tensors(shape, torch.float16, device)
    of_a, affine = randn((shape.c, shape.c, 1, 1), torch.float16, device).flatten(1), given["x_norm"][:2].clone()

    def run():
        options = {"a": given["x"], "of_a": of_a, "affine": affine, "x": given["x"], "x_norm": given["x_norm"]}
        return convolution_data_gradient(given["g"], given["weight"], (shape.h, shape.w), *shape.how, **options)

    conv.check_same(run, 4 * choices.get("TMA", 0), **choices)


def test_two_runs_give_the_same_bits(implementation, device):
    given = step_of(BLOCKS, torch.float16, device, True)
    (first, sums), (second, again) = (forward_and_backward(*given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(sums, again)


def test_opcheck(implementation, device):
    a, gram, weight, gamma, beta = made(STRIDED, torch.float32, device, implementation)
    check = torch.library.opcheck
    check(gram_matrix.overload, (a, STRIDED.stride))
    check(gram_matrix.overload, (a, (1, 1)), {"norm": conv.random_norm(STRIDED.c, device)})
    statistics = batch_rows(STRIDED.k, device).zero_()
    check(gram_norm.overload, (gram, 18, weight, gamma, beta, *statistics, EPS))
    norm, _, spread = gram_norm(gram, 18, weight, gamma, beta, *statistics, EPS)
    products = torch.zeros_like(weight)
    check(gram_gradient.overload, (products, beta, norm, gram, spread, 18, weight, torch.zeros_like(weight)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, r, g: gram_matrix(x.contiguous(), (1, 1)), "gram_matrix: x must be channels-last"),
        (lambda x, w, r, g: gram_matrix(x, (2, 2), torch.ones(5, 4)), r"with norm; got \(2, 2\)"),
        (lambda x, w, r, g: gram_matrix(x, (0, 1)), r"got \(0, 1\)"),
        (lambda x, w, r, g: gram_matrix(x, (1, 1), torch.ones(5, 3)), r"norm must be \(5, 4\)"),
        (lambda x, w, r, g: gram_norm(g[:4], 40, w, r, r, r, r, EPS), r"gram_norm: gram must be \(5, 4\)"),
        (lambda x, w, r, g: gram_norm(g, 1, w, r, r, r, r, EPS), "at least 2 values"),
        (lambda x, w, r, g: gram_norm(g, 40, w.expand(6, 4, 2, 1), r, r, r, r, EPS), "weight must be"),
        (lambda x, w, r, g: gram_norm(g, 40, w, r[:5], r, r, r, EPS), r"gamma must be \(6,\)"),
        (
            lambda x, w, r, g: gram_gradient(w.flatten(1), r, torch.ones(5, 6), g, torch.ones(6, 4), 40, w, w),
            r"products must be \(6, 4, 1, 1\)",
        ),
        (
            lambda x, w, r, g: gram_gradient(w, r, torch.ones(5, 6), g, torch.ones(6, 4), 40, w, w.half()),
            "d_weight must be",
        ),
        (
            lambda x, w, r, g: convolution_data_gradient(x, w.view(4, 6, 1, 1), (5, 5), (1, 1), (0, 0), a=x),
            "a, of_a, affine come together",
        ),
    ],
)  # fmt: skip
def test_refuses(monkeypatch, call, message):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    x, weight = randn((2, 4, 5, 5), torch.float32, "cpu"), randn((6, 4, 1, 1), torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        call(x, weight, torch.ones(6), torch.ones(5, 4))
