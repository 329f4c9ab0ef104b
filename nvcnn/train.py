"""The training run, from settings to exit code: opens everything, and has the loop around `Step`."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nvcnn import checkpoint
from nvcnn.check_data import check_data
from nvcnn.check_ranks import check_ranks
from nvcnn.data.backend import choose_backend, open_training
from nvcnn.data.batch import Batch, MixedBatch
from nvcnn.data.dali import TrainingData
from nvcnn.data.dataset import Dataset
from nvcnn.data.mixing import Mixing
from nvcnn.data.pillow_workers import WorkerTrainingData
from nvcnn.data.synthetic import SyntheticData
from nvcnn.distributed import Transport, Vote, connect
from nvcnn.evaluate import check_classes, evaluate
from nvcnn.kernel_choices import choose_algorithms
from nvcnn.machine import chosen_kernels, random_state, set_random_state, use_device
from nvcnn.metrics import Metrics, TensorLog, Throughput, Timer
from nvcnn.optimizer.schedule import poly
from nvcnn.plan import describe, dry_run, find_training_data, initial_model, plan
from nvcnn.program import SAVED_AND_STOPPED, caught, launched
from nvcnn.settings import Settings, as_json
from nvcnn.step import Step
from nvcnn.weights import Weights, read

Data = TrainingData | WorkerTrainingData | SyntheticData


def train(settings: Settings) -> int:
    """Trains, or resumes, or finds that there is nothing left to do. Returns the exit code.

    Raises InputError for bad usage or input before anything is written.
    """
    if settings.eval:
        return evaluate(settings.evaluation())
    dataset = find_training_data(settings)
    expected = plan(settings, dataset, launched().size)
    if settings.dry_run:
        if launched().rank == 0:
            weights = initial_weights(settings)
            origin = weights.origin if weights else None
            dry_run(settings, plan(settings, dataset, expected.ranks, origin), weights)
        return 0
    transport = connect(settings.transport)
    check_ranks(transport, settings, dataset, "train")
    state = checkpoint.resume(settings, transport.size) if transport.rank == 0 else None
    if state:
        check_classes(settings.data_dir, expected.class_names, settings.log_dir, state["class_names"])
    weights = initial_weights(settings) if transport.rank == 0 and state is None else None
    run = Run(settings, dataset, transport, state, weights)
    if run.step < run.plan.steps:
        return run.loop()
    if transport.rank == 0:
        print(f"{settings.log_dir} is trained: all {run.step} steps are done; evaluate it with eval.py")
    return 0


def initial_weights(settings: Settings) -> Weights | None:
    """Returns those of --init, if it is given."""
    return read("init", settings.init, settings.model, settings.weights_from) if settings.init else None


class Run:
    """Everything of one training run on one rank.

    On rank 0, `state`: the checkpoint it resumes from, or None; `weights`: those it begins with, None for random ones.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset | None,
        transport: Transport,
        state: dict[str, Any] | None,
        weights: Weights | None = None,
    ):
        self.settings, self.transport = settings, transport
        self.device, threads = use_device(transport)
        self.left_out: list[str] = []
        if dataset is not None:
            self.backend = choose_backend(settings.data_backend, self.device)
            dataset, self.left_out = check_data(
                dataset, "train", settings.check_data, settings.skip_bad_images, transport, threads
            )
        origin = checkpoint.origin(state) if state else weights and weights.origin
        self.plan = plan(settings, dataset, transport.size, transport.gather(origin)[0])
        model, self.beginning = initial_model(settings, self.plan, weights)
        # By rank, from rank 0's checkpoint: the reader's position, the random generators, the running statistics.
        ranks = transport.gather(state and state["ranks"])[0]
        mine = ranks[transport.rank] if ranks else None
        self.data = self.open_data(dataset, threads, mine and mine["reader"])
        self.mixing: Mixing | None = None
        if settings.mixup or settings.cutmix:
            self.mixing = Mixing(settings.mixup, settings.cutmix, settings.seed, transport.rank)
        image_size = self.plan.preprocessing.image_size
        images = settings.batch_size, image_size
        stored = state and state["convolutions"]
        self.choices = choose_algorithms(model, settings.conv, images, self.plan.dtype, self.device, transport, stored)
        self.schedule = poly(self.plan.learning_rate, self.plan.steps)
        self.train_step = Step(
            model,
            image_size=image_size,
            device=self.device,
            schedule=self.schedule,
            transport=transport,
            dtype=self.plan.dtype,
            momentum_dtype=self.plan.momentum_dtype,
            normalize=self.plan.preprocessing.normalize,
            label_smoothing=settings.label_smoothing,
            loss_scale=settings.loss_scale,
            accumulate=settings.accumulate,
            larc_mode=settings.larc_mode,
            larc_eta=settings.larc_eta,
            larc_exclude=settings.larc_exclude,
        )
        torch.manual_seed(settings.seed + transport.rank)
        if state:
            self.train_step.load_state_dict(state)
        self.step = self.train_step.broadcast()
        if mine:
            set_random_state(mine, self.device)
            if "running" in mine:  # an older checkpoint has rank 0's alone
                self.train_step.arena.running.copy_(mine["running"])

    def open_data(self, dataset: Dataset | None, threads: int, state: dict | None) -> Data:
        """Returns the source of batches. `state`: where this rank's reader was in the run to resume."""
        settings, plan, rank = self.settings, self.plan, self.transport.rank
        common: dict[str, Any] = {"batch_size": settings.batch_size, "image_size": plan.preprocessing.image_size}
        common |= {"device": self.device, "ranks": plan.ranks}
        if dataset is None:
            common |= {"images": plan.images, "num_classes": plan.num_classes}
            return SyntheticData(**common, seed=settings.seed + rank)
        return open_training(
            dataset,
            self.backend,
            **common,
            crop_area=settings.crop_area,
            crop_aspect=settings.crop_aspect,
            accumulate=settings.accumulate,
            seed=settings.seed,
            rank=rank,
            threads=threads,
            state=state,
        )

    def batches(self) -> list[Batch | MixedBatch]:
        """Returns those of the next step."""
        count = self.settings.accumulate
        numbers = range(self.step * count, (self.step + 1) * count)
        mixing = self.mixing or (lambda batch, number: batch)
        return [mixing(next(self.data), number) for number in numbers]

    def loop(self) -> int:
        """Trains to the last step, or until a signal stops it. Returns the exit code."""
        settings, rank = self.settings, self.transport.rank
        if rank == 0 and settings.log_dir:
            checkpoint.begin(settings, self.transport.size)
        metrics = Metrics(settings.log_dir, steps=self.plan.steps, first_step=self.step, rank=rank)
        self.announce(metrics)
        if not self.plan.no_graph:
            self.train_step.capture(settings.batch_size, mixed=self.mixing is not None)
        metrics.say("Training")
        metrics.table_head()
        tensors = TensorLog(self.train_step.optimizer) if settings.log_tensors and rank == 0 else None
        vote = Vote(self.transport, questions=2)
        throughput = Throughput(self.plan.total_batch, self.step)
        until_summary, until_save = Timer(settings.summary_interval), Timer(settings.save_interval)
        skipped = self.step - int(self.train_step.optimizer.counters[1])
        with caught() as signals:
            while self.step < self.plan.steps:
                with signals.waiting():
                    batches = self.batches()
                self.train_step(*batches)
                self.step += 1
                metrics.step()
                last = self.step == self.plan.steps
                if self.step == 1 or self.step % settings.display_every == 0 or last:
                    loss, top1, top5, latest, scale, updates = self.train_step.read()
                    shown: dict[str, float] = {
                        "loss": loss if math.isfinite(latest) else latest,
                        "top1": 100 * top1,
                        "top5": 100 * top5,
                        "learning_rate": float(self.schedule[self.step - 1]),
                        "loss_scale": scale,
                        "images_per_second": throughput.lap(self.step),
                        "skipped": self.step - int(updates) - skipped,
                    }
                    skipped = self.step - int(updates)
                    metrics.train(self.step, (self.step - 1) // self.plan.steps_per_epoch + 1, **shown)
                    summarize = last or until_summary.over()
                    if summarize:
                        metrics.summarize(self.step, **shown)
                    if tensors:
                        tensors.write(metrics, summarize=summarize)
                        tensors.copy(self.step)
                elif self.step == throughput.burnt_in:
                    self.train_step.read()
                    throughput.lap(self.step)
                save, stop = vote(rank == 0 and until_save.over(), bool(signals))
                if last or save or stop:
                    self.train_step.read()  # the device is done: what follows is the saving alone
                    with throughput.left_out():
                        self.save(metrics)
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
        """Gathers what is each rank's own to rank 0, whose BatchNorm statistics are those of the weights."""
        settings, plan = self.settings, self.plan
        if not settings.log_dir:
            return
        own = {"reader": self.data.state_dict(), "running": self.train_step.arena.running.cpu()}
        ranks = self.transport.gather(own | random_state(self.device))
        if self.transport.rank != 0:
            return
        path = checkpoint.path_of(Path(settings.log_dir), self.step)
        state = {
            "model": settings.model,
            "num_classes": plan.num_classes,
            "class_names": list(plan.class_names or []),
            "preprocessing": asdict(plan.preprocessing),
            "options": plan.options,
            "settings": as_json(settings),
            "kernels": chosen_kernels(),
            "convolutions": self.choices.algorithms,
            "ranks": ranks,
            **self.train_step.state_dict(),
        }
        checkpoint.save(path, state, settings.keep)
        metrics.write("checkpoint", step=self.step, path=str(path))
        metrics.say(f"Checkpoint written to {path}")

    def announce(self, metrics: Metrics) -> None:
        """Says what this run is, and how it computes."""
        say, settings, transport = metrics.say, self.settings, self.transport.name
        say("\n".join([*describe(settings, self.plan), *self.beginning]))
        say(f"Device:      {self.device}, {torch.get_num_threads()} thread(s) a rank, transport {transport}")
        if settings.data_dir:
            say(f"Input:       {self.backend}")
        if self.choices.algorithms:
            say(f"Convolution: {self.choices}")
        if settings.accumulate == 1 and self.train_step.arena.matrix_gradient.dtype != self.plan.dtype:
            say(f"  {transport} has no bfloat16: gradients travel in fp32")
        metrics.write("start", step=self.step, steps=self.plan.steps, ranks=self.transport.size)
        if self.left_out:
            say(f"Left out:    {len(self.left_out)} bad images")
            metrics.write("left_out", images=self.left_out)
