"""The optimizer does over a real model's arena what plain PyTorch does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvcnn.distributed import Transport
from nvcnn.meta import gradient_order
from nvcnn.models import build_model
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.gradients import Gradients
from nvcnn.optimizer.larc import Larc
from nvcnn.optimizer.schedule import poly
from nvcnn.program import Launch

CPU = torch.device("cpu")


def tiny(seed: int = 1) -> nn.Module:
    """Returns two convolutions with BatchNorm, big enough for several blocks and both segments."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(Conv2d(3, 32, 3, bias=False), BatchNorm2d(32), nn.ReLU()),
        *(Conv2d(32, 64, 3, stride=2), BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Classifier(64, 10)),
    )


class Training:
    def __init__(
        self,
        build=tiny,
        dtype=torch.float32,
        steps=20,
        learning_rate=0.1,
        momentum_dtype=torch.float32,
        ema=0.0,
        **options,
    ):
        self.dtype = dtype
        self.model = build().train()
        dtypes = {"dtype": dtype, "momentum_dtype": momentum_dtype}
        self.arena = Arena(self.model, gradient_order(self.model, 28), device=CPU, **dtypes, ema=ema > 0)
        self.optimizer = Larc(self.arena, schedule=poly(learning_rate, steps), ema_decay=ema, **options)
        self.gradients = Gradients(self.arena, Transport(Launch()))

    def step(self, x, y):
        loss = F.cross_entropy(self.model(x.to(self.dtype)), y)
        (loss * self.optimizer.loss_scale).backward()
        self.gradients.finish()
        self.optimizer.step()
        return loss.item()

    def state(self):
        a = self.arena
        tensors = {"weight": a.weight, "momentum": a.momentum, "running": a.running, "sums": a.weight_square_sums}
        tensors |= {"updates": self.optimizer.counters[1:2]}
        if a.ema_weight is not None:
            tensors |= {"ema_weight": a.ema_weight, "ema_running": a.ema_running}
        if a.model_weight is not None:
            tensors["model_weight"] = a.model_weight
        return {name: t.clone() for name, t in tensors.items()}


def assert_same_bits(one, other):
    states = one.state(), other.state()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def lenet() -> nn.Module:
    return build_model("lenet", num_classes=10, seed=1)


def batch(seed, size=28, n=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, size, size, generator=g).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (n,), generator=g)


def larc_by_the_book(parameters, momenta, learning_rate, eta, mode, exclude, decay=1e-4, momentum=0.9):
    """Does a step of LARC tensor by tensor, in float64."""
    for p, m in zip(parameters, momenta, strict=True):
        g = p.grad + decay * p
        v_norm, g_norm = p.norm(), g.norm()
        q = eta * v_norm / g_norm if v_norm > 0 and g_norm > 0 else torch.ones(())
        if exclude == "none" or p.dim() >= 2:
            g = g * (min(q / learning_rate, torch.ones(())) if mode == "clip" else q)
        m.mul_(momentum).add_(g)
        p.sub_(learning_rate * (g + momentum * m))


@pytest.mark.parametrize("exclude", ["none", "1d"])
@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_follows_larc_by_the_book(mode, exclude):
    training = Training(mode=mode, eta=0.003, exclude=exclude)
    book = tiny().double().train()
    momenta = [torch.zeros_like(p) for p in book.parameters()]
    for step in range(3):
        x, y = batch(step)
        loss = training.step(x, y)
        book.zero_grad()
        book_loss = F.cross_entropy(book(x.double()), y)
        book_loss.backward()
        with torch.no_grad():
            rate = float(training.optimizer.schedule[step])
            larc_by_the_book(list(book.parameters()), momenta, rate, 0.003, mode, exclude)
        assert abs(loss - book_loss.item()) < 2e-4 * book_loss.item()
    for (name, p), q in zip(training.model.named_parameters(), book.parameters(), strict=True):
        assert (p.double() - q).norm() <= 1e-4 * q.norm() + 1e-7, name


def test_the_average_is_tensorflows():
    """Over the updates alone: an overflow between them leaves no trace."""
    training, plain = Training(ema=0.3), Training()
    a, averages = training.arena, [t.double() for t in (training.arena.weight, training.arena.running)]
    for update, seed in enumerate((0, 1, None, 2, 3)):
        if seed is None:
            x, y = batch(0)
            training.step(x * float("inf"), y)
            plain.step(x * float("inf"), y)
            continue
        assert training.step(*batch(seed)) == plain.step(*batch(seed))
        decay = min(0.3, (1 + update - (update > 2)) / (10 + update - (update > 2)))
        for average, value in zip(averages, (a.weight, a.running), strict=True):
            average.mul_(decay).add_(value.double(), alpha=1 - decay)
    for own, average in zip((a.ema_weight, a.ema_running), averages, strict=True):
        torch.testing.assert_close(own.double(), average, rtol=1e-6, atol=1e-7)
    assert torch.equal(a.weight, plain.arena.weight)


def test_momentum_in_bf16_follows_that_in_fp32():
    """Each step adds a rounding of 2^-9 of the momentum, which lives on for 1 / (1 - 0.9) = 10 steps."""
    trainings = [Training(momentum_dtype=dtype, learning_rate=0.01) for dtype in (torch.float32, torch.bfloat16)]
    start = trainings[0].arena.weight.clone()
    for seed in range(3):
        for training in trainings:
            training.step(*batch(seed))
    exact, rounded = (training.arena.weight - start for training in trainings)
    assert 0 < (rounded - exact).norm() < 10 * 2**-9 * exact.norm()


def test_a_compiler_takes_the_step_whole():
    eager, compiled = (Training(dtype=torch.float16, mode="clip", eta=0.003, loss_scale="dynamic") for _ in range(2))
    compiled.optimizer.step = torch.compile(compiled.optimizer.step, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        assert eager.step(*batch(seed)) == compiled.step(*batch(seed))
    assert_same_bits(eager, compiled)
    assert eager.optimizer.counters.tolist() == compiled.optimizer.counters.tolist() == [2, 2, 2]


def test_running_statistics_are_pytorchs():
    training = Training(learning_rate=1e-9)
    plain = tiny().train()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.momentum == torch.nn.BatchNorm2d(1).momentum
            module.__class__ = torch.nn.BatchNorm2d
    for seed in range(3):
        training.step(*batch(seed))
        plain(batch(seed)[0])
    own = training.model.state_dict()
    for name, value in plain.state_dict().items():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_overflow_leaves_everything(dtype, momentum_dtype, poison):
    training = Training(dtype=dtype, momentum_dtype=momentum_dtype, loss_scale="dynamic", ema=0.5)
    training.optimizer.loss_scale.fill_(8.0)
    training.step(*batch(0))
    before, scale = training.state(), training.optimizer.loss_scale.item()
    x, y = batch(1)
    x[0, 0, 0, 0] = poison
    training.step(x, y)
    for name, value in training.state().items():
        assert torch.equal(value, before[name]), name
    assert training.optimizer.counters.tolist() == [2, 1, 0]
    assert training.model[1].num_batches_tracked == 1
    assert training.optimizer.loss_scale.item() == scale / 2
    assert (training.arena.batch == 0).all()
    assert training.step(*batch(2)) < 100  # and goes on
    assert training.optimizer.counters.tolist() == [3, 2, 1]
    assert not torch.equal(training.arena.weight, before["weight"])


def test_an_overflow_leaves_a_static_loss_scale():
    training = Training(dtype=torch.float16, loss_scale=128.0)
    x, y = batch(0)
    training.step(x * float("inf"), y)
    assert training.optimizer.counters.tolist() == [1, 0, 0]
    assert training.optimizer.loss_scale.item() == 128


def test_two_runs_give_the_same_bits():
    trainings = [Training(mode="clip", eta=0.003) for _ in range(2)]
    for training in trainings:
        for seed in range(2):
            training.step(*batch(seed))
    assert_same_bits(*trainings)


def test_the_loss_scale_and_rank_count_divide_out():
    """Powers of two change no bit of an fp32 run."""
    states = []
    for scale, ranks in ((1.0, 1), (1024.0, 1), (64.0, 4)):
        training = Training(lenet, loss_scale=scale, ranks=ranks)
        x, y = batch(0)
        loss = F.cross_entropy(training.model(x), y) * ranks  # as if that many ranks had summed the same
        (loss * training.optimizer.loss_scale).backward()
        training.gradients.finish()
        training.optimizer.step()
        states.append(training.state()["weight"])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_loss_scale_1_loses_fp16_gradients_that_128_keeps():
    def gradients(dtype, scale):
        training = Training(lenet, dtype, loss_scale=scale)
        x, y = batch(0, n=64)
        small = F.cross_entropy(training.model(x.to(dtype)), y) * 1e-3  # as late in training
        (small * training.optimizer.loss_scale).backward()
        training.gradients.finish()
        return training.arena.matrix_gradient

    there = gradients(torch.float32, 1.0) != 0
    flushed = {scale: (gradients(torch.float16, scale)[there] == 0).double().mean().item() for scale in (1.0, 128.0)}
    assert flushed[1.0] > 0.01
    assert flushed[128.0] < flushed[1.0] / 10


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(momentum_dtype):
    one, other = (Training(lenet, momentum_dtype=momentum_dtype, loss_scale="dynamic") for _ in range(2))
    for seed in range(3):
        one.step(*batch(seed))
    state = one.optimizer.state_dict()
    other.arena.load_state_dict(one.arena.state_dict())
    other.optimizer.load_state_dict(state)
    one.step(*batch(9))
    other.step(*batch(9))
    assert_same_bits(one, other)
