"""D4RL's HDF5 files, from the network: loaded only when one is missing."""

import socket
import uuid
from pathlib import Path

import h5py
from torch.hub import download_url_to_file

from common.cli import UserError
from common.tasks import D4RL, OFFLINE


def download(info: dict, path: Path) -> None:
    """Download a D4RL file; it gets its name when it is whole and right. UserError: no source has it."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # of this process: other seeds may fetch it too
    failures, patience = "", socket.getdefaulttimeout()
    for url in (D4RL["url"] + info["file"], D4RL["mirror"] + path.name):
        print(f"downloading {url} to {path.parent}")
        try:
            socket.setdefaulttimeout(30)  # seconds that a server may be silent
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(part), info["sha256"])
            h5py.File(part).close()  # OSError if it is not whole
            part.replace(path)
            return
        except (OSError, ValueError, RuntimeError) as error:
            failures += f"\n  {url}\n    {type(error).__name__}: {error}"
        finally:
            socket.setdefaulttimeout(patience)
            part.unlink(missing_ok=True)
    raise UserError(
        f"could not download {path.name}:{failures}\nBy hand: put {D4RL['url']}{info['file']}\n"
        f"  into {path.parent}; or set D4RL_DATASET_DIR to a folder that has it.\n{OFFLINE}"
    )
