"""Whose a log directory is, and which checkpoint a run goes on from."""

import json
import os
from pathlib import Path
from typing import Any

from nvcnn import checkpoint
from nvcnn.distributed import Transport
from nvcnn.errors import InputError
from nvcnn.machine import chosen_kernels, versions
from nvcnn.settings import Settings, as_json, differences


def restore(settings: Settings, transport: Transport) -> dict[str, Any] | None:
    """On rank 0: the newest checkpoint of the log directory, once it is sure that this is the run it belongs to."""
    if transport.rank != 0 or not settings.log_dir:
        return None
    log_dir = Path(settings.log_dir)
    if log_dir.exists() and not log_dir.is_dir():
        raise InputError(f"--log_dir={log_dir}: is a file; give a directory")
    config = log_dir / "config.json"
    if config.exists():
        try:
            stored = json.loads(config.read_text())
            there, ranks = stored["settings"], stored["ranks"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{config}: not a config.json of nvcnn; give another --log_dir") from None
        check_same_run(settings, transport, there, ranks, config)
    found = checkpoint.newest(log_dir, warn=lambda line: print(line, flush=True))
    if found is None:
        return None
    path, state = found
    check_same_run(settings, transport, state["settings"], len(state["ranks"]), path, state["kernels"])
    print(f"Restored checkpoint {path}", flush=True)
    return state


def check_same_run(
    settings: Settings, transport: Transport, stored: dict, ranks: int, where: Path, kernels: str | None = None
) -> None:
    different = differences(settings, stored)
    if (stored.get("data_dir") is None) != (settings.data_dir is None):
        different.append(f"--data_dir: there {stored.get('data_dir')}, here {settings.data_dir}")
    if ranks != transport.size:
        different.append(f"ranks: there {ranks}, here {transport.size}")
    if kernels and kernels != chosen_kernels():
        different.append(f"NVCNN_KERNELS: there {kernels}, here {chosen_kernels()}")
    if different:
        raise InputError(f"{where} is of another run ({'; '.join(different)}): give its flags, or another --log_dir")


def write_config(settings: Settings, ranks: int) -> None:
    """Makes the log directory that of this run: config.json, whole or not at all. Leaves one that is there."""
    log_dir = Path(settings.log_dir)
    if (log_dir / "config.json").exists():
        return
    config = {"settings": as_json(settings), "ranks": ranks, "versions": versions()}
    temporary = log_dir / ".config.json.part"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(json.dumps(config, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(log_dir / "config.json")
    except OSError as error:
        raise InputError(f"--log_dir={log_dir}: cannot be written to ({error.strerror})") from None
