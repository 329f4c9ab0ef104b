"""What is each rank's own becomes that of another number of ranks, and the total batch stays."""

import pytest
import torch

from nvcnn import checkpoint
from nvcnn.machine import chosen_kernels
from nvcnn.program import InputError
from nvcnn.resharding import resharded
from nvcnn.settings import Settings, as_json

DATA = {"backend": "torch", "images": 300, "epoch": 2, "batch": 1}


def settings_of(batch_size: int, accumulate: int = 1, **options) -> Settings:
    return Settings(model="lenet", batch_size=batch_size, accumulate=accumulate, **options)


def state_of(settings: Settings, ranks: int, reader: dict, **entries) -> dict:
    each = [{"running": [1.0, 4.0 * r], "average": [0.5 * r], "torch_rng": [r]} for r in range(ranks)]
    own = [{name: torch.tensor(value) for name, value in rank.items()} | {"reader": reader} for rank in each]
    counters = torch.tensor([17, 17, 0])
    state = {"settings": as_json(settings), "ranks": own, "optimizer": {"counters": counters}}
    return state | {"kernels": chosen_kernels()} | entries


def test_statistics_are_the_mean_and_generators_new_ones():
    settings = settings_of(16, 2)
    state = state_of(settings, 3, DATA)
    assert resharded(state, settings, 3) is state["ranks"]
    here = settings_of(48)
    ranks = resharded(state, here, 2)
    for rank in ranks:
        assert rank.keys() == {"reader", "running", "average", "seed"}
        assert torch.equal(rank["running"], torch.tensor([1.0, 4.0]))
        assert torch.equal(rank["average"], torch.tensor([0.5]))
    later = state | {"optimizer": {"counters": torch.tensor([18, 18, 0])}}
    seeds = [rank["seed"] for each in (ranks, resharded(later, here, 2)) for rank in each]
    assert len(set(seeds)) == 4
    assert seeds[:2] == [rank["seed"] for rank in resharded(state, here, 2)]
    for rank in state["ranks"]:
        del rank["running"]  # as in an older one
    assert [rank.keys() for rank in resharded(state, here, 2)] == [{"reader", "average", "seed"}] * 2


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ({}, {}),  # synthetic data
        (DATA | {"batch": 4}, DATA | {"batch": 8}),
        (DATA | {"batch": 18}, DATA | {"epoch": 3, "batch": 0, "first": 3}),  # 288 of 300 images
    ],
)
def test_the_position_in_the_data(reader, expected):
    """Of 32 images a step: from 2 ranks with 8 x 2 to 4 with 2 x 4."""
    state = state_of(settings_of(8, 2), 2, reader)
    assert [rank["reader"] for rank in resharded(state, settings_of(2, 4), 4)] == [expected] * 4


@pytest.mark.parametrize(
    ("ranks", "parts", "said"),
    [
        (2, (16, 2), ""),
        (1, (64, 1), ""),
        (8, (8, 1), ""),
        (2, (16, 1), r"64 \(on 4 ranks\), .* 32 \(on 2\): give --batch_size=16 --accumulate=2 or --batch_size=32"),
        (8, (16, 1), r"here it is 128 \(on 8\): give --batch_size=8, or another --log_dir"),
        (1, (9, 3), r"give --batch_size=16 --accumulate=4 or --batch_size=64 --accumulate=1, or another"),
        (3, (16, 1), r"here it is 48 \(on 3\): start a number of ranks that divides 64"),
        (4, (8, 2), r"is of another run \(--batch_size: there 16, here 8; --accumulate: there 1, here 2\)"),
    ],
)
def test_the_total_batch_stays(tmp_path, capsys, ranks, parts, said):
    """On as many ranks, so does what it is made of."""
    state = state_of(settings_of(16), 4, DATA)
    path = checkpoint.path_of(tmp_path, 17)
    checkpoint.save(path, state, 1)
    here = settings_of(*parts, log_dir=str(tmp_path))
    if said:
        with pytest.raises(InputError, match=f"{path} .*{said}"):
            checkpoint.resume(here, ranks)
    else:
        assert checkpoint.resume(here, ranks)
        assert f"{path}\n  4 ranks trained until there, {ranks} go on with" in capsys.readouterr().out
    with pytest.raises(InputError, match="--seed: there 1, here 2"):
        checkpoint.resume(settings_of(*parts, log_dir=str(tmp_path), seed=2), ranks)


def test_the_best_one_may_be_of_any_number_of_ranks_before(tmp_path):
    best = state_of(settings_of(16), 4, DATA, evaluation={"top1": 61.5})
    checkpoint.save(tmp_path / checkpoint.BEST, best, None)
    for ranks, parts in ((4, (8, 2)), (2, (32, 1))):
        assert checkpoint.best_so_far(settings_of(*parts, log_dir=str(tmp_path)), ranks, best) == 61.5
    with pytest.raises(InputError, match=r"checkpoint-best\.pt has a total batch of 64"):
        checkpoint.best_so_far(settings_of(8, log_dir=str(tmp_path)), 4, best)
