"""The table of tools/bench.py and the clock behind it."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch


class Table:
    """Rows (what, target, figure, met); printed as they come."""

    def __init__(self, quiet: bool):
        self.rows, self.quiet = [], quiet

    def add(self, what: str, figure: float | None, text: str = "", least: float | None = None,
            most: float | None = None, unit: str = "") -> None:
        """figure: None where it is not measured, text says why; else text is the figure in `unit`, if not given."""
        target, met = "", None
        if least is not None or most is not None:
            target = (f"at most {most:,} {unit}" if least is None else f"at least {least:,} {unit}").strip()
            if figure is not None:
                met = figure <= most if least is None else figure >= least
        text = text or (f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}") + f" {unit}" * bool(unit)
        self.rows.append({"what": what, "target": target, "figure": figure, "text": text, "met": met})
        if not self.quiet:
            mark = {None: "", True: "yes", False: "NO"}[met]
            print(f"| {what} | {target} | {text} | {mark} |", flush=True)

    def skip(self, what: str, why: str, **target) -> None:
        """A row that is not measured here, and why."""
        self.add(what, None, f"not measured: {why}", **target)


def alternated(repeats: int, **work: Callable[[], float]) -> dict[str, float]:
    """The median of what each callable returns: one round to warm up, then A B A B."""
    found = {name: [] for name in work}
    for round_ in range(repeats + 1):
        for name, call in work.items():
            value = call()
            if round_:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(call: Callable) -> float:
    """What one call takes, the GPU's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(repeats: int, **work: Callable) -> dict[str, float]:
    """Seconds of each callable, by `alternated`."""
    return alternated(repeats, **{name: partial(seconds, call) for name, call in work.items()})


def cpu_flags() -> str:
    """Which of the instruction sets that decide speed this CPU has."""
    try:
        found = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return "unknown"
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in found)
