"""Draws what metrics.jsonl holds: the curve of a run, or runs beside one another; and a grid of pictures.

python -m nvcnn.plot RUN... [--out FILE.png]
"""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvcnn import program
from nvcnn.data.shard_source import atomic_writer
from nvcnn.files import from_json, to_read
from nvcnn.program import InputError
from nvcnn.settings import Parser

if TYPE_CHECKING:
    from torch import Tensor

Event = dict[str, Any]
LOG = "metrics.jsonl"

# What a panel is called, by the key of its values in events.
CURVE = {"loss": "loss (running mean)", "top1": "top-1, %", "learning_rate": "learning rate"}
ALL = CURVE | {"loss_scale": "loss scale", "images_per_second": "images/s"}
TRAINING: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.7}
VALIDATION: dict[str, Any] = {"linewidth": 1.6, "linestyle": "--", "marker": "o", "markersize": 5}
LONGEST = 26  # characters of a name under a picture


@dataclass(frozen=True)
class History:
    """A run's table lines and evaluations, each in order of steps, and a step once."""

    train: list[Event]
    evaluations: list[Event]
    steps_per_epoch: int | None  # None: an older nvcnn did not write it


def read(run: Path) -> list[Event]:
    """Returns the events that led to the present state: where a run went on, what was beyond that step is left out.

    run: its log directory, or its metrics.jsonl.
    Passes over what is none: half a line of a killed run, zeros after a power cut.
    """
    events: list[Event] = []
    for line in (run / LOG if run.is_dir() else run).read_bytes().splitlines():
        event = None
        with suppress(ValueError):
            event = from_json(line)
        if not (isinstance(event, dict) and "event" in event and isinstance(event.get("step", 0), int)):
            continue
        if event["event"] == "start":
            begun = event.get("step", 0)
            events = [earlier for earlier in events if earlier.get("step", 0) <= begun] if begun else []
        events.append(event)
    return events


def history(run: Path) -> History:
    """Returns what is drawn of a run. Where a step comes twice, the later line holds; of averages before others."""
    events = read(run)

    def of(kind: str) -> list[Event]:
        found = [event for event in events if event["event"] == kind and "step" in event]
        averaged = {event["step"] for event in found if event.get("ema")}
        by_step = {e["step"]: e for e in found if e.get("ema") or e["step"] not in averaged}
        return [by_step[step] for step in sorted(by_step)]

    epochs = [event.get("steps_per_epoch") for event in events if event["event"] == "start"]
    return History(of("train"), of("eval"), epochs[-1] if epochs else None)


def draw_curve(log_dir: Path) -> None:
    """Draws `curve.png`, once there is a table line: loss, top-1 and learning rate of training and validation."""
    run = history(log_dir)
    title = ""
    if run.evaluations:
        title = "top-1 {top1:.2f} %, top-5 {top5:.2f} % after step {step}".format(**run.evaluations[-1])
    if run.train:
        (log_dir / "curve.png").write_bytes(drawn({"": run}, CURVE, title=title))


def drawn(runs: dict[str, History], panels: dict[str, str], *, columns: int = 1, title: str = "") -> bytes:
    """Returns a PNG with a panel for each of `panels`, and in each the runs, by their names.

    Below are epochs if a run has more than one, and all say how long theirs are; otherwise steps.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = -(-(len(panels) + (columns > 1)) // columns)  # of several columns, the last place is the legend's
    figure = Figure(figsize=(4 + 4 * columns, 0.8 + 2.4 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    last = [(run.train[-1]["step"], run.steps_per_epoch) for run in runs.values() if run.train]
    in_epochs = all(epoch for _, epoch in last) and any(step > epoch for step, epoch in last)
    colors = [f"C{n}" if len(runs) <= 10 else colormaps["turbo"](n / len(runs)) for n in range(len(runs))]
    one = len(runs) == 1

    for (key, label), axes in zip(panels.items(), grid, strict=False):
        axes.set_ylabel(label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if key == "loss_scale":
            axes.set_yscale("log", base=2)
        for run, color in zip(runs.values(), colors, strict=True):
            scale = run.steps_per_epoch if in_epochs and run.steps_per_epoch else 1
            for events, its_color, look in (
                (run.train, color, TRAINING),
                (run.evaluations, "C1" if one else color, VALIDATION),
            ):
                if points := [(event["step"] / scale, number(event[key])) for event in events if key in event]:
                    axes.plot(*zip(*points, strict=True), color=its_color, **look)
        if key not in ("top1", "loss_scale"):
            axes.set_ylim(bottom=0)
    for axes in grid[len(panels) - columns : len(panels)]:
        axes.set_xlabel("epoch" if in_epochs else "step")
        axes.tick_params(labelbottom=True)
    figure.align_ylabels()

    entries = [Line2D([], [], color=color, linewidth=4, label=name) for name, color in zip(runs, colors, strict=True)]
    entries.append(Line2D([], [], color="C0" if one else "0.3", label="training", **TRAINING))
    if any(run.evaluations for run in runs.values()):
        entries.append(Line2D([], [], color="C1" if one else "0.3", label="validation", **VALIDATION))
    if columns > 1:
        grid[-1].axis("off")
        grid[-1].legend(handles=entries, loc="upper left", frameon=False, ncols=-(-len(entries) // 12))
    else:
        grid[0].legend(handles=entries[1:], frameon=False)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def picture_grid(pictures: "Tensor", names: Sequence[str]) -> bytes:
    """Returns a PNG of pictures, (N, H, W, 3) uint8, in rows of four, with a name under each."""
    from matplotlib.figure import Figure

    count, height, width, _ = pictures.shape
    columns = min(4, count)
    rows = -(-count // columns)
    down, across = height + max(height // 5, 4), width + max(width // 20, 1)  # from a picture to the next
    canvas = pictures.new_full((rows * down, columns * across, 3), 255)
    figure = Figure(figsize=(2 * columns, 2 * columns * canvas.shape[0] / canvas.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for n, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        top, left = n // columns * down, n % columns * across
        canvas[top : top + height, left : left + width] = picture
        short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
        below = top + height + down * 0.02
        axes.text(left + width / 2, below, short, ha="center", va="top", fontsize=9, parse_math=False)
    axes.imshow(canvas.numpy(), aspect="auto")
    file = BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of characters that its fonts lack: it shows boxes
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def number(value: Any) -> float:
    """Returns a value, or NaN, of which nothing is drawn, for null."""
    return float(value) if isinstance(value, int | float) else nan


def compare(paths: Sequence[Path], out: Path) -> None:
    """Draws runs, given by their log directories or metrics.jsonl, in one picture. Raises InputError if it cannot."""
    if out.suffix != ".png":
        raise InputError(f"--out={out}: must end in .png")
    found: dict[Path, History] = {}
    for path in paths:
        try:
            found[path] = history(to_read(path))
        except FileNotFoundError as error:
            what = f"no {LOG} there" if path.is_dir() else "no such run"
            raise InputError(f"{path}: {what}: give the --log_dir of a training, or its {LOG}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        if not found[path].train:
            print(f"{path}: holds no table line of a training: it is left out", file=sys.stderr)
            del found[path]
    if not found:
        raise InputError("none of the runs holds a table line of a training: there is nothing to draw")
    names = [(path.parent if path.name == LOG else path).resolve().name for path in found]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, found, strict=True)]
    try:
        picture = drawn(dict(zip(labels, found.values(), strict=True)), ALL, columns=2)
        with atomic_writer(out) as file:
            file.write(picture)
    except ModuleNotFoundError as error:
        raise InputError(f"a picture needs {error.name}: pip install {error.name}") from None
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written ({error.strerror}): give another") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m nvcnn.plot", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help=f"a training's --log_dir, or its {LOG}")
    parser.add_argument("--out", default="runs.png", help="the picture to write (default runs.png)")
    asked = parser.parse_args(arguments)
    *runs, out = (Path(os.path.expanduser(path)) for path in (*asked.runs, asked.out))
    compare(runs, out)
    print(f"Written to {out}")
    return 0


if __name__ == "__main__":
    program.run(main)
