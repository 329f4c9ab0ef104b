"""Can cuDNN's fused graph take over the 3 x 3 convolutions?

    y = relu(x scale + shift) * W, 3 x 3, stride 1, with the sums of y and y^2
`nvidia-cudnn-frontend` (1.18: a wheel of 2.2 MB without dependencies, `pip install --no-deps
nvidia-cudnn-frontend==1.18.0`) makes one graph of scale, bias, ReLU, convolution and statistics, with scale and shift
in halves. It runs by the first plan that cuDNN's heuristics propose. Beside it run cuDNN's convolution alone, and the
project's kernel with the same fused into it. x and y are moved once. The graph may take over if it takes up to 120 us
on a H100, both for 64 channels at 56 x 56 and for 256 at 14 x 14.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes import IMAGES, Contender, Probe, errors, images, normal
from benchmarks.probes.halves import normalised, random_norm
from benchmarks.probes.present import PADDED, library, norm, present
from benchmarks.timing import Step

SHAPES = ((64, 56), (256, 14))  # channels in and out; pixels across


def fused(x: Tensor, weight: Tensor, x_norm: Tensor) -> tuple[Step, Tensor, Tensor]:
    """Returns a step, and what it writes: y, like x, and the sums of y and y^2, (2, K), fp32.

    x: images. weight: (K, C, 3, 3). Both are channels-last. x_norm: (2, C), scale and shift.
    Raises ImportError, which says what to do, without the package.
    """
    try:
        import cudnn
    except ImportError as missing:
        raise ImportError("pip install --no-deps nvidia-cudnn-frontend==1.18.0, or carry its wheel along") from missing
    handle = cudnn.create_handle()
    single, half = cudnn.data_type.FLOAT, cudnn.data_type.HALF
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle)
    scale, shift = (vector.view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last) for vector in x_norm)
    inputs: dict[Any, Tensor] = {
        graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=half): t
        for name, t in (("x", x), ("weight", weight), ("scale", scale), ("shift", shift))
    }
    of_x, of_weight, of_scale, of_shift = inputs
    a = graph.relu(input=graph.bias(input=graph.scale(input=of_x, scale=of_scale), bias=of_shift))
    of_y = graph.conv_fprop(image=a, weight=of_weight, padding=[1, 1], stride=[1, 1], dilation=[1, 1])
    of_y.set_output(True)
    of_sums = graph.genstats(input=of_y)
    for of_sum in of_sums:
        of_sum.set_output(True).set_data_type(single)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    y, sums = torch.empty_like(x), torch.empty(2, weight.shape[0], device=x.device)
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)
    every = inputs | {of_y: y} | dict(zip(of_sums, sums, strict=True))

    def step() -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(every, workspace, handle=handle)

    return step, y, sums


def operands(number: int, c: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, weight and x_norm of `fused`."""
    weight = normal(c, 3, 3, c, device=device, std=(9 * c) ** -0.5).permute(0, 3, 1, 2)
    return images(normal(number * size * size, c, device=device), size), weight, random_norm(c, device)


def check(device: torch.device) -> dict[str, float]:
    found: dict[str, float] = {}
    for c, size in SHAPES:
        x, weight, x_norm = operands(16, c, size, device)
        step, y, sums = fused(x, weight, x_norm)
        step()
        a = normalised(x.permute(0, 2, 3, 1), x_norm).relu().permute(0, 3, 1, 2)
        true_y = torch.nn.functional.conv2d(a.double(), weight.double(), padding=1)
        total, squares = true_y.sum((0, 2, 3)), true_y.square().sum((0, 2, 3))
        of_shape = errors(y=(y, true_y), sum=(sums[0], total), squares=(sums[1], squares))
        found |= {f"{name}, {c} channels": value for name, value in of_shape.items()}
    return found


def contenders(device: torch.device) -> dict[str, Contender]:
    made = {}
    for c, size in SHAPES:
        x, weight, x_norm = operands(IMAGES, c, size, device)
        steps: dict[str, Step] = {}
        if device.type == "cuda":
            steps["fused"] = fused(x, weight, x_norm)[0]
        steps["plain"] = library(x, weight, PADDED)
        center = torch.zeros(c, device=device)
        steps["present"] = partial(present("convolution"), x, weight, *PADDED, norm=norm(c, device), center=center)
        pixels = IMAGES * size * size
        for name, step in steps.items():
            made[f"{name}, {c} channels"] = Contender(step, 2 * pixels * 2 * c, 2 * pixels * 9 * c * c)
    return made


def verdict(us: dict[str, float], factor: float) -> str:
    slowest = max(us[f"fused, {c} channels"] for c, _ in SHAPES)
    return "take cuDNN's fused 3 x 3" if slowest * factor <= 120 else "not cuDNN's fused 3 x 3"


PROBE = Probe(
    name="cudnn_3x3",
    question="cuDNN's graph of BatchNorm, ReLU, 3 x 3 and statistics, 64 and 256 channels: fast?",
    threshold="up to 120 us each take it",
    seconds=10,
    tolerance=3e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
