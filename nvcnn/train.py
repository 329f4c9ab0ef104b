"""The training run, from settings to exit code.

One step: the next batch; forward; backward, during which gradients flow into the arena and each bucket's allreduce
starts as soon as it is full; three launches that update everything, or nothing if a gradient was not finite.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.implementation import runs_triton
from nvcnn import checkpoint
from nvcnn.arena import Arena, gradient_order
from nvcnn.data import SyntheticData, TrainingData, find_dataset, prepare_input
from nvcnn.data.dataset import Dataset
from nvcnn.distributed import Transport, Vote, connect, launched
from nvcnn.errors import InputError
from nvcnn.evaluate import Evaluation, evaluate
from nvcnn.gradients import Gradients
from nvcnn.larc import Larc
from nvcnn.machine import compute_dtype, use_device, versions
from nvcnn.memory import activation_bytes
from nvcnn.metrics import BURN_IN, Metrics, Throughput
from nvcnn.models import MODELS, build_model
from nvcnn.schedule import poly
from nvcnn.settings import Settings, as_json, differences

SAVED_AND_STOPPED = 3
DEFAULT_CLASSES = 1000


def train(settings: Settings) -> int:
    """Trains, or resumes, or finds that there is nothing left to do. Returns the exit code.

    Raises InputError for bad usage or input before anything is written.
    """
    build_model(settings.model, num_classes=1, resnet_v1=settings.resnet_v1, seed=0)  # refuses what is wrong
    if settings.eval:
        return evaluate(
            Evaluation(
                data_dir=str(settings.data_dir),
                log_dir=settings.log_dir,
                model=settings.model,
                batch_size=settings.batch_size,
                transport=settings.transport,
            )
        )
    dataset = None
    if settings.data_dir is not None:
        dataset = find_dataset(
            settings.data_dir, num_classes=settings.num_classes, label_base=settings.label_base, split="train"
        )
    if settings.dry_run:
        return dry_run(settings, dataset)
    transport = connect(settings.transport)
    restored = restore(settings, transport)
    run = Run(settings, dataset, transport, restored)
    if run.step == run.steps:
        run.metrics.say(f"{settings.log_dir} is trained: {run.steps} of {run.steps} steps; evaluate it with eval.py")
        return 0
    return run.loop()


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    return settings.num_batches if settings.num_epochs is None else settings.num_epochs * steps_per_epoch


def open_data(
    settings: Settings, dataset: Dataset | None, transport: Transport, device: torch.device, threads: int, state: Any
) -> TrainingData | SyntheticData:
    image_size = MODELS[settings.model].image_size
    if dataset is None:
        return SyntheticData(
            batch_size=settings.batch_size,
            image_size=image_size,
            num_classes=settings.num_classes or DEFAULT_CLASSES,
            images=settings.num_batches * settings.batch_size * transport.size,
            seed=settings.seed + transport.rank,
            device=device,
        )
    return TrainingData(
        dataset,
        batch_size=settings.batch_size,
        image_size=image_size,
        crop_area=settings.crop_area,
        crop_aspect=settings.crop_aspect,
        seed=settings.seed,
        rank=transport.rank,
        ranks=transport.size,
        device=device,
        threads=threads,
        state=state,
    )


def restore(settings: Settings, transport: Transport) -> dict[str, Any] | None:
    """On rank 0: the newest checkpoint of the log directory, once it is sure that this is the run it belongs to."""
    if transport.rank != 0 or not settings.log_dir:
        return None
    log_dir = Path(settings.log_dir)
    if log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"--log_dir={log_dir}: is a file; give a directory")
    config = log_dir / "config.json"
    if config.exists():
        try:
            stored = json.loads(config.read_text())
            there, ranks = stored["settings"], stored["ranks"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{config}: not a config.json of nvcnn; give another --log_dir") from None
        check_same_run(settings, transport, there, ranks, config)
    found = checkpoint.newest(log_dir, warn=lambda line: print(line, flush=True))
    if found is None:
        return None
    path, state = found
    check_same_run(settings, transport, state["settings"], len(state["ranks"]), path)
    print(f"Restored checkpoint {path}", flush=True)
    return state


def check_same_run(settings: Settings, transport: Transport, stored: dict, ranks: int, where: Path) -> None:
    different = differences(settings, stored)
    if ranks != transport.size:
        different.append(f"ranks: there {ranks}, here {transport.size}")
    if different:
        raise InputError(f"{where} is of another run ({'; '.join(different)}): give its flags, or another --log_dir")


class Run:
    """Everything of one training run on one rank."""

    def __init__(
        self, settings: Settings, dataset: Dataset | None, transport: Transport, restored: dict[str, Any] | None
    ):
        self.settings, self.transport = settings, transport
        self.device, threads = use_device(transport)
        self.dtype = compute_dtype(settings.fp16, settings.bf16)
        # What rank 0 read from the checkpoint for each rank: the reader's position and the random generators.
        ranks = transport.gather(restored and restored["ranks"])[0]
        mine = ranks[transport.rank] if ranks else {"reader": None}
        self.data = open_data(settings, dataset, transport, self.device, threads, mine["reader"])
        self.steps = total_steps(settings, self.data.steps_per_epoch)
        self.num_classes = dataset.num_classes if dataset else settings.num_classes or DEFAULT_CLASSES
        self.class_names = dataset.class_names if dataset else None

        spec = MODELS[settings.model]
        total_batch = settings.batch_size * transport.size
        learning_rate = settings.learning_rate or spec.learning_rate(total_batch)
        self.model = build_model(
            settings.model, num_classes=self.num_classes, resnet_v1=settings.resnet_v1, seed=settings.seed
        )
        self.arena = Arena(
            self.model,
            gradient_order(self.model, spec.image_size),
            device=self.device,
            dtype=self.dtype,
            gradient_dtype=None if self.dtype != torch.bfloat16 or transport.bfloat16 else torch.float32,
        )
        self.schedule = poly(learning_rate, self.steps)
        self.optimizer = Larc(
            self.arena,
            schedule=self.schedule,
            ranks=transport.size,
            mode=settings.larc_mode if settings.larc_eta else "off",
            eta=settings.larc_eta or 0.0,
            loss_scale=settings.loss_scale,
        )
        self.gradients = Gradients(self.arena, transport)
        self.average = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss, and its weight
        torch.manual_seed(settings.seed + transport.rank)
        if restored:
            self.arena.load_state_dict(restored["weights"], restored["optimizer"]["momentum"])
            self.optimizer.load_state_dict(restored["optimizer"])
            self.average.copy_(restored["loss_average"])
        if "torch_rng" in mine:
            torch.set_rng_state(mine["torch_rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda_rng"])
        for tensor in (self.arena.weight, self.arena.momentum, self.arena.running, self.average):
            transport.broadcast(tensor)
        for tensor in (self.optimizer.counters, self.optimizer.loss_scale):
            transport.broadcast(tensor)
        self.arena.refresh()
        self.step = int(self.optimizer.counters[0])
        if transport.rank == 0 and settings.log_dir:
            self.write_config()
        self.metrics = Metrics(settings.log_dir, steps=self.steps, first_step=self.step, rank=transport.rank)

    def loop(self) -> int:
        settings, metrics, optimizer = self.settings, self.metrics, self.optimizer
        self.announce()
        signals: list[int] = []
        vote = Vote(self.transport, questions=2)
        throughput = Throughput(settings.batch_size * self.transport.size)
        saved = summarized = time.monotonic()
        shown = self.step  # the last step of a table line, or of the burn-in
        updates = int(optimizer.counters[1])
        self.model.train()
        with caught(signals):
            while self.step < self.steps:
                loss = self.train_step(next(self.data))
                self.step += 1
                metrics.step()
                last = self.step == self.steps
                if self.step == 1 or self.step % settings.display_every == 0 or last:
                    average, weight, now, scale, done = self.read(loss)
                    speed = throughput.lap(self.step - shown)
                    skipped = self.step - shown - int(done - updates)
                    shown, updates = self.step, int(done)
                    rate = float(self.schedule[self.step - 1])
                    metrics.train(
                        step=self.step,
                        epoch=(self.step - 1) // self.data.steps_per_epoch + 1,
                        images_per_second=speed,
                        loss=average / weight if weight and now == now else now,
                        learning_rate=rate,
                        loss_scale=scale,
                        skipped=skipped,
                    )
                    if skipped:
                        metrics.say(f"  {skipped} step(s) skipped: gradients not finite at loss scale {scale:g}")
                    if last or time.monotonic() - summarized > settings.summary_interval:
                        summarized = time.monotonic()
                        metrics.summarize(
                            self.step, loss=now, learning_rate=rate, loss_scale=scale, images_per_second=speed
                        )
                elif throughput.steps + self.step - shown == BURN_IN:
                    self.read(loss)
                    throughput.lap(self.step - shown)
                    shown = self.step
                save_due = self.transport.rank == 0 and time.monotonic() - saved > settings.save_interval
                save, stop = vote(save_due, bool(signals))
                if last or save or stop:
                    start = time.perf_counter()
                    self.save()
                    saved = time.monotonic()
                    throughput.leave_out(time.perf_counter() - start)
                if stop and not last:
                    break
            vote.wait()
        metrics.end(self.step, throughput)
        self.data.close()
        stopped = self.step < self.steps
        if stopped:
            kept = "saved" if settings.log_dir else "nothing saved, since there is no --log_dir"
            metrics.say(f"Stopped by a signal after step {self.step}: {kept}")
        metrics.close()
        self.transport.barrier()
        return 0 if not stopped else SAVED_AND_STOPPED if settings.log_dir else 1

    def train_step(self, batch) -> Tensor:
        """One step; returns this rank's loss, a tensor that nobody has waited for."""
        images = prepare_input(batch.images, batch.flip, dtype=self.dtype, normalize=self.settings.normalize)
        loss = F.cross_entropy(self.model(images), batch.labels)
        (loss * self.optimizer.loss_scale).backward()
        self.gradients.finish()
        self.optimizer.step()
        # Exponential average with its own weight (zero-debiased), over the finite losses.
        loss = loss.detach()
        latest = torch.stack([loss, torch.ones_like(loss)]).double()
        self.average = torch.where(loss.isfinite(), 0.9 * self.average + 0.1 * latest, self.average)
        return loss

    def read(self, loss: Tensor) -> list[float]:
        """Average loss and its weight, this loss, loss scale, updates: the one point where the host waits."""
        rest = [loss.reshape(1), self.optimizer.loss_scale, self.optimizer.counters[1:2]]
        return torch.cat([self.average, *(t.double() for t in rest)]).tolist()

    def save(self) -> None:
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
            "num_classes": self.num_classes,
            "class_names": self.class_names and list(self.class_names),
            "preprocessing": {
                "image_size": MODELS[settings.model].image_size,
                "normalize": settings.normalize,
                "eval_crop": settings.eval_crop,
            },
            "settings": as_json(settings),
            "kernels": "triton" if runs_triton(self.device) else "reference",
            "weights": self.arena.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_average": self.average.cpu(),
            "ranks": ranks,
        }
        checkpoint.save(path, state, settings.keep)
        self.metrics.write("checkpoint", step=self.step, path=str(path))
        self.metrics.say(f"Checkpoint written to {path}")

    def write_config(self) -> None:
        log_dir = Path(self.settings.log_dir)
        config = {"settings": as_json(self.settings), "ranks": self.transport.size, "versions": versions()}
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            (log_dir / ".config.json.part").write_text(json.dumps(config, indent=2) + "\n")
            (log_dir / ".config.json.part").replace(log_dir / "config.json")
        except OSError as error:
            raise InputError(f"--log_dir={log_dir}: cannot be written to ({error.strerror})") from None

    def announce(self) -> None:
        say, settings = self.metrics.say, self.settings
        for line in description(settings, self.transport.size, self.steps, self.data.images, self.dtype):
            say(line)
        say(f"Device:      {self.device}, {torch.get_num_threads()} thread(s) a rank, transport {self.transport.name}")
        if self.device.type == "cpu" and self.dtype != torch.float32:
            say(f"  {str(self.dtype).removeprefix('torch.')} on a CPU is for trying things out: it can be slow")
        if self.arena.matrix_gradient.dtype != self.dtype:
            say(f"  {self.transport.name} has no bfloat16: gradients travel in fp32")
        self.metrics.write("start", step=self.step, steps=self.steps, ranks=self.transport.size)
        say("Training")
        self.metrics.table_head()


def description(settings: Settings, ranks: int, steps: int, images: int, dtype: torch.dtype) -> list[str]:
    total = settings.batch_size * ranks
    return [
        f"Num ranks:   {ranks}",
        f"Num images:  {images if settings.data_dir else 'Synthetic'}",
        f"Model:       {settings.model}",
        f"Batch size:  {settings.batch_size} per device, {total} total",
        f"Data type:   {str(dtype).removeprefix('torch.')}",
        f"Steps:       {steps}",
    ]


def dry_run(settings: Settings, dataset: Dataset | None) -> int:
    """Prints what a run would be, on the launcher's rank 0, and stops."""
    launch = launched()
    if launch.rank != 0:
        return 0
    spec, dtype = MODELS[settings.model], compute_dtype(settings.fp16, settings.bf16)
    total_batch = settings.batch_size * launch.size
    images = dataset.images("train") if dataset else settings.num_batches * total_batch
    num_classes = dataset.num_classes if dataset else settings.num_classes or DEFAULT_CLASSES
    model = build_model(settings.model, num_classes=num_classes, resnet_v1=settings.resnet_v1, seed=settings.seed)
    parameters = sum(p.numel() for p in model.parameters())
    for name, value in as_json(settings).items():
        print(f"--{name}={value}")
    steps = total_steps(settings, images // total_batch)
    print(*description(settings, launch.size, steps, images, dtype), sep="\n")
    rate = settings.learning_rate or spec.learning_rate(total_batch)
    state = parameters * 12  # master, momentum, and 4 bytes of gradient, or 2 of gradient and 2 of model weight
    activations = activation_bytes(model, settings.batch_size, spec.image_size, dtype)
    print(f"Learning rate: {rate:g}")
    print(f"Parameters:    {parameters:,}")
    print(f"Memory:        about {(state + activations) / 2**30:.2f} GiB a device", end=" ")
    print(f"({state / 2**30:.2f} weights and optimizer, {activations / 2**30:.2f} activations)")
    return 0


@contextmanager
def caught(signals: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT append themselves to `signals`; a second one ends the process at once, as always."""
    asked = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.getsignal(s) for s in asked}

    def note(number: int, _: Any) -> None:
        signals.append(number)
        for s in asked:
            signal.signal(s, before[s])

    for s in asked:
        signal.signal(s, note)
    try:
        yield
    finally:
        for s in asked:
            signal.signal(s, before[s])
