"""Every kind of files and every backend keep one contract: epochs, shares, resuming, evaluation, labels."""

import io
import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nvcnn.data.backend import choose_backend, open_training
from nvcnn.data.batch import Batch
from nvcnn.program import InputError
from tests.nvcnn.data.reading import (
    ALONE,
    BACKENDS,
    CPU,
    TRAINING,
    WHOLE,
    epoch,
    evaluation,
    find,
    joined,
    same,
    training,
)
from tests.samples import IMAGES, WRITERS, picture

everywhere = pytest.mark.parametrize(("kind", "backend"), list(itertools.product(WRITERS, BACKENDS)))
# DALI has a reader for each kind of files, and the order of samples is the reader's. Pillow's is the same for all.
orders = pytest.mark.parametrize(("kind", "backend"), [*((kind, "dali_cpu") for kind in WRITERS), ("records", "torch")])


@everywhere
def test_labels_belong_to_their_images(sources, device, kind, backend):
    """Batches are what the network wants. The whole image at its own size is unchanged."""
    data = training(sources[kind], backend, image_size=28, device=device, **WHOLE)
    assert (data.images, data.batches_per_epoch) == (IMAGES, 15)
    seen = []
    for batch in epoch(data):
        images, labels, flip = batch
        assert images.shape == (4, 28, 28, 3)
        assert images.is_contiguous()
        assert labels.shape == flip.shape == (4,)
        assert (images.dtype, labels.dtype, flip.dtype) == (torch.uint8, torch.int64, torch.bool)
        assert {tensor.device.type for tensor in batch} == {device.type}
        for image, label in zip(images.cpu(), labels.tolist(), strict=True):
            assert np.array_equal(image, Image.open(io.BytesIO(picture(label))).convert("RGB"))
            seen.append(label)
    assert len(set(seen)) == 60
    data.close()


@orders
@pytest.mark.parametrize(("ranks", "batch_size", "accumulate"), [(1, 7, 1), (2, 4, 2), (3, 20, 1), (5, 4, 1)])
def test_an_epoch_has_no_image_twice(sources, device, kind, backend, ranks, batch_size, accumulate):
    make = {"ranks": ranks, "batch_size": batch_size, "accumulate": accumulate, "device": device}
    data = [training(sources[kind], backend, rank=rank, **make) for rank in range(ranks)]
    steps = IMAGES // (batch_size * ranks * accumulate) * accumulate
    assert {d.batches_per_epoch for d in data} == {steps}
    seen, left_out = set(), set()
    for _ in range(3):
        labels = [label for _ in range(steps) for d in data for label in next(d).labels.tolist()]
        assert len(labels) == len(set(labels)) == steps * batch_size * ranks
        seen.add(tuple(labels))
        left_out.add(frozenset(range(IMAGES)) - frozenset(labels))
    assert len(seen) == 3
    assert len(left_out) > 1 or left_out == {frozenset()}  # nothing is left out for good
    for d in data:
        d.close()


@orders
def test_a_ranks_share_changes_with_each_epoch(tmp_path, device, kind, backend):
    WRITERS[kind](tmp_path, "train", images=60)
    data = training(find(tmp_path), backend, ranks=2, batch_size=5, device=device)
    shares = {frozenset(joined(epoch(data)).labels.tolist()) for _ in range(6)}
    data.close()
    assert len(shares) > 2  # not just the halves in turn


@orders
def test_ranks_and_seeds_differ_in_order_crops_and_flips(sources, device, kind, backend):
    def one_epoch(**changes) -> Batch:
        return joined(epoch(training(sources[kind], backend, crop_area=(0.3, 0.9), device=device, **changes)))

    one, again, seed, rank = one_epoch(), one_epoch(), one_epoch(seed=2), one_epoch(rank=1, ranks=2)
    assert same(one, again)
    for other in (seed, rank):
        assert not torch.equal(one.labels[: len(other.labels)], other.labels)
        assert not torch.equal(one.flip[: len(other.flip)], other.flip)
    data = training(sources[kind], backend, crop_area=(0.3, 0.9), device=device)
    assert same(one, joined(epoch(data)))
    crops = [dict(zip(batch.labels.tolist(), batch.images, strict=True)) for batch in (one, seed, joined(epoch(data)))]
    for other in crops[1:]:  # another seed's, and the next epoch's
        assert not any(torch.equal(crops[0][label], other[label]) for label in crops[0].keys() & other.keys())


@orders
def test_resuming_goes_on_bit_for_bit(sources, device, tmp_path, kind, backend):
    """It resumes from a small state of plain types, around the end of an epoch, where readers shuffle anew."""
    make = {"rank": 1, "ranks": 2, "batch_size": 7, "device": device}
    data = training(sources[kind], backend, threads=2, **make)
    assert data.batches_per_epoch == 4
    states, batches = [data.state_dict()], []
    for _ in range(12):
        batches.append(next(data))
        states.append(data.state_dict())
    assert sum(batch.flip.sum().item() for batch in batches) > 0
    assert [(state["epoch"], state["batch"]) for state in states[3:7]] == [(0, 3), (0, 4), (1, 1), (1, 2)]
    for at in (0, 3, 4, 5, 7, 8):
        torch.save(states[at], tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert state.get("reader", torch.empty(0)).numel() < 2048
        resumed = training(sources[kind], backend, state=state, **make)
        for expected in batches[at : at + 4]:
            assert same(next(resumed), expected), at
        resumed.close()
    data.close()


@pytest.mark.parametrize(("backend", "by_dali"), [("dali_cpu", False), ("dali_cpu", True), ("torch", False)])
def test_the_size_of_images_changes_with_epochs(dataset, device, monkeypatch, backend, by_dali):
    """And nothing else does: an epoch is that of a reader of its size alone, also after resuming, and once more."""
    if by_dali:  # as on a GPU, where it resizes batches ahead
        monkeypatch.setattr("nvcnn.data.dali.dali_resizes", lambda device: True)
    sizes, make = (16, 24, 12), {"rank": 1, "ranks": 2, "batch_size": 7, "device": device}
    alone = [training(dataset, backend, image_size=size, **make) for size in sizes]
    expected = [[epoch(data) for _ in sizes][n] for n, data in enumerate(alone)]
    changing = make | {"image_size": 16, "later_sizes": ((1, 24), (2, 12))}
    data = training(dataset, backend, **changing)
    states = []
    for batch in itertools.chain(*expected):
        states.append(data.state_dict())
        assert same(next(data), batch)
    assert [batches[0].images.shape for batches in expected] == [(7, size, size, 3) for size in sizes]
    for at in (3, 4, 9):
        for batch in list(itertools.chain(*expected))[at : at + 2]:
            resumed = training(dataset, backend, state=states[at], **changing)
            assert same(next(resumed), batch)
            states[at] = resumed.state_dict()
            resumed.close()
    for reader in (data, *alone):
        reader.close()


@orders
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 7), (3, 7), (2, 100), (70, 7)])
def test_evaluation_sees_each_image_once(sources, device, kind, backend, ranks, batch_size):
    """They come in order, and a second time the same. Of 70 ranks the first has no image, the others here have one."""
    for rank in range(ranks) if ranks < 4 else (0, 1, 69):
        source = evaluation(sources[kind], backend, rank=rank, ranks=ranks, batch_size=batch_size, device=device)
        batches = list(source)
        expected = list(range(IMAGES * rank // ranks, IMAGES * (rank + 1) // ranks))
        assert [label for batch in batches for label in batch.labels.tolist()] == expected
        assert source.images == len(expected)
        for images, labels, flip in batches:
            assert 0 < len(images) == len(labels) == len(flip) <= batch_size
            assert not flip.any()
        assert all(same(a, b) for a, b in zip(batches, source, strict=True))


def test_pillows_batches_are_the_same_on_any_number_of_ranks_and_workers(dataset):
    """Those of all ranks make up one total batch, image for image, crop for crop."""
    whole = training(dataset, "torch", batch_size=12)
    expected = [next(whole) for _ in range(7)]
    for ranks, threads in ((2, 1), (3, 2)):
        make = {"batch_size": 12 // ranks, "ranks": ranks, "threads": threads}
        parts = [training(dataset, "torch", rank=rank, **make) for rank in range(ranks)]
        for batch in expected:
            assert same(joined([next(part) for part in parts]), batch)


# What training on these files is refused for, and the choice of a backend


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 62), (4, 16)])
def test_fewer_images_than_a_total_batch(dataset, ranks, batch_size):
    with pytest.raises(InputError, match=rf"61 training images .* total batch of {ranks * batch_size} .*--batch_size"):
        training(dataset, ranks=ranks, batch_size=batch_size)


def test_resuming_on_other_data(dataset, tmp_path):
    state = training(dataset, "torch").state_dict()
    WRITERS["folders"](tmp_path, "train", images=60)
    with pytest.raises(InputError, match=f"--data_dir={tmp_path}: 60 training images, but the run to resume had 61"):
        training(find(tmp_path), "torch", state=state)
    with pytest.raises(InputError, match="had synthetic ones"):
        training(dataset, "torch", state={})
    with pytest.raises(InputError, match=r"--data_backend: the run to resume .* by torch, this one by dali"):
        training(dataset, "dali_cpu", state=state)
    state = training(dataset).state_dict()
    WRITERS["folders"](tmp_path, "train")
    with pytest.raises(InputError, match=f"--data_dir={tmp_path}: the run to resume read files of another kind"):
        training(find(tmp_path), state=state)


def test_the_backend_is_dalis_and_never_pillow_unasked(monkeypatch):
    pytest.importorskip("nvidia.dali")
    assert choose_backend(None, CPU) == "dali_cpu"
    assert choose_backend(None, torch.device("cuda")) == "dali_gpu"
    assert choose_backend("dali_cpu", torch.device("cuda")) == "dali_cpu"
    with pytest.raises(InputError, match="--data_backend=dali_gpu: there is no GPU here"):
        choose_backend("dali_gpu", CPU)
    monkeypatch.setattr("nvcnn.data.backend.find_spec", lambda name: None)
    assert choose_backend("torch", CPU) == "torch"
    for asked in (None, "dali_cpu"):
        with pytest.raises(
            InputError, match=r"needs NVIDIA DALI.*pip install nvidia-dali-cuda130.*--data_backend=torch"
        ):
            choose_backend(asked, CPU)


@pytest.mark.parametrize(
    ("module", "backend", "said"),
    [
        ("nvidia.dali", "dali_cpu", r"--data_dir needs .* pip install nvidia-dali-cuda130.*--data_backend=torch"),
        ("PIL.Image", "torch", r"pip install pillow"),
    ],
)
def test_without_the_library_that_decodes(dataset, monkeypatch, module, backend, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=said):
        open_training(dataset, backend, **ALONE | TRAINING)


def test_only_records_need_google_crc32c(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    for kind in ("tars", "folders"):
        data = training(sources[kind], "torch")
        next(data)
        data.close()
    with pytest.raises(InputError, match=r"google-crc32c: pip install google-crc32c pillow"):
        find(sources["records"].directory)
