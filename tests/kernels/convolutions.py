"""What the tests of the three convolution ops share: geometries, their float64 twins, and bounds."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels import conv_shape
from kernels.implementation import INTERPRETED
from kernels.norm_rows import MEAN, SCALE, SHIFT
from kernels.operators import looked_up_again
from tests.kernels.images import SMALLEST, integers, randn, unit

U = 2.0**-24  # half a unit in the last place of fp32
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def __str__(self):
        return (
            f"{self.n}x{self.c}x{self.h}x{self.w}-{self.k}x{self.r}x{self.s}"
            f"-s{self.stride[0]}{self.stride[1]}-p{self.padding[0]}{self.padding[1]}-g{self.groups}"
        )

    @property
    def x(self) -> tuple[int, ...]:
        return self.n, self.c, self.h, self.w

    @property
    def weight(self) -> tuple[int, ...]:
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def y(self) -> tuple[int, ...]:
        sizes = zip((self.h, self.w), (self.r, self.s), self.stride, self.padding, strict=True)
        return self.n, self.k, *((size + 2 * p - r) // stride + 1 for size, r, stride, p in sizes)

    @property
    def how(self) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Returns stride, padding and groups, as the ops take them."""
        return self.stride, self.padding, self.groups


# The geometries of every convolution of resnet50, resnext50, googlenet, vgg16, alexnet, inception3, inception4,
# inception-resnet2 and overfeat, with fewer channels, pixels and taps: `test_convolution.test_the_models_geometries`
# says how. Few tests need all of them: TWINS differ from one of MODELS in their axes, or in their padding, alone. Of x
# these have one block of channels, of y two; x has two in ODD.
MODELS = [
    Shape(1, 9, 5, 5, 18, 1, 1),
    Shape(1, 9, 6, 6, 18, 1, 1, (2, 2)),
    Shape(1, 9, 5, 5, 18, 1, 3, (1, 1), (0, 1)),
    Shape(1, 9, 7, 5, 18, 7, 1, (1, 1), (3, 0)),
    Shape(1, 3, 5, 5, 18, 3, 3, (1, 1), (1, 1)),
    Shape(1, 3, 5, 5, 18, 3, 3, (2, 2)),
    Shape(1, 9, 5, 5, 18, 3, 3, (1, 1), (1, 1)),
    Shape(1, 9, 5, 5, 18, 3, 3, (2, 2)),
    Shape(1, 9, 6, 6, 18, 3, 3, (2, 2), (1, 1)),
    Shape(1, 16, 5, 5, 16, 3, 3, (1, 1), (1, 1), 4),
    Shape(1, 16, 6, 6, 16, 3, 3, (2, 2), (1, 1), 4),
    Shape(1, 9, 5, 5, 18, 5, 5, (1, 1), (2, 2)),
    Shape(1, 3, 8, 8, 18, 7, 7, (2, 2), (3, 3)),
    Shape(1, 3, 7, 7, 18, 7, 7, (4, 4), (2, 2)),
]
TWINS = [
    Shape(1, 9, 5, 5, 18, 3, 1, (1, 1), (1, 0)),
    Shape(1, 9, 5, 7, 18, 1, 7, (1, 1), (0, 3)),
    Shape(1, 9, 5, 5, 18, 3, 3),
    Shape(1, 9, 5, 5, 18, 5, 5),
    Shape(1, 3, 7, 7, 18, 7, 7, (4, 4)),
]

# What no model has, or has in one place only.
ODD = [
    Shape(2, 24, 1, 1, 20, 1, 1),
    Shape(3, 17, 1, 1, 5, 3, 3, (1, 1), (1, 1)),
    Shape(2, 5, 7, 4, 7, 3, 2, (3, 1), (0, 2)),
    Shape(2, 4, 5, 7, 6, 3, 7, (2, 2), (1, 3)),
    Shape(1, 8, 7, 5, 6, 3, 5, (2, 2), (1, 2)),
    Shape(1, 17, 9, 9, 3, 2, 2, (3, 3)),
    Shape(2, 24, 5, 6, 12, 1, 3, (1, 2), (0, 1), 3),
    Shape(1, 20, 4, 5, 20, 3, 3, (1, 1), (1, 1), 20),
    Shape(1, 24, 4, 4, 40, 3, 3, (2, 2), (1, 1), 2),
    Shape(1, 3, 1, 1, 4, 3, 3, (2, 2), (1, 1)),
]

SHAPES = [
    *(pytest.param(shape, id=str(shape)) for shape in MODELS + ODD),
    *(pytest.param(shape, id=str(shape), marks=pytest.mark.full) for shape in TWINS),
]
COMMON = Shape(2, 32, 5, 4, 24, 3, 3, (2, 2), (1, 1))
FEW = [MODELS[1], MODELS[5], MODELS[10]]  # classes of pixels without a tap; few channels; groups

TILES = Shape(2, 24, 5, 4, 40, 1, 1)  # whose rows are multiples of 16 bytes
OF_ONE_IMAGE, OF_FOUR = {"TMA": 1, "BOX_H": 4, "BOX_W": 4}, {"TMA": 1, "BOX_H": 2, "BOX_W": 2}  # boxes of 16 rows
OF_IMAGES = {"TMA": 1, "BOX_H": 1, "BOX_W": 1}  # 16
# Boxes that reach over an edge in H, in W and in N, or lie in a corner; each geometry by one kind of box.
BOXES = [
    (Shape(1, 24, 5, 6, 8, 3, 3, (1, 1), (1, 1)), OF_ONE_IMAGE),
    (Shape(1, 16, 3, 5, 8, 1, 7, (1, 1), (0, 3)), OF_ONE_IMAGE),
    (Shape(1, 16, 5, 3, 8, 7, 1, (1, 1), (3, 0)), OF_FOUR),
    (Shape(2, 16, 5, 4, 8, 2, 3), OF_FOUR),
    (Shape(2, 16, 1, 1, 8, 3, 3, (1, 1), (1, 1)), OF_ONE_IMAGE),
    (Shape(5, 8, 1, 2, 8, 1, 1, (1, 1), (1, 0)), OF_FOUR),
    (Shape(1, 24, 9, 7, 8, 1, 1, (2, 3)), OF_FOUR),
    (Shape(18, 24, 3, 2, 8, 3, 3, (1, 1), (1, 1)), OF_IMAGES),
    (Shape(3, 16, 2, 5, 24, 1, 7, (1, 1), (0, 3)), OF_IMAGES),
    (Shape(17, 16, 3, 5, 8, 1, 1, (2, 3)), OF_IMAGES),
    (Shape(18, 16, 3, 5, 8, 3, 3, (2, 2), (1, 1)), OF_IMAGES),
]


@contextmanager
def configured(**choices: int):
    """The ops are configured with these choices."""
    if choices.get("TMA") and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU without TMA")
    lookup = conv_shape.configuration
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCNN_KERNELS", "triton")
        patch.setattr(conv_shape, "configuration", lambda *arguments: {**lookup(*arguments), **choices})
        with looked_up_again():
            yield


def check_same(run: Callable[[], tuple[Tensor, ...]], loads: int = 0, **choices: int) -> None:
    """Checks that the choices change no bit, and that `loads` tensors are then loaded by descriptors."""
    made, plain_choices = [], {"TMA": 0} | dict.fromkeys(choices, 0)
    with configured(**plain_choices):
        plain = run()
    with configured(**plain_choices | choices), pytest.MonkeyPatch.context() as patch:
        descriptor = conv_shape.TensorDescriptor
        patch.setattr(
            conv_shape, "TensorDescriptor", lambda *arguments: made.append(descriptor(*arguments)) or made[-1]
        )
        chosen = run()
    assert len(made) == loads
    assert all(torch.equal(a, b) for a, b in zip(plain, chosen, strict=True))


@st.composite
def random_shapes(draw):
    """Draws any geometry that has a result, with few enough products for the interpreter."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c, k = (draw(st.integers(1, 24 // groups)) * groups for _ in range(2))
    r, s = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (1, 4), (5, 1), (2, 3)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 2)]))
    padding = draw(st.integers(0, r)), draw(st.integers(0, s))
    h, w = (draw(st.integers(max(1, taps - 2 * p), 8)) for taps, p in zip((r, s), padding, strict=True))
    return Shape(draw(st.integers(1, 2)), c, h, w, k, r, s, stride, padding, groups)


def spread(vector: Tensor) -> Tensor:
    return vector.double().view(-1, 1, 1)


def convolved(a: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    return F.conv2d(a.double(), weight.double(), None, shape.stride, shape.padding, 1, shape.groups)


def of_input(dy: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    how = shape.stride, shape.padding, 1, shape.groups
    return conv2d_input(shape.x, weight.double(), dy.double(), *how)


def of_weight(dy: Tensor, a: Tensor, shape: Shape) -> Tensor:
    how = shape.stride, shape.padding, 1, shape.groups
    return conv2d_weight(a.double(), shape.weight, dy.double(), *how)


def integer_norm(channels, device) -> Tensor:
    return torch.randint(-2, 3, (5, channels), device=device).float()


def random_norm(channels, device) -> Tensor:
    """Returns what a BatchNorm has: mean, scale, shift, rstd, mean_low."""
    mean, shift = torch.randn(2, channels, device=device)
    scale, rstd = torch.rand(2, channels, device=device) + 0.5
    return torch.stack((mean, scale, shift, rstd, mean * U))


def normalised(x: Tensor, norm: Tensor) -> Tensor:
    return (x.double() - spread(norm[MEAN.value])) * spread(norm[SCALE.value]) + spread(norm[SHIFT.value])


def normalised_terms(x: Tensor, norm: Tensor) -> Tensor:
    """Returns the sum of the absolute terms of (x - mean) scale + shift, or of x scale + (shift - mean scale)."""
    return normalised(x.abs(), torch.stack((-norm[MEAN.value].abs(), norm[SCALE.value].abs(), norm[SHIFT.value].abs())))


class Operand(NamedTuple):
    """A value in float64, and how far the one that is multiplied may be from it."""

    exact: Tensor
    error: Tensor


def as_it_is(x: Tensor) -> Operand:
    return Operand(x.double(), torch.zeros_like(x, dtype=torch.float64))


def activation(x, norm, implementation, residual=None, residual_norm=None) -> Operand:
    """Returns relu((x - mean) scale + shift + residual). The reference rounds both of its steps and sums."""
    if norm is None:
        return as_it_is(x)
    exact, terms = normalised(x, norm), normalised_terms(x, norm)
    if residual is not None:
        raw = residual_norm is not None
        exact = exact + (normalised(residual, residual_norm) if raw else residual.double())
        terms = terms + (normalised_terms(residual, residual_norm) if raw else residual.double().abs())
    roundings = 4 if implementation == "reference" and residual is not None else 1
    error = 6 * U * terms
    return Operand(exact.relu(), error + roundings * (unit(x.dtype, implementation) * (terms + error) + least(x)))


def output_gradient(g, y, norm, factors, implementation) -> Operand:
    """Returns scale g + factors[0] (y - mean) + factors[1]."""
    if norm is None:
        return as_it_is(g)
    scale = spread(norm[SCALE.value])
    exact, terms = scale * g.double(), scale.abs() * g.double().abs()
    if factors is not None:
        slope, offset, mean = spread(factors[0]), spread(factors[1]), spread(norm[MEAN.value])
        exact = exact + slope * (y.double() - mean) + offset
        terms = terms + slope.abs() * (y.double().abs() + mean.abs()) + offset.abs()
    error = 6 * U * terms
    return Operand(exact, error + unit(g.dtype, implementation) * (exact.abs() + error) + least(g))


def least(x: Tensor) -> float:
    return SMALLEST[x.dtype]


def product_error(multiply, a: Operand, b: Operand, terms: int) -> Tensor:
    """Returns the error of sums of `terms` products: of fp32 sums in any order, and of operands that are off."""
    size = multiply(a.exact.abs() + a.error, b.exact.abs() + b.error)
    return (terms + 2) * U * size + (size - multiply(a.exact.abs(), b.exact.abs())).clamp(min=0) + 1e-13 * size


def check_close(got: Tensor, exact: Tensor, bound: Tensor | float, name: str) -> None:
    """Says where the values are not close: the index, both values, and how many there are."""
    wrong = ~((got.double() - exact).abs() <= bound)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        share = f"{int(wrong.sum())} of {wrong.numel()} values"
        limit = bound[at].item() if isinstance(bound, Tensor) else bound
        raise AssertionError(f"{name}{list(at)}: {got[at].item()}, not {exact[at].item()} +- {limit}; {share}")


def check_error(got: Tensor, pytorch: Tensor, exact: Tensor) -> None:
    """Checks that all values together, and the worst, are at most twice as far off as PyTorch's in the same dtype."""
    ours, theirs = (result.double() - exact for result in (got, pytorch))
    assert theirs.norm() > 0
    assert ours.norm() <= 2 * theirs.norm()
    assert ours.abs().max() <= 2 * theirs.abs().max()


def rounded_bound(exact: Tensor, error: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    return error + unit(dtype, implementation) * (exact.abs() + error) + SMALLEST[dtype]


def small_integers(shape, dtype, device) -> Tensor:
    return integers(shape, dtype, device, -2, 2)


def tensors(shape: Shape, dtype, device, make=randn) -> dict[str, Tensor]:
    """Returns what the gradients take, by their arguments' names (`norm` is that of y); and residual and center."""
    rows = random_norm if make is randn else integer_norm
    of_x = {name: make(shape.x, dtype, device) for name in ("x", "residual", "skip", "z", "branch")}
    of_y = {name: make(shape.y, dtype, device) for name in ("g", "y")}
    norms = {"norm": rows(shape.k, device), "x_norm": rows(shape.c, device), "branch_norm": rows(shape.c, device)}
    factors, center = rows(shape.k, device)[:2].clone(), rows(shape.k, device)[0].clone()
    return of_x | of_y | norms | {"weight": make(shape.weight, dtype, device), "factors": factors, "center": center}
