"""Makes the rows by which benchmarks report what `nvcnn.timing` measures: ratios of each round, medians of all."""

from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from nvcnn.timing import Step, alternate, captured, milliseconds, repeated, sets

__all__ = [
    "Step",
    "alternate",
    "captured",
    "milliseconds",
    "missing",
    "repeated",
    "row",
    "sets",
    "shown",
    "significant",
]


def row(
    name: str, unit: str, ours: list[float], peer: list[float], *, images: float = 0, note: str = ""
) -> dict[str, Any]:
    """Returns a row of the report, from the milliseconds of both contenders in the same rounds.

    unit: ms, us, images/s or MB/s. images: how many images, or MB, a step has.
    The row has medians over the rounds; its `ratio` says how many times faster ours is, and `spread` has the quartiles
    of that.
    """
    factor: Callable[[float], float] = {
        "ms": lambda ms: ms,
        "us": lambda ms: ms * 1e3,
        "images/s": lambda ms: images / ms * 1e3,
        "MB/s": lambda ms: images / ms * 1e3,
    }[unit]
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    low, _, high = quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return {
        "name": name,
        "ours": significant(factor(median(ours))),
        "peer": significant(factor(median(peer))),
        "unit": unit,
        "ratio": significant(median(ratios)),
        "spread": f"{significant(low)} - {significant(high)}",
        "note": note,
    }


def missing(name: str, unit: str, why: BaseException | str) -> dict[str, Any]:
    """Returns the row of a peer that cannot be measured."""
    note = reason(why) if isinstance(why, BaseException) else why[:200]
    return {"name": name, "ours": None, "peer": None, "unit": unit, "ratio": None, "spread": "", "note": note}


def reason(error: BaseException) -> str:
    """Returns the error as one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def lost(error: BaseException) -> bool:
    """Returns whether the GPU answers this process no more, so that whatever follows would fail, too."""
    words = "illegal", "unspecified launch failure", "misaligned address", "device-side assert"
    return any(word in str(error) for word in words)


def significant(value: float) -> float:
    """Returns the value with four digits, as no measurement here has more."""
    return float(f"{value:.4g}")


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows for a table, with a dash for what was not measured."""
    return [{key: "-" if value is None else value for key, value in row.items()} for row in rows]
