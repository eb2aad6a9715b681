"""What an operating system does to a run: a disk that is full, a folder of another user."""

import contextlib
import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest

NOBODY = 65534
PAGE = 4096  # what tmpfs gives and takes

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


class Disk:
    """A file system of its own that can be filled up to the last page and emptied again."""

    def __init__(self, folder: Path):
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, leave_pages=0):
        self.free()
        room = os.statvfs(self.folder)
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (room.f_bavail - leave_pages) * room.f_frsize)

    def free(self):
        self.ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def mounting(folder: Path):
    """Give mount(size), which makes `folder` a Disk of that size. It skips the test if this user may not mount one."""
    folder.mkdir()

    def mount(size: str) -> Disk:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk of our own: {done.stderr.strip()}")
        return Disk(folder)

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def as_nobody(function, timeout_s: float):
    """Call function in a child process of the user nobody; return what it returns, which is plain data."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child():
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        theirs.send(function())

    process = context.Process(target=child)
    process.start()
    assert ours.poll(timeout_s), "the child said nothing"
    process.join(timeout_s)
    assert process.exitcode == 0
    return ours.recv()
