"""What an evaluation says of each class: accuracy, what is taken for what, the worst mistakes, as one HTML file.

A `Tally` goes along with an evaluation, on each rank over its own images. `findings` joins them.
"""

import base64
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvcnn.data.pillow import require_pillow
from nvcnn.data.shard_source import atomic_writer
from nvcnn.program import InputError

MISTAKES = 24  # pictures
MATRIX = 40  # classes: of more, a matrix has cells too small to read
PAIRS = 100  # of classes that are confused; beside a matrix a few do
PAIRS_BESIDE = 20


class Mistake(NamedTuple):
    """An image that was taken for another class. Sorts by probability, the highest first."""

    minus_probability: float
    image: int  # of the split
    label: int
    predicted: int
    picture: Tensor  # (H, W, 3) uint8


class Tally:
    """The labels of a rank's images and what they were taken for, -1 if a logit is not finite; its worst mistakes.

    first: the number of the rank's first image in the split. mistakes: how many to keep.
    """

    def __init__(self, first: int, mistakes: int):
        self.next, self.most = first, mistakes
        self.labels: list[int] = []
        self.predicted: list[int] = []
        self.mistakes: list[Mistake] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor, best: Tensor) -> None:
        """images: (N, H, W, 3) uint8. labels, best: (N,), the right classes and those of the largest logits."""
        predicted = torch.where(logits.isfinite().all(1), best, -1)
        are, taken = labels.tolist(), predicted.tolist()
        if self.most:
            probability = logits.double().softmax(1).gather(1, best[:, None])[:, 0]
            wrong = torch.where((predicted != labels) & (predicted >= 0), probability, 0.0)
            for value, i in zip(*(t.tolist() for t in wrong.topk(min(self.most, len(are)))), strict=True):
                if value > 0:  # a copy, which does not hold the whole batch
                    self.mistakes.append(Mistake(-value, self.next + i, are[i], taken[i], images[i].clone().cpu()))
            self.mistakes = sorted(self.mistakes)[: self.most]
        self.labels += are
        self.predicted += taken
        self.next += len(labels)


@dataclass(frozen=True)
class ClassRow:
    """What was found of a class. called: images that were taken for it. pair: what it is most often taken for."""

    name: str
    images: int
    right: int
    called: int
    pair: "Pair | None"

    @property
    def top1(self) -> float:
        return 100 * self.right / self.images if self.images else math.nan

    @property
    def precision(self) -> float:
        return 100 * self.right / self.called if self.called else math.nan


class Pair(NamedTuple):
    """Images of a class that were taken for another one."""

    images: int
    label: int
    predicted: int


@dataclass(frozen=True)
class Findings:
    """What all ranks found: a row for each class, pairs that are confused, the most first, and mistakes."""

    classes: list[ClassRow]
    pairs: list[Pair]
    mistakes: list[Mistake]
    not_finite: int

    def as_json(self) -> list[dict[str, Any]]:
        """Returns accuracy by class, in the order of their numbers."""
        return [
            {"class": row.name, "images": row.images, "top1": row.top1 if row.images else None} for row in self.classes
        ]


def findings(tallies: Sequence[Tally], names: Sequence[str] | None, num_classes: int) -> Findings:
    """Joins what the ranks found. names: of the classes; None: not known."""
    labels = torch.tensor([label for tally in tallies for label in tally.labels], dtype=torch.int64)
    predicted = torch.tensor([label for tally in tallies for label in tally.predicted], dtype=torch.int64)
    finite, right = predicted >= 0, predicted == labels
    confused = labels[finite & ~right] * num_classes + predicted[finite & ~right]
    codes, counts = (values.tolist() for values in confused.unique(return_counts=True))
    pairs = [Pair(count, *divmod(code, num_classes)) for code, count in zip(codes, counts, strict=True)]
    pairs.sort(key=lambda pair: (-pair.images, pair.label, pair.predicted))
    most = {pair.label: pair for pair in reversed(pairs)}
    images, hits, called = (
        part.bincount(minlength=num_classes).tolist() for part in (labels, labels[right], predicted[finite])
    )
    rows = [
        ClassRow(names[n] if names else f"class {n}", images[n], hits[n], called[n], most.get(n))
        for n in range(num_classes)
    ]
    mistakes = sorted(mistake for tally in tallies for mistake in tally.mistakes)
    return Findings(rows, pairs, mistakes[:MISTAKES], int((~finite).sum()))


def by_accuracy(classes: Iterable[ClassRow]) -> list[ClassRow]:
    """Returns the classes that have images, the worst first."""
    return sorted((row for row in classes if row.images), key=lambda row: row.top1)


def percent(value: float, digits: int = 1) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f} %"


def taken_for(row: ClassRow, found: Findings) -> str:
    """Returns what a class is most often taken for, with how often; nothing if it never is."""
    if row.pair is None:
        return ""
    return f"{found.classes[row.pair.predicted].name} ({percent(100 * row.pair.images / row.images)})"


def table(found: Findings) -> list[str]:
    """Returns lines for a terminal, the worst class last, where they are seen."""
    rows = by_accuracy(found.classes)[::-1]
    width = min(40, max(len(row.name) for row in rows))
    lines = [f"{'Top-1':>9} {'Precision':>9} {'Images':>7}  {'Class':{width}}  Most often taken for"]
    for row in rows:
        numbers = f"{percent(row.top1, 2):>9} {percent(row.precision, 2):>9} {row.images:7d}"
        lines.append(f"{numbers}  {row.name:{width}}  {taken_for(row, found)}".rstrip())
    return lines


def check_directory(directory: Path) -> None:
    """Raises InputError unless a report can be written there, before an hour of evaluation. Makes nothing."""
    require_pillow()
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--report={directory}: {there} is a file: give a directory")
    if not os.access(there, os.W_OK):
        raise InputError(f"--report={directory}: {there} cannot be written to: give another")


def write(directory: Path, found: Findings, facts: dict[str, str], name_of: Callable[[int], str]) -> Path:
    """Writes `report.html`, whole or not at all. name_of: returns the file and record of an image of the split."""
    path = directory / "report.html"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path) as file:
            file.write(page(found, facts, name_of).encode("utf-8", "xmlcharrefreplace"))
    except OSError as error:
        raise InputError(f"--report={directory}: cannot be written ({error.strerror}): give another") from None
    return path


def page(found: Findings, facts: dict[str, str], name_of: Callable[[int], str]) -> str:
    """Returns the report as one HTML file that needs no other. All text that is not from here is escaped."""
    names = [escape(row.name) for row in found.classes]
    figures = [figure(mistake, names, escape(name_of(mistake.image))) for mistake in found.mistakes]
    parts = [
        table_of([(escape(key), escape(value)) for key, value in facts.items()], "facts"),
        f"<p class=bad>{found.not_finite} images gave logits that are not finite: taken for no class.</p>"
        if found.not_finite
        else "",
        "<h2>Classes</h2>",
        "<p>Top-1: of the images of a class, the share taken for it. Precision: of the images taken for it, the share "
        "that is of it. A click on a heading sorts.</p>",
        class_table(found),
        *(matrix(found, names) if len(names) <= MATRIX else []),
        "<h2>Classes most often confused</h2>",
        pair_table(found, names),
        "<h2>Most confident mistakes</h2>",
        "<p>As the network sees them: what it is, and what it was taken for with which probability.</p>",
        f"<div class=pictures>{''.join(figures) or 'None.'}</div>",
    ]
    return PAGE.format(style=STYLE, body="\n".join(parts), script=SCRIPT)


def class_table(found: Findings) -> str:
    rows: list[list[Cell]] = [
        [
            escape(row.name),
            (row.images, str(row.images)),
            (row.top1, bar(row.top1)),
            (row.precision, bar(row.precision)),
            escape(taken_for(row, found)),
        ]
        for row in by_accuracy(found.classes)
    ]
    missing = len(found.classes) - len(rows)
    note = f"<p>{missing} classes without images are left out.</p>" if missing else ""
    return note + table_of(rows, "sortable", ("Class", "Images", "Top-1", "Precision", "Most often taken for"))


def pair_table(found: Findings, names: Sequence[str]) -> str:
    shown = found.pairs[: PAIRS_BESIDE if len(names) <= MATRIX else PAIRS]
    rows: list[list[Cell]] = []
    for pair in shown:
        share = 100 * pair.images / found.classes[pair.label].images
        images = pair.images, str(pair.images)
        rows.append([names[pair.label], names[pair.predicted], images, (share, bar(share))])
    note = f"<p>{len(shown)} of {len(found.pairs)} pairs.</p>"
    return note + table_of(rows, "sortable", ("It is", "Taken for", "Images", "Of the class"))


Cell = str | tuple[float, str]  # HTML, or a number to sort by with its HTML


def table_of(rows: Sequence[Sequence[Cell]], kind: str, heads: Sequence[str] = ()) -> str:
    """Returns a table; a cell with a number is aligned to the right."""

    def cell(value: Cell) -> str:
        if isinstance(value, str):
            return f"<td>{value}</td>"
        return f'<td class=number data-value="{-1 if math.isnan(value[0]) else value[0]}">{value[1]}</td>'

    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in heads)}</tr></thead>" if heads else ""
    body = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table class={kind}>{head}<tbody>\n{body}\n</tbody></table>"


def bar(value: float) -> str:
    """Returns a percentage before a bar of that length."""
    return f'<span class=bar style="--share:{0 if math.isnan(value) else value:.2f}%">{percent(value)}</span>'


def matrix(found: Findings, names: Sequence[str]) -> list[str]:
    counts = {(pair.label, pair.predicted): pair.images for pair in found.pairs}
    counts |= {(n, n): row.right for n, row in enumerate(found.classes)}

    def cell(label: int, predicted: int) -> str:
        count = counts.get((label, predicted), 0)
        if not count:
            return "<td></td>"
        images = found.classes[label].images
        hue = "right" if label == predicted else "wrong"
        tip = f"{names[label]} taken for {names[predicted]}: {count} of {images}"
        return f'<td class={hue} style="--share:{count / images:.3f}" title="{tip}">{count}</td>'

    numbers = range(len(names))
    head = "".join(f"<th><span>{name}</span></th>" for name in names)
    body = "\n".join(f"<tr><th>{names[i]}</th>{''.join(cell(i, j) for j in numbers)}</tr>" for i in numbers)
    return [
        "<h2>Confusion matrix</h2>",
        "<p>Rows: what it is. Columns: what it is taken for.</p>",
        f"<div class=wide><table class=matrix><tr><td></td>{head}</tr>\n{body}</table></div>",
    ]


def figure(mistake: Mistake, names: Sequence[str], sample: str) -> str:
    """Returns a picture with what it is, and what it was taken for. sample: its file and record."""
    from PIL import Image

    picture, file = mistake.picture, io.BytesIO()
    height, width, _ = picture.shape
    kind = "png" if width <= 64 else "jpeg"
    Image.frombytes("RGB", (width, height), bytes(picture.flatten().tolist())).save(file, kind, quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img class={kind} src="data:image/{kind};base64,{data}" alt="" title="{sample}">'
        f"<figcaption>{names[mistake.label]}<br><b>{names[mistake.predicted]} "
        f"{percent(-100 * mistake.minus_probability, 2)}</b><br><small>{sample}</small></figcaption></figure>"
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>
<style>{style}</style></head>
<body>
<h1>Evaluation</h1>
{body}
<script>{script}</script>
</body>
</html>
"""
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
th, td { padding: 3px 10px; text-align: left; vertical-align: top }
.facts td:first-child { color: #666 }
.sortable th { border-bottom: 2px solid #bbb; cursor: pointer; position: sticky; top: 0; background: #fff }
.sortable td { border-bottom: 1px solid #eee }
.number { text-align: right; white-space: nowrap }
.bar { display: inline-block; min-width: 9em;
       background: linear-gradient(#b9d5ee, #b9d5ee) no-repeat left / var(--share) 100% }
.wide { overflow-x: auto }
.matrix td { min-width: 2em; padding: 3px; text-align: center; border: 1px solid #eee; font-size: 13px }
.matrix th { padding: 3px 6px; font-size: 13px; text-align: right; white-space: nowrap; font-weight: normal }
.matrix th span { writing-mode: vertical-rl; transform: rotate(180deg) }
.matrix tr:first-child th { text-align: center; vertical-align: bottom }
.right { background: rgb(31 119 180 / calc(0.7 * var(--share))) }
.wrong { background: rgb(214 39 40 / calc(0.1 + 2 * var(--share))) }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 16px }
.pictures img { width: 100% } .pictures .png { image-rendering: pixelated }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere }
b, .bad { color: #c22 } small { color: #888 }
"""
SCRIPT = """
for (const head of document.querySelectorAll(".sortable th")) {
  head.onclick = () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const text = (a, b) => a.localeCompare(b, undefined, {numeric: true});
    const order = (a, b) => isNaN(a) || isNaN(b) ? text(a, b) : a - b;
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)));
    body.append(...(up === "1" ? rows : rows.reverse()));
  };
}
"""
