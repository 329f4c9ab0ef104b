"""Some things are DALI's alone: its buffers, what a GPU shows, an error that names no sample."""

import itertools

import pytest
import torch

from nvcnn.data.tfrecord import encode_example
from nvcnn.program import InputError
from tests.nvcnn.data.reading import evaluation, find, same, training
from tests.samples import WRITERS, picture, record, write_shard, write_split

pytest.importorskip("nvidia.dali")


def test_batches_stay_valid(dataset, device):
    """DALI must not reuse memory that a tensor still shows, nor take it away when the reader is closed."""
    data = training(dataset, device=device)
    batches = [next(data) for _ in range(20)]
    copies = [tuple(t.clone() for t in batch) for batch in batches]
    for _ in range(20):
        next(data)
    data.close()
    assert all(same(batch, copy) for batch, copy in zip(batches, copies, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["dali_cpu", "dali_gpu"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("aspect", ["stretch", "keep"])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_a_gpu_shows_what_a_cpu_shows(tmp_path, crop, aspect, interpolation, backend):
    """They differ by a level at most, by rounding: both decode PNG on the CPU, each resizes for itself."""
    sizes = [(28, 28), (40, 30), (30, 40), (9, 7)]
    write_split(tmp_path, "validation", images=8, shards=1, encoded=lambda i: picture(i, size=sizes[i % 4]))
    dataset = find(tmp_path, "validation")
    how = {"crop": crop, "aspect": aspect, "interpolation": interpolation, "image_size": 20}
    cpu, gpu = evaluation(dataset, **how), evaluation(dataset, backend, device=torch.device("cuda"), **how)
    for a, b in zip(cpu, gpu, strict=True):
        assert torch.equal(a.labels, b.labels.cpu())
        assert (a.images.int() - b.images.cpu().int()).abs().max() <= 1


@pytest.mark.parametrize("stored", [[], [1, 2], [1.0], None])
def test_a_record_without_one_label_is_told(tmp_path, stored):
    """DALI returns memory as it was for an empty list, and a number of no dimensions for none in the whole batch."""
    features = {"image/encoded": [picture(0)]} | ({} if stored is None else {"image/class/label": stored})
    write_shard(tmp_path / "train-0", [record(picture(0), 1), *[encode_example(features)] * 3])
    wrong = r"its label '1, 2' is not a number" if stored == [1, 2] else "it has no number as its label"
    for batch_size in (1, 4):
        with pytest.raises(InputError, match=rf"train-0: the record at byte \d+: {wrong}: make the file again"):
            list(itertools.islice(training(find(tmp_path), batch_size=batch_size), 4))


def test_a_position_of_another_pipeline(dataset):
    """Operators go by name, and another version has others."""
    state = training(dataset).state_dict()
    other = bytes(state["reader"].tolist()).replace(b"CoinFlip", b"CoinToss")
    with pytest.raises(InputError, match="or with another version of nvcnn or DALI: give what it had"):
        training(dataset, state=state | {"reader": torch.frombuffer(bytearray(other), dtype=torch.uint8)})


@pytest.mark.parametrize("kind", WRITERS)
def test_a_sample_is_found_by_its_place(sources, kind):
    """So DALI's error, which names only that, gets Pillow's reason."""
    source = sources[kind].source("train").without({7, 30})
    assert [source.number(source.name(i)) for i in range(len(source))] == [*range(len(source))]


def test_a_png_that_is_cut(tmp_path, device):
    """The other kinds of bad input are in test_bad_data.py, on a CPU."""
    write_split(tmp_path, "train", encoded=lambda i: picture(i)[:60] if i == 30 else picture(i))
    with pytest.raises(InputError, match=rf"{tmp_path}/train-00001.*: the record at byte \d+: the image .*truncated"):
        list(itertools.islice(training(find(tmp_path), device=device), 20))
