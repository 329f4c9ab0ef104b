"""The gradient of a convolution's input, with its prologue and epilogues, against PyTorch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.grad import conv2d_input

from kernels import convolution_data_gradient, norm_gradient
from kernels.norm_rows import D_BETA, D_GAMMA, FACTORS, MEAN, MEAN_LOW, SCALE
from tests.kernels import convolutions as conv
from tests.kernels.images import channels_last, randn

STRIDED = conv.Shape(2, 19, 6, 5, 18, 3, 3, (2, 2), (1, 1))
TINY = conv.Shape(1, 3, 4, 3, 5, 3, 3, (2, 2), (1, 1))
POINTWISE = conv.Shape(2, 19, 5, 4, 21, 1, 1)
MAP, MASK = ("y", "norm", "factors"), ("x", "x_norm")
OF_CLASSES = [*conv.BOXES, (conv.Shape(1, 16, 7, 6, 8, 3, 3, (2, 2), (1, 1)), conv.OF_FOUR)]


def sums_of(g, x, norm):
    g = g.double()
    return torch.stack((g.sum((0, 2, 3)), (g * (x.double() - conv.spread(norm[MEAN.value]))).sum((0, 2, 3))))


def gradient(given, shape, *names):
    options = {name: given[name] for name in names}
    return convolution_data_gradient(given["g"], given["weight"], (shape.h, shape.w), *shape.how, **options)


def check_exact(dx, sums, given, shape, *names):
    dy = conv.output_gradient(given["g"], *(given[name] if names else None for name in MAP), "triton").exact
    x, x_norm = (given[name] for name in MASK)
    assert torch.equal(dx, (conv.of_input(dy, given["weight"], shape) * (conv.normalised(x, x_norm) > 0)).half())
    assert torch.equal(sums.double().sum(1), sums_of(dx, x, x_norm))


@pytest.mark.parametrize("shape", conv.SHAPES)
def test_is_exact_on_integers(implementation, device, shape):
    """dy comes through the BatchNorm behind, dx is masked by the one before, and brings the sums for its gradient."""
    torch.manual_seed(0)
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    dx, sums, others = gradient(given, shape, *MAP, *MASK)
    check_exact(dx, sums, given, shape, *MAP)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert others.numel() == 0


@pytest.mark.parametrize("shape", [*conv.FEW, POINTWISE], ids=str)
@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_alone_is_exact_on_integers(implementation, device, dtype, shape):
    given = conv.tensors(shape, dtype, device, conv.small_integers)
    dx, sums, others = gradient(given, shape)
    assert torch.equal(dx, conv.of_input(given["g"], given["weight"], shape).to(dtype))
    assert sums.numel() == others.numel() == 0


@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_the_error_is_no_more_than_twice_pytorch_s(implementation, device, dtype):
    torch.manual_seed(0)
    given = conv.tensors(conv.COMMON, dtype, device)
    pytorch = conv2d_input(conv.COMMON.x, given["weight"], given["g"], conv.COMMON.stride, conv.COMMON.padding)
    conv.check_error(gradient(given, conv.COMMON)[0], pytorch, conv.of_input(given["g"], given["weight"], conv.COMMON))


@pytest.mark.parametrize("skip_stride", [1, 2, 3])
@pytest.mark.parametrize(("shape", "branch"), [(POINTWISE, True), (STRIDED, False)], ids=str)
def test_the_join_is_exact_on_integers(implementation, device, shape, branch, skip_stride):
    """The skip's gradient, of all pixels or some, comes before the mask, which is z's; both joined get their sums."""
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    given |= {"skip": channels_last(given["skip"][:, :, ::skip_stride, ::skip_stride]), "skip_stride": skip_stride}
    joined = ("branch", "branch_norm") if branch else ()
    dx, sums, others = gradient(given, shape, "norm", "skip", "skip_stride", "z", *MASK, *joined)
    exact = conv.of_input(conv.spread(given["norm"][SCALE.value]) * given["g"], given["weight"], shape)
    exact[:, :, ::skip_stride, ::skip_stride] += given["skip"]
    assert torch.equal(dx, (exact * (given["z"] > 0)).half())
    assert torch.equal(sums.double().sum(1), sums_of(dx, given["x"], given["x_norm"]))
    if branch:
        assert torch.equal(others.double().sum(1), sums_of(dx, given["branch"], given["branch_norm"]))
    else:
        assert others.numel() == 0


def test_what_is_rectified_is_its_own_mask(implementation, device):
    """Without a raw x there is one sum; the other is 0."""
    given = conv.tensors(POINTWISE, torch.float16, device, conv.small_integers)
    dx, sums, _ = gradient(given, POINTWISE, "skip", "z")
    exact = conv.of_input(given["g"], given["weight"], POINTWISE) + given["skip"]
    assert torch.equal(dx, (exact * (given["z"] > 0)).half())
    assert torch.equal(sums[0].double().sum(0), dx.double().sum((0, 2, 3)))
    assert not sums[1].any()


def check(shape, dtype, device, implementation, *, mapped, masked, skipped):
    given = conv.tensors(shape, dtype, device)
    names = MAP * mapped + MASK * masked + ("skip",) * skipped
    dx, sums, _ = gradient(given, shape, *names)

    x, x_norm = (given[name] for name in MASK)
    dy = conv.output_gradient(given["g"], *(given[name] if mapped else None for name in MAP), implementation)
    exact = conv.of_input(dy.exact, given["weight"], shape)
    terms = shape.r * shape.s * shape.k // shape.groups
    error = conv.product_error(lambda g, w: conv.of_input(g, w, shape), dy, conv.as_it_is(given["weight"]), terms)
    if skipped:
        exact = exact + given["skip"].double()
        error = error + conv.U * (exact.abs() + error)
    bound = conv.rounded_bound(exact, error, dtype, implementation)
    if masked:
        value = conv.normalised(x, x_norm)
        exact = exact * (value > 0)
        # Where the mask is too near to tell, its argument's rounding decides.
        doubt = value.abs() <= (8 * conv.U if implementation == "triton" or dtype == torch.float32 else 2.0**-10) * (
            conv.normalised_terms(x, x_norm) + 1e-30
        )
        exact, bound = torch.where(doubt, dx.double(), exact), torch.where(doubt, torch.zeros_like(bound), bound)
    conv.check_close(dx, exact, bound, "dx")
    if masked:
        wanted, size = sums_of(dx, x, x_norm), dx.double().abs()
        sizes = torch.stack((size, size * (x.double() - conv.spread(x_norm[MEAN.value])).abs())).sum((1, 3, 4))
        conv.check_close(sums.double().sum(1), wanted, (dx.numel() // shape.c + 4) * conv.U * sizes, "sums")


@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_is_as_close_as_its_dtypes_allow(implementation, device, dtype):
    torch.manual_seed(0)
    check(STRIDED, dtype, device, implementation, mapped=True, masked=True, skipped=True)


@settings(max_examples=12)
@given(
    shape=conv.random_shapes(),
    dtype=st.sampled_from(conv.DTYPES),
    mapped=st.booleans(),
    masked=st.booleans(),
    skipped=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(implementation, device, shape, dtype, mapped, masked, skipped, seed):
    torch.manual_seed(seed)
    check(shape, dtype, device, implementation, mapped=mapped, masked=masked, skipped=skipped)


def test_the_sums_make_batch_norm_s_gradients(implementation, device):
    """d_gamma, d_beta and the map, by which the layer before goes on, are those of float64 through the statistics."""
    torch.manual_seed(0)
    given = conv.tensors(POINTWISE, torch.float32, device)
    x, c = given["x"].double(), POINTWISE.c
    gamma, beta = (torch.rand(2, c, device=device).double() + 0.5).requires_grad_()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    rstd = (var + 1e-4).rsqrt()
    norm = torch.stack((mean, gamma * rstd, beta, rstd, torch.zeros_like(mean))).detach().float()
    norm[MEAN.value] += 2.0**-10  # what MEAN_LOW makes up for
    norm[MEAN_LOW.value] = (mean - norm[MEAN.value].double()).float()
    dx, sums, _ = gradient(given | {"x_norm": norm}, POINTWISE, *MASK)
    rows = norm_gradient(sums, norm, x.numel() // c)
    leaf = x.detach().requires_grad_()
    v = torch.nn.functional.batch_norm(leaf, None, None, gamma, beta, True, eps=1e-4)
    exact = torch.autograd.grad(v, (leaf, gamma, beta), dx.double())
    through = conv.output_gradient(dx, given["x"], norm, rows[FACTORS], implementation).exact
    for got, wanted in zip((through, rows[D_GAMMA], rows[D_BETA]), exact, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_every_pixel_it_has_a_part_in(implementation, device, value):
    shape = conv.Shape(2, 3, 5, 5, 17, 3, 3, (1, 1), (1, 1))
    given = conv.tensors(shape, torch.float16, device)
    given["g"][1, 16, 2, 2] = value
    given["x"] = given["x"].abs() + 1
    given["x_norm"] = torch.tensor([0.0, 1, 0, 1, 0], device=device).view(5, 1).repeat(1, 3)
    dx, sums, _ = gradient(given, shape, *MASK)
    assert not dx[1, :, 1:4, 1:4].isfinite().any()
    assert dx[0].isfinite().all()
    assert not sums.sum(1).isfinite().any()


def test_a_nan_lets_the_gradient_pass(implementation, device):
    given = conv.tensors(POINTWISE, torch.float32, device)
    given["x"][0, 3, 1, 1] = torch.nan
    dx, sums, _ = gradient(given, POINTWISE, *MASK)
    assert dx[0, 3, 1, 1] != 0
    assert sums.sum(1).isfinite().sum() == 2 * POINTWISE.c - 1
    given["z"] = given["x"]
    assert gradient(given, POINTWISE, "z")[0][0, 3, 1, 1] != 0


@pytest.mark.parametrize("choices", [{"TMA": 1}, {"PERSISTENT": 4}], ids=str)
def test_tiles_by_tma_and_programs_of_several_tiles_give_the_same_bits(device, choices):
    given = conv.tensors(conv.TILES, torch.float16, device)
    for names in (), (*MAP, "skip", *MASK):
        loads = (3 if names else 2) * choices.get("TMA", 0)
        conv.check_same(lambda: gradient(given, conv.TILES, *names), loads, **choices)  # noqa: B023


@pytest.mark.parametrize(("shape", "box"), OF_CLASSES, ids=[str(shape) for shape, _ in OF_CLASSES])
def test_boxes_by_tma_are_exact_on_integers(device, shape, box):
    """Boxes are of the pixels of one class, whatever the stride; over an edge they have products of a plain g."""
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    for names in MAP, ():
        with conv.configured(**box, PERSISTENT=3):
            dx, sums, _ = gradient(given, shape, *names, *MASK)
        check_exact(dx, sums, given, shape, *names)


def test_two_runs_give_the_same_bits(implementation, device):
    given = conv.tensors(STRIDED, torch.float16, device)
    first, second = (gradient(given, STRIDED, *MASK) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(implementation, device):
    given = conv.tensors(TINY, torch.float32, device)
    arguments = given["g"], given["weight"], (TINY.h, TINY.w), *TINY.how
    for names in (), (*MAP, "skip", "z", *MASK, "branch", "branch_norm"):
        torch.library.opcheck(convolution_data_gradient.overload, arguments, {name: given[name] for name in names})
    torch.library.opcheck(norm_gradient.overload, (torch.rand(2, 3, TINY.c, device=device), given["x_norm"], 60))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": lambda t: t.contiguous()}, "convolution_data_gradient: g must be channels-last"),
        ({"size": lambda _: (5, 5)}, r"of that size, g must be \(2, 6, 3, 3\), got \(2, 6, 2, 3\)"),
        ({"weight": lambda t: t.to("meta")}, "weight must be torch.float32, on cpu; got torch.float32, on meta"),
        ({"weight": lambda t: t.half()}, "weight must be torch.float32"),
        ({"y": lambda _: None}, "y, factors come together or not at all; got no y"),
        ({"norm": lambda _: None}, "factors need norm"),
        ({"factors": lambda t: t[:1]}, r"factors must be \(2, 6\)"),
        ({"x": lambda _: channels_last(torch.zeros(2, 4, 4, 5))}, "x, x_norm come together"),
        ({"branch_norm": lambda _: torch.zeros(5, 4)}, "branch, branch_norm come together"),
        ({"skip": lambda _: channels_last(torch.zeros(2, 4, 4, 4))}, r"skip must be \(2, 4, 4, 5\)"),
        (
            {"skip": lambda _: channels_last(torch.zeros(2, 4, 4, 5)), "skip_stride": lambda _: 2},
            r"skip must be \(2, 4, 2, 3\)",
        ),
        ({"z": lambda _: torch.zeros(2, 4, 4, 5)}, "z must be channels-last"),
        ({"y": lambda t: t[:, :, :, :1].expand(2, 6, 2, 3)}, "y must be channels-last"),
    ],
)
def test_refuses(change, message):
    arguments = {"g": randn((2, 6, 2, 3), torch.float32, "cpu"), "weight": randn((6, 4, 3, 3), torch.float32, "cpu")}
    arguments |= {"size": (4, 5), "stride": (1, 1), "padding": (0, 0), "y": arguments["g"]}
    arguments |= {"norm": torch.rand(5, 6), "factors": torch.rand(2, 6)}
    for name, broken in change.items():
        arguments[name] = broken(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        convolution_data_gradient.launcher(**arguments)  # the operator would be the fake one for meta tensors
