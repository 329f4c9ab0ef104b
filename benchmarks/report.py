"""Formats what benchmarks print, a table, and writes {"machine", "versions", "command", "rows"} as JSON."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from nvcnn.machine import versions

FILES = "--json", "--out"  # options that say where something is written


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows, which share their keys, as text under a header line."""
    if not rows:
        return "no rows"
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the rows, which share their keys, as a table of Markdown."""
    cells = [list(rows[0]), *([str(value).replace("|", "\\|") for value in row.values()] for row in rows)]
    head, *lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


def command(name: str, arguments: list[str]) -> str:
    """Returns what a shell takes to measure again, without the files of this machine that it wrote to."""
    words, kept = iter(arguments), ["python", "-m", f"benchmarks.{name}"]
    for word in words:
        if not word.startswith(FILES):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return shlex.join(kept)


def write(file: str, name: str, rows: list[dict[str, Any]], **machine: Any) -> None:
    """Writes the rows, with what ran and on what, to a JSON file, whole or not at all.

    machine: what else is known of the machine.
    """
    cores = len(os.sched_getaffinity(0))
    content = {
        "machine": {"processor": processor(), "cores": cores, "system": platform.platform()} | machine,
        "versions": versions(),
        "command": command(name, sys.argv[1:]),
        "rows": rows,
    }
    part = Path(f"{file}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def write_page(file: Path, title: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Writes the rows as a page of Markdown, with what ran and on what."""
    ran = ", ".join(f"{package} {version}" for package, version in versions().items())
    where = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    file.write_text(f"# {title}\n\n`{command(name, sys.argv[1:])}`, {ran}; {where}\n\n{markdown(rows)}\n")
