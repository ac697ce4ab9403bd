"""The edge of every command: what its flags may be, what it prints, how it ends.

It stands in ct because ct has commands of its own, and in front of torch, which takes seconds to import.
"""

import argparse
import codecs
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TextIO

from ct.volumes import BadInput


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        """End with the message in one line on stderr, and exit code 2."""
        self.exit(2, f"{self.prog}: {printable(message)} (see --help)\n")


def whole(least: int = 0) -> Callable[[str], int]:
    """A flag's type: whole numbers from `least` on."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {least}")

    return parse


def number(least: float = -math.inf, most: float = math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """A flag's type: finite numbers from `least` to `most`, greater than `above`."""
    bounds = (f"of at least {least:g}" * math.isfinite(least), f"above {above:g}" * math.isfinite(above),
              f"of at most {most:g}" * math.isfinite(most))

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and least <= value <= most and value > above:
                return value
        raise argparse.ArgumentTypeError(" ".join([f"{text}: must be a number", *filter(None, bounds)]))

    return parse


def folder(text: str) -> Path:
    """A flag's type: a folder, or a place where one can be made."""
    path = Path(text)
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is no folder")
    return path


def listed(text: str) -> tuple[str, ...]:
    """A flag's type: names, with commas between them."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text}: a name is missing; give A,B")
    return found


def cores() -> int:
    """The cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def printable(text: object) -> str:
    """One line that any terminal can show: of a file's name, control characters and bytes that are no text escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def cause(error: OSError) -> str:
    """What an OSError says in a message: the file, and what the system says of it."""
    file = error.filename2 or error.filename
    return f"{file}: {error.strerror or error}" if file else str(error.strerror or error)


def command(main):
    """Wrap a command's main(argv): bad input and what files and disks refuse end it with one line on stderr and exit
    code 1, Ctrl-C with one line and 130. It prints to any stdout: see `_Outliving` and `_spell`.
    """

    @wraps(main)
    def wrapped(argv=None, *more):
        """`main`, ending as above."""
        with contextlib.redirect_stdout(_outliving(sys.stdout)), contextlib.redirect_stderr(_outliving(sys.stderr)):
            try:
                try:
                    return main(argv, *more)
                finally:
                    sys.stdout.flush()
            except BadInput as e:
                _print_error(str(e), e.relayed)
                raise SystemExit(1) from None
            except OSError as e:
                _print_error(cause(e))
                sys.stdout.abandon()
                raise SystemExit(1) from None
            except KeyboardInterrupt:  # outside the training loops, where StopRequest is not at work
                _print_error("interrupted; the same command continues")
                raise SystemExit(128 + signal.SIGINT) from None

    return wrapped


def _print_error(line: str, relayed: bool = False) -> None:
    """The line with which a command ends; of several processes each says what it found itself, with its rank."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = world not in ("", "1")
    if not (several and relayed and rank != "0"):
        print(f"{Path(sys.argv[0]).name}: {f'process {rank}: ' * several}{printable(line)}", file=sys.stderr)


class _Outliving:
    """A stream that outlives its reader: after `| head`, what is printed goes nowhere and the command goes on."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.to_nowhere()

    def abandon(self) -> None:
        """If it cannot take what it still holds (a full disk), it must not try, and fail, again at the exit."""
        try:
            self.stream.flush()
        except OSError:
            self.to_nowhere()

    def to_nowhere(self) -> None:
        with contextlib.suppress(OSError):  # a stream without a file, in a test or a notebook, has nothing to redirect
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def _outliving(stream: TextIO | None) -> _Outliving:
    if stream is None:  # closed by the shell: >&-
        stream = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    # a notebook's stream; or one opened as a file whose descriptor has become a pipe since
    with contextlib.suppress(AttributeError, OSError):
        stream.reconfigure(errors="spell")
    return stream if isinstance(stream, _Outliving) else _Outliving(stream)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks, in ASCII: ± as +-, all else, bytes of a file's name too, as an escape."""
    text = error.object[error.start : error.end]
    return "".join("+-" if c == "±" else c.encode("ascii", "backslashreplace").decode() for c in text), error.end


codecs.register_error("spell", _spell)
