"""Which algorithm computes each convolution of a run: the project's kernels or cuDNN's, whichever is faster here.

python -m nvcnn.kernel_choices [--log_dir DIR]     what was measured on this machine, or what a run computes with

With --conv=auto, rank 0 of a run on GPUs measures, once for each place that a convolution has: forward and backward,
with the BatchNorm around it, since what is fused on one side is a pass of its own on the other; all three parts of a
convolution jointly, as they share what is in memory. An evaluation measures forward, with what comes behind. Every rank
gets the same answer, and checkpoints keep that of training: another algorithm would round differently. The measurements
are kept in $XDG_CACHE_HOME/nvcnn/kernel_choices.json (by default in ~/.cache), for this GPU, these versions and these
kernels.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.errors import TritonError

import kernels
from nvcnn import checkpoint
from nvcnn.distributed import Transport
from nvcnn.errors import InputError
from nvcnn.machine import chosen_kernels
from nvcnn.memory import on_meta
from nvcnn.models.conv_bn import ALGORITHMS, Folded, Join, Raw, activation, conv_bn, written
from nvcnn.models.layers import BatchNorm2d, Conv2d, cast_matrices
from nvcnn.program import run

CANDIDATES = ("triton", "cudnn")

Times = dict[str, float]  # microseconds by algorithm
Measurements = dict[str, dict[str, Times]]  # by machine, by place


class Place(NamedTuple):
    """A convolution as a training step, or an evaluation, meets it: two with equal places take the same time."""

    x: tuple[int, int, int, int]  # N, C, H, W
    weight: tuple[int, int, int, int]  # K, C / groups, R, S
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    dtype: torch.dtype
    reads: str  # an activation, a raw tensor, or a join of a raw tensor with an activation or with another
    gradient: bool  # x has one
    folded: str = ""  # in evaluation, what the epilogue does: "folded", or "folded, adding" an activation

    def __str__(self) -> str:
        sizes = ("x".join(map(str, numbers)) for numbers in (self.x, self.weight, self.stride, self.padding))
        words = "x {} weight {} stride {} padding {}".format(*sizes)
        words += f" groups {self.groups} {str(self.dtype).removeprefix('torch.')} {self.reads}"
        return words + (f", {self.folded}" if self.folded else "" if self.gradient else ", without its gradient")


class Places(TorchDispatchMode):
    """Notes the place of each convolution op, by the identity of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Place] = {}
        self.padded: list[tuple[Tensor, Tensor]] = []  # weights, and what stands for them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.constant_pad_nd.default:
            self.padded.append((args[0], result))
        if func is kernels.convolution.overload:
            self.note(*args, **kwargs)
        return result

    def note(
        self, x, weight, stride, padding, groups, vectors=None, residual=None, residual_vectors=None,
        center=None, scale=None, shift=None, add=None, relu=False,
    ):  # fmt: skip
        reads = "raw" if vectors is not None else "activation"
        if residual is not None:
            reads = "join" if residual_vectors is None else "join of two"
        folded = "" if scale is None else "folded" if add is None else "folded, adding"
        geometry = tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), groups
        of = next((original for original, padded in self.padded if padded is weight), weight)
        self.found[id(of)] = Place(*geometry, x.dtype, reads, x.requires_grad, folded)


def places(
    model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, channels: int = 3
) -> dict[str, Place]:
    """The place of each convolution of a block of `conv_bn`, by its name in the model. Nothing is computed.

    Of a training step, or of an evaluation, as the model's mode is.
    """
    convolutions = [module for module in model.modules() if isinstance(module, Conv2d)]
    before = [conv.algorithm for conv in convolutions]
    state, images = on_meta(model, batch_size, image_size, dtype, channels)
    try:
        use(model, dict.fromkeys((name for name, m in model.named_modules() if isinstance(m, Conv2d)), "triton"))
        with torch.set_grad_enabled(model.training), Places() as noted:
            torch.func.functional_call(model, state, images)
    finally:
        for conv, algorithm in zip(convolutions, before, strict=True):
            conv.algorithm = algorithm
    names = {id(tensor): name.removesuffix(".weight") for name, tensor in state.items()}
    return {names[weight]: place for weight, place in noted.found.items()}


def use(model: nn.Module, algorithms: dict[str, str]) -> None:
    """Sets the algorithm of each convolution that is named."""
    for name, algorithm in algorithms.items():
        convolution = model.get_submodule(name)
        assert isinstance(convolution, Conv2d)
        convolution.algorithm = algorithm


def step_of(place: Place, algorithm: str, device: torch.device) -> Callable[[], list[Tensor]]:
    """What computes the place on random tensors: forward, then the gradients, which it returns; or forward alone."""
    c, (k, _, *kernel_size) = place.x[1], place.weight

    def images(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device).to(place.dtype, memory_format=torch.channels_last)
        return x.requires_grad_(place.gradient)

    def raw() -> Raw:
        vectors = torch.rand(5, c, device=device) + 0.5
        return Raw(images(*place.x), BatchNorm2d(c).to(device), vectors.requires_grad_(place.gradient))

    options: dict[str, Any] = {"stride": place.stride, "padding": place.padding, "groups": place.groups, "bias": False}
    conv = Conv2d(c, k, (kernel_size[0], kernel_size[1]), **options)
    cast_matrices(conv.to(device), place.dtype)
    conv.algorithm = algorithm
    bn = BatchNorm2d(k).to(device)
    if place.folded:
        with torch.no_grad():
            x = images(*place.x)
            added = torch.randn_like(conv(x)) if place.folded == "folded, adding" else None
        bn.eval()
        return torch.no_grad()(lambda: [written(Folded(x, conv, bn), added, True)])
    a = raw() if place.reads != "activation" else None
    b = raw() if place.reads == "join of two" else images(*place.x) if place.reads == "join" else None
    plain = images(*place.x) if a is None else None
    read = [t for part in (a, b, plain) for t in ((part.y, part.vectors) if isinstance(part, Raw) else (part,))]
    leaves = [t for t in (conv.weight, bn.weight, bn.bias, *read) if t is not None and t.requires_grad]
    directions: list[Tensor] = []

    def step() -> list[Tensor]:
        x: Any = plain if a is None else Raw(a.y, a.bn, a.vectors) if b is None else Join(a, b)
        y = conv_bn(x, conv, bn)
        assert isinstance(y, Raw)
        outputs = [t for t in (y.y, y.vectors) if t is not None]
        if isinstance(x, Join):  # somebody else reads the sum, too
            outputs.append(activation(x))
        if not directions:
            directions.extend(torch.randn_like(t) for t in outputs)
        return list(torch.autograd.grad(outputs, leaves, directions))

    return step


def measure(place: Place, device: torch.device, say: Callable[[str], None]) -> Times:
    """Microseconds of each candidate; without those that fail, which is said. Raises what the last raised if all do."""
    times: Times = {}
    for algorithm in CANDIDATES:
        try:
            step = step_of(place, algorithm, device)
            times[algorithm] = 1e3 * triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")
        except (RuntimeError, TritonError) as error:
            if algorithm == CANDIDATES[-1] and not times:
                raise
            say(f"{place}: {algorithm} fails here ({str(error).splitlines()[0]}) and is not used")
    return times


def machine() -> str:
    """What measurements are valid for."""
    source = sha256()
    folder = Path(kernels.__file__).parent
    for file in sorted((*folder.glob("*.py"), *folder.glob("configs/*.json"))):
        source.update(file.read_bytes())
    parts = {"torch": torch.__version__, "triton": triton.__version__, "cuDNN": torch.backends.cudnn.version()}
    words = [torch.cuda.get_device_name(), *(f"{name} {version}" for name, version in parts.items())]
    return ", ".join([*words, f"kernels {source.hexdigest()[:12]} ({chosen_kernels()})"])


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvcnn" / "kernel_choices.json"


def read_cache(say: Callable[[str], None]) -> Measurements:
    """Empty if there is none; a file that is not one is said to be discarded."""
    file = cache_file()
    try:
        found = json.loads(file.read_text())
        return {
            str(machine): {str(place): {str(a): float(t) for a, t in times.items()} for place, times in rows.items()}
            for machine, rows in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        say(f"{file}: no measurements of kernels ({str(error).splitlines()[0]}): discarded")
        return {}


def write_cache(measurements: Measurements, say: Callable[[str], None]) -> None:
    """Whole or not at all; a directory that cannot be written to is said, and the run goes on."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            json.dump(measurements, part, indent=1)
        os.replace(part.name, file)
    except OSError as error:
        say(f"{file}: measurements of kernels are not kept ({error.strerror})")


@dataclass(frozen=True)
class Choices:
    """`algorithms`: by a convolution's name. `source`: where they come from."""

    algorithms: dict[str, str]
    source: str

    def __str__(self) -> str:
        counts = Counter(self.algorithms.values())
        return ", ".join(f"{counts[a]} {a}" for a in ALGORITHMS if counts[a]) + f" ({self.source})"


def choose(
    asked: str,
    convolutions: dict[str, Place],
    device: torch.device,
    transport: Transport,
    stored: dict[str, str] | None,
    say: Callable[[str], None] = print,
) -> Choices:
    """The algorithm of each convolution, the same on every rank. `stored`: rank 0's, of the checkpoint it goes on from.

    Raises InputError for an algorithm that cannot run on the device.
    """
    if asked == "cudnn" and device.type == "cpu":
        raise InputError("--conv=cudnn needs a GPU; on a CPU give --conv=torch, or leave it out")
    if asked != "auto":
        return Choices(dict.fromkeys(convolutions, asked), f"--conv={asked}")
    if device.type != "cuda":
        return Choices(dict.fromkeys(convolutions, "torch"), "no GPU")
    mine = None
    if transport.rank == 0:
        if stored and stored.keys() == convolutions.keys():
            mine = Choices(stored, "as in the checkpoint")
        else:
            mine = fastest(convolutions, device, say)
    return transport.gather(mine)[0]


def fastest(convolutions: dict[str, Place], device: torch.device, say: Callable[[str], None]) -> Choices:
    """By measurement, of what the cache does not know."""
    measurements, here, start = read_cache(say), machine(), time.monotonic()
    known = measurements.setdefault(here, {})
    missing = [place for place in dict.fromkeys(convolutions.values()) if str(place) not in known]
    if missing:
        say(f"Measuring {' and '.join(CANDIDATES)} at {len(missing)} places of convolutions, once on this machine")
    for place in missing:
        known[str(place)] = measure(place, device, say)
    torch.cuda.empty_cache()
    if missing:
        write_cache(measurements, say)
    best = {name: min(times := known[str(place)], key=times.__getitem__) for name, place in convolutions.items()}
    took = f"{len(missing)} places measured in {time.monotonic() - start:.0f} s"
    return Choices(best, took if missing else f"measured before, {cache_file()}")


def show(log_dir: str | None) -> int:
    """Prints the cache, or the choices in the newest checkpoint of a run."""
    if log_dir is not None:
        found = checkpoint.newest(Path(log_dir), warn=lambda line: print(line, file=sys.stderr))
        if found is None:
            raise InputError(f"--log_dir={log_dir}: no checkpoint there")
        path, state = found
        print(path)
        for name, algorithm in state["convolutions"].items():
            print(f"{algorithm:8}{name}")
        return 0
    measurements = read_cache(lambda line: print(line, file=sys.stderr))
    if not measurements:
        print(f"{cache_file()}: nothing measured yet; a run on a GPU with --conv=auto does")
    for here, rows in measurements.items():
        print(here)
        for place, times in rows.items():
            best = min(times, key=times.__getitem__)
            columns = "".join(f"{f'{times[a]:.0f}' if a in times else 'fails':>8} us {a}" for a in CANDIDATES)
            print(f"{best:8}{columns}  {place}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nvcnn.kernel_choices", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--log_dir", metavar="DIR", help="a run's, instead of what was measured on this machine")
    return show(parser.parse_args().log_dir)


if __name__ == "__main__":
    run(main)
