"""Files that are whole or not there; one process at a time; no litter."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

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
