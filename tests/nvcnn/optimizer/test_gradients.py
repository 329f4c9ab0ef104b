"""Gradients reach their slices by either way, and buckets start when they are full."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.trace import step_calls
from nvcnn.distributed import Transport
from nvcnn.meta import gradient_order
from nvcnn.models import build_model
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.gradients import Gradients, buckets_of
from nvcnn.program import Launch

CPU = torch.device("cpu")


class Recorder(Transport):
    """Is a single rank that notes what is reduced and when it is waited for."""

    def __init__(self):
        super().__init__(Launch())
        self.events = []

    def all_reduce(self, tensor, name):
        self.events.append(("start", name))
        return lambda: self.events.append(("wait", name))


def lenet(dtype=torch.float32, **options):
    model = build_model("lenet", num_classes=10, seed=1)
    arena = Arena(model, gradient_order(model, 28), device=CPU, dtype=dtype, **options)
    return model, arena


def loss_of(model, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 28, 28, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    return F.cross_entropy(model(x), torch.randint(0, 10, (4,), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_hold_autograds_gradients(dtype):
    model, arena = lenet(dtype)
    loss_of(model, dtype).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    gradients = Gradients(arena, Recorder())
    for slot in arena.slots:
        arena.gradient(slot).fill_(float("nan"))  # nothing needs zeroing
    for _ in range(2):
        loss_of(model, dtype).backward()
        gradients.finish()
        for slot in arena.slots:
            assert torch.equal(arena.gradient(slot), expected[slot.name]), slot.name
            assert slot.parameter.grad is None
    for buffer in (arena.matrix_gradient, arena.vector_gradient):
        assert buffer.isfinite().all()


def test_bfloat16_is_staged_in_fp32():
    model, arena = lenet(torch.bfloat16, gradient_dtype=torch.float32)
    gradients = Gradients(arena, Recorder())
    loss_of(model, torch.bfloat16).backward()
    gradients.finish()
    staged = arena.matrix_gradient
    assert staged.dtype == torch.float32
    assert torch.equal(staged, staged.bfloat16().float())
    assert staged.abs().sum() > 0


def test_buckets_start_during_backward_in_order():
    model, arena = lenet()
    recorder = Recorder()
    gradients = Gradients(arena, recorder, bucket_bytes=1)
    started = []
    model.conv1.weight.register_hook(lambda g: started.extend(recorder.events))  # before the last gradient is stored
    loss_of(model).backward()
    assert ("start", "gradient.0") in started
    assert ("start", f"gradient.{len(gradients.sizes) - 1}") not in started
    gradients.finish()
    waits = [name for event, name in recorder.events if event == "wait"]
    assert waits == [name for event, name in recorder.events if event == "start"]
    assert len(waits) == len(gradients.slices) == len(set(waits))


def test_every_parameter_is_in_one_bucket():
    _, arena = lenet()
    for elements in (1, 5000, 10**9):
        buckets = buckets_of(arena.slots, elements)
        assert [s for b in buckets for s in b] == arena.slots
        assert all(sum(s.elements for s in b) >= elements for b in buckets[:-1])


def test_a_missing_gradient_is_not_waited_for():
    model, arena = lenet()
    gradients = Gradients(arena, Recorder(), bucket_bytes=1)  # one of the buckets is complete
    model.conv1.weight.sum().backward()
    with pytest.raises(RuntimeError, match="left gradients out"):
        gradients.finish()


class StoresItself(torch.autograd.Function):
    """Does what a weight-gradient kernel does: writes into its slice and returns a view of it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        torch.mm(g.t(), x, out=weight.gradient_slice)
        return None, weight.gradient_slice.detach()


def test_a_kernel_may_store_its_gradient_itself(monkeypatch):
    """torch keeps the view as the gradient, and copies nothing."""
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    model = torch.nn.Linear(3, 2, bias=False)
    arena = Arena(model, ["weight"], device=CPU)
    recorder = Recorder()
    gradients = Gradients(arena, recorder)
    x = torch.randn(5, 3)
    for _ in range(2):
        arena.matrix_gradient.fill_(float("nan"))
        StoresItself.apply(x, model.weight).sum().backward()
        gradients.finish()
        torch.testing.assert_close(arena.gradient(arena.slots[0]), torch.ones(5, 2).t() @ x)
        assert model.weight.grad is None
    assert [event for event, _ in recorder.events] == ["start", "wait"] * 2


def test_batches_of_a_step_are_summed_in_fp32_and_reduced_once():
    """Their sum leaves fp16, and nothing is left of it in the next step."""
    model = torch.nn.Linear(3, 2)
    options = {"dtype": torch.float16, "gradient_dtype": torch.float32}
    arena, recorder = Arena(model, ["weight", "bias"], device=CPU, **options), Recorder()
    gradients = Gradients(arena, recorder, batches=3)
    assert model.weight.gradient_slice.dtype == torch.float16
    for _ in range(2):
        recorder.events.clear()
        for number in range(3):
            assert not recorder.events
            x = torch.full((1, 3), 30000.0 + 16 * number, dtype=torch.float16)
            (StoresItself.apply(x, model.weight) + model.bias).sum().backward()
            gradients.finish()
        assert [event for event, _ in recorder.events] == ["start"] * 2 + ["wait"] * 2
        assert torch.equal(arena.gradient(arena.slots[0]), torch.full((2, 3), 90048.0))
        assert torch.equal(arena.gradient(arena.slots[1]), torch.full((2,), 3.0))


def test_kernels_store_the_gradients_of_convolutions_in_their_slices():
    """One launch a bucket copies the rest: in ResNet-18 the first convolution, which is padded, and other layers."""
    copies = [call for call in step_calls("resnet18", 2, torch.float16, "triton") if "copy_" in call.name]
    assert [call.name for call in copies] == ["aten::_foreach_copy_"] * len(copies)
    sizes = [len(gradient.shape) for call in copies for gradient in call["src"]]
    assert (len(copies), sizes.count(4), sizes.count(2), sizes.count(1)) == (2, 1, 1, 2 * 20 + 1)


def test_slices_of_another_dtype_are_not_stored_into():
    _, arena = lenet(torch.bfloat16, gradient_dtype=torch.float32)
    Gradients(arena, Recorder())
    kinds = {slot.parameter.dtype: slot.parameter.gradient_slice is None for slot in arena.slots}
    assert kinds == {torch.bfloat16: True, torch.float32: False}
