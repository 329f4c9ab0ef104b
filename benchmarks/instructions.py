"""Counts what a program of a compiled kernel does: instructions in its SASS; bytes, FLOPs and turns in Triton's IR.

SASS says how many instructions a loop has, but not how often it runs. Triton's IR says that: the bounds of its loops
follow from a launch's sizes and the program's number, and are computed here.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import triton

BARRIER = 4  # instructions at most of a loop that only waits for a barrier
ANY_PRODUCT = re.compile(r"\b(?:[HIQ]G?MMA|UTC\w*MMA)\b")
# A product's shape in SASS: wgmma's is that of four warps together, mma.sync's that of each.
PRODUCT = re.compile(r"\b(?:[HQ]GMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16|8)\b)")


class Code(NamedTuple):
    """Instructions as they stand in the code, and the FLOPs of one run of them by all warps."""

    inner: int  # in the innermost loops: those with matrix products, where there are any
    jumped: int  # of an inner loop, but jumped over by some turns: the end of a tile
    around: int  # in a loop around an inner one
    outside: int
    inner_flops: int
    outside_flops: int
    loops: int  # the inner ones


@dataclass
class Loop:
    turns: float  # in all
    parent: int | None  # which loop is around it
    flops: float = 0.0  # of a turn, without those of loops in it


@dataclass
class Work:
    """What one program does from begin to end."""

    bytes: float = 0.0  # of tiles loaded and stored
    flops: float = 0.0
    steps: float = 0.0  # turns of the inner loops
    tiles: float = 1.0  # turns of the loop around them


def cuobjdump(cubin: bytes, what: str) -> str:
    """Returns what the tool, which is Triton's, prints of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Returns the registers and the spilled bytes per thread."""
    usage = cuobjdump(cubin, "--dump-resource-usage")
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)
    return int(registers), int(stack) + int(local)


def sass_of(cubin: bytes) -> str:
    return cuobjdump(cubin, "--dump-sass")


def code_of(sass: str, warps: int) -> Code:
    """Counts the instructions up to the last EXIT. What is behind it only waits, where a barrier is not there yet."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", sass, flags=re.MULTILINE)
    lines = {int(at, 16): text for at, text in found if not re.search(r"\bNOP\b", text)}
    end = max((at for at, text in lines.items() if "EXIT" in text), default=0)
    lines = {at: text for at, text in lines.items() if at <= end}
    jumps = [(at, int(to[1], 16)) for at, text in lines.items() if (to := re.search(r"\bBRA\b.*?\b0x([\da-f]+)", text))]

    def within(loop: tuple[int, int]) -> list[str]:
        return [text for at, text in lines.items() if loop[0] <= at <= loop[1]]

    def multiplies(loop: tuple[int, int]) -> bool:
        return any(map(ANY_PRODUCT.search, within(loop)))

    def contains(outer: tuple[int, int], other: tuple[int, int]) -> bool:
        return outer != other and outer[0] <= other[0] and other[1] <= outer[1]

    loops = {(to, at) for at, to in jumps if to < at and len(within((to, at))) > BARRIER}
    loops = {loop for loop in loops if "EXIT" not in within(loop)}
    chosen = set(filter(multiplies, loops)) or loops
    inner = {loop for loop in chosen if not any(contains(loop, other) for other in chosen)}
    around = {loop for loop in loops if any(contains(loop, other) for other in inner)}
    skips = [(at + 1, to - 1) for at, to in jumps if at < to and not multiplies((at, to - 1))]
    jumped = [skip for skip in skips if any(contains(loop, skip) for loop in inner)]
    places = (inner, jumped, around)
    counts, flops = [0, 0, 0, 0], [0, 0]
    for at, text in lines.items():
        is_inner, is_jumped, is_around = (any(a <= at <= b for a, b in place) for place in places)
        counts[(1 if is_jumped else 0) if is_inner else 2 if is_around else 3] += 1
        if shape := PRODUCT.search(text):
            issuers = warps if shape[4] else max(1, warps // 4)
            flops[not is_inner] += 2 * prod(int(size) for size in shape.groups() if size) * issuers
    return Code(*counts, *flops, len(inner))  # type: ignore[call-arg]


def bytes_of_type(text: str) -> int:
    """Returns the bytes of the first tensor in an operation's type, or of what its pointers point to."""
    found = re.search(r"tensor<([\dx]+)x(?:!tt\.ptr<)?\w*?(\d+)", text)
    return prod(map(int, found[1].split("x"))) * max(1, int(found[2]) // 8) if found else 0


INTEGERS: dict[str, Callable[..., int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: a // b if b else 0,
    "arith.remsi": lambda a, b: a % b if b else 0,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.andi": lambda a, b: a & b,
    "arith.extsi": lambda a: a,
    "arith.trunci": lambda a: a,
    "arith.select": lambda a, b, c: b if a else c,
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def work_of(ttir: str, sizes: Mapping[str, int], program: Sequence[int], grid: Sequence[int]) -> Work:
    """Returns the work of the program of that number. Both branches of a condition count, and masked values.

    sizes: the launch's integers, by the kernel's names. Raises ValueError for a loop whose bounds do not follow.
    """
    values: dict[str, int | None] = {f"%{name}": size for name, size in sizes.items()}
    work, loops = Work(), list[Loop]()
    regions: list[tuple[float, int | None]] = [(1.0, None)]  # how often the lines run, and in which loop
    for line in ttir.splitlines():
        result, operation = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(.*?)(?: loc\(#loc\d*\))?$", line).groups()  # type: ignore[union-attr]
        times, loop = regions[-1]
        name, _, rest = operation.partition(" ")
        if operation.startswith("}"):
            if not operation.endswith("{"):  # else another branch begins
                regions.pop()
        elif name == "scf.for":
            variable, *bounds = re.match(r"(%\w+) = (\S+) to (\S+) step (\S+)", rest).groups()  # type: ignore[union-attr]
            first, last, step = map(values.get, bounds)
            if first is None or last is None or step is None:
                raise ValueError(f"bounds do not follow from the sizes: {operation}")
            values[variable] = first
            turns = times * max(0, -((first - last) // step))
            regions.append((turns, len(loops)))
            loops.append(Loop(turns, loop))
        elif operation.endswith(("{", "({")):
            regions.append((times, loop))
        elif name in ("tt.load", "tt.descriptor_load", "tt.store", "tt.descriptor_store"):
            work.bytes += times * bytes_of_type(rest.split(" : ")[-1].split(" -> ")[-1])
        elif name == "tt.dot":
            (m, k), (_, n) = re.findall(r"tensor<(\d+)x(\d+)x", rest)[:2]
            flops = 2 * int(m) * int(n) * int(k)
            work.flops += times * flops
            if loop is not None:
                loops[loop].flops += flops
        elif result and "tensor" not in rest:
            words = rest.split(" : ")[0].replace(",", "").split()
            known = [values.get(word) for word in words]
            if name == "arith.constant":
                values[result] = (
                    int(words[0]) if re.fullmatch(r"-?\d+", words[0]) else {"true": 1, "false": 0}.get(words[0])
                )
            elif name in ("tt.get_program_id", "tt.get_num_programs"):
                values[result] = (*(program if "id" in name else grid), 1, 1)["xyz".index(words[0])]
            elif name == "arith.cmpi" and None not in known[1:]:
                values[result] = COMPARISONS[words[0]](*known[1:])  # type: ignore[arg-type]
            elif name in INTEGERS and None not in known:
                values[result] = INTEGERS[name](*known)
    inner = [loop for loop in loops if loop.flops] or loops
    work.steps = sum(loop.turns for loop in inner)
    work.tiles = max((loops[loop.parent].turns for loop in inner if loop.parent is not None), default=1.0)
    return work


def executed(code: Code, work: Work) -> float:
    """Returns how many instructions each warp of the program executes: as many turns as its products need."""
    turns = (
        (work.flops - code.outside_flops) / code.inner_flops if code.inner_flops else work.steps / max(code.loops, 1)
    )
    turns = max(turns, 0)
    jumped = work.tiles if work.tiles > 1 else turns
    return code.outside + code.around * work.tiles + code.jumped * jumped + code.inner * turns
