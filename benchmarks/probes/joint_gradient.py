"""Are both gradients of a 1 x 1 convolution in one Gluon kernel right, and faster than in two kernels?

The kernel is `kernels.convolution_gradients`, for the two uses that ResNet-50 may have for it at 56 x 56 pixels: the
convolution to 256 channels, which reads 64 unnormalised ones, and that of the next block, which reads these 256
rectified and adds the gradient of the skip connection. g, y, x, skip and dx are moved once, 1028 and 1439 MB.
"""

import os
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.probes import IMAGES, Contender, Probe, errors
from benchmarks.probes.present import library_gradients, present
from benchmarks.prove import GEOMETRY, operands, separate
from kernels.convolution_gradients import USES

SIZE = 56
SMALL = 8, 100, 101  # images, height, width: several tiles for every program, and a ragged one
ONE, TWO = "one kernel", "two kernels"
Operands = dict[str, Tensor]


def title(use: tuple[int, int, bool, bool]) -> str:
    k, c, _, _ = use
    return f"{c} to {k} channels"


def joint(made: Operands, out: Tensor, rectified: bool, adds: bool) -> tuple[Tensor, Tensor]:
    """Returns dx and sums; stores dw in `out`. By the launcher: see `present`."""
    through = made["y"], made["norm"], made["factors"], made["x_norm"]
    of_x = rectified, made["skip"] if adds else None
    return present("convolution_gradients")(made["g"], made["x"], made["weight"], out, *through, *of_x)


def apart(made: Operands, out: Tensor, rectified: bool, adds: bool) -> None:
    """Computes the same by two kernels, as a step without the one launches them."""
    through = made["y"], made["norm"], made["factors"]
    of_weight = *through, None if rectified else made["x_norm"]
    epilogue = made["skip"] if adds else None, None, made["x"], made["x_norm"]
    present("convolution_weight_gradient")(made["g"], made["x"], out, *GEOMETRY, *of_weight)
    size = made["x"].shape[2:]
    present("convolution_data_gradient")(made["g"], made["weight"], size, *GEOMETRY, *through, *epilogue)


def check(device: torch.device) -> dict[str, float]:
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for use in USES:
        k, c, *flags = use
        made = operands(k, c, SMALL, torch.float16, device, exact=False)
        out = torch.empty_like(made["weight"], dtype=torch.float32)
        dx, sums = joint(made, out, *flags)
        with mock.patch.dict(os.environ, NVCNN_KERNELS="reference"):
            exact = separate({name: t.double() for name, t in made.items()}, *flags)
        ours = {"dx": dx, "dw": out, "sums": sums.double().sum(1)}
        found |= errors(**{f"{name}, {title(use)}": (ours[name], exact[name]) for name in ours})
    return found


def contenders(device: torch.device) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    rows = IMAGES * SIZE * SIZE
    for use in USES:
        k, c, rectified, adds = use
        made: Any = operands(k, c, (IMAGES, SIZE, SIZE), torch.float16, device, exact=False)
        arguments = made, torch.empty_like(made["weight"]), rectified, adds
        library = library_gradients(made["g"], made["x"], made["weight"], of_weight=True)
        flops = 4 * rows * k * c
        found |= {
            f"{ONE}, {title(use)}": Contender(partial(joint, *arguments), 2 * rows * (2 * k + (2 + adds) * c), flops),
            f"{TWO}, {title(use)}": Contender(partial(apart, *arguments), 2 * rows * (4 * k + (3 + adds) * c), flops),
            f"cuDNN, gradients alone, {title(use)}": Contender(library, 2 * rows * (2 * k + 2 * c), flops),
        }
    return found


def verdict(us: dict[str, float], factor: float) -> str:
    """Returns how many times as fast the one kernel is, for each use; times of one machine need no factor."""
    gains = {title(use): us[f"{TWO}, {title(use)}"] / us[f"{ONE}, {title(use)}"] for use in USES}
    slower = [name for name, gain in gains.items() if gain <= 1]
    words = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items())
    return f"two kernels are faster for {' and '.join(slower)}: {words}" if slower else f"one kernel is faster: {words}"


PROBE = Probe(
    name="joint_gradient",
    question="data and weight gradient of a 1 x 1, 64 to 256 and 256 to 64 channels at 56 x 56, in one: right, faster?",
    threshold="over 1 times as fast as two kernels",
    seconds=9,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
