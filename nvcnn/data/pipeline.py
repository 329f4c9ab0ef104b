"""Records to uint8 batches on the training device, by NVIDIA DALI on the CPU or the GPU.

https://docs.nvidia.com/deeplearning/dali/ . The resize is bilinear, with the antialiasing filter of Pillow and
torchvision when it makes an image smaller.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nvcnn.data.batch import Batch
from nvcnn.data.dataset import IMAGE, LABEL, Dataset
from nvcnn.data.tfrecord import index_path
from nvcnn.errors import InputError

SHUFFLE_BUFFER = 4096  # images; shards are shuffled when they are made, this mixes them anew in each epoch


def derived_seed(*parts: int | str) -> int:
    """A 31-bit seed for one purpose; other parts give an unrelated one."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


class Pipeline:
    """TFRecord reader -> `pixels(dali, encoded image)`, label, a bit that is 1 with probability `flips`."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        pixels: Callable[[Any, Any], Any],
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        flips: float,
        seed: tuple[int | str, ...],
        checkpoint: bytes | None = None,
        **reader: Any,
    ) -> None:
        try:
            import nvidia.dali as dali
            import nvidia.dali.tfrecord as tf
        except ImportError as error:
            raise InputError(
                f"--data_dir needs NVIDIA DALI ({error}): pip install nvcnn[dali], or leave --data_dir out "
                "to train on synthetic data"
            ) from None
        self.dataset = dataset
        self.split = split
        self.device = device
        on_gpu = device.type == "cuda"
        shards = dataset.shards(split)
        self.pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None,
            seed=derived_seed(*seed, "pipeline"),
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        with self.pipeline:
            record = dali.fn.readers.tfrecord(
                path=list(map(str, shards)),
                index_path=[str(index_path(shard)) for shard in shards],
                features={
                    IMAGE: tf.FixedLenFeature([], tf.string, ""),
                    LABEL: tf.FixedLenFeature([1], tf.int64, -1),
                },
                tensor_init_bytes=4096,  # of each image in the shuffle buffer; it grows where it has to
                **reader,
            )
            images, labels = pixels(dali, record[IMAGE]), record[LABEL]
            flip = dali.fn.random.coin_flip(probability=flips, dtype=dali.types.BOOL, seed=derived_seed(*seed, "flip"))
            if on_gpu:
                self.pipeline.set_outputs(images, labels.gpu(), flip.gpu(), labels)
            else:
                self.pipeline.set_outputs(images, labels, flip, labels)
        with self.naming_the_input():
            self.pipeline.build()

    def run(self) -> Batch:
        """The next batch. Raises InputError for a label outside the classes, RuntimeError for an unreadable image."""
        # Bound to this stream, outputs need no synchronisation; DALI reuses a buffer only when its tensor is freed.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        with self.naming_the_input():
            outputs = self.pipeline.run(stream)
        on_cpu = outputs[3].as_array()
        for label in (on_cpu.min(), on_cpu.max()):
            self.dataset.zero_based(int(label))
        images, labels, flip = (torch.from_dlpack(output.as_tensor()) for output in outputs[:3])
        return Batch(images, labels.view(-1) - self.dataset.label_base, flip)

    @contextmanager
    def naming_the_input(self) -> Iterator[None]:
        """Turns DALI's error about a file or an image into an InputError of one line."""
        try:
            yield
        except RuntimeError as error:
            found = re.search(r"dali\.fn\.(readers|decoders)\..*encountered:\s*(.+?)\s*(\n|$)", str(error), re.DOTALL)
            if found is None or "CUDA" in found[2]:
                raise
            what = {"readers": "a file cannot be read", "decoders": "an image cannot be decoded"}[found[1]]
            raise InputError(
                f"--data_dir={self.dataset.directory}: {what} in {self.split}-* ({found[2]}): "
                "copy or make the data set again"
            ) from error


def reader_device(device: torch.device) -> dict[str, str]:
    """Where images are decoded: 'mixed' takes the bytes from the CPU and leaves the pixels on the GPU."""
    return {"device": "mixed" if device.type == "cuda" else "cpu"}


class TrainingData:
    """Batches of the split "train", for ever: shuffled, randomly cropped, resized; the mirroring is left to the caller.

    An epoch is `steps_per_epoch` = images // (batch_size * ranks) full batches on every rank, in which no image comes
    twice; the few left over differ from epoch to epoch.
    """

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
        """`state`: of `state_dict()`, to go on with the very next batch.

        crop_area, crop_aspect: ranges of the crop's share of the image's area and of its width / height.
        """
        self.images = dataset.images("train")
        total = batch_size * ranks
        self.steps_per_epoch = self.images // total
        if self.steps_per_epoch == 0:
            raise InputError(
                f"--data_dir={dataset.directory}: {self.images} training images are fewer than one total batch of "
                f"{total} ({ranks} ranks x --batch_size={batch_size}): lower --batch_size"
            )
        if state is not None and state.get("images") != self.images:
            raise InputError(
                f"--data_dir={dataset.directory}: {self.images} training images, but the run to resume had "
                f"{state.get('images', 'synthetic ones')}: give its data, or another --log_dir"
            )
        # The reader pads each rank's share to the largest and then to full batches; what is padded is dropped here.
        share = -(-self.images // ranks)
        self.padded_steps = -(-share // batch_size)
        self.epoch: int = state["epoch"] if state else 0
        self.batch: int = state["batch"] if state else 0

        def pixels(dali: Any, encoded: Any) -> Any:
            cropped = dali.fn.decoders.image_random_crop(
                encoded,
                random_area=list(crop_area),
                random_aspect_ratio=list(crop_aspect),
                seed=derived_seed(seed, rank, "crop"),
                **reader_device(device),
            )
            return dali.fn.resize(cropped, size=(image_size, image_size))

        self.pipeline = Pipeline(
            dataset,
            "train",
            pixels,
            batch_size=batch_size,
            device=device,
            threads=threads,
            flips=0.5,
            seed=(seed, rank),
            checkpoint=bytes(state["reader"].tolist()) if state else None,
            shard_id=rank,
            num_shards=ranks,
            pad_last_batch=True,
            random_shuffle=True,
            initial_fill=SHUFFLE_BUFFER,
            shuffle_after_epoch=True,
            shuffle_after_epoch_seed=derived_seed(seed, "order"),  # the same on all ranks: they share one order
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
        """The position after the last batch handed out, the `batch`-th of epoch `epoch`, and the reader's own state."""
        reader = torch.frombuffer(bytearray(self.pipeline.pipeline.checkpoint()), dtype=torch.uint8)
        return {"images": self.images, "epoch": self.epoch, "batch": self.batch, "reader": reader}

    def close(self) -> None:
        """Ends the threads and frees the buffers; batches handed out stay valid."""
        del self.pipeline


class EvaluationData:
    """Each image of this rank's share of the split "validation" once, in order; the last batch may be short.

    Over all ranks each image comes exactly once. Images are cropped to the middle `crop` of height and width.
    """

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
        images = dataset.images("validation")
        self.images = images * (rank + 1) // ranks - images * rank // ranks
        self.batch_size = batch_size
        shards = min(ranks, images)  # DALI refuses more shards than images
        margin = (1 - crop) / 2

        def pixels(dali: Any, encoded: Any) -> Any:
            return dali.fn.resize(
                dali.fn.decoders.image(encoded, **reader_device(device)),
                size=(image_size, image_size),
                roi_start=(margin, margin),
                roi_end=(1 - margin, 1 - margin),
                roi_relative=True,
            )

        self.open = lambda: Pipeline(
            dataset,
            "validation",
            pixels,
            batch_size=batch_size,
            device=device,
            threads=threads,
            flips=0.0,
            seed=(0,),
            shard_id=shards * rank // ranks,
            num_shards=shards,
            stick_to_shard=True,
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.images == 0:
            return
        pipeline = self.open()
        for start in range(0, self.images, self.batch_size):
            images, labels, flip = pipeline.run()
            rest = self.images - start  # what follows the last image is the first ones again
            yield Batch(images[:rest], labels[:rest], flip[:rest])
