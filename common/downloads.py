"""D4RL's HDF5 files, from the network: loaded only when one is missing."""

import contextlib
import hashlib
import os
import time
import urllib.request
import uuid
from http.client import HTTPException
from pathlib import Path

from common.tasks import D4RL, OFFLINE, UserError

import h5py
from tqdm import tqdm

SILENCE = 10  # seconds that a server may be silent
PIECE, PATIENCE = 2**18, 20  # so many bytes must come within so many seconds
LARGEST = 2**30  # bytes of a file whose size is not known beforehand


def download(info: dict, path: Path) -> None:
    """Download a D4RL file from the first source that has it; it gets its name when complete and right."""
    urls = [D4RL["url"] + info["file"], D4RL["mirror"] + path.name]
    if os.environ.get("D4RL_MIRROR"):
        urls.insert(0, f"{os.environ['D4RL_MIRROR'].rstrip('/')}/{path.name}")
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # unique: other seeds may fetch it too
    failures = ""
    for url in urls:
        print(f"downloading {url} to {path.parent}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob("*.hdf5.*.part"):  # of a killed process, if nobody writes to it
                with contextlib.suppress(FileNotFoundError):  # another seed's, which is complete by now
                    if time.time() - stale.stat().st_mtime > 600:
                        stale.unlink()
            digest = fetch(url, part, info["bytes"])
            if info["sha256"] not in (None, digest) or not h5py.is_hdf5(part):
                raise ValueError("what came is not the file: wrong SHA-256, or not HDF5")
            part.replace(path)
            return
        except (OSError, ValueError, HTTPException) as error:
            failures += f"\n  {url}\n    {type(error).__name__}: {error}"
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
    raise UserError(
        f"could not download {path.name}:{failures}\n"
        f"By hand: put {D4RL['url']}{info['file']}\n  into {path.parent}; or set D4RL_DATASET_DIR to another "
        f"folder, or D4RL_MIRROR to another URL, that has {path.name}.\n{OFFLINE}"
    )


def fetch(url: str, path: Path, size: int | None) -> str:
    """Write what a URL has to a file; returns its SHA-256. ValueError: too slow, or of another size."""
    digest, received, goal = hashlib.sha256(), 0, 0
    with urllib.request.urlopen(url, timeout=SILENCE) as response, open(path, "wb") as file:
        size = size or int(response.headers["Content-Length"] or 0)
        bar = tqdm(total=size, unit="B", unit_scale=True, disable=None)
        while piece := response.read1(PIECE):
            file.write(piece)
            digest.update(piece)
            received += len(piece)
            bar.update(len(piece))
            if received > (size or LARGEST):
                raise ValueError(f"it goes on after {received:,} bytes")
            if received >= goal:
                goal, deadline = received + PIECE, time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise ValueError(f"too slow, {received:,} bytes so far")
    if received != (size or received):
        raise ValueError(f"got {received:,} bytes instead of {size:,}")
    return digest.hexdigest()
