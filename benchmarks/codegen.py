"""Every kernel configuration compiled for GPUs that need not be here: registers, shared memory, spills, widths.

python -m benchmarks.codegen [--json FILE] [NAME ...]    variants whose name contains a NAME, or all; exit 1 on a breach

A breach is a spill, or a stream (a tensor of which a program touches BLOCK elements) that is not read or written with
16 bytes an instruction. Occupancy is the share of an SM's warps that registers and shared memory leave room for.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import report
from kernels.blocks import BLOCK
from kernels.implementation import INTERPRETED

CHIPS = (80, 90, 100)  # A100, H100 and H200, B200
# Per SM, from the table of compute capabilities in the CUDA C++ Programming Guide; all have 64 warps, 64 Ki registers.
SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}

# The types of arguments by name; all others are *fp32 unless a variant says otherwise.
TYPES = {"counters": "*i64", "first_block": "*i32", "tensor_of_block": "*i32"}
TYPES |= dict.fromkeys(("matrix_blocks", "blocks", "statistics", "tensors", "steps", "ranks", "growth_interval"), "i32")
TYPES |= dict.fromkeys(("momentum_factor", "weight_decay", "statistics_momentum", "eta"), "fp32")


@dataclass(frozen=True)
class Variant:
    """One configuration of a kernel. `reads` and `writes` name its streams."""

    op: str
    label: str
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    kernel: str = "kernel"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}: {self.label}"


def variants() -> Iterator[Variant]:
    for dtype, decay in product(("fp16", "bf16", "fp32"), (True, False)):
        yield Variant(
            "gradient_statistics",
            f"{dtype}, {'with' if decay else 'no'} decay",
            {"DECAY": decay, "BLOCK": BLOCK},
            {"matrix_gradient": f"*{dtype}"},
            reads=("matrix_gradient", "vector_gradient", *(("weight",) if decay else ())),
        )
    for mode in ("off", "clip", "scale"):
        yield Variant("trust_ratio", mode, {"MODE": mode})
    # The dtypes of gradient and model weight; fp32 gradients of a bf16 model are a transport's staging.
    for gradient, model in (("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
        copy = () if model == "fp32" else ("model_weight",)
        yield Variant(
            "larc_update",
            f"{gradient} gradient, {model} model",
            {"BLOCK": BLOCK} | ({} if copy else {"model_weight": None}),
            {"matrix_gradient": f"*{gradient}", "model_weight": f"*{model}"},
            reads=("matrix_gradient", "vector_gradient", "weight", "momentum"),
            writes=("weight", "momentum", *copy),
        )
    for model in ("fp16", "bf16", "fp32"):
        copy = () if model == "fp32" else ("model_weight",)
        yield Variant(
            "larc_update",
            f"refresh, {model} model",
            {"BLOCK": BLOCK} | ({} if copy else {"model_weight": None}),
            {"model_weight": f"*{model}"},
            kernel="refresh_kernel",
            reads=("weight",),
            writes=copy,
        )


def compile_variant(variant: Variant, chip: int) -> dict[str, Any]:
    """One row of the table, with `layout` (that of the last reduction) and `breach` (empty if there is none)."""
    module = import_module(f"kernels.{variant.op}")
    kernel, names = getattr(module, variant.kernel), getattr(module, variant.kernel).arg_names
    options = {k: v for k, v in module.CONFIG.items() if k not in names}
    constants = {k: v for k, v in module.CONFIG.items() if k in names} | variant.constants
    types = {name: (TYPES | variant.types).get(name, "*fp32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")},
        ),
        target=GPUTarget("cuda", chip, 32),
        options=options,
    )
    ptx, warps, shared = compiled.asm["ptx"], compiled.metadata.num_warps, compiled.metadata.shared
    registers, spills = resource_usage(compiled.asm["cubin"])
    breaches = [f"{spills} bytes of spills"] if spills else []
    for verb, streams in (("ld", variant.reads), ("st", variant.writes)):
        wide = sum(width for width in access_widths(ptx, verb) if width >= 16) * warps * 32
        needed = BLOCK * sum(bits(types[name]) // 8 for name in streams)
        if wide < needed:
            breaches.append(f"{verb}: {wide} of {needed} bytes by 16")
    return {
        "name": variant.name,
        "chip": f"sm_{chip}",
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "load": max(access_widths(ptx, "ld"), default=0),
        "store": max(access_widths(ptx, "st"), default=0),
        "matrix": next(iter(re.findall(r"wgmma|tcgen05\.mma|mma\.sync", ptx)), "-"),
        "occupancy": f"{occupancy(chip, registers, shared, warps):.0%}",
        "breach": "; ".join(breaches),
        "layout": reduction_layout(compiled.asm["ttgir"]),
    }


def bits(pointer: str) -> int:
    return int(re.sub(r"\D", "", pointer))


def access_widths(ptx: str, verb: str) -> list[int]:
    """Bytes per thread of every global load (ld) or store (st)."""
    found = re.findall(rf"\b{verb}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return [int(vector or 1) * int(size) // 8 for vector, size in found]


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, bytes spilled per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage.stdout)
    return int(registers), int(stack) + int(local)


def occupancy(chip: int, registers: int, shared: int, warps: int) -> float:
    """Share of the 64 warps of an SM: registers come in units of 256 a warp, from four files; 1 KiB shared is kept."""
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = SHARED_MEMORY[chip] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def reduction_layout(ttgir: str) -> list[str]:
    """The layouts in which the last reduction's elements are held: they decide the order of its sum."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ttgir, flags=re.MULTILINE))
    reshapes = re.findall(r"tt\.reshape .*?, (#\w+)> -> tensor<\w+, (#\w+)>", ttgir)
    return [layouts[name] for name in reshapes[-1]] if reshapes else []


def compile_all(names: list[str], workers: int) -> list[dict[str, Any]]:
    """The rows of all variants whose name contains one of `names` (none: of all), for every chip."""
    chosen = [v for v in variants() if not names or any(name in v.name for name in names)]
    jobs = list(product(chosen, CHIPS))
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_variant, *zip(*jobs, strict=True))) if jobs else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only variants whose name contains it")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--workers", type=int, default=2, help="compilers at a time (2)")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    rows = compile_all(arguments.names, arguments.workers)
    if not rows:
        parser.error(f"no variant's name contains {' or '.join(arguments.names)}")
    if arguments.json:
        report.write(arguments.json, "codegen", rows)
    print(report.table([{key: value for key, value in row.items() if key != "layout"} for row in rows]))
    return 1 if any(row["breach"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
