"""CT volumes: reading, judging, preparing, generating. Every command comes through here first."""

import contextlib
import os
import signal
import sys

if sys.platform == "win32":  # no fcntl, no fork
    raise SystemExit("this runs on Linux and macOS; on Windows, in WSL")


def importing() -> None:
    """From here on until `ct.command.command` is at work Ctrl-C is one line: torch takes seconds to import.

    As a handler, not an exception: C code that imports something drops one and goes on. A SIGINT that is ignored or
    handled otherwise stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def interrupted(*_) -> None:
    """End with the line and the exit code of `ct.command.command`."""
    with contextlib.suppress(OSError):
        os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted; the same command continues\n".encode())
    os._exit(128 + signal.SIGINT)


if sys.argv[:1] == ["-m"]:  # python -m of a module of ct or tools is about to import it
    importing()
