"""What a dry run says of time and learning rates: how long GPUs that need not be here take at least, and a picture."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nvcnn.roofline import GPUS, META, calls_of, floor, meta_step

COUNTS = (1, 8)  # GPUs that a run is estimated for
LEAST = ("triton", "triton-gram")  # those of --conv that move the fewest bytes, each for some models
# Images/s of one GPU in fp16, by model, image size and batch size: those of benchmarks/results.
MEASURED = {
    ("resnet50", 224, 256): {"H100": 9056, "H200": 10810},
    ("inception3", 299, 128): {"H100": 4031},
    ("vgg16", 224, 128): {"H100": 4241},
}
BLOCKS = " ▁▂▃▄▅▆▇█"


def step_floors(
    build: Callable[[], nn.Module], image_size: int, batch_size: int, dtype: torch.dtype, conv: str, accumulate: int
) -> dict[str, float]:
    """Returns the seconds that a step takes each of `GPUS` at least. `build` returns the model.

    With --conv=auto it is the least of the algorithms `LEAST`, each in all convolutions.
    """
    floors = {gpu.name: math.inf for gpu in GPUS}
    for algorithm in LEAST if conv == "auto" else (conv,):
        with META:
            model = build()
        step = meta_step(model, image_size, batch_size, dtype, conv=algorithm, accumulate=accumulate)
        calls = Counter(calls_of(step, batch_size))
        for gpu in GPUS:
            floors[gpu.name] = min(floors[gpu.name], sum(n * floor(call, gpu) for call, n in calls.items()))
    return floors


def table_of_times(
    images: Callable[[int], int], images_a_step: int, floors: dict[str, float], measured: dict[str, int]
) -> list[str]:
    """Returns a table of what a run takes by the floors of its step, and by measured images/s of one GPU.

    images: how many are trained on in all, given the number of GPUs; 0: they are fewer than a total batch.
    """
    lines = [f"  {'':24}{'images/s of one':>16}" + "".join(f"{f'{n} GPU' + 's' * (n > 1):>14}" for n in COUNTS)]
    for gpu in sorted(GPUS, key=lambda gpu: gpu.bandwidth):
        rates = {"at least": images_a_step / floors[gpu.name]}
        if gpu.name in measured:
            rates["as measured"] = measured[gpu.name]
        for word, rate in rates.items():
            all_images = "".join(f"{duration(images(n) / rate / n):>14}" for n in COUNTS)
            lines.append(f"  {f'{gpu.name.split()[0]} {word}':24}{rate:>16,.0f}{all_images}")
    return lines


def duration(seconds: float) -> str:
    """Returns the time as people say it; of no time a dash, as there is no such run."""
    if not seconds:
        return "-"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def picture(rates: Tensor, epochs: float, columns: int = 64, rows: int = 8) -> list[str]:
    """Returns the lines of a bar chart of the learning rates, (steps,), from 0 to the highest."""
    top = rates.max().item() or 1.0
    at = ((torch.arange(columns) + 0.5) * len(rates) / columns).long()
    eighths = (rates[at] * (8 * rows / top)).round().int().tolist()
    left = f"{top:.3g}"
    lines = [
        f"{left if row == rows - 1 else '':>8} |" + "".join(BLOCKS[min(max(n - 8 * row, 0), 8)] for n in eighths)
        for row in reversed(range(rows))
    ]
    right = f"{epochs:g} epochs"
    return [line.rstrip() for line in lines] + [f"{'0':>8} +{'-' * columns}", f"{'':>10}0{right:>{columns - 1}}"]
