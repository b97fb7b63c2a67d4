"""Files that are whole or not there; one process at a time; no litter."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from pyro_flowguides.training import files
from pyro_flowguides.training.files import check_writable, locked, part_of, write_whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs flock")

HOLDER = """
    import sys, time
    from pathlib import Path
    from pyro_flowguides.training.files import locked
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a file."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "fit.pt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_process_at_a_time(holder, tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} is using it"), locked(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    # What is left of it locks nothing.
    assert (tmp_path / ".fit.pt.lock").exists()
    with locked(path):
        assert (tmp_path / ".fit.pt.lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_in_this_process_too(tmp_path):
    path = tmp_path / "fit.pt"
    with locked(path):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} is using it"), locked(path):
            pass
        with locked(tmp_path / "other.pt"):
            pass
        assert (tmp_path / ".fit.pt.lock").exists()
    with locked(path):
        pass


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_lock_file_that_its_holder_has_taken_away_meanwhile_locks_nothing(what, tmp_path, monkeypatch):
    """Between the opening and the locking of it, whoever held it has removed it, and somebody else may have made a new one."""
    path, lock, real, times = tmp_path / "fit.pt", tmp_path / ".fit.pt.lock", files.fcntl.flock, []

    def flock(handle, operation):
        if not times:
            lock.unlink()
            if what == "replaced":
                lock.write_text("")
        times.append(handle)
        real(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(path):
        assert len(times) == 2
        # The file that is there is the one that is locked.
        with open(lock) as other, pytest.raises(BlockingIOError):
            real(other, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_leaves_no_open_file(tmp_path, monkeypatch):
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(files.os, "open", lambda *args: opened.append(real_open(*args)) or opened[-1])
    monkeypatch.setattr(files.os, "close", lambda handle: closed.append(handle) or real_close(handle))
    with locked(tmp_path / "fit.pt"), pytest.raises(BlockingIOError), locked(tmp_path / "fit.pt"):
        pass
    assert len(opened) == 2
    assert sorted(closed) == sorted(opened)


def test_where_the_system_has_no_locks_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    with locked(tmp_path / "fit.pt"), locked(tmp_path / "fit.pt"):
        assert (tmp_path / ".fit.pt.lock").exists()


def test_a_file_is_written_beside_itself_and_moved(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    path.write_bytes(b"old")
    seen = []

    def replace(source, target):
        seen.append((path.read_bytes(), source.read_bytes()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, b"new")
    assert seen == [(b"old", b"new")]
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    path = tmp_path / "fit.pt"
    part_of(path).write_bytes(b"half of")
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
