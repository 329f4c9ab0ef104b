"""The forward convolution, with its prologues and epilogues, against PyTorch in float64."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import batch_norm_statistics, convolution, norm_from_sums
from kernels.conv_shape import conv_shape_of
from tests.kernels import convolutions as conv
from tests.kernels.images import channels_last, poisoned, randn

POINTWISE = conv.Shape(2, 21, 5, 4, 19, 1, 1)


def forward(given, shape, **options):
    return convolution(given["x"], given["weight"], *shape.how, **options)


def sums_of(y, center):
    d = y.double() - conv.spread(center)
    return torch.stack((d.sum((0, 2, 3)), d.square().sum((0, 2, 3))))


@pytest.mark.parametrize("shape", conv.SHAPES)
def test_is_exact_on_integers(implementation, device, shape):
    """x is normalised by its producer's norm, behind which padding is 0, and y brings the sums for the next norm."""
    torch.manual_seed(0)
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    y, z, sums = forward(given, shape, norm=given["x_norm"], center=given["center"])
    exact = conv.convolved(conv.activation(given["x"], given["x_norm"], implementation).exact, given["weight"], shape)
    assert torch.equal(y, exact.half())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sums.double().sum(1), sums_of(y, given["center"]))
    assert z.numel() == 0


@pytest.mark.parametrize("shape", conv.FEW, ids=str)
@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_alone_is_exact_on_integers(implementation, device, dtype, shape):
    given = conv.tensors(shape, dtype, device, conv.small_integers)
    y, z, sums = forward(given, shape)
    assert torch.equal(y, conv.convolved(given["x"], given["weight"], shape).to(dtype))
    assert z.numel() == sums.numel() == 0


@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_the_error_is_no_more_than_twice_pytorch_s(implementation, device, dtype):
    torch.manual_seed(0)
    given = conv.tensors(conv.COMMON, dtype, device)
    pytorch = F.conv2d(given["x"], given["weight"], None, conv.COMMON.stride, conv.COMMON.padding)
    conv.check_error(forward(given, conv.COMMON)[0], pytorch, conv.convolved(given["x"], given["weight"], conv.COMMON))


def check(shape, dtype, device, implementation, prologue, sums):
    given = conv.tensors(shape, dtype, device)
    weight, center = given["weight"], given["center"] if sums else None
    names = {"none": (), "norm": ("x_norm",), "join": ("x_norm", "residual")}
    operands = [given[name] for name in names.get(prologue, ("x_norm", "residual", "branch_norm"))]
    arguments = dict(zip(("norm", "residual", "residual_norm"), operands, strict=False))
    y, z, got = forward(given, shape, **arguments, center=center)

    a = conv.activation(given["x"], arguments.get("norm"), implementation, *operands[1:])
    if "residual" in arguments:
        conv.check_close(z, a.exact, a.error, "z")
        a = conv.as_it_is(z)  # which is what is multiplied
    exact = conv.convolved(a.exact, weight, shape)
    terms = shape.r * shape.s * shape.c // shape.groups
    error = conv.product_error(lambda a, w: conv.convolved(a, w, shape), a, conv.as_it_is(weight), terms)
    conv.check_close(y, exact, conv.rounded_bound(exact, error, dtype, implementation), "y")
    if sums:
        d = y.double() - conv.spread(center)
        values = y.numel() // shape.k + 4
        for i, value in enumerate((d, d.square())):
            bound = values * conv.U * value.abs().sum((0, 2, 3)) + values * 1e-30
            conv.check_close(got[i].double().sum(0), value.sum((0, 2, 3)), bound, f"sums[{i}]")


@pytest.mark.parametrize("prologue", ["norm", "join", "raw join"])
@pytest.mark.parametrize("dtype", conv.DTYPES)
def test_is_as_close_as_its_dtypes_allow(implementation, device, dtype, prologue):
    torch.manual_seed(0)
    check(POINTWISE, dtype, device, implementation, prologue, True)


@settings(max_examples=12)
@given(
    shape=conv.random_shapes(),
    dtype=st.sampled_from(conv.DTYPES),
    prologue=st.sampled_from(["none", "norm"]),
    sums=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_shape(implementation, device, shape, dtype, prologue, sums, seed):
    torch.manual_seed(seed)
    check(shape, dtype, device, implementation, prologue, sums)


@pytest.mark.parametrize("raw", [False, True])
def test_the_join_is_exact_on_integers(implementation, device, raw):
    given = conv.tensors(POINTWISE, torch.float16, device, conv.small_integers)
    norm, residual, residual_norm = given["x_norm"], given["residual"], given["branch_norm"] if raw else None
    y, z, _ = forward(given, POINTWISE, norm=norm, residual=residual, residual_norm=residual_norm)
    exact = conv.activation(given["x"], norm, implementation, residual, residual_norm).exact
    assert torch.equal(z, exact.half())
    assert torch.equal(y, conv.convolved(exact, given["weight"], POINTWISE).half())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_scale_shift_add_relu_are_exact_on_integers(implementation, device, scaled, add, relu):
    """They are a bias and ReLU, or BatchNorm, join and ReLU as evaluation folds them."""
    shape = conv.Shape(2, 5, 6, 5, 19, 3, 3, (2, 1), (1, 1))
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    scale, shift = given["factors"]
    options = {"scale": scale if scaled else None, "shift": shift, "add": given["g"] if add else None, "relu": relu}
    y, _, sums = forward(given, shape, center=given["center"], **options)
    exact = conv.convolved(given["x"], given["weight"], shape) * (conv.spread(scale) if scaled else 1)
    exact = exact + conv.spread(shift) + (given["g"].double() if add else 0)
    assert torch.equal(y, (exact.relu() if relu else exact).half())
    assert torch.equal(sums.double().sum(1), sums_of(y, given["center"]))


def check_slice(given, shape, pitch, first):
    scale, shift = given["factors"]
    exact = conv.convolved(given["x"], given["weight"], shape) * conv.spread(scale) + conv.spread(shift)
    whole, others = poisoned(given["g"], pitch), [*range(first), *range(first + shape.k, pitch)]
    out = whole[:, first : first + shape.k]
    y, *_ = forward(given, shape, scale=scale, shift=shift, relu=True, out=out)
    assert y.numel() == 0
    assert torch.equal(out, exact.relu().half())
    assert whole[:, others].isnan().all()


@pytest.mark.parametrize(("pitch", "first"), [(64, 16), (72, 8), (45, 3)])
@pytest.mark.parametrize("shape", [conv.TILES, conv.MODELS[5]], ids=str)
def test_a_slice_is_written_and_no_more(implementation, device, shape, pitch, first):
    check_slice(conv.tensors(shape, torch.float16, device, conv.small_integers), shape, pitch, first)


@pytest.mark.parametrize(("shape", "box"), [conv.BOXES[0], conv.BOXES[3], (conv.TILES, {"TMA": 1})], ids=str)
def test_a_slice_is_written_by_tiles_of_tma(device, shape, box):
    with conv.configured(**box):
        check_slice(conv.tensors(shape, torch.float16, device, conv.small_integers), shape, 48, 8)


def test_the_sums_make_the_norm_of_the_statistics(implementation, device):
    torch.manual_seed(0)
    given = conv.tensors(POINTWISE, torch.float16, device)
    center, (gamma, beta) = given["center"], given["factors"]
    y, _, sums = forward(given, POINTWISE, center=center)
    scratch = [torch.empty(POINTWISE.k, device=device) for _ in range(4)]
    norm = norm_from_sums(sums, center, y.numel() // POINTWISE.k, gamma, beta, *scratch[:2], 1e-4)
    assert torch.allclose(norm, batch_norm_statistics(y, gamma, beta, *scratch[2:], 1e-4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_every_output_it_has_a_part_in(implementation, device, value):
    shape = conv.Shape(2, 17, 5, 5, 3, 3, 3, (1, 1), (1, 1))
    given = conv.tensors(shape, torch.float16, device)
    given["x"][1, 16, 2, 2] = value
    y, _, sums = forward(given | {"weight": given["weight"].abs()}, shape, norm=given["x_norm"], center=given["center"])
    assert not y[1, :, 1:4, 1:4].isfinite().any()
    assert y[0].isfinite().all()
    assert y[1, :, 0].isfinite().all()
    assert not sums.sum(1).isfinite().any()


@pytest.mark.parametrize("choices", [{"TMA": 1}, {"PERSISTENT": 4}], ids=str)
def test_tiles_by_tma_and_programs_of_several_tiles_give_the_same_bits(device, choices):
    given = conv.tensors(conv.TILES, torch.float16, device)
    scale, shift = given["factors"]
    norm, sums = {"norm": given["x_norm"]}, {"center": given["center"]}
    joined = {"residual": given["residual"], "residual_norm": given["branch_norm"]}
    folded = {"scale": scale, "shift": shift, "add": given["g"], "relu": True}
    for options in (sums, sums | norm, sums | norm | joined, folded):
        conv.check_same(lambda: forward(given, conv.TILES, **options), 2 * choices.get("TMA", 0), **choices)  # noqa: B023


def test_a_slice_that_tma_cannot_reach_is_loaded_by_pointers(device):
    given = conv.tensors(conv.TILES, torch.float16, device)
    weight = given["weight"].new_empty(given["weight"].numel() + 4)[4:].view(given["weight"].shape)
    given["weight"] = weight.copy_(given["weight"])
    assert weight.data_ptr() % 16 == 8
    conv.check_same(lambda: forward(given, conv.TILES), 1, TMA=1)


@pytest.mark.parametrize(("shape", "box"), conv.BOXES, ids=[str(shape) for shape, _ in conv.BOXES])
def test_boxes_by_tma_are_exact_on_integers(device, shape, box):
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    for norm in given["x_norm"], None:  # without one a box that reaches over an edge has products there
        exact = conv.convolved(conv.activation(given["x"], norm, "triton").exact, given["weight"], shape)
        with conv.configured(**box, PERSISTENT=3):
            y, _, sums = forward(given, shape, norm=norm, center=given["center"], add=given["g"])
        assert torch.equal(y, (exact + given["g"].double()).half())
        assert torch.equal(sums.double().sum(1), sums_of(y, given["center"]))


def test_what_a_box_reads_outside_of_the_image_is_padding(device):
    shape = conv.Shape(2, 16, 5, 4, 8, 2, 3, padding=(1, 1))
    given = conv.tensors(shape, torch.float16, device, conv.small_integers)
    arguments, sums = (given["x"], given["weight"], *shape.how), {"center": given["center"]}
    with conv.configured(**conv.OF_ONE_IMAGE):
        assert torch.equal(convolution(*arguments)[0], conv.convolved(given["x"], given["weight"], shape).half())
        torch.library.opcheck(convolution.overload, arguments, sums, test_utils="test_faketensor")


@pytest.mark.parametrize(
    "shape",
    [
        *(conv.MODELS[0], conv.MODELS[9]),  # 9 channels, 4 groups
        conv.Shape(1, 16, 6, 6, 18, 3, 3, (2, 2)),
        conv.Shape(1, 16, 6, 6, 18, 1, 1, (2, 2), (1, 1)),
        conv.Shape(1, 8, 6, 6, 18, 3, 3),
    ],
    ids=str,
)
def test_refuses_tma_where_tiles_are_no_boxes(device, shape):
    given = conv.tensors(shape, torch.float16, device)
    refused = rf"convolution: TMA is for .*'TMA': 1.* for N=1 C={shape.c} .*x \(1, {shape.c}, .*\)"
    with conv.configured(**conv.OF_ONE_IMAGE), pytest.raises(ValueError, match=refused):
        forward(given, shape)


@pytest.mark.parametrize("width", [0, 3])
def test_refuses_boxes_that_no_tile_fills(device, width):
    shape = conv.BOXES[0][0]
    given = conv.tensors(shape, torch.float16, device)
    refused = rf"convolution: with TMA, BOX_H x BOX_W divides BLOCK_ROWS; got .*'BOX_W': {width}.* for N=1 C=24"
    with conv.configured(TMA=1, BOX_H=1, BOX_W=width), pytest.raises(ValueError, match=refused):
        forward(given, shape)


def test_two_runs_give_the_same_bits(implementation, device):
    given = conv.tensors(POINTWISE, torch.float16, device)
    options = {"norm": given["x_norm"], "residual": given["residual"], "center": given["center"]}
    first, second = (forward(given, POINTWISE, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(implementation, device):
    given = conv.tensors(POINTWISE, torch.float32, device)
    x, weight, how = given["x"], given["weight"], POINTWISE.how
    norm, of_y = given["x_norm"], given["center"]
    for arguments in (
        {},
        {"norm": norm, "residual": given["residual"], "residual_norm": norm, "center": of_y},
        {"scale": of_y, "shift": of_y, "add": given["g"], "relu": True},
        {"scale": of_y, "shift": of_y, "out": poisoned(given["g"], 32)[:, 8:27]},
    ):
        torch.library.opcheck(convolution.overload, (x, weight, *how), arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t.contiguous()}, "convolution: x must be channels-last"),
        ({"x": lambda _: channels_last(torch.zeros(2, 3, 4, 5))}, r"1 groups .*\(6, 4, 3, 3\) take 4 channels.*has 3"),
        ({"x": lambda _: channels_last(torch.zeros(2, 4, 1, 1))}, r"1 x 1 pixels .* smaller than .* 3 x 3"),
        ({"weight": lambda t: t.contiguous()}, "weight must be channels-last"),
        ({"weight": lambda t: t.to("meta")}, "weight must be torch.float32, on cpu; got torch.float32, on meta"),
        ({"weight": lambda t: t.half()}, "weight must be torch.float32, on cpu; got torch.float16"),
        ({"stride": lambda _: (0, 1)}, "stride and padding are two each"),
        ({"stride": lambda _: (1,)}, "stride and padding are two each"),
        ({"groups": lambda _: 4, "weight": lambda t: channels_last(t[:, :1].clone())}, "4 groups of the weight"),
        ({"norm": lambda t: t[:4]}, r"norm must be \(5, 4\)"),
        ({"center": lambda _: torch.zeros(5)}, r"center must be \(6,\).*got \(5,\)"),
        ({"shift": lambda _: torch.zeros(6, 1)}, r"shift must be \(6,\)"),
        ({"add": lambda _: channels_last(torch.zeros(2, 6, 3, 3))}, r"add must be \(2, 6, 2, 3\)"),
        ({"residual": lambda _: channels_last(torch.zeros(2, 4, 4, 5))}, "a residual is joined by a 1 x 1 weight"),
        (
            {"norm": lambda _: None, "residual": lambda _: channels_last(torch.zeros(2, 4, 4, 5))},
            "a residual needs norm",
        ),
        ({"residual_norm": lambda _: torch.zeros(5, 4)}, "residual_norm need a residual"),
        ({"out": lambda _: torch.zeros(2, 6, 2, 3)}, "out must be channels-last or a slice of such channels"),
        ({"out": lambda _: channels_last(torch.zeros(2, 6, 3, 3))}, r"out must be \(2, 6, 2, 3\).*got \(2, 6, 3, 3\)"),
        (
            {name: lambda _: channels_last(torch.zeros(2, 6, 2, 3)) for name in ("add", "out")},
            "there must be no add; got .* an add",
        ),
    ],
)
def test_refuses(change, message):
    arguments = {"x": randn((2, 4, 4, 5), torch.float32, "cpu"), "weight": randn((6, 4, 3, 3), torch.float32, "cpu")}
    arguments |= {"stride": (1, 1), "padding": (0, 0), "groups": 1, "norm": torch.rand(5, 4)}
    for name, broken in change.items():
        arguments[name] = broken(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        convolution.launcher(**arguments)  # the operator would be the fake one for meta tensors


@pytest.mark.full
def test_the_models_geometries():
    """MODELS and TWINS are all that these models have, with fewer channels, and fewer taps and pixels by strides."""
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision").models

    def reduced(x, layer):
        (_, c, *size), kernel = x.shape, [*layer.kernel_size]
        for axis, stride in enumerate(layer.stride):
            while kernel[axis] > 7:
                kernel[axis] -= stride
            while size[axis] - stride >= max(kernel[axis], 5):
                size[axis] -= stride
        narrow = 16 if layer.groups > 1 else c if c < 8 else 9
        wide = 16 if layer.groups > 1 else 18
        assert layer.dilation == (1, 1)
        return conv.Shape(1, narrow, *size, wide, *kernel, layer.stride, layer.padding, 4 if layer.groups > 1 else 1)

    found = {  # overfeat, of which neither package has a model
        conv.Shape(1, 3, 7, 7, 18, 7, 7, (4, 4)),
        conv.Shape(1, 9, 5, 5, 18, 5, 5),
        conv.Shape(1, 9, 5, 5, 18, 3, 3, (1, 1), (1, 1)),
    }
    plain = {"aux_logits": False, "init_weights": False}
    with torch.device("meta"):
        networks = [
            *((models.resnet50(), 224), (models.resnext50_32x4d(), 224), (models.googlenet(**plain), 224)),
            *((models.vgg16(), 224), (models.alexnet(), 227), (models.inception_v3(**plain), 299)),
            *((timm.create_model(name), 299) for name in ("inception_v4", "inception_resnet_v2")),
        ]
    for network, size in networks:
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, _: found.add(reduced(inputs[0], layer)))
        network.eval()(torch.empty(1, 3, size, size, device="meta"))
    assert found == {*conv.MODELS, *conv.TWINS}


def test_several_taps_are_loaded_by_images_where_these_fill_tiles():
    """Of what is in memory, for a GPU with TMA; other numbers of images would be rows for nothing."""
    computed = import_module("kernels.convolution").computed
    sizes = [(256, 64, 56, 56), (100, 64, 56, 56), (128, 60, 56, 56)]  # the last has channels that are not 16 bytes
    shapes = [conv_shape_of("convolution", size, (64, size[1], 3, 3), (2, 2), (1, 1), 1) for size in sizes]
    assert [computed(shape, "sums", 2, 9)["TMA"] for shape in shapes] == [1, 0, 0]
    assert [computed(shapes[0], *how)["TMA"] for how in (("norm", 2, 9), ("sums", 4, 9), ("sums", 2, 8))] == [0, 0, 0]
