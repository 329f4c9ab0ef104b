"""Checkpoints, written whole or not at all; which of them a run resumes from.

A checkpoint is a file that `torch.load(weights_only=True)` reads, ends in its digest (`write`), and holds a dict:

    format, version        "nvcnn checkpoint", 1
    digest                 "sha256": without that at its end the file is damaged
    model                  its name
    settings               what config.json holds
    weights                state_dict by torchvision's names, fp32
    ema                    the same of the moving averages, where there are any
    optimizer              momentum by the same names, in its dtype, counters (step, updates, good steps), loss_scale
    ranks                  per rank: the data reader's position, the random generators, BatchNorm's running statistics,
                           their moving averages, the running averages of loss, top-1 and top-5
    learning_rate          the initial one
    convolutions           by the size of images, the algorithm of each that has a choice, by its name
    preprocessing          how images are prepared: the fields of `nvcnn.models.Preprocessing`
    options                what the model is built with, beside its number of classes
    class_names, kernels, loss_average
    evaluation             of `BEST` alone: top1 and top5 in percent, images
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedWriter, BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from nvcnn.files import to_read, what_is
from nvcnn.machine import chosen_kernels, versions
from nvcnn.models import Origin, Preprocessing
from nvcnn.program import InputError
from nvcnn.resharding import PARTS, other_total
from nvcnn.settings import Settings, as_json, differences

FORMAT, VERSION = "nvcnn checkpoint", 1
BEST = "checkpoint-best.pt"  # of the highest top-1; it is never the newest, and is not removed
DIGEST = "sha256"
HALVES = ("an empty file", "a zip archive that is cut short")  # of what `what_is` says: may have been a checkpoint
MARK = f"nvcnn {DIGEST} ".encode()
COMMENT = len(MARK) + 64  # bytes: the mark, and the digest in hexadecimal digits

locks: list[BufferedWriter] = []  # a lock is let go when its file is closed


class Damaged(InputError):
    """A file that is not what was written to it. What a disk fails to read, or is another program's, is not damaged."""


def path_of(log_dir: Path, step: int) -> Path:
    """Returns where the checkpoint after that step is."""
    return log_dir / f"checkpoint-{step:08d}.pt"


@contextmanager
def written_whole(path: Path, part: str = ".part") -> Iterator[BufferedRandom]:
    """Yields a file that is at `path` once all is written to it, also after a power cut, or not at all.

    part: its name until then. In a log directory, which is one run's, that is one: a killed run leaves one at most.
    """
    temporary = path.with_name(part)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without this for directories
            raise
    finally:
        os.close(directory)


def save(path: Path, state: dict[str, Any], keep: int | None) -> None:
    """Writes `state` to `path` and removes all but the `keep` newest up to it; None: removes none.

    Raises InputError when it cannot be written, with the checkpoint that there is then.
    """
    try:
        check_place(path.parent)
        with written_whole(path) as file:
            write({"format": FORMAT, "version": VERSION} | state, file)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch.save has an error of its own after that of a full disk
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise InputError(f"{path}: cannot be written ({cause.strerror}); {last_good(path.parent)}") from None
    if keep is None:
        return
    try:
        # A newer one, over which a resumed run went back, does not count.
        there = in_directory(path.parent)
        old_ones = there[there.index(path) + keep :] if path in there else []
    except OSError as error:
        print(f"{path.parent}: cannot be listed ({error.strerror}), so no older one is removed", file=sys.stderr)
        return
    for old in old_ones:
        try:
            old.unlink()
        except OSError as error:
            print(f"{old}: cannot be removed ({error.strerror})", file=sys.stderr)


def last_good(log_dir: Path) -> str:
    """Returns a clause that names the checkpoint from which a run would go on."""
    with suppress(InputError, OSError):
        if found := newest(log_dir, warn=lambda line: None):
            return f"the last good checkpoint is {found[0]}"
    return "there is no good checkpoint"


def step_of(path: Path) -> int | None:
    """Returns the step of a checkpoint by its name; None unless `path_of` has that name: the file is somebody's own."""
    digits = path.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() and path == path_of(path.parent, int(digits)) else None


def in_directory(log_dir: Path) -> list[Path]:
    """Returns the checkpoints of a directory, the newest first."""
    if not log_dir.exists():
        return []
    found = {step: path for path in log_dir.iterdir() if (step := step_of(path)) is not None}
    return [found[step] for step in sorted(found, reverse=True)]


def write(content: dict[str, Any], file: BytesIO | BufferedRandom) -> None:
    """Writes what torch.save writes to an empty file, and behind it the digest of it all.

    That is the comment of the zip archive, so whatever reads what torch.save writes reads this. Zip's own checksums
    leave out where in the file a tensor is.
    """
    torch.save(content | {"digest": DIGEST}, file)
    file.seek(-2, os.SEEK_END)  # the length of the comment
    file.write(COMMENT.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, DIGEST)
    file.seek(0, os.SEEK_END)
    file.write(MARK + digest.hexdigest().encode())


def verified(path: Path) -> bool:
    """Returns whether a file ends in its digest. Raises InputError if it ends in another one."""
    with path.open("rb") as file:
        size = path.stat().st_size - COMMENT
        file.seek(max(size, 0))
        comment = file.read()
        if not comment.startswith(MARK):
            return False
        file.seek(0)
        digest = hashlib.new(DIGEST)
        for start in range(0, size, 2**20):
            digest.update(file.read(min(2**20, size - start)))
    if comment != MARK + digest.hexdigest().encode():
        raise Damaged(f"{path}: damaged, its digest differs; give another file")
    return True


def read(path: Path, mmap: bool = False) -> Any:
    """Returns what torch.save wrote to a file, verified, on the CPU. mmap: tensors stay in the file while it can be.

    Raises InputError for a file that is `Damaged`, or holds more than `weights_only` allows. One without a digest, of
    others or of older versions, is held to zip's checksums.
    """
    sound = False
    try:
        whole = sound = verified(to_read(path))
        zipped = zipfile.is_zipfile(path)  # what torch.save wrote before torch 1.6 is not
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise InputError(f"{path}: its parts are larger than the file; save the state_dict anew")
                if not whole and (broken := archive.testzip()):  # torch.load does not look at the checksums
                    raise Damaged(f"{path}: damaged at {broken}; give another file")
                sound = True
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        if not whole and isinstance(content, dict) and content.get("digest") == DIGEST:
            raise Damaged(f"{path}: damaged, its digest is lost; give another file")
        if not all(is_stored(tensor) for tensor in tensors_in(content)):
            raise InputError(f"{path}: has tensors that are not stored as they are; save the state_dict anew")
        return content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # zipfile looks for what is before the file
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        if kind := what_is(path):
            failure = Damaged if kind in HALVES else InputError
            raise failure(f"{path}: is {kind}, not a checkpoint; give one, or weights") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):
            reason = "damaged, or more than tensors, numbers and words; save the state_dict alone"
        failure = InputError if sound or isinstance(error, MemoryError) else Damaged
        raise failure(f"{path}: not a readable checkpoint ({reason})") from None


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Yields the tensors in dicts and lists of each other, of which a pickled one may hold itself."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, dict | list | tuple):
                waiting += value.values() if isinstance(value, dict) else value


def is_stored(tensor: Tensor) -> bool:
    """Returns whether the file had a byte for each of a tensor's. A view, a sparse one say it of 2**40 with a few."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def check(path: Path, state: Any, format: str = FORMAT, version: int = VERSION) -> dict[str, Any]:
    """Returns `state`. Raises InputError unless it is of that format and version."""
    if not isinstance(state, dict) or state.get("format") != format:
        raise InputError(f"{path}: not a checkpoint of nvcnn")
    if state.get("version") != version:
        raise InputError(f"{path}: {format.split()[-1]} version {state.get('version')}, this nvcnn reads {version}")
    return state


def load(path: Path) -> dict[str, Any]:
    """Returns a checkpoint, verified, on the CPU. Raises InputError for anything else than a whole one."""
    return check(path, read(path))


def newest(
    log_dir: Path, warn: Callable[[str], None] = print, damaged: list[Path] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Returns the newest valid checkpoint of a directory, or None if there is none. Warns of files it passed over.

    damaged: gets those of them that are. Raises InputError when there are checkpoints but no valid one: training from
    scratch would overwrite a run.
    """
    bad: list[Path] = []
    while left := [path for path in in_directory(log_dir) if path not in bad]:
        try:
            return left[0], load(left[0])
        except InputError as error:
            if not os.path.lexists(left[0]):
                continue  # a training at work there has removed it, and written a newer one
            bad.append(left[0])
            if damaged is not None and isinstance(error, Damaged):
                damaged.append(left[0])
            warn(f"{error}; trying the one before")
    if bad:
        raise InputError(f"{log_dir}: none of its {len(bad)} checkpoints can be read; give another --log_dir")
    return None


def set_aside(path: Path) -> None:
    """Gives a damaged file a name that nothing here reads, counts or removes, and says it."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        path.rename(aside)
        print(f"{path} is set aside as {aside.name}", flush=True)
    except OSError as error:
        print(f"{path}: cannot be set aside as {aside.name} ({error.strerror})", file=sys.stderr)


def origin(state: dict[str, Any]) -> Origin:
    """Returns how the images of a checkpoint are prepared, and what its model is built with."""
    # An older one has no options, and three of the fields: the others had the values of today's defaults.
    options = state.get("options", {"resnet_v1": state["settings"].get("resnet_v1", False)})
    return Origin(Preprocessing(**state["preprocessing"]), options)


def resume(settings: Settings, ranks: int) -> dict[str, Any] | None:
    """Returns the newest checkpoint of the log directory, or None if a run starts there. Sets damaged ones aside.

    Raises InputError if the directory belongs to another run, or another training is at work there.
    """
    if not settings.log_dir:
        return None
    log_dir = Path(settings.log_dir)
    if log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"--log_dir={log_dir}: is a file; give a directory")
    if os.access(log_dir, os.W_OK):  # else there is nothing to do, or `begin` says what there is to say
        lock(log_dir)
    damaged: list[Path] = []
    found = newest(log_dir, lambda line: print(line, flush=True), damaged)
    if found is None:
        return None
    path, state = found
    check_same_run(settings, ranks, path, state)
    for each in damaged:  # not before there is a good one: without any the run would begin anew the next time
        set_aside(each)
    print(f"Restored checkpoint {path}", flush=True)
    before, there = state["settings"].get("transport"), len(state["ranks"])
    if ranks != there:
        print(
            f"  {there} ranks trained until there, {ranks} go on with the same total batch: sums round otherwise, "
            "BatchNorm's statistics are the mean of theirs, random generators begin anew"
        )
    if min(ranks, there) > 1 and before != settings.transport:
        print(f"  {before} summed over the ranks until there, {settings.transport} does now: sums may round otherwise")
    return state


def best_so_far(settings: Settings, ranks: int, resumed: dict[str, Any] | None) -> float:
    """Returns the top-1, in percent, of the best checkpoint of the log directory; minus infinity without one.

    resumed: the state from which the run goes on; where it begins anew no best counts. A damaged one is set aside, and
    the next evaluation is the best. Raises InputError unless the checkpoint is this run's, since a better one would
    replace it.
    """
    path = Path(settings.log_dir) / BEST
    if not settings.log_dir or not path.exists():
        return -math.inf
    try:
        state = load(path)
    except Damaged as error:
        print(f"{error}; the next evaluation is the best", flush=True)
        set_aside(path)
        return -math.inf
    if "evaluation" not in state:
        raise InputError(f"{path} was not written there by a run, which would replace it: give it another name")
    check_same_run(settings, ranks, path, state)
    return state["evaluation"]["top1"] if resumed else -math.inf


def check_learning_rate(learning_rate: float, state: dict[str, Any]) -> None:
    """Raises InputError if the run of the checkpoint had another one, by a default that has changed since."""
    there = state.get("learning_rate", learning_rate)  # an older one does not say it
    if there != learning_rate:
        raise InputError(f"the run to resume has a learning rate of {there:g}: give --learning_rate={there!r}")


def check_same_run(settings: Settings, ranks: int, path: Path, state: dict[str, Any]) -> None:
    """Raises InputError unless the checkpoint is of a run with these settings and implementation of kernels.

    On another number of ranks the total batch must be the same, whatever it is made of.
    """
    stored, there = state["settings"], len(state["ranks"])
    # From the best one no run goes on: it may be of a number of ranks that the run had before.
    shared_out = ranks != there or "evaluation" in state
    different = differences(settings, stored, but=PARTS if shared_out else ())
    if (stored.get("data_dir") is None) != (settings.data_dir is None):
        different.append(f"--data_dir: there {stored.get('data_dir')}, here {settings.data_dir}")
    if state["kernels"] != chosen_kernels():
        different.append(f"NVCNN_KERNELS: there {state['kernels']}, here {chosen_kernels()}")
    if different:
        raise InputError(f"{path} is of another run ({'; '.join(different)}): give its flags, or another --log_dir")
    if shared_out and (wrong := other_total(stored, there, as_json(settings), ranks)):
        raise InputError(f"{path} has {wrong}, or another --log_dir")


def begin(settings: Settings, ranks: int) -> None:
    """Makes the log directory, keeps others out, and says in config.json what runs there.

    A config.json without a checkpoint is of a run that came to nothing.
    """
    log_dir = Path(settings.log_dir)
    config = {"settings": as_json(settings), "ranks": ranks, "versions": versions()}
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock(log_dir)
        if not (log_dir / "config.json").exists() or not in_directory(log_dir):
            with written_whole(log_dir / "config.json") as file:
                file.write((json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"--log_dir={log_dir}: cannot be written to ({error.strerror}); give another") from None


def lock(log_dir: Path) -> None:
    """Keeps other trainings out of a log directory until this process ends, in whatever way.

    Raises InputError if one is at work there. A lock of POSIX: NFS has it, and forked workers, which may live on for a
    while, do not.
    """
    path = log_dir / ".lock"
    try:
        file = path.open("ab")
    except OSError as error:
        raise InputError(f"{path}: cannot be written to ({error.strerror}); give another --log_dir") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"--log_dir={log_dir}: another training is at work there; give another") from None
    except OSError as error:
        print(f"{path}: cannot be locked ({error.strerror}), so start no second training there", file=sys.stderr)
    locks.append(file)


def check_place(log_dir: Path) -> None:
    """Raises InputError if another directory is where this process locked one: it may be another run's.

    Where the lock's file has been removed, takes it anew.
    """
    held = [os.fstat(file.fileno()) for file in locks if Path(file.name).parent == log_dir]
    try:
        there = os.stat(log_dir / ".lock") if held else None
    except FileNotFoundError:
        os.stat(log_dir)  # what is gone is not made again: it may be a disk that is not mounted now
        lock(log_dir)
        return
    if there and not any(os.path.samestat(there, one) for one in held):
        raise InputError(
            f"{log_dir}: is not the directory in which this run began; bring that back, or remove {log_dir}/.lock"
        )
