"""Files that others may read or write at the same time: replaced as a whole, locked, told apart by a checksum."""

import contextlib
import errno
import fcntl
import json
import os
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# what a file system without locks answers: Lustre without flock, NFS without lockd
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of this process alone among all machines, that is renamed to it in the end."""
    part = path.with_name(f".{os.getpid()}-{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
