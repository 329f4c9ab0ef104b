"""Both gradients of a 1 x 1 convolution in one kernel, against float64 and against the two kernels it stands for.

On a CPU the kernel is emulated (`tests.kernels.gluon`), and Triton's compiler is asked what becomes of it on Hopper.
"""

from importlib import import_module

import pytest
import torch

from kernels import convolution_data_gradient, convolution_gradients, convolution_weight_gradient
from kernels.norm_rows import MEAN, SCALE
from tests.kernels import convolutions as conv
from tests.kernels.gluon import Emulated
from tests.kernels.images import channels_last

module = import_module("kernels.convolution_gradients")
# 285 pixels are 4 full tiles and a ragged one: a program of the two takes more turns than the ring has stages.
WIDENING, NARROWING = conv.Shape(3, 64, 5, 19, 256, 1, 1), conv.Shape(3, 256, 5, 19, 64, 1, 1)
FEW = conv.Shape(1, 256, 1, 3, 64, 1, 1)
CASES = [(WIDENING, False, False), (NARROWING, True, True), (NARROWING, True, False)]


def each(*cases, dtype=torch.float16):
    """Returns parameters: shape, rectified, adds, dtype."""
    words = [
        f"{shape.n * shape.h * shape.w}-{shape.k}-{shape.c}{'-rectified' * rectified}{'-skip' * adds}-{dtype}"
        for shape, rectified, adds in cases
    ]
    return [pytest.param(*case, dtype, id=word) for case, word in zip(cases, words, strict=True)]


cases = pytest.mark.parametrize(("shape", "rectified", "adds", "dtype"), each(*CASES[:2]))


@pytest.fixture(params=["reference", "early", "late"])
def kernel(request, device, monkeypatch):
    """Every test that asks for it runs with the reference and with the kernel, which on a CPU is emulated twice."""
    monkeypatch.setenv("NVCNN_KERNELS", "reference" if request.param == "reference" else "triton")
    monkeypatch.setattr(module, "configuration", lambda *_: module.COMPUTED | {"PROGRAMS": 2})
    if device.type == "cuda" and request.param != "reference":
        if request.param == "late" or torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("the kernel is for Hopper, and there it is the same both times")
    elif request.param != "reference":
        monkeypatch.setattr(module, "runs_gluon", lambda device: True)
        monkeypatch.setattr(module, "kernel", Emulated(module, "kernel", request.param == "late"))
        monkeypatch.setattr("kernels.partial_sums.SUM_CONFIG", {"BLOCK_PARTS": 4, "BLOCK": 2**14, "num_warps": 4})
    return request.param


def given_for(shape, dtype, device, make=conv.randn):
    given = conv.tensors(shape, dtype, device, make)
    return {name: given[name] for name in ("g", "y", "norm", "factors", "x", "x_norm", "weight", "skip")}


def gradients(given, rectified, adds):
    """Returns dx, dw and sums, added over their parts."""
    out = channels_last(torch.empty_like(given["weight"], dtype=torch.float32))
    names = ("y", "norm", "factors", "x_norm") + ("skip",) * adds
    options = {name: given[name] for name in names} | {"rectified": rectified}
    dx, sums = convolution_gradients(given["g"], given["x"], given["weight"], out, **options)
    return dx, out, sums.double().sum(1)


def separate(given, rectified, adds, dtype=torch.float32):
    """Returns the same by the two ops."""
    out = channels_last(torch.empty_like(given["weight"], dtype=dtype))
    how, prologue = ((1, 1), (0, 0), 1), {name: given[name] for name in ("y", "norm", "factors")}
    convolution_weight_gradient(
        given["g"], given["x"], out, *how, **prologue, x_norm=None if rectified else given["x_norm"]
    )
    epilogue = {name: given[name] for name in ("x", "x_norm") + ("skip",) * adds}
    size = given["x"].shape[2:]
    dx, sums, _ = convolution_data_gradient(given["g"], given["weight"], size, *how, **prologue, **epilogue)
    return dx, out, sums.double().sum(1)


def wide(given):
    return {name: t.double() for name, t in given.items()}


@pytest.mark.parametrize(
    ("shape", "rectified", "adds", "dtype"),
    each(*CASES, (FEW, True, True)) + each((WIDENING, True, True), dtype=torch.bfloat16),
)
def test_is_exact_on_integers(kernel, device, shape, rectified, adds, dtype):
    """The last tile is ragged, and few rows are one program."""
    torch.manual_seed(0)
    given = given_for(shape, dtype, device, conv.small_integers)
    dx, dw, sums = gradients(given, rectified, adds)
    dy = conv.output_gradient(*(given[name] for name in ("g", "y", "norm", "factors")), "triton").exact
    value = conv.normalised(given["x"], given["x_norm"])
    exact = conv.of_input(dy, given["weight"], shape) + (given["skip"] if adds else 0)
    assert torch.equal(dx, (exact * (value > 0)).to(dtype))
    assert dx.is_contiguous(memory_format=torch.channels_last)
    a = given["x"] if rectified else value.relu()
    assert torch.equal(dw, conv.of_weight(dy, a, shape).float())
    centered = given["x"].double() - conv.spread(given["x_norm"][MEAN.value])
    assert torch.equal(sums, torch.stack((dx.double().sum((0, 2, 3)), (dx.double() * centered).sum((0, 2, 3)))))


@pytest.mark.parametrize(("shape", "rectified", "adds", "dtype"), each(CASES[0]) + each(CASES[1], dtype=torch.bfloat16))
def test_is_what_the_two_ops_compute(kernel, device, shape, rectified, adds, dtype):
    """The masks are the same to the bit, whatever rounds; the reference is theirs; the kernel is as close as theirs."""
    torch.manual_seed(0)
    given = given_for(shape, dtype, device)
    ours = gradients(given, rectified, adds)
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setenv("NVCNN_KERNELS", "reference")
        theirs = separate(given, rectified, adds)
        patch.setenv("NVCNN_KERNELS", "reference")
        exact = separate(wide(given), rectified, adds, torch.float64)
    if kernel == "reference" and device.type == "cpu":
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(ours[0] == 0, theirs[0] == 0)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - right).norm() <= 1.2 * (other.double() - right).norm() + 1e-6 * right.norm()


def test_what_is_not_there_does_not_count_where_it_would_overflow(kernel, device):
    """Zeros of rows that are outside would become infinite by either norm, and 0 times infinity is NaN."""
    torch.manual_seed(0)
    given = given_for(WIDENING, torch.float16, device)
    given["norm"][MEAN.value], given["factors"][0] = 2000, 100
    given["y"] = channels_last(given["y"] * 0.1 + 2000)
    given["x_norm"][MEAN.value], given["x_norm"][SCALE.value] = -2000, 100
    given["x"] = channels_last(given["x"] * 0.1 - 2000)
    assert all(result.isfinite().all() for result in gradients(given, False, False))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@cases
def test_a_value_that_is_not_finite_reaches_what_it_has_a_part_in(kernel, device, shape, rectified, adds, dtype, value):
    given = given_for(shape, dtype, device)
    given["x"], given["x_norm"] = given["x"].abs() + 1, given["x_norm"].abs()
    given["x_norm"][MEAN.value] = 0
    given["g"][2, 16, 4, 18] = value  # the last row
    dx, dw, sums = gradients(given, rectified, adds)
    assert not dx[2, :, 4, 18].isfinite().any()
    assert dx[:2].isfinite().all()
    assert dx[2, :, :4].isfinite().all()
    assert not dw[16].isfinite().any()
    assert dw[:16].isfinite().all()
    assert not sums.isfinite().any()


@cases
def test_a_nan_lets_the_gradient_pass_and_infinity_is_masked(kernel, device, shape, rectified, adds, dtype):
    """The mask selects: a product with it would make NaN of an infinite gradient."""
    given = given_for(shape, dtype, device)
    given["x"][0, 3, 1, 1] = torch.nan
    dx, dw, sums = gradients(given, rectified, adds)
    assert dx[0, 3, 1, 1] != 0
    assert dw[:, 3].isnan().all()
    assert sums.isfinite().sum() == 2 * shape.c - 1
    given["x"] = -given["x"].abs().nan_to_num()
    given["x_norm"][:3] = torch.tensor([0.0, 1, -1], device=device).view(3, 1)
    given["g"][:] = torch.inf
    assert torch.equal(gradients(given, rectified, adds)[0], torch.zeros_like(given["x"]))


def test_two_runs_give_the_same_bits(kernel, device):
    """The second, which repeats what the first has launched, has other tensors of the same form."""
    torch.manual_seed(0)
    given = given_for(NARROWING, torch.float16, device)
    again = {name: t.clone() for name, t in given.items()}
    first = gradients(given, True, True)
    for t in given.values():
        t.fill_(torch.nan)
    assert all(map(torch.equal, first, gradients(again, True, True)))


def test_opcheck(device, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    given = given_for(conv.Shape(1, 3, 2, 3, 5, 1, 1), torch.float16, device)
    names = ("g", "x", "weight", "weight", "y", "norm", "factors", "x_norm")
    torch.library.opcheck(convolution_gradients.overload, tuple(given[name].clone() for name in names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": lambda t: t.contiguous()}, "convolution_gradients: g must be channels-last"),
        ({"g": lambda t: t[:1]}, r"g must be \(2, 64, 4, 5\)"),
        ({"weight": lambda t: channels_last(torch.zeros(64, 256, 3, 3).half())}, r"are \(K, C, 1, 1\)"),
        ({"out": lambda t: t[:32]}, r"are \(K, C, 1, 1\)"),
        ({"y": lambda t: t.float()}, "y must be .*float16"),
        ({"factors": lambda t: t[:1]}, r"factors must be \(2, 64\)"),
        ({"rectified": lambda _: False}, "skip is for an x that is rectified"),
        ({"skip": lambda t: t[:1]}, r"skip must be \(2, 256, 4, 5\)"),
    ],
)
def test_refuses(change, message):
    arguments = given_for(conv.Shape(2, 256, 4, 5, 64, 1, 1), torch.float16, "cpu")
    arguments |= {"out": arguments["weight"].clone(), "rectified": True}
    for name, broken in change.items():
        arguments[name] = broken(arguments[name])
    with pytest.raises(ValueError, match=message):
        convolution_gradients.launcher(**arguments)


def test_says_why_the_kernel_cannot_run(monkeypatch):
    def fails(shape, dtype, message):
        given = {name: t.to("meta") for name, t in given_for(shape, dtype, "cpu").items() if name != "skip"}
        with pytest.raises(ValueError, match=message):
            convolution_gradients.launcher(**given, out=given["weight"])

    fails(conv.Shape(1, 64, 2, 3, 256, 1, 1), torch.float32, "fp16 or bf16, 256 and 64 or 64 and 256 channels")
    fails(conv.Shape(1, 64, 2, 3, 128, 1, 1), torch.float16, "got torch.float16, 128 and 64")
    monkeypatch.setattr("kernels.conv_shape.capability", lambda device: 8)
    fails(conv.Shape(1, 64, 2, 3, 256, 1, 1), torch.float16, "for Hopper, compute capability 9; this GPU has 8")
    monkeypatch.setattr("kernels.conv_shape.capability", lambda device: 9)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 8)
    fails(conv.Shape(1, 64, 2, 3, 256, 1, 1), torch.float16, "begin at a multiple of 16 bytes")
