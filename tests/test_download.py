"""Downloads from a server on this machine, in all the ways in which they fail."""

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

import numpy as np
import pytest
from recordings import write
from runs import ROOT

from common import downloads, minari_data
from common.datasets import load_dataset
from common.tasks import D4RL, D4RL_TASKS, UserError

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
            if how == "api":  # of Minari's host
                return threading.Event().wait(5)
            html = b"<html>please log in</html>"
            body = {"wrong": content[:-1] + b"!", "short": content[:-100], "html": html}.get(how, content)
            self.send_response(200)
            if how != "endless":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            while how == "endless":
                self.wfile.write(content)
            for byte in content[:50] if how == "slow" else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            if how in ("truncated", "stalled"):
                self.wfile.write(body[: len(body) // 2])
                time.sleep(5 if how == "stalled" else 0)
                self.close_connection = True
                return None
            return self.wfile.write(body)

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
def folder(tmp_path, monkeypatch, content):
    """An empty D4RL folder; the table knows the file's size and hash."""
    info = {"file": f"gym_mujoco_v2/{NAME}", "horizon": 1000, "bytes": len(content)}
    info["sha256"] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(D4RL_TASKS, TASK, info)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.delenv("D4RL_MIRROR", raising=False)
    return tmp_path / "d4rl"


@pytest.fixture
def refused():
    """URL of a port at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def silent():
    """URL of a host that accepts and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def sources(monkeypatch, server, refused, silent):
    """Sets how the first source and the mirror behave."""
    urls = {"refused": refused, "silent": silent, "nonsense": "nonsense://x"}

    def set_sources(first, mirror):
        for key, how in (("url", first), ("mirror", mirror)):
            monkeypatch.setitem(D4RL, key, urls.get(how, f"{server}/{how}") + "/")

    return set_sources


def is_there(folder):
    """Whether the folder has the file and nothing else, and the file has its transitions."""
    return len(load_dataset(TASK).rewards) == 2997 and [path.name for path in folder.iterdir()] == [NAME]


def test_a_good_file_is_downloaded_once(folder, sources, content, capfd):
    sources("good", "missing")
    assert is_there(folder)
    assert (folder / NAME).read_bytes() == content
    sources("missing", "missing")
    assert is_there(folder)
    assert capfd.readouterr().out.count("downloading") == 1


WAYS_TO_FAIL = {  # how a source behaves -> what the message says of it
    "missing": "404",
    "truncated": "bytes instead of",
    "short": "bytes instead of",
    "wrong": "SHA-256",
    "html": "bytes instead of",
    "endless": "goes on after",
    "slow": "too slow",
    "silent": "timed out",
    "refused": "refused",
    "nonsense": "unknown url type",
}


@pytest.fixture
def impatient(monkeypatch):
    """Limits that suit a test."""
    monkeypatch.setattr(downloads, "SILENCE", 1)
    monkeypatch.setattr(downloads, "PATIENCE", 1)
    monkeypatch.setattr(downloads, "LARGEST", 10**6)


@pytest.mark.parametrize("bad", WAYS_TO_FAIL)
def test_the_mirror_helps_when_the_first_source_fails(bad, folder, sources, impatient):
    sources(bad, "good")
    assert is_there(folder)


@pytest.mark.parametrize(
    ("bad", "reason", "hash_known"),
    [(bad, reason, True) for bad, reason in WAYS_TO_FAIL.items()]
    + [(bad, WAYS_TO_FAIL[bad], False) for bad in ("missing", "truncated", "endless", "slow")]
    + [("html", "not HDF5", False)],
)
def test_all_sources_fail(bad, reason, hash_known, folder, sources, impatient, monkeypatch):
    sources(bad, "missing")
    for name in () if hash_known else ("bytes", "sha256"):
        monkeypatch.setitem(D4RL_TASKS[TASK], name, None)
    with pytest.raises(UserError) as error:
        load_dataset(TASK)
    assert list(folder.iterdir()) == []
    for part in (reason, f"gym_mujoco_v2/{NAME}", str(folder), "404", "D4RL_DATASET_DIR", "hopper-mini-v0"):
        assert part in str(error.value)


def test_the_mirror_of_the_user_comes_first(folder, sources, server, monkeypatch, capfd):
    monkeypatch.setenv("D4RL_MIRROR", f"{server}/good")
    sources("missing", "missing")
    assert is_there(folder)
    assert capfd.readouterr().out.count("downloading") == 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_leaves_no_file_and_the_next_one_works(end, folder, sources):
    sources("stalled", "missing")
    code = (
        "from common import datasets, tasks\n"
        f"tasks.D4RL.update({ {key: D4RL[key] for key in ('url', 'mirror')} })\n"
        f"tasks.D4RL_TASKS[{TASK!r}] = {D4RL_TASKS[TASK]!r}\n"
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
    assert is_there(folder)


def test_seeds_that_start_together_do_not_disturb_each_other(folder, sources):
    sources("good", "missing")
    lengths = []

    def load():
        lengths.append(len(load_dataset(TASK).rewards))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [2997] * 4
    assert is_there(folder)


def test_a_part_that_another_seed_completes_meanwhile(folder, sources, monkeypatch):
    """Found, but renamed before its age is looked at."""
    sources("good", "missing")
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "hopper.hdf5.1.part"])
    assert len(load_dataset(TASK).rewards) == 2997


def test_a_local_file_is_used_as_it_is(folder, sources, content):
    sources("missing", "missing")
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    assert is_there(folder)
    (folder / NAME).write_bytes(content[:1000])
    with pytest.raises(UserError, match=f"{NAME} has 1,000 bytes, not {len(content):,}.*\n--dataset"):
        load_dataset(TASK)
    assert (folder / NAME).exists()


def test_a_folder_that_cannot_be_used(folder, sources):
    sources("good", "good")
    folder.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not download.*\n.*\n.*FileExistsError"):
        load_dataset(TASK)


@pytest.mark.parametrize("how", ["silent", "refused"])
def test_minari_is_not_asked_if_its_host_does_not_answer(how, request, minari_folder, monkeypatch):
    monkeypatch.setattr(minari_data, "SILENCE", 1)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_ENDPOINT", request.getfixturevalue(how))
    start = time.monotonic()
    with pytest.raises(UserError, match="(?s)D4RL/door/human-v2: .*(timed out|refused).*minari download"):
        load_dataset("D4RL/door/human-v2")
    assert time.monotonic() - start < 30  # Minari itself asks for minutes


def test_minari_stops_if_its_host_falls_silent(server, minari_folder, monkeypatch):
    """It answers the first request and no other; the client would wait for ever."""
    monkeypatch.setattr(minari_data, "SILENCE", 0.2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's attempts
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="(?s)human-v2: ReadTimeout.*minari download.*hopper-mini-v0"):
        load_dataset("D4RL/door/human-v2")


def test_nobody_is_asked_for_a_local_minari_dataset(minari_folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "nonsense://x")
    with pytest.raises(UserError, match="no Minari dataset local/mine-v0 is on this machine"):
        load_dataset("local/mine-v0")
