"""Downloads from a server on this machine, in ways in which they fail."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from recordings import write

from common.cli import UserError
from common.datasets import load_dataset
from common.tasks import D4RL, D4RL_TASKS, find_task

TASK, NAME = "hopper-medium-v2", "hopper_medium-v2.hdf5"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a small file in D4RL layout."""
    fields = {"observations": np.zeros((3000, 11)), "actions": np.zeros((3000, 3)), "rewards": np.ones(3000)}
    flags = {"terminals": np.zeros(3000, bool), "timeouts": np.arange(3000) % 1000 == 999}
    return Path(write(tmp_path_factory.mktemp("content") / NAME, **fields, **flags)).read_bytes()


@pytest.fixture(scope="module")
def server(content):
    """URL of a server: its first folder says how it behaves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            how = self.path.split("/")[1]
            if how == "missing":
                return self.send_error(404)
            body = content[:-1] + b"!" if how == "wrong" else content
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.close_connection = True
            return self.wfile.write(body[: len(body) // 2] if how == "truncated" else body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.handle_error = lambda *args: None  # that somebody hung up
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def sources(server, content, tmp_path, monkeypatch):
    """Sets how the first source and the mirror behave; the table knows the file's hash; an empty folder."""
    info = {"file": f"gym_mujoco_v2/{NAME}", "horizon": 1000, "bytes": len(content)}
    info["sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(D4RL_TASKS, TASK, info)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))

    def set_sources(first, mirror):
        for key, how in (("url", first), ("mirror", mirror)):
            monkeypatch.setitem(D4RL, key, f"{'http://127.0.0.1:9' if how == 'refused' else server}/{how}/")

    return set_sources


def is_there(folder):
    """Whether the folder has the file and nothing else, and the file has its transitions."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return len(load_dataset(find_task(TASK)).rewards) == 2997 and names in ([], [NAME])


def test_a_good_file_is_downloaded_once(tmp_path, sources, content, capsys):
    sources("good", "missing")
    assert is_there(tmp_path / "d4rl")
    assert (tmp_path / "d4rl" / NAME).read_bytes() == content
    sources("missing", "missing")
    assert is_there(tmp_path / "d4rl")
    assert capsys.readouterr().out.count("downloading") == 1


WAYS_TO_FAIL = {  # how a source behaves -> what the message says of it
    "missing": "404",
    "truncated": "hash value|IncompleteRead",
    "wrong": "hash value",
    "refused": "refused",
}


@pytest.mark.parametrize("bad", WAYS_TO_FAIL)
def test_a_source_that_fails(bad, tmp_path, sources):
    """The mirror helps; if it fails, too, the message says what happened, and how to do it by hand."""
    sources(bad, "missing")
    message = f"(?s){WAYS_TO_FAIL[bad]}.*404.*put .*gym_mujoco_v2/{NAME}.*{tmp_path}"
    with pytest.raises(UserError, match=message):
        load_dataset(find_task(TASK))
    assert not list((tmp_path / "d4rl").iterdir())
    sources(bad, "good")
    assert is_there(tmp_path / "d4rl")


def test_seeds_that_start_together_do_not_disturb_each_other(tmp_path, sources):
    sources("good", "missing")
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda _: len(load_dataset(find_task(TASK)).rewards), range(4)))
    assert lengths == [2997] * 4 and is_there(tmp_path / "d4rl")
