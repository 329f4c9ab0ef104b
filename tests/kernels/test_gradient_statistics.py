import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import BLOCK, gradient_statistics
from kernels.gradient_statistics import reference

U = 2.0**-24  # half a unit in the last place of fp32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SEGMENTS = [(2, 1), (3, 0), (0, 2)]  # blocks of matrices and of vectors


def inputs(device, matrix_blocks, vector_blocks, dtype=torch.float16, loss_scale=1.0, values=torch.randn):
    sizes = matrix_blocks * BLOCK, vector_blocks * BLOCK, (matrix_blocks + vector_blocks) * BLOCK
    matrix, vector, weight = (values(n, device=device) for n in sizes)
    return matrix.to(dtype), vector, weight, torch.tensor([loss_scale], device=device)


def integers(n, device):
    return torch.randint(-4, 5, (n,), device=device).float()


def statistics(tensors, ranks=1, weight_decay=0.0, decay_vectors=True):
    sums = torch.full((len(tensors[2]) // BLOCK,), torch.nan, device=tensors[2].device)
    factors = {"weight_decay": weight_decay, "decay_vectors": decay_vectors}
    gradient_statistics(*tensors, ranks=ranks, square_sums=sums, **factors)
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
@pytest.mark.parametrize("decay_vectors", [True, False])
def test_is_exact_on_integers(implementation, device, dtype, segments, weight_decay, decay_vectors):
    matrix, vector, weight, loss_scale = inputs(device, *segments, dtype, 2.0, integers)
    decay = weight_decay * weight
    if not decay_vectors:
        decay[len(matrix) :] = 0
    expected = (torch.cat((matrix.float(), vector)) + decay).view(-1, BLOCK).square().sum(1)
    sums = statistics((matrix * 8, vector * 8, weight, loss_scale), 4, weight_decay, decay_vectors)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("weight_decay", "decay_vectors"), [(0.0, True), (2.0, True), (2.0, False)])
def test_the_terms_are_exact_on_integers(implementation, device, dtype, segments, weight_decay, decay_vectors):
    matrix, vector, weight, loss_scale = inputs(device, *segments, dtype, 2.0, integers)
    sums = torch.full((3, sum(segments)), torch.nan, device=device)
    factors = {"ranks": 4, "weight_decay": weight_decay, "decay_vectors": decay_vectors}
    gradient_statistics(matrix * 8, vector * 8, weight, loss_scale, sums, **factors)
    gradient, decay = torch.cat((matrix.float(), vector)), weight_decay * weight
    if not decay_vectors:
        decay[len(matrix) :] = 0
    terms = torch.stack((gradient * gradient, 2 * gradient * decay, decay * decay))
    assert torch.equal(sums, terms.view(3, -1, BLOCK).sum(2))


@given(
    segments=st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any),
    dtype=st.sampled_from(DTYPES),
    loss_scale=st.sampled_from([1.0, 3.7, 128.0, 65536.0]),
    magnitude=st.sampled_from([1.0, 2.0**-12, 2.0**12]),
    ranks=st.integers(1, 7),
    weight_decay=st.sampled_from([0.0, 1e-4, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_is_as_close_as_fp32_allows(
    implementation, device, segments, dtype, loss_scale, magnitude, ranks, weight_decay, seed
):
    torch.manual_seed(seed)
    matrix, vector, weight, loss_scale = inputs(device, *segments, dtype, loss_scale)
    tensors = matrix * magnitude, vector * magnitude, weight, loss_scale

    def in_double(change=lambda x: x):
        sums = torch.empty(sum(segments), dtype=torch.float64, device=device)
        reference(*(change(t.double()) for t in tensors), ranks=ranks, weight_decay=weight_decay, square_sums=sums)
        return sums

    # A term carries 5 roundings (loss scale x ranks, decay, their product, that with the weight, the sum), its square
    # doubles them and adds one; no element passes through more than 128 additions; the inverse has 2, and comes twice,
    # with a product each. Where terms cancel, the bound is on their absolute values.
    bound = (2 * 5 + 1 + 128 + 2 * 3) * U * in_double(torch.abs)
    assert bool(((statistics(tensors, ranks, weight_decay) - in_double()).abs() <= bound).all())


@pytest.mark.parametrize(("value", "dtype"), [*zip([torch.nan, torch.inf, -torch.inf], DTYPES, strict=True)])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK + 77, 3 * BLOCK - 1])
def test_a_value_that_is_not_finite_shows_in_its_block_alone(implementation, device, value, at, dtype):
    tensors = inputs(device, 2, 1, dtype)
    (tensors[0] if at < 2 * BLOCK else tensors[1])[at % (2 * BLOCK)] = value
    expected = torch.ones(3, dtype=torch.bool)
    expected[at // BLOCK] = False
    assert torch.equal(statistics(tensors, weight_decay=1e-4).isfinite().cpu(), expected)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_finite_value_whose_square_is_not_counts_as_overflow(implementation, device, dtype, loss_scale):
    tensors = inputs(device, 1, 1, dtype, loss_scale)
    tensors[0][5] = 1e20
    assert statistics(tensors).isfinite().tolist() == [False, True]


def test_the_largest_fp16_is_finite(implementation, device):
    tensors = inputs(device, 1, 1, loss_scale=2.0**24)
    tensors[0].fill_(65504)
    assert statistics(tensors)[0].item() == pytest.approx(BLOCK * (65504 * 2.0**-24) ** 2, rel=129 * U)


def test_the_smallest_fp16_counts(implementation, device):
    tensors = inputs(device, 1, 1)
    tensors[0].fill_(2.0**-24)
    assert statistics(tensors)[0] == BLOCK * 2.0**-48


def test_squares_below_fp32_are_zero(implementation, device):
    matrix, vector, weight, loss_scale = inputs(device, 1, 1, torch.float32)
    assert statistics((matrix * 1e-30, vector * 1e-40, weight, loss_scale)).tolist() == [0, 0]


def test_without_decay_the_weight_is_not_read(implementation, device):
    matrix, vector, weight, loss_scale = inputs(device, 2, 1)
    expected = statistics((matrix, vector, weight, loss_scale))
    assert torch.equal(statistics((matrix, vector, weight.fill_(torch.nan), loss_scale)), expected)


def test_writes_its_output_alone(implementation, device):
    tensors = inputs(device, 2, 1)
    before = [t.clone() for t in tensors]
    room = torch.full((5,), 7.0, device=device)
    gradient_statistics(*tensors, ranks=1, weight_decay=1e-4, square_sums=room[1:4])
    assert room[[0, 4]].tolist() == [7, 7]
    assert all(map(torch.equal, tensors, before))


def test_two_runs_give_the_same_bits(implementation, device):
    tensors = inputs(device, 2, 2)
    assert torch.equal(statistics(tensors, 3, 1e-4), statistics(tensors, 3, 1e-4))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_opcheck(implementation, device, weight_decay):
    arguments = (*inputs(device, 2, 1), torch.zeros(3, device=device))
    op = torch.ops.nvcnn.gradient_statistics.default
    torch.library.opcheck(op, arguments, {"ranks": 2, "weight_decay": weight_decay})


def test_blocks_beyond_a_chunk_of_the_reference(device, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    tensors = inputs(device, 300, 1, torch.float32, values=integers)
    expected = torch.cat(tensors[:2]).view(-1, BLOCK).square().sum(1)
    assert torch.equal(statistics(tensors), expected)


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t.double(), "matrix_gradient must be .* got .*float64"),
        (0, lambda t: t[1:], "multiples of 2048"),
        (1, lambda t: t.half(), "vector_gradient must be .* got .*float16"),
        (2, lambda t: t[BLOCK:], r"weight must be \(6144,\)"),
        (2, lambda t: t.repeat_interleave(2)[::2], "weight must be .* contiguous"),
        (2, lambda t: t.to("meta"), "matrix_gradient must be .* on meta"),
        (3, lambda t: t.squeeze(), r"loss_scale must be \(1,\)"),
    ],
)
def test_refuses(device, position, change, message):
    tensors = list(inputs(device, 2, 1))
    tensors[position] = change(tensors[position])
    with pytest.raises(ValueError, match=message):
        gradient_statistics(*tensors, ranks=1, weight_decay=0.0, square_sums=torch.empty(3, device=device))


def test_refuses_no_blocks_and_no_ranks(device):
    with pytest.raises(ValueError, match=r"square_sums must be \(3, 1\)"):
        gradient_statistics(*inputs(device, 1, 0), torch.zeros(2, 1, device=device), ranks=1, weight_decay=0.0)
    with pytest.raises(ValueError, match="not both 0"):
        statistics(inputs(device, 0, 0))
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        statistics(inputs(device, 1, 0), ranks=0)
