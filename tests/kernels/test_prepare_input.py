import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import prepare_input, prepare_input_into
from tests.kernels.images import DTYPES, SMALLEST, on, unit

CHANNELS = (3, 4, 8)


def pixels(n, h, w, device):
    """Returns images and flips; of two or more images at least one is mirrored and one is not."""
    flip = torch.randint(2, (n,), device=device).bool()
    flip[:2] = torch.tensor([True, False])[:n]
    return torch.randint(256, (n, h, w, 3), device=device, dtype=torch.uint8), flip


def formula(images, flip, scale, shift, mix=None):
    """Returns (N, 3, H, W) in float64, and the products alone."""
    mirrored = torch.stack([image.flip(1) if f else image for image, f in zip(images, flip.tolist(), strict=True)])
    mirrored = mirrored.double()
    if mix is not None:
        weight, *box = mix.tolist()
        top, bottom, left, right = map(int, box)
        other = mirrored.flip(0)
        mirrored = weight * mirrored + (1 - weight) * other
        mirrored[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    product = mirrored * scale.double()
    return (product + shift.double()).permute(0, 3, 1, 2), product.permute(0, 3, 1, 2)


# Weight and box: nothing mixed; blended; a box inside; one up to the last row and column; all of the other image.
MIXES = [None, (0.25, 0, 0, 0, 0), (1, 2, 5, 1, 6), (1, 0, 9, 3, 24), (0, 0, 0, 0, 0), (0.5, 1, 3, 0, 2)]


@pytest.mark.parametrize(("channels", "dtype"), [*zip(CHANNELS, DTYPES, strict=True)])
@pytest.mark.parametrize("size", [(3, 9, 24), (2, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("mix", MIXES)
def test_is_exact_where_nothing_is_rounded(implementation, device, size, dtype, channels, mix):
    images, flip = pixels(*size, device)
    if mix is not None:
        mix = torch.tensor(mix, dtype=torch.float32, device=device)
        images &= 252  # a quarter of it is an integer
    scale, shift = torch.tensor([[2**-7, 2**-6, 2**-5], [-1, -2, -4]], device=device)
    before = images.clone()
    x = prepare_input(images, flip, scale, shift, dtype, channels, mix)
    n, h, w = size
    assert (x.shape, x.dtype, x.stride()) == ((n, channels, h, w), dtype, (channels * h * w, 1, channels * w, channels))
    assert torch.equal(x[:, :3].double(), formula(images, flip, scale, shift, mix)[0])
    assert not x[:, 3:].any()
    assert torch.equal(images, before)


@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    channels=st.sampled_from(CHANNELS),
    mixed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_is_as_close_as_its_dtypes_allow(implementation, device, size, dtype, channels, mixed, seed):
    torch.manual_seed(seed)
    images, flip = pixels(*size, device)
    scale, shift = torch.randn(3, device=device) / 64, torch.randn(3, device=device)
    mix = torch.tensor([torch.rand(1).item(), 1, 4, 2, 9], device=device) if mixed else None
    exact, product = formula(images, flip, scale, shift, mix)
    x = prepare_input(images, flip, scale, shift, dtype, channels, mix)
    # The product is rounded or, in a fused multiply-add, is not; then the sum, then the result. Of a mixed pixel so are
    # the other's weight, both products and their sum.
    rounding = unit(dtype, implementation)
    bound = (5 if mixed else 1) * 2.0**-24 * product.abs() + (2.0**-24 + rounding) * exact.abs()
    bound = bound * (1 + 2 * rounding) + SMALLEST[dtype]
    assert ((x[:, :3].double() - exact).abs() <= bound).all()
    assert not x[:, 3:].any()


def test_every_pixel_value_is_rounded_to_nearest_even(implementation, device):
    images = torch.arange(256, device=device, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    scale, shift = torch.tensor([[2**-7, 2**-7, 2**-7], [8, 16, -64]], device=device)  # up to 14 bits, 11 are kept
    flip = torch.zeros(1, dtype=torch.bool, device=device)
    x = prepare_input(images, flip, scale, shift, torch.float16, 4)
    assert torch.equal(x[:, :3], formula(images, flip, scale, shift)[0].half())


def test_a_factor_that_is_not_finite_stays_in_its_channel(implementation, device):
    images, flip = pixels(2, 3, 5, device)
    scale = torch.tensor([torch.nan, 1.0, torch.inf], device=device)
    x = prepare_input(images.clamp(min=1), flip, scale, torch.zeros_like(scale), torch.float32, 8)
    assert x[:, 0].isnan().all()
    assert torch.equal(x[:, 1], formula(images.clamp(min=1), flip, scale, torch.zeros_like(scale))[0][:, 1].float())
    assert (x[:, 2] == torch.inf).all()
    assert not x[:, 3:].any()


def test_two_runs_give_the_same_bits(implementation, device):
    images, flip = pixels(3, 8, 20, device)
    scale, shift = torch.randn(2, 3, device=device)
    runs = [prepare_input(images, flip, scale, shift, torch.float16, 4) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(("channels", "dtype"), [*zip(CHANNELS, DTYPES, strict=True)])
def test_is_the_same_where_it_is_asked_to_be(implementation, device, dtype, channels):
    images, flip = pixels(3, 9, 24, device)
    scale, shift = torch.randn(2, 3, device=device)
    mix = torch.tensor([0.7, 1, 4, 2, 9], device=device)
    expected = prepare_input(images, flip, scale, shift, dtype, channels, mix)
    x = torch.full_like(expected, torch.nan)
    at = x.data_ptr()
    assert prepare_input_into(images, flip, scale, shift, x, mix) is None
    assert torch.equal(x, expected)
    assert x.data_ptr() == at


def test_opcheck(implementation, device):
    images, flip = pixels(2, 3, 5, device)
    scale, shift = torch.randn(2, 3, device=device)
    torch.library.opcheck(prepare_input.overload, (images, flip, scale, shift, torch.float16, 4))
    x = torch.zeros(2, 4, 3, 5, device=device).to(memory_format=torch.channels_last)
    torch.library.opcheck(prepare_input_into.overload, (images, flip, scale, shift, x))


IMAGES = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
GOOD = {"images": IMAGES, "flip": torch.zeros(2).bool(), "scale": torch.ones(3), "shift": torch.ones(3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.float()}, r"images must be \(N, H, W, 3\), none of them 0, torch.uint8.*got.*torch.float32"),
        ({"images": IMAGES[..., :2].contiguous()}, r"images must be \(N, H, W, 3\).*got \(2, 3, 4, 2\)"),
        ({"images": IMAGES[0]}, r"images must be \(N, H, W, 3\).*got \(3, 4, 3\)"),
        ({"images": IMAGES[:0]}, r"images must be \(N, H, W, 3\).*got \(0, 3, 4, 3\)"),
        ({"images": IMAGES.transpose(1, 2)}, "contiguous; got .* strides"),
        ({"flip": torch.zeros(3).bool()}, r"flip must be \(2,\), torch.bool.*got \(3,\)"),
        ({"scale": torch.ones(1)}, r"scale must be \(3,\), torch.float32"),
        ({"shift": torch.ones(3).double()}, r"shift must be \(3,\), torch.float32.*got .* torch.float64"),
        ({"mix": torch.ones(4)}, r"mix must be \(5,\), torch.float32.*got \(4,\)"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float16.*got torch.float64, 3"),
        ({"channels": 5}, "channels 3, 4 or 8; got torch.float16, 5"),
    ],
)
def test_refuses(device, changes, message):
    arguments = GOOD | {"dtype": torch.float16, "channels": 3} | changes
    on_device = {name: on(a, device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    with pytest.raises(ValueError, match=message):
        prepare_input(**on_device)


X = torch.zeros(2, 4, 3, 4).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, 3, 4)}, "x must be channels-last"),
        ({"x": X[:1]}, r"images must be \(1, 3, 4, 3\).* got \(2, 3, 4, 3\)"),
        ({"x": X[:, :, :2].contiguous(memory_format=torch.channels_last)}, r"images must be \(2, 2, 4, 3\)"),
        ({"x": X[:, :2].contiguous(memory_format=torch.channels_last)}, "channels 3, 4 or 8; got torch.float32, 2"),
        ({"images": IMAGES.float()}, "images must be .*uint8"),
    ],
)
def test_refuses_another_place(device, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_input_into(**{name: on(a, device) for name, a in (GOOD | {"x": X} | changes).items()})
