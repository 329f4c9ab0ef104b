"""The training run, from settings to exit code: opens everything, and has the loop around `Step`."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvcnn import checkpoint
from nvcnn.check_data import check_data
from nvcnn.check_ranks import WeightCheck, check_ranks
from nvcnn.data.backend import choose_backend, open_training
from nvcnn.data.batch import Batch, MixedBatch, pixels
from nvcnn.data.dali import TrainingData
from nvcnn.data.dataset import Dataset
from nvcnn.data.labels import doubts
from nvcnn.data.mixing import Mixing
from nvcnn.data.pillow_workers import WorkerTrainingData
from nvcnn.data.resharded import ReshardedData
from nvcnn.data.synthetic import SyntheticData
from nvcnn.distributed import Transport, Vote, connect
from nvcnn.divergence import Divergence
from nvcnn.evaluate import check_classes, evaluate, in_words
from nvcnn.kernel_choices import Choices, choose_algorithms
from nvcnn.machine import chosen_kernels, random_state, set_random_state, use_device
from nvcnn.metrics import Metrics, TensorLog, Throughput, Timer
from nvcnn.optimizer.schedule import learning_rates
from nvcnn.plan import describe, dry_run, find_training_data, find_validation_data, initial_model, plan
from nvcnn.program import (
    BAD_INPUT,
    SAVED_AND_STOPPED,
    InputError,
    Signals,
    caught,
    doing,
    here,
    launched,
    wait_for_rank_0,
)
from nvcnn.resharding import resharded
from nvcnn.settings import Settings, as_json
from nvcnn.step import Step
from nvcnn.validation import Validation
from nvcnn.weights import Weights, read

PICTURES = 16  # of the first batch, in input.png
RETRY = 60.0  # seconds until a checkpoint that could not be written is tried again
LONG = 60.0  # seconds; a run that takes longer and keeps nothing says so
Data = TrainingData | ReshardedData | WorkerTrainingData | SyntheticData


def train(settings: Settings) -> int:
    """Trains, or resumes, or finds that there is nothing left to do. Returns the exit code.

    Raises InputError for bad usage or input before anything is written.
    """
    if settings.eval:
        return evaluate(settings.evaluation())
    dataset, validation = find_training_data(settings), find_validation_data(settings)
    expected = plan(settings, dataset, launched().size)
    if settings.dry_run:
        if launched().rank == 0:
            weights = initial_weights(settings)
            origin = weights.origin if weights else None
            dry_run(settings, plan(settings, dataset, expected.ranks, origin), weights)
        return 0
    transport = connect(settings.transport, settings.rank_timeout)
    if transport.size > 1:
        settings = replace(settings, transport=transport.name)
    check_ranks(transport, settings, dataset, "train", validation)
    state = checkpoint.resume(settings, transport.size) if transport.rank == 0 else None
    if state:
        here.checkpoint = str(checkpoint.path_of(Path(settings.log_dir), int(state["optimizer"]["counters"][0])))
        check_classes(settings.data_dir, expected.class_names, settings.log_dir, state["class_names"])
    weights = initial_weights(settings) if transport.rank == 0 and state is None else None
    run = Run(settings, dataset, transport, state, weights, validation)
    if run.step < run.plan.steps:
        return run.loop()
    transport.close()
    if transport.rank == 0:
        print(f"{settings.log_dir} is trained: all {run.step} steps are done; evaluate it with eval.py")
    return 0


def initial_weights(settings: Settings) -> Weights | None:
    """Returns those of --init, if it is given."""
    return read("init", settings.init, settings.model, settings.weights_from) if settings.init else None


class Run:
    """Everything of one training run on one rank.

    On rank 0, `state`: the checkpoint it resumes from, or None; `weights`: those it begins with, None for random ones.
    `validation`: what it evaluates on; None for no evaluation.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: Dataset | None,
        transport: Transport,
        state: dict[str, Any] | None,
        weights: Weights | None = None,
        validation: Dataset | None = None,
    ):
        self.settings, self.transport = settings, transport
        self.device, threads = use_device(transport)
        self.left_out: list[str] = []
        self.doubts: list[str] = []
        if dataset is not None:
            self.backend = choose_backend(settings.data_backend, self.device)
            how = settings.check_data, settings.skip_bad_images, transport, threads
            dataset, self.left_out = check_data(dataset, "train", *how)
            if transport.rank == 0:
                self.doubts = doubts(dataset.source("train"), self.backend)
            if validation is not None:
                validation, bad = check_data(validation, "validation", *how)
                best = checkpoint.best_so_far(settings, transport.size, state) if transport.rank == 0 else None
        origin = checkpoint.origin(state) if state else weights and weights.origin
        self.plan = plan(settings, dataset, transport.size, transport.gather(origin)[0])
        if state:
            checkpoint.check_learning_rate(self.plan.learning_rate, state)
        model, self.beginning = initial_model(settings, self.plan, weights)
        # By rank, from rank 0's checkpoint: the reader's position, the generators, running statistics, average losses.
        ranks = transport.gather(state and resharded(state, settings, transport.size))[0]
        mine = ranks[transport.rank] if ranks else None
        self.data = self.open_data(dataset, threads, mine and mine["reader"])
        self.mixing: Mixing | None = None
        if settings.mixup or settings.cutmix:
            self.mixing = Mixing(settings.mixup, settings.cutmix, settings.seed, transport.rank)
        self.choices = self.choose_algorithms(model, state["convolutions"] if state else {})
        self.schedule = learning_rates(settings.schedule, self.plan.learning_rate, self.plan.steps, self.plan.warmup)
        self.train_step = Step(
            model,
            image_size=self.plan.sizes[0],
            algorithms={size: choices.algorithms for size, choices in self.choices.items()},
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
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            no_decay=settings.no_decay,
            clip_norm=settings.clip_norm,
            ema=settings.ema,
        )
        self.validation: Validation | None = None
        if validation is not None:
            self.validation = Validation(
                validation,
                self.plan.preprocessing,
                batch_size=settings.batch_size,
                left_out=bad,
                best=transport.gather(best)[0],
                backend=self.backend,
                step=self.train_step,
                threads=threads,
            )
        torch.manual_seed(mine["seed"] if mine and "seed" in mine else settings.seed + transport.rank)
        if state:
            self.train_step.load_state_dict(state)
        self.step = self.train_step.broadcast()
        self.skipped = self.step - int(self.train_step.optimizer.counters[1])  # steps, up to the last table line
        self.until_retry = Timer(-1)  # of a checkpoint that could not be written; rank 0's
        self.best_unsaved = ""  # why the best one is not written
        if mine:
            if "seed" not in mine:  # which ranks of another number have in place of a state
                set_random_state(mine, self.device)
            for name in ("running", "ema_running"):
                if name in mine:  # an older checkpoint has rank 0's statistics alone
                    getattr(self.train_step.arena, name).copy_(mine[name])
            if "average" in mine:
                self.train_step.optimizer.average.copy_(mine["average"])

    def choose_algorithms(self, model: nn.Module, stored: dict[Any, Any]) -> dict[int, Choices]:
        """Returns what computes the convolutions, by the size of images. stored: the checkpoint's algorithms."""
        settings, plan = self.settings, self.plan
        return {
            size: choose_algorithms(
                model,
                settings.conv,
                (settings.batch_size, size),
                plan.dtype,
                self.device,
                self.transport,
                stored.get(size, stored),  # an older checkpoint has those of its one size alone
            )
            for size in plan.sizes
        }

    def open_data(self, dataset: Dataset | None, threads: int, state: dict | None) -> Data:
        """Returns the source of batches. `state`: where this rank's reader was in the run to resume."""
        settings, plan, rank = self.settings, self.plan, self.transport.rank
        common: dict[str, Any] = {"batch_size": settings.batch_size, "image_size": plan.sizes[0]}
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
            later_sizes=plan.image_sizes[1:],
            accumulate=settings.accumulate,
            seed=settings.seed,
            rank=rank,
            threads=threads,
            state=state,
        )

    def batches(self, signals: Signals) -> list[Batch | MixedBatch]:
        """Returns those of the next step."""
        batches: list[Batch | MixedBatch] = []
        for number in range(self.step * self.settings.accumulate, (self.step + 1) * self.settings.accumulate):
            with signals.waiting():
                batch = next(self.data)
            batches.append(self.mixing(batch, number) if self.mixing else batch)
        return batches

    @property
    def epoch(self) -> int:
        """The number of the latest step's epoch, from 1 on."""
        return (self.step - 1) // self.plan.steps_per_epoch + 1

    def epochs_end(self, epochs: int) -> bool:
        """Returns whether a multiple of so many epochs ends with the latest step; never for 0."""
        return epochs > 0 and self.step % (epochs * self.plan.steps_per_epoch) == 0

    def loop(self) -> int:
        """Trains to the last step, or until a signal stops it. Returns the exit code."""
        settings, rank = self.settings, self.transport.rank
        here.doing, here.step = "computes", self.step
        if rank == 0 and settings.log_dir:
            checkpoint.begin(settings, self.transport.size)
        metrics = Metrics(settings.log_dir, steps=self.plan.steps, first_step=self.step, rank=rank)
        self.announce(metrics)
        with caught() as signals:
            if not self.plan.no_graph:
                with doing("captures its steps"):
                    self.train_step.capture(settings.batch_size, self.plan.sizes, mixed=self.mixing is not None)
            metrics.say("Training")
            metrics.table_head()
            tensors = TensorLog(self.train_step.optimizer) if settings.log_tensors and rank == 0 else None
            vote = Vote(self.transport, questions=3)
            divergence = Divergence(self.train_step.optimizer, settings.max_skipped)
            weight_check = WeightCheck(self.train_step.arena, self.transport, settings.check_ranks)
            throughput = Throughput(self.plan.total_batch, self.step)
            until_summary, self.until_save = Timer(settings.summary_interval), Timer(settings.save_interval)
            eval_every = 1 if settings.eval_every is None else settings.eval_every
            told = bool(settings.log_dir)
            due, stopped, diverged, unsaved = False, False, "", ""  # due: a checkpoint is
            if self.step and self.validation and self.epochs_end(eval_every):  # what was stopped may not have had that
                with throughput.left_out():
                    stopped = not self.evaluate(metrics, signals)
            while self.step < self.plan.steps and not stopped:
                batches = self.batches(signals)
                if self.step == 0 and rank == 0 and settings.log_dir:
                    with throughput.left_out():
                        self.show_input(batches[0], metrics)
                self.train_step(*batches)
                del batches  # before the next ones are there: they may be large
                self.step += 1
                here.step = self.step
                metrics.step()
                last = self.step == self.plan.steps
                if self.step == 1 or self.step % settings.display_every == 0 or last:
                    metrics.train(self.step, self.epoch, **self.shown(throughput))
                    if tensors:
                        tensors.write(metrics, summarize=last or until_summary.over())
                        tensors.copy(self.step)
                elif self.step == throughput.burnt_in:
                    self.train_step.read()
                    throughput.lap(self.step)
                if not told and (seconds := throughput.known_to_take(self.plan.steps - self.step)) > LONG:
                    metrics.say(f"  this takes {seconds / 60:.0f} min more, and nothing will be kept: give --log_dir")
                    told = True
                if self.step % divergence.every == 0:
                    divergence.follow()
                weight_check.follow(self.step)
                save, stop, diverges = vote(
                    rank == 0 and self.until_save.over(), bool(signals), bool(divergence.reason)
                )
                stopped = stop and not last
                due = due or save or stop or last or self.epochs_end(settings.save_every)
                evaluates = self.validation and (last or self.epochs_end(eval_every)) and not stopped
                if due or evaluates or diverges or weight_check.reason:
                    self.train_step.read()  # the device is done: what follows is saving and evaluation alone
                    with throughput.left_out():
                        diverged, good = self.agree(divergence, weight_check)
                        if diverged:
                            break
                        saves = due and (good or stop or last)
                        if saves:
                            unsaved = self.save(metrics, must=stop or last)
                            due = False
                        if evaluates and not self.evaluate(metrics, signals):
                            stopped = True
                            if not saves or unsaved:
                                unsaved = self.save(metrics, must=True)
            vote.wait()
            weight_check.read()
        here.doing = "ends"
        if tensors:
            tensors.write(metrics, summarize=True)
        metrics.end(self.step, throughput)
        self.data.close()
        if diverged and rank == 0:
            metrics.write("diverged", step=self.step, reason=diverged)
            metrics.say(f"Diverged {diverged}: {self.remedy(bool(weight_check.reason))}")
        elif stopped:
            kept = "saved" if settings.log_dir else "nothing saved, since there is no --log_dir"
            metrics.say(f"Stopped by a signal after step {self.step}: {'not saved' if unsaved else kept}")
        metrics.close()
        self.transport.barrier()
        self.train_step.close()
        self.transport.close()
        if diverged:
            return 1
        if unsaved := unsaved or self.best_unsaved:
            if rank == 0:
                raise InputError(unsaved)
            wait_for_rank_0()
            return BAD_INPUT
        return 0 if not stopped else SAVED_AND_STOPPED if settings.log_dir else 1

    def shown(self, throughput: Throughput) -> dict[str, float]:
        """Returns what a table line shows of the latest step. Waits for the device; all ranks must call it."""
        loss, top1, top5, latest, scale, updates = self.train_step.read()
        skipped, before = self.step - int(updates), self.skipped
        self.skipped = skipped
        return {
            "loss": loss if math.isfinite(latest) else latest,
            "top1": 100 * top1,
            "top5": 100 * top5,
            "learning_rate": float(self.schedule[self.step - 1]),
            "loss_scale": scale,
            "images_per_second": throughput.lap(self.step),
            "skipped": skipped - before,
        }

    @doing("draws its first images")
    def show_input(self, batch: Batch | MixedBatch, metrics: Metrics) -> None:
        """Has some images of a batch drawn as the network sees them, with their classes."""
        names, labels = self.plan.class_names, batch.labels.tolist()
        shown = [names[label] if names else f"class {label}" for label in labels]
        if isinstance(batch, MixedBatch):
            shown = [f"{one}, {other}" for one, other in zip(shown, reversed(shown), strict=True)]
        images = pixels(self.train_step.inputs_of(batch)[0][:PICTURES], self.plan.preprocessing.normalize).cpu()
        metrics.input(images, shown[:PICTURES])

    @doing("evaluates")
    def evaluate(self, metrics: Metrics, signals: Signals) -> bool:
        """Evaluates on all ranks, and saves the best. Returns whether it came to its end, before any signal."""
        assert self.validation is not None
        results = self.validation.evaluate(signals)
        for result in results:
            metrics.evaluation(self.step, self.epoch, in_words(result, "Top-1"), in_words(result, "Top-5"), **result)
        if results and results[-1]["top1"] > self.validation.best:  # of the averages, if any: eval.py takes these
            self.best_unsaved = self.save(metrics, results[-1], must=True)
            if not self.best_unsaved:
                self.validation.best = results[-1]["top1"]
        return bool(results)

    def agree(self, divergence: Divergence, weight_check: WeightCheck) -> tuple[str, bool]:
        """Returns why the run must stop, empty if it need not, and whether the latest step is one to save.

        All ranks get the same, though each has a loss of its own.
        """
        divergence.look()
        weight_check.look(self.step)
        found = self.transport.gather((divergence.reason, divergence.good))
        reasons = (weight_check.reason, *(reason for reason, _ in found))
        return next(filter(None, reasons), ""), all(good for _, good in found)

    def remedy(self, ranks_differ: bool) -> str:
        """Returns what to do about a run that has diverged."""
        settings = self.settings
        if ranks_differ:
            again = (
                "a GPU or memory is faulty, ranks have GPUs or kernels that round differently, or nvcnn has a bug; "
                "give the command again on other machines"
            )
        else:
            scaled = settings.loss_scale != "dynamic" and (settings.fp16 or float(settings.loss_scale) > 1)
            scale = "--loss_scale=dynamic, or " * scaled
            again = f"give {scale}a --learning_rate below {self.plan.learning_rate:g}"
        if not settings.log_dir:
            return again
        kept = checkpoint.last_good(Path(settings.log_dir))
        other = "" if ranks_differ else ", and another --log_dir, where --init=FILE goes on from weights"
        return f"{again}{other}; {kept}"

    @doing("saves")
    def save(self, metrics: Metrics, evaluation: dict[str, Any] | None = None, *, must: bool) -> str:
        """Gathers what is each rank's own to rank 0, whose BatchNorm statistics are those of the weights.

        evaluation: its result, if this is the best one. must: also soon after one that could not be written. Returns
        why it is not written, on all ranks alike; empty if it is.
        """
        settings = self.settings
        if not settings.log_dir:
            return ""
        arena = self.train_step.arena
        own = {"reader": self.data.state_dict(), "running": arena.running.cpu()}
        own["average"] = self.train_step.optimizer.average.cpu()
        if arena.ema_running is not None:
            own["ema_running"] = arena.ema_running.cpu()
        ranks = self.transport.gather(own | random_state(self.device))
        failure = ""
        if self.transport.rank == 0 and not must and not self.until_retry.over():
            failure = "too soon"
        elif self.transport.rank == 0:
            try:
                self.write(metrics, ranks, evaluation)
            except InputError as error:
                if settings.on_save_error == "stop":
                    raise
                failure = str(error)
                goes_on = not must or (evaluation and self.step < self.plan.steps)
                again = f"; training goes on, and tries again in {RETRY:.0f} s" if goes_on else ""
                metrics.say(f"Not saved after step {self.step}: {failure}{again}")
            self.until_retry = Timer(RETRY if failure else -1)
            if failure or not evaluation:
                self.until_save = Timer(RETRY if failure else settings.save_interval)
        return failure if settings.on_save_error == "stop" else self.transport.gather(failure)[0]

    def write(self, metrics: Metrics, ranks: list[Any], evaluation: dict[str, Any] | None) -> None:
        """Writes a checkpoint. ranks: what is each one's own."""
        settings, plan, log_dir = self.settings, self.plan, Path(self.settings.log_dir)
        path = log_dir / checkpoint.BEST if evaluation else checkpoint.path_of(log_dir, self.step)
        state = {
            "model": settings.model,
            "num_classes": plan.num_classes,
            "class_names": list(plan.class_names or []),
            "preprocessing": asdict(plan.preprocessing),
            "options": plan.options,
            "settings": as_json(settings),
            "learning_rate": plan.learning_rate,
            "kernels": chosen_kernels(),
            "convolutions": {size: choices.algorithms for size, choices in self.choices.items()},
            "ranks": ranks,
            **self.train_step.state_dict(),
            **({"evaluation": evaluation} if evaluation else {}),
        }
        checkpoint.save(path, state, None if evaluation else settings.keep)
        here.checkpoint = here.checkpoint if evaluation else str(path)
        metrics.write("checkpoint", step=self.step, path=str(path))
        metrics.say(f"Checkpoint written to {path}")

    def announce(self, metrics: Metrics) -> None:
        """Says what this run is, and how it computes."""
        say, settings, transport = metrics.say, self.settings, self.transport
        say("\n".join([*describe(settings, self.plan), *self.beginning]))
        say(f"Device:      {self.device}, {torch.get_num_threads()} thread(s) a rank, transport {transport}")
        if settings.data_dir:
            dealt = f"; {self.data}" if isinstance(self.data, ReshardedData) else ""
            say("\n".join([f"Input:       {self.backend}{dealt}", *(f"  {line}" for line in self.doubts)]))
        if self.validation:
            say(f"Evaluation:  {self.validation.images} images of {self.validation.place}")
        elif settings.data_dir and settings.eval_every is None:
            say(f"Evaluation:  none: there are no validation images in {settings.data_dir}")
        chosen = {size: str(choices) for size, choices in self.choices.items() if choices.algorithms}
        for line in dict.fromkeys(chosen.values()):
            sizes = ", ".join(f"{size} x {size}" for size, text in chosen.items() if text == line)
            say(f"Convolution: {line}" + f", for images of {sizes}" * (len(set(chosen.values())) > 1))
        if settings.accumulate == 1 and self.train_step.arena.matrix_gradient.dtype != self.plan.dtype:
            say(f"  {transport.name} has no bfloat16: gradients travel in fp32")
        plan = self.plan
        where = {"step": self.step, "steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch}
        metrics.write("start", **where, ranks=self.transport.size)
        if self.left_out:
            say(f"Left out:    {len(self.left_out)} bad images")
            metrics.write("left_out", images=self.left_out)
