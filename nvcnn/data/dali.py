"""Makes uint8 batches of samples with NVIDIA DALI, which decodes on the CPU or the GPU.

https://docs.nvidia.com/deeplearning/dali/ . The resize is bilinear, or bicubic where evaluation asks for it, with the
antialiasing filter of Pillow and torchvision when it makes an image smaller.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nvcnn.data.batch import Batch
from nvcnn.data.dataset import Dataset
from nvcnn.data.epochs import check_position, derived_seed, share
from nvcnn.data.options import EvaluationOptions, ReaderOptions, TrainingOptions
from nvcnn.data.pillow import MAX_PIXELS, REPLACE, undecodable
from nvcnn.data.resize import BatchResizer
from nvcnn.data.scan import first_fault
from nvcnn.data.source import Source
from nvcnn.program import InputError


class Pipeline:
    """Reads a split's samples. Outputs `pixels(dali, encoded image)`, a bit that is 1 with probability `flips`, label.

    order: which sample comes when, as in `Source.reader`. resize_here: PyTorch resizes what `pixels` returns.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        options: ReaderOptions,
        pixels: Callable[[Any, Any], Any],
        *,
        flips: float,
        seed: tuple[int | str, ...],
        order: dict[str, Any],
        checkpoint: bytes | None = None,
        resize_here: bool = False,
        **reader: Any,
    ) -> None:
        try:
            import nvidia.dali as dali
        except ImportError as error:
            raise InputError(
                f"--data_dir needs NVIDIA DALI ({error}): pip install nvcnn[dali]; or --data_backend=torch, which is "
                "slower and needs only Pillow"
            ) from None
        self.dataset = dataset
        self.split = split
        self.source = dataset.source(split)
        self.device = device = options.device
        self.resize = BatchResizer(options.image_size, options.threads) if resize_here else None
        on_gpu = device.type == "cuda"
        self.pipeline = dali.Pipeline(
            batch_size=options.batch_size,
            num_threads=options.threads,
            device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
            seed=derived_seed(*seed, "pipeline"),
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        with self.pipeline:
            encoded, labels = self.source.reader(
                dali,
                order,
                tensor_init_bytes=4096,  # for each image in the shuffle buffer; it grows where it has to
                **reader,
            )
            info = dali.fn.get_property(encoded, key="source_info", device="cpu")
            images = pixels(dali, without_bombs(dali, encoded))
            flip = dali.fn.random.coin_flip(probability=flips, dtype=dali.types.BOOL, seed=derived_seed(*seed, "flip"))
            if on_gpu:
                images, flip = images.gpu(), flip.gpu()
            self.pipeline.set_outputs(images, flip, labels, info)
        with self.naming_the_input():
            self.pipeline.build()

    def run(self) -> Batch:
        """Returns the next batch. Raises InputError for a label outside the classes or an undecodable image."""
        # Bound to this stream, outputs need no synchronisation; DALI reuses a buffer only when its tensor is freed.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with self.naming_the_input():
            images, flip, stored, info = self.pipeline.run(stream)
        labels = torch.empty(len(stored), dtype=torch.int64, pin_memory=stream is not None)
        for i, label in enumerate(self.source.labels(stored)):
            try:
                labels[i] = self.dataset.zero_based(label, "")
            except InputError:
                self.dataset.zero_based(label, self.source.place(bytes(info.at(i)).decode()))
        images = self.resize(images) if self.resize else torch.from_dlpack(images.as_tensor())
        flip = torch.from_dlpack(flip.as_tensor())
        return Batch(images, labels.to(self.device, non_blocking=True), flip)

    @contextmanager
    def naming_the_input(self) -> Iterator[None]:
        """Turns DALI's error about a file or an image into an InputError of one line that names it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if "might come from another pipeline" in text:
                raise InputError(
                    f"--data_dir={self.dataset.directory}: the run to resume read files of another kind, or decoded on "
                    "another device: give its data and --data_backend, or another --log_dir"
                ) from error
            found = re.search(
                r"fn\.(readers|decoders|peek_image_shape).*encountered:\s*(.+?)\s*(\n|$)", text, re.DOTALL
            )
            if found is None or "CUDA" in found[2]:
                raise
            what = " ".join(found[2].split())
            if found[1] == "readers":
                message = unreadable(what, self.source) or (
                    first_fault(self.dataset, self.split, images=False)  # a record without image or label
                    or f"--data_dir={self.dataset.directory}: a file cannot be read ({what}): copy or make it again"
                )
            elif sample := re.search(r"Failed to decode sample #\d+ : (.+)", what):
                message = undecodable(self.source.place(sample[1]), "its data are damaged") + REPLACE
            else:  # DALI names no sample when not even a header can be read; the run is over, so there is time to look
                message = first_fault(self.dataset, self.split, images=True) or (
                    f"--data_dir={self.dataset.directory}: an image of {self.split} cannot be decoded ({what}), "
                    "but Pillow decodes all of them: --data_backend=torch"
                )
            raise InputError(message) from error


def unreadable(what: str, source: Source) -> str | None:
    """Returns what DALI's reader says, with the file and the record that it means in front; None if it names none."""
    reason, again = re.sub(r"^Assert on .*? failed: ", "", what), "copy or make the data set again"
    if record := re.search(r"[^:]*: (.* at index \d+)", reason):
        return f"{source.place(record[1])} cannot be read ({reason}): {again}"
    if (found := re.search(r"failed: (.+)$", reason)) and not os.access(found[1], os.R_OK):
        return f"{found[1]}: cannot be read (deleted, or not readable any more): {again}"
    if found and os.path.getsize(found[1]) == 0:
        return undecodable(found[1], "it has no bytes") + REPLACE
    return None


def without_bombs(dali: Any, encoded: Any) -> Any:
    """Returns the images, but those with too many pixels without bytes: decoding fails before memory runs out."""
    types = dali.types
    shape = dali.fn.peek_image_shape(encoded, dtype=types.INT64)
    fits = shape[0] * shape[1] <= MAX_PIXELS
    size = dali.fn.cast(encoded.shape(dtype=types.INT32)[0:1] * fits, dtype=types.INT32)
    return dali.fn.slice(encoded, types.Constant(0, dtype=types.INT32, shape=[1]), size, axes=[0])


class TrainingData:
    """Endless batches of the split "train": shuffled, randomly cropped, resized. Mirroring is left to the caller.

    An epoch is `steps_per_epoch` = images // (batch_size * ranks) full batches on every rank, in which no image comes
    twice. The few images left over are others in each epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: TrainingOptions,
        state: dict[str, Any] | None = None,
        *,
        decode_on_gpu: bool = False,
    ) -> None:
        """state: what `state_dict()` returned, to go on with the very next batch."""
        self.images = dataset.count("train")
        self.steps_per_epoch = check_position(dataset, options, state, "dali")
        # The reader pads each rank's share to the largest and then to full batches; what is padded is dropped here.
        self.padded_steps = math.ceil(math.ceil(self.images / options.ranks) / options.batch_size)
        self.epoch: int = state["epoch"] if state else 0
        self.batch: int = state["batch"] if state else 0
        on_gpu = options.device.type == "cuda"
        size = (options.image_size, options.image_size)

        def pixels(dali: Any, encoded: Any) -> Any:
            cropped = dali.fn.decoders.image_random_crop(
                encoded,
                random_area=list(options.crop_area),
                random_aspect_ratio=list(options.crop_aspect),
                seed=derived_seed(options.seed, options.rank, "crop"),
                device="mixed" if decode_on_gpu else "cpu",
            )
            # A GPU resizes, whoever decodes: DALI's resize on a CPU takes nearly as long as decoding.
            return dali.fn.resize(cropped.gpu(), size=size) if on_gpu else cropped

        self.pipeline = Pipeline(
            dataset,
            "train",
            options,
            pixels,
            flips=0.5,
            seed=(options.seed, options.rank),
            checkpoint=bytes(state["reader"].tolist()) if state else None,
            resize_here=not on_gpu,
            shard_id=options.rank,
            num_shards=options.ranks,
            pad_last_batch=True,
            # The same seed on all ranks: they share one order.
            order={"shuffle_after_epoch": True, "shuffle_after_epoch_seed": derived_seed(options.seed, "order")},
        )

    def __iter__(self) -> "TrainingData":
        return self

    def __next__(self) -> Batch:
        if self.batch == self.steps_per_epoch:
            for _ in range(self.padded_steps - self.steps_per_epoch):
                self.pipeline.run()
            self.epoch, self.batch = self.epoch + 1, 0
        batch = self.pipeline.run()
        self.batch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, and the reader's own state."""
        reader = torch.frombuffer(bytearray(self.pipeline.pipeline.checkpoint()), dtype=torch.uint8)
        return {"backend": "dali", "images": self.images, "epoch": self.epoch, "batch": self.batch, "reader": reader}

    def close(self) -> None:
        """Ends the threads and frees the buffers; batches handed out stay valid."""
        del self.pipeline


class EvaluationData:
    """Each image of this rank's share of the split "validation" once, in order. The last batch may be short.

    Over all ranks each image comes exactly once. Images are cropped to their middle, as `options` say.
    """

    def __init__(self, dataset: Dataset, options: EvaluationOptions, *, decode_on_gpu: bool = False) -> None:
        images, rank = dataset.count("validation"), options.rank
        self.images = len(share(images, rank, options.ranks))
        self.batch_size = options.batch_size
        shards = min(options.ranks, images)  # DALI refuses more shards than images

        def pixels(dali: Any, encoded: Any) -> Any:
            types = dali.types
            decoded = dali.fn.decoders.image(encoded, device="mixed" if decode_on_gpu else "cpu")
            crop: Any = options.crop
            if options.aspect == "keep":  # another share of height than of width, of each image its own
                sides = decoded.shape(dtype=types.FLOAT)[:2]
                crop = crop * (dali.math.min(sides[0], sides[1]) / sides)
            margin = (1 - crop) / 2
            return dali.fn.resize(
                decoded.gpu() if options.device.type == "cuda" else decoded,
                size=(options.image_size, options.image_size),
                roi_start=margin,
                roi_end=1 - margin,
                roi_relative=True,
                interp_type={"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[options.interpolation],
            )

        self.open = lambda: Pipeline(
            dataset,
            "validation",
            options,
            pixels,
            flips=0.0,
            seed=(0,),
            shard_id=shards * rank // options.ranks,
            num_shards=shards,
            order={"stick_to_shard": True},
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.images == 0:
            return
        pipeline = self.open()
        for start in range(0, self.images, self.batch_size):
            images, labels, flip = pipeline.run()
            rest = self.images - start  # after the last image the reader begins again
            yield Batch(images[:rest], labels[:rest], flip[:rest])
