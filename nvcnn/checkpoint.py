"""Checkpoints: one file, written whole or not at all, that `torch.load(weights_only=True)` reads.

A checkpoint is a dict:

    format, version        "nvcnn checkpoint", 1
    model                  its name
    settings               what config.json holds
    weights                state_dict by torchvision's names, fp32
    optimizer              momentum by the same names, in its dtype, counters (step, updates, good steps), loss_scale
    ranks                  per rank: the data reader's position, the random generators
    convolutions           the algorithm of each that has a choice, by its name
    class_names, preprocessing, kernels, loss_average
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from nvcnn.errors import InputError

FORMAT, VERSION = "nvcnn checkpoint", 1


def path_of(log_dir: Path, step: int) -> Path:
    return log_dir / f"checkpoint-{step:08d}.pt"


def save(path: Path, state: dict[str, Any], keep: int) -> None:
    """Writes `state` to `path` and removes all but the `keep` newest up to it."""
    temporary = path.with_name(".checkpoint.pt.part")  # one name: a killed run leaves one at most
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION} | state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename, too, outlives a power cut
    os.close(directory)
    # A newer one that is damaged, over which a resumed run went back, does not count.
    for old in [p for p in in_directory(path.parent) if p < path][keep - 1 :]:
        old.unlink()


def in_directory(log_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(log_dir.glob("checkpoint-[0-9]*.pt"), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Reads and verifies a checkpoint, onto the CPU. Raises InputError for anything else than a whole one."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise InputError(f"{path}: damaged at {broken}; remove it or give another --checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except InputError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of nvcnn")
    if state["version"] != VERSION:
        raise InputError(f"{path}: checkpoint version {state['version']}, this nvcnn reads {VERSION}")
    return state


def newest(log_dir: Path, warn=print) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a directory, or None if there is none at all. Says which files it passed over.

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
