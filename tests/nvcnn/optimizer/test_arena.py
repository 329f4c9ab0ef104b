"""The arena's layout has its properties, and nothing of it shows outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kernels
from nvcnn.meta import gradient_order
from nvcnn.models import build_model
from nvcnn.models.layers import BatchNorm2d, Conv2d, Linear
from nvcnn.optimizer.arena import Arena
from nvcnn.program import InputError
from tests.nvcnn.optimizer.test_larc import tiny

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5000)),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5)),
        st.just(()),
    ),
    min_size=1,
    max_size=8,
)


def bag_of(shapes) -> nn.Module:
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
    return model


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_layout(shapes, dtype, seed):
    torch.manual_seed(seed)
    model = bag_of(shapes)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    order = [f"p{i}" for i in torch.randperm(len(shapes)).tolist()]
    arena = Arena(model, order, device=CPU, dtype=dtype)

    end = 0
    for slot in arena.slots:
        assert slot.start == end
        assert slot.start % kernels.BLOCK == 0
        end = slot.start + slot.elements
    assert end == arena.weight.numel() == arena.momentum.numel()
    names = [slot.name for slot in arena.slots]
    matrices = [name for name in order if before[name].dim() >= 2]
    assert names == matrices + [name for name in order if before[name].dim() < 2]
    assert arena.matrix_gradient.numel() == arena.matrix_elements
    assert arena.vector_gradient.numel() == end - arena.matrix_elements

    for t, slot in enumerate(arena.slots):
        p = slot.parameter
        first, last = arena.first_block[t].item(), arena.first_block[t + 1].item()
        assert (first, last) == (slot.start // kernels.BLOCK, (slot.start + slot.elements) // kernels.BLOCK)
        assert (arena.tensor_of_block[first:last] == t).all()
        assert p.dtype == (dtype if p.dim() >= 2 else torch.float32) == arena.gradient(slot).dtype
        assert p.shape == before[slot.name].shape == arena.gradient(slot).shape
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(p.data, before[slot.name].to(p.dtype), rtol=0, atol=0)
        # A parameter reads the model weights if it has a low-precision copy, else the master itself.
        source = arena.model_weight if dtype != torch.float32 and p.dim() >= 2 else arena.weight
        assert p.data_ptr() == source.data_ptr() + slot.start * source.element_size()

    # No element belongs to two slots, and what belongs to none is zero.
    marks = torch.zeros_like(arena.weight)
    for slot in arena.slots:
        arena.view(marks, slot).add_(1)
    assert marks.max() <= 1
    assert (arena.weight[marks == 0] == 0).all()
    for name, value in arena.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_round_trip(dtype, momentum_dtype):
    def arena_of(seed):
        model = tiny(seed)
        return Arena(model, gradient_order(model, 28), device=CPU, dtype=dtype, momentum_dtype=momentum_dtype)

    one, other = arena_of(1), arena_of(2)
    one.momentum.copy_(torch.randn_like(one.momentum))
    one.momentum[one.weight == 0] = 0  # padding, mostly; zero momentum elsewhere does no harm
    one.running.uniform_()
    other.load_state_dict(one.state_dict())
    other.load_momentum_dict(one.momentum_dict())
    for buffer in ("weight", "momentum", "running", "weight_square_sums"):
        assert torch.equal(getattr(one, buffer), getattr(other, buffer)), buffer
    if dtype != torch.float32:
        assert torch.equal(one.model_weight, other.model_weight)
    plain = tiny().state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in one.state_dict().items()}
    assert {v.dtype for v in one.momentum_dict().values()} == {momentum_dtype}
    assert all(v.is_contiguous() and v.dtype == plain[k].dtype for k, v in one.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_averages_take_the_weights_place_for_a_while(dtype):
    model = tiny()
    arena = Arena(model, gradient_order(model, 28), device=CPU, dtype=dtype, ema=True)
    fresh = arena.state_dict(averaged=True)
    assert all(torch.equal(value, arena.state_dict()[name]) for name, value in fresh.items())
    for buffer in (arena.weight, arena.running, arena.ema_weight, arena.ema_running):
        buffer.uniform_()
    arena.refresh()
    raw, averaged = arena.state_dict(), arena.state_dict(averaged=True)
    before = {name: t.clone() for name, t in vars(arena).items() if isinstance(t, torch.Tensor)}
    with arena.averaged():
        assert all(torch.equal(value, averaged[name]) for name, value in arena.state_dict().items())
        assert torch.equal(model[0].weight, averaged["0.weight"].to(dtype))
        assert torch.equal(model[1].running_var, averaged["1.running_var"])
    with pytest.raises(KeyboardInterrupt), arena.averaged():
        raise KeyboardInterrupt
    for name, value in before.items():
        assert torch.equal(value, getattr(arena, name)), name
    arena.load_state_dict(fresh)
    assert torch.equal(arena.ema_weight, arena.weight)
    arena.load_state_dict(averaged, averaged=True)
    assert all(torch.equal(value, averaged[name]) for name, value in arena.state_dict(averaged=True).items())
    assert not torch.equal(arena.ema_running, arena.running)
    assert raw.keys() == averaged.keys()


def test_without_averages_nothing_changes():
    arena = Arena(tiny(), gradient_order(tiny(), 28), device=CPU)
    before = arena.weight.clone()
    with arena.averaged():
        assert torch.equal(arena.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), "lacks conv1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda s: s.update({"fc2.bias": torch.zeros(11)}), r"fc2.bias is \(11,\) in the file, \(10,\) in the model"),
        (lambda s: s.update({"fc2.weight": s["fc2.weight"].T}), r"fc2.weight is \(512, 10\) in the file"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    model = build_model("lenet", num_classes=10, seed=1)
    arena = Arena(model, gradient_order(model, 28), device=CPU)
    state = arena.state_dict()
    change(state)
    with pytest.raises(InputError, match=message):
        arena.load_state_dict(state)


def test_running_statistics_are_views():
    model = nn.Sequential(Conv2d(3, 5, 3), BatchNorm2d(5), nn.Flatten(), Linear(5 * 2 * 2, 2))
    bn = model[1]
    arena = Arena(model, gradient_order(model, 4), device=CPU)
    bn.running_mean.fill_(3.0)
    assert (arena.running[:5] == 3).all()
    model.train()(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert (arena.batch != 0).all()
    assert (arena.running[:5] == 3).all()


def test_different_momenta_of_batch_norms_are_refused():
    model = nn.Sequential(BatchNorm2d(3), BatchNorm2d(3, momentum=0.2))
    with pytest.raises(ValueError, match=r"different momentum: \[0.1, 0.2\]"):
        Arena(model, [name for name, _ in model.named_parameters()], device=CPU)


def test_a_parameter_without_gradient_is_named():
    model = nn.Sequential(Linear(3, 2))
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="unused"):
        Arena(model, ["0.weight", "0.bias"], device=CPU)


def test_frozen_parameters_stay_outside():
    model = build_model("lenet", num_classes=10, seed=1)
    model.conv1.weight.requires_grad_(False)
    arena = Arena(model, gradient_order(model, 28), device=CPU, dtype=torch.float16)
    assert "conv1.weight" not in [slot.name for slot in arena.slots]
    assert "conv1.weight" in arena.state_dict()
