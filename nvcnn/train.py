"""The training run, from settings to exit code: opens everything, and has the loop around `Step`."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nvcnn import checkpoint
from nvcnn.check_data import check_data
from nvcnn.data import (
    SyntheticData,
    TrainingData,
    WorkerTrainingData,
    choose_backend,
    find_dataset,
    open_training,
)
from nvcnn.data.dataset import Dataset
from nvcnn.distributed import Transport, Vote, connect
from nvcnn.evaluate import evaluate
from nvcnn.kernel_choices import choose, places, use
from nvcnn.machine import chosen_kernels, use_device
from nvcnn.metrics import Metrics, Throughput
from nvcnn.models import MODELS, build_model
from nvcnn.optimizer.schedule import poly
from nvcnn.plan import describe, dry_run, plan
from nvcnn.program import SAVED_AND_STOPPED, launched
from nvcnn.resume import restore, write_config
from nvcnn.settings import Settings, as_json
from nvcnn.step import Step
from nvcnn.tensor_log import TensorLog


def train(settings: Settings) -> int:
    """Trains, or resumes, or finds that there is nothing left to do. Returns the exit code.

    Raises InputError for bad usage or input before anything is written.
    """
    if settings.eval:
        return evaluate(settings.evaluation())
    dataset = None
    if settings.data_dir is not None:
        dataset = find_dataset(
            settings.data_dir,
            num_classes=settings.num_classes,
            label_base=settings.label_base,
            split="train",
            lenient=settings.skip_bad_images,
        )
    expected = plan(settings, dataset, launched().size)
    if settings.dry_run:
        if launched().rank == 0:
            dry_run(settings, expected)
        return 0
    transport = connect(settings.transport)
    run = Run(settings, dataset, transport, restore(settings, transport))
    if run.step < run.plan.steps:
        return run.loop()
    if transport.rank == 0:
        print(f"{settings.log_dir} is trained: all {run.step} steps are done; evaluate it with eval.py")
    return 0


class Run:
    """Everything of one training run on one rank."""

    def __init__(
        self, settings: Settings, dataset: Dataset | None, transport: Transport, restored: dict[str, Any] | None
    ):
        self.settings, self.transport = settings, transport
        self.device, threads = use_device(transport)
        self.kernels = chosen_kernels()
        self.left_out: list[str] = []
        if dataset is not None:
            self.backend = choose_backend(settings.data_backend, self.device)
            dataset, self.left_out = check_data(
                dataset, "train", settings.check_data, settings.skip_bad_images, transport, threads
            )
        self.plan = plan(settings, dataset, transport.size)
        # What rank 0 read from the checkpoint for each rank: the reader's position and the random generators.
        ranks = transport.gather(restored and restored["ranks"])[0]
        mine: dict[str, Any] = ranks[transport.rank] if ranks else {"reader": None}
        self.data = self.open_data(dataset, threads, mine["reader"])
        model = build_model(
            settings.model, num_classes=self.plan.num_classes, resnet_v1=settings.resnet_v1, seed=settings.seed
        )
        channels = MODELS[settings.model].channels(self.device)
        self.choices = choose(
            settings.conv,
            places(model, settings.batch_size, self.plan.image_size, self.plan.dtype, channels),
            self.device,
            transport,
            restored and restored["convolutions"],
        )
        use(model, self.choices.algorithms)
        self.schedule = poly(self.plan.learning_rate, self.plan.steps)
        self.train_step = Step(
            model,
            image_size=self.plan.image_size,
            device=self.device,
            schedule=self.schedule,
            transport=transport,
            dtype=self.plan.dtype,
            momentum_dtype=self.plan.momentum_dtype,
            channels=channels,
            normalize=settings.normalize,
            label_smoothing=settings.label_smoothing,
            loss_scale=settings.loss_scale,
            larc_mode=settings.larc_mode,
            larc_eta=settings.larc_eta,
            larc_exclude=settings.larc_exclude,
        )
        torch.manual_seed(settings.seed + transport.rank)
        if restored:
            self.train_step.load_state_dict(restored)
        if "torch_rng" in mine:
            torch.set_rng_state(mine["torch_rng"])
            if self.device.type == "cuda" and "cuda_rng" in mine:  # a run may go on on another device
                torch.cuda.set_rng_state(mine["cuda_rng"])
        self.step = self.train_step.broadcast()

    def open_data(
        self, dataset: Dataset | None, threads: int, state: dict | None
    ) -> TrainingData | WorkerTrainingData | SyntheticData:
        settings, transport = self.settings, self.transport
        common: dict[str, Any] = {"batch_size": settings.batch_size, "image_size": self.plan.image_size}
        common |= {"device": self.device, "ranks": transport.size}
        if dataset is None:
            return SyntheticData(
                **common,
                num_classes=self.plan.num_classes,
                images=self.plan.images,
                seed=settings.seed + transport.rank,
            )
        return open_training(
            dataset,
            self.backend,
            **common,
            crop_area=settings.crop_area,
            crop_aspect=settings.crop_aspect,
            seed=settings.seed,
            rank=transport.rank,
            threads=threads,
            state=state,
        )

    def loop(self) -> int:
        settings, optimizer = self.settings, self.train_step.optimizer
        if self.transport.rank == 0 and settings.log_dir:
            write_config(settings, self.transport.size)
        metrics = Metrics(settings.log_dir, steps=self.plan.steps, first_step=self.step, rank=self.transport.rank)
        self.announce(metrics)
        if not self.plan.no_graph:
            self.train_step.capture(settings.batch_size)
        metrics.say("Training")
        metrics.table_head()
        tensors = TensorLog(optimizer) if settings.log_tensors and self.transport.rank == 0 else None
        signals: list[int] = []
        vote = Vote(self.transport, questions=2)
        throughput = Throughput(settings.batch_size * self.transport.size, self.step)
        saved = summarized = time.monotonic()
        skipped = self.step - int(optimizer.counters[1])
        with caught(signals):
            while self.step < self.plan.steps:
                self.train_step(next(self.data))
                self.step += 1
                metrics.step()
                last = self.step == self.plan.steps
                if self.step == 1 or self.step % settings.display_every == 0 or last:
                    loss, top1, top5, now, scale, updates = self.train_step.read()
                    shown: dict[str, float] = {
                        "loss": loss if math.isfinite(now) else now,
                        "top1": 100 * top1,
                        "top5": 100 * top5,
                        "learning_rate": float(self.schedule[self.step - 1]),
                        "loss_scale": scale,
                        "images_per_second": throughput.lap(self.step),
                        "skipped": self.step - int(updates) - skipped,
                    }
                    skipped = self.step - int(updates)
                    metrics.train(self.step, (self.step - 1) // self.plan.steps_per_epoch + 1, **shown)
                    due = last or time.monotonic() - summarized > settings.summary_interval
                    if due:
                        summarized = time.monotonic()
                        metrics.summarize(self.step, **shown)
                    if tensors:
                        tensors.write(metrics, summarize=due)
                        tensors.copy(self.step)
                elif self.step == throughput.burnt_in:
                    self.train_step.read()
                    throughput.lap(self.step)
                save_due = self.transport.rank == 0 and time.monotonic() - saved > settings.save_interval
                saved = time.monotonic() if save_due else saved
                save, stop = vote(save_due, bool(signals))
                if last or save or stop:
                    self.train_step.read()  # the device is done: what follows is the saving alone
                    start = time.perf_counter()
                    self.save(metrics)
                    throughput.leave_out(time.perf_counter() - start)
                if stop and not last:
                    break
            vote.wait()
        if tensors:
            tensors.write(metrics, summarize=True)
        metrics.end(self.step, throughput)
        self.data.close()
        stopped = self.step < self.plan.steps
        if stopped:
            kept = "saved" if settings.log_dir else "nothing saved, since there is no --log_dir"
            metrics.say(f"Stopped by a signal after step {self.step}: {kept}")
        metrics.close()
        self.transport.barrier()
        self.train_step.close()
        self.transport.close()
        return 0 if not stopped else SAVED_AND_STOPPED if settings.log_dir else 1

    def save(self, metrics: Metrics) -> None:
        """Gathers every rank's position to rank 0, which writes the checkpoint with its own BatchNorm statistics."""
        settings = self.settings
        if not settings.log_dir:
            return
        mine: dict[str, Any] = {"reader": self.data.state_dict(), "torch_rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            mine["cuda_rng"] = torch.cuda.get_rng_state()
        ranks = self.transport.gather(mine)
        if self.transport.rank != 0:
            return
        path = checkpoint.path_of(Path(settings.log_dir), self.step)
        state = {
            "model": settings.model,
            "num_classes": self.plan.num_classes,
            "class_names": list(self.plan.class_names or []),
            "preprocessing": {
                "image_size": self.plan.image_size,
                "normalize": settings.normalize,
                "eval_crop": settings.eval_crop,
            },
            "settings": as_json(settings),
            "kernels": self.kernels,
            "convolutions": self.choices.algorithms,
            "ranks": ranks,
            **self.train_step.state_dict(),
        }
        checkpoint.save(path, state, settings.keep)
        metrics.write("checkpoint", step=self.step, path=str(path))
        metrics.say(f"Checkpoint written to {path}")

    def announce(self, metrics: Metrics) -> None:
        say, settings = metrics.say, self.settings
        for line in describe(settings, self.plan):
            say(line)
        say(f"Device:      {self.device}, {torch.get_num_threads()} thread(s) a rank, transport {self.transport.name}")
        if settings.data_dir:
            say(f"Input:       {self.backend}")
        if self.choices.algorithms:
            say(f"Convolution: {self.choices}")
        if self.device.type == "cpu" and self.plan.dtype != torch.float32:
            say(f"  {str(self.plan.dtype).removeprefix('torch.')} on a CPU is for trying things out: it can be slow")
        if self.train_step.arena.matrix_gradient.dtype != self.plan.dtype:
            say(f"  {self.transport.name} has no bfloat16: gradients travel in fp32")
        metrics.write("start", step=self.step, steps=self.plan.steps, ranks=self.transport.size)
        if self.left_out:
            say(f"Left out:    {len(self.left_out)} bad images")
            metrics.write("left_out", images=self.left_out)


@contextmanager
def caught(signals: list[int]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 append themselves to `signals`. A second one, a second later, ends the process.

    SIGUSR1 because mpiexec hands it on as it is, while Open MPI 5 kills its ranks half a second after SIGTERM.
    """
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {s: signal.getsignal(s) for s in asked}
    first: list[float] = []

    def note(number: int, _: Any) -> None:
        if first and time.monotonic() - first[0] > 1:  # a launcher may pass on at once what the terminal sent to all
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first.append(time.monotonic())
        signals.append(number)

    for s in asked:
        signal.signal(s, note)
    try:
        yield
    finally:
        for s in asked:
            signal.signal(s, before[s])
