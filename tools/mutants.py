"""Would the tests see it if the code were wrong? Mutations of our own code, each against the tests that concern it.

    python -m tools.mutants                        all of tools/mutants.txt: some 20 minutes on one core
    python -m tools.mutants augment.py moco.py     those of these files
    python -m tools.mutants --only 12 40 --jobs 2  those with these numbers, two at a time

Each mutation is made alone, in a copy of this checkout, and its tests run until one is red. It survives where none is,
and then a line of the code is held by no test. The tests themselves come first: all must be green on the code as it is.
Exit code 0 where at most 3 in 100 survive.

tools/mutants.txt: `== FILE: TESTS` opens a part, whose lines are code of FILE, each once in it, with «what stands
there→what takes its place». TESTS is what pytest gets. A line that is not there any more, or twice, is an error.

A mutation is tried in a fork of a process that has torch and the others imported, but nothing of this project: that
takes seconds, and is done once.
"""

import ast
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ct.command import Parser, whole

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".txt")
MOST = 0.03  # share of the mutations that may survive
CPU, WALL = 120, 1200  # seconds that the tests of a mutation may compute, and take: what loops for ever is found
LIBRARIES = ("torch", "torchvision", "numpy", "scipy.ndimage", "scipy.spatial", "scipy.stats", "nibabel", "PIL.Image",
             "tqdm", "pytest")
CHANGE = re.compile("«(.*?)→(.*?)»")
KILLED, SURVIVED, ERROR = "killed", "SURVIVED", "ERROR"


class Mutant(NamedTuple):
    """A line of the table: its number there, what is changed where, and pytest's arguments."""

    number: int
    file: str
    line: str
    tests: str

    def path(self, root: Path) -> Path:
        """Its file below `root`; where that has moved, the only one of its name. Raises ValueError for none."""
        found = [root / self.file] if (root / self.file).exists() else [*root.rglob(Path(self.file).name)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} files of this name")
        return found[0]

    def applied(self, source: str) -> str:
        """The file's source with the change. Raises ValueError where it is not to be made at one place alone."""
        old, new = (CHANGE.sub(rf"\{side}", self.line) for side in (1, 2))
        if old == new:
            raise ValueError("changes nothing")
        if source.count(old) != 1:
            others = [f for f in checkout() if f.endswith(".py") and old in (ROOT / f).read_text(errors="replace")]
            raise ValueError(f"stands {source.count(old)} times there" + f", and in {', '.join(others)}" * bool(others))
        changed = source.replace(old, new)
        ast.parse(changed)  # else it would be found by Python, not by a test
        return changed


def table(path: Path = TABLE) -> Iterator[Mutant]:
    """The mutations, numbered from 1; empty lines and those that begin with # say nothing. Raises ValueError."""
    file, tests, number = "", "", 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            file, tests = line.removeprefix("== ").split(": ", 1)
        elif line.strip() and not line.startswith("#"):
            if not CHANGE.search(line):
                raise ValueError(f"{path}: {line}: no «...→...» in it")
            number += 1
            yield Mutant(number, file, line.strip(), tests)


def checkout() -> list[str]:
    """All files of this checkout that git does not ignore, by their paths in it."""
    found = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    return [name for name in os.fsdecode(found.stdout).split("\0") if name and (ROOT / name).is_file()]


class First:
    """A pytest plugin that writes down the first test that fails."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        """Of setup, test or teardown."""
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)


def run_tests(copy: Path, tests: str) -> tuple[int, str]:
    """pytest in a fork of this process, on a copy of the checkout -> (its exit code, the first test that failed).

    Minus the signal's number as the code where one ended it, as it does when the time is up.
    """
    red, began = copy / "red.txt", time.monotonic()
    red.unlink(missing_ok=True)
    if not (pid := os.fork()):
        code = 3
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 5))
            os.chdir(copy)
            out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
            for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", None)).startswith(f"{ROOT}/")
                         and ".venv" not in m.__file__]:
                del sys.modules[name]
            import pytest
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *shlex.split(tests)],
                                   [First(red)]))
        finally:
            os._exit(code)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > WALL:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1]), red.read_text() if red.exists() else ""


def attempt(tests: str, mutant: Mutant | None = None) -> tuple[str, str, float]:
    """(KILLED, SURVIVED or ERROR, by what, seconds) of a mutant; of the code as it is it must survive, too."""
    began, path = time.monotonic(), None
    if mutant:
        try:
            path = mutant.path(COPY)
            source, stat = path.read_text(encoding="utf-8"), path.stat()
            path.write_text(mutant.applied(source), encoding="utf-8")
        except (ValueError, SyntaxError) as e:
            return ERROR, str(e), 0.0
        os.utime(path, (mutant.number,) * 2)  # of one size and second, Python would take what it compiled before
    try:
        code, red = run_tests(COPY, tests)
    finally:
        if path:
            path.write_text(source, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seconds = time.monotonic() - began
    if code == 0:
        return SURVIVED, "", seconds
    if code == 1 and red:
        return KILLED, red.removeprefix("tests/"), seconds
    if code < 0:  # by the limit of time; or a kernel of torch's crashed
        return KILLED, signal.Signals(-code).name, seconds
    last = (COPY / "out.txt").read_text(errors="replace").strip().splitlines()[-1:]
    return ERROR, f"pytest {tests} ended with {code}: {' '.join(last)}", seconds


def make_copy(folder: Path, files: Sequence[str]) -> None:
    """The copy of the checkout that a process works in, under the name COPY there."""
    global COPY
    COPY = Path(tempfile.mkdtemp(dir=folder))
    for name in files:
        (COPY / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, COPY / name)
    os.environ["TMPDIR"] = tempfile.tempdir = str(COPY)  # what tests leave goes with it


def trials(mutants: Sequence[Mutant]) -> Iterator[tuple[str, Mutant | None]]:
    """What is tried, in order: each mutant with its tests, and before the first with these tests the code as it is."""
    known = set()
    for mutant in mutants:
        if mutant.tests not in known:
            known.add(mutant.tests)
            yield mutant.tests, None
        yield mutant.tests, mutant


def main(argv: list[str] | None = None) -> int:
    """Try the mutations, a line for each; returns the exit code."""
    parser = Parser(prog="python -m tools.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", help="only mutations of these files (default: all)")
    parser.add_argument("--only", nargs="+", type=whole(1), metavar="N", help="only the mutations with these numbers")
    parser.add_argument("--jobs", type=whole(1), default=1, help="mutations tried at once (%(default)s)")
    args = parser.parse_args(argv)
    mutants = [m for m in table() if m.file in (args.files or [m.file]) and m.number in (args.only or [m.number])]
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process with threads cannot be forked
    for name in LIBRARIES:
        __import__(name)
    began, found, red = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ProcessPoolExecutor(
            args.jobs, multiprocessing.get_context("fork"), make_copy, (Path(folder), checkout())) as pool:
        tried = list(trials(mutants))
        outcomes = pool.map(attempt, *zip(*tried, strict=True))
        for (tests, mutant), (end, why, seconds) in zip(tried, outcomes, strict=True):
            why = f"   [{why}]" * bool(why)
            if mutant:
                found.append(end)
                print(f"{mutant.number:4} {end:8} {seconds:5.1f} s  {mutant.file}: {mutant.line}{why}", flush=True)
            elif end != SURVIVED:
                red += 1
                print(f"NOT GREEN on the code as it is, so its mutations say nothing: {tests}{why}", flush=True)
    survived, errors = found.count(SURVIVED), found.count(ERROR)
    share = survived / max(1, len(found))
    print(f"{len(found)} mutations, {survived} survived ({100 * share:.1f} %, at most {100 * MOST:g} % may), {errors} "
          f"could not be tried, {red} selections of tests not green, {(time.monotonic() - began) / 60:.0f} min")
    return int(bool(red or errors or share > MOST))


if __name__ == "__main__":
    sys.exit(main())
