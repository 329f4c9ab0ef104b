import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels import configurations, cross_entropy
from tests.kernels.images import DTYPES, SMALLEST, on, unit

INF, NAN = torch.inf, torch.nan
U = 2.0**-24
ONE = torch.ones(1)


def exact(logits, targets, loss_scale, label_smoothing):
    """Returns PyTorch's losses and gradient in float64."""
    x = logits.double().requires_grad_()
    targets = targets.double() if targets.is_floating_point() else targets
    losses = F.cross_entropy(x, targets, reduction="none", label_smoothing=label_smoothing)
    (gradient,) = torch.autograd.grad(losses.sum() * (loss_scale.double() / len(x)), x)
    return losses.detach(), gradient


def equal(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.to(a.dtype).nan_to_num(nan=12345.0))


def random_targets(soft, n, classes, device):
    """Soft targets have two classes a row, as mixup's, but not the sum 1: the gradient must not count on it."""
    if not soft:
        return torch.randint(classes, (n,), device=device)
    pair = F.one_hot(torch.randint(classes, (2, n), device=device), classes)
    return (pair * torch.rand(2, n, 1, device=device)).sum(0)


def mixed_targets(labels, classes, share):
    """Returns, in float64, the soft targets of a mixed batch."""
    own = F.one_hot(labels, classes).double()
    return share * own + (1 - share) * own.flip(0)


def label_of(targets):
    return targets.argmax(1) if targets.dim() == 2 else targets


def hits(logits, targets):
    """Returns top-1 and top-5 by a stable sort."""
    order = logits.sort(dim=1, descending=True, stable=True).indices
    rank = (order == label_of(targets)[:, None]).int().argmax(1)
    return torch.stack([rank < 1, rank < 5], 1).float()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_exact_on_few_equal_logits(implementation, device, dtype, soft):
    # 1, 2 or 4 logits are 24 and the others 1000 less: the probabilities are 1, 1/2 or 1/4, and 0.
    best = [[0], [3, 9], [3, 5, 11, 36], [8], [36], [17, 20], [30, 31, 32, 33], [0, 1, 2, 3]]
    logits = torch.full((8, 37), -976.0, device=device).to(dtype)
    for row, classes in zip(logits, best, strict=True):
        row[classes] = 24.0
    targets = torch.tensor([0, 9, 3, 9, 36, 17, 0, 1], device=device)
    wins = [1, 0, 1, 0, 1, 1, 0, 0]
    targets = F.one_hot(targets, 37).float() if soft else targets
    loss_scale = torch.tensor([128.0], device=device)
    rows, gradient = cross_entropy(logits, targets, loss_scale, 0.0)
    losses, exact_gradient = exact(logits, targets, loss_scale, 0.0)
    assert torch.equal(gradient.double(), exact_gradient)
    assert ((rows[:, 0] - losses).abs() <= 4 * U * (1 + losses)).all()
    assert rows[[0, 3, 4], 0].tolist() == [0.0, 1000.0, 0.0]
    assert torch.equal(rows[:, 1:], hits(logits, targets))
    assert rows[:, 1].tolist() == wins


SHAPES = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(41, 3000)),
    st.tuples(st.integers(7, 50), st.integers(1, 12)),
)


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    soft=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.75]),
    spread=st.sampled_from([1.0, 30.0]),
    loss_scale=st.sampled_from([0.5, 1.0, 1000.0]),
    share=st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_is_as_close_as_its_dtypes_allow(
    implementation, device, shape, dtype, soft, label_smoothing, spread, loss_scale, share, seed
):
    torch.manual_seed(seed)
    n, classes = shape
    logits = (spread * torch.randn(shape, device=device)).to(dtype)
    targets = random_targets(soft, n, classes, device)
    if share is not None:
        targets = random_targets(False, n, classes, device)
    arguments = logits, targets, torch.tensor([loss_scale], device=device), label_smoothing
    rows, gradient = cross_entropy(*arguments, None if share is None else torch.tensor([share], device=device))
    check_closeness(rows, gradient, arguments, unit(dtype, implementation), share)


def check_closeness(rows, gradient, arguments, rounding, share=None):
    logits, targets, loss_scale, label_smoothing = arguments
    classes = logits.shape[1]
    label = targets
    if share is not None:
        label = targets if share >= 0.5 else targets.flip(0)
        targets = mixed_targets(targets, classes, torch.tensor(share, dtype=torch.float32).double().item())
    losses, exact_gradient = exact(logits, targets, loss_scale, label_smoothing)
    p, information = logits.double().softmax(1), -logits.double().log_softmax(1)
    target = targets.double() if targets.dim() == 2 else F.one_hot(targets, classes).double()
    q = (1 - label_smoothing) * target + label_smoothing / classes
    # Of an exponential: the difference, its product with log2 e, itself (2^-22 on a GPU), each in its exponent's units.
    of_exp = (3 * information + 5) * U
    of_total = (p * of_exp).sum(1, keepdim=True) + classes * U
    of_log = of_total + 4 * U * (1 + information.amin(1, keepdim=True))
    bound = (q * (of_log + (classes + 8) * U * information)).sum(1)
    assert ((rows[:, 0] - losses).abs() <= bound).all()
    # An exponential below 2^-126 may become 0; the interpreter makes another one of a bf16 that small.
    bound = p * q.sum(1, keepdim=True) * (of_exp + of_total + (classes + 12) * U) + 6 * U * q + 2.0**-126
    bound = bound * (loss_scale / len(logits)) + rounding * exact_gradient.abs() + SMALLEST[gradient.dtype] + 2.0**-126
    assert ((gradient - exact_gradient).abs() <= bound).all()
    assert torch.equal(rows[:, 1:], hits(logits, label))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [1, 4, 5, 6, 17, 40])
def test_a_tie_goes_to_the_lower_index(implementation, device, classes, soft):
    torch.manual_seed(classes)
    logits = torch.randint(-1, 2, (50, classes), device=device).half()
    logits[0] = 3
    targets = random_targets(soft, 50, classes, device)
    if soft:
        targets[1] = 1 / classes
    rows, _ = cross_entropy(logits, targets, ONE.to(device), 0.1)
    assert torch.equal(rows[:, 1:], hits(logits, targets))
    assert classes > 5 or rows[:, 2].all()


# The probabilities are halves and the smoothing a quarter: all gradients are exact, also in fp16.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
@pytest.mark.parametrize("soft", [False, True])
def test_infinities_and_nan_give_what_torch_gives(implementation, device, dtype, label_smoothing, soft):
    logits = [
        [0.0, -INF, 0.0, -INF],
        [0.0, NAN, 0.0, 0.0],
        [0.0, INF, 0.0, 0.0],
        [-INF, -INF, -INF, -INF],
        [INF, INF, INF, INF],
        [0.0, -INF, INF, 0.0],
        [-INF, 5.0, -INF, -INF],
        [0.0, -100.0, -100.0, 0.0],
    ]
    shares = [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
        [0.5, 0.0, 0.5, 0.0],
        [0.25, 0.25, 0.25, 0.25],
    ]
    logits = torch.tensor(logits, device=device, dtype=dtype).repeat_interleave(5, 0)
    targets = torch.tensor(shares, device=device).repeat(8, 1)
    targets = targets if soft else targets.argmax(1)
    loss_scale = torch.full((1,), 40.0, device=device)
    rows, gradient = cross_entropy(logits, targets, loss_scale, label_smoothing)
    losses, exact_gradient = exact(logits, targets, loss_scale, label_smoothing)
    usual = losses.isfinite()
    assert equal(gradient[:35], exact_gradient[:35])
    assert ((rows[usual, 0] - losses[usual]).abs() <= 8 * U * (1 + losses[usual])).all()
    assert equal(rows[~usual, 0], losses[~usual])
    assert not rows[:35, 1:].any()
    assert torch.equal(rows[35:, 1:], hits(logits[35:], targets[35:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_label_that_is_no_class_shows_in_its_row_alone(implementation, device, dtype, label_smoothing):
    """Of a mixed batch in the row that has a share of it, too."""
    logits = torch.randn(9, 3, device=device).to(dtype)
    good = torch.tensor([0, 1, 2] * 3, device=device)
    bad = good.clone()
    bad[[1, 2, 4, 5, 7]] = torch.tensor([-1, 3, -100, 2**32 + 1, -(2**63)], device=device)
    expected = cross_entropy(logits, good, ONE.to(device), label_smoothing)
    rows, gradient = cross_entropy(logits, bad, ONE.to(device), label_smoothing)
    assert rows[bad != good, 0].isnan().all()
    assert not rows[bad != good, 1:].any()
    assert gradient[bad != good].isnan().all()
    for got, wanted in zip((rows, gradient), expected, strict=True):
        assert torch.equal(got[bad == good], wanted[bad == good])
    rows, gradient = cross_entropy(logits, bad, ONE.to(device), label_smoothing, ONE.to(device) / 4)
    either = (bad != good) | (bad != good).flip(0)
    assert torch.equal(rows[:, 0].isnan(), either)
    assert torch.equal(gradient.isnan().all(1), either)
    assert torch.equal(gradient.isnan().any(1), either)


@pytest.mark.parametrize(("dtype", "top"), [(torch.float16, 65504.0), (torch.float32, 1e4), (torch.bfloat16, 2.0**16)])
def test_logits_may_be_large(implementation, device, dtype, top):
    logits = torch.tensor([[top, -top, 0.0], [-top, -top, -top]], device=device, dtype=dtype)
    rows, gradient = cross_entropy(logits, torch.tensor([1, 0], device=device), 2 * ONE.to(device), 0.0)
    assert rows[0].tolist() == [2 * top, 0.0, 1.0]
    assert gradient[0].tolist() == [1.0, -1.0, 0.0]
    third = torch.tensor([-2 / 3, 1 / 3, 1 / 3], device=device)
    assert ((gradient[1] - third).abs() <= (unit(dtype, implementation) + 8 * U) * third.abs()).all()


@pytest.mark.parametrize("classes", [1, 10, 1000, 21_841])
def test_computed_configurations_are_right_as_well(implementation, device, classes, monkeypatch):
    monkeypatch.setattr(configurations, "table_name", lambda device: "none")
    monkeypatch.setattr(configurations, "say_once", lambda line: None)
    torch.manual_seed(classes)
    for soft in (False, True):
        logits = torch.randn(3, classes, device=device).half()
        arguments = logits, random_targets(soft, 3, classes, device), 1024 * ONE.to(device), 0.1
        check_closeness(*cross_entropy(*arguments), arguments, unit(torch.float16, implementation))


def test_two_runs_give_the_same_bits(implementation, device):
    logits, targets = torch.randn(5, 300, device=device), random_targets(True, 5, 300, device)
    for a, b in zip(*(cross_entropy(logits, targets, ONE.to(device), 0.1) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_losses_backward_is_the_gradient(implementation, device, dtype):
    logits = torch.randn(8, 33, device=device).to(dtype).requires_grad_()
    loss_scale = torch.tensor([512.0], device=device)
    rows, gradient = cross_entropy(logits, random_targets(False, 8, 33, device), loss_scale, 0.1)
    assert not gradient.requires_grad
    (loss_scale * rows[:, 0].mean() + rows[:, 1:].sum()).backward()
    assert torch.equal(logits.grad, gradient)


def test_has_no_second_derivative(implementation, device):
    logits = torch.randn(2, 3, device=device, requires_grad=True)
    rows, _ = cross_entropy(logits, torch.tensor([0, 1], device=device), ONE.to(device), 0.0)
    (d,) = torch.autograd.grad(rows[:, 0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d.sum().backward()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(device, monkeypatch, soft, label_smoothing):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    logits = torch.randn(4, 7, dtype=torch.float64, device=device, requires_grad=True)
    targets = random_targets(soft, 4, 7, device)
    targets = targets.double() if soft else targets
    scale = torch.tensor([64.0], device=device)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, scale, label_smoothing)[0][:, 0], logits)


@pytest.mark.parametrize("soft", [False, True])
def test_opcheck(implementation, device, soft):
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    torch.library.opcheck(cross_entropy.overload, (logits, random_targets(soft, 3, 5, device), ONE.to(device), 0.1))


LOGITS, LABELS = torch.randn(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOGITS.long(), LABELS, ONE, 0.0), "logits must be one of torch.float16.*got torch.int64"),
        ((LOGITS[0], LABELS, ONE, 0.0), r"logits must be \(N, K\).*got \(3,\)"),
        ((LOGITS[:, :0], LABELS, ONE, 0.0), r"neither of them 0.*got \(2, 0\)"),
        ((LOGITS[:, ::2], LABELS, ONE, 0.0), r"contiguous; got \(2, 2\), strides \(3, 2\)"),
        ((torch.ones(2, 2**15 + 1), LABELS, ONE, 0.0), "logits must have at most 32768 classes, got 32769"),
        ((LOGITS, LABELS.int(), ONE, 0.0), r"targets must be \(2,\), torch.int64.*got \(2,\), torch.int32"),
        ((LOGITS, LOGITS.half(), ONE, 0.0), r"targets must be \(2, 3\), torch.float32.*got \(2, 3\), torch.float16"),
        ((LOGITS, LABELS, torch.tensor(1.0), 0.0), r"loss_scale must be \(1,\), torch.float32"),
        ((LOGITS, LABELS, ONE, 1.0), "label_smoothing must be at least 0 and below 1, got 1.0"),
        ((LOGITS, LABELS, ONE, 0.0, LOGITS), r"share must be \(1,\), torch.float32"),
        ((LOGITS, LOGITS, ONE, 0.0, ONE), "share is for classes"),
        ((LOGITS, LABELS, ONE, -0.1), "label_smoothing must be at least 0 and below 1, got -0.1"),
    ],
)
def test_refuses(device, arguments, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(*(on(a, device) if isinstance(a, torch.Tensor) else a for a in arguments))
