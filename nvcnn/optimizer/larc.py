"""SGD with Nesterov momentum, weight decay, LARC and loss scaling over a parameter arena, in three kernel launches.

LARC (You, Gitman, Ginsburg 2017, arXiv:1708.03888, as nvcnn_hvd.py has it), per tensor with weight v and gradient g
(averaged over ranks, unscaled, weight decay added): q = eta |v| / |g| (1 if either norm is 0); the gradient is
multiplied by min(q / learning rate, 1) in mode "clip", by q in mode "scale". Parameters of one dimension (gamma, beta,
biases) may be left to plain SGD, and without decay, as MLPerf's LARS does both.
"""

import torch
from torch import Tensor

import kernels
from nvcnn.optimizer.arena import Arena

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
# Dynamic loss scale, as torch.amp.GradScaler: twice as large after this many finite steps, half after an overflow.
GROWTH_INTERVAL = 2000
FIRST_DYNAMIC_SCALE = 65536.0


class Larc:
    """The optimizer and the state of a step; docs/architecture.md names the tensors.

    `schedule`: (steps,) learning rates. `mode`: "off", "clip" or "scale". `exclude`: "none", or "1d": parameters of
    fewer than two dimensions get plain SGD. `no_decay`: the same, of parameters without weight decay. `loss_scale`: a
    number, or "dynamic". `clip_norm`: the largest norm of the whole gradient (averaged, unscaled, without decay); a
    larger one is scaled down before all else, LARC included; 0 for none. `ema_decay`: that of the arena's averages,
    lower in the first steps (see `kernels.trust_ratio`); 0 if it has none.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        schedule: Tensor,
        ranks: int = 1,
        mode: str = "off",
        eta: float = 0.0,
        exclude: str = "none",
        loss_scale: float | str = 1.0,
        momentum: float = MOMENTUM,
        weight_decay: float = WEIGHT_DECAY,
        no_decay: str = "none",
        clip_norm: float = 0.0,
        ema_decay: float = 0.0,
    ):
        device, tensors = arena.weight.device, len(arena.slots)
        dynamic = loss_scale == "dynamic"
        self.arena, self.ranks, self.mode, self.eta = arena, ranks, mode, eta
        self.excluded_from = arena.matrices if exclude == "1d" else tensors
        self.clip_norm, self.ema_decay = clip_norm, ema_decay
        self.momentum, self.weight_decay, self.decay_vectors = momentum, weight_decay, no_decay == "none"
        self.growth_interval = GROWTH_INTERVAL if dynamic else 0
        self.schedule = schedule.to(device)
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)
        self.loss_scale = torch.full((1,), FIRST_DYNAMIC_SCALE if dynamic else float(loss_scale), device=device)
        self.scalars = torch.zeros(4 if ema_decay else 3, device=device)
        blocks = len(arena.weight_square_sums)
        self.square_sums = torch.zeros((3, blocks) if clip_norm else blocks, device=device)
        self.ratio, self.gradient_norm, self.weight_norm = torch.zeros(3, tensors, device=device)
        self.latest = torch.zeros(3, device=device)
        self.average = torch.zeros(4, dtype=torch.float64, device=device)
        for bn in arena.batch_norms:
            bn.num_batches_tracked = self.counters[1]

    def step(self, rows: Tensor | None = None) -> None:
        """Applies the gradients in the arena, or, if they are not finite, only moves on. Nothing waits for the host.

        rows: (N, 3), what `kernels.cross_entropy` returned; without them `average` stays.
        """
        a = self.arena
        kernels.gradient_statistics(
            a.matrix_gradient,
            a.vector_gradient,
            a.weight,
            self.loss_scale,
            ranks=self.ranks,
            weight_decay=self.weight_decay,
            decay_vectors=self.decay_vectors,
            square_sums=self.square_sums,
        )
        kernels.trust_ratio(
            self.square_sums,
            a.weight_square_sums,
            a.first_block,
            self.counters,
            self.loss_scale,
            self.schedule,
            self.latest.new_empty(0, 3) if rows is None else rows,
            ranks=self.ranks,
            larc_mode=self.mode,
            eta=self.eta,
            excluded_from=self.excluded_from,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            ratio=self.ratio,
            gradient_norm=self.gradient_norm,
            weight_norm=self.weight_norm,
            scalars=self.scalars,
            latest=self.latest,
            average=self.average,
        )
        kernels.larc_update(
            a.matrix_gradient,
            a.vector_gradient,
            a.weight,
            a.momentum,
            a.model_weight,
            a.tensor_of_block,
            self.ratio,
            self.scalars,
            a.weight_square_sums,
            a.running,
            a.batch,
            self.counters,
            self.loss_scale,
            a.ema_weight,
            a.ema_running,
            momentum_factor=self.momentum,
            weight_decay=self.weight_decay,
            decay_vectors=self.decay_vectors,
            statistics_momentum=a.statistics_momentum,
            growth_interval=self.growth_interval,
        )

    def state_dict(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Returns what a checkpoint holds of the optimizer, on the CPU."""
        return {
            "momentum": self.arena.momentum_dict(),
            "counters": self.counters.cpu().clone(),
            "loss_scale": self.loss_scale.cpu().clone(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Copies in what `state_dict` returned."""
        self.arena.load_momentum_dict(state["momentum"])
        self.counters.copy_(state["counters"])
        self.loss_scale.copy_(state["loss_scale"])
