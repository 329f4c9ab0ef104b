"""What a run shows and writes: the original's table, a progress bar, metrics.jsonl, TensorBoard, a curve. Rank 0 only.

A log never decides how a run ends: one that cannot be written is said, and half a line is passed over.

metrics.jsonl: one JSON object a line, `event` is "start", "train", "tensors", "checkpoint", "eval", "diverged" or
"end". A resumed run appends; `nvcnn.plot.read` says which lines hold. "tensors" (with --log_tensors) has by a
parameter's name what the optimizer found in that step: trust_ratio, and the norms of the gradient (averaged, unscaled,
decayed) and of the weight before its update. A value that is not finite is null.
"""

import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from nvcnn.optimizer.larc import Larc
from nvcnn.plot import draw_curve, picture_grid

BURN_IN = 20  # steps left out of the closing throughput, as in the original
POINTS = 1.0  # seconds between points of TensorBoard's curves at least: table lines may come a hundred times as fast


class Throughput:
    """Images per second of all ranks, over spans of steps that end at each lap."""

    def __init__(self, images_per_step: int, first_step: int = 0):
        self.images_per_step = images_per_step
        self.step = self.first_step = first_step
        self.burnt_in = first_step + BURN_IN
        self.early: list[tuple[int, float]] = []  # steps, images per second; in burn-in
        self.spans: list[tuple[int, float]] = []  # the same, after it
        self.mark = time.perf_counter()

    def lap(self, step: int) -> float:
        """Ends a span after step number `step`; returns its images per second."""
        now = time.perf_counter()
        steps = step - self.step
        speed = steps * self.images_per_step / (now - self.mark)
        if self.step >= self.burnt_in:
            self.spans.append((steps, speed))
        else:
            self.early.append((steps, speed))
        self.step, self.mark, self.speed = step, now, speed
        return speed

    def known_to_take(self, steps: int) -> float:
        """Returns the seconds of so many steps at the speed of the latest span; 0 while that had the start in it."""
        if self.step <= self.first_step + 1:
            return 0.0
        return steps * self.images_per_step / self.speed

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leaves what happens inside (saving a checkpoint, say) out of the present span."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def summary(self) -> tuple[float, float | None, float | None] | None:
        """Returns mean, standard error, and jitter (1.4826 x median absolute deviation) of the spans after burn-in.

        Of one span there is but the mean, and of none None.
        """
        if not self.spans:
            return None
        steps, speeds = zip(*self.spans, strict=True)
        middle = median(speeds)
        if len(speeds) == 1:
            return middle, None, None
        error = stdev(speeds) / math.sqrt(len(speeds))
        return fmean(speeds, steps), error, 1.4826 * median(abs(s - middle) for s in speeds)

    def in_words(self) -> str:
        """Returns the closing line. A run that is too short for the summary has the speed of what steps it did."""
        summary = self.summary()
        if summary and len(self.spans) > 1:
            return "Images/sec: {:.1f} +/- {:.1f} (jitter = {:.1f})".format(*summary)
        later = self.spans or self.early[1:]  # the first span has the start in it
        if not (later or self.early):
            return "Images/sec: not known, no table line was reached"
        steps, speeds = zip(*(later or self.early), strict=True)
        what = f"the last {sum(steps)} step(s)" if later else f"{sum(steps)} step(s), with the start"
        return f"Images/sec: {fmean(speeds, steps):.1f} (of {what})"


class Timer:
    """An interval that starts when it is made, and anew each time it is found to be over."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, time.monotonic()

    def over(self) -> bool:
        """Returns whether the interval has passed; the next one starts then."""
        if time.monotonic() - self.start <= self.seconds:
            return False
        self.start = time.monotonic()
        return True


@contextmanager
def optional(log: Path, said: set[Path]) -> Iterator[None]:
    """Says of a log that it cannot be written, unless that was `said`, and goes on."""
    try:
        yield
    except Exception as error:  # TensorBoard and matplotlib can fail in any way
        if log not in said:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            line = f"{log} cannot be written ({reason}); going on without"
            if isinstance(error, ModuleNotFoundError):
                line = f"{error.name} is not installed, so no {log.name}: pip install {error.name}"
            print(line, file=sys.stderr)
        said.add(log)


class Metrics:
    """Opens `log_dir` ("" for none) for a run of `steps` steps. Does nothing on ranks other than 0."""

    def __init__(self, log_dir: str, *, steps: int, first_step: int, rank: int):
        self.log_dir = Path(log_dir) if log_dir and rank == 0 else None
        self.quiet = rank != 0
        self.steps, self.until_point = steps, Timer(POINTS)
        self.file = self.board = self.bar = None
        if self.log_dir:
            self.events, self.tensorboard = self.log_dir / "metrics.jsonl", self.log_dir / "events.out.tfevents"
            self.said: set[Path] = set()  # logs that could not be written
            with optional(self.events, self.said):
                self.file = open_to_append(self.events)
            with optional(self.tensorboard, self.said):
                self.board = tensorboard_writer(self.log_dir, first_step)
        if rank == 0 and sys.stderr.isatty():
            self.bar = progress_bar(steps, first_step)

    def say(self, line: str) -> None:
        if self.quiet:
            return
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def write(self, event: str, **values: Any) -> None:
        if self.file:
            with optional(self.events, self.said):
                append(self.file, event, **values)

    def table_head(self) -> None:
        self.say("  Step Epoch Img/sec   Loss   LR")

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def train(self, step: int, epoch: int, **shown: float) -> None:
        """A table line, a line of metrics.jsonl, and a point of TensorBoard's curves; images of all ranks."""
        self.say("{:6d} {:5d} {images_per_second:7.1f} {loss:7.3f} {learning_rate:7.5f}".format(step, epoch, **shown))
        if shown["skipped"]:
            scale = f"at loss scale {shown['loss_scale']:g}"
            self.say(f"  {shown['skipped']} step(s) skipped: gradients not finite {scale}")
        self.write("train", step=step, epoch=epoch, **shown)
        if step in (1, self.steps) or self.until_point.over():
            self.summarize(step, {f"train/{name}": value for name, value in shown.items()})

    def evaluation(self, step: int, epoch: int, *words: str, **result: Any) -> None:
        """The same of an evaluation during training; the curve is drawn anew."""
        average = result.get("ema", False)
        self.say(f"{step:6d} {epoch:5d} Validation {', '.join(words)}" + ", of the averages" * average)
        self.write("eval", step=step, epoch=epoch, **result)
        self.summarize(step, {f"eval{'_ema' * average}/{name}": result[name] for name in ("top1", "top5")})
        self.draw_curve()

    def input(self, pictures: Tensor, names: Sequence[str]) -> None:
        """`input.png`, and the same in TensorBoard: pictures, (N, H, W, 3) uint8, with a name under each."""
        if not self.log_dir:
            return
        path = self.log_dir / "input.png"
        with optional(path, self.said):
            picture = picture_grid(pictures, names)
            path.write_bytes(picture)
            if self.board:
                with optional(self.tensorboard, self.said):
                    self.board.add_image("input", picture, 0)

    def summarize(self, step: int, scalars: Mapping[str, float]) -> None:
        if self.board:
            with optional(self.tensorboard, self.said):
                self.board.add_scalars(scalars, step)

    def draw_curve(self) -> None:
        if self.log_dir:
            with optional(self.log_dir / "curve.png", self.said):
                draw_curve(self.log_dir)

    def end(self, step: int, throughput: Throughput) -> None:
        """The closing throughput line, the end event, the curve."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        summary = throughput.summary()
        self.say("-" * 64)
        self.say(throughput.in_words())
        self.say("-" * 64)
        speeds = dict(zip(("images_per_second", "uncertainty", "jitter"), summary or (None,) * 3, strict=True))
        self.write("end", step=step, **speeds)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file:
            with optional(self.events, self.said):  # a network file system may say only now that it is full
                self.file.close()
        if self.board:
            with optional(self.tensorboard, self.said):
                self.board.close()
        self.draw_curve()


def add_evaluation(log_dir: Path, result: dict[str, Any]) -> None:
    """Appends a result to metrics.jsonl, and redraws the curve."""
    path = log_dir / "metrics.jsonl"
    with optional(path, set()), open_to_append(path) as file:
        append(file, "eval", **result)
    with optional(log_dir / "curve.png", set()):
        draw_curve(log_dir)


class TensorLog:
    """Copies trust ratio and norms of each tensor to the host, where they are written later: no step waits for them.

    On a GPU the copy goes to pinned memory, and an event tells when it is there.
    """

    def __init__(self, larc: Larc):
        on_gpu = larc.ratio.is_cuda
        self.sources = {"trust_ratio": larc.ratio, "gradient_norm": larc.gradient_norm, "weight_norm": larc.weight_norm}
        self.names = [slot.name for slot in larc.arena.slots]
        self.host = torch.empty((len(self.sources), len(self.names)), pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.step: int | None = None

    def copy(self, step: int) -> None:
        """Starts copying the values of the latest step, whose number is `step`."""
        self.host.copy_(torch.stack(list(self.sources.values())), non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.step = step

    def write(self, metrics: Metrics, *, summarize: bool = False) -> None:
        """Writes what was copied last, once; with `summarize` to TensorBoard as well."""
        if self.step is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        rows = zip(self.sources, self.host.tolist(), strict=True)
        values = {kind: dict(zip(self.names, row, strict=True)) for kind, row in rows}
        metrics.write("tensors", step=self.step, **values)
        if summarize:
            flat = {f"{kind}/{name}": value for kind, row in values.items() for name, value in row.items()}
            metrics.summarize(self.step, flat)
        self.step = None


def null_unless_finite(value: Any) -> Any:
    """Returns the value with None for NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {k: null_unless_finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_to_append(path: Path) -> FileIO:
    return path.open("a+b", buffering=0)


def append(file: FileIO, event: str, **values: Any) -> None:
    """Writes an event in one piece, since evaluation appends while a run does, behind a whole line or half a one."""
    line = json.dumps({"event": event, "time": time.time()} | null_unless_finite(values)).encode() + b"\n"
    if end := file.seek(0, os.SEEK_END):
        file.seek(end - 1)
        line = b"\n" * (file.read(1) != b"\n") + line
    while line:  # the rest of what a full disk takes in part is an error that says so
        line = line[file.write(line) :]


def progress_bar(steps: int, first_step: int):
    try:
        from tqdm import tqdm
    except ImportError:
        print("tqdm is not installed, so no progress bar: pip install tqdm", file=sys.stderr)
        return None
    return tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)


class EventFile:
    """A file for TensorBoard, whose own writer has a thread, which on a full disk prints a traceback.

    TensorBoard then shows nothing of later steps that an earlier file has: they are of a run that was killed.
    """

    def __init__(self, log_dir: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.file = (log_dir / name).open("ab")
        self.records = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        self.write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, **content: Any) -> None:
        self.records.write(self.event(wall_time=time.time(), **content).SerializeToString())
        self.file.flush()

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.write(step=step, summary=self.summary(value=values))

    def add_image(self, name: str, png: bytes, step: int) -> None:
        width, height = struct.unpack(">II", png[16:24])
        image = self.summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self.write(step=step, summary=self.summary(value=[self.summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        self.file.close()


def tensorboard_writer(log_dir: Path, first_step: int) -> EventFile | None:
    try:
        return EventFile(log_dir, first_step)
    except ImportError:
        print("TensorBoard is not installed, so no event files: pip install tensorboard", file=sys.stderr)
        return None
