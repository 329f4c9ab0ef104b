"""The three launches together, against optimizers of another make."""

import inspect
from dataclasses import fields
from importlib import import_module

import pytest
import torch
from triton.backends.nvidia.compiler import CUDAOptions

from kernels import BLOCK, gradient_statistics, larc_update, refresh, trust_ratio
from kernels.implementation import INTERPRETED

U = 2.0**-24  # half a unit in the last place of fp32
SHAPES = [(20, 3, 5, 5), (33, 70), (64,), (1,), (9,)]
STEPS, LEARNING_RATES, WEIGHT_DECAY, MOMENTUM, ETA = 4, (0.5, 0.3, 0.1), 1e-2, 0.9, 0.05


class Optimizer:
    """Has tensors of SHAPES in an arena of their own; the ops find theirs by the names of their arguments."""

    def __init__(self, device, mode, dtype=torch.float32, ranks=1, loss_scale=1.0, growth_interval=0, clip_norm=0.0):
        blocks = torch.tensor([-(-torch.Size(shape).numel() // BLOCK) for shape in SHAPES])
        n, m = int(blocks.sum()) * BLOCK, int(blocks[:2].sum()) * BLOCK
        first_block, tensor_of_block = torch.tensor([0, *blocks]).cumsum(0), torch.arange(len(SHAPES))
        self.starts = (first_block * BLOCK).tolist()
        self.weight, self.momentum = torch.zeros(2, n, device=device)
        self.model_weight = None if dtype == torch.float32 else torch.zeros(m, device=device, dtype=dtype)
        self.matrix_gradient = torch.zeros(m, device=device, dtype=dtype)
        self.vector_gradient = torch.zeros(n - m, device=device)
        self.square_sums, self.weight_square_sums = torch.zeros(2, n // BLOCK, device=device)
        if clip_norm:
            self.square_sums = self.square_sums.repeat(3, 1)
        self.gradient_square_sums, self.clip_norm = self.square_sums, clip_norm
        self.ema_weight, self.ema_running, self.ema_decay = None, None, 0.0
        self.first_block = first_block.to(device, torch.int32)
        self.tensor_of_block = tensor_of_block.repeat_interleave(blocks).to(device, torch.int32)
        self.ratio, self.gradient_norm, self.weight_norm = torch.zeros(3, len(SHAPES), device=device)
        self.scalars, self.schedule = torch.zeros(3, device=device), torch.tensor(LEARNING_RATES, device=device)
        self.counters = torch.zeros(3, device=device, dtype=torch.int64)
        self.loss_scale = torch.tensor([loss_scale], device=device)
        self.latest, self.average = torch.zeros(3, device=device), torch.zeros(4, device=device, dtype=torch.float64)
        self.rows, (self.running, self.batch) = torch.zeros(0, 3, device=device), torch.zeros(2, 0, device=device)
        self.ranks, self.larc_mode, self.growth_interval = ranks, mode, growth_interval
        self.excluded_from, self.eta, self.weight_decay = len(SHAPES), ETA, WEIGHT_DECAY
        self.momentum_factor, self.statistics_momentum, self.decay_vectors = MOMENTUM, 0.1, True

    def views(self, flat):
        return [flat[start:][: torch.Size(s).numel()].view(s) for start, s in zip(self.starts, SHAPES, strict=False)]

    def load(self, weights):
        for view, weight in zip(self.views(self.weight), weights, strict=True):
            view.copy_(weight)
        refresh(self.weight, self.model_weight, self.weight_square_sums)

    def step(self, gradients):
        flat = torch.zeros_like(self.weight)
        for view, gradient in zip(self.views(flat), gradients, strict=True):
            view.copy_(gradient)
        self.matrix_gradient.copy_(flat[: len(self.matrix_gradient)])
        self.vector_gradient.copy_(flat[len(self.matrix_gradient) :])
        for op in (gradient_statistics, trust_ratio, larc_update):
            op(**{name: getattr(self, name) for name in inspect.signature(op).parameters})


def data(dtype=torch.float32):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    return weights, [[torch.randn(shape).to(dtype).float() for shape in SHAPES] for _ in range(STEPS)]


def assert_close(views, expected, roundings):
    """Checks that they are within so many roundings a step of values that stay below 2^4 here."""
    for view, value in zip(views, expected, strict=True):
        assert value.abs().max() < 2**4
        assert (view.cpu().double() - value).abs().max() <= roundings * STEPS * U * 2**4


def larc(mode, excluded_from, weights, all_gradients, clip_norm):
    """Returns the weights after LARC as one would write it for a list of tensors, in double."""
    weights = [w.double() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    for step, gradients in enumerate(all_gradients):
        learning_rate = LEARNING_RATES[min(step, len(LEARNING_RATES) - 1)]
        norm = sum(g.double().square().sum() for g in gradients).sqrt()
        clip = min(clip_norm / norm, 1.0) if clip_norm else 1.0
        for t, (w, m, g) in enumerate(zip(weights, momenta, gradients, strict=True)):
            g = clip * g.double() + WEIGHT_DECAY * w
            norms = w.norm().item(), g.norm().item()
            ratio = ETA * norms[0] / norms[1] if all(norms) else 1.0
            if t < excluded_from:
                g *= min(ratio / learning_rate, 1.0) if mode == "clip" else ratio
            m.mul_(MOMENTUM).add_(g)
            w.sub_(learning_rate * (g + MOMENTUM * m))
    return weights


@pytest.mark.parametrize(
    ("decay", "momentum", "decay_vectors", "clip_norm"),
    [
        *((WEIGHT_DECAY, MOMENTUM, True, 0.0), (WEIGHT_DECAY, MOMENTUM, False, 0.0), (0.0, 0.0, True, 0.0)),
        *((WEIGHT_DECAY, MOMENTUM, False, 1.0), (0.0, MOMENTUM, True, 1.0), (WEIGHT_DECAY, MOMENTUM, True, 1e3)),
    ],
)
def test_without_larc_it_is_sgd(implementation, device, decay, momentum, decay_vectors, clip_norm):
    weights, all_gradients = data()
    ours = Optimizer(device, "off", clip_norm=clip_norm)
    ours.weight_decay, ours.momentum_factor, ours.decay_vectors = decay, momentum, decay_vectors
    ours.load(weights)
    theirs = [torch.nn.Parameter(w.double()) for w in weights]
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": decay * decay_vectors}]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    for step, gradients in enumerate(all_gradients):
        ours.step(gradients)
        for group in sgd.param_groups:
            group["lr"] = LEARNING_RATES[min(step, len(LEARNING_RATES) - 1)]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.double()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
        sgd.step()
    roundings = 10 if clip_norm == 0 else 10 + 38  # those of the factor; torch adds 1e-6 to the norm, which is 60
    assert_close(ours.views(ours.weight), [p.detach() for p in theirs], roundings)
    if momentum:
        assert_close(ours.views(ours.momentum), [sgd.state[p]["momentum_buffer"] for p in theirs], roundings)


@pytest.mark.parametrize("mode", ["clip", "scale"])
@pytest.mark.parametrize("excluded_from", [2, len(SHAPES)])  # tensors of one dimension, or none
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_larc_is_that_of_a_loop_over_tensors(implementation, device, mode, excluded_from, clip_norm):
    weights, all_gradients = data()
    weights[3].zero_()  # a norm of zero: q is 1
    ours = Optimizer(device, mode, clip_norm=clip_norm)
    ours.excluded_from = excluded_from
    ours.load(weights)
    for gradients in all_gradients:
        ours.step(gradients)
    expected = larc(mode, excluded_from, weights, all_gradients, clip_norm)
    assert_close(ours.views(ours.weight), expected, roundings=10 + 70 + 128 + 38 * (clip_norm > 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scale_and_ranks_divide_out(implementation, device, dtype):
    """Powers of two leave no trace: the bits are the same as without them."""
    weights, all_gradients = data(dtype)
    plain, scaled = Optimizer(device, "clip", dtype), Optimizer(device, "clip", dtype, ranks=4, loss_scale=256.0)
    plain.load(weights)
    scaled.load(weights)
    for gradients in all_gradients:
        plain.step(gradients)
        scaled.step([1024 * g for g in gradients])
    assert torch.equal(plain.weight, scaled.weight)
    assert torch.equal(plain.model_weight, scaled.model_weight)
    assert plain.weight.isfinite().all()


def test_an_overflow_is_skipped_and_the_next_step_is_not(implementation, device):
    weights, all_gradients = data(torch.float16)
    ours = Optimizer(device, "clip", torch.float16, loss_scale=8.0, growth_interval=2)
    undisturbed = Optimizer(device, "clip", torch.float16, loss_scale=8.0, growth_interval=2)
    for optimizer in (ours, undisturbed):
        optimizer.load(weights)
        optimizer.schedule.fill_(0.1)  # the step advances, and the learning rate must not follow here
    poisoned = [g.clone() for g in all_gradients[0]]
    poisoned[1][7, 7] = torch.inf
    ours.step(poisoned)
    assert torch.equal(ours.weight, undisturbed.weight)
    assert not ours.momentum.any()
    assert (ours.counters.tolist(), ours.loss_scale.item()) == ([1, 0, 0], 4.0)
    ours.step([4 * g for g in all_gradients[1]])
    undisturbed.step([8 * g for g in all_gradients[1]])
    assert torch.equal(ours.weight, undisturbed.weight)
    assert ours.counters.tolist() == [2, 1, 1]
    ours.step([4 * g for g in all_gradients[2]])
    assert (ours.counters.tolist(), ours.loss_scale.item()) == ([3, 2, 0], 8.0)


@pytest.mark.skipif(not INTERPRETED, reason="the compiler itself refuses what it does not know")
def test_launches_name_what_the_compiler_knows(device, monkeypatch):
    """The interpreter drops a keyword it does not know; a GPU refuses the launch."""
    launched = []

    class Strict:
        def __init__(self, kernel):
            self.kernel, self.fn = kernel, kernel.fn

        def __getitem__(self, grid):
            def launch(*arguments, **keywords):
                parameters = inspect.signature(self.kernel.fn).parameters
                options = keywords.keys() - parameters.keys()
                assert options <= {field.name for field in fields(CUDAOptions)}
                inspect.signature(self.kernel.fn).bind(
                    *arguments, **{k: v for k, v in keywords.items() if k not in options}
                )
                launched.append(self.kernel.fn.__name__)
                self.kernel[grid](*arguments, **keywords)

            return launch

    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    for op, name in (
        ("gradient_statistics", "kernel"),
        ("trust_ratio", "kernel"),
        ("larc_update", "kernel"),
        ("larc_update", "refresh_kernel"),
    ):
        module = import_module(f"kernels.{op}")
        monkeypatch.setattr(module, name, Strict(getattr(module, name)))
    weights, all_gradients = data()
    ours = Optimizer(device, "clip", torch.float16)
    ours.load(weights)
    ours.step(all_gradients[0])
    assert launched == ["refresh_kernel", "kernel", "kernel", "kernel"]
