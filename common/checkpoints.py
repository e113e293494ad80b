"""Files of a run that outlive a crash: each is whole or not there, and reading one executes nothing."""

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from common.tasks import UserError

import torch
from filelock import FileLock, Timeout
from torch import Tensor

FORMAT = 2  # of checkpoint.pt and results.json; another format is refused
RESULTS: dict = {"script": str, "env_id": str, "seed": int, "data_checksum": int | None, "losses": dict}
RESULTS |= {"finished": bool, "train_seconds": float, "evaluations": [{"step": int, "return_mean": float}]}
PARTS = {"args": dict, "step": int, "results": RESULTS, "agent": dict, "optimizers": dict, "rng": Tensor}


def write_atomically(path: Path, content: bytes, flag: str = "--run-dir") -> None:
    """Write under a temporary name, bring it to the disk, rename: the final name always has a whole file.

    UserError: the disk is full or not writable; the flag chooses another place.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error, flag) from error


def cannot_write(path: Path, error: OSError | UnicodeError, flag: str = "--run-dir") -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write {path}: {reason}; make room or choose another {flag}")


def lock_folder(folder: Path) -> FileLock:
    """The right to write into a run folder, until it is released or the process ends.

    UserError: another process has it, or the folder is not writable.
    """
    lock = FileLock(folder / "run.lock")
    try:
        return lock.acquire(blocking=False).lock
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait until it has ended") from None
    except OSError as error:
        raise cannot_write(folder, error) from error


def has_shape(value: object, shape: Any) -> bool:
    """Whether a value is of a type, is a list of such values, or a dict with, among others, such entries."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(has_shape(value.get(name), shape[name]) for name in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(each, shape[0]) for each in value)
    return isinstance(value, shape)


def load_checkpoint(path: Path) -> dict:
    """What Run.save wrote, from the file or its run folder, and that folder as "folder".

    Only tensors and plain values are unpickled. UserError: no checkpoint, or one that is damaged or too old.
    """
    path = path / "checkpoint.pt" if os.path.isdir(path) else path
    try:
        if path.exists() and not path.is_file():  # to open a pipe would take forever
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = int(checkpoint.get("format", 1))
        json.dumps(checkpoint.get("results"), allow_nan=False)  # results.json must take it
        wrong = [name for name in PARTS if not has_shape(checkpoint.get(name), PARTS[name])]
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # whatever a damaged file provokes
        message = f"{path} cannot be read, or is no checkpoint, or a damaged one"
        raise UserError(f"{message} ({type(error).__name__})") from error
    if version != FORMAT:
        raise UserError(f"{path} is of another version of this project: format {version}, not {FORMAT}")
    if wrong:
        raise UserError(f"{path} is damaged: {', '.join(wrong)} missing or of a wrong type")
    return checkpoint | {"folder": path.parent}
