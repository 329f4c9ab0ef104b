import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import trust_ratio
from kernels.trust_ratio import CONFIG, MODES, reference

U = 2.0**-24  # half a unit in the last place of fp32


def outputs(tensors, device, dtype=torch.float32):
    sizes = {"ratio": tensors, "gradient_norm": tensors, "weight_norm": tensors, "scalars": 3, "latest": 3}
    written = {name: torch.full((n,), torch.nan, dtype=dtype, device=device) for name, n in sizes.items()}
    return written | {"average": torch.zeros(4, dtype=torch.float64, device=device)}


def inputs(device, gradient, weight, blocks, schedule=(0.5, 0.25), step=0, loss_scale=1.0, rows=((2.0, 1.0, 1.0),)):
    first_block = torch.tensor([0, *blocks]).cumsum(0)
    return (
        torch.as_tensor(gradient, dtype=torch.float32, device=device),
        torch.as_tensor(weight, dtype=torch.float32, device=device),
        first_block.to(device, torch.int32),
        torch.tensor([step, 3, 5], device=device),
        torch.tensor([loss_scale], device=device),
        torch.tensor(schedule, device=device),
        torch.as_tensor(rows, device=device),
    )


def ratios(tensors, mode="clip", eta=1.0, ranks=1, excluded_from=99, clip_norm=0.0):
    out = outputs(len(tensors[2]) - 1, tensors[0].device)
    options = {"excluded_from": excluded_from, "clip_norm": clip_norm}
    trust_ratio(*tensors, ranks=ranks, larc_mode=mode, eta=eta, **options, **out)
    return out


@pytest.mark.parametrize(
    ("mode", "expected"),
    # norms (3, 4), (2, 1), (0, 1), (1, 0), with eta 3 and learning rate 4: q is 4, 1.5, 1, 1
    [("off", [1, 1, 1, 1]), ("clip", [1, 0.375, 0.25, 0.25]), ("scale", [4, 1.5, 1, 1])],
)
def test_is_exact_on_integers(implementation, device, mode, expected):
    tensors = inputs(device, [4, 5, 1, 2, 1, 0, 1], [9, 7, 0, 0, 1, 1, 0], [2, 3, 1, 1], schedule=[4.0])
    out = ratios(tensors, mode, eta=3.0)
    assert out["gradient_norm"].tolist() == [3, 2, 0, 1]
    assert out["weight_norm"].tolist() == [4, 1, 1, 0]
    assert out["ratio"].tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("learning_rate", [0.5, 4.0])
def test_what_is_excluded_is_left_to_sgd(implementation, device, mode, learning_rate):
    tensors = inputs(device, [4, 5, 1, 2, 1, 1], [9, 7, 0, 0, 1, 1], [2, 3, 1], schedule=[learning_rate])
    whole = ratios(tensors, mode, eta=0.5)
    assert whole["ratio"].unique().numel() > 1 or mode == "off"
    for first in (0, 1, 2, 3, 2**31 - 1):
        out = ratios(tensors, mode, eta=0.5, excluded_from=first)
        assert out["ratio"].tolist() == whole["ratio"].tolist()[:first] + [1] * (3 - first)
        for name in ("gradient_norm", "weight_norm", "scalars"):
            assert torch.equal(out[name], whole[name]), name


@pytest.mark.parametrize(
    ("clip_norm", "norms", "ratio", "factor"),
    [
        (4.0, [5, 3, 0], [0.8, 1, 1], 1 / 32),
        (8.0, [8, 5, 4], [0.5, 0.6, 0.25], 1 / 16),
        (9.0, [8, 5, 4], [0.5, 0.6, 0.25], 1 / 16),
    ],
)
def test_a_clipped_gradient_is_exact_on_integers(implementation, device, clip_norm, norms, ratio, factor):
    """Of norm 8: c is 1/2, or 1. What rounding makes of a norm of zero is none below it."""
    terms = [[36, 20, 6, 2], [24, -4, -3, 30], [4, 1, 5, -16]]
    tensors = inputs(device, terms, [16, 4, 5, 1], [1, 2, 1], schedule=[1.0], loss_scale=4.0)
    out = ratios(tensors, ranks=4, clip_norm=clip_norm)
    assert out["gradient_norm"].tolist() == norms
    assert out["ratio"].tolist() == pytest.approx(ratio, rel=2 * U)
    assert out["scalars"].tolist() == [1.0, factor, 1]


@pytest.mark.parametrize("row", range(3))
def test_each_term_of_a_clipped_gradient_must_be_finite(implementation, device, row):
    tensors = inputs(device, torch.ones(3, 2), [1, 1], [1, 1])
    assert ratios(tensors, clip_norm=1.0)["scalars"][2] == 1
    tensors[0][row, 1] = torch.inf
    assert ratios(tensors, clip_norm=1.0)["scalars"][2] == 0


def test_no_gradient_is_clipped_to_nothing(implementation, device):
    """The reference divides by the factor."""
    tensors = inputs(device, [[1e38], [0], [0]], [1], [1], loss_scale=1e30)
    assert ratios(tensors, clip_norm=1e-30)["scalars"][1] == 2.0**-126
    assert ratios(inputs(device, [[0], [0], [0]], [1], [1]), clip_norm=1e-30)["scalars"].tolist() == [0.5, 1, 1]


def test_what_is_excluded_has_a_ratio_of_1_even_in_an_overflow(implementation, device):
    out = ratios(inputs(device, [4, torch.nan, torch.inf], [9, 1, 1], [1, 1, 1]), excluded_from=1)
    assert out["ratio"].tolist()[1:] == [1, 1]
    assert out["scalars"][2] == 0


def test_a_tensor_of_more_blocks_than_a_program_takes_at_once(implementation, device):
    blocks = 4 * CONFIG["CHUNK"]
    tensors = inputs(device, torch.ones(blocks + 1), torch.ones(blocks + 1), [1, blocks])
    norms = [1, blocks**0.5]
    assert ratios(tensors)["gradient_norm"].tolist() == norms
    assert ratios(tensors)["weight_norm"].tolist() == norms
    tensors[0][-1] = torch.inf
    assert ratios(tensors)["scalars"][2] == 0


def test_scalars(implementation, device):
    for step, learning_rate in ((0, 0.5), (1, 0.25), (2, 0.125), (3, 0.125), (10**12, 0.125)):
        tensors = inputs(device, [1.0], [1.0], [1], [0.5, 0.25, 0.125], step, loss_scale=64.0)
        assert ratios(tensors, ranks=4)["scalars"].tolist() == [learning_rate, 1 / 256, 1]
        assert tensors[3].tolist() == [step, 3, 5]


@pytest.mark.parametrize(
    ("decay", "updates", "share"), [(0.75, 0, 0.9), (0.75, 8, 0.5), (0.75, 26, 0.25), (0.75, 10**6, 0.25)]
)
def test_the_share_of_an_average_falls_to_what_its_decay_leaves(implementation, device, decay, updates, share):
    tensors = inputs(device, [1.0], [1.0], [1])
    tensors[3][1] = updates
    out = outputs(1, device) | {"scalars": torch.full((4,), torch.nan, device=device)}
    trust_ratio(*tensors, ranks=1, larc_mode="off", eta=1.0, excluded_from=0, ema_decay=decay, **out)
    assert out["scalars"].tolist() == [0.5, 1, 1, pytest.approx(share, rel=U)]


@pytest.mark.parametrize("sums", [[1, torch.nan], [torch.inf, 1], [torch.inf, -torch.inf], [3e38, 3e38]])
def test_finite_is_that_of_the_sum_of_all(implementation, device, sums):
    tensors = inputs(device, sums, [1, 1], [1, 1])
    assert ratios(tensors)["scalars"][2] == 0
    assert ratios((torch.ones_like(tensors[0]), *tensors[1:]))["scalars"][2] == 1


def averaged(device, rows, average):
    """Returns `latest` and `average` after a step with these rows, from these averages."""
    out = outputs(1, device) | {"average": torch.tensor(average, dtype=torch.float64, device=device)}
    tensors = inputs(device, [1], [1], [1], rows=torch.as_tensor(rows).view(-1, 3))
    trust_ratio(*tensors, ranks=1, larc_mode="off", eta=1.0, excluded_from=99, **out)
    return out["latest"], out["average"]


@pytest.mark.parametrize("n", [1, 2, 7, CONFIG["CHUNK"] // 4, CONFIG["CHUNK"] // 4 + 1, CONFIG["CHUNK"]])
def test_averages_follow_the_mean_row(implementation, device, n):
    before = [5.0, -3.0, 0.25, 0.5]
    rows = torch.randint(-8, 9, (n, 3)).float()
    latest, average = averaged(device, rows, before)
    mean = (rows.double().sum(0) / n).float()  # one rounding
    assert torch.equal(latest.cpu(), mean)
    expected = 0.9 * torch.tensor(before, dtype=torch.float64) + 0.1 * torch.cat([mean.double(), torch.ones(1)])
    assert ((average.cpu() - expected).abs() <= 2.0**-52 * (expected.abs() + 5)).all()  # in fp64, fused or not


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_moves_no_average(implementation, device, value):
    rows, before = torch.ones(5, 3), [5.0, -3.0, 0.25, 0.5]
    rows[3, 0] = value
    latest, average = averaged(device, rows, before)
    assert average.tolist() == before
    assert not latest[0].isfinite()
    assert latest[1:].tolist() == [1, 1]
    rows[3] = torch.tensor([1, value, 1])
    assert averaged(device, rows, before)[1][[0, 3]].tolist() == pytest.approx([4.6, 0.55])  # the loss alone decides


def test_without_rows_no_average_moves(implementation, device):
    latest, average = averaged(device, torch.zeros(0), [5.0, -3.0, 0.25, 0.5])
    assert average.tolist() == [5.0, -3.0, 0.25, 0.5]
    assert latest.isnan().all()


@pytest.mark.parametrize("learning_rate", [0.0, 1e-45])
def test_clip_has_no_trouble_with_a_learning_rate_of_nothing(implementation, device, learning_rate):
    assert ratios(inputs(device, [1, 0], [4, 0], [1, 1], [learning_rate]))["ratio"].tolist() == [1, 1]


@given(
    blocks=st.lists(st.sampled_from([1, 2, 3, 50, CONFIG["CHUNK"] - 1, CONFIG["CHUNK"] + 1]), min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    eta=st.sampled_from([1e-3, 0.02, 1.0]),
    learning_rate=st.sampled_from([1e-6, 1e-3, 0.1, 3.0]),
    magnitude=st.sampled_from([1.0, 2.0**-40, 2.0**40]),
    ranks=st.integers(1, 7),
    clip_norm=st.sampled_from([0.0, 1e-3, 1e30]),
    seed=st.integers(0, 2**32),
)
def test_is_as_close_as_fp32_allows(
    implementation, device, blocks, mode, eta, learning_rate, magnitude, ranks, clip_norm, seed
):
    torch.manual_seed(seed)
    *terms, weight = torch.rand(4, sum(blocks)) * magnitude
    gradient = torch.stack(terms) if clip_norm else terms[0]
    tensors = inputs(device, gradient, weight, blocks, [learning_rate], loss_scale=3.7)
    exact = outputs(len(blocks), device, torch.float64)
    in_double = [t.double() if t.is_floating_point() else t for t in tensors]
    options = {"excluded_from": len(blocks), "clip_norm": clip_norm}
    reference(*in_double, ranks=ranks, larc_mode=mode, eta=eta, **options, **exact)
    # No element passes through more than 64 additions; the root halves their error, the ratio has two of them, and
    # four roundings of its own.
    roundings = {"gradient_norm": 33, "weight_norm": 33, "ratio": 70, "scalars": 3, "latest": 0, "average": 2.0**-28}
    if clip_norm:  # has the error of a norm and one rounding; the square has it twice, and six roundings more
        roundings |= {"gradient_norm": 33 + 35 + 3, "ratio": 70 + 35 + 3, "scalars": 3 + 35}
    for name, value in ratios(tensors, mode, eta, ranks, clip_norm=clip_norm).items():
        assert bool(((value.double() - exact[name]).abs() <= roundings[name] * U * exact[name]).all()), name


def test_two_runs_give_the_same_bits(implementation, device):
    tensors = inputs(device, torch.rand(70), torch.rand(70), [30, 40])
    first, second = ratios(tensors), ratios(tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(implementation, device, mode):
    arguments = (*inputs(device, [1, 2, 3], [1, 1, 1], [2, 1]), *outputs(2, device).values())
    arguments = tuple(t.nan_to_num() for t in arguments)  # NaN equals nothing, so it seems written
    factors = {"ranks": 2, "larc_mode": mode, "eta": 0.5, "excluded_from": 1}
    torch.library.opcheck(torch.ops.nvcnn.trust_ratio.default, arguments, factors)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t.half(), "gradient_square_sums must be .* got .*float16"),
        (1, lambda t: t[1:], r"weight_square_sums must be \(3,\)"),
        (2, lambda t: t.long(), "first_block must be .*int32.* got .*int64"),
        (2, lambda t: t[:1], "at least one tensor.* got 0 tensors"),
        (3, lambda t: t.int(), "counters must be .*int64"),
        (4, lambda t: t.to("meta"), "loss_scale must be .* on meta"),
        (5, lambda t: t[:0], "at least one tensor, step.* 0 steps"),
        (6, lambda t: t.view(-1), r"rows must be \(3, 3\)"),
    ],
)
def test_refuses(device, position, change, message):
    tensors = list(inputs(device, [1, 1, 1], [1, 1, 1], [2, 1]))
    tensors[position] = change(tensors[position])
    with pytest.raises(ValueError, match=message):
        trust_ratio(
            *tensors, ranks=1, larc_mode="off", eta=1.0, excluded_from=2, **outputs(len(tensors[2]) - 1, device)
        )


def test_refuses_an_unknown_mode(device):
    with pytest.raises(ValueError, match=r"mode of off, clip, scale, got .* mode larc"):
        ratios(inputs(device, [1], [1], [1]), mode="larc")


def test_refuses_to_clip_a_gradient_without_its_terms(device):
    with pytest.raises(ValueError, match=r"gradient_square_sums must be \(3, 1\)"):
        ratios(inputs(device, [1], [1], [1]), clip_norm=1.0)
    for clip_norm in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="clip_norm must be 0"):
            ratios(inputs(device, [[1], [1], [1]], [1], [1]), clip_norm=clip_norm)


def test_refuses_an_average_without_a_place_or_of_nothing(device):
    tensors, options = inputs(device, [1], [1], [1]), {"ranks": 1, "larc_mode": "off", "eta": 1.0, "excluded_from": 0}
    for decay, size, message in ((0.5, 3, r"scalars must be \(4,\)"), (1.0, 4, "ema_decay must be at least 0")):
        out = outputs(1, device) | {"scalars": torch.empty(size, device=device)}
        with pytest.raises(ValueError, match=message):
            trust_ratio(*tensors, **out, **options, ema_decay=decay)


def test_refuses_a_tensor_of_negative_number(device):
    with pytest.raises(ValueError, match=r"excluded_from must be .* got -1"):
        ratios(inputs(device, [1], [1], [1]), excluded_from=-1)
