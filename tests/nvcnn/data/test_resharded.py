"""Another number of ranks goes on with the same images in each step, in the middle of an epoch and at its end."""

import pytest
import torch

from nvcnn.data.batch import Batch
from nvcnn.data.resharded import reshard
from tests.nvcnn.data.reading import find, joined, same, training
from tests.nvcnn.data.test_source import orders
from tests.samples import WRITERS

Ranks = tuple[int, int, int]  # and the images of a batch, and the batches of a step
TOTAL = 12  # images of a step, of which an epoch has five


class Readers:
    """Those of all ranks."""

    def __init__(self, dataset, backend: str, ranks: Ranks, states: list | None = None, **options):
        self.of, shares = ranks, dict(zip(("ranks", "batch_size", "accumulate"), ranks, strict=True))
        states = states or [None] * ranks[0]
        make = options | shares
        self.readers = [training(dataset, backend, rank=r, state=state, **make) for r, state in enumerate(states)]

    def step(self) -> Batch:
        return joined([next(reader) for _ in range(self.of[2]) for reader in self.readers])

    def states(self, ranks: Ranks) -> list:
        """Returns those with which so many ranks go on."""
        states = [reader.state_dict() for reader in self.readers]
        return states if ranks == self.of else [reshard(states, self.of[:2], ranks[:2], TOTAL)] * ranks[0]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


@orders
def test_a_step_has_the_images_that_it_would_have_had(sources, device, monkeypatch, tmp_path, kind, backend):
    """To the end of the epoch, crop for crop, whoever goes on: twice as many, one, three, and the same three again."""
    monkeypatch.setattr("nvcnn.data.dali.dali_resizes", lambda _: kind == "tars")  # as on a GPU, of images ahead
    make = {"device": device, "later_sizes": ((1, 24),)}
    whole = Readers(sources[kind], backend, (2, 3, 2), **make)
    expected = [whole.step() for _ in range(5)]
    now = Readers(sources[kind], backend, (2, 3, 2), **make)
    for batch, ranks in zip(expected, [(4, 3, 1), (1, 6, 2), (3, 4, 1), (3, 4, 1), (2, 3, 2)], strict=True):
        assert same(now.step(), batch)
        torch.save(now.states(ranks), tmp_path / "states.pt")
        now.close()
        now = Readers(sources[kind], backend, ranks, torch.load(tmp_path / "states.pt", weights_only=True), **make)
    for reader in (whole, now):
        reader.close()


@pytest.mark.parametrize(("kind", "steps"), [("folders", 4), ("records", 4), ("records", 5)])
def test_the_epoch_behind_has_no_image_twice(sources, device, kind, steps):
    """Its order, DALI's own, is the same if the run goes on from there twice."""
    after: Ranks = (2, 2, 3)
    backend = "dali_cpu"
    make = {"device": device, "later_sizes": ((1, 24),)}
    before, anew = (Readers(sources[kind], backend, ranks, **make) for ranks in ((4, 3, 1), after))
    for _ in range(steps):
        before.step()
    now = Readers(sources[kind], backend, after, before.states(after), **make)
    for _ in range(5 - steps):
        assert same(now.step(), before.step())
    states, batches = [now.states(after)], []
    for _ in range(5):
        batches.append(now.step())
        states.append(now.states(after))
    labels = joined(batches).labels.tolist()
    assert len(set(labels)) == 60
    assert labels[:12] != anew.step().labels.tolist()
    assert batches[0].images.shape[1] == 24
    for at in (0, 2):
        again = Readers(sources[kind], backend, after, states[at], **make)
        assert same(again.step(), batches[at])
        again.close()
    for reader in (before, anew, now):
        reader.close()


def test_links_to_names_that_are_no_utf_8_are_those_of_all_readers(tmp_path, device):
    """A source makes them once: a second reader of DALI does not take the first one's away."""
    WRITERS["folders"](tmp_path, "train", images=4, label=lambda i: 0, name="cats/\udcff{0}")
    data = find(tmp_path)
    readers = [training(data, ranks=2, rank=rank, batch_size=2, device=device) for rank in range(2)]
    assert [len(next(reader).labels) for reader in readers] == [2, 2]
    for reader in readers:
        reader.close()
