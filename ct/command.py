"""The edge of every command: what its flags may be, what it prints, how it ends.

It stands in ct because ct has commands of its own, and in front of torch, which takes seconds to import.
"""

import argparse
import codecs
import contextlib
import errno
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TextIO

import ct
from ct import cgroup
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
    """The cores that this process may use, of those that the machine has; a part of one of a quota counts as one."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(there, cgroup.cpus()))


def printable(text: object) -> str:
    """One line that any terminal can show: of a file's name, control characters and bytes that are no text escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def counted(number: int, noun: str) -> str:
    """A number and what it counts: `1 volume`, `1,062 volumes`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{ending}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if seconds >= 100 else f"{seconds:.0f} s"


def announce(text: str, file: TextIO | None = None) -> None:
    """Print something, by default on stdout, so that it is not overlooked."""
    print("=" * 100, text, "=" * 100, sep="\n", file=file)


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
        if signal.getsignal(signal.SIGINT) is ct.interrupted:  # all is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        out, err = _outliving(sys.stdout), _outliving(sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                with out.missed():
                    return main(argv, *more)
            except BadInput as e:
                _print_error(str(e), e.relayed)
                raise SystemExit(1) from None
            except OSError as e:
                _print_error(cause(e))
                raise SystemExit(1) from None
            except KeyboardInterrupt:  # outside the training loops, where StopRequest is not at work
                _print_error("interrupted; the same command continues")
                raise SystemExit(128 + signal.SIGINT) from None
            finally:
                out.abandon(), err.abandon()

    return wrapped


def _print_error(line: str, relayed: bool = False) -> None:
    """The line with which a command ends; of several processes each says what it found itself, with its rank."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = world not in ("", "1")
    if not (several and relayed and rank != "0"):
        print(f"{Path(sys.argv[0]).name}: {f'process {rank}: ' * several}{printable(line)}", file=sys.stderr)


class _Outliving:
    """A stream whose errors end nothing: what cannot be written is dropped, and the command goes on.

    After `| head`, in a terminal that was closed, on a full disk. Where someone will miss it, `missed` says so.
    """

    def __init__(self, stream: TextIO):
        self.stream, self.lost = stream, None  # the first error that was no reader's going away

    def write(self, text: str) -> int:
        with self._dropping():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self.stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):  # a pipe's and a terminal's reader
                self.lost = self.lost or e

    @contextlib.contextmanager
    def missed(self) -> Iterator[None]:
        """At a good end of what is done in here, raise the error for which someone misses what was printed."""
        try:
            yield
        except SystemExit as e:
            if not e.code:
                self._raise_lost()
            raise
        self._raise_lost()

    def _raise_lost(self) -> None:
        self.flush()
        if self.lost:
            raise self.lost

    def abandon(self) -> None:
        """What the stream still holds and cannot write it must not try, and fail, to write again at the exit."""
        try:
            self.stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # without a file, in a test or a notebook, nothing can be redirected
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
