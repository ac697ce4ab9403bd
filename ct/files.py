"""Files that others may read or write at the same time: replaced as a whole, locked, told apart by a checksum."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import socket
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# what a file system without locks answers: Lustre without flock, NFS without lockd
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
PART = r"\.part-(\w+)-(\d+)-\w+\."  # the beginning of a temporary name: machine and process
ABANDONED = 24 * 3600  # seconds without a write


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of this write alone among all machines, that is renamed to it in the end.

    What a writer that was killed has left in this folder is removed first.
    """
    with contextlib.suppress(OSError):  # what cannot be listed will not be written to
        for entry in os.scandir(path.parent):
            if (writer := re.match(PART, entry.name)) and _has_ended(*writer.groups(), entry):
                os.unlink(entry)
    part = path.with_name(f".part-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # that there is none, or a folder that is read-only
            part.unlink()


def remove_parts(folder: Path) -> None:
    """What killed writers have left in a folder that this process has locked; of earlier versions, too."""
    for pattern in (".part-*", ".*.part", ".[0-9]*.*"):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """Among which machine's processes a number is this process: its boot and container, else its name."""
    try:
        known = f"{Path('/proc/sys/kernel/random/boot_id').read_text()}{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # macOS
        known = socket.gethostname()
    return f"{zlib.crc32(known.encode()):08x}"


def _has_ended(machine: str, pid: str, part: os.DirEntry) -> bool:
    """Whether the writer of a part is gone. Of another machine's it is seen only by the part's age."""
    if machine != _machine():
        return time.time() - part.stat().st_mtime > ABANDONED
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # someone else's
        pass
    return False


def write_json(path: Path, value: object) -> None:
    """A value as JSON, in place of what is at `path`."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1))


def checksum(path: Path) -> str:
    """CRC-32 of a file, as gzip and zip have it: against damage, at a third of the time of SHA-256."""
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def lock(file: IO, wait: bool = False) -> bool:
    """Lock an open file for this process, until it ends or closes it. Raises BlockingIOError where another has it.

    False, with a warning, on a file system that has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(e.errno, e.strerror) from None
        if e.errno not in NO_LOCKS:
            raise
        print(f"warning: {Path(file.name).parent}: no locks on this file system ({e.strerror}); going on without, so "
              "let no other process write there meanwhile", file=sys.stderr)
        return False
    return True
