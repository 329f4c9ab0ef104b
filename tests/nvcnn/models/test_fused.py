"""The conv-BatchNorm block on raw outputs, against PyTorch's modules; whole ResNets are in test_resnet.py."""

from collections import Counter
from copy import deepcopy
from functools import partial
from itertools import cycle, product
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.implementation import INTERPRETED
from nvcnn.meta import activation_bytes
from nvcnn.models import ALGORITHMS, build_model
from nvcnn.models.functions import LIBRARY, MATERIALIZED
from nvcnn.models.fused import (
    Operand,
    PendingAdd,
    PendingConv,
    Unnormalized,
    activation,
    concatenate,
    conv_bn,
    conv_relu,
    max_pool,
    pooling,
)
from nvcnn.models.layers import BatchNorm2d, Conv2d, cast_matrices
from nvcnn.models.resnet import Bottleneck

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


class Net(nn.Module):
    """Has two bottlenecks: one with a stride and a downsample branch, one whose join is the last."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.one, self.two = Bottleneck(8, 4, 2), Bottleneck(16, 4, stride, v1=stride > 1)

    def forward(self, x: Tensor) -> Tensor:
        return activation(self.two(self.one(x)))


def normalised(x: Tensor, conv: nn.Conv2d, bn: BatchNorm2d) -> Tensor:
    """Returns what `conv_bn` means, by PyTorch's functions, on the modules' own parameters and running statistics."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    statistics = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    return F.batch_norm(y, *statistics, bn.weight, bn.bias, training=bn.training, eps=bn.eps)


def plain(block: Bottleneck, x: Tensor) -> Tensor:
    y = normalised(x, block.conv1, block.bn1).relu()
    y = normalised(y, block.conv2, block.bn2).relu()
    y = normalised(y, block.conv3, block.bn3)
    skip = x if isinstance(block.downsample, nn.Identity) else normalised(x, *block.downsample)
    return (y + skip).relu()


def made(algorithm: str, net: nn.Module | None = None) -> nn.Module:
    """Returns a net, in float64, with gamma, beta and running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    net = (net or Net()).double().to(memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, Conv2d):
            module.algorithm = algorithm
        if isinstance(module, BatchNorm2d):
            tensors = module.weight, module.bias, module.running_mean, module.running_var
            for t, low in zip(tensors, (0.5, -0.5, 0, 1), strict=True):
                nn.init.uniform_(t, low, low + 1)
    return net


def made_of(net: nn.Module, values: nn.Module, algorithm: str) -> nn.Module:
    """Gives a net the values of another, and its convolutions the algorithm."""
    net.load_state_dict(values.state_dict())
    for module in net.modules():
        if isinstance(module, Conv2d):
            module.algorithm = algorithm
    return net


def input_of(n: int = 3, dtype: torch.dtype = torch.float64, side: int = 7) -> Tensor:
    x = torch.randn(n, 8, side, side, dtype=torch.float64).to(dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def expected_of(net: Net, x: Tensor) -> Tensor:
    return plain(net.two, plain(net.one, x))


def compare(ours: Net, theirs: Net) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11, msg=name)


def check(y: Tensor, expected: Tensor, ours: nn.Module, theirs: nn.Module, *x: Tensor) -> None:
    """Compares the values, and all gradients, with those of both x where they are given."""
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction)
    compare(ours, theirs)
    if x:
        torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-9, atol=1e-11)


@algorithms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_accumulate(algorithm, training):
    """There are two batches before the gradients are read, and each graph is walked twice."""
    net = made(algorithm).train(training)
    twin = deepcopy(net)
    for n in (3, 2):
        x = input_of(n)
        y, expected = net(x), expected_of(twin, x.detach().requires_grad_())
        torch.testing.assert_close(y, expected)
        direction = torch.randn_like(y)
        y.backward(direction, retain_graph=True)
        y.backward(direction)
        expected.backward(2 * direction)
    compare(net, twin)


@algorithms
@pytest.mark.parametrize(
    "frozen",
    [
        ["one.conv1", "one.conv2"],
        ["one"],
        ["two.conv3", "two.bn2"],
        ["one.downsample", "two.bn3"],
        ["one.bn1", "one.bn2", "one.bn3", "one.downsample.1", "two.bn1", "two.bn2", "two.bn3"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("image_gradient", [True, False], ids=["dx", "no-dx"])
def test_frozen_parameters(algorithm, frozen, image_gradient):
    net = made(algorithm)
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(tuple(f"{module}." for module in frozen)))
    twin, x = deepcopy(net), input_of().requires_grad_(image_gradient)
    x_twin = x.detach().clone().requires_grad_(image_gradient)
    check(net(x), expected_of(twin, x_twin), net, twin, *((x, x_twin) if image_gradient else ()))


@algorithms
def test_a_join_before_a_convolution_with_a_stride(algorithm):
    """As v1's bottlenecks have it: a kernel with a stride does not load every value, so the sum is in memory first."""
    net, x = made(algorithm, Net(stride=2)), input_of()
    twin, x_twin = deepcopy(net), x.detach().clone().requires_grad_()
    check(net(x), expected_of(twin, x_twin), net, twin, x, x_twin)


@algorithms
@pytest.mark.parametrize("size", [1, 3], ids=["join", "activation"])
def test_a_sum_of_which_some_read_few_pixels(algorithm, size):
    """Two 1 x 1s with a stride share the pixels that they read; others read all, or those of another stride."""
    readers = [Conv2d(8, 8, size, padding=size // 2, bias=False)]
    readers += [Conv2d(8, 8, 1, stride, bias=False) for stride in (2, 2, 3, (2, 1))]
    net = made(algorithm, nn.ModuleList([Bottleneck(8, 2, 1), *readers, *(BatchNorm2d(8) for _ in readers)]))
    twin, x = deepcopy(net), input_of()
    x_twin = x.detach().clone().requires_grad_()
    z = net[0](x)
    values = [activation(conv_bn(z, conv, bn, skip_stride=2)) for conv, bn in zip(net[1:6], net[6:], strict=True)]
    assert (z.sparse is None) == (algorithm == "torch")
    expected = plain(twin[0], x_twin)
    wanted = [normalised(expected, conv, bn).relu() for conv, bn in zip(twin[1:6], twin[6:], strict=True)]
    check(flat([activation(z), *values]), flat([expected, *wanted]), net, twin, x, x_twin)


@algorithms
def test_gradcheck_of_a_closed_block(algorithm):
    """On raw tensors it fails by design: the gradient on them is of the normalised value."""
    net = made(algorithm)
    assert torch.autograd.gradcheck(net, (input_of(2),), fast_mode=True)
    joined = made(algorithm, Bottleneck(8, 2, 1))
    assert torch.autograd.gradcheck(lambda x: activation(joined(activation(joined(x)))), (input_of(2),), fast_mode=True)


class Called(TorchDispatchMode):
    """Counts calls of the project's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nvcnn":
            self.counts[func._schema.name.removeprefix("nvcnn::")] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("algorithm", MATERIALIZED)
def test_operands_are_written_once(algorithm):
    """`a` is for forward, the weight's gradient and whoever else reads it; dy is for both gradients."""
    net, x = made(algorithm), input_of()
    with Called() as called:
        raw = conv_bn(x, net.one.conv1, net.one.bn1)
        first, second = (
            activation(conv_bn(raw, *pair)) for pair in ((net.one.conv2, net.one.bn2), (net.two.conv2, net.two.bn2))
        )
        forward = Counter(called.counts)
        (first.sum() + second.sum()).backward()
    assert forward["batch_norm"] == 1 + 2  # the raw tensor's, and those of the outputs
    assert called.counts["batch_norm"] == forward["batch_norm"]
    assert called.counts["batch_norm_data_gradient"] == 3
    gradients = {f"convolution_{of}_gradient": 3 for of in ("data", "weight")} | {"convolution": 3}
    assert {name: called.counts[name] for name in gradients} == (
        dict.fromkeys(gradients, 0) if algorithm in LIBRARY else gradients
    )


@algorithms
def test_what_is_kept_may_be_kept_elsewhere(algorithm):
    """Hooks bring back other tensors, as those of `torch.autograd.graph.save_on_cpu` do."""
    net, x = made(algorithm), input_of()
    twin = deepcopy(net)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        y = net(x)
    check(y, twin(x.detach().requires_grad_()), net, twin)


@algorithms
def test_evaluation_without_gradients(algorithm):
    """The values are those of modules; by triton one call a convolution does it all."""
    net, x = made(algorithm).eval(), input_of().detach()
    with torch.no_grad(), Called() as called:
        y = net(x)
    torch.testing.assert_close(y, expected_of(net, x))
    assert called.counts == {"batch_norm" if algorithm in LIBRARY else "convolution": 7}


@algorithms
def test_a_folded_convolution_with_two_readers(algorithm):
    """Each takes it as it needs it: with ReLU, and without."""
    net, x = made(algorithm).eval(), input_of().detach()
    conv1, bn1, conv2, bn2 = net.one.conv1, net.one.bn1, net.one.conv2, net.one.bn2
    with torch.no_grad():
        first = conv_bn(x, conv1, bn1)
        assert isinstance(first, PendingConv)
        second = activation(conv_bn(first, conv2, bn2))
        both = activation(PendingAdd(first, first))
        value = normalised(x, conv1, bn1)
        torch.testing.assert_close(both, (value + value).relu())
        torch.testing.assert_close(second, normalised(value.relu(), conv2, bn2).relu())


@algorithms
@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_images_padded_with_zeros(algorithm, channels, training):
    """Results and gradients are those of three channels."""
    net = made(algorithm, nn.ModuleList([Conv2d(3, 8, 3, stride=2, padding=1, bias=False), BatchNorm2d(8)]))
    net.train(training)
    twin, images = deepcopy(net), torch.randn(2, 3, 7, 7, dtype=torch.float64)
    padded = F.pad(images, (0, 0, 0, 0, 0, channels - 3))
    y, expected = (
        activation(conv_bn(x.to(memory_format=torch.channels_last), *pair))
        for x, pair in ((padded, net), (images, twin))
    )
    check(y, expected, net, twin)


@algorithms
def test_channels_that_nobody_knows_are_refused(algorithm):
    conv = Conv2d(3, 8, 1, bias=False)
    conv.algorithm = algorithm
    for channels in (2, 5):
        x = torch.randn(2, channels, 4, 4).to(memory_format=torch.channels_last)
        with pytest.raises((ValueError, RuntimeError), match=f"{channels}"):
            activation(conv_bn(x, conv, BatchNorm2d(8)))


@algorithms
def test_a_raw_tensor_with_two_readers(algorithm):
    """As in an Inception: branches read one activation before it is in memory, and so does a join."""
    branches = [module for _ in range(2) for module in (Conv2d(8, 8, 3, padding=1, bias=False), BatchNorm2d(8))]
    net = made(algorithm, nn.ModuleList([Conv2d(8, 8, 1, bias=False), BatchNorm2d(8), *branches]))
    first, first_bn, conv1, bn1, conv2, bn2 = net
    x = input_of()
    raw = conv_bn(x, first, first_bn)
    y = activation(PendingAdd(conv_bn(raw, conv1, bn1), raw)) + activation(conv_bn(raw, conv2, bn2))

    twin, x_twin = deepcopy(net), x.detach().clone().requires_grad_()
    v = normalised(x_twin, *twin[:2])
    a, b = (normalised(v.relu(), *twin[i : i + 2]) for i in (2, 4))
    check(y, (a + v).relu() + b.relu(), net, twin, x, x_twin)


class Stem(nn.Module):
    """Pools a raw tensor, or with `readers` one that a convolution reads before it, and another behind it."""

    def __init__(self, readers: bool = False):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(8, 8, 3, padding=1, bias=False), BatchNorm2d(8)
        self.convs = nn.ModuleList([Conv2d(8, 8, 1, bias=False) for _ in range(2 * readers)])
        self.bns = nn.ModuleList([BatchNorm2d(8) for _ in range(2 * readers)])

    def forward(self, x: Tensor) -> list[Tensor]:
        raw = conv_bn(x, self.conv1, self.bn1)
        readers = [partial(conv_bn, conv=conv, bn=bn) for conv, bn in zip(self.convs, self.bns, strict=True)]
        readers.insert(1, partial(max_pool, kernel_size=3, stride=2, padding=1))
        return [activation(read(raw)) for read in readers]

    def plain(self, x: Tensor) -> list[Tensor]:
        a = normalised(x, self.conv1, self.bn1).relu()
        values = [normalised(a, *pair).relu() for pair in zip(self.convs, self.bns, strict=True)]
        values.insert(1, F.max_pool2d(a, 3, 2, 1))
        return values


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


@algorithms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("readers", [False, True], ids=["pool", "pool and others"])
def test_pooling(algorithm, training, readers):
    net, x = made(algorithm, Stem(readers)).train(training), input_of()
    twin, x_twin = deepcopy(net), x.detach().clone().requires_grad_()
    with torch.no_grad():
        folded = flat(net(x))
    check(flat(net(x)), flat(twin.plain(x_twin)), net, twin, x, x_twin)
    torch.testing.assert_close(folded, flat(twin.plain(x_twin)))


@algorithms
def test_what_is_pooled_is_not_written(algorithm):
    """Forward and backward, nothing but the pooling and the convolution touches the raw tensor."""
    net, x = made(algorithm, Stem()), input_of()
    with Called() as called:
        (y,) = net(x)
        y.sum().backward()
    written = {"batch_norm", "batch_norm_gradient_sums", "batch_norm_backward"} & called.counts.keys()
    assert written == ({"batch_norm", "batch_norm_backward"} if algorithm == "torch" else set())
    assert called.counts["max_pool"] == called.counts["max_pool_backward"] == 1


class Biased(nn.Module):
    """Has convolutions with bias and ReLU: one reads images, others what is Rectified, two of them the same."""

    def __init__(self):
        super().__init__()
        self.one = Conv2d(8, 6, 3, padding=1)
        self.two = Conv2d(6, 8, 3, stride=2, padding=1)
        self.three, self.four = Conv2d(8, 4, 1), Conv2d(8, 4, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = conv_relu(conv_relu(x, self.one), self.two)
        return flat([max_pool(conv_relu(y, self.three), 2, 2), activation(conv_relu(y, self.four)), activation(y)])

    def plain(self, x: Tensor) -> Tensor:
        """As PyTorch does it on a GPU: the bias is added to what was rounded to the compute dtype."""

        def conv_relu(x: Tensor, conv: Conv2d) -> Tensor:
            y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
            return F.relu(y + conv.bias.view(-1, 1, 1))

        y = conv_relu(conv_relu(x, self.one), self.two)
        return flat([F.max_pool2d(conv_relu(y, self.three), 2, 2), conv_relu(y, self.four), y])


@algorithms
@pytest.mark.parametrize("frozen", [(), ("one.weight", "two.bias"), ("one.", "two.")], ids=str)
def test_convolutions_with_bias(algorithm, frozen):
    net, x = made(algorithm, Biased()), input_of()
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen or "none"))
    twin, x_twin = deepcopy(net), x.detach().clone().requires_grad_()
    with torch.no_grad():
        evaluated = net(x)
    y, expected = net(x), twin.plain(x_twin)
    torch.testing.assert_close(evaluated, expected)
    check(y, expected, net, twin, x, x_twin)


@pytest.mark.parametrize("algorithm", ["triton", "cudnn"])
def test_bias_and_relu_are_the_kernels(algorithm):
    """Of the passes over a tensor the mask is the data gradient's by triton, one by cuDNN, and none is elsewhere."""
    net, x = made(algorithm, Biased()), input_of()
    with Called() as called:
        net(x).sum().backward()
    assert called.counts["convolution"] == (4 if algorithm == "triton" else 0)
    assert called.counts["convolution_data_gradient"] == called.counts["convolution"]
    assert called.counts["batch_norm_gradient_sums"] == (2 if algorithm == "triton" else 5)  # activation's, asked for
    assert "batch_norm_data_gradient" not in called.counts


class Wide(nn.Module):
    """Has what branches may end in: raw tensors, one that autograd has no norm of, and activations."""

    def __init__(self):
        super().__init__()
        widths = 6, 8, 9  # the last one widens
        self.convs = nn.ModuleList([Conv2d(8, c, 1, bias=False) for c in widths])
        self.bns = nn.ModuleList([BatchNorm2d(c) for c in widths])
        self.biased = Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> list[Operand]:
        first, second, third = (conv_bn(x, *pair) for pair in zip(self.convs, self.bns, strict=True))
        y = self.convs[0](x).contiguous(memory_format=torch.channels_last)  # in float64 a GPU's is not
        plain = Unnormalized(F.avg_pool2d(y, 3, 1, 1), self.bns[0])
        pooled, raw = max_pool(second, 3, 1, 1), pooling(second, 3, 1, 1)
        relu, activated = conv_relu(x, self.biased), pooling(activation(second), 3, 1, 1)
        return [first, pooled, plain, raw, second, relu, activated, third, pooling(relu, 3, 1, 1)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("algorithm", "kernels", "frozen"),
    [
        *((algorithm, "reference", ()) for algorithm in ALGORITHMS),
        ("triton", "reference", ("convs.0", "bns.0")),
        *((algorithm, "triton", ()) for algorithm in ("torch", "triton", "cudnn")),
    ],
)
def test_branches_are_concatenated(monkeypatch, device, algorithm, kernels, frozen, training):
    """It gives the bits of torch.cat of the activations, forward and backward."""
    monkeypatch.setenv("NVCNN_KERNELS", kernels)
    net, dtype = made(algorithm, Wide()).to(device).train(training), torch.float64
    if kernels == "triton":
        net, dtype = cast_matrices(net.float(), torch.float16), torch.float16
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen or "none"))
    x, results = input_of(2, dtype, side=4).detach().to(device), []
    for concatenated in (concatenate, lambda branches: torch.cat([activation(branch) for branch in branches], 1)):
        with torch.no_grad():
            evaluated = concatenated(net(x))
        leaf, trained = x.clone().requires_grad_(), [p for p in net.parameters() if p.requires_grad]
        y = concatenated(net(leaf))
        torch.manual_seed(1)
        results.append([evaluated, y, *torch.autograd.grad(y, [leaf, *trained], torch.randn_like(y))])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in results[0][:2])


@algorithms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_concatenated_is_written_there(algorithm, training):
    net, x = made(algorithm, Wide()).train(training), input_of()
    with torch.set_grad_enabled(training), Called() as called:
        first, second, *_ = (conv_bn(x, *pair) for pair in zip(net.convs, net.bns, strict=True))
        before = Counter(called.counts)
        y = concatenate([first, pooling(x, 3, 1, 1), second])
        forward = called.counts - before
        if training:
            y.backward(torch.randn_like(y))
    folded = "batch_norm" if algorithm == "torch" else "batch_norm_into" if algorithm in LIBRARY else "convolution"
    into = "batch_norm_into" if training else folded
    assert forward[into] == 2
    pooled = "max_pool" if into == "batch_norm" else "max_pool_into"
    assert (forward[pooled], called.counts["max_pool_backward"]) == (1, training)
    assert forward.keys() <= {into, "batch_norm_statistics", pooled}
    assert called.counts["batch_norm_backward" if algorithm == "torch" else "batch_norm_gradient_sums"] == 2 * training


def test_branches_of_other_sizes_are_refused():
    raw, *_ = made("triton", Wide())(input_of())
    other = torch.zeros(3, 8, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"concatenate: N, H and W must be the same, got .*6, 7, 7.*8, 1, 1"):
        concatenate([raw, other])


@algorithms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_convolutions_with_bias_round_no_more_than_torch(algorithm, dtype, device):
    """The median of nine draws counts.

    In one draw of four a rounding moves a value over the edge of a ReLU, or another value is the maximum: a gradient is
    then off by a hundred times what roundings alone make.
    """
    ratios: dict[str, list[float]] = {}
    for seed in range(9):
        torch.manual_seed(seed)
        ours = Biased().to(device)
        theirs, exact = deepcopy(ours).to(dtype), deepcopy(ours).to(dtype).double()
        cast_matrices(made_of(ours, exact, algorithm), dtype)
        x = input_of(4, side=16).to(device, dtype)
        outputs = [ours(x), theirs.plain(x), exact.plain(x.double())]
        direction = torch.randn_like(outputs[2])
        for y in outputs:
            y.backward(direction.to(y.dtype))
        triples = {"y": outputs}
        for (name, p), q, r in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
            assert p.grad.dtype == (torch.float32 if p.ndim < 2 else dtype), name
            triples[name] = [p.grad, q.grad, r.grad]
        for name, (a, b, right) in triples.items():
            ratios.setdefault(name, []).append(((a.double() - right).norm() / (b.double() - right).norm()).item())
    assert all(median(found) <= 1.5 for found in ratios.values()), ratios


@algorithms
def test_operators_refuse_what_is_not_normalised(algorithm):
    net = made(algorithm)
    raw = conv_bn(input_of(), net.one.conv1, net.one.bn1)
    join = net.one(input_of())
    assert isinstance(raw, Unnormalized)
    assert isinstance(join, PendingAdd)
    for operator in (F.relu, torch.abs, torch.sum, lambda x: torch.cat([x, x]), lambda x: torch.ones(1).add(x)):
        with pytest.raises(TypeError, match="Unnormalized is not normalised yet: give it activation"):
            operator(raw)
        with pytest.raises(TypeError, match="PendingAdd is not normalised yet: give it activation"):
            operator(join)
    with pytest.raises(TypeError):
        raw + 1


@pytest.mark.parametrize("algorithm", ["triton", "triton-materialized", "cudnn"])
@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect", "padding": 1}],
    ids=str,
)
def test_refuses_what_the_kernels_do_not_have(algorithm, options):
    conv = Conv2d(8, 8, 3, **{"bias": False} | options)
    conv.algorithm = algorithm
    with pytest.raises(ValueError, match="conv_bn: Conv2d"):
        conv_bn(input_of(), conv, BatchNorm2d(8))


def test_memory_of_a_resnet50():
    """The bytes that an fp16 image of 224 x 224 keeps for backward are counted by hand: raw, joined, pooled values."""

    def kept(algorithm: str) -> float:
        with torch.device("meta"):
            model = build_model("resnet50", num_classes=1000, seed=1)
        for module in model.modules():
            if isinstance(module, Conv2d):
                module.algorithm = algorithm
        return activation_bytes(model, 256, 224, torch.float16) / 256

    def stage(side: int, width: int, blocks: int, stride: int) -> tuple[int, int, int, int]:
        """Returns how many values raw outputs have that a convolution reads, how many other ones, joined ones.

        And those that a skip connection with a stride reads of the stage before.
        """
        wide, inner = side * side * 4 * width, side * side * width
        first = inner * stride**2  # the 1x1 in front of the stride
        sparse = (stride > 1) * wide // 2
        return blocks * 2 * inner - inner + first, blocks * wide + wide, blocks * wide, sparse

    stages = [stage(56, 64, 3, 1), stage(28, 128, 4, 2), stage(14, 256, 6, 2), stage(7, 512, 3, 2)]
    read, raw, joined, sparse = (sum(values) for values in zip(*stages, strict=True))
    stem = 112 * 112 * 64
    pooled, images, features = stem // 4, 3 * 224 * 224, 2048
    # Half of what is pooled: a byte says which was largest.
    values = images + stem + pooled + pooled / 2 + read + raw + joined + sparse + features
    norm = 5 * 4 * 26560 / 256  # of each BatchNorm, in fp32, once a batch
    assert kept("triton") == pytest.approx(2 * values + norm, rel=0.01)
    for others in ("triton-materialized", "cudnn"):
        assert kept(others) == kept("triton") + 2 * read  # their activations, too
    assert kept("torch") == kept("cudnn") - 2 * sparse
    for others in ("triton-gram", "cudnn-gram"):  # no output of a 1x1 that widens, but matrices of its weight's size
        assert kept(others) == pytest.approx(kept("triton") + 2 * read - 2 * raw, rel=0.01)


@pytest.mark.parametrize(
    ("algorithm", "dtype", "training"),
    [
        *product(["triton"], [torch.float32], [True, False]),
        *product(["triton"], [torch.float16], [True]),  # in evaluation: among the mixed
        *product(["triton-gram"], [torch.float16], [True]),
        *product(["mixed"], [torch.float16], [True, False]),
    ],
)
def test_bottlenecks_by_triton_s_kernels(device, monkeypatch, algorithm, dtype, training):
    """All values and gradients are a rounding from those of float64, or twice as far as PyTorch's modules are.

    In fp32 the modules are no measure, as they add up in double on a CPU: there it is 32 roundings.
    """
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    exact = made("torch").train(training)
    if training:  # the sums are about the running mean: as it is at first
        for module in exact.modules():
            if isinstance(module, BatchNorm2d):
                module.reset_running_stats()
    ours, theirs = (cast_matrices(deepcopy(exact).to(device).float(), dtype) for _ in range(2))
    exact = deepcopy(theirs).cpu().double()
    mixed = cycle(["triton", "triton-materialized", "cudnn", "triton-materialized"])
    for module in ours.modules():
        if isinstance(module, Conv2d):
            module.algorithm = next(mixed) if algorithm == "mixed" else algorithm
    x = input_of(1, dtype, side=5)
    if not training:
        with torch.no_grad():
            folded = ours(x.to(device))
    inputs = [x.detach().to(device).requires_grad_() for _ in range(2)] + [x.detach().double().requires_grad_()]
    outputs = [ours(inputs[0]), expected_of(theirs, inputs[1]), expected_of(exact, inputs[2])]
    direction = torch.randn(outputs[0].shape).to(dtype)
    for y in outputs:
        y.backward(direction.to(y))

    roundings = torch.finfo(dtype).eps / 2 * (32 if dtype == torch.float32 else 1)

    def error(got: Tensor, exact: Tensor) -> float:
        return (got.detach().double().cpu() - exact.detach()).norm().item()

    def check_error(name: str, got: Tensor, peer: Tensor, exact: Tensor) -> None:
        assert error(got, exact) <= max(2 * error(peer, exact), roundings * exact.norm().item()), name

    check_error("y", *outputs)
    if not training:
        check_error("y without gradients", folded, *outputs[1:])
    check_error("dx", *(x.grad for x in inputs))
    vectors = []
    for (name, p), q, r in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        if p.dim() > 1:
            check_error(name, p.grad, q.grad, r.grad)
        else:
            norm = r.grad.norm().clamp(min=1e-3)  # some are all 0
            vectors.append([g.double().cpu() / norm for g in (p.grad, q.grad, r.grad)])
    # Of four values, gamma's or beta's, it is luck which rounding is nearer: all, at equal norms, are judged as one.
    check_error("gamma and beta", *map(torch.cat, zip(*vectors, strict=True)))
    assert INTERPRETED or device.type == "cuda"
