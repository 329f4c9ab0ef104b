"""Makes uint8 batches of samples with Pillow, in the worker processes of torch.utils.data.DataLoader.

This is for machines without a build of DALI: the same samples, crops of the same distribution, epochs by the same rule.
What a sample looks like in an epoch depends only on the seed, the epoch and its number. So batches are the same for any
number of workers, and those of a resumed run are those of an undisturbed one.
"""

import atexit
import gc
import os
import random
import signal
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from nvcnn.data import pillow
from nvcnn.data.batch import Batch
from nvcnn.data.crops import cropped, middle
from nvcnn.data.dataset import Dataset
from nvcnn.data.epochs import check_position, derived_seed, share
from nvcnn.data.options import EvaluationOptions, ReaderOptions, TrainingOptions
from nvcnn.data.pillow import REPLACE, undecodable
from nvcnn.data.processes import cannot_start, end_with
from nvcnn.program import STOPS, InputError

Key = tuple[int, int]  # epoch, sample
QUEUED = 2  # batches a worker has ready
LARGER = "docker run --shm-size=8g"


def begin_worker(parent: int, _: int) -> None:
    """Lets a worker go on after a signal to stop, which reaches the whole group: the rank saves and then ends it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)


class Samples:
    """What a worker does: it makes the batch of a list of keys, or the message why a sample of it cannot be used."""

    def __init__(self, dataset: Dataset, split: str, options: ReaderOptions):
        pillow.require_pillow()
        self.dataset, self.source, self.options = dataset, dataset.source(split), options

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, epoch: int, i: int) -> tuple[Tensor, int, bool]:
        """Returns image, label and whether to mirror the image."""
        data, label = self.source.read(i)
        number, options = self.dataset.zero_based(label, self.source.name(i)), self.options
        try:
            image = pillow.decode(data)
        except ValueError as error:
            raise InputError(undecodable(self.source.name(i), str(error)) + REPLACE) from None
        if isinstance(options, EvaluationOptions):
            return middle(image, options), number, False
        assert isinstance(options, TrainingOptions)
        generator = random.Random(derived_seed(options.seed, "crop", epoch, i))
        return cropped(image, options, epoch, generator), number, generator.random() < 0.5

    def __getitems__(self, keys: list[Key]) -> Batch | str:
        pillow.require_pillow()  # a worker of its own
        try:
            images, labels, flips = zip(*(self.sample(*key) for key in keys), strict=True)
        except InputError as error:
            return str(error)
        try:  # in shared memory already: what fails when the batch is on its way, in a thread, is lost without a word
            small = (torch.tensor(values).share_memory_() for values in (labels, flips))
            return Batch(default_collate(list(images)), *small)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rpartition(": ")[2]
            workers = self.options.threads
            size = len(keys) * images[0].numel() * (QUEUED + 1) * workers / 1e6
            return (
                f"/dev/shm: has no room ({reason}) for the batches of {workers} workers, up to {size:.0f} MB of each "
                f"rank: make it larger ({LARGER}), lower --batch_size, or leave out --data_backend=torch"
            )


def loaded(
    samples: Samples, keys: Iterable[list[Key]], workers: list[BaseProcess], generator: torch.Generator | None
) -> Generator[Batch]:
    """Yields the batches of lists of keys, in that order, and appends the processes that make them to `workers`.

    generator: draws a seed for the workers, which have no use for it; None: the default one. Raises InputError for the
    first that cannot be made.
    """
    device = samples.options.device
    loader: DataLoader = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=keys,
        num_workers=samples.options.threads,
        generator=generator,
        multiprocessing_context="fork",  # to share the table of samples; from Python 3.14 on not the default
        collate_fn=lambda batch: batch,
        persistent_workers=True,
        prefetch_factor=QUEUED,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(begin_worker, os.getpid()),
    )
    gc.collect()  # a worker that collected a DALI pipeline would wait for threads that it does not have
    others, handler = active_children(), signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    except OSError as error:
        raise cannot_start(error) from None
    if current_thread() is main_thread():
        # The loader's own would raise in the midst of anything; at the next batch it finds a dead worker anyway.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    workers += [child for child in active_children() if child not in others]
    try:
        for batch in batches:
            if isinstance(batch, str):
                raise InputError(batch)
            yield Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
    except (RuntimeError, OSError, EOFError) as error:
        connection.wait([worker.sentinel for worker in workers], timeout=1)
        if killed := [-(worker.exitcode or 0) for worker in workers if (worker.exitcode or 0) < 0]:
            raise InputError(was_killed(killed[0], len(workers))) from error
        raise


def was_killed(number: int, workers: int) -> str:
    """Returns the message about a worker, one of so many, that a signal ended."""
    why, remedy = "", ""
    if number == signal.SIGKILL:
        why = ", most likely for lack of memory"
        remedy = f", with more memory or fewer cores: a rank has a worker for each of its own, here {workers}"
    elif number == signal.SIGBUS:
        why, remedy = ", most likely since /dev/shm is full", f", with a larger one ({LARGER})"
    return f"--data_backend=torch: {signal.Signals(number).name} ended a worker{why}: give the command again{remedy}"


def end(batches: Generator[Batch], workers: list[BaseProcess]) -> None:
    """Ends the workers, also those that wait for something that does not come."""
    batches.close()
    for worker in workers:
        worker.kill()


class Loader:
    """Iterates over `loaded`, whose workers end when this is closed or dropped, or when the program ends.

    Otherwise the program would end them by a signal that they ignore, and wait for them.
    """

    def __init__(self, samples: Samples, keys: Iterable[list[Key]], generator: torch.Generator | None = None):
        workers: list[BaseProcess] = []
        self.batches = loaded(samples, keys, workers, generator)
        self.end = partial(end, self.batches, workers)
        atexit.register(self.end)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self.batches)

    def close(self) -> None:
        atexit.unregister(self.end)
        self.end()

    __del__ = close


class Order:
    """Yields without end the lists of keys of this rank's batches, from a position on.

    Batch b of all ranks together is the same piece of the epoch's permutation for any number of ranks.
    """

    def __init__(self, images: int, steps: int, options: TrainingOptions, start: Key):
        self.images, self.steps, self.options, self.start = images, steps, options, start

    def __iter__(self) -> Iterator[list[Key]]:
        (epoch, batch), options = self.start, self.options
        while True:
            generator = torch.Generator().manual_seed(derived_seed(options.seed, "order", epoch))
            order = torch.randperm(self.images, generator=generator)
            for b in range(batch, self.steps):
                first = (b * options.ranks + options.rank) * options.batch_size
                yield [(epoch, i) for i in order[first : first + options.batch_size].tolist()]
            epoch, batch = epoch + 1, 0


class WorkerTrainingData:
    """Has the interface and keeps the contract of `dali.TrainingData`."""

    def __init__(self, dataset: Dataset, options: TrainingOptions, state: dict[str, Any] | None = None) -> None:
        samples = Samples(dataset, "train", options)
        self.images = len(samples)
        self.batches_per_epoch = check_position(dataset, options, state, "torch")
        self.epoch: int = state["epoch"] if state else 0
        self.batch: int = state["batch"] if state else 0
        order = Order(self.images, self.batches_per_epoch, options, (self.epoch, self.batch))
        # A run that begins draws from the generator of dropout, whose state is behind that draw when the run goes on.
        self.loader = Loader(samples, order, torch.Generator() if state else None)

    def __iter__(self) -> "WorkerTrainingData":
        return self

    def __next__(self) -> Batch:
        if self.batch == self.batches_per_epoch:
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
    """Has the interface and keeps the contract of `dali.EvaluationData`."""

    def __init__(self, dataset: Dataset, options: EvaluationOptions) -> None:
        samples, size = Samples(dataset, "validation", options), options.batch_size
        mine = share(len(samples), options.rank, options.ranks)
        self.images = len(mine)
        batches = [[(0, i) for i in mine[at : at + size]] for at in range(0, len(mine), size)]
        self.open = lambda: Loader(samples, batches, torch.Generator())

    def __iter__(self) -> Iterator[Batch]:
        return self.open() if self.images else iter(())
