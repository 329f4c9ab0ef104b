"""Compiles every kernel configuration for GPUs that need not be here, and shows registers, memory, spills, widths.

python -m benchmarks.codegen [--list short|all] [--json FILE] [NAME ...]    NAME: only rows whose name contains one

`short` is what the tests compile: the steps of two small models, mixed batches, the optimizer's options, the
convolutions and poolings that have the most fused into them, some Gram matrices with what follows, slices of channels,
and what the tables of kernels/configs/ change in ResNet-50's step. `all` adds ResNet-50's steps with every --conv, its
evaluation, and the convolutions of ResNeXt-50 that have groups, in fp16 and bf16, launched without a table and with
each table of kernels/configs/ (on its own GPU); and in fp16, on sm_90, the convolutions and poolings of the models of
OTHERS and what concatenates Inception v3's branches. Equal launches are compiled once; `calls` says how often they
occur in ResNet-50's steps.

Convolutions are compiled with TMA, too, and those of 1 x 1 with programs of several tiles. These are breaches, which
make the exit code 1:
    - a spill, or a program that does not fit an SM;
    - a matrix product of halves without the chip's own instruction for it, by warps that could issue it;
    - wgmma that ptxas serialises, so that each product waits for the one before;
    - with Triton before 3.7, wgmma that may still read an operand's registers when the next step writes them;
    - a tile that should be loaded by TMA and is not;
    - a stream that is not moved 16 bytes at a time. A stream is a load or store of at least 16 bytes for every thread
      of the program, so scalars and vectors with one value per channel are none. Tensors of bytes are exempt (pixels
      have three values and may be mirrored; positions in a window are half as wide as the values beside them), and so
      is what UNALIGNED names.
`programs` is the number of programs that fit an SM at once, by their registers and shared memory. `step` counts the
instructions (SASS) of the innermost loops, those with matrix products where there are any, and `outside` the others; a
loop that is unrolled has none. `serialised` has ptxas's warnings of wgmma that wait.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from math import prod
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

import kernels
from benchmarks import report
from benchmarks.instructions import code_of, resource_usage, sass_of
from benchmarks.trace import Launch, compiled, evaluation_calls, launches, meta_step, step_calls
from kernels import conv_shape
from kernels.checks import pitch_of
from kernels.configurations import TABLES, TEST, Configuration, configuration
from kernels.convolution_gradients import USES
from kernels.implementation import INTERPRETED
from kernels.tiles import EARLY
from nvcnn.kernel_choices import CANDIDATES
from nvcnn.models.functions import GRAM
from nvcnn.roofline import CONVOLUTIONS, META, Call, Layout, recorded

CHIPS = (80, 90, 100)
HOPPER = (90, 100)  # the chips with TMA are Hopper and later
# ptxas serialises the persistent programs with a prologue that Triton 3.6 makes. They are no default: tune times them.
PROLOGUES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
BY_TMA, PERSISTENT = "_tiles:tma", f"{'' if PROLOGUES else 'norm=None .*'}R=1 S=1 .* PERSISTENT=264 "
# Programs that walk over tiles hold the next one as well.
WALK = {"PERSISTENT": 264, "BLOCK_OUT": 64, "maxnreg": 255}
GPUS = {"a100": 80, "h100": 90, "h200": 90, "b200": 100}  # a table's name contains the first, which has the second
OTHERS = ("alexnet", "googlenet", "inception3", "vgg16")
# These are bytes per SM, from the table of compute capabilities in the CUDA C++ Programming Guide. Every SM has 64
# warps and 64 Ki registers.
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
COUNTED = re.compile(r"90 convolution\w*\.kernel ")  # whose instructions the short list has
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
FEWEST_WARPS = {80: 1, 90: 4, 100: 4}  # which issue it; a table may have fewer, where products do not count
# trust_ratio reads the sums of one tensor's blocks from the L2 cache, and these begin at any address. So do runs of an
# image's pixels, since a pixel is 3 or 4 values. Once a program, dw leaves the registers in which products left it.
UNALIGNED = re.compile(r"^trust_ratio\.kernel |^convolution_gradients\.kernel | NARROW=[34] ")


def short_calls() -> Iterator[Call]:
    """Yields calls of every kernel in every dtype, and of the options that a run does not use by default."""
    half, bfloat16, single = torch.float16, torch.bfloat16, torch.float32
    for model, dtype in (("resnet18", half), ("resnet18", bfloat16), ("lenet", single)):
        yield from step_calls(model, 32, dtype)
        yield from of_mixed_batches(model, dtype)
    runs = [meta_step("lenet", 32, dtype) for dtype in (half, bfloat16, single)]
    staged = meta_step("lenet", 32, bfloat16, bfloat16_transport=False), meta_step("lenet", 32, half, accumulate=2)
    with recorded() as calls:
        for run in runs:
            run.arena.refresh()
        for larc, mode in ((runs[0].optimizer, "off"), (runs[2].optimizer, "scale")):
            larc.mode, larc.weight_decay = mode, 0.0
            larc.step()
        for larc, mode in zip((run.optimizer for run in runs), ("scale", "clip", "off"), strict=True):
            larc.mode, larc.weight_decay, larc.decay_vectors, larc.clip_norm = mode, 1e-4, False, 1.0
            larc.square_sums = larc.square_sums.new_empty(3, *larc.square_sums.shape)
            larc.step()
        for run in runs:
            arena, larc = run.arena, run.optimizer
            arena.ema_weight, arena.ema_running = torch.empty_like(arena.weight), torch.empty_like(arena.running)
            larc.ema_decay, larc.scalars, larc.decay_vectors = 0.999, larc.scalars.new_empty(4), True
            larc.step()
        for run in staged:  # their gradients are fp32
            run.optimizer.step()
    yield from calls
    for dtype in (half, bfloat16):
        step = step_calls(dtype=dtype, conv="triton")
        yield from most_fused(step)
        yield from (call for call in step if "max_pool" in call.name and call["norm"] is not None)  # of a raw tensor
        if dtype == half:
            yield next(call for call in step if (call["skip_stride"] or 1) > 1)
    yield from most_fused(of_groups(half))
    yield from {call.name: call for call in of_slices(half)}.values()
    few = (64, 512)  # channels: one block, and several
    yield from (call for call in of_gram_matrices(half) if (call["weight"] or call["x"]).shape[1] in few)


def of_mixed_batches(model: str, dtype: torch.dtype) -> list[Call]:
    """Returns the calls of a step that are others where the batch is mixed: the input's and the loss's."""
    calls = step_calls(model, 32, dtype, mixed=True)
    return [call for call in calls if call["mix"] is not None or call["share"] is not None]


def of_gram_matrices(dtype: torch.dtype) -> list[Call]:
    """Returns the calls of ResNet-50's step that have or follow from a Gram matrix."""
    step = step_calls(dtype=dtype, conv=GRAM[0])
    return [call for call in step if "gram" in call.name or (call.name in CONVOLUTIONS and call["a"] is not None)]


def of_both_gradients(dtype: torch.dtype) -> list[Call]:
    """Returns calls of the op that has a kernel for Hopper alone: one for each kernel that a model may launch."""

    def images(channels: int) -> torch.Tensor:
        x = torch.empty(256, channels, 56, 56, dtype=dtype, device=META)
        return x.to(memory_format=torch.channels_last)

    with recorded() as calls:
        for k, c, rectified, adds in USES:
            weight = torch.empty(k, c, 1, 1, dtype=dtype, device=META)
            norm, factors, x_norm = (torch.empty(size, device=META) for size in ((5, k), (2, k), (5, c)))
            through = images(k), norm, factors, x_norm
            skip = images(c) if adds else None
            kernels.convolution_gradients(images(k), images(c), weight, weight, *through, rectified, skip)
    return [call for call in calls if call.name == "nvcnn::convolution_gradients"]


def of_slices(dtype: torch.dtype) -> list[Call]:
    """Returns the calls of Inception v3, in training and evaluation, that write or read a slice of channels."""

    def is_slice(value: Any) -> bool:
        return isinstance(value, Layout) and len(value.shape) == 4 and (pitch_of(value.meta()) or 0) > value.shape[1]

    calls = step_calls("inception3", 128, dtype, "triton") + evaluation_calls("inception3", 128, dtype)
    return [call for call in calls if any(is_slice(value) for _, value in call.arguments)]


def of_groups(dtype: torch.dtype) -> list[Call]:
    """Returns the calls of ResNeXt-50's convolutions that have groups."""
    return [call for call in step_calls("resnext50", dtype=dtype, conv="triton") if (call["groups"] or 1) > 1]


def convolutions_and_poolings(model: str) -> list[Call]:
    """Returns those of a training step with the project's kernels."""
    calls = step_calls(model, 128, conv="triton")
    return [call for call in calls if call.name in CONVOLUTIONS or "max_pool" in call.name]


def most_fused(calls: Iterable[Call]) -> list[Call]:
    """Returns, for each convolution op, its 1 x 1 and its 3 x 3 call with the most tensors.

    These hold the most registers.
    """
    found: dict[tuple[str, int], Call] = {}
    for call in calls:
        if call.name not in CONVOLUTIONS:
            continue
        size = call[CONVOLUTIONS[call.name][1]].shape[3]
        best = found.setdefault((call.name, size), call)
        if len(tensors(call)) > len(tensors(best)):
            found[call.name, size] = call
    return [call for (_, size), call in found.items() if size <= 3]


def tensors(call: Call) -> list[str]:
    return [name for name, value in call.arguments if isinstance(value, Layout)]


def with_choices(calls: Iterable[Call], pattern: str, chips: Iterable[int], **choices: int) -> Counter[Launch]:
    """Returns the launches of convolutions whose configuration has these choices, and how often they occur.

    Only launches whose name matches the pattern are returned.
    """

    def configured(*arguments: Any) -> Configuration:
        config = configuration(*arguments)
        return {**config, **{name: value for name, value in choices.items() if name in config}}

    found: Counter[Launch] = Counter()
    with mock.patch.object(conv_shape, "configuration", configured):
        for call, count in Counter(call for call in calls if call.name in CONVOLUTIONS).items():
            for chip in chips:
                with suppress(ValueError):  # raised where no descriptor is possible
                    found.update(dict.fromkeys(launches(call, chip), count))
    return Counter({launch: count for launch, count in found.items() if re.search(pattern, launch.name)})


def counted(calls: Iterable[Call], chip: int, table: str = "") -> Counter[Launch]:
    """Returns the launches of the project's own ops, and how often they occur."""
    found: Counter[Launch] = Counter()
    for call, count in Counter(calls).items():
        if call.name.startswith("nvcnn::"):
            for launch in launches(call, chip, table):
                found[launch] += count
    return found


def all_launches(which: str) -> Counter[Launch]:
    """Returns every distinct launch, and how often it occurs in ResNet-50's step."""
    found: Counter[Launch] = Counter()
    tables = [(chip_of(file.stem), file.stem) for file in TABLES.glob("*.json") if file.stem != TEST]
    if which == "all":
        for dtype in (torch.float16, torch.bfloat16):
            step = [call for conv in ("torch", *CANDIDATES) for call in step_calls(dtype=dtype, conv=conv)]
            others = evaluation_calls(dtype=dtype) + of_groups(dtype)
            for chip, table in [(chip, "") for chip in CHIPS] + tables:
                found |= counted(step, chip, table)
                found.update(dict.fromkeys(counted(others, chip, table), 0))
            found |= with_choices(step, BY_TMA, HOPPER, TMA=1)
            found |= with_choices(most_fused(step), PERSISTENT, HOPPER, TMA=1, **WALK)
            found.update(dict.fromkeys(counted(of_both_gradients(dtype), 90), 0))
        for model in OTHERS:
            found.update(dict.fromkeys(counted(convolutions_and_poolings(model), 90), 0))
        found.update(dict.fromkeys(counted(of_slices(torch.float16), 90), 0))
    step = [call for conv in CANDIDATES for call in step_calls(conv=conv)]
    for chip, table in tables:
        found.update(dict.fromkeys(counted(step, chip, table).keys() - counted(step, chip).keys(), 0))
    short = list(short_calls())
    for chip in CHIPS:
        found.update(dict.fromkeys(counted(short, chip), 0))
    found.update(dict.fromkeys(counted(of_both_gradients(torch.float16), 90), 0))
    found.update(dict.fromkeys(with_choices(short, f"fp16.*{BY_TMA}", HOPPER, TMA=1), 0))
    found.update(dict.fromkeys(with_choices(short, f"bf16.*{PERSISTENT}", (90,), TMA=1, **WALK), 0))
    return found


def chip_of(table: str) -> int:
    """Returns the chip of a table's GPU. Raises ValueError if it is none of GPUS."""
    for gpu, chip in GPUS.items():
        if gpu in table:
            return chip
    raise ValueError(f"kernels/configs/{table}.json: its name must contain one of {', '.join(GPUS)}")


def compile_launch(launch: Launch, calls: int = 0, counts: bool = True) -> dict[str, Any]:
    """Returns one row of the table. Its `breach` is empty if there is none.

    counts: of instructions, whose SASS takes longer than the compiler takes for a small kernel.
    """
    kernel = compiled(launch)
    ptx, ttgir = kernel.asm["ptx"], kernel.asm["ttgir"]
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers, spills = resource_usage(kernel.asm["cubin"])
    accesses = accesses_of(ptx)
    programs = programs_an_sm(launch.chip, registers, shared, warps)
    matrix = next(iter(re.findall("|".join(MATRIX.values()), ptx)), "-")
    breaches = [f"{spills} bytes of spills"] if spills else []
    if not programs:
        breaches.append("does not fit an SM")
    halves = re.search(r"tt\.dot .*xb?f16>", kernel.asm.get("ttir", ""))
    if halves and matrix != MATRIX[launch.chip] and warps >= FEWEST_WARPS[launch.chip]:
        breaches.append(f"multiplies matrices without {MATRIX[launch.chip]}")
    warnings = serialised(ptx) if matrix == "wgmma" else []
    if warnings:
        breaches.append(f"wgmma serialised ({', '.join(warnings)})")
    if EARLY.value and written_early(ttgir):
        breaches.append("registers are written while wgmma reads them")
    code = code_of(sass_of(kernel.asm["cubin"]), warps) if counts else None
    loads_by_tma = "cp.async.bulk.tensor" in ptx
    if "_tiles:tma" in launch.name and not loads_by_tma:
        breaches.append("loads tiles without TMA")
    for place in [] if UNALIGNED.search(launch.name) else sorted(streams(ttgir, warps * 32)):
        width = min((width for _, width, at in accesses if at == place), default=0)
        if width < 16:
            breaches.append(f"{width} bytes at a time at {place}")
    return {
        "name": launch.name,
        "function": kernel.metadata.name,
        "chip": f"sm_{launch.chip}",
        "calls": calls,
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "load": max((width for verb, width, _ in accesses if verb != "st"), default=0),
        "store": max((width for verb, width, _ in accesses if verb == "st"), default=0),
        "matrix": matrix,
        "tma": "yes" if loads_by_tma else "-",
        "programs": programs,
        "step": code.inner or "-" if code else "-",
        "outside": code.outside + code.around + code.jumped if code else "-",
        "serialised": " ".join(warnings) or "-",
        "breach": "; ".join(breaches),
    }


def streams(ttgir: str, threads: int) -> set[str]:
    """Returns the places where tensors of at least 16 bytes a thread are loaded or stored.

    A place is file:line:column, followed by "in" and the caller's, where it is inlined.
    """
    locations = dict(re.findall(r"^(#loc\d*) = (.*)$", ttgir, flags=re.MULTILINE))

    def place(location: str) -> str:
        """Returns the place that a name stands for; for inlined code, its own place and the caller's."""
        text = locations[location]
        if found := re.search(r'([^/"]+)":(\d+:\d+)', text):
            return f"{found[1]}:{found[2]}"
        parts = re.findall(r"#loc\d*", text)
        return " in ".join(map(place, parts if "callsite" in text else parts[:1]))

    operation = r"(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local) "
    tensors = re.findall(operation + r".*?: tensor<([\dx]+)x!tt\.ptr<\D+(\d+).*loc\((#loc\d*)\)", ttgir)
    return {
        place(location)
        for shape, bits, location in tensors
        if int(bits) > 8 and prod(map(int, shape.split("x"))) * int(bits) // 8 >= 16 * threads
    }


def accesses_of(ptx: str) -> list[tuple[str, int, str]]:
    """Returns each access to global memory: ld, st or cp.async, bytes per thread, and its place, as in `streams`."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) ".*?([^/"]+)"', ptx, flags=re.MULTILINE))
    places: dict[str, str] = {}
    found, place, inlined, right = [], "", False, True
    for line in ptx.splitlines():
        if edge := re.search(r"// (begin|end) inline asm", line):
            inlined, right = edge[1] == "begin", True
        elif location := re.search(r"\.loc\s+(\d+ \d+ \d+)(?:.* inlined_at (\d+ \d+ \d+))?\s*// (.*)", line):
            if right:
                here = re.findall(r"[^\s\[]+:\d+:\d+", location[3])
                if location[2] and len(here) == 1:  # Triton 3.9 names the caller by the number of its file
                    file, *at = location[2].split()
                    here.append(places.get(location[2], ":".join((files[file], *at))))
                place = places[location[1]] = " in ".join(here)
            right = not inlined  # Triton 3.9 counts on from the first place with each line of inline assembly
        elif access := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", line):
            found.append((access[1], int(access[2] or 1) * int(access[3]) // 8, place))
        elif access := re.search(r"\b(cp\.async)\.c[ag]\.shared\.global\S* .*?\], \[.*?\], (\w+)", line):
            found.append((access[1], int(access[2], 0), place))
    return found


def serialised(ptx: str) -> list[str]:
    """Returns the warnings by which ptxas says that wgmma will wait for each other: C7514, C7515 and their like."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"C75\d\d", run.stderr)))


def written_early(ttgir: str) -> bool:
    """Returns whether a loop has a product with an operand in registers for which its last wait does not wait."""
    for loop in re.findall(r"scf\.for .*?\n(.*?)scf\.yield", ttgir, flags=re.DOTALL):
        in_registers = re.search(r"ttng\.warp_group_dot .*?: tensor<", loop)
        waits = re.findall(r"ttng\.warp_group_dot_wait .*?pendings = (\d+)", loop)
        if in_registers and (not waits or int(waits[-1])):
            return True
    return False


def programs_an_sm(chip: int, registers: int, shared: int, warps: int) -> int:
    """Returns how many programs fit an SM.

    A warp takes registers in units of 256, from one of four files. CUDA keeps 1 KiB of shared memory for each program.
    """
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = SHARED_MEMORY[chip] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only launches whose name contains it")
    parser.add_argument("--list", choices=("short", "all"), default="all", help="what is compiled (all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--workers", type=int, default=2, help="compilers at a time (2)")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    names = arguments.names or [""]
    jobs = [item for item in all_launches(arguments.list).items() if any(name in item[0].name for name in names)]
    if not jobs:
        parser.error(f"no launch's name contains {' or '.join(names)}")
    with ProcessPoolExecutor(arguments.workers) as pool:
        counts = [
            arguments.list == "all" or COUNTED.match(f"{launch.chip} {launch.name}") is not None for launch, _ in jobs
        ]
        made = pool.map(compile_launch, *zip(*jobs, strict=True), counts)
        rows = sorted(made, key=lambda row: (row["name"], row["chip"]))
    if arguments.json:
        report.write(arguments.json, "codegen", rows)
    print(report.table([{key: value for key, value in row.items() if key != "function"} for row in rows]))
    return 1 if any(row["breach"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
