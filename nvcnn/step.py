"""One training step: from a batch of pixels to new weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from nvcnn.cuda_graph import Snapshot, capture
from nvcnn.data.batch import Batch, MixedBatch, prepare_input
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import use
from nvcnn.meta import gradient_order
from nvcnn.models.layers import image_channels, outputs
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.gradients import Gradients
from nvcnn.optimizer.larc import MOMENTUM, WEIGHT_DECAY, Larc

Inputs = tuple[Tensor, ...]  # of a batch: the network's input, labels, and if it is mixed the share of an own label


class Step:
    """A model in training with its arena, gradients and optimizer. Calling it, with a batch, is one step.

    Backward hands each gradient to the arena, and each bucket's allreduce starts as soon as it is full; three launches
    then update everything, or nothing if a gradient was not finite.

    `accumulate`: with more than one a step has so many batches. Their gradients are summed in fp32 before ranks sum
    theirs, so they count as the batch of all their images would; only BatchNorm sees each alone, and its running
    statistics follow one batch after the other.

    `image_size` is that of the (square) images that the model gets first; a step may have another. `algorithms`: by
    size, that of each convolution, where sizes have their own. `larc_eta`: None for no LARC; `clip_norm`: None for no
    clipping; `ema`: the decay of a moving average, None for no average. For the other options of the optimizer see
    `Larc`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        algorithms: dict[int, dict[str, str]] | None = None,
        device: torch.device,
        schedule: Tensor,
        transport: Transport,
        dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        normalize: str = "signed",
        label_smoothing: float = 0.0,
        loss_scale: float | str = 1.0,
        accumulate: int = 1,
        larc_mode: str = "clip",
        larc_eta: float | None = None,
        larc_exclude: str = "none",
        momentum: float = MOMENTUM,
        weight_decay: float = WEIGHT_DECAY,
        no_decay: str = "none",
        clip_norm: float | None = None,
        ema: float | None = None,
    ):
        self.model, self.transport = model.train(), transport
        self.image_size, self.channels, self.dtype = image_size, image_channels(model, device), dtype
        self.prepare_input = partial(prepare_input, dtype=dtype, normalize=normalize, channels=self.channels)
        self.accumulate = accumulate
        self.label_smoothing, self.aux_weight = label_smoothing, getattr(model, "aux_weight", 0.0)
        # Of captured steps, by image size: the inputs that each reads, and its launch. Of the current size, likewise.
        self.captured: dict[int, tuple[list[Inputs], Callable[[], None]]] = {}
        self.inputs: list[Inputs]
        self.replay: Callable[[], None] | None
        self.algorithms = algorithms or {}
        self.change_size(image_size)
        summed, unknown = accumulate > 1, dtype == torch.bfloat16 and not transport.bfloat16
        self.arena = Arena(
            model,
            gradient_order(model, image_size),
            device=device,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            ema=ema is not None,
            gradient_dtype=torch.float32 if summed or unknown else None,
        )
        keep = 1 - self.arena.statistics_momentum
        self.weights = [keep**later for later in reversed(range(accumulate))]  # of each batch's statistics
        if summed:
            self.arena.statistics_momentum = 1 - keep**accumulate
        self.optimizer = Larc(
            self.arena,
            schedule=schedule,
            ranks=transport.size * accumulate,  # by which sums are divided
            mode=larc_mode if larc_eta else "off",
            eta=larc_eta or 0.0,
            exclude=larc_exclude,
            loss_scale=loss_scale,
            momentum=momentum,
            weight_decay=weight_decay,
            no_decay=no_decay,
            clip_norm=clip_norm or 0.0,
            ema_decay=ema or 0.0,
        )
        self.gradients = Gradients(self.arena, transport, batches=accumulate)

    def __call__(self, *batches: Batch | MixedBatch) -> Tensor:
        """One step. Returns this rank's mean loss and shares of top-1 and top-5 hits, (3,), not waited for.

        The next step overwrites what is returned. Raises ValueError unless there are as many batches as a step has.
        """
        if len(batches) != self.accumulate:
            raise ValueError(f"a step has accumulate={self.accumulate} batches, got {len(batches)}")
        if (image_size := batches[0].images.shape[1]) != self.image_size:
            self.change_size(image_size)
        if self.replay is None:
            self.train(map(self.inputs_of, batches))
        else:
            for batch, (images, *targets) in zip(batches, self.inputs, strict=True):
                for its, given in zip(targets, self.inputs_of(batch, images)[1:], strict=True):
                    its.copy_(given)
            self.replay()
        return self.optimizer.latest

    def inputs_of(self, batch: Batch | MixedBatch, into: Tensor | None = None) -> Inputs:
        """Returns what `train` takes of a batch. into: as in `prepare_input`."""
        images, labels, flip, *mix = batch
        return self.prepare_input(images, flip, *mix, into=into), labels, *(each[:1] for each in mix)

    def change_size(self, image_size: int) -> None:
        """Has the next steps take images of that size, by its algorithms, and as its graph where steps are graphs."""
        if self.captured and image_size not in self.captured:
            raise ValueError(f"images of {image_size}: steps were captured for {', '.join(map(str, self.captured))}")
        self.image_size = image_size
        self.inputs, self.replay = self.captured.get(image_size, ([], None))
        use(self.model, self.algorithms.get(image_size, {}))

    def train(self, batches: Iterable[Inputs]) -> None:
        """Computes new weights from the network's inputs: this is what a CUDA graph holds."""
        rows: list[Tensor] = []
        statistics: list[Tensor] = []
        for images, labels, *share in batches:
            logits, *heads = outputs(self.model(images))
            row, gradient = self.loss(logits, labels, *share)
            auxiliary = [self.loss(head, labels, *share)[1].mul_(self.aux_weight) for head in heads]
            torch.autograd.backward([logits, *heads], [gradient, *auxiliary])
            self.gradients.finish()
            rows.append(row)
            if self.accumulate > 1:
                statistics.append(self.arena.batch * (self.weights[len(statistics)] / sum(self.weights)))
        if self.accumulate > 1:
            torch.sum(torch.stack(statistics), 0, out=self.arena.batch)
        self.optimizer.step(torch.cat(rows) if self.accumulate > 1 else rows[0])

    def loss(self, logits: Tensor, labels: Tensor, *share: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows of losses and hits, and the gradient of the mean loss times the loss scale."""
        return kernels.cross_entropy(logits.detach(), labels, self.optimizer.loss_scale, self.label_smoothing, *share)

    def capture(self, batch_size: int, sizes: Sequence[int] = (), mixed: bool = False) -> None:
        """Makes each step from now on the replay of a CUDA graph. All state, also that of the generators, stays.

        All ranks must call it. The bits are those of a step that is not captured; a batch of another size is refused.
        sizes: of images, each of which gets a graph; none: the current one. mixed: the batches to come are.
        """
        current, device = self.image_size, self.arena.weight.device
        ordered = sorted({current, *sizes}, reverse=True)  # the largest comes first: its memory is enough for all

        def buffers() -> Inputs:
            values = torch.zeros(batch_size * self.channels * ordered[0] ** 2, dtype=self.dtype, device=device)
            labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            return values, labels, *[torch.ones(1, device=device)] * mixed

        def images(values: Tensor, size: int) -> Tensor:  # channels-last
            mine = values[: batch_size * self.channels * size**2]
            return mine.view(batch_size, size, size, self.channels).permute(0, 3, 1, 2)

        def train(size: int) -> None:
            self.change_size(size)
            self.train(inputs[size])

        batches = [buffers() for _ in range(self.accumulate)]
        inputs = {size: [(images(values, size), *targets) for values, *targets in batches] for size in ordered}
        before = Snapshot(self.state().values(), device)
        replays = capture([partial(train, size) for size in ordered])
        before.restore()
        self.captured = dict(zip(ordered, zip(inputs.values(), replays, strict=True), strict=True))
        self.change_size(current)

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """Yields the model to evaluate, as a checkpoint has it: BatchNorm's statistics are rank 0's.

        All ranks must call it. Afterwards each goes on with its own, and all other state is as it was.
        """
        running = self.arena.running
        own = running.clone()
        self.transport.broadcast(running)
        try:
            yield self.model.eval()
        finally:
            self.model.train()
            running.copy_(own)

    def close(self) -> None:
        """Lets go of the graphs: they may hold collectives, and must end before the transport does."""
        self.captured = {}
        self.inputs, self.replay = [], None

    def state(self) -> dict[str, Tensor]:
        """Returns all tensors that steps write or read, by name. They are written in place: their addresses stay."""
        state = dict(self.model.named_buffers())
        for name, owner in (("arena", self.arena), ("optimizer", self.optimizer)):
            state |= {f"{name}.{key}": value for key, value in vars(owner).items() if isinstance(value, Tensor)}
        return state

    def read(self) -> list[float]:
        """Returns averages of loss, top-1, top-5, then the last loss, loss scale, updates. Only here the host waits.

        Losses and hits are the mean over all ranks, which must all call it.
        """
        o = self.optimizer
        shown = torch.cat([o.average[:3] / o.average[3:], o.latest[:1].double()])
        self.transport.all_reduce(shown, "shown")()
        shown /= self.transport.size
        return torch.cat([shown, o.loss_scale.double(), o.counters[1:2].double()]).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of this rank's step, copied to the CPU."""
        averages = {} if self.arena.ema_weight is None else {"ema": self.arena.state_dict(averaged=True)}
        return averages | {
            "weights": self.arena.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_average": self.optimizer.average.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in what `state_dict` returned. Raises InputError unless the weights fit."""
        self.arena.load_state_dict(state["weights"])
        if self.arena.ema_weight is not None and "ema" in state:
            self.arena.load_state_dict(state["ema"], averaged=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.average.copy_(state["loss_average"])

    def broadcast(self) -> int:
        """Gives all ranks rank 0's state, once it stands. Returns the number of steps that were done."""
        a, o = self.arena, self.optimizer
        averages = [average for average in (a.ema_weight, a.ema_running) if average is not None]
        for tensor in (a.weight, a.momentum, a.running, *averages, *a.frozen.values()):
            self.transport.broadcast(tensor)
        for tensor in (o.average, o.counters, o.loss_scale):
            self.transport.broadcast(tensor)
        a.refresh()
        return int(o.counters[0])
