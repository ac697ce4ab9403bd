"""What a GPU can tell in nine minutes, part by part, in order of worth; tools/gpu.sh starts it.

    bash tools/gpu.sh OUT               all parts; OUT/gpu.jsonl has a line for each row, OUT/gpu.log what else was said
    bash tools/gpu.sh OUT --tiny        small networks, on a CPU too: does it run to its end?
    bash tools/gpu.sh OUT --only store  some of the parts

A part is a process of its own with a limit of time. It is forked from one that has imported everything and never
touches the GPU: a start costs nothing, and what crashes or hangs takes its own rows with it and no others. A step is
timed as several in a row, as in training, where the host runs ahead; ratios are A B A B, medians (tools/measure.py).
"""

import gc
import importlib.util
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import torch

import train_ssl
from ct import phantom
from ct.command import Parser, whole
from ct.volumes import BadInput
from engine import origin, passes, processes, runs
from segment import PROTOCOLS
from tools import bench, peers
from tools.measure import Table, medians, seconds
from tools.setting import Setting

TOTAL = 540  # seconds of all parts: a command on a lent GPU may take ten minutes
BOTH = ("--local", "--zca")
METHODS = {"local + ZCA": BOTH, "aligned + ZCA": (*BOTH, "--geometric"), "MoCo v2": ()}
GIB = 2**30


class Lines(Table):
    """The bench's table; each row is a line of a file of JSON lines as soon as it is known."""

    def __init__(self, part: str, path: Path):
        super().__init__(quiet=True)
        self.part, self.path = part, path

    def add(self, what: str, figure: float | None, text: str = "", numbers: dict | None = None, **target) -> None:
        """As `Table.add`; numbers: what else the line holds, for other programs."""
        super().add(what, figure, text, **target)
        self.line(**self.rows[-1], **(numbers or {}))

    def line(self, **values) -> None:
        """A line that is no row, or one with more than a row has."""
        runs.append(self.path, [{"part": self.part, **values}])


class Sizes(Setting):
    """The paper's, or such that a step takes tenths of a second on one core."""

    def __init__(self, tiny: bool):
        super().__init__(tiny)
        self.repeats, self.row, self.steps = 3, 4, 10  # medians of so many; steps in a row; steps from a store
        self.side, self.crops = 512, 16  # of segmentation
        if tiny:
            torch.set_num_threads(1)
            self.size, self.batch, self.group, self.queue = 32, 4, 2, 16
            self.repeats, self.row, self.side, self.crops = 1, 1, 32, 2


# -------------------------------------------------------------------------------------------------------- the parts


def machine(table: Lines, s: Sizes) -> None:
    """The head of the file: what it was measured on. Raises BadInput without a GPU."""
    if s.device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    elif s.quick:
        driver = bench.NO_GPU
    else:
        raise BadInput("no GPU here; bash tools/gpu.sh OUT --tiny runs on a CPU")
    table.line(hardware=processes.hardware(), memory=f"{processes.memory(s.device) / GIB:.0f} GiB", driver=driver,
               cudnn=torch.backends.cudnn.version(), cores=os.cpu_count(), python=sys.version.split()[0],
               commit=os.environ.get("COMMIT") or origin.commit(), date=time.strftime("%Y-%m-%d %H:%M"),
               precision=s.amp, setting=f"{s.arch}, {s.size} px, {s.batch} as {s.batch // s.group} x {s.group}, queue "
               f"{s.queue}")


class Outcomes:
    """pytest's hook: a row for each test as it ends."""

    def __init__(self, table: Lines):
        self.table = table

    def pytest_runtest_logreport(self, report) -> None:
        """A test that ran, or did not get so far."""
        if report.when == "call" or report.outcome != "passed":
            told = str(report.longrepr[2]) if report.outcome == "skipped" else report.longreprtext
            text = ": ".join([report.outcome, *told.removeprefix("Skipped: ").strip().splitlines()[-1:]])
            met = {"passed": 1.0, "failed": 0.0}.get(report.outcome)
            self.table.add(report.nodeid, met, f"{text} ({report.duration:.1f} s)")


def tests(table: Lines, s: Sizes) -> None:
    """The tests that only a GPU can run. Raises RuntimeError where pytest itself cannot."""
    import pytest  # of requirements-dev.txt

    files = [str(path) for path in sorted((bench.ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in
             path.read_text()]
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *files], [Outcomes(table)])
    if code > pytest.ExitCode.TESTS_FAILED:
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code)!r}")


def in_a_row(step: Callable, count: int) -> Callable:
    """What calls `step` so many times."""
    return lambda: [step() for _ in range(count)]


def allocated(reset: bool = False) -> float:
    """The most bytes that torch had allocated on the GPU since the last reset; reset: from now on, what it has now."""
    if not torch.cuda.is_available():
        return 0.0
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def described(s: Sizes, step: float, peak: float, ready: float) -> tuple[str, dict]:
    """A step's figures in words and as numbers: seconds of a step, bytes, seconds until the first was done."""
    numbers = {"step_ms": 1e3 * step, "images_per_s": s.batch / step, "gib": peak / GIB, "ready_s": ready,
               "hours": bench.PAPER_STEPS * bench.PAPER_BATCH / s.batch * step / 3600}
    text = "{step_ms:.1f} ms, {images_per_s:,.0f} images/s, 200 epochs in {hours:.2f} h, {gib:.1f} GiB, ready after "
    return text.format(**numbers) + f"{ready:.0f} s", numbers


def plain(table: Lines, s: Sizes, compiled: bool) -> Callable:
    """The floor's row and its step."""
    before = allocated(reset=True)
    step = peers.plain_step(s.arch, s.size, s.batch, s.queue, s.device, s.amp, compiled)
    ready = seconds(step)
    found = medians(s.repeats, step=in_a_row(step, s.row))["step"] / s.row
    text, numbers = described(s, found, allocated() - before, ready)
    table.add(f"bare step, torchvision's {s.arch}, plain BN, InfoNCE, one pass, views ready{how(s, compiled)}",
              numbers["step_ms"], text, numbers)
    return step


def how(s: Sizes, compiled: bool) -> str:
    """The end of a row's name."""
    return ", eager" if not compiled else ", compiled" if not s.quick else ", compiled (--tiny: the compiler is off)"


def ours(table: Lines, s: Sizes, name: str, flags: tuple, other: Callable, most: float | None = None,
         against: str = "bare") -> Callable:
    """A row: a step of pre-training, views included, over another one. Returns the step."""
    before = allocated(reset=True)
    trainer, slices = s.trainer(*flags), s.slices().to(s.device)
    step = partial(trainer.step, 1, slices)
    ready = seconds(step)
    if s.device.type == "cuda":
        seconds(step)  # the first one has no momentum yet
    peak = allocated() - before
    found = medians(s.repeats, other=in_a_row(other, s.row), ours=in_a_row(step, s.row))
    taken, others = found["ours"] / s.row, found["other"] / s.row
    text, numbers = described(s, taken, peak, ready)
    groups, together = s.batch // s.group, trainer.moco.groups_per_pass
    table.add(f"{name}, {min(groups, together)} of {groups} groups a pass{how(s, '--compile' in flags)} / {against}",
              taken / others, f"{taken / others:.3f} ({text}; {against} {1e3 * others:.1f} ms)",
              numbers | {"groups_per_pass": together, "other_ms": 1e3 * others}, most=most)
    return step


def passes_of(groups: int) -> tuple[str, str]:
    """The flag for so many groups in one pass."""
    return "--groups-per-pass", str(groups)


def eager(table: Lines, s: Sizes) -> None:
    """Steps without the compiler: all groups in one pass, in two, one by one."""
    bare = plain(table, s, False)
    for name, flags in METHODS.items():
        step = ours(table, s, name, flags, bare, 1.3 if flags == BOTH else None)
        if flags == BOTH:
            half = passes_of(max(1, s.batch // s.group // 2))
            ours(table, s, name, (*flags, *half), step, 1.1, "one pass")
        del step
    for name, flags in METHODS.items():
        ours(table, s, name, (*flags, *passes_of(1)), bare)


def compiled(table: Lines, s: Sizes) -> None:
    """The floor and both contributions, compiled."""
    ours(table, s, "local + ZCA", (*BOTH, "--compile"), plain(table, s, True), 1.2)


def compiled_others(table: Lines, s: Sizes) -> None:
    """What else can be compiled, where there is time for it."""
    bare = plain(table, s, True)
    for name, flags in (("aligned + ZCA", METHODS["aligned + ZCA"]), ("MoCo v2", ()),
                        ("local + ZCA", (*BOTH, *passes_of(1)))):
        torch.compiler.reset()  # else each further network is one more program for the same code, of which few are kept
        ours(table, s, name, (*flags, "--compile"), bare)


def lightly(table: Lines, s: Sizes) -> None:
    """Beside lightly at its best: in half precision and channels_last, with cuDNN's choice, its views ready."""
    rows = ("local + ZCA", "MoCo v2")
    if not importlib.util.find_spec("lightly"):
        for name in rows:
            table.skip(f"{name} / lightly", "lightly is not installed (requirements-bench.txt)", most=1.0)
        return
    step = peers.lightly_step(s.arch, s.size, s.batch, s.queue, s.device, s.amp, "channels_last")
    for name in rows:
        ours(table, s, name, METHODS[name], step, 1.0, "lightly")


def memory(table: Lines, s: Sizes) -> None:
    """The peak of a step by the groups of its pass, against engine/passes.py's arithmetic, which is to be no less."""
    groups = s.batch // s.group
    for together in (n for n in (1, 2, 4, 8) if n <= groups):
        before = allocated(reset=True)
        trainer, slices = s.trainer(*BOTH, *passes_of(together)), s.slices()
        fixed, group = passes.needed(trainer.moco, trainer.batches, s.amp)
        formula = fixed + together * group
        what = f"peak memory, {together} of {groups} groups a pass, local + ZCA / formula"
        for t in range(2):  # the second one has all buffers
            trainer.step(t, slices)
        if s.device.type == "cuda":
            found, reserved = allocated() - before, torch.cuda.max_memory_reserved()
            table.add(what, found / formula, f"{found / formula:.2f} ({found / GIB:.2f} GiB / {formula / GIB:.2f} GiB; "
                      f"{reserved / GIB:.2f} GiB with what torch holds in reserve)",
                      {"allocated": found, "formula": formula, "reserved": reserved}, most=1.0)
        else:
            table.skip(what, f"{bench.NO_GPU} ({formula / GIB:.2f} GiB by the formula)", most=1.0)


def store_to_step(table: Lines, s: Sizes) -> None:
    """The bench's rows from a store to the step, without the compiled one."""
    with tempfile.TemporaryDirectory() as folder:
        bench.end_to_end(table, s, Path(folder), bench.END_TO_END[:2])


def segmentation(table: Lines, s: Sizes, compiled: bool = False) -> None:
    """Iterations of the three protocols at the paper's setting."""
    for protocol in PROTOCOLS:
        before = allocated(reset=True)
        torch.compiler.reset()
        trainer, read = s.segmentation(protocol, s.side, "--batch-size", str(s.crops), *["--compile"] * compiled)
        step = partial(trainer.step, 1, read)
        ready = seconds(step)
        found = medians(s.repeats, step=in_a_row(step, s.row))["step"] / s.row
        hours, gib = trainer.args.iterations * found / 3600, (allocated() - before) / GIB
        table.add(f"{protocol}, {s.crops} crops of {s.side} px, {s.arch}{how(s, compiled)}", 1 / found,
                  f"{1 / found:.1f} iterations/s ({1e3 * found:.1f} ms, 40,000 in {hours:.2f} h, {gib:.1f} GiB, ready "
                  f"after {ready:.0f} s)", {"iteration_ms": 1e3 * found, "hours": hours, "gib": gib, "ready_s": ready})


def training(table: Lines, s: Sizes) -> None:
    """A minute of train_ssl.py as it is called, on a phantom of some thousand slices, with the paper's settings.

    SIGTERM, which the part gets at its limit, ends the run as any other: after it, the rows are written.
    """
    with tempfile.TemporaryDirectory() as folder:
        volumes, shape, steps, size = (6, (8, 64, 64), 3, 64) if s.quick else (48, (100, 192, 192), 400, 512)
        phantom.write(f"{folder}/phantom", labelled=0, unlabelled=volumes, shape=shape)
        try:
            train_ssl.main(["--data", f"{folder}/phantom", "--store", f"{folder}/store", "--out", folder, *BOTH,
                            "--name", "a-minute", "--init", "random", "--arch", s.arch, "--image-size", str(s.size),
                            "--size", str(size), "--batch-size", str(s.batch), "--bn-group", str(s.group), "--queue",
                            str(s.queue), "--ema", "0.999", "--epochs", "200", "--steps", str(steps)])
        finally:
            path = Path(folder, "a-minute", "log.jsonl")
            if log := runs.read_log(path) if path.exists() else []:
                settled = log[len(log) // 4 :]  # the first steps try convolutions
                rate, share = (statistics.fmean(r[k] for r in settled) for k in ("images_per_s", "data_share"))
                table.add("training, train_ssl.py --local --zca", rate, f"{rate:,.0f} images/s over {len(settled)} "
                          f"steps, loss {log[0]['loss']:.2f} to {log[-1]['loss']:.2f}")
                table.add("training, share of time spent waiting for slices", share, most=0.02)


# in order of worth, what no GPU has told yet first: the most seconds that each may take
PARTS = {"machine": (machine, 40), "tests": (tests, 120), "segmentation": (segmentation, 60),
         "training": (training, 100), "store": (store_to_step, 75), "memory": (memory, 50), "lightly": (lightly, 45),
         "eager": (eager, 90), "compiled": (compiled, 210), "compiled-others": (compiled_others, 240),
         "segmentation-compiled": (partial(segmentation, compiled=True), 240)}


# ---------------------------------------------------------------------------------------------------------- the driver


def work(name: str, out: Path, tiny: bool) -> None:
    """A part in a process of its own; what it says goes to the log."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(bench.ROOT)
    if tiny:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a compiler takes minutes on a CPU: the same calls, and no compiler
    with open(out / "gpu.log", "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        for stream in (1, 2):  # of what is not Python's, too
            os.dup2(log.fileno(), stream)
        print(f"---- {name}")
        try:
            PARTS[name][0](Lines(name, out / "gpu.jsonl"), Sizes(tiny))
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def run(name: str, out: Path, tiny: bool, limit: float) -> str:
    """One part, ended at its limit; its last line says how it ended: "done", or what a row of the table will say."""
    part = multiprocessing.get_context("fork").Process(target=work, args=(name, out, tiny))
    started, ended = time.monotonic(), "cut off from outside"
    part.start()
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(part.pid, part.pid)  # here too: whoever comes first
    try:
        part.join(limit)
        if part.exitcode is None:
            ended = f"cut off at its limit of {limit:.0f} s"
        elif part.exitcode < 0:
            ended = f"killed by {signal.Signals(-part.exitcode).name}"
        else:
            ended = f"failed: {last_line(out / 'gpu.log')}" if part.exitcode else "done"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # the whole group: compilers and readers that it has started
            with suppress(PermissionError, ProcessLookupError):
                os.killpg(part.pid, number)
            part.join(10)
        Lines(name, out / "gpu.jsonl").line(ended=ended, seconds=round(time.monotonic() - started, 1))
    return ended


def last_line(path: Path) -> str:
    """The last line of a text that is not empty, without what a terminal's bar has overwritten."""
    lines = [line.split("\r")[-1].strip() for line in path.read_text(errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def markdown(path: Path) -> str:
    """What stands in the file of JSON lines, as docs/measurements.md has it."""
    lines, told = runs.read_log(path), []
    head = [f"{k}: {v}" for line in lines if "hardware" in line for k, v in line.items() if k != "part"]
    for line in lines:
        mark = {None: "", True: "yes", False: "NO"}[line.get("met")]
        if "what" in line:
            told.append(f"| {line['what']} | {line['target']} | {line['text']} | {mark} |")
        elif line.get("ended", "done") != "done":
            told.append(f"| {line['part']} | | {line['ended']} | NO |")
    took = ", ".join(f"{line['part']} {line['seconds']:.0f}" for line in lines if "ended" in line)
    return "\n".join(["; ".join(head), "", "| what | target | figure | met |", "|---|---|---|---|", *told, "",
                      f"Seconds: {took}"])


def main(argv: list[str] | None = None) -> None:
    """All parts, or those asked for; the table at the end, whatever the end is. Exit code 1 where one is not done."""
    parser = Parser(prog="bash tools/gpu.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder for gpu.jsonl and gpu.log, which are written anew")
    parser.add_argument("--tiny", action="store_true", help="small networks, on a CPU too, without a compiler")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=whole(1), default=TOTAL, help="of all parts together (%(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    out, deadline, whole_run = args.out.resolve(), time.monotonic() + args.seconds, True
    for file in ("gpu.jsonl", "gpu.log"):
        (out / file).write_text("")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for name in dict.fromkeys(["machine", *(args.only or PARTS)]):
            left = deadline - time.monotonic()
            if left > 1:
                ended = run(name, out, args.tiny, min(left, PARTS[name][1]))
            else:
                ended = "not run: the time was over"
                Lines(name, out / "gpu.jsonl").line(ended=ended, seconds=0)
            print(f"{name}: {ended}", flush=True)
            whole_run &= ended == "done"
            if name == "machine" and not whole_run:
                break
    finally:
        print("\n" + markdown(out / "gpu.jsonl"), flush=True)
    sys.exit(not whole_run)


if __name__ == "__main__":
    main()
