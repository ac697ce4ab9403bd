"""The edge of the scripts that torchrun may start: the flags that they share, and how they end.

Exit codes: 0 done; 1 data, files or disk are at fault, as one line on stderr says; 2 wrong flags; 128 + signal (130,
143, 129, 138) stopped by SIGINT, SIGTERM, SIGHUP or SIGUSR1 after saving. torchrun reports any of these but 0 as 1.
After 1, once its cause is gone, and after a signal, SIGKILL too, the same command continues where it was.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
import torch.distributed as dist

from ct import command as ct_command
from ct.command import cores, folder, number, whole
from ct.prepare import WINDOW
from ct.volumes import BadInput
from engine.processes import launched

ROOT = Path(__file__).parent.parent
READERS = 16  # threads of a process at most: each holds a batch


def readers() -> int:
    """How many threads of a process read slices where --workers says nothing: its share of the machine's cores."""
    return min(READERS, max(1, cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))


class Parser(ct_command.Parser):
    """A command's parser with the flags that the scripts share."""

    def common(self, data: str, trains: bool = True) -> None:
        """data: the folder below data/ that is taken where --data is not given; trains: or only looks at features."""
        add = self.add_argument
        add("--data", type=Path, help=f"folder of CT volumes (default data/{data} if it exists, else the built-in "
            "phantom)")
        add("--store", type=folder, help="folder of the prepared slices (default stores/NAME-HASH of --data)")
        add("--out", type=folder, default=Path("runs"), help="folder of all runs and results (default runs)")
        add("--seed", type=whole(0), default=0, help="seed of all random numbers (%(default)s)")
        add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto" if trains else "off",
            help="mixed precision; auto: bf16 if the hardware computes in it (default %(default)s)")
        add("--deterministic", action="store_true", help="on a GPU: the same numbers from every run, also a continued "
            "one, at a lower speed (deterministic algorithms, no TF32); on a CPU that is always so")
        if trains:
            add("--checkpoint-minutes", type=number(0), default=10.0, help="minutes between two checkpoints, rounded "
                "up to a tenth step (default %(default)g); one is always written at the end and when you stop a run")
        add("--workers", type=whole(0), help="threads that read slices, and processes that prepare them (default: all "
            f"cores; for reading, divided by the processes on this machine and at most {READERS})")
        add("--window", type=number(), nargs=2, default=WINDOW, metavar=("LOW", "HIGH"),
            help=f"range of HU that becomes 0 to 255 ({WINDOW[0]:g} {WINDOW[1]:g})")

    def with_defaults(self, paper: dict, phantom: dict) -> Callable:
        """`add_argument`, whose help ends in the flag's default: `(the paper's) [the phantom's]`, or its own."""

        def add(flag: str, help: str = "", **kw) -> None:
            """One flag, as `add_argument` takes it."""
            key = flag.removeprefix("--").replace("-", "_")
            if paper.get(key):
                help += f" ({paper[key]})"
            elif kw.get("default"):
                help += " (%(default)s)"
            if phantom.get(key):
                help += f" [{phantom[key]}]"
            self.add_argument(flag, help=help, **kw)

        return add


def fill(args: argparse.Namespace, defaults: dict) -> None:
    """Set what the command line left open, in place."""
    for key, value in defaults.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def command(main):
    """`ct.command.command` for a script of torchrun: its variables are looked at before anything is done."""

    @ct_command.command
    @wraps(main)
    def wrapped(argv=None):
        """`main`, ending in one line also where memory is short; leaves the group of processes."""
        warnings.formatwarning = one_line
        try:
            launched()
            return main(argv)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            if not isinstance(e, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(e):
                raise
            raise BadInput("not enough memory; lower --groups-per-pass, --batch-size, --queue or the sizes in pixels, "
                           "and run it again") from None
        finally:
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


def one_line(message, category, filename, lineno, line=None, formatted=warnings.formatwarning) -> str:
    """A warning of this repository without the place in its code; others, whose place says whose they are, as Python
    has them.
    """
    own = Path(filename).is_relative_to(ROOT) and "site-packages" not in filename
    return f"warning: {message}\n" if own else formatted(message, category, filename, lineno, line)
