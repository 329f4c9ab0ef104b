"""A training step computes more than the update, and keeps its state where it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nvcnn.data.batch import DEVIATION, MEAN, Batch, MixedBatch
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import use
from nvcnn.meta import places
from nvcnn.models.fused import activation, conv_bn
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d, freeze_backbone
from nvcnn.models.resnet import Bottleneck
from nvcnn.optimizer.schedule import poly
from nvcnn.program import Launch
from nvcnn.step import Step

SIZE, CLASSES = 8, 10


class Net(nn.Module):
    """Has what models are made of: convolutions with BatchNorms, a skip connection, dropout, a layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = BatchNorm2d(16)
        self.blocks = nn.Sequential(Bottleneck(16, 16, 1), Bottleneck(64, 16, 2))
        self.dropout = nn.Dropout(0.5)
        self.fc = Classifier(64, CLASSES)

    def forward(self, x):
        x = activation(self.blocks(activation(conv_bn(x, self.conv, self.bn))))
        return self.fc(self.dropout(x.mean((2, 3))))


class Headed(nn.Module):
    """Has two auxiliary heads, which it returns in training alone."""

    aux_weight = 0.3

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3 * SIZE * SIZE, 16)
        self.fc, self.aux1, self.aux2 = (Classifier(16, CLASSES) for _ in range(3))

    def forward(self, x):
        x = self.trunk(x.flatten(1)).relu()
        return (self.fc(x), self.aux1(x), self.aux2(x)) if self.training else self.fc(x)


def make(device, conv="torch", net=Net, **options) -> Step:
    """Makes a step with LARC, and in fp16 with a dynamic loss scale."""
    options = {"larc_eta": 0.003, "dtype": torch.float32, "transport": Transport(Launch())} | options
    options.setdefault("loss_scale", "dynamic" if options["dtype"] == torch.float16 else 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = net()
    use(model, dict.fromkeys(places(model, 4, SIZE, options["dtype"]), conv))
    return Step(model, image_size=SIZE, device=device, schedule=poly(0.1, 20), **options)


def batch(seed, device, size=SIZE) -> Batch:
    g, n = torch.Generator().manual_seed(seed), 4
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=g)
    labels, flip = torch.randint(CLASSES, (n,), generator=g), torch.randint(2, (n,), generator=g).bool()
    return Batch(*(t.to(device) for t in (images, labels, flip)))


class Twice(Transport):
    """Sums as two ranks with the same images do."""

    def __init__(self) -> None:
        super().__init__(Launch(size=2))

    def all_reduce(self, tensor, name):
        tensor.mul_(2)
        return lambda: None


def mixed(data: Batch) -> MixedBatch:
    """Returns the batch with a box in each image, and a weight for what is outside of it."""
    return MixedBatch(*data, torch.tensor([0.3, 0.625, 1, 5, 2, 8], device=data.images.device))


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("transport", [Transport(Launch()), Twice()], ids=["one rank", "two ranks"])
def test_a_step_does_what_pytorch_does(transport, mixes, device):
    model = nn.Sequential(nn.Flatten(), Classifier(3 * SIZE * SIZE, CLASSES))
    plain, data = copy.deepcopy(model).to(device), batch(0, device)
    options = {"normalize": "imagenet", "label_smoothing": 0.1, "loss_scale": 8.0}
    step = Step(model, image_size=SIZE, device=device, schedule=poly(0.1, 20), transport=transport, **options)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    images = torch.where(data.flip[:, None, None, None], data.images.flip(2), data.images).permute(0, 3, 1, 2)
    images, targets = images / 255, F.one_hot(data.labels, CLASSES).float()
    if mixes:
        blended = 0.625 * images + 0.375 * images.flip(0)
        blended[:, :, 1:5, 2:8] = images.flip(0)[:, :, 1:5, 2:8]
        images, targets, data = blended, 0.3 * targets + 0.7 * targets.flip(0), mixed(data)
    loss = F.cross_entropy(plain((images - mean) / deviation), targets, label_smoothing=0.1)
    loss.backward()
    sgd.step()
    assert step(data)[0].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(step.arena.state_dict()[name], value.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transport", [Transport(Launch()), Twice()], ids=["one rank", "two ranks"])
def test_batches_of_a_step_count_as_one_large_batch(transport, device):
    data = [batch(seed, device) for seed in range(3)]
    model = nn.Sequential(nn.Flatten(), Classifier(3 * SIZE * SIZE, CLASSES))
    start = copy.deepcopy(model.state_dict())
    options = {"image_size": SIZE, "device": device, "schedule": poly(0.1, 20), "transport": transport}
    options |= {"loss_scale": 8.0, "larc_eta": 0.003}
    one, three = Step(copy.deepcopy(model), **options), Step(model, accumulate=3, **options)
    for _ in range(2):
        latest = one(Batch(*map(torch.cat, zip(*data, strict=True))))
        torch.testing.assert_close(three(*data), latest, rtol=1e-6, atol=0)
    for name, weight in one.arena.state_dict().items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(
            three.arena.state_dict()[name] - start[name], weight - start[name], rtol=1e-4, atol=1e-7
        )
    with pytest.raises(ValueError, match="a step has accumulate=3 batches, got 1"):
        three(data[0])


def test_running_statistics_follow_one_batch_after_the_other(device):
    """As PyTorch's do; and not at all where one of the batches is skipped."""
    step, data = make(device, accumulate=3), [batch(seed, device) for seed in range(3)]
    bad = data[1]._replace(labels=torch.full_like(data[1].labels, CLASSES))  # no such class: NaN
    state = {name: tensor.clone() for name, tensor in step.state_dict()["weights"].items()}
    step(data[0], bad, data[2])
    for name, tensor in step.state_dict()["weights"].items():
        assert torch.equal(tensor, state[name]), name
    plain, weight = nn.BatchNorm2d(16, device=device), step.model.conv.weight.detach().clone()
    for images, _, flip in data:
        plain(F.conv2d(step.prepare_input(images, flip), weight, padding=1))
    step(*data)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(step.model.bn, name), getattr(plain, name))


def test_auxiliary_heads_add_their_share_of_the_gradient(device):
    torch.manual_seed(0)
    model = Headed()
    plain, data = copy.deepcopy(model).to(device), batch(0, device)
    options = {"label_smoothing": 0.1, "loss_scale": 8.0, "transport": Transport(Launch())}
    step = Step(model, image_size=SIZE, device=device, schedule=poly(0.1, 20), **options)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    images = torch.where(data.flip[:, None, None, None], data.images.flip(2), data.images).permute(0, 3, 1, 2)
    losses = [F.cross_entropy(y, data.labels, label_smoothing=0.1) for y in plain(images / 127.5 - 1)]
    (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]).backward()
    sgd.step()
    assert step(data)[0].item() == pytest.approx(losses[0].item(), rel=1e-5)  # what is shown is the logits' own
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(step.arena.state_dict()[name], value.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_frozen_backbone_stays_as_it_is(device, dtype):
    """To the bit, in fp32 and with its running statistics, whatever the compute dtype; a resumed one, too."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, other = Net(), Net()
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    options = {"dtype": dtype, "transport": Transport(Launch())}

    def made(model) -> Step:
        freeze_backbone(model)
        return Step(model, image_size=SIZE, device=device, schedule=poly(0.1, 20), **options)

    step, resumed = made(model), made(other)
    for number in range(2):
        step(batch(number, device))
    saved = step.state_dict()
    resumed.load_state_dict(saved)
    for each in (step, resumed):
        each.model.train()  # does not thaw it
        torch.manual_seed(5)
        each(batch(2, device))
        assert not any(bn.training for bn in each.model.modules() if isinstance(bn, BatchNorm2d))
    after = step.state_dict()["weights"]
    assert {name for name, t in before.items() if not torch.equal(t, after[name])} == {"fc.weight", "fc.bias"}
    for name, t in resumed.state_dict()["weights"].items():
        assert torch.equal(t, after[name]), name
    assert set(saved["optimizer"]["momentum"]) == {"fc.weight", "fc.bias"}
    images = torch.randn(2, 3, SIZE, SIZE, device=device).to(dtype, memory_format=torch.channels_last)
    torch.testing.assert_close(*(each.model.eval()(images) for each in (step, resumed)), rtol=0, atol=0)


class Relay(Transport):
    """Hands the tensors that rank 0 broadcasts to the next rank, one after another."""

    def __init__(self) -> None:
        super().__init__(Launch())
        self.sent: list[torch.Tensor] = []
        self.sends = True

    def broadcast(self, tensor):
        if self.sends:
            self.sent.append(tensor.clone())
        else:
            tensor.copy_(self.sent.pop(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_all_ranks_begin_as_rank_0_does(device, dtype):
    """With a frozen backbone as well, of which each rank had drawn its own; what is derived from weights follows."""
    relay, steps = Relay(), []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Net()
            nn.init.uniform_(model.bn.running_mean)
        freeze_backbone(model)
        options = {"image_size": SIZE, "device": device, "schedule": poly(0.1, 20), "dtype": dtype, "ema": 0.5}
        steps.append(Step(model, transport=relay, **options))
    steps[0](batch(0, device))
    images = torch.randn(2, 3, SIZE, SIZE, device=device).to(dtype, memory_format=torch.channels_last)
    for step, relay.sends in zip(steps, (True, False), strict=True):
        assert step.broadcast() == 1
    assert not relay.sent
    one, other = (step.state_dict() for step in steps)
    for kind in ("weights", "ema"):
        for name, weight in one[kind].items():
            assert torch.equal(weight, other[kind][name]), name
    torch.testing.assert_close(*(step.model.eval()(images) for step in steps), rtol=0, atol=0)


def test_evaluation_has_rank_0s_statistics_and_leaves_each_its_own(device):
    relay, steps, held = Relay(), [make(device), make(device)], []
    for number, step in enumerate(steps):
        step(batch(number, device))
        step.transport = relay
    assert not torch.equal(*(step.arena.running for step in steps))
    for step, relay.sends in zip(steps, (True, False), strict=True):
        own = step.arena.running.clone()
        with step.evaluation() as model:
            assert not any(module.training for module in model.modules())
            held.append(model.bn.running_mean.clone())
        assert all(module.training for module in model.modules())
        assert torch.equal(step.arena.running, own)
    assert torch.equal(*held)


def test_what_is_shown_is_the_mean_over_all_ranks(device):
    class Beside(Transport):
        """Sums with a rank that shows other values."""

        def all_reduce(self, tensor, name):
            if name == "shown":
                tensor += torch.tensor([3.0, 1.0, 1.0, 5.0], device=tensor.device)
            return lambda: None

    alone, beside = make(device), make(device, transport=Beside(Launch(2)))
    for step in (alone, beside):
        torch.manual_seed(5)
        step(batch(0, device))
    loss, top1, top5, latest, scale, updates = alone.read()
    shown = [(loss + 3) / 2, (top1 + 1) / 2, (top5 + 1) / 2, (latest + 5) / 2, scale, updates]
    assert beside.read() == pytest.approx(shown, rel=1e-6)


def test_averages_are_debiased_and_pass_over_a_loss_that_is_not_finite(device):
    step = make(device)
    losses, weights = [], []
    for number in range(6):
        if number == 3:
            data = batch(number, device)
            latest = step(data._replace(labels=torch.full_like(data.labels, CLASSES)))  # no such class: NaN
            assert latest[0].isnan()
            assert torch.tensor(step.read()[3]).isnan()
            continue
        latest = step(batch(number, device))
        losses.append(latest.double())
        weights.append(0.1 * 0.9 ** torch.arange(len(losses) - 1, -1, -1, device=device, dtype=torch.float64))
        expected = weights[-1] @ torch.stack(losses) / weights[-1].sum()
        average, rest = step.read()[:3], step.read()[3:]
        assert average == pytest.approx(expected.tolist(), rel=1e-12)
        assert rest == [latest[0].item(), 1.0, len(losses)]


def test_state_goes_from_one_step_to_another(device):
    one, other = make(device, ema=0.9), make(device, ema=0.9)
    for number in range(3):
        one(batch(number, device))
    saved = one.state_dict()
    one(batch(9, device))  # does not reach what was saved
    for step in (one, other):
        step.load_state_dict(saved)
        torch.manual_seed(5)
        step(batch(3, device))
    assert other.read() == one.read()
    assert torch.equal(one.arena.weight, other.arena.weight)
    assert torch.equal(one.arena.ema_weight, other.arena.ema_weight)
    assert not torch.equal(one.arena.ema_weight, one.arena.weight)
    assert other.broadcast() == 4
