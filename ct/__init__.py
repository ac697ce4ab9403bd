"""CT volumes: reading, judging, preparing, generating. Every command comes through here first."""

import sys

if sys.platform == "win32":  # no fcntl, no fork
    raise SystemExit("this runs on Linux and macOS; on Windows, in WSL")
