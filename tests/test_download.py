"""Downloads of D4RL files from a server on this machine, in all the ways in which they go wrong."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest

from common import datasets
from common.datasets import UserError, load_dataset

TASK = "hopper-medium-v2"
NAME = "hopper_medium-v2.hdf5"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a small file in D4RL layout."""
    path = tmp_path_factory.mktemp("content") / NAME
    with h5py.File(path, "w") as file:
        file["observations"] = np.arange(3000 * 11, dtype=np.float32).reshape(3000, 11)
        file["actions"] = np.zeros((3000, 3), np.float32)
        file["rewards"] = np.ones(3000, np.float32)
        file["terminals"] = np.zeros(3000, bool)
        file["timeouts"] = np.arange(3000) % 1000 == 999
    return path.read_bytes()


@pytest.fixture(scope="module")
def server(content):
    """URL of a server: its first folder says how it behaves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            how = self.path.split("/")[1]
            if how == "missing":
                return self.send_error(404)
            body = {
                "wrong": content[:-1] + b"!",
                "short": content[:-100],
                "html": b"<html>please log in</html>",
            }
            body = body.get(how, content)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if how in ("truncated", "stalled"):
                self.wfile.write(body[: len(body) // 2])
                if how == "stalled":
                    time.sleep(5)
                self.close_connection = True
                return None
            return self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch, content):
    """An empty D4RL folder; the table knows the file's size and hash."""
    info = {"file": f"gym_mujoco_v2/{NAME}", "horizon": 1000, "bytes": len(content)}
    info["sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(datasets.D4RL_TASKS, TASK, info)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.delenv("D4RL_MIRROR", raising=False)
    return tmp_path / "d4rl"


@pytest.fixture
def sources(monkeypatch, server):
    """Sets how the first source and the mirror behave; a full URL is taken as it is."""

    def set_sources(first, mirror):
        for key, how in (("url", first), ("mirror", mirror)):
            monkeypatch.setitem(datasets.D4RL, key, how if "://" in how else f"{server}/{how}/")

    return set_sources


def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def forget_hash(monkeypatch):
    monkeypatch.setitem(datasets.D4RL_TASKS[TASK], "bytes", None)
    monkeypatch.setitem(datasets.D4RL_TASKS[TASK], "sha256", None)


def test_a_good_file_is_downloaded_once(folder, sources, content, capfd):
    sources("good", "missing")
    data = load_dataset(TASK)
    assert data.observations.shape == (2997, 11)
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (folder / NAME).read_bytes() == content
    assert "100%" in capfd.readouterr().err  # a progress bar
    sources("missing", "missing")
    assert len(load_dataset(TASK).rewards) == 2997
    assert "downloading" not in capfd.readouterr().out


@pytest.mark.parametrize("bad", ["missing", "truncated", "short", "wrong", "html", "refused", "nonsense"])
def test_the_mirror_helps_when_the_first_source_fails(bad, folder, sources):
    urls = {"refused": f"http://127.0.0.1:{closed_port()}/", "nonsense": "nonsense://x/"}
    sources(urls.get(bad, bad), "good")
    assert len(load_dataset(TASK).rewards) == 2997
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_the_mirror_of_the_user_comes_first(folder, sources, server, monkeypatch, capfd):
    monkeypatch.setenv("D4RL_MIRROR", f"{server}/good")
    sources("missing", "missing")
    assert len(load_dataset(TASK).rewards) == 2997
    assert capfd.readouterr().out.count("downloading") == 1


@pytest.mark.parametrize("hash_known", [True, False])
@pytest.mark.parametrize("bad", ["missing", "truncated", "html", "refused"])
def test_all_sources_fail(bad, hash_known, folder, sources, monkeypatch):
    first = f"http://127.0.0.1:{closed_port()}/" if bad == "refused" else bad
    sources(first, "missing")
    if not hash_known:
        forget_hash(monkeypatch)
    start = time.time()
    with pytest.raises(UserError) as error:
        load_dataset(TASK)
    assert time.time() - start < 3
    assert list(folder.iterdir()) == []
    message = str(error.value)
    reason = {"missing": "404", "truncated": "IncompleteRead", "html": "HDF5", "refused": "refused"}[bad]
    reason = "bytes" if bad == "html" and hash_known else reason
    for part in (reason, f"gym_mujoco_v2/{NAME}", str(folder), "404", "D4RL_DATASET_DIR", "hopper-mini-v0"):
        assert part in message


@pytest.mark.parametrize(("bad", "reason"), [("wrong", "SHA-256"), ("short", "bytes instead of")])
def test_a_file_that_is_not_the_right_one_is_not_kept(bad, reason, folder, sources):
    sources(bad, bad)
    with pytest.raises(UserError, match=reason):
        load_dataset(TASK)
    assert list(folder.iterdir()) == []


def test_a_black_hole_costs_seconds(folder, sources, server, monkeypatch):
    with socket.socket() as black_hole:
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen()
        monkeypatch.setenv("D4RL_MIRROR", f"http://127.0.0.1:{black_hole.getsockname()[1]}")
        sources("good", "missing")
        start = time.time()
        assert len(load_dataset(TASK).rewards) == 2997
        assert time.time() - start < 14


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_leaves_no_file_and_the_next_one_works(end, folder, sources, server, content):
    sources("stalled", "missing")
    code = (
        "from common import datasets\n"
        f"datasets.D4RL.update({ {key: datasets.D4RL[key] for key in ('url', 'mirror')} })\n"
        f"datasets.D4RL_TASKS[{TASK!r}] = {datasets.D4RL_TASKS[TASK]!r}\n"
        f"datasets.load_dataset({TASK!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(folder.glob("*.part")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(end)
    process.wait()
    left = list(folder.iterdir())
    assert len(left) == (1 if end == signal.SIGKILL else 0)
    for path in left:  # as old as what a killed process left some time ago
        os.utime(path, (time.time() - 3600,) * 2)
    sources("good", "missing")
    assert len(load_dataset(TASK).rewards) == 2997
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_seeds_that_start_together_do_not_disturb_each_other(folder, sources, content):
    sources("good", "missing")
    lengths = []
    threads = [
        threading.Thread(target=lambda: lengths.append(len(load_dataset(TASK).rewards))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [2997] * 4
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_a_local_file_is_used_as_it_is(folder, sources, content):
    sources("missing", "missing")
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    assert len(load_dataset(TASK).rewards) == 2997
    (folder / NAME).write_bytes(content[:1000])
    with pytest.raises(UserError, match=f"{NAME} has 1,000 bytes, not {len(content):,}.*\n.*--dataset"):
        load_dataset(TASK)


def test_a_folder_that_cannot_be_used(folder, sources):
    sources("good", "good")
    folder.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not download.*\n.*\n.*FileExistsError"):
        load_dataset(TASK)
