"""Which tiles suit the data gradient of a 1 x 1 convolution in the deep layers, 1024 to 256 channels at 14 x 14?

With tiles of 128 x 256, g and y are read and mapped once, and an SM holds one program. With 128 x 128 in steps of 32
channels and with 128 registers they are read and mapped twice, but two programs share an SM, so that one loads while
the other stores. The floor counts g, y, x and dx once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.probes import IMAGES, Contender, Probe, errors, small_rows
from benchmarks.probes.data_gradient import Operands, launch, operands, reference
from benchmarks.probes.present import POINTWISE, library_gradients, present

K, C, SIZE = 1024, 256, 14
WIDE, PAIRED = "128 x 256 x 64", "128 x 128 x 32, 128 registers"


def steps(of: Operands) -> dict[str, Callable[[], Any]]:
    return {WIDE: partial(launch, of, 256, 64), PAIRED: partial(launch, of, 128, 32, maxnreg=128)}


def check(device: torch.device) -> dict[str, float]:
    of = operands(small_rows(device), K, C, device)
    true_dx, _, true_sums, _ = reference(of)
    found: dict[str, float] = {}
    for tiles, step in steps(of).items():
        dx, sums, _ = step()
        of_tiles = errors(dx=(dx, true_dx), sums=(sums.sum(1), true_sums))
        found |= {f"{name}, {tiles}": value for name, value in of_tiles.items()}
    return found


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    of = operands(rows, K, C, device)
    images = of.present(SIZE)
    others: dict[str, Callable[[], Any]] = {
        "present": partial(present("convolution_data_gradient"), **images),
        "cuDNN, gradient alone": library_gradients(
            images["g"], images["x"], images["weight"], POINTWISE, of_x=True, of_weight=False
        ),
    }
    return {
        name: Contender(step, 2 * rows * 2 * (K + C), 2 * rows * K * C) for name, step in (steps(of) | others).items()
    }


def verdict(us: dict[str, float], factor: float) -> str:
    return f"tiles of {min((WIDE, PAIRED), key=us.__getitem__)}"


PROBE = Probe(
    name="gradient_tiles",
    question="data gradient 1 x 1, 1024 to 256 channels at 14 x 14: one wide program an SM, or two?",
    threshold="the faster",
    seconds=5,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
