"""Each layer against plain torch modules in float64, and what fp16 and bf16 must not lose."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d, Linear, cast_matrices, check_size, flatten
from nvcnn.program import InputError

half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def results(layer: nn.Module, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Returns the output, and the gradients of sum(output * direction) with respect to x and all parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    leaves = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(leaves.values()), direction.to(y.dtype))
    return {"output": y.detach(), **{f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}}


def error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


LAYERS = {
    "conv": (Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), (4, 16, 9, 7), (4, 24, 9, 7)),
    "strided": (Conv2d(16, 24, 5, 2, bias=False), nn.Conv2d(16, 24, 5, 2, bias=False), (4, 16, 9, 7), (4, 24, 3, 2)),
    "linear": (Linear(96, 40), nn.Linear(96, 40), (32, 96), (32, 40)),
    "classifier": (Classifier(96, 40), nn.Linear(96, 40), (32, 96), (32, 40)),
    "norm": (BatchNorm2d(16), nn.BatchNorm2d(16, eps=1e-4), (4, 16, 9, 7), (4, 16, 9, 7)),
}


@half_types
@pytest.mark.parametrize("name", LAYERS)
def test_is_no_less_exact_than_plain_torch(device, name, dtype):
    *layers, shape_in, shape_out = LAYERS[name]
    ours, plain = (layer.to(device) for layer in layers)
    x, direction = (torch.randn(shape).to(device, dtype) for shape in (shape_in, shape_out))
    if x.dim() == 4:
        x, direction = (t.to(memory_format=torch.channels_last) for t in (x, direction))
    # Values that both dtypes hold, so that all three compute the same thing.
    state = {k: torch.randn(p.shape).to(dtype) for k, p in plain.named_parameters()}
    ours.float().load_state_dict(state, strict=False)
    cast_matrices(ours, dtype)

    def in_dtype(to: torch.dtype) -> dict[str, Tensor]:
        plain.to(to).load_state_dict(state, strict=False)
        return results(plain, x.to(to), direction.to(to))

    exact, theirs = in_dtype(torch.float64), in_dtype(dtype)
    for what, actual in results(ours, x, direction).items():
        assert error(actual, exact[what]) <= 2 * error(theirs[what], exact[what]), what
        is_single = actual.dim() < 2 or (name, what) == ("classifier", "output")
        assert actual.dtype == (torch.float32 if is_single else dtype), what


@pytest.mark.parametrize(
    ("name", "shape"), [("conv", (4, 16, 16, 16)), ("linear", (1024, 96)), ("norm", (4, 16, 16, 16))]
)
def test_bias_gradient_beyond_fp16(device, name, shape):
    layer = cast_matrices(LAYERS[name][0].to(device).float(), torch.float16)
    x = torch.randn(shape).to(device).half()
    y = layer(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
    y.backward(torch.full_like(y, 100))
    rows = y.numel() // y.shape[1]
    assert rows * 100 > torch.finfo(torch.float16).max
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, rows * 100))


def test_in_fp32_the_bias_costs_nothing_extra():
    """The bias goes into the library's own convolution and matrix product."""
    for layer, shape in ((Conv2d(3, 8, 3), (2, 3, 5, 5)), (Linear(3, 8), (2, 3))):
        assert "AddBias" not in layer(torch.randn(shape)).grad_fn.name()


def images(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


class TestBatchNorm:
    def test_batch_statistics_wait_for_the_optimizer(self):
        norm, x = BatchNorm2d(5), images(3, 5, 4, 2) * 3 + 7
        norm(x)
        values = x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(norm.batch_mean, values.mean(1))
        torch.testing.assert_close(norm.batch_var, values.var(1, unbiased=True))
        assert torch.equal(norm.running_mean, torch.zeros(5))
        assert torch.equal(norm.running_var, torch.ones(5))

    def test_evaluation_uses_the_running_statistics(self):
        norm, x = BatchNorm2d(5).eval(), images(3, 5, 4, 2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)
        expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-4)
        torch.testing.assert_close(norm(x), expected)
        assert not norm.batch_mean.any()
        assert not norm.batch_var.any()

    def test_recovers_from_nan_once_the_scratch_is_zero(self):
        norm, x = BatchNorm2d(5), images(3, 5, 4, 2)
        clean = norm(x), norm.batch_mean.clone(), norm.batch_var.clone()
        norm(torch.full_like(x, float("nan")))
        assert norm.batch_mean.isnan().all()
        norm.batch_mean.zero_()
        norm.batch_var.zero_()
        for before, after in zip(clean, (norm(x), norm.batch_mean, norm.batch_var), strict=True):
            assert torch.equal(before, after)

    def test_the_statistics_may_be_views_of_a_flat_buffer(self):
        norm, flat = BatchNorm2d(4), torch.zeros(16)
        for name, view in zip(("batch_mean", "batch_var", "running_mean", "running_var"), flat.split(4), strict=True):
            setattr(norm, name, view)
        x = images(3, 4, 4, 2)
        norm(x)
        torch.testing.assert_close(flat[:4], x.mean((0, 2, 3)))
        torch.testing.assert_close(flat[4:8], x.var((0, 2, 3)))
        assert not flat[8:].any()

    def test_state_dict_is_torch_s(self):
        assert BatchNorm2d(4).state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()


def test_flatten_is_a_view():
    x = torch.arange(120.0).view(2, 4, 5, 3).permute(0, 3, 1, 2)  # (2, 3, 4, 5), channels-last
    assert torch.equal(flatten(x), torch.arange(120.0).view(2, 60))
    assert flatten(x).data_ptr() == x.data_ptr()


@half_types
def test_cast_matrices_casts_nothing_else(dtype):
    model = nn.Sequential(Conv2d(3, 8, 3), BatchNorm2d(8), nn.Flatten(), Classifier(72, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert cast_matrices(model, dtype) is model
    for name, value in model.state_dict().items():
        assert value.dtype == (dtype if value.dim() >= 2 else before[name].dtype), name
        assert torch.equal(value, before[name].to(value.dtype)), name
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 28, 28), (2, 3, 28, 27)])
def test_wrong_size(shape):
    with pytest.raises(InputError, match=r"--model=lenet takes images of 3 x 28 x 28 .*got \(\d, \d\d, \d\d\)"):
        check_size("lenet", torch.empty(shape), 28)
