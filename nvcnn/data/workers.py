"""Records to uint8 batches by Pillow, in worker processes of torch.utils.data.DataLoader.

For machines without a build of DALI. Same samples, crops of the same distribution, epochs of the same rule. What a
sample looks like in an epoch depends on the seed, the epoch and its number alone, so batches are the same for any
number of workers, and a resumed run's are those of an undisturbed one.
"""

import atexit
import random
import signal
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nvcnn.data import pillow
from nvcnn.data.batch import Batch
from nvcnn.data.dataset import Dataset
from nvcnn.data.pillow import REPLACE, undecodable
from nvcnn.data.position import check_position, derived_seed, share
from nvcnn.data.resize import resize
from nvcnn.program import InputError

Key = tuple[int, int]  # epoch, sample
QUEUED = 2  # batches a worker has ready


def ignore_signals(_: int) -> None:
    """A signal to stop reaches the whole group; the workers go on until the rank has saved and ends them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Samples:
    """What a worker does: the batch of a list of keys, or the message of the InputError that a sample of it raises."""

    def __init__(self, dataset: Dataset, split: str, image_size: int, **how: Any):
        self.dataset, self.source, self.image_size = dataset, dataset.source(split), image_size
        self.how = how  # seed, crop_area, crop_aspect of training, or crop of evaluation

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, epoch: int, i: int) -> tuple[Tensor, int, bool]:
        data, label = self.source.read(i)
        number = self.dataset.zero_based(label, self.source.name(i))
        try:
            image = pillow.decode(data)
        except ValueError as error:
            raise InputError(undecodable(self.source.name(i), str(error)) + REPLACE) from None
        if "crop" in self.how:
            return pillow.middle(image, self.image_size, self.how["crop"]), number, False
        generator = random.Random(derived_seed(self.how["seed"], "crop", epoch, i))
        box = pillow.random_crop(*image.size, self.how["crop_area"], self.how["crop_aspect"], generator)
        out = torch.empty(self.image_size, self.image_size, 3, dtype=torch.uint8)
        resize(pillow.pixels(image.crop(box)), out)
        return out, number, generator.random() < 0.5

    def __getitems__(self, keys: list[Key]) -> Batch | str:
        pillow.require_pillow()
        try:
            images, labels, flips = zip(*(self.sample(*key) for key in keys), strict=True)
        except InputError as error:
            return str(error)
        return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(flips))


def loaded(samples: Samples, keys: Any, workers: int, device: torch.device) -> Generator[Batch]:
    """The batches of lists of keys, in that order, on `device`. Raises InputError for the first that has none."""
    loader: DataLoader = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=workers,
        multiprocessing_context="fork",  # to share the table of samples; from Python 3.14 on not the default
        collate_fn=lambda batch: batch,
        persistent_workers=True,
        prefetch_factor=QUEUED,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


class Loader:
    """`loaded`, whose workers end when this is closed, dropped, or the program ends.

    At its end a program would ask them to end by a signal that they ignore, and wait for them.
    """

    def __init__(self, *what: Any):
        self.batches = loaded(*what)
        atexit.register(self.batches.close)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self.batches)

    def close(self) -> None:
        atexit.unregister(self.batches.close)
        self.batches.close()

    __del__ = close


class Order:
    """For ever the lists of keys of this rank's batches, from a position on.

    Batch b of all ranks together is the same piece of the epoch's permutation for any number of ranks.
    """

    def __init__(self, images: int, steps: int, batch_size: int, rank: int, ranks: int, seed: int, start: Key):
        self.images, self.steps, self.batch_size, self.rank, self.ranks = images, steps, batch_size, rank, ranks
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, batch = self.start
        while True:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            order = torch.randperm(self.images, generator=generator)
            for b in range(batch, self.steps):
                first = (b * self.ranks + self.rank) * self.batch_size
                yield [(epoch, i) for i in order[first : first + self.batch_size].tolist()]
            epoch, batch = epoch + 1, 0


class WorkerTrainingData:
    """TrainingData's interface and contract."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        image_size: int,
        crop_area: tuple[float, float],
        crop_aspect: tuple[float, float],
        seed: int,
        rank: int,
        ranks: int,
        device: torch.device,
        threads: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        pillow.require_pillow()
        self.images = dataset.images("train")
        self.steps_per_epoch = check_position(dataset, batch_size, ranks, state, "torch")
        self.epoch: int = state["epoch"] if state else 0
        self.batch: int = state["batch"] if state else 0
        order = Order(self.images, self.steps_per_epoch, batch_size, rank, ranks, seed, (self.epoch, self.batch))
        samples = Samples(dataset, "train", image_size, seed=seed, crop_area=crop_area, crop_aspect=crop_aspect)
        self.loader = Loader(samples, order, threads, device)

    def __iter__(self) -> "WorkerTrainingData":
        return self

    def __next__(self) -> Batch:
        if self.batch == self.steps_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
        batch = next(self.loader)
        self.batch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"backend": "torch", "images": self.images, "epoch": self.epoch, "batch": self.batch}

    def close(self) -> None:
        """Ends the workers."""
        self.loader.close()


class WorkerEvaluationData:
    """EvaluationData's interface and contract."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        image_size: int,
        crop: float,
        rank: int,
        ranks: int,
        device: torch.device,
        threads: int,
    ) -> None:
        pillow.require_pillow()
        mine = share(dataset.images("validation"), rank, ranks)
        self.images = len(mine)
        samples = Samples(dataset, "validation", image_size, crop=crop)
        batches = [[(0, i) for i in mine[at : at + batch_size]] for at in range(0, len(mine), batch_size)]
        self.open = lambda: Loader(samples, batches, threads, device)

    def __iter__(self) -> Iterator[Batch]:
        return self.open() if self.images else iter(())
