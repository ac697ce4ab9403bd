"""The long forms of the reliability tests, on a small phantom; ends with one table and exit code 1 on a failure.

    python tests/stress.py                                            all of it: within an hour on 2 cores
    python tests/stress.py --only kills disk --kills 6                parts of it

Runs are forked from this process, which has imported everything and computed nothing: a start then takes no time,
and what is left of a second is spent where kills are wanted.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: no pool of threads that a fork would lose, and no sharing of cores
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mutations  # noqa: E402
import narrow  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import ct.files  # noqa: E402
import datasets  # noqa: E402
import train_seg  # noqa: E402
import train_ssl  # noqa: E402
from ct import phantom, volumes  # noqa: E402
from engine import figures, origin, processes, runs  # noqa: E402

STEPS = 5  # of pre-training, with checkpoints after 3 and 5; of segmentation, after 2, 4 and 5
HANG = 600  # s without what is waited for: a hang. Nothing here depends on how fast the machine is
TIMES = {"images_per_s", "mfu", "seconds_left", "data_share", "wall_s"}


train_seg.EVAL_INTERVAL = 2


# Seconds after which torchrun's agent kills those that are left of a group. Most end by themselves; gloo has been seen
# to wait for a process that was killed while DistributedDataParallel was made.
AGENT = 30


class Failed(Exception):
    pass


def check(holds: bool, what: object) -> None:
    if not holds:
        raise Failed(str(what))


def await_that(happened: Callable[[], bool], running: Callable[[], bool], told: Callable[[], str]) -> None:
    """Wait until something has happened. Raises Failed where what should do it has ended, or hangs."""
    end = time.monotonic() + HANG
    while True:
        goes_on = running()  # looked at before: its last act counts
        if happened():
            return
        check(goes_on, f"ended too early: {told()[-2000:]}")
        check(time.monotonic() < end, f"a hang: {told()[-2000:]}")
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- the scripts


class Bench:
    """A folder with the phantom, its stores and the runs; how to start a script and what it leaves."""

    def __init__(self, folder: Path, seed: int, arch: str = "resnet18"):
        self.folder, self.rng, self.arch = folder, np.random.default_rng(seed), arch
        self.data = folder / "phantom"
        phantom.write(self.data, unlabelled=6, shape=(4, 64, 64))
        self.references: dict[tuple, tuple] = {}
        self.groups_per_pass = 2  # of two: a pass is the step
        figures.pyplot()  # imported before the forks
        datasets.prepare(self.data / "AbdomenCT-1K", folder / "store" / "phantom", "pretrain", size=64)
        datasets.prepare(self.data / "BTCV", folder / "seg", "segment")

    def reference_folder(self, script: str, amp: str, world: int) -> Path:
        return self.folder / f"reference-{script}-{amp}-{world}-{self.groups_per_pass}"

    def command(self, script: str, out: Path, amp: str = "off", steps: int = STEPS) -> list[str]:
        # 48 px: with one cell in the last stage, BN over 4 numbers would amplify rounding; so would whitening more than
        # half as many channels as the 16 positions of a group (the layer warns of it)
        if script == "train_ssl":
            flags = ("--data", self.data / "AbdomenCT-1K", "--store", self.folder / "store" / self.data.name,
                     "--init", "random", "--image-size", 48, "--batch-size", 8, "--bn-group", 4, "--queue", 32,
                     "--zca-group", 8, "--size", 64, "--groups-per-pass", self.groups_per_pass,
                     "--local", "--zca", "--epochs", 1000, "--steps", steps)
        else:
            flags = ("--data", self.data / "BTCV", "--store", self.folder / "seg", "--crop-size", 32, "--batch-size", 2,
                     "--split", 25, "--draw", 1, "--protocol", "linear-finetune", "--backbone", "random",
                     "--iterations", steps)
        # what both scripts are given
        both = ("--out", out, "--amp", amp, "--checkpoint-minutes", 0, "--arch", self.arch)
        return [str(a) for a in (*flags, *both)]

    def run_folder(self, script: str, out: Path) -> Path:
        return out / ("phantom-moco-local-zca" if script == "train_ssl" else "seg/random-linear-finetune-25-1")

    def outcome(self, script: str, out: Path) -> dict:
        """Every tensor and number that a finished run leaves, without the times."""
        folder = self.run_folder(script, out)
        kept = {"checkpoint": runs.load(folder / "checkpoint.pt"), "log": runs.read_log(folder / "log.jsonl")}
        if script == "train_ssl":
            kept["backbone"] = runs.load(folder / "backbone.pth")
        else:
            kept["result"] = json.loads((folder / "result.json").read_text())
            kept["results"] = runs.read_log(out / "results.jsonl")[-1]  # the newest counts
            kept["validation"] = runs.read_log(folder / "validation.jsonl")
        return {name: v for name, v in flat(kept) if name.rpartition(".")[2] not in TIMES}

    def reference(self, script: str, amp: str = "off", world: int = 1) -> tuple[dict, Counter, float]:
        """What a run that is left alone leaves, how it touches its folder, and how long it takes in s."""
        key = (script, amp, world, self.groups_per_pass)
        if key not in self.references:
            out, begin = self.reference_folder(script, amp, world), time.monotonic()
            started = Started(self, script, out, amp, world)
            check(not any(started.wait()), f"{key}: the run left alone failed: {started.told()[-2000:]}")
            took = time.monotonic() - begin
            touches = Counter({tuple(k): n for k, n in json.loads((out / "touches-0.json").read_text())})
            self.references[key] = self.outcome(script, out), touches, took
        return self.references[key]

    def check_equal(self, script: str, out: Path, amp: str = "off", world: int = 1) -> None:
        self.check_same(self.reference(script, amp, world)[0], script, out)

    def check_same(self, wanted: dict, script: str, out: Path) -> None:
        left = self.outcome(script, out)
        check(wanted.keys() == left.keys(), f"{out}: {sorted(wanted.keys() ^ left.keys())[:3]}")
        for name, value in wanted.items():
            same = torch.equal(value, left[name]) if isinstance(value, torch.Tensor) else value == left[name]
            check(same, f"{out}: {name} differs")
        steps = [r["step"] for r in runs.read_log(self.run_folder(script, out) / "log.jsonl")]
        check(steps == list(range(1, len(steps) + 1)), f"{out}: logged steps {steps}")
        rest = [p.name for p in self.run_folder(script, out).iterdir() if "part" in p.name or "next" in p.name]
        check(not rest, f"{out}: left behind {rest}")


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def flat(value, name=""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield from flat(v, f"{name}.{k}")
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from flat(v, f"{name}.{i}")
    else:
        yield name, value


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Started:
    """A script started in `world` forked processes. touch: (kind, name, n), where process 0 kills itself."""

    def __init__(self, bench: Bench, script: str, out: Path, amp: str = "off", world: int = 1, touch=None, before=None,
                 steps: int = STEPS, log: str = "output"):
        self.out, self.log = out, log
        out.mkdir(parents=True, exist_ok=True)
        port, argv = free_port(), bench.command(script, out, amp, steps)
        sys.stdout.flush()
        self.pids, self.outputs, self.codes = [], [], {}
        for rank in range(world):
            with open(out / f"{log}-{rank}.txt", "wb") as f:  # by a process of its own, which no limit will touch
                output = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=f)
            pid = os.fork()
            if not pid:
                os.dup2(output.stdin.fileno(), 1), os.dup2(output.stdin.fileno(), 2)
                self._child(bench, script, argv, rank, world, port, touch, before)
            output.stdin.close()
            self.pids.append(pid)
            self.outputs.append(output)

    def _child(self, bench, script, argv, rank, world, port, touch, before):
        code = 99
        try:
            if world > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.chdir(bench.folder)
            touches = watch(self.out, touch if rank == 0 else None)
            guard(str(bench.folder / "store"), str(bench.folder / "seg"), str(self.out))
            if before:
                before()
            sys.argv = [f"{script}.py", *argv]
            {"train_ssl": train_ssl, "train_seg": train_seg}[script].main(argv)
            code = 0
            (self.out / f"touches-{rank}.json").write_text(json.dumps(list(touches.items())))
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        for pid in self.pids if ranks is None else [self.pids[r] for r in ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def running(self) -> bool:
        """Whether all its processes are at work."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return not self.codes

    def wait(self) -> list[int]:
        """Exit codes, negative for a signal."""
        since = None  # one was killed

        def ended() -> bool:
            nonlocal since
            self.running()
            if -signal.SIGKILL in self.codes.values():
                since = since or time.monotonic()
                if time.monotonic() - since > AGENT:
                    self.kill()
            return len(self.codes) == len(self.pids)

        try:
            await_that(ended, lambda: True, self.told)
        except Failed:
            self.kill()
            raise
        for output in self.outputs:
            output.wait()
        return [self.codes[pid] for pid in self.pids]

    def told(self, rank: int = 0) -> str:
        return (self.out / f"{self.log}-{rank}.txt").read_text(errors="replace")


def guard(*allowed: str) -> None:
    """From here on, a write anywhere but below these folders is an error: no run may leave its places."""
    def hook(event: str, args: tuple) -> None:
        writes = event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate") or (
            event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(args[0], str) and not os.path.abspath(args[0]).startswith((*allowed, "/dev/null")):
            raise RuntimeError(f"{event} {args[0]}: not a place to write")

    sys.addaudithook(hook)


def watch(folder: Path, touch: tuple | None) -> Counter:
    """Count how this process touches a folder, {(kind, file's name): times}; SIGKILL it in the middle of one.

    Temporary names, which differ from write to write, are `.part.NAME` here.
    """
    seen: Counter = Counter()

    def note(kind: str, path: object, half=None) -> None:
        if str(folder) not in str(path):
            return
        key = (kind, re.sub(ct.files.PART, ".part.", Path(str(path)).name))
        seen[key] += 1
        if touch and (*key, seen[key]) == tuple(touch):
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.remove", "os.mkdir"):
            note(event, args[0])
        elif event == "os.rename":
            note(event, args[1])

    class File:
        """What open() gives, of which a write may end half-way."""

        def __init__(self, path, mode):
            self.path, self.file = path, open(path, mode)  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            def half() -> None:
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()

            note("write", self.path, half)
            return self.file.write(data)

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    os.fsync = fsync
    runs.open = lambda path, mode="r": (File if mode in ("wb", "ab+") else open)(path, mode)
    sys.addaudithook(hook)
    return seen


# ---------------------------------------------------------------------------------------------------------- runs


def kills(bench: Bench, count: int) -> list[str]:
    """SIGKILL at random touches of the run folder and at random times; the same command must end as if never."""
    configurations = {"train_ssl": (("off", 1), ("bf16", 2), ("off", 2), ("bf16", 1)),
                      "train_seg": (("bf16", 1), ("off", 1))}
    tried, places = Counter(), Counter()
    while tried.total() < count:
        turn, which = divmod(tried.total(), 2)  # the scripts take turns
        script, ways = list(configurations.items())[which]
        key = script, amp, world = (script, *ways[turn % len(ways)])
        _, touches, took = bench.reference(*key)
        out = bench.folder / "killed"
        remove(out)
        for _ in range(int(bench.rng.integers(1, 3)) if count > 20 else 1):  # the continued run is killed, too
            if bench.rng.random() < 0.6:
                kind, name = list(touches)[bench.rng.integers(len(touches))]
                touch = (kind, name, int(bench.rng.integers(1, touches[kind, name] + 1)))
                codes = Started(bench, script, out, amp, world, touch).wait()
                where = f"{kind} {name}"
            else:
                started = Started(bench, script, out, amp, world)
                time.sleep(float(bench.rng.uniform(0, took)))
                ranks = [int(bench.rng.integers(world))] if bench.rng.random() < 0.5 else None
                started.kill(ranks=ranks)
                codes, where = started.wait(), "any time"
            check(99 not in codes or world > 1, f"{out}: {codes}")
            if -signal.SIGKILL in codes:
                tried[key] += 1
                places[where] += 1
        codes = Started(bench, script, out, amp, world).wait()
        check(not any(codes), f"{out}: continuing ended with {codes} after a kill at {where}")
        bench.check_equal(script, out, amp, world)
    told = ", ".join(f"{n} x {s} {'float32' if a == 'off' else a} {w} process(es)" for (s, a, w), n in tried.items())
    timed = places.pop("any time", 0)
    return [f"| SIGKILL, the same command again | {tried.total()}: {places.total()} in {len(places)} kinds of touches "
            f"of the run folder, {timed} at any time | all equal: {told} |"]


def has_lines(log: Path, lines: int) -> bool:
    return log.exists() and log.read_text().count("\n") >= lines


SIGNALS = ((signal.SIGINT, "bf16", 2, [1]), (signal.SIGUSR1, "off", 1, None), (signal.SIGTERM, "off", 1, None),
           (signal.SIGHUP, "bf16", 2, [0]))


def signals(bench: Bench, given: tuple = SIGNALS) -> list[str]:
    """Signals: saved, 128 + signal, continued exactly; a second one ends at once. A second run is refused."""
    for number, amp, world, ranks in given:
        out = bench.folder / f"signal-{number}"
        log = bench.run_folder("train_ssl", out) / "log.jsonl"
        started = Started(bench, "train_ssl", out, amp, world, steps=1000)
        await_that(lambda log=log: has_lines(log, 3), started.running, started.told)
        started.kill(signal.SIGSTOP)  # or it might end while the second one starts
        if number == given[0][0]:
            second = Started(bench, "train_ssl", out, log="second")
            check(second.wait() == [1] and "another run is at work there" in second.told(), second.told())
        started.kill(number, ranks)
        started.kill(signal.SIGCONT)
        codes, wanted = started.wait(), 128 + number
        # a process that another one's signal stopped says SIGTERM
        expected = [wanted if rank in (ranks or [0]) else 128 + signal.SIGTERM for rank in range(world)]
        check(codes == expected, f"{out}: ended with {codes}")
        saved = runs.load(bench.run_folder("train_ssl", out) / "checkpoint.pt")["step"]
        check(saved == runs.read_log(log)[-1]["step"] and "the same command continues" in started.told(), saved)
        reference = bench.folder / f"never-stopped-{number}"
        for folder in (out, reference):
            check(not any(Started(bench, "train_ssl", folder, amp, world, steps=saved + 2).wait()), f"{folder}: failed")
        bench.check_same(bench.outcome("train_ssl", reference), "train_ssl", out)

    def slow() -> None:
        train_ssl.Trainer.step = lambda *args: time.sleep(2 * HANG)

    started = Started(bench, "train_ssl", bench.folder / "signalled-twice", before=slow)
    handled = 1 << (signal.SIGTERM - 1)

    def caught() -> bool:
        status = Path(f"/proc/{started.pids[0]}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & handled)

    for ready in (caught, lambda: not caught()):  # the handler is there; after the first signal, the default is back
        await_that(ready, started.running, started.told)
        started.kill(signal.SIGTERM)
    check(started.wait() == [-signal.SIGTERM], "a second signal did not end the run in the middle of a step")
    told = ", ".join(f"{signal.Signals(n).name} to {'1 of ' * (w > 1)}{w}" for n, _, w, _ in given)
    return [f"| {told} process(es) | {len(given)} | saved, 128 + signal, continued to equal results |",
            "| a second signal | 1 | ended at once |", "| a second run on a folder at work | 1 | refused |"]


def terminal(bench: Bench) -> list[str]:
    """A terminal is closed: its own run gets SIGHUP, saves and ends; one that it has disowned goes on without it, until
    SIGUSR1.
    """
    for disowned in (False, True):
        ours, theirs = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # tqdm draws nothing without a place

        def attach(ours=ours, theirs=theirs, disowned=disowned) -> None:
            os.close(ours)
            if not disowned:
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though this may run under nohup
                os.setsid()
                fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            for stream in (0, 1, 2):
                os.dup2(theirs, stream)
            os.close(theirs)

        out = bench.folder / f"terminal-{disowned}"
        started = Started(bench, "train_ssl", out, steps=1000, before=attach)
        os.close(theirs)
        os.set_blocking(ours, False)
        folder, told = bench.run_folder("train_ssl", out), b""

        def shown(log=folder / "log.jsonl", ours=ours) -> bool:
            nonlocal told
            with contextlib.suppress(BlockingIOError):
                told += os.read(ours, 10_000)  # or it would wait for a reader
            return has_lines(log, 3) and b"/1000 [" in told  # the bar

        await_that(shown, started.running, started.told)
        os.close(ours)
        if disowned:
            lines = (folder / "log.jsonl").read_text().count("\n")
            await_that(lambda log=folder / "log.jsonl", n=lines: has_lines(log, n + 2), started.running, started.told)
            started.kill(signal.SIGUSR1)
        codes, wanted = started.wait(), 128 + (signal.SIGUSR1 if disowned else signal.SIGHUP)
        check(codes == [wanted], f"{out}: ended with {codes}")
        saved = runs.load(folder / "checkpoint.pt")["step"]
        check(saved == runs.read_log(folder / "log.jsonl")[-1]["step"], f"{out}: saved at step {saved}")
    return ["| a closed terminal | 2 | its own run saved and ended with 128 + SIGHUP; a disowned one went on, saved "
            "and ended with 128 + SIGUSR1 |"]


def disk(bench: Bench, scripts: tuple[str, ...] = ("train_ssl", "train_seg")) -> list[str]:
    """A limit on the size of files, in the place of a full disk: config, log, first and later checkpoint."""
    for script in scripts:
        out = bench.folder / f"full-{script}"
        folder, amp = bench.run_folder(script, out), "off" if script == "train_ssl" else "bf16"
        bench.reference(script, amp)
        done = bench.run_folder(script, bench.reference_folder(script, amp, 1))
        size = (done / "checkpoint.pt").stat().st_size

        def refused(limit: int, named: str, out=out, script=script, amp=amp) -> None:
            started = Started(bench, script, out, amp,
                              before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            codes = started.wait()
            lines = [x for x in started.told().splitlines() if "cannot be written" in x]
            check(codes == [1] and len(lines) == 1 and named in lines[0] and "File too large" in lines[0]
                  and "Traceback" not in started.told(), f"{out}, {named}: {codes}, {started.told()[-2000:]}")

        refused(10, "config.json")
        shutil.copy(done / "config.json", folder)
        refused(100, "seen.json" if script == "train_ssl" else "log.jsonl")  # the first that is written then
        refused(size - 1000, "checkpoint.next.pt")
        Started(bench, script, out, amp, touch=("open", ".part.checkpoint.next.pt", 2)).wait()
        kept = (folder / "checkpoint.pt").read_bytes()
        refused(size - 1000, "checkpoint.next.pt")
        check((folder / "checkpoint.pt").read_bytes() == kept, f"{out}: the good checkpoint did not survive")
        check(not any(Started(bench, script, out, amp).wait()), f"{out}: did not continue")
        bench.check_equal(script, out, amp)
    return [f"| full disk (a limit on file sizes): config, slices seen or log, first and later checkpoint | "
            f"{4 * len(scripts)} | one line, exit 1, the good checkpoint intact, continued to equal results |"]


def ranks(bench: Bench, changes: tuple = ((2, 1), (1, 2))) -> list[str]:
    """Pre-training that goes on with another number of processes: the same losses and tensors to 1e-5.

    Group by group, in float32: passes of other sizes round otherwise.
    """
    bench.groups_per_pass = 1
    wanted = bench.reference("train_ssl")[0]
    for first, then in changes:
        out = bench.folder / f"from-{first}-to-{then}"
        check(not any(Started(bench, "train_ssl", out, world=first, steps=3).wait()), f"{out}: the first half")
        check(not any(Started(bench, "train_ssl", out, world=then).wait()), f"{out}: the second half")
        left = bench.outcome("train_ssl", out)
        # more: the look with which the first half ended
        check(wanted.keys() <= left.keys(), f"{out}: {sorted(wanted.keys() - left.keys())[:3]}")
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor | float):
                far = np.abs(np.asarray(value, np.float64) - np.asarray(left[name], np.float64)).max()
                check(far <= 1e-5, f"{out}: {name} differs by {far:.1e}")
    bench.groups_per_pass = 2
    told = ", ".join(f"{first} then {then}" for first, then in changes)
    return [f"| another number of processes: {told} | {len(changes)} | equal to 1 process to 1e-5 |"]


# ---------------------------------------------------------------------------------------------------------- torchrun


# After the first checkpoint it waits for its killer: until that takes the file away, or a signal comes.
HELD = """
import os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train_ssl
{register}
from engine.signals import StopRequest
step, note, noted = train_ssl.Trainer.step, StopRequest._note, []
def held(self, t, slices):
    while t == 3 and os.path.exists({hold!r}) and not noted:
        time.sleep(0.01)
    return step(self, t, slices)
def heard(*args):
    noted.append(True)
    note(*args)
train_ssl.Trainer.step, StopRequest._note = held, heard
train_ssl.main()
"""


REGISTER = "import narrow, pytest; narrow.register(pytest.MonkeyPatch())"


class Launched:
    """train_ssl under torchrun: one launcher for each of `outs`, with its flags. held: see HELD."""

    def __init__(self, bench: Bench, outs: list[Path], *flags: tuple, held: bool = False, nohup: tuple = ()):
        self.outs, self.launchers, self.hold = outs, [], bench.folder / "hold"
        self.logs = {out: bench.run_folder("train_ssl", out) / "log.jsonl" for out in outs}
        script = bench.folder / "train_ssl.py" if held else ROOT / "train_ssl.py"
        if held:
            self.hold.touch()
            register = REGISTER if bench.arch in narrow.NETWORKS else ""
            script.write_text(HELD.format(root=str(ROOT), hold=str(self.hold), register=register))
        for out, own in zip(outs, flags, strict=True):
            out.mkdir(parents=True, exist_ok=True)
            with open(out / "output.txt", "ab") as f:
                self.launchers.append(subprocess.Popen(
                    [*nohup, sys.executable, "-m", "torch.distributed.run", *map(str, own), "--", str(script),
                     *bench.command("train_ssl", out, "bf16")], cwd=ROOT, stdout=f, stderr=f))

    def running(self) -> bool:
        return all(launcher.poll() is None for launcher in self.launchers)

    def told(self) -> str:
        return "".join((out / "output.txt").read_text(errors="replace") for out in self.outs)

    def at_work(self) -> list[Path]:
        """The folders of `outs` in which a rank 0 has logged steps: of two launchers, which has it is not given."""
        return [out for out, log in self.logs.items() if has_lines(log, 2)]

    def await_hold(self) -> None:
        await_that(self.at_work, self.running, self.told)

    def wait(self) -> list[int]:
        """Exit codes."""
        await_that(lambda: all(launcher.poll() is not None for launcher in self.launchers), lambda: True, self.told)
        return [launcher.returncode for launcher in self.launchers]


def workers_of(launcher: subprocess.Popen) -> list[int]:
    text = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(p) for p in text.split() if b"train_ssl" in Path(f"/proc/{p}/cmdline").read_bytes()]


TWO = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)


def restarts(bench: Bench, ranks: tuple[int, ...] = (0, 1)) -> list[str]:
    """A worker of two dies by SIGKILL under --max-restarts 1."""
    for rank in ranks:
        out = bench.folder / f"restarted-{rank}"
        launched = Launched(bench, [out], TWO, held=True)
        launched.await_hold()
        os.kill(sorted(workers_of(launched.launchers[0]))[rank], signal.SIGKILL)
        launched.hold.unlink()
        check(launched.wait() == [0], f"{out}: {launched.told()[-2000:]}")
        bench.check_equal("train_ssl", out, "bf16", 2)
    return [f"| torchrun: a worker of two killed, --max-restarts 1 | {len(ranks)} | restarted, equal results |"]


def rejoin(bench: Bench) -> list[str]:
    """Two launchers on loopback (c10d), each with a worker; the second's worker dies by SIGKILL: both start again."""
    port, outs = free_port(), [bench.folder / f"rejoined-{rank}" for rank in (0, 1)]
    flags = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "r", "--rdzv-endpoint",
             f"127.0.0.1:{port}", "--max-restarts", 2)
    launched = Launched(bench, outs, flags, flags, held=True)
    launched.await_hold()
    main = outs.index(launched.at_work()[0])
    os.kill(workers_of(launched.launchers[1 - main])[0], signal.SIGKILL)
    launched.hold.unlink()
    check(launched.wait() == [0, 0], f"{outs}: {launched.told()[-3000:]}")
    finished = [out for out, log in launched.logs.items() if log.exists()]
    bench.check_equal("train_ssl", finished[-1] if len(finished) == 1 else outs[main], "bf16", 2)
    return ["| two nodes, a worker of one killed, --max-restarts 2 | 1 | both rejoined, equal results |"]


def terminated(bench: Bench) -> list[str]:
    """SIGTERM to torchrun itself, SIGHUP where nohup had it ignored: it passes both on; and the command again."""
    rows = []
    for number, nohup in ((signal.SIGTERM, ()), (signal.SIGHUP, ("nohup",))):
        out = bench.folder / f"terminated-{number}"
        launched = Launched(bench, [out], TWO, held=True, nohup=nohup)
        launched.await_hold()
        launched.launchers[0].send_signal(number)  # the signal that it passes on ends the hold
        (code,) = launched.wait()
        check(code != 0 and "the same command continues" in launched.told(), f"{out}: {code}")
        check(Launched(bench, [out], TWO).wait() == [0], f"{out}: did not continue")
        bench.check_equal("train_ssl", out, "bf16", 2)
        what = " ".join([*nohup, "torchrun"])
        rows.append(f"| {what}: {signal.Signals(number).name} | 1 | saved, exit code {code}, continued to equal "
                    "results |")
    return rows


def nodes(bench: Bench) -> list[str]:
    """Two launchers on loopback, the second with an --out of its own that must stay empty: equal to one node."""
    port, outs = free_port(), [bench.folder / f"node-{rank}" for rank in (0, 1)]
    flags = [("--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port",
              port) for rank in (0, 1)]
    check(Launched(bench, outs, *flags).wait() == [0, 0], f"{outs}: see output.txt there")
    bench.check_equal("train_ssl", outs[0], "bf16", 2)
    check(os.listdir(outs[1]) == ["output.txt"], f"{outs[1]}: {os.listdir(outs[1])}")
    return ["| two nodes (two launchers on loopback) | 1 | equal to one node with two processes |"]


def soak(bench: Bench, minutes: float) -> list[str]:
    """Pre-training for some time: file descriptors and resident memory of its last quarter as in its second."""
    bench.data = bench.folder / "soaked"
    phantom.write(bench.data, labelled=1, unlabelled=30, shape=(40, 64, 64))  # 150 steps an epoch
    started = Started(bench, "train_ssl", bench.folder / "soak", steps=10**6)
    process, samples, begin = Path(f"/proc/{started.pids[0]}"), [], time.monotonic()
    while time.monotonic() - begin < 60 * minutes:
        time.sleep(min(5.0, minutes))
        status = (process / "status").read_text()
        samples.append((len(os.listdir(process / "fd")), int(re.search(r"VmRSS:\s*(\d+)", status)[1]) / 1024))
    started.kill(signal.SIGTERM)
    check(started.wait() == [143], f"{started.out}: {started.told()[-2000:]}")
    steps = len(runs.read_log(bench.run_folder("train_ssl", started.out) / "log.jsonl"))
    quarter = len(samples) // 4
    (files, memory), (files_end, memory_end) = (np.median(part, 0) for part in (samples[quarter : 2 * quarter],
                                                                               samples[-quarter:]))
    result = (f"{files:.0f} file descriptors then {files_end:.0f}, {memory:.0f} MB then {memory_end:.0f} "
              f"({100 * (memory_end / memory - 1):+.1f} %)")
    check(files_end == files and abs(memory_end / memory - 1) < 0.02, f"soak: {result}")
    return [f"| soak, pre-training on the phantom | {minutes:g} min, {steps:,} steps | {result} |"]


def beside(work) -> Callable[[], list[str]]:
    """Start work() in a forked process; what comes back waits for its rows and raises Failed where it did."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            told = {"rows": work()}
        except BaseException as e:
            told = {"failed": f"{type(e).__name__}: {e}"}
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)

    def wait() -> list[str]:
        with open(read) as f:
            told = json.load(f)
        os.waitpid(pid, 0)
        check("rows" in told, told)
        return told["rows"]

    return wait


# ------------------------------------------------------------------------------------------------------------ files


def files(bench: Bench, count: int, seed: int = 0) -> list[str]:
    """Mutated NIfTI files through read_volume, every tenth through prepare: right, or refused in one line."""
    folder = bench.folder / "files"
    folder.mkdir()
    with tempfile.TemporaryFile("w+") as told:
        pid = os.fork()
        if not pid:
            try:
                own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (own + 2**30, own + 2**30))
                signal.signal(signal.SIGALRM, lambda *a: (_ for _ in ()).throw(TimeoutError("a hang")))
                for number in range(count):
                    path = folder / f"m{number}.nii.gz"
                    ended = mutations.try_one(path, seed, number)
                    told.write(json.dumps((number, *ended)) + "\n")
                    if number % 10:
                        path.unlink()
                told.flush()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.waitpid(pid, 0)
        told.seek(0)
        ends = [json.loads(line) for line in told]
    check(len(ends) == count, f"files: the reader died after {len(ends)} files")
    table: dict[str, Counter] = {kind: Counter() for kind in mutations.KINDS}
    for number, kind, how, message in ends:
        check(how in ("read right", "refused"), f"file {number} of seed {seed} ({kind}): {how}: {message}")
        table[kind][how] += 1
    store = datasets.prepare(folder, bench.folder / "files-store", "pretrain", size=16, workers=2, skip_bad=True)
    read = {f"m{n}" for n, _, how, _ in ends if n % 10 == 0 and how == "read right"}
    by_gate = {Path(s["file"]).name.removesuffix(".nii.gz") for s in store.skipped
               if re.search("no CT by its values|no stack of axial slices", s["reason"])}
    prepared = {v["id"] for v in store.volumes}
    check(prepared | by_gate == read, "prepare and read_volume differ")
    return [f"| mutated files: {kind} | {c.total()} | {c['read right']} read right, {c['refused']} refused |"
            for kind, c in table.items() if c] + [
        f"| of these through prepare | {len(range(0, count, 10))} | {len(prepared)} prepared, {len(by_gate)} no CT, "
        "the rest listed |"]


# ------------------------------------------------------------------------------------------------------------ all


def main() -> None:
    parts = {"kills": lambda b: kills(b, args.kills),
             "signals": lambda b: signals(b, SIGNALS[:1]) if args.short else signals(b), "terminal": terminal,
             "processes": lambda b: ranks(b, ((2, 1),)) if args.short else ranks(b),
             "disk": lambda b: disk(b, ("train_ssl",)) if args.short else disk(b),
             "restarts": lambda b: restarts(b, (0,)) if args.short else restarts(b), "rejoin": rejoin,
             "terminated": terminated, "nodes": nodes, "files": lambda b: files(b, args.files, args.seed),
             "soak": lambda b: soaking()}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--short", action="store_true", help="the suite's form: one script, one worker, a network "
                        "whose checkpoints are a hundredth of a ResNet-18's")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        figures.attempt = lambda *_: False  # pictures are two seconds of each of some 40 runs
        narrow.register(pytest.MonkeyPatch())
    rows, failures, begin = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seed, "resnet_basic" if args.short else "resnet18")
        if "soak" in args.only:  # half an hour of one core, beside the other parts
            soaking = beside(lambda: soak(bench, args.minutes))
        for name in args.only:
            started = time.monotonic()
            try:
                rows += parts[name](bench)
            except (Failed, OSError, volumes.BadInput) as e:
                failures.append(name)
                rows.append(f"| {name} | | FAILED: {' '.join(str(e).split())} |")
                traceback.print_exc()
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, commit {origin.commit()}, {processes.hardware()}, seed {args.seed}, "
          f"{(time.monotonic() - begin) / 60:.0f} min\n\n| what | tried | how it ended |\n|---|---|---|")
    print("\n".join(rows))
    if not failures:
        print("| writes outside of run, store and results folders | every run above but torchrun's | none |")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
