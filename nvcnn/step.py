"""One training step: from a batch of pixels to new weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from nvcnn.cuda_graph import Snapshot, capture
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.distributed import Transport
from nvcnn.meta import gradient_order
from nvcnn.models.layers import image_channels, outputs
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.gradients import Gradients
from nvcnn.optimizer.larc import Larc


class Step:
    """A model in training with its arena, gradients and optimizer. Calling it is one step.

    Backward hands each gradient to the arena, and each bucket's allreduce starts as soon as it is full; three launches
    then update everything, or nothing if a gradient was not finite.

    `image_size` is that of the (square) images that the model gets. `larc_eta`: None for no LARC. For
    the other options of the optimizer see `Larc`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        device: torch.device,
        schedule: Tensor,
        transport: Transport,
        dtype: torch.dtype = torch.float32,
        momentum_dtype: torch.dtype = torch.float32,
        normalize: str = "signed",
        label_smoothing: float = 0.0,
        loss_scale: float | str = 1.0,
        larc_mode: str = "clip",
        larc_eta: float | None = None,
        larc_exclude: str = "none",
    ):
        self.model, self.transport = model.train(), transport
        self.image_size, self.channels, self.dtype = image_size, image_channels(model, device), dtype
        self.prepare_input = partial(prepare_input, dtype=dtype, normalize=normalize, channels=self.channels)
        self.label_smoothing, self.aux_weight = label_smoothing, getattr(model, "aux_weight", 0.0)
        self.arena = Arena(
            model,
            gradient_order(model, image_size),
            device=device,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            gradient_dtype=None if dtype != torch.bfloat16 or transport.bfloat16 else torch.float32,
        )
        self.optimizer = Larc(
            self.arena,
            schedule=schedule,
            ranks=transport.size,
            mode=larc_mode if larc_eta else "off",
            eta=larc_eta or 0.0,
            exclude=larc_exclude,
            loss_scale=loss_scale,
        )
        self.gradients = Gradients(self.arena, transport)
        # Of a captured step: its launch, and what it reads.
        self.replay: Callable[[], None] | None = None
        self.images: Tensor | None = None
        self.labels: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        """One step. Returns this rank's mean loss and shares of top-1 and top-5 hits, (3,), not waited for.

        The next step overwrites what is returned.
        """
        images = self.prepare_input(batch.images, batch.flip, into=self.images)
        if self.replay is None:
            self.train(images, batch.labels)
        else:
            self.labels.copy_(batch.labels)
            self.replay()
        return self.optimizer.latest

    def train(self, images: Tensor, labels: Tensor) -> None:
        """Computes new weights from the network's input: this is what a CUDA graph holds."""
        logits, *heads = outputs(self.model(images))
        rows, gradient = self.loss(logits, labels)
        auxiliary = [self.loss(head, labels)[1].mul_(self.aux_weight) for head in heads]
        torch.autograd.backward([logits, *heads], [gradient, *auxiliary])
        self.gradients.finish()
        self.optimizer.step(rows)

    def loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows of losses and hits, and the gradient of the mean loss times the loss scale."""
        return kernels.cross_entropy(logits.detach(), labels, self.optimizer.loss_scale, self.label_smoothing)

    def capture(self, batch_size: int) -> None:
        """Makes each step from now on the replay of a CUDA graph. All state, also that of the generators, stays.

        All ranks must call it. The bits are those of a step that is not captured; a batch of another size is refused.
        """
        shape, device = (batch_size, self.channels, self.image_size, self.image_size), self.arena.weight.device
        self.images = torch.zeros(shape, dtype=self.dtype, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        before = Snapshot(self.state().values(), device)
        self.replay = capture(partial(self.train, self.images, self.labels))
        before.restore()

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
        """Lets go of the graph: it may hold collectives, and must end before the transport does."""
        self.replay = self.images = None

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
        return {
            "weights": self.arena.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_average": self.optimizer.average.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in what `state_dict` returned. Raises InputError unless the weights fit."""
        self.arena.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.average.copy_(state["loss_average"])

    def broadcast(self) -> int:
        """Gives all ranks rank 0's state, once it stands. Returns the number of steps that were done."""
        a, o = self.arena, self.optimizer
        for tensor in (a.weight, a.momentum, a.running, *a.frozen.values(), o.average, o.counters, o.loss_scale):
            self.transport.broadcast(tensor)
        a.refresh()
        return int(o.counters[0])
