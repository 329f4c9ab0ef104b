"""Which algorithm computes each convolution of a run: the project's kernels or cuDNN's, whichever is faster here.

python -m nvcnn.kernel_choices [--log_dir DIR]     what was measured on this machine, or what a run computes with

With --conv=auto, rank 0 of a run on GPUs measures, once for each place that a convolution has: forward and backward,
with the BatchNorm around it, since what is fused on one side is a pass of its own on the other; all three parts of a
convolution jointly, as they share what is in memory. What neighbours hand to each other is the same for all algorithms
(an unnormalised tensor and its norm; a masked gradient and its sums), so the times of places add up. An evaluation
measures forward, with what comes behind. An algorithm that fails at a place, or whose results are wrong there, is not
used. What is made with a Gram matrix is handed on as another thing, so it is chosen for a 1 x 1, with the one of the
skip connection beside it, by the times of these and of the convolution that reads their sum. Both gradients in one
kernel (`triton-joint`) are a candidate where `make tune` has found that kernel right.

Every rank gets the same answer, and checkpoints keep that of training: another algorithm would round differently. The
measurements are kept in $XDG_CACHE_HOME/nvcnn/kernel_choices.json (by default in ~/.cache), for this GPU, these
versions, and the sources and launch configurations that they depend on.
"""

import argparse
import ast
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from inspect import getfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from triton.compiler.errors import CompilationError

import kernels
from kernels import configurations
from kernels.configurations import cdiv
from kernels.convolution_gradients import passed
from kernels.norm_rows import D_BETA
from nvcnn import checkpoint, program, timing
from nvcnn.cuda_graph import quick_captures
from nvcnn.distributed import Transport
from nvcnn.files import from_json
from nvcnn.machine import chosen_kernels
from nvcnn.meta import GRAM_ADDS, GRAM_ALONE, Place, places
from nvcnn.models import ALGORITHMS, JOINT, functions
from nvcnn.models.functions import GRAM, Geometry, Gradients, conv_gradients, library_gradients
from nvcnn.models.fused import (
    PendingAdd,
    PendingConv,
    Rectified,
    Unnormalized,
    activation,
    conv_bn,
    conv_relu,
    materialize,
    normalized_conv,
)
from nvcnn.models.layers import BatchNorm2d, Conv2d, cast_matrices, image_channels
from nvcnn.program import InputError, run

CANDIDATES = ALGORITHMS[1:]  # and JOINT, at few places
THIS_GPU = torch.device("meta")  # tensors without memory stand for those of the GPU that is here
LOAD, ROUNDS, REPEAT = 0.5, 10, 2  # seconds before a place is measured; rounds, and steps of a candidate in each
TOLERANCE = 2e-3  # of the norm, against the reference in fp32: a few roundings to fp16
MOST = 1e-2  # of the norm, where the library is as far off
FEW = 8  # images, of which the reference computes a weight's gradient at a time
CLEAR = 0.1  # several roundings of activations to bf16

Times = dict[str, float]  # microseconds by algorithm
Measurements = dict[str, dict[str, Times]]  # by machine, by place


def candidates(place: Place) -> tuple[str, ...]:
    """Returns the algorithms that are measured there: in evaluation, and with a bias, all is in memory anyway."""
    if place.gram:
        return GRAM
    if place.folded or place.bias:
        return "triton", "cudnn"
    return "triton", "triton-materialized", "cudnn", *[JOINT] * joins(place)


def joins(place: Place) -> bool:
    """Returns whether both gradients may be computed in one kernel: if `make tune` found that right on this GPU.

    If its barriers were wrong the kernel would hang, and a run with it: it is not tried here for the first time.
    """
    rectified = place.reads == "rectified"
    pointwise = (place.weight[2:], place.stride, place.padding, place.groups) == ((1, 1), (1, 1), (0, 0), 1)
    if not (pointwise and place.gradient and (rectified or place.reads == "raw") and place.skip_stride == 1):
        return False
    skip = rectified  # who hands x on gets a gradient of it
    return passed(place.dtype, *place.weight[:2], rectified, skip, THIS_GPU)


def use(model: nn.Module, algorithms: dict[str, str]) -> None:
    """Sets the algorithm of each convolution that is named."""
    for name, algorithm in algorithms.items():
        if algorithm not in (*ALGORITHMS, JOINT):
            raise InputError(f"{name}: there is no algorithm {algorithm!r} here, but {', '.join(ALGORITHMS)}")
        convolution = model.get_submodule(name)
        assert isinstance(convolution, Conv2d)
        convolution.algorithm = algorithm


@dataclass(frozen=True)
class Sample:
    """Random tensors at a place: x and b as it reads them, and the gradients that come back to what it returns."""

    place: Place
    conv: Conv2d
    bn: BatchNorm2d
    tensors: dict[str, Tensor]  # x; of a raw one x_norm; b, b_norm likewise; added, in evaluation
    directions: dict[str, Tensor]  # by output

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self.tensors.values(), *self.directions.values()))

    def in_fp32(self) -> "Sample":
        """Returns the same values in fp32."""
        wide = {name: t.detach().float().requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        conv = deepcopy(self.conv)
        cast_matrices(conv, torch.float32)
        return replace(
            self, conv=conv, tensors=wide, directions={name: t.float() for name, t in self.directions.items()}
        )

    def read(self, name: str) -> Any:
        """Returns a raw tensor, or an activation, or None."""
        tensor, norm = self.tensors.get(name), self.tensors.get(f"{name}_norm")
        if tensor is None or norm is None:
            return tensor
        if self.place.reads == "rectified" and name == "x":
            return Rectified(tensor, norm)
        return Unnormalized(tensor, self.bn, norm)  # norm says it all: nothing of the BatchNorm is read

    def forward(self, algorithm: str) -> dict[str, Tensor]:
        """Returns what the place hands on, by name."""
        self.conv.algorithm = algorithm
        if self.place.bias:
            z = conv_relu(self.read("x"), self.conv)
            return {"z": z} if isinstance(z, Tensor) else {"y": z.z, "norm": z.norm}
        if self.place.folded:
            folded = PendingConv(self.tensors["x"], self.conv, self.bn)
            return {"z": materialize(folded, self.tensors.get("added"), True)}
        x, b = self.read("x"), self.read("b")
        if self.place.gram:
            relu = self.place.gram != GRAM_ALONE
            if algorithm not in GRAM:
                y = conv_bn(x, self.conv, self.bn)
                assert isinstance(y, Unnormalized)
                return {"z": materialize(y, b, relu)}
            z, norm = normalized_conv(PendingConv(x, self.conv, self.bn), b, relu)
            return {"z": z, "norm": norm}
        x = x if b is None else PendingAdd(x, b)
        y = conv_bn(x, self.conv, self.bn, self.place.skip_stride)
        assert isinstance(y, Unnormalized)
        assert y.norm is not None
        outputs = {"y": y.y, "norm": y.norm}
        if self.place.hands_on and self.place.skip_stride > 1:
            assert x.sparse is not None
            return outputs | {"z": x.sparse}
        return outputs | {"z": activation(x)} if self.place.hands_on else outputs

    def backward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the gradients of what the place reads, by name."""
        own = {"bias": self.conv.bias} if self.place.bias else {"gamma": self.bn.weight, "beta": self.bn.bias}
        leaves: dict[str, Any] = {"weight": self.conv.weight} | own | self.tensors
        leaves = {f"d_{name}": t for name, t in leaves.items() if t.requires_grad}
        directions = [self.directions[name] for name in outputs]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), directions)
        found = dict(zip(leaves, gradients, strict=True))
        if self.place.reads == "rectified" and "d_x_norm" in found:
            found["d_x_norm"] = found["d_x_norm"][D_BETA]  # the others are nobody's
        return found

    def results(self, algorithm: str) -> dict[str, Tensor]:
        """Returns outputs and gradients without their autograd graph: a capture needs one made on its own stream."""
        outputs = self.forward(algorithm)
        gradients = {} if self.place.folded else self.backward(outputs)
        return {name: t.detach() for name, t in (outputs | gradients).items()}


def sample(place: Place, device: torch.device) -> Sample:
    """Returns random tensors for a place.

    Activations are normal, and the norms let about half of them pass a ReLU. Gradients are smaller, as in training, and
    those of norms shrink with the number of values, so that the weight's gradient is finite in fp16.
    """
    c, (k, _, *kernel_size) = place.x[1], place.weight

    def images(*shape: int, deviation: float = 1.0) -> Tensor:
        x = torch.randn(shape, device=device) * deviation
        return x.to(place.dtype, memory_format=torch.channels_last)

    options: dict[str, Any] = {"stride": place.stride, "padding": place.padding, "groups": place.groups}
    conv = Conv2d(c, k, (kernel_size[0], kernel_size[1]), bias=place.bias, **options)
    cast_matrices(conv.to(device), place.dtype)
    bn = BatchNorm2d(k).to(device).train(not place.folded)
    tensors = {"x": images(*place.x)}
    if place.reads == "rectified":
        tensors |= {"x": tensors["x"].relu_(), "x_norm": Conv2d(1, c, 1).to(device).unit_norm}
    elif place.reads != "activation":
        tensors["x_norm"] = torch.rand(5, c, device=device) + 0.5
    if place.reads in ("join", "join of two"):
        tensors["b"] = images(*place.x)
    if place.reads == "join of two":
        tensors["b_norm"] = torch.rand(5, c, device=device) + 0.5
    if place.folded == "folded, adding":
        tensors["added"] = images(*place.y)
    if "x_norm" in tensors and place.reads != "rectified":
        keep_clear_of_zero(tensors)
    if place.gram == GRAM_ADDS:
        tensors["b"] = images(*place.y)
    for t in tensors.values():
        t.requires_grad_(place.gradient)
    directions = {}
    if not place.folded:
        n, _, oh, ow = place.y
        of_norm = torch.randn(5, k, device=device) * 0.1 * (n * oh * ow) ** -0.5
        directions = {"y": images(*place.y, deviation=0.1), "norm": of_norm}
        if place.hands_on:
            sparse = (cdiv(size, place.skip_stride) for size in place.x[2:])
            directions["z"] = images(*place.x[:2], *sparse, deviation=0.1)
    made = Sample(place, conv, bn, tensors, directions)
    return replace(made, directions=behind_the_mask(made)) if place.gram else made


def behind_the_mask(made: Sample) -> dict[str, Tensor]:
    """Returns the gradient of z as its readers hand it back: 0 where z is, or may be by roundings; and that of norm."""
    g = made.directions["y"]
    if made.place.gram != GRAM_ALONE:
        with torch.no_grad():
            made.conv.algorithm = "triton-materialized"
            y = conv_bn(made.read("x"), made.conv, made.bn)
            assert isinstance(y, Unnormalized)
            g = g * (materialize(y, made.read("b"), False) > CLEAR)
    of_norm = torch.zeros_like(made.directions["norm"])
    of_norm[D_BETA] = g.sum((0, 2, 3), dtype=torch.float32)
    return {"z": g, "norm": of_norm}


def keep_clear_of_zero(tensors: dict[str, Tensor]) -> None:
    """Changes x where ReLU's argument is so near to 0 that roundings decide on its mask.

    A mask that differs in one element of 3 000 is right, and its gradient is 1e-2 of the norm away.
    """

    def value(name: str) -> Tensor:
        x, norm = tensors[name].float(), tensors.get(f"{name}_norm")
        if norm is None:
            return x
        mean, scale, shift = (row.view(-1, 1, 1) for row in norm[:3])
        return (x - mean) * scale + shift

    v = value("x") + value("b") if "b" in tensors else value("x")
    away = torch.where(v < 0, -CLEAR, CLEAR) / tensors["x_norm"][1].view(-1, 1, 1)
    tensors["x"] += away * (v.abs() < CLEAR)


def step(samples: list[Sample], algorithm: str) -> None:
    """Forward of all, then backward of all: what backward reads has left the cache by then, as in training."""
    with torch.set_grad_enabled(not samples[0].place.folded):
        passed = [one.forward(algorithm) for one in samples]
        if not samples[0].place.folded:
            for one in reversed(samples):
                one.backward(passed.pop())


def gradients_in_parts(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> Gradients:
    """Returns what `library_gradients` does; the weight's is added up in float64, over few images at a time.

    On a H200 cuDNN's fp32 gradient of a weight, a sum over 800 000 pixels, was so far off that all candidates were
    refused for it, among them cuDNN's.
    """
    dx, _ = library_gradients(dy, x, weight, geometry, (needs[0], False))
    dw, wide = torch.zeros_like(weight, dtype=torch.float64), weight.double()
    for of_dy, of_x in zip(dy.split(FEW), x.split(FEW), strict=True):
        dw += library_gradients(of_dy.double(), of_x.double(), wide, geometry, (False, True))[1]
    return dx, dw.to(weight.dtype)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, ops are their references, fp32 products are computed in fp32, and sums over all pixels in float64."""
    with (
        mock.patch.dict(os.environ, NVCNN_KERNELS="reference"),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        mock.patch.object(functions, "library_gradients", gradients_in_parts),
    ):
        yield


def distances(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Returns how far each result is from `expected`, as a share of its norm."""
    least = torch.finfo(torch.float32).tiny
    return {
        name: ((results[name].float() - right).norm() / right.norm().clamp(min=least)).item()
        for name, right in expected.items()
    }


def wrong(found: dict[str, float], library: dict[str, float], dtype: torch.dtype) -> str | None:
    """Returns which result is further off than roundings to `dtype` explain, or None.

    They explain TOLERANCE, and twice what the library's results, which `library` has, are off, up to MOST.
    """
    unit = max(1.0, torch.finfo(dtype).eps / torch.finfo(torch.float16).eps)
    for name, off in found.items():
        allowed = unit * min(max(TOLERANCE, 2 * library.get(name, 0.0) / unit), MOST)
        if not off <= allowed:  # a NaN is not
            return f"{name} is off by {off:.1e} of its norm, {allowed:.1e} are allowed"
    return None


def reason(error: Exception) -> str:
    """Returns one line of the error: PyTorch adds advice, and Triton's compiler says where before it says why."""
    text = str(error)
    if isinstance(error, CompilationError):
        text = error.error_message or str(error.__cause__ or text)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def measure(place: Place, device: torch.device, say: Callable[[str], None]) -> Times:
    """Returns microseconds of each candidate, without those that fail or are wrong, which are reported.

    If that is all of them, those with a Gram matrix take for ever, as there is another way. Raises RuntimeError if
    there is none, or if one has broken the device for this process.
    """
    samples = [sample(place, device)]
    samples += [sample(place, device) for _ in range(timing.sets(samples[0].bytes, device) - 1)]
    steps: dict[str, timing.Step] = {}
    library: dict[str, float] = {}
    with torch.set_grad_enabled(not place.folded):
        with exact():
            expected = samples[0].in_fp32().results("cudnn")
        for algorithm in sorted(candidates(place), key=lambda algorithm: algorithm != "cudnn"):  # the library first
            try:
                found = distances(samples[0].results(algorithm), expected)
                library = found if algorithm == "cudnn" else library
                fault = wrong(found, library, place.dtype)
                if fault is None:
                    steps[algorithm] = timing.captured(partial(step, samples, algorithm), device)
            except Exception as error:  # of a compiler, a launch, cuDNN, the memory: they have no class in common
                fault = reason(error)
                if lost(device):
                    line = f"{place}: {algorithm} broke the GPU for this process ({fault}): start it with --conv=torch"
                    raise RuntimeError(line) from error
            if fault is not None:
                say(f"{place}: {algorithm} fails here ({fault}) and is not used")
    if not steps and place.gram:
        return dict.fromkeys(candidates(place), math.inf)
    if not steps:
        raise RuntimeError(f"{place}: none of {', '.join(candidates(place))} computes this here: give --conv=torch")
    del expected
    timing.load(steps, device, LOAD)
    times = timing.alternate(steps, device, rounds=ROUNDS, repeat=REPEAT, warm_up=0)
    return {algorithm: 1e3 * median(ms) / len(samples) for algorithm, ms in times.items()}


def lost(device: torch.device) -> bool:
    """Returns whether nothing runs any more, as after an illegal access, which only waiting for the device shows."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def machine() -> str:
    """Returns what measurements are valid for: GPU, versions, sources."""
    source = sha256()
    for file in sources():
        source.update(file.read_bytes())
    parts = {"torch": torch.__version__, "triton": triton.__version__, "cuDNN": torch.backends.cudnn.version()}
    words = [torch.cuda.get_device_name(), *(f"{name} {version}" for name, version in parts.items())]
    return ", ".join([*words, f"sources {source.hexdigest()[:12]} ({chosen_kernels()})"])


def sources() -> list[Path]:
    """Returns the files that measurements depend on.

    They are the blocks, their autograd functions and layers, the modules of the ops that these use, what those import
    of `kernels`, and the GPU's table of launch configurations.
    """
    folder, found = Path(kernels.__file__).parent, set()
    waiting = [Path(getfile(of)) for of in (conv_bn, conv_gradients, Conv2d)]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            names: list[str] = []
            match node:
                case ast.Attribute(value=ast.Name(id="kernels"), attr=op):
                    names = [getattr(kernels, op).__module__]
                case ast.ImportFrom(module=str(module)):
                    names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
                case ast.Import():
                    names = [alias.name for alias in node.names]
            files = [folder / f"{name.removeprefix('kernels.')}.py" for name in names if name.startswith("kernels.")]
            waiting += [file for file in files if file.exists()]
    table = configurations.TABLES / f"{configurations.table_name(torch.device('cuda'))}.json"
    return sorted(found) + [table] * table.exists()


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nvcnn" / "kernel_choices.json"


def read_cache(say: Callable[[str], None]) -> Measurements:
    """Returns what is known, nothing if there is no file. Reports a file that cannot be read, and discards it."""
    file = cache_file()
    try:
        found = from_json(file.read_text())
        return {
            str(machine): {str(p): {str(a): float(t) for a, t in times.items()} for p, times in rows.items() if times}
            for machine, rows in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        say(f"{file}: no measurements of kernels ({str(error).splitlines()[0]}): discarded")
        return {}


def write_cache(measurements: Measurements, say: Callable[[str], None]) -> None:
    """Writes the file whole or not at all. A directory that cannot be written to is reported, and the run goes on."""
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
        return ", ".join(f"{counts[a]} {a}" for a in (*ALGORITHMS, JOINT) if counts[a]) + f" ({self.source})"


def choose(
    asked: str,
    convolutions: dict[str, Place],
    device: torch.device,
    transport: Transport,
    stored: dict[str, str] | None,
    say: Callable[[str], None] = print,
    with_gram: dict[str, Place] | None = None,
) -> Choices:
    """Returns the algorithm of each convolution, the same on every rank.

    `stored`: those in the checkpoint that rank 0 resumes from. with_gram: the places where all that can be are computed
    with a Gram matrix; None if none is to be.
    Raises InputError for an algorithm that cannot run on the device.
    """
    if asked.startswith("cudnn") and device.type == "cpu":
        raise InputError(f"--conv={asked} needs a GPU; on a CPU give --conv=torch, or leave it out")
    if asked != "auto":
        return Choices(dict.fromkeys(convolutions, asked), f"--conv={asked}")
    if device.type != "cuda":
        return Choices(dict.fromkeys(convolutions, "torch"), "no GPU")
    mine = None
    if transport.rank == 0:
        if stored and stored.keys() == convolutions.keys():
            mine = Choices(stored, "as in the checkpoint")
        else:
            mine = fastest(convolutions, with_gram or convolutions, device, say)
    found = transport.gather(mine)[0]
    if JOINT in found.algorithms.values() and (gpu := configurations.capability(device)) != 9:
        raise InputError(
            f"{found.source}: {JOINT} is for GPUs of compute capability 9, this has {gpu}: give --conv=triton"
        )
    return found


def choose_algorithms(
    model: nn.Module,
    asked: str,
    images: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    transport: Transport,
    stored: dict[str, str] | None = None,
) -> Choices:
    """Sets the algorithm of each convolution of the model as `choose` has it, and returns the choices.

    images: their number in a batch, their size.
    """
    of_step = model, *images, dtype, image_channels(model, device)
    found = places(*of_step)
    measures = asked == "auto" and device.type == "cuda" and model.training
    with_gram = places(*of_step, gram=True) if measures else None
    choices = choose(asked, found, device, transport, stored, with_gram=with_gram)
    use(model, choices.algorithms)
    return choices


def fastest(
    convolutions: dict[str, Place], with_gram: dict[str, Place], device: torch.device, say: Callable[[str], None]
) -> Choices:
    """Returns the fastest algorithms; measures the places that the cache does not know. Arguments as in `choose`."""
    measurements, here, start = read_cache(say), machine(), time.monotonic()
    known = measurements.setdefault(here, {})
    needed = dict.fromkeys((*convolutions.values(), *with_gram.values()))
    missing = [place for place in needed if str(place) not in known]
    if missing:
        measured = dict.fromkeys(algorithm for place in missing for algorithm in candidates(place))
        say(f"Measuring {', '.join(measured)} at {len(missing)} places of convolutions, once on this machine")
    try:
        with quick_captures():
            for place in missing:
                program.here.moves += 1  # the other ranks wait
                known[str(place)] = measure(place, device, say)
                torch.cuda.empty_cache()  # of the graphs, which are gone
    finally:
        if missing:
            write_cache(measurements, say)
    best = {name: min(times := known[str(place)], key=times.__getitem__) for name, place in convolutions.items()}
    for name in where_gram_pays(convolutions, with_gram, known):
        best[name] = min(times := known[str(with_gram[name])], key=times.__getitem__)
    took = f"{len(missing)} places measured in {time.monotonic() - start:.0f} s"
    return Choices(best, took if missing else f"measured before, {cache_file()}")


def where_gram_pays(convolutions: dict[str, Place], with_gram: dict[str, Place], known: dict[str, Times]) -> list[str]:
    """Returns the convolutions whose places are those of `with_gram` in the fastest choice.

    Those between which a tensor is handed on in the other way are one group: the 1 x 1s that are added up, and who
    reads the sum. The last block's sum no convolution reads: its 1 x 1s are computed as others of the same place. One
    that is added to what is unnormalised hands on the same as ever, and is a group of its own.
    """

    def least(places: dict[str, Place], group: list[str]) -> float:
        return sum(min(known[str(places[name])].values()) for name in group)

    groups: list[list[str]] = []
    for name, place in with_gram.items():
        if place == convolutions[name]:
            continue
        before = with_gram[groups[-1][-1]].gram if groups else ""
        if place.gram and (not before or before == place.gram == GRAM_ALONE):
            groups.append([])
        groups[-1].append(name)
    paying: list[str] = []
    pays: dict[Place, bool] = {}
    for group in groups:
        of_group = [with_gram[name] for name in group]
        last = [place for place in of_group if place.gram][-1]
        if of_group[-1] != last or last.gram == GRAM_ALONE:
            pays[last] = least(with_gram, group) < least(convolutions, group)
        if pays.get(last):
            paying += group
    return paying


def show(log_dir: str | None) -> int:
    """Prints the cache, or the choices in the newest checkpoint of a run. Returns the exit code."""
    if log_dir is not None:
        found = checkpoint.newest(Path(log_dir), warn=lambda line: print(line, file=sys.stderr))
        if found is None:
            raise InputError(f"--log_dir={log_dir}: no checkpoint there")
        path, state = found
        print(path)
        found = state["convolutions"]
        for size, algorithms in found.items() if all(isinstance(size, int) for size in found) else [(None, found)]:
            for name, algorithm in algorithms.items():
                print(f"{algorithm:21}{name}" + f", at {size} x {size}" * (len(found) > 1))
        return 0
    measurements = read_cache(lambda line: print(line, file=sys.stderr))
    if not measurements:
        print(f"{cache_file()}: nothing measured yet; a run on a GPU with --conv=auto does")
    for here, rows in measurements.items():
        print(here)
        for place, times in rows.items():
            best = min(times, key=times.__getitem__)
            columns = (f"{f'{times[a]:.0f} us' if a in times else '-':>10} {a}" for a in (*CANDIDATES, JOINT))
            print(f"{best:21}{''.join(columns)}  {place}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nvcnn.kernel_choices", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--log_dir", metavar="DIR", help="a run's, instead of what was measured on this machine")
    return show(parser.parse_args().log_dir)


if __name__ == "__main__":
    run(main)
