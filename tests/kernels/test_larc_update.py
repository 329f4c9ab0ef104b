import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import BLOCK, larc_update, refresh
from kernels.implementation import INTERPRETED
from kernels.larc_update import reference
from tests.kernels.images import unit

U = 2.0**-24  # half a unit in the last place of fp32
MODELS = (torch.float16, torch.bfloat16, torch.float32)
MOMENTA = (torch.float32, torch.bfloat16)
dtypes = pytest.mark.parametrize(
    ("dtype", "momentum_dtype"), [(MODELS[0], MOMENTA[0]), (MODELS[1], MOMENTA[1]), (MODELS[2], MOMENTA[1])]
)
FACTORS = {"momentum_factor": 0.9, "weight_decay": 1e-4, "statistics_momentum": 0.1, "growth_interval": 0}
UNTOUCHED_BY_OVERFLOW = ("weight", "momentum", "model_weight", "weight_square_sums", "running")
UNTOUCHED_BY_OVERFLOW += ("ema_weight", "ema_running")


def arguments(
    device, matrices=2, vectors=1, dtype=torch.float16, statistics=5, values=torch.randn, momentum_dtype=torch.float32,
    ema=False,
):  # fmt: skip
    """Returns random ones, by name, for a model of `dtype`; every second block begins a tensor. The rate is 1/2.

    matrices, vectors: how many blocks of each there are. ema: whether there is an average; its share is 1/4.
    """
    m, v, blocks = matrices * BLOCK, vectors * BLOCK, matrices + vectors
    floats = {"matrix_gradient": m, "vector_gradient": v, "weight": m + v, "momentum": m + v}
    floats |= {"ratio": (blocks + 1) // 2, "running": statistics, "batch": statistics}
    tensors = {name: values(n, device=device) for name, n in floats.items()} | {
        "model_weight": None if dtype == torch.float32 else torch.full((m,), torch.nan, device=device, dtype=dtype),
        "tensor_of_block": torch.arange(blocks, device=device, dtype=torch.int32) // 2,
        "scalars": torch.tensor([0.5, 0.25, 1.0], device=device),
        "weight_square_sums": torch.full((blocks,), torch.nan, device=device),
        "counters": torch.tensor([7, 6, 5], device=device),
        "loss_scale": torch.tensor([4.0], device=device),
    }
    if ema:
        tensors |= {"ema_weight": values(m + v, device=device), "ema_running": values(statistics, device=device)}
        tensors["scalars"] = torch.tensor([0.5, 0.25, 1.0, 0.25], device=device)
    tensors["momentum"] = tensors["momentum"].to(momentum_dtype)
    tensors["matrix_gradient"] = tensors["matrix_gradient"].to(dtype)
    return {name: tensors[name] for name in inspect.signature(larc_update).parameters if name in tensors}


def integers(n, device):
    return torch.randint(-4, 5, (n,), device=device).float()


def copied(tensors):
    return {name: None if t is None else t.clone() for name, t in tensors.items()}


def updated(tensors, **factors):
    new = copied(tensors)
    larc_update(**new, **(FACTORS | factors))
    return new


def same_bits(a, b):
    return a is b or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rounded(weight, dtype, implementation):
    """Rounds to nearest, or as Triton's interpreter, which cuts fp32 off to bf16, where the compiler rounds."""
    if implementation == "triton" and INTERPRETED and dtype == torch.bfloat16:
        weight = (weight.view(torch.int32) & -(2**16)).view(torch.float32)
    return weight.to(dtype)


@dtypes
@pytest.mark.parametrize("blocks", [(2, 2), (3, 0), (0, 3)])
@pytest.mark.parametrize("decay_vectors", [True, False])
def test_is_exact_on_integers(implementation, device, dtype, momentum_dtype, blocks, decay_vectors):
    old = arguments(device, *blocks, dtype, values=integers, momentum_dtype=momentum_dtype)
    factors = {"momentum_factor": 2.0, "weight_decay": 0.5, "statistics_momentum": 0.25}
    new = updated(old, **factors, decay_vectors=decay_vectors)
    gradient = torch.cat((old["matrix_gradient"].float(), old["vector_gradient"]))
    ratio = old["ratio"][old["tensor_of_block"].long()].repeat_interleave(BLOCK)
    decay = 0.5 * old["weight"]
    if not decay_vectors:
        decay[blocks[0] * BLOCK :] = 0
    d = ratio * (gradient / 4 + decay)
    momentum = 2 * old["momentum"].float() + d  # at most 20, in quarters: bf16 holds that
    weight = old["weight"] - 0.5 * (d + 2 * momentum)
    assert torch.equal(new["momentum"], momentum.to(momentum_dtype))
    assert torch.equal(new["momentum"].float(), momentum)
    assert torch.equal(new["weight"], weight)
    assert torch.equal(new["weight_square_sums"], weight.view(-1, BLOCK).square().sum(1))
    assert torch.equal(new["running"], 0.75 * old["running"] + 0.25 * old["batch"])
    assert not new["batch"].any()
    if dtype != torch.float32:
        assert torch.equal(new["model_weight"], rounded(weight[: blocks[0] * BLOCK], dtype, implementation))


@dtypes
@pytest.mark.parametrize("blocks", [(2, 2), (3, 0), (0, 3)])
def test_the_average_moves_by_its_share(implementation, device, dtype, momentum_dtype, blocks):
    """All else has the bits that it has without an average."""
    options = {"statistics": BLOCK + 3, "values": integers, "momentum_dtype": momentum_dtype}
    old = arguments(device, *blocks, dtype, **options, ema=True)
    factors = {"momentum_factor": 2.0, "weight_decay": 0.5, "statistics_momentum": 0.25}
    new = updated(old, **factors)
    without = old | {"ema_weight": None, "ema_running": None, "scalars": old["scalars"][:3].clone()}
    for name, value in updated(without, **factors).items():
        assert name in ("ema_weight", "ema_running", "scalars") or same_bits(new[name], value), name
    for name in ("weight", "running"):
        before = old[f"ema_{name}"]
        assert torch.equal(new[f"ema_{name}"], before + 0.25 * (new[name] - before)), name


@given(
    blocks=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    dtype=st.sampled_from(MODELS),
    momentum_dtype=st.sampled_from(MOMENTA),
    staged=st.booleans(),
    statistics=st.sampled_from([0, 1, 100, BLOCK, BLOCK + 3]),
    rate=st.sampled_from([0.0, 1e-3, 3.0]),
    magnitude=st.sampled_from([1.0, 2.0**-10, 2.0**10]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 1e-4, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_is_as_close_as_fp32_allows(
    implementation, device, blocks, dtype, momentum_dtype, staged, statistics, rate, magnitude, momentum, decay, seed
):
    torch.manual_seed(seed)
    old = arguments(device, *blocks, dtype, statistics, momentum_dtype=momentum_dtype)
    old["matrix_gradient"] *= magnitude
    if staged:  # a transport without the model's dtype reduces in fp32
        old["matrix_gradient"] = old["matrix_gradient"].float()
    old["vector_gradient"] *= magnitude
    old["scalars"][0] = rate
    factors = FACTORS | {"momentum_factor": momentum, "weight_decay": decay}
    new = updated(old, **factors)

    def in_double(tensors):
        result = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in copied(tensors).items()}
        reference(**result, **factors)
        return result

    # With every sign such that terms add, the exact formula gives the sum of the absolute values of its terms.
    terms = {n: t.abs() if t is not None else None for n, t in old.items()}
    terms["scalars"] = old["scalars"] * torch.tensor([-1.0, 1, 1], device=device)
    exact, terms = in_double(old), in_double(terms)
    # A term passes through at most 10 roundings: four to d, two to the momentum, four to the weight.
    bounds = {name: n * U * terms[name] for name, n in {"momentum": 6, "weight": 10, "running": 4}.items()}
    if momentum_dtype != torch.float32:  # one rounding more, of a value that is off by the first bound already
        to_storage = unit(momentum_dtype, implementation) * (exact["momentum"].abs() + bounds["momentum"])
        bounds["momentum"] += to_storage
        bounds["weight"] += rate * momentum * to_storage
    for name, bound in bounds.items():
        assert bool(((new[name].double() - exact[name]).abs() <= bound).all()), name
    # What is derived is derived from the weights as they were written. No square passes through over 128 additions.
    squares = new["weight"].double().view(-1, BLOCK).square().sum(1)
    assert bool(((new["weight_square_sums"] - squares).abs() <= 129 * U * squares).all())
    if dtype != torch.float32:
        assert same_bits(new["model_weight"], rounded(new["weight"][: blocks[0] * BLOCK], dtype, implementation))
    assert not new["batch"].any()
    assert new["counters"].tolist() == [8, 7, 6]


def test_the_weight_moves_by_the_momentum_that_is_kept(implementation, device):
    old = arguments(device, momentum_dtype=torch.bfloat16)
    for name in ("matrix_gradient", "vector_gradient", "weight"):
        old[name].zero_()
    new = updated(old, weight_decay=0.0)
    momentum = old["momentum"].float() * torch.tensor(0.9)
    assert torch.equal(new["momentum"], rounded(momentum, torch.bfloat16, implementation))
    assert not torch.equal(new["momentum"].float(), momentum)
    assert torch.equal(new["weight"], -0.5 * (torch.tensor(0.9) * new["momentum"].float()))


@dtypes
@pytest.mark.parametrize(("growth_interval", "poison"), [(0, torch.nan), (3, torch.inf)])
def test_an_overflow_changes_nothing_but_step_and_loss_scale(
    implementation, device, dtype, momentum_dtype, growth_interval, poison
):
    old = arguments(device, dtype=dtype, statistics=BLOCK + 1, momentum_dtype=momentum_dtype, ema=True)
    old["scalars"][2:] = torch.tensor([0, poison])
    old["ratio"].fill_(poison)
    old["matrix_gradient"][3], old["vector_gradient"][5], old["batch"][1] = poison, poison, poison
    new = updated(old, growth_interval=growth_interval)
    for name in UNTOUCHED_BY_OVERFLOW:
        assert same_bits(new[name], old[name]), name
    assert not new["batch"].any()
    assert new["counters"].tolist() == [8, 6, 0]
    assert new["loss_scale"].tolist() == [2.0 if growth_interval else 4.0]


@pytest.mark.parametrize("dtype", MODELS)
def test_reads_only_what_it_should_and_writes_nothing_else(implementation, device, dtype):
    old = arguments(device, dtype=dtype)
    new = updated(old)
    for name in ("matrix_gradient", "vector_gradient", "tensor_of_block", "ratio", "scalars", "loss_scale"):
        assert same_bits(new[name], old[name]), name


def test_padding_stays_zero(implementation, device):
    tensors = arguments(device)
    padding = torch.arange(3 * BLOCK, device=device) % BLOCK >= BLOCK - 100
    gradient = torch.cat((tensors["matrix_gradient"].float(), tensors["vector_gradient"])).masked_fill(padding, 0)
    tensors["matrix_gradient"], tensors["vector_gradient"] = gradient[: 2 * BLOCK].half(), gradient[2 * BLOCK :]
    tensors["weight"][padding], tensors["momentum"][padding] = 0, 0
    for _ in range(3):
        tensors = updated(tensors)
    assert not tensors["weight"][padding].any()
    assert not tensors["momentum"][padding].any()
    assert not tensors["model_weight"][padding[: 2 * BLOCK]].any()
    assert tensors["weight"][~padding].all()


@dtypes
@pytest.mark.parametrize("blocks", [(3, 2), (2, 0), (0, 2)])
def test_refresh_has_the_bits_of_the_update(implementation, device, dtype, momentum_dtype, blocks):
    new = updated(arguments(device, *blocks, dtype, momentum_dtype=momentum_dtype))
    again = copied(new)
    for name in ("model_weight", "weight_square_sums"):
        if again[name] is not None:
            again[name].fill_(torch.nan)
    refresh(again["weight"], again["model_weight"], again["weight_square_sums"])
    for name in ("weight", "model_weight", "weight_square_sums"):
        assert same_bits(again[name], new[name]), name


def test_the_kernels_sum_by_pairs(device, monkeypatch):
    """So the order is the same in both, however the compiler lays out a block over the threads."""
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    new = updated(arguments(device, dtype=torch.float32))
    sums = new["weight"].square().view(-1, BLOCK)
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    assert torch.equal(new["weight_square_sums"], sums[:, 0])


def test_refresh_beyond_a_chunk_of_the_reference(device, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    old = arguments(device, 300, 260, torch.float32, values=integers)
    new = updated(old, momentum_factor=0.0, weight_decay=0.5)
    sums = torch.empty(560, device=device)
    refresh(new["weight"], None, sums)
    for each in (sums, new["weight_square_sums"]):
        assert torch.equal(each, new["weight"].view(-1, BLOCK).square().sum(1))  # 64ths, fewer than 2^24


@dtypes
def test_two_runs_give_the_same_bits(implementation, device, dtype, momentum_dtype):
    old = arguments(device, dtype=dtype, momentum_dtype=momentum_dtype)
    first, second = updated(old), updated(old)
    assert all(same_bits(first[name], second[name]) for name in old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # with a copy of the weights for the model, without
def test_opcheck(implementation, device, dtype):
    tensors = arguments(device, dtype=dtype, ema=dtype == torch.float16)
    old = {name: None if t is None else t.nan_to_num() for name, t in tensors.items()}
    torch.library.opcheck(torch.ops.nvcnn.larc_update.default, tuple(old.values()), FACTORS)
    derived = tuple(old[name] for name in ("weight", "model_weight", "weight_square_sums"))
    torch.library.opcheck(torch.ops.nvcnn.refresh.default, derived)


@given(
    finite=st.lists(st.booleans(), max_size=8),
    growth_interval=st.integers(1, 3),
)
def test_the_loss_scale_follows_the_grad_scaler(implementation, device, finite, growth_interval):
    tensors = arguments(device, 1, 0, statistics=0)
    tensors["counters"].zero_()
    tensors["loss_scale"].fill_(2.0**12)  # as many steps as here do not reach its bounds
    expected, tracker = torch.tensor([2.0**12]), torch.zeros(1, dtype=torch.int32)
    for step, is_finite in enumerate(finite):
        tensors["scalars"][2] = is_finite
        larc_update(**tensors, **(FACTORS | {"growth_interval": growth_interval}))
        torch._amp_update_scale_(expected, tracker, torch.tensor([float(not is_finite)]), 2.0, 0.5, growth_interval)
        assert tensors["loss_scale"].item() == expected.item()
        assert tensors["counters"].tolist() == [step + 1, sum(finite[: step + 1]), tracker.item()]


@pytest.mark.parametrize(
    ("finite", "before", "after"),
    [
        (1, 2.0**23, 2.0**24),
        (1, 2.0**24, 2.0**24),
        (1, 3 * 2.0**22, 2.0**24),
        (1, 2.0**30, 2.0**30),
        (0, 2.0, 1.0),
        (0, 1.5, 1.0),
        (0, 1.0, 1.0),
        (0, 0.25, 0.25),
    ],
)
def test_the_loss_scale_keeps_within_its_bounds(implementation, device, finite, before, after):
    tensors = arguments(device, 1, 0, statistics=0)
    tensors["scalars"][2] = finite
    tensors["loss_scale"].fill_(before)
    new = updated(tensors, growth_interval=6)
    assert new["loss_scale"].tolist() == [after]
    assert new["counters"][2] == 0


def test_a_static_loss_scale_counts_but_stays(implementation, device):
    tensors = arguments(device, 1, 0, statistics=0)
    for good, finite in ((6, 1), (7, 1), (0, 0), (1, 1)):
        tensors["scalars"][2] = finite
        tensors = updated(tensors)
        assert tensors["counters"][2] == good
        assert tensors["loss_scale"].tolist() == [4.0]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("matrix_gradient", lambda t: t.bfloat16(), "matrix_gradient must be .*float16 or .*float32.* got .*bfloat16"),
        ("model_weight", lambda t: None, "matrix_gradient must be .*float32.* got .*float16"),
        ("model_weight", lambda t: t.float(), "model_weight must be .* got .*float32"),
        ("model_weight", lambda t: t[BLOCK:], r"model_weight must be \(4096,\)"),
        ("vector_gradient", lambda t: t[:-1], "multiples of 2048"),
        ("weight", lambda t: t.double(), "weight must be .* got .*float64"),
        ("momentum", lambda t: t[BLOCK:], r"momentum must be \(6144,\)"),
        ("momentum", lambda t: t.half(), "momentum must be .*float32 or .*bfloat16.* got .*float16"),
        ("momentum", lambda t: t.flip(0).repeat_interleave(2)[::2], "momentum must be .*contiguous"),
        ("tensor_of_block", lambda t: t.long(), "tensor_of_block must be .*int32"),
        ("ratio", lambda t: t.half(), "ratio must be"),
        ("scalars", lambda t: t[:2], r"scalars must be \(3,\)"),
        ("weight_square_sums", lambda t: t[:2], r"weight_square_sums must be \(3,\)"),
        ("batch", lambda t: t[:2], r"batch must be \(5,\)"),
        ("counters", lambda t: t.int(), "counters must be .*int64"),
        ("loss_scale", lambda t: t.to("meta"), "loss_scale must be .* on meta"),
    ],
)
def test_refuses(device, name, change, message):
    tensors = arguments(device)
    with pytest.raises(ValueError, match=message):
        larc_update(**(tensors | {name: change(tensors[name])}), **FACTORS)


def test_refuses_half_an_average(device):
    tensors = arguments(device, ema=True)
    for change, message in (
        ({"ema_running": None}, "give both of ema_weight and ema_running"),
        ({"ema_weight": tensors["ema_weight"].half()}, "ema_weight must be .*float16"),
        ({"ema_running": tensors["ema_running"][1:]}, r"ema_running must be \(5,\)"),
        ({"scalars": tensors["scalars"][:3]}, r"scalars must be \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            updated(tensors | change)


def test_refuses_a_negative_growth_interval(device):
    with pytest.raises(ValueError, match="growth_interval must be 0"):
        updated(arguments(device), growth_interval=-1)


def test_refresh_refuses(device):
    t = arguments(device)
    with pytest.raises(ValueError, match=r"weight_square_sums must be \(3,\)"):
        refresh(t["weight"], t["model_weight"], t["weight_square_sums"][:2])
    with pytest.raises(ValueError, match=r"model_weight must be .* got .*float32"):
        refresh(t["weight"], t["model_weight"].float(), t["weight_square_sums"])
