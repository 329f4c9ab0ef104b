"""Checkpoints, written whole or not at all; which of them a run resumes from.

A checkpoint is a file that `torch.load(weights_only=True)` reads, and holds a dict:

    format, version        "nvcnn checkpoint", 1
    model                  its name
    settings               what config.json holds
    weights                state_dict by torchvision's names, fp32
    optimizer              momentum by the same names, in its dtype, counters (step, updates, good steps), loss_scale
    ranks                  per rank: the data reader's position, the random generators
    convolutions           the algorithm of each that has a choice, by its name
    preprocessing          how images are prepared: the fields of `nvcnn.models.Preprocessing`
    options                what the model is built with, beside its number of classes
    class_names, kernels, loss_average
"""

import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from nvcnn.files import to_read
from nvcnn.machine import chosen_kernels, versions
from nvcnn.models import Origin, Preprocessing
from nvcnn.program import InputError
from nvcnn.settings import Settings, as_json, differences

FORMAT, VERSION = "nvcnn checkpoint", 1


def path_of(log_dir: Path, step: int) -> Path:
    """Returns where the checkpoint after that step is."""
    return log_dir / f"checkpoint-{step:08d}.pt"


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that is at `path` once all is written to it, also after a power cut, or not at all."""
    temporary = path.with_name(".part")  # one name: a killed run leaves one at most
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def save(path: Path, state: dict[str, Any], keep: int) -> None:
    """Writes `state` to `path` and removes all but the `keep` newest up to it."""
    with written_whole(path) as file:
        torch.save({"format": FORMAT, "version": VERSION} | state, file)
    # A newer one that is damaged, over which a resumed run went back, does not count.
    for old in [p for p in in_directory(path.parent) if p < path][keep - 1 :]:
        old.unlink()


def in_directory(log_dir: Path) -> list[Path]:
    """Returns the checkpoints of a directory, the newest first."""
    return sorted(log_dir.glob("checkpoint-[0-9]*.pt"), reverse=True)


def read(path: Path, mmap: bool = False) -> Any:
    """Returns what torch.save wrote to a file, verified, on the CPU. mmap: tensors stay in the file while it can be.

    Raises InputError for a file that is damaged, or holds more than `weights_only` allows.
    """
    try:
        zipped = zipfile.is_zipfile(to_read(path))  # what torch.save wrote before torch 1.6 is not
        if zipped:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                if broken := archive.testzip():
                    raise InputError(f"{path}: damaged at {broken}; remove it or give another file")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):
            reason = "damaged, or more than tensors, numbers and words; save the state_dict alone"
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None


def check(path: Path, state: Any, format: str = FORMAT, version: int = VERSION) -> dict[str, Any]:
    """Returns `state`. Raises InputError unless it is of that format and version."""
    if not isinstance(state, dict) or state.get("format") != format:
        raise InputError(f"{path}: not a checkpoint of nvcnn")
    if state["version"] != version:
        raise InputError(f"{path}: {format.split()[-1]} version {state['version']}, this nvcnn reads {version}")
    return state


def load(path: Path) -> dict[str, Any]:
    """Returns a checkpoint, verified, on the CPU. Raises InputError for anything else than a whole one."""
    return check(path, read(path))


def newest(log_dir: Path, warn=print) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest valid checkpoint of a directory, or None if there is none. Warns of files it passed over.

    Raises InputError when there are checkpoints but no valid one: training from scratch would overwrite a run.
    """
    problems = []
    for path in in_directory(log_dir):
        try:
            return path, load(path)
        except InputError as error:
            problems.append(str(error))
            warn(f"{error}; trying the one before")
    if problems:
        raise InputError(f"{log_dir}: none of its {len(problems)} checkpoints can be read; give another --log_dir")
    return None


def origin(state: dict[str, Any]) -> Origin:
    """Returns how the images of a checkpoint are prepared, and what its model is built with."""
    # An older one has no options, and three of the fields: the others had the values of today's defaults.
    options = state.get("options", {"resnet_v1": state["settings"].get("resnet_v1", False)})
    return Origin(Preprocessing(**state["preprocessing"]), options)


def resume(settings: Settings, ranks: int) -> dict[str, Any] | None:
    """Returns the newest checkpoint of the log directory, or None if a run starts there.

    Raises InputError if the directory belongs to another run.
    """
    if not settings.log_dir:
        return None
    log_dir = Path(settings.log_dir)
    if log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"--log_dir={log_dir}: is a file; give a directory")
    config = log_dir / "config.json"
    if config.exists():
        try:
            stored = json.loads(to_read(config).read_text())
            there = stored["settings"], stored["ranks"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{config}: not a config.json of nvcnn; give another --log_dir") from None
        check_same_run(settings, ranks, config, *there)
    found = newest(log_dir, warn=lambda line: print(line, flush=True))
    if found is None:
        return None
    path, state = found
    check_same_run(settings, ranks, path, state["settings"], len(state["ranks"]), state["kernels"])
    print(f"Restored checkpoint {path}", flush=True)
    return state


def check_same_run(
    settings: Settings, ranks: int, where: Path, stored: dict, stored_ranks: int, kernels: str | None = None
) -> None:
    """Raises InputError unless `where` belongs to a run with these settings, ranks and implementation of kernels."""
    different = differences(settings, stored)
    if (stored.get("data_dir") is None) != (settings.data_dir is None):
        different.append(f"--data_dir: there {stored.get('data_dir')}, here {settings.data_dir}")
    if ranks != stored_ranks:
        different.append(f"ranks: there {stored_ranks}, here {ranks}")
    if kernels and kernels != chosen_kernels():
        different.append(f"NVCNN_KERNELS: there {kernels}, here {chosen_kernels()}")
    if different:
        raise InputError(f"{where} is of another run ({'; '.join(different)}): give its flags, or another --log_dir")


def write_config(settings: Settings, ranks: int) -> None:
    """Marks the log directory as that of this run by a config.json, written whole or not at all, if there is none."""
    log_dir = Path(settings.log_dir)
    if (log_dir / "config.json").exists():
        return
    config = {"settings": as_json(settings), "ranks": ranks, "versions": versions()}
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with written_whole(log_dir / "config.json") as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"--log_dir={log_dir}: cannot be written to ({error.strerror})") from None
