"""DALI over our records: what an epoch holds, what resumes, what a crop shows, and how bad input surfaces."""

import builtins
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from nvcnn.data.backend import open_evaluation, open_training
from nvcnn.data.dali import EvaluationData, TrainingData
from nvcnn.data.dataset import find_dataset
from nvcnn.data.tfrecord import decode_example, read_records
from nvcnn.program import InputError

RANKS = (1, 2, 3, 5)
CPU = torch.device("cpu")


def training(dataset, device, **changes) -> TrainingData:
    values = {"batch_size": 4, "image_size": 16, "crop_area": (0.3, 1.0), "crop_aspect": (0.8, 1.25), "seed": 1}
    values |= {"rank": 0, "ranks": 1, "device": device, "threads": 1} | changes
    return open_training(dataset, "dali_cpu", **values)


def evaluation(dataset, device, **changes) -> EvaluationData:
    values = {"batch_size": 7, "image_size": 28, "crop": 1.0, "rank": 0, "ranks": 1, "device": device, "threads": 1}
    return open_evaluation(dataset, "dali_cpu", **values | changes)


def pictures(dataset, split) -> list[Image.Image]:
    """The images of a split, decoded by Pillow, in order of label."""
    records = (decode_example(r) for shard in dataset.source(split).shards for r in read_records(shard))
    by_label = {r["image/class/label"][0]: r["image/encoded"][0] for r in records}
    return [Image.open(io.BytesIO(by_label[label])).convert("RGB") for label in sorted(by_label)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_is_what_the_network_wants(dataset, device):
    data = training(dataset, device, batch_size=7)
    images, labels, flip = next(data)
    assert images.shape == (7, 16, 16, 3)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert labels.shape == flip.shape == (7,)
    assert (labels.dtype, flip.dtype) == (torch.int64, torch.bool)
    assert {t.device.type for t in (images, labels, flip)} == {device.type}
    assert (data.images, data.steps_per_epoch) == (61, 8)


def test_the_whole_image_at_its_own_size_is_unchanged(dataset, device):
    """Also: labels belong to their images."""
    expected = pictures(dataset, "train")
    data = training(dataset, device, image_size=28, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    for images, labels, _ in itertools.islice(data, data.steps_per_epoch):
        for image, label in zip(images, labels, strict=True):
            assert np.array_equal(image.cpu().numpy(), np.asarray(expected[label]))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_has_no_image_twice(dataset, device, ranks, batch_size):
    data = [training(dataset, device, rank=rank, ranks=ranks, batch_size=batch_size) for rank in range(ranks)]
    steps = 61 // (batch_size * ranks)
    assert {d.steps_per_epoch for d in data} == {steps}
    orders, left_out = set(), set()
    for _ in range(4):
        seen = [label for _ in range(steps) for d in data for label in next(d).labels.tolist()]
        assert len(seen) == len(set(seen)) == steps * batch_size * ranks
        orders.add(tuple(seen))
        left_out.add(frozenset(range(61)) - frozenset(seen))
    assert len(orders) == 4
    assert len(left_out) > 1 or left_out == {frozenset()}  # nothing is left out for good


def test_a_ranks_share_changes_with_the_order_of_the_files(tmp_path, write, device):
    write(tmp_path, "train", images=60)
    found = find_dataset(tmp_path, num_classes=60, label_base=None, split="train")
    data = training(found, device, ranks=2, batch_size=5)
    epochs = ((next(data).labels for _ in range(6)) for _ in range(6))
    assert len({frozenset(torch.cat(list(labels)).tolist()) for labels in epochs}) > 2  # not just the halves in turn


def test_ranks_and_seeds_differ_in_order_crops_and_flips(dataset, device):
    def epoch(**changes):
        data = training(dataset, device, **changes)
        batches = list(itertools.islice(data, data.steps_per_epoch))
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    images, labels, flip = epoch()
    assert same(epoch(), (images, labels, flip))
    for other in (epoch(seed=2), epoch(rank=1, ranks=2)):
        n = len(other[1])
        assert not torch.equal(labels[:n], other[1])
        assert not torch.equal(flip[:n], other[2])
    crops = [
        {int(label): image for image, label in zip(*epoch(seed=seed, crop_area=(0.3, 0.9))[:2], strict=True)}
        for seed in (1, 2)
    ]
    assert not any(torch.equal(crops[0][label], crops[1][label]) for label in crops[0].keys() & crops[1].keys())


@pytest.mark.parametrize(("rank", "ranks", "batch_size"), [(0, 1, 4), (1, 2, 7), (4, 5, 3)])
def test_resuming_at_any_batch_goes_on_bit_for_bit(dataset, device, rank, ranks, batch_size):
    make = {"rank": rank, "ranks": ranks, "batch_size": batch_size}
    data = training(dataset, device, **make)
    states, batches = [data.state_dict()], []
    for _ in range(3 * data.steps_per_epoch + 3):
        batches.append(next(data))
        states.append(data.state_dict())
    assert sum(batch.flip.sum().item() for batch in batches) > 0
    for i, state in enumerate(states[:-1]):
        resumed = training(dataset, device, state=state, **make)
        for expected in batches[i : i + data.steps_per_epoch + 1]:
            assert same(next(resumed), expected), i
        resumed.close()


def test_the_state_is_small_and_of_plain_types(dataset, device, tmp_path):
    data = training(dataset, device, batch_size=20)
    for _ in range(4):
        next(data)
    state = data.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 1)
    assert state["reader"].numel() < 1024
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(next(training(dataset, device, batch_size=20, state=loaded)), next(data))


def test_batches_stay_valid(dataset, device):
    """DALI must not reuse memory that a tensor still shows, nor take it away when the reader is closed."""
    data = training(dataset, device)
    batches = [next(data) for _ in range(20)]
    copies = [tuple(t.clone() for t in batch) for batch in batches]
    for _ in range(20):
        next(data)
    data.close()
    assert all(same(batch, copy) for batch, copy in zip(batches, copies, strict=True))


def test_crops_have_the_area_and_aspect_asked_for(tmp_path, write, device):
    """A picture whose red is x and green is y shows the crop's edges: bilinear resizing keeps a ramp a ramp."""
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(200)[:, None]
    data = io.BytesIO()
    Image.fromarray(ramp).save(data, "PNG")
    write(tmp_path, "train", encoded=lambda i: data.getvalue())
    found = find_dataset(tmp_path, num_classes=None, label_base=None, split="train")
    source = training(found, device, image_size=20, crop_area=(0.2, 0.6), crop_aspect=(0.5, 2.0))
    images = torch.cat([batch.images for batch in itertools.islice(source, 60)]).double().cpu()
    width = (images[:, 10, 18, 0] - images[:, 10, 1, 0]) * 20 / 17
    height = (images[:, 18, 10, 1] - images[:, 1, 10, 1]) * 20 / 17
    area, aspect = width * height / 200**2, width / height
    slack = 1.05  # grey values are integers
    assert 0.2 / slack <= area.min() < 0.25
    assert 0.55 < area.max() <= 0.6 * slack
    assert 0.5 / slack <= aspect.min() < 0.6
    assert 1.7 < aspect.max() <= 2.0 * slack
    left, top = images[:, 10, 1, 0], images[:, 1, 10, 1]
    assert min(left.std(), top.std()) > 10  # they are everywhere


@pytest.mark.parametrize(("ranks", "batch_size"), [*((ranks, 7) for ranks in RANKS), (1, 61), (2, 100), (70, 7)])
def test_evaluation_sees_each_image_once(dataset, device, ranks, batch_size):
    sources = [evaluation(dataset, device, rank=rank, ranks=ranks, batch_size=batch_size) for rank in range(ranks)]
    batches = [batch for source in sources for batch in source]
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == list(range(61))
    assert sum(source.images for source in sources) == 61
    for images, labels, flip in batches:
        assert len(images) == len(labels) == len(flip) > 0
        assert not flip.any()
    assert all(same(a, b) for a, b in zip(batches, (b for s in sources for b in s), strict=True))  # and so again


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("crop", "image_size"), [(1.0, 28), (0.875, 28), (0.875, 13), (0.5, 32)])
@pytest.mark.parametrize(("mode", "size"), [("L", (28, 28)), ("RGB", (60, 45))])
def test_evaluation_shows_the_middle(tmp_path, write, encode, kind, crop, image_size, mode, size):
    """Against Pillow's resize of that box, in floating point; beyond the edge, its pixels go on."""
    write(tmp_path, "validation", images=9, encoded=lambda i: encode(i, kind, mode, size))
    found = find_dataset(tmp_path, num_classes=9, label_base=None, split="validation")
    (batch,) = evaluation(found, CPU, crop=crop, image_size=image_size, batch_size=9)
    (w, h), margin, edge = size, (1 - crop) / 2, 10
    box = (margin * w + edge, margin * h + edge, (1 - margin) * w + edge, (1 - margin) * h + edge)
    for image, label in zip(batch.images, batch.labels, strict=True):
        source = np.asarray(pictures(found, "validation")[label], np.float32)
        padded = np.pad(source, ((edge, edge), (edge, edge), (0, 0)), "edge")
        for channel in range(3):
            plane = Image.fromarray(padded[..., channel])
            exact = plane.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
            error = np.abs(image[..., channel].double().numpy() - np.asarray(exact)).max()
            assert error <= (0.5001 if kind == "PNG" else 2.5001)  # rounding; JPEG decoders may differ by a level


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_a_gpu_shows_what_a_cpu_shows(dataset, crop):
    """Within a level, by rounding: both decode PNG on the CPU, each resizes for itself."""
    cpu, gpu = (list(evaluation(dataset, torch.device(device), crop=crop, image_size=20)) for device in ("cpu", "cuda"))
    for a, b in zip(cpu, gpu, strict=True):
        assert torch.equal(a.labels, b.labels.cpu())
        assert (a.images.int() - b.images.cpu().int()).abs().max() <= 1


def test_a_label_outside_the_classes(tmp_path, write, device):
    write(tmp_path, "train", label=lambda i: 9 if i == 30 else 1)
    found = find_dataset(tmp_path, num_classes=8, label_base=None, split="train")
    with pytest.raises(
        InputError, match=rf"{tmp_path}/train-00001.*: the record at byte \d+: label 9 is outside 1 \.\. 8"
    ):
        list(itertools.islice(training(found, device), 15))


def test_a_missing_label(tmp_path, write, device):
    write(tmp_path, "validation", label=lambda i: -1 if i == 30 else 1)
    found = find_dataset(tmp_path, num_classes=8, label_base=None, split="validation")
    with pytest.raises(InputError, match="label -1 is outside"):
        list(evaluation(found, device))


@pytest.mark.parametrize(("bytes_", "why"), [(b"", "no bytes"), (b"no image", "is not a JPEG"), (None, "truncated")])
def test_an_image_that_cannot_be_decoded(tmp_path, write, encode, device, bytes_, why):
    broken = encode(30)[:60] if bytes_ is None else bytes_
    write(tmp_path, "train", encoded=lambda i: broken if i == 30 else encode(i))
    found = find_dataset(tmp_path, num_classes=None, label_base=None, split="train")
    with pytest.raises(InputError, match=rf"{tmp_path}/train-00001.*: the record at byte \d+: the image .*{why}"):
        list(itertools.islice(training(found, device), 20))


def test_a_record_that_cannot_be_read(tmp_path, write, device):
    shard = write(tmp_path, "train")[1]
    data = bytearray(shard.read_bytes())
    offset = int(shard.with_name(shard.name + ".idx").read_text().splitlines()[5].split()[0])
    data[offset + 12 : offset + 40] = b"\xff" * 28
    shard.write_bytes(data)
    found = find_dataset(tmp_path, num_classes=None, label_base=None, split="train")
    with pytest.raises(InputError, match=rf"{tmp_path}/train-00001.*: the record at byte {offset} cannot be read"):
        list(itertools.islice(training(found, device), 20))


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 62), (4, 16)])
def test_fewer_images_than_a_total_batch(dataset, device, ranks, batch_size):
    with pytest.raises(InputError, match=rf"61 training images .* total batch of {ranks * batch_size} .*--batch_size"):
        training(dataset, device, ranks=ranks, batch_size=batch_size)


def test_resuming_on_other_data(dataset, tmp_path, write, device):
    state = training(dataset, device).state_dict()
    write(tmp_path, "train", images=60)
    other = find_dataset(tmp_path, num_classes=None, label_base=None, split="train")
    with pytest.raises(InputError, match=f"--data_dir={tmp_path}: 60 training images, but the run to resume had 61"):
        training(other, device, state=state)
    with pytest.raises(InputError, match="had synthetic ones"):
        training(other, device, state={})


def test_without_dali(dataset, device, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"--data_dir needs .* pip install nvcnn\[dali\].*--data_backend=torch"):
        training(dataset, device)
