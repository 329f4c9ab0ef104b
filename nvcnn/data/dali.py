"""Makes uint8 batches of samples with NVIDIA DALI, which decodes on the CPU or the GPU.

https://docs.nvidia.com/deeplearning/dali/ . The resize is bilinear, or bicubic where evaluation asks for it, with the
antialiasing filter of Pillow and torchvision when it makes an image smaller.

Every picture is as Pillow has it. What DALI shows otherwise, or not at all, Pillow decodes: all but JPEG, PNG, WebP and
plain BMP, very long images, and what `headers.shown_alike` finds.
"""

import math
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvcnn.data import pillow
from nvcnn.data.batch import Batch
from nvcnn.data.crops import cropped, middle
from nvcnn.data.dataset import Dataset
from nvcnn.data.epochs import check_position, derived_seed, share
from nvcnn.data.headers import shown_alike
from nvcnn.data.options import EvaluationOptions, ReaderOptions, TrainingOptions
from nvcnn.data.pillow import MAX_PIXELS, REPLACE, undecodable
from nvcnn.data.resize import BatchResizer
from nvcnn.data.scan import first_fault
from nvcnn.data.source import Source
from nvcnn.program import InputError

if TYPE_CHECKING:
    from PIL import Image

DECODED = *_, BMP = [int.from_bytes(start, "little") for start in (b"\xff\xd8", b"\x89P", b"RI", b"BM")]
MAX_SIDE = 16_383  # pixels; for random crops DALI multiplies sides and aspects as 32-bit integers, which overflow
PIXEL = struct.pack("<2s4I2i2H6I4x", b"BM", 58, 0, 54, 40, 1, 1, 1, 24, 0, 4, 0, 0, 0, 0)  # a BMP of one


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
                f"--data_dir needs NVIDIA DALI ({error}): pip install nvidia-dali-cuda130; or --data_backend=torch, "
                "which is slower and needs only Pillow"
            ) from None
        self.dataset = dataset
        self.split = split
        self.source = dataset.source(split)
        self.device = device = options.device
        self.threads = options.threads
        self.resize = BatchResizer(options.threads) if resize_here else None
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
            decodable, fits = as_far_as_dali_goes(dali, encoded)
            images = pixels(dali, decodable)
            flip = dali.fn.random.coin_flip(probability=flips, dtype=dali.types.BOOL, seed=derived_seed(*seed, "flip"))
            if on_gpu:
                images, flip = images.gpu(), flip.gpu()
            self.pipeline.set_outputs(images, flip, labels, info, encoded, fits)
        with self.naming_the_input():
            self.pipeline.build()

    def run(self, show: Callable[["Image.Image", int], Tensor], image_size: int) -> Batch:
        """Returns the next batch. Raises InputError for a label outside the classes or an undecodable image.

        show: returns what the batch shows of an image that Pillow has decoded, the i-th. image_size: what PyTorch
        resizes to, where it does.
        """
        # Bound to this stream, outputs need no synchronisation; DALI reuses a buffer only when its tensor is freed.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with self.naming_the_input():
            images, flip, stored, info, encoded, fits = self.pipeline.run(stream)
        labels = torch.empty(len(stored), dtype=torch.int64, pin_memory=stream is not None)
        for i, label in enumerate(self.source.labels(stored)):
            try:
                labels[i] = self.dataset.zero_based(label, "")
            except InputError:
                self.dataset.zero_based(label, self.source.place(bytes(info.at(i)).decode()))
        images = self.resize(images, image_size) if self.resize else torch.from_dlpack(images.as_tensor())
        flip = torch.from_dlpack(flip.as_tensor())

        fits = fits.as_array().reshape(-1).tolist()
        if left := [i for i, fit in enumerate(fits) if not (fit and shown_alike(memoryview(encoded[i]).cast("B")))]:
            pillow.require_pillow()

            def decode(i: int) -> Tensor:
                try:
                    return show(pillow.decode(bytes(memoryview(encoded[i]))), i)
                except ValueError as error:
                    name = self.source.place(bytes(info.at(i)).decode())
                    raise InputError(undecodable(name, str(error)) + REPLACE) from None

            with ThreadPoolExecutor(self.threads) as pool:
                for i, image in zip(left, pool.map(decode, left), strict=True):
                    images[i] = image.to(self.device)
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
                    f"--data_dir={self.dataset.directory}: the run to resume read files of another kind, decoded on "
                    "another device, or with another version of nvcnn or DALI: give what it had, or another --log_dir"
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
                message = refused(self.source, self.source.place(sample[1]))
            else:  # DALI names no sample when not even a header can be read; the run is over, so there is time to look
                message = first_fault(self.dataset, self.split, images=True) or (
                    f"--data_dir={self.dataset.directory}: an image of {self.split} cannot be decoded ({what}), "
                    "but Pillow decodes all of them: --data_backend=torch"
                )
            raise InputError(message) from error


def refused(source: Source, place: str) -> str:
    """Returns why an image cannot be decoded, in Pillow's words, so that they are the same whatever decodes."""
    pillow.require_pillow()
    try:
        pillow.decode(source.read(source.number(place))[0])
    except InputError as error:
        return str(error)
    except ValueError as error:
        return undecodable(place, str(error)) + REPLACE
    return f"{undecodable(place, 'by DALI')}: give --data_backend=torch, since Pillow can"


def unreadable(what: str, source: Source) -> str | None:
    """Returns what DALI's reader says, with the file and the record that it means in front; None if it names none."""
    reason, again = re.sub(r"^Assert on .*? failed: ", "", what), "copy or make the data set again"
    if record := re.search(r"[^:]*: (.* at index \d+)", reason):
        return f"{source.place(record[1])} cannot be read ({reason}): {again}"
    if (found := re.search(r"failed: (.+)$", reason)) and not os.access(found[1], os.R_OK):
        return f"{source.place(found[1])}: cannot be read (deleted, or not readable any more): {again}"
    if found and os.path.getsize(found[1]) == 0:
        return undecodable(source.place(found[1]), "it has no bytes") + REPLACE
    return None


def as_far_as_dali_goes(dali: Any, encoded: Any) -> tuple[Any, Any]:
    """Returns the images, a pixel in place of each that DALI is not to decode, and whether it is to."""
    fn, types = dali.fn, dali.types
    pixel = types.Constant(list(PIXEL), dtype=types.UINT8, shape=[len(PIXEL)])

    def where(condition: Any, images: Any) -> Any:  # what `if` becomes in a pipeline_def; it copies nothing
        (kept, _), (_, other) = (fn._conditional.split(x, predicate=condition, _if_stmt=True) for x in (images, pixel))
        return fn._conditional.merge(kept, other, predicate=condition)

    start = fn.reinterpret(fn.slice(encoded, 0, 32, axes=[0], out_of_bounds_policy="pad"), dtype=types.UINT16)
    magic, bits, compression = start[0], start[14], start[15]
    known = fn.lookup_table(magic, keys=DECODED, values=[1] * len(DECODED), dtype=types.BOOL)
    known = known & ((magic != BMP) | ((bits != 16) & (compression == 0)))
    images = where(known, encoded)
    shape = fn.peek_image_shape(images, dtype=types.INT64)
    fits = known & (shape[0] * shape[1] <= MAX_PIXELS) & (dali.math.max(shape[0], shape[1]) <= MAX_SIDE)
    return where(fits, images), fits


def dali_resizes(device: torch.device) -> bool:
    """Returns whether DALI resizes training's crops. A GPU does, whoever decodes; on a CPU that takes it nearly as long
    as decoding.
    """
    return device.type == "cuda"


class TrainingData:
    """Endless batches of the split "train": shuffled, randomly cropped, resized. Mirroring is left to the caller.

    An epoch is `batches_per_epoch` = images // (batch_size * ranks) full batches on every rank, in which no image comes
    twice; with `accumulate` the largest multiple of it. The few images left over are others in each epoch.

    A reader that begins with a later epoch than the run's first, for another number of ranks, has an order of its own.
    """

    def __init__(
        self,
        dataset: Dataset,
        options: TrainingOptions,
        state: dict[str, Any] | None = None,
        *,
        decode_on_gpu: bool = False,
    ) -> None:
        """state: what `state_dict()` returned, to go on with the very next batch.

        Without "reader", DALI's part, a reader of DALI begins: `state` is the begin of an epoch.
        """
        self.images, self.options = dataset.count("train"), options
        self.batches_per_epoch = check_position(dataset, options, state, "dali")
        # The reader pads each rank's share to the largest and then to full batches; what is padded is dropped here.
        self.padded_batches = padded_batches = math.ceil(math.ceil(self.images / options.ranks) / options.batch_size)
        self.epoch: int = state["epoch"] if state else 0
        self.batch: int = state["batch"] if state else 0
        self.first: int = state.get("first", 0) if state else 0  # the epoch with which DALI's reader began
        first = self.first
        later = (first,) if first else ()  # a part of its seeds
        resized = dali_resizes(options.device)

        def size_of_batch(number: int) -> Any:  # DALI asks ahead, and goes on counting where a checkpoint was
            size = options.size_in(first + number // padded_batches)
            return torch.full((options.batch_size, 2), size, dtype=torch.float32).numpy()

        def pixels(dali: Any, encoded: Any) -> Any:
            cropped = dali.fn.decoders.image_random_crop(
                encoded,
                random_area=list(options.crop_area),
                random_aspect_ratio=list(options.crop_aspect),
                seed=derived_seed(options.seed, options.rank, *later, "crop"),
                device="mixed" if decode_on_gpu else "cpu",
            )
            if not resized:
                return cropped
            size: Any = (options.image_size, options.image_size)
            if options.later_sizes:
                size = dali.fn.external_source(size_of_batch, batch=True, dtype=dali.types.FLOAT, ndim=1)
            return dali.fn.resize(cropped.gpu() if options.device.type == "cuda" else cropped, size=size)

        self.pipeline = Pipeline(
            dataset,
            "train",
            options,
            pixels,
            flips=0.5,
            seed=(options.seed, options.rank, *later),
            checkpoint=bytes(state["reader"].tolist()) if state and "reader" in state else None,
            resize_here=not resized,
            shard_id=options.rank,
            num_shards=options.ranks,
            pad_last_batch=True,
            # The same seed on all ranks: they share one order.
            order={
                "shuffle_after_epoch": True,
                "shuffle_after_epoch_seed": derived_seed(options.seed, *later, "order"),
            },
        )

    def __iter__(self) -> "TrainingData":
        return self

    def __next__(self) -> Batch:
        if self.batch == self.batches_per_epoch:
            for _ in range(self.padded_batches - self.batches_per_epoch):
                self.run()
            self.epoch, self.batch = self.epoch + 1, 0
        batch = self.run()
        self.batch += 1
        return batch

    def run(self) -> Batch:
        return self.pipeline.run(self.show, self.options.size_in(self.epoch))

    def show(self, image: "Image.Image", i: int) -> Tensor:
        options = self.options
        seed = derived_seed(options.seed, options.rank, "crop", self.epoch, self.batch, i)
        return cropped(image, options, self.epoch, random.Random(seed))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, and the reader's own state."""
        reader = torch.frombuffer(bytearray(self.pipeline.pipeline.checkpoint()), dtype=torch.uint8)
        position = {"epoch": self.epoch, "batch": self.batch, "first": self.first}
        return {"backend": "dali", "images": self.images, "reader": reader} | position

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
        self.batch_size, self.options = options.batch_size, options
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
            images, labels, flip = pipeline.run(lambda image, _: middle(image, self.options), self.options.image_size)
            rest = self.images - start  # after the last image the reader begins again
            yield Batch(images[:rest], labels[:rest], flip[:rest])
