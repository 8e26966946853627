"""Files that survive a power cut, and files that nobody else reads. Save, then send: these are the saves."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privacy import faults
from privacy.errors import UserError


class DiskError(UserError):
    """A disk did not take what had to be written: full, read-only or not ours. Nothing that was confirmed is lost."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk can do wrong into one line: full, read-only, not permitted."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free space on this file system; nothing that was confirmed is lost",
            errno.EDQUOT: "raise the quota; nothing that was confirmed is lost",
            errno.EROFS: "mount the file system writable",
            errno.ENOENT: "make its directory first, or check the path",
            errno.EACCES: "check owner and mode of the directory",
        }
        raise DiskError(
            f"{path}: expected to write, found: {error.strerror or error}", hint=hints.get(error.errno or 0, "")
        ) from error


def as_its_owner(directory: Path) -> None:
    """Root must not write into the directory of another account: a daemon that runs as that could not read the files.

    Raises:
        UserError: this is root, and the directory is somebody else's.
    """
    if os.geteuid() != 0:  # who may not look at the directory is told so by whatever reads it
        return
    owner = directory.stat().st_uid if directory.exists() else 0
    if owner == 0:
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:  # of a container, or of another machine
        name = f"#{owner}"
    raise UserError(
        f"{directory}: expected to be run as '{name}', whose directory it is, found root",
        hint=f"runuser -u {name} -- {Path(sys.argv[0]).name} …" if name[0] != "#" else f"sudo -u '{name}' …",
    )


@contextmanager
def only_one(directory: Path, what: str) -> Iterator[None]:
    """Hold the lock of a directory: two processes could not see what the other is about to record.

    The lock ends with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    with disk_errors(directory):
        descriptor = os.open(directory / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory}: expected no other {what} here, found one running",
                hint="stop it before you start another",
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def exclusively(lock: Path) -> Iterator[None]:
    """Wait for the lock of a file, and hold it: one process, and one thread of it, at a time.

    The lock ends with the process, however it ends.

    Raises:
        DiskError: the file cannot be made.
    """
    with disk_errors(lock):
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def fsync_file(descriptor: int, path: Path | str) -> None:
    """Make what was written to an open file durable; ``path`` names the fault points around it."""
    faults.point("before-fsync", path)
    os.fsync(descriptor)
    faults.point("after-fsync", path)


def fsync_directory(path: Path) -> None:
    """Make created, renamed and deleted names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync_file(descriptor, f"{path.name}/")
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file, or a directory to a new name; not durable before :func:`fsync_directory` of the parent."""
    faults.point("before-rename", target)
    source.replace(target)
    faults.point("after-rename", target)


def replace_durably(staging: Path, path: Path) -> None:
    """Give a file (fsynced by the caller) or a directory its final name; durable when this returns."""
    rename(staging, path)
    fsync_directory(path.parent)


def cut_durably(path: Path, size: int) -> None:
    """Cut a file to its first ``size`` bytes; durable when this returns.

    Raises:
        DiskError: the disk is read-only or not ours.
    """
    with disk_errors(path), path.open("rb+") as file:
        faults.point("before-truncate", path)
        file.truncate(size)
        fsync_file(file.fileno(), path)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of an append-only file, without their ends; none if there is no file.

    Half a line at the end is what a crash in mid-append left: it was never acknowledged, and is cut off.

    Raises:
        DiskError: half a line cannot be cut off.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        cut_durably(path, whole)
    return content[:whole].split(b"\n")[:-1]


def reserve(path: Path, length: int) -> None:
    """A private file of ``length`` bytes whose space is taken now, so that a full disk shows here and not half-way.

    What the file holds already stays.

    Raises:
        DiskError: the disk is too full, or not writable.
    """
    with disk_errors(path):
        created = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            faults.point("before-reserve", path)
            os.posix_fallocate(descriptor, 0, length)
        except OSError:
            if created:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        if created:  # what says later that a part of it is durable must not outlive its name
            fsync_directory(path.parent)


def make_private_directory(path: Path) -> Path:
    """Create a directory that only this account can enter, and those above it; their names are durable."""
    if not path.is_dir():
        with disk_errors(path):
            if path.parent != path:
                make_private_directory(path.parent)
            path.mkdir(mode=0o700, exist_ok=True)
            fsync_directory(path.parent)
    return path


def write_durably(path: Path, content: bytes, *, private: bool = True) -> None:
    """Replace ``path`` by ``content``, whole or not at all, and on disk when this returns.

    Raises:
        DiskError: the disk is full, read-only or not ours; the old file is as it was.
    """
    staging = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    with disk_errors(path):
        try:
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
            with os.fdopen(descriptor, "wb") as file:
                faults.point("before-write", path)
                file.write(content)
                file.flush()
                fsync_file(descriptor, path)
            replace_durably(staging, path)
        finally:
            staging.unlink(missing_ok=True)


def append_durably(path: Path, content: bytes) -> None:
    """Append to a private file, created if need be; on disk when this returns.

    Raises:
        DiskError: the disk is full or not writable; the file is as it was. (After a power cut a partial line may
            remain; the reader cuts it off.)
    """
    with disk_errors(path):
        created = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            before = os.fstat(descriptor).st_size
            try:
                faults.point("before-write", path)
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                fsync_file(descriptor, path)
            except OSError:
                file.truncate(before)  # or the next line would continue this one
                raise
        if created:
            fsync_directory(path.parent)


def read_file(path: Path, what: str, hint: str = "check the path") -> bytes:
    """The bytes of a file the user must have; raises UserError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected {what}, found: {error.strerror or error}", hint=hint) from error


def read_private(path: Path, what: str, hint: str) -> bytes:
    """As :func:`read_file`, for secrets: group and others must have no access.

    Raises:
        UserError: missing, unreadable, or open to other accounts.
    """
    content = read_file(path, what, hint)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise UserError(f"{path}: expected mode 0600, found {mode:04o}", hint=f"chmod 600 {path}")
    return content
