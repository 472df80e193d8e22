"""What the operating system offers for files that must appear whole: locks, reservation, clones, durable renames."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from qbuild.budget import format_size
from qbuild.errors import StoreError

__all__ = [
    "COPY_BUFFER",
    "FileLock",
    "clone",
    "disk_error",
    "disk_free",
    "fsync_dir",
    "hash_range",
    "may_write",
    "read_exact",
    "reserve",
    "stat_of",
    "write_all",
]

COPY_BUFFER = 4 << 20
FICLONE = 0x40049409  # linux/fs.h; Python has no name for it before 3.14
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def stat_of(path: Path) -> os.stat_result | None:
    """The stat of a file, or None where there is none."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def disk_free(path: Path) -> int:
    """Free bytes, for us, of the file system that holds ``path`` or would hold it."""
    found = os.statvfs(_nearest(path))
    return found.f_bavail * found.f_frsize


def may_write(path: Path) -> bool:
    """Whether a folder, or the nearest one above that exists, lets us write."""
    found = _nearest(path)
    return found.is_dir() and os.access(found, os.W_OK | os.X_OK)


def _nearest(path: Path) -> Path:
    """``path``, or the nearest folder above it that we see."""
    while not os.access(path, os.F_OK) and path != path.parent:  # Path.exists raises in a folder that we cannot enter
        path = path.parent
    return path


def disk_error(error: OSError, place: Path, needed: int = 0) -> StoreError:
    """The message for a failed write to the store."""
    if error.errno in FULL:
        need = f" {format_size(needed)} are needed," if needed else ""
        free = format_size(disk_free(place))
        remedy = "free space (qbuild gc -n shows what the store can free)\nor use another disk: store.dir=DIRECTORY"
        return StoreError(str(place), f"disk full:{need} {free} are free", remedy)
    if error.errno in FORBIDDEN:
        fact = f"cannot be written: {os.strerror(error.errno or 0)}"
        return StoreError(str(place), fact, "use a store you may write: store.dir=DIRECTORY")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StoreError(str(place), reason, "check the disk, or use another store: store.dir=DIRECTORY")


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_exact(fd: int, into: memoryview, offset: int) -> bool:
    """Fill ``into``; False where the file ends before."""
    view = into.cast("B")
    while view:
        done = os.preadv(fd, [view], offset)
        if done == 0:
            return False
        view, offset = view[done:], offset + done
    return True


def hash_range(fd: int, offset: int, length: int, update: Callable[[memoryview], None]) -> bool:
    """Feed bytes of a file to ``update`` in constant memory; False where the file ends before."""
    buffer = memoryview(bytearray(min(COPY_BUFFER, max(length, 1))))
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_SEQUENTIAL)
    for start in range(0, length, len(buffer)):
        part = buffer[: min(len(buffer), length - start)]
        if not read_exact(fd, part, offset + start):
            return False
        update(part)
    return True


def fsync_dir(path: Path) -> None:
    """Make a rename in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # some network file systems refuse to sync a directory
            raise
    finally:
        os.close(fd)


def reserve(fd: int, size: int) -> None:
    """Give the file its size and, where the file system can, its blocks. Raises OSError (ENOSPC) when they do not fit.

    Not os.posix_fallocate: where the file system has no reservation glibc imitates it with one write per block.
    """
    os.ftruncate(fd, size)
    if size == 0:
        return
    code = _fallocate(fd, size)
    if code in UNSUPPORTED:
        found, allocated = os.fstatvfs(fd), os.fstat(fd).st_blocks * 512
        code = errno.ENOSPC if size - allocated > found.f_bavail * found.f_frsize else 0
    if code:
        raise OSError(code, os.strerror(code))


def _fallocate(fd: int, size: int) -> int:
    """errno of fallocate(2), 0 when it worked."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate64"):  # macOS, musl
        return errno.ENOSYS
    while libc.fallocate64(ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


def clone(source: int, target: int) -> bool:
    """Make ``target`` share the blocks of ``source``; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


class FileLock:
    """flock(2) on a file of its own: the kernel releases it when the holder dies. Usable from any thread.

    The file is removed by the last holder, so a waiter checks that what it locked still is the file of that name.
    (The filelock package leaves one file per name behind, has no shared mode here, and takes 60 ms to import.)
    """

    def __init__(self, path: Path, *, shared: bool = False, keep: bool = False) -> None:
        self.path, self.shared, self.keep = path, shared, keep
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        while True:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise disk_error(error, self.path) from None
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError as error:  # a network file system without locks
                os.close(fd)
                raise disk_error(error, self.path) from None
            found = stat_of(self.path)
            if found is not None and found.st_ino == os.fstat(fd).st_ino:
                self._fd = fd
                return True
            os.close(fd)  # the holder before us removed it

    def acquire(self, on_wait: Callable[[], None] | None = None, timeout: float | None = None) -> bool:
        """Wait for the lock. ``on_wait`` is called once, if there is a wait at all. False after ``timeout`` seconds."""
        if self.try_acquire():
            return True
        if on_wait is not None:
            on_wait()
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.001
        while end is None or time.monotonic() < end:
            time.sleep(pause)
            if self.try_acquire():
                return True
            pause = min(pause * 1.5, 0.05)
        return False

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            if not (self.shared or self.keep):
                self.path.unlink(missing_ok=True)
            os.close(fd)
