"""The gradient of a convolution's weight, with the prologues of both operands, against PyTorch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.grad import conv2d_weight

from kernels import convolution_weight_gradient
from tests.kernels import convolutions as conv
from tests.kernels.images import channels_last, randn

PLAIN = conv.Shape(
    3, 19, 5, 5, 18, 1, 1
)  # in tests three parts share its five tiles of rows, two for each but the last
MAPS = "y", "norm", "factors", "x_norm"


def gradient(given, shape, dtype, *names):
    out = channels_last(torch.empty(shape.weight, dtype=dtype, device=given["g"].device))
    convolution_weight_gradient(given["g"], given["x"], out, *shape.how, **{name: given[name] for name in names})
    return out


def exact_of(given, shape):
    dy = conv.output_gradient(given["g"], *(given[name] for name in MAPS[:3]), "triton")
    return conv.of_weight(dy.exact, conv.activation(given["x"], given["x_norm"], "triton").exact, shape)


@pytest.mark.parametrize("shape", [*conv.SHAPES, PLAIN], ids=str)
def test_is_exact_on_integers(implementation, device, shape):
    torch.manual_seed(0)
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    assert torch.equal(gradient(given, shape, torch.float32, *MAPS).double(), exact_of(given, shape))


@pytest.mark.parametrize("shape", conv.FEW, ids=str)
@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_stores_in_either_dtype(implementation, device, dtype, shape):
    given = conv.tensors(shape, dtype, device, conv.small_integers)
    exact = conv.of_weight(given["g"], given["x"], shape)
    for out in {dtype, torch.float32}:
        assert torch.equal(gradient(given, shape, out), exact.to(out))


@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_the_error_is_no_more_than_twice_pytorch_s(implementation, device, dtype):
    torch.manual_seed(0)
    given = conv.tensors(conv.COMMON, dtype, device)
    pytorch = conv2d_weight(given["x"], conv.COMMON.weight, given["g"], conv.COMMON.stride, conv.COMMON.padding)
    conv.check_error(gradient(given, conv.COMMON, dtype), pytorch, conv.of_weight(given["g"], given["x"], conv.COMMON))


def check(shape, dtype, device, implementation, *, mapped, normal, out):
    given = conv.tensors(shape, dtype, device)
    options = {name: given[name] for name in MAPS[:3] * mapped + MAPS[3:] * normal}
    got = gradient(given, shape, out, *options)
    a = conv.activation(given["x"], options.get("x_norm"), implementation)
    dy = conv.output_gradient(given["g"], given["y"], options.get("norm"), options.get("factors"), implementation)
    exact, rows = conv.of_weight(dy.exact, a.exact, shape), given["g"].numel() // shape.k
    error = conv.product_error(lambda g, x: conv.of_weight(g, x, shape), dy, a, rows)
    conv.check_close(got, exact, conv.rounded_bound(exact, error, out, implementation), "dw")


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_is_as_close_as_its_dtypes_allow(implementation, device, dtype, formed):
    """Operands are formed as they are loaded, or are not: then a rounding of the parts would show."""
    torch.manual_seed(0)
    check(PLAIN, dtype, device, implementation, mapped=formed, normal=formed, out=dtype)


@settings(max_examples=12)
@given(
    shape=conv.random_shapes(),
    dtype=st.sampled_from(conv.DTYPES),
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
    given = conv.tensors(PLAIN, torch.float16, device)
    given[of][1, 17, 2, 2] = value
    finite = gradient(given, PLAIN, torch.float32).isfinite()
    spoilt = finite.transpose(0, 1) if of == "x" else finite
    assert not spoilt[17].any()
    assert spoilt[:17].all()


def test_tiles_by_tma_give_the_same_bits(device):
    given = conv.tensors(conv.TILES, torch.float16, device)
    for names, loads in ((), 2), (MAPS, 3):
        conv.check_same(lambda: (gradient(given, conv.TILES, torch.float32, *names),), loads, TMA=1)  # noqa: B023


@pytest.mark.parametrize(("shape", "box"), conv.BOXES, ids=[str(shape) for shape, _ in conv.BOXES])
def test_boxes_by_tma_are_exact_on_integers(device, shape, box):
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    with conv.configured(**box, TAPS=shape.s):
        got = gradient(given, shape, torch.float32, *MAPS)
    assert torch.equal(got.double(), exact_of(given, shape))


@pytest.mark.parametrize("taps", [2, 6])
@pytest.mark.parametrize("c", [19, 3], ids=["taps", "runs"])
def test_several_taps_in_a_tile_give_the_same_bits(device, c, taps):
    """Runs are the taps of a row, side by side in memory where there are few channels."""
    shape = conv.Shape(2, c, 9, 7, 18, 6, 3, (2, 1), (2, 1))
    given = conv.tensors(shape, torch.float16, device)
    for names in (), MAPS:
        several = []
        for number in (1, taps):
            with conv.configured(TMA=0, TAPS=number):
                several.append(gradient(given, shape, torch.float32, *names))
        assert torch.equal(*several)


def test_taps_that_do_not_fill_tiles_are_refused():
    shape = conv.Shape(1, 9, 4, 4, 4, 3, 3)
    with conv.configured(TAPS=2), pytest.raises(ValueError, match="TAPS divides the taps"):
        gradient(conv.tensors(shape, torch.float16, "cpu"), shape, torch.float32)


def test_two_runs_give_the_same_bits(implementation, device):
    given = conv.tensors(PLAIN, torch.float16, device)
    first, second = (gradient(given, PLAIN, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck(implementation, device):
    given = conv.tensors(PLAIN, torch.float32, device)
    arguments = given["g"], given["x"], channels_last(torch.zeros(PLAIN.weight, device=device)), *PLAIN.how
    for names in (), MAPS:
        torch.library.opcheck(convolution_weight_gradient.overload, arguments, {name: given[name] for name in names})


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
