"""The gradient of a convolution's weight, with the prologues of both operands, against PyTorch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.grad import conv2d_weight

from kernels import convolution_weight_gradient
from tests.kernels.convolutions import (
    BOXES,
    COMMON,
    DTYPES,
    FEW,
    SHAPES,
    TILES,
    Shape,
    activation,
    check_close,
    check_error,
    check_same,
    configured,
    integer_norm,
    of_weight,
    output_gradient,
    product_error,
    random_norm,
    random_shapes,
    rounded_bound,
    small_integers,
    tensors,
)
from tests.kernels.images import channels_last, randn

PLAIN = Shape(3, 19, 5, 4, 18, 1, 1)  # in tests its rows are shared out to three parts


def gradient(given, shape, dtype, **options):
    out = channels_last(torch.empty(shape.weight, dtype=dtype, device=given["g"].device))
    convolution_weight_gradient(given["g"], given["x"], out, *shape.how, **options)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_is_exact_on_integers(implementation, device, shape):
    torch.manual_seed(0)
    given = tensors(shape, torch.float16, device, small_integers)
    norm, factors = integer_norm(5, shape.k, device), integer_norm(2, shape.k, device)
    x_norm = integer_norm(5, shape.c, device)
    maps = {"y": given["y"], "norm": norm, "factors": factors, "x_norm": x_norm}
    got = gradient(given, shape, torch.float32, **maps)
    dy = output_gradient(given["g"], given["y"], norm, factors, implementation).exact
    assert torch.equal(got.double(), of_weight(dy, activation(given["x"], x_norm, implementation).exact, shape))


@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stores_in_either_dtype(implementation, device, dtype, shape):
    given = tensors(shape, dtype, device, small_integers)
    exact = of_weight(given["g"], given["x"], shape)
    for out in {dtype, torch.float32}:
        assert torch.equal(gradient(given, shape, out), exact.to(out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_no_more_than_twice_pytorch_s(implementation, device, dtype):
    torch.manual_seed(0)
    given = tensors(COMMON, dtype, device)
    pytorch = conv2d_weight(given["x"], COMMON.weight, given["g"], COMMON.stride, COMMON.padding)
    check_error(gradient(given, COMMON, dtype), pytorch, of_weight(given["g"], given["x"], COMMON))


def check(shape, dtype, device, implementation, *, mapped, normal, out):
    given = tensors(shape, dtype, device)
    options = {}
    if mapped:
        options |= {"y": given["y"], "norm": random_norm(shape.k, device)}
        options["factors"] = torch.randn(2, shape.k, device=device)
    if normal:
        options["x_norm"] = random_norm(shape.c, device)
    got = gradient(given, shape, out, **options)
    a = activation(given["x"], options.get("x_norm"), implementation)
    dy = output_gradient(given["g"], given["y"], options.get("norm"), options.get("factors"), implementation)
    exact, rows = of_weight(dy.exact, a.exact, shape), given["g"].numel() // shape.k
    error = product_error(lambda g, x: of_weight(g, x, shape), dy, a, rows)
    check_close(got, exact, rounded_bound(exact, error, out, implementation), "dw")


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_as_close_as_its_dtypes_allow(implementation, device, dtype):
    torch.manual_seed(0)
    check(PLAIN, dtype, device, implementation, mapped=True, normal=True, out=dtype)


@settings(max_examples=12)
@given(
    shape=random_shapes(),
    dtype=st.sampled_from(DTYPES),
    mapped=st.booleans(),
    normal=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(implementation, device, shape, dtype, mapped, normal, seed):
    torch.manual_seed(seed)
    check(shape, dtype, device, implementation, mapped=mapped, normal=normal, out=torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["g", "x"])
def test_a_value_that_is_not_finite_spoils_its_channel_alone(implementation, device, of, value):
    given = tensors(PLAIN, torch.float16, device)
    given[of][1, 17, 2, 2] = value
    finite = gradient(given, PLAIN, torch.float32).isfinite()
    spoilt = finite.transpose(0, 1) if of == "x" else finite
    assert not spoilt[17].any()
    assert spoilt[:17].all()


def test_tiles_by_tma_give_the_same_bits(device):
    given = tensors(TILES, torch.float16, device)
    norm, x_norm = random_norm(TILES.k, device), random_norm(TILES.c, device)
    every = {"y": given["y"], "norm": norm, "factors": norm[:2].clone(), "x_norm": x_norm}
    for options, loads in ({}, 2), (every, 3):
        check_same(lambda: (gradient(given, TILES, torch.float32, **options),), loads, TMA=1)  # noqa: B023


@pytest.mark.parametrize(("shape", "box"), BOXES, ids=[str(shape) for shape, _ in BOXES])
def test_boxes_by_tma_are_exact_on_integers(device, shape, box):
    given = tensors(shape, torch.float16, device, small_integers)
    norm, factors = integer_norm(5, shape.k, device), integer_norm(2, shape.k, device)
    x_norm = integer_norm(5, shape.c, device)
    maps = {"y": given["y"], "norm": norm, "factors": factors, "x_norm": x_norm}
    with configured(**box):
        got = gradient(given, shape, torch.float32, **maps)
    dy = output_gradient(given["g"], given["y"], norm, factors, "triton").exact
    assert torch.equal(got.double(), of_weight(dy, activation(given["x"], x_norm, "triton").exact, shape))


def test_two_runs_give_the_same_bits(implementation, device):
    given = tensors(PLAIN, torch.float16, device)
    first, second = (gradient(given, PLAIN, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck(implementation, device):
    given = tensors(PLAIN, torch.float32, device)
    of_y, of_x = random_norm(PLAIN.k, device), random_norm(PLAIN.c, device)
    out = channels_last(torch.zeros(PLAIN.weight, device=device))
    every = {"y": given["y"], "norm": of_y, "factors": of_y[:2].clone(), "x_norm": of_x}
    for options in ({}, every):
        torch.library.opcheck(convolution_weight_gradient.overload, (given["g"], given["x"], out, *PLAIN.how), options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": lambda t: t.contiguous()}, "convolution_weight_gradient: g must be channels-last"),
        ({"g": lambda _: channels_last(torch.zeros(2, 6, 3, 3))}, r"g must be \(2, 6, 2, 3\), got \(2, 6, 3, 3\)"),
        ({"x": lambda t: t.half()}, "x must be torch.float32"),
        ({"out": lambda t: t.half()}, "out must be torch.float32, on"),
        ({"out": lambda t: t.to("meta")}, "out must be torch.float32, on cpu; got torch.float32, on meta"),
        ({"out": lambda t: t.contiguous()}, "out must be channels-last"),
        ({"out": lambda t: t[:1].expand(6, -1, -1, -1)}, "out must be channels-last"),
        ({"y": lambda _: None}, "y, factors come together or not at all; got no y"),
        ({"norm": lambda _: None}, "factors need norm"),
        ({"x_norm": lambda _: torch.rand(5, 5)}, r"x_norm must be \(5, 4\)"),
    ],
)
def test_refuses(change, message):
    arguments = {"g": randn((2, 6, 2, 3), torch.float32, "cpu"), "x": randn((2, 4, 4, 5), torch.float32, "cpu")}
    arguments |= {"out": randn((6, 4, 3, 3), torch.float32, "cpu"), "stride": (1, 1), "padding": (0, 0)}
    arguments |= {"y": arguments["g"], "norm": torch.rand(5, 6), "factors": torch.rand(2, 6)}
    for name, broken in change.items():
        arguments[name] = broken(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        convolution_weight_gradient.launcher(**arguments)  # the operator would be the fake one for meta tensors
