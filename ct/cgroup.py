"""What a container leaves to this process, by Linux's control groups (v1 and v2): CPU time and memory.

The quota of a container is in no count of cores and no size of memory that the system gives; those are the machine's.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")  # in tests that of a made-up tree


def cpus() -> float:
    """How many cores' time this process may use by its groups' quotas; infinite where nothing limits it."""
    least = math.inf
    for folder in _folders("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # v2, v1
            with contextlib.suppress(OSError, ValueError):  # a file of the other version; "max"
                quota, period = (int(n) for file in files for n in (folder / file).read_text().split())
                if quota > 0:  # v1's -1: no limit
                    least = min(least, quota / period)
    return least


def memory() -> float:
    """Bytes that this process's groups may use; infinite where nothing limits them."""
    least = math.inf
    for folder in _folders("memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):  # v2, v1
            with contextlib.suppress(OSError, ValueError):
                least = min(least, int((folder / file).read_text()))
    return least


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of all above it, whose limits hold, too."""
    try:
        groups, mounts = ((ROOT / "proc/self" / file).read_text().splitlines() for file in ("cgroup", "mountinfo"))
    except OSError:  # macOS
        return
    own = {}  # path of the group in v1's hierarchy of this controller, and in v2's, which has all
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in mounts:
        mount, _, system = line.partition(" - ")
        (root, at), (kind, *_, options) = mount.split()[3:5], system.split()
        if kind in own and (kind == "cgroup2" or controller in options.split(",")):
            below = own[kind].relative_to(root) if own[kind].is_relative_to(root) else PurePosixPath()
            folder = ROOT / at.lstrip("/") / below
            yield from (folder, *folder.parents[: len(below.parts)])
