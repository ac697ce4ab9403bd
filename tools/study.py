"""A study of all methods on few slices and one small machine: which of them train, which collapse, what their features
are worth at which scale, and whether longer training changes the answer. It runs the public commands and puts what they
left into tables and a picture.

    python -m tools.study --ssl my_ct --seg my_btcv --out study --jobs 2
    python -m tools.study --phantom 160 --out study                  a generated phantom of 160 unlabelled patients

The initial checkpoint is MoCo v2 without crops and flips, from random weights; the first author's method has one with
its own HU window. From it every method of ROWS is trained, and measured after 1/8, 1/4, 1/2 and all of its epochs: by a
frozen linear head, trained and evaluated on whole slices at 1 and 2 times the views' side (a network that never saw a
crop knows one scale only), and by the last look at the held-out slices. Each is one run, whose learning rate falls over
all of its epochs, so what is measured on the way is not what a shorter run would end with.
The same command continues after any stop; --table shows what is there.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import datasets
import metrics
import train_ssl
from ct import phantom
from ct.command import Parser, cores, whole
from ct.volumes import BadInput
from engine import figures, launch, methods, origin, processes, recipes, report, runs, signals
from engine.seeds import seed_suffix

ROOT = Path(__file__).parent.parent
# On real CT; the phantom has train_ssl.py's preset.
PRETRAINING = dict(arch="resnet18", image_size=64, batch_size=64, bn_group=32, lr=0.01, queue=128, ema=0.99, size=256)
HEAD = dict(split="100", protocol="linear-frozen", iterations=300, batch_size=16, lr=0.2, arch="resnet18")
# A line a method: its flags of train_ssl.py, all else is equal.
ROWS = {
    "moco": [],
    "moco-nogeo": ["--no-geometric"],
    "moco-zca": ["--zca"],
    "moco-local-zca": ["--local", "--zca"],
    "moco-local-aligned": ["--local", "--geometric"],
    "moco-local-zca-aligned": ["--local", "--zca", "--geometric"],
    "author-zca": ["--recipe", "author", "--zca", "--bn-group", str(PRETRAINING["batch_size"])],
    "moco-every4": ["--every", "4"],
}
LEVELS = ("random", "start", "author-random", "author-start")  # what methods are compared with
NAMES = methods.ROWS | methods.BEYOND | {"author-random": "Random weights, first author's HU window",
                                         "author-start": "Initial checkpoint, first author's HU window"}
AUTHOR = "author-"  # begins the names of what has the first author's HU window
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of a method's epochs, after which it is measured
SIDES = tuple(scale * PRETRAINING["image_size"] for scale in (1, 2))  # pixels of the slices that the head sees
LOOKS = {"held_out_gap": "similarity margin", "instance_accuracy": "instance-discrimination accuracy",
         "effective_rank": "effective rank"}


# ------------------------------------------------------------------------------------------------------ what is run


def command(script: str, settings: dict, *more: object) -> list[str]:
    """One of the public commands with its settings as flags."""
    given = [x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", value)]
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, (*given, *more))]


def window(name: str) -> tuple[object, ...]:
    """The flags that a method, its initial checkpoint and its heads have for the HU window; none for the default's."""
    return ("--window", *recipes.AUTHOR["window"]) if name.startswith(AUTHOR) else ()


def pretrain(args, seed: int, name: str, epochs: int, *more: object) -> list[str]:
    """Pre-training of one name over all its steps, or to where `more` stops it."""
    return command("train_ssl", {} if args.phantom else PRETRAINING, "--data", args.ssl, "--store",
                   args.out / "stores" / "ssl", "--out", args.out, "--seed", seed, "--name", name, "--epochs", epochs,
                   *window(name), *more)


def heads(args, seed: int, name: str, step: int) -> Iterator[list[str]]:
    """The heads on a run that stands at `step`, or on random weights; each step has a folder of its own."""
    author = AUTHOR * name.startswith(AUTHOR)
    backbone = "random" if name == f"{author}random" else (args.out / name).resolve()
    for side in SIDES:
        yield command("train_seg", HEAD, "--data", args.seg, "--store", args.out / "stores" / "seg", "--out",
                      args.out / "heads" / f"{author}{side}px-step{step}", "--seed", seed, "--backbone", backbone,
                      "--crop-size", side, "--whole-slices", *window(name))


def step_of(folder: Path) -> int:
    """The step to which a run's log has come; 0 where there is none."""
    records = runs.read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    return records[-1]["step"] if records else 0


def start(args, seed: int, author: str) -> Iterator[list[str]]:
    """The commands of a seed's initial checkpoint and random weights, each to be run before the next is asked for."""
    name = f"{author}start{seed_suffix(seed)}"
    yield pretrain(args, seed, name, math.ceil(args.steps[0] / args.per_epoch[1]), "--init", "random", "--no-geometric")
    yield from heads(args, seed, f"{author}random", 0)
    yield from heads(args, seed, name, step_of(args.out / name))


def points(args, name: str) -> dict[float, int]:
    """{share of SHARES: epochs of a method after which it is measured}: whole ones, since a look ends each."""
    epochs = math.ceil(args.steps[1] / args.per_epoch[every(name)])
    return {share: max(1, round(share * epochs)) for share in SHARES}


def every(name: str) -> int:
    """Which slices of a volume a method trains on: each one, or each N-th."""
    return train_ssl.parse(ROWS[name]).every


def row(args, seed: int, name: str, share: float) -> Iterator[list[str]]:
    """The commands that bring a method from its initial checkpoint, or from where it stands, to a share of its epochs,
    and measure it there. None where it stands beyond, since it was measured before it went on.
    """
    suffix, epochs = seed_suffix(seed), points(args, name)
    folder, step = args.out / f"{name}{suffix}", epochs[share] * args.per_epoch[every(name)]
    if step_of(folder) <= step:
        begun = f"{AUTHOR * name.startswith(AUTHOR)}start{suffix}"
        yield pretrain(args, seed, folder.name, epochs[1], "--init", begun, "--steps", step, *ROWS[name])
        yield from heads(args, seed, folder.name, step)


def beside(chains: Iterable[Iterator[list[str]]], jobs: int, log: Path) -> None:
    """Run chains of commands, `jobs` of them at a time, each with its share of the cores; their output goes to `log`.

    Raises BadInput where a command fails, SystemExit after a signal; the others are asked to save and end first.
    """
    waiting, running = list(chains), {}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    with signals.StopRequest() as stop, open(log, "ab") as output:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    if (argv := next(waiting[0], None)) is None:
                        waiting.pop(0)
                        continue
                    print("$", *argv[1:], flush=True)
                    # a session of its own: a terminal's Ctrl-C comes to it once, from here
                    child = subprocess.Popen(argv, stdout=output, stderr=output, start_new_session=True,
                                             env=os.environ | {"OMP_NUM_THREADS": threads})
                    running[child] = waiting.pop(0)
                time.sleep(0.1)
                for child in [c for c in running if c.poll() is not None]:
                    waiting.insert(0, running.pop(child))
                    if child.returncode:
                        raise BadInput(f"{Path(child.args[1]).name} ended with {child.returncode}; see {log}, and run "
                                       "the same command again once its cause is gone")
                if stop.signal:
                    raise SystemExit(stop.exit_code)
        finally:
            for child in running:
                child.terminate()
            for child in running:
                child.wait()


def run(args) -> None:
    """All initial checkpoints, then all methods to the first share, to the second ...: at any time what is there can be
    compared. Raises BadInput.
    """
    if (args.phantom is None) == (args.ssl is None or args.seg is None):
        raise BadInput("give --ssl and --seg, or --phantom")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.phantom:
        folder = args.out / "phantom"
        args.ssl, args.seg = folder / "AbdomenCT-1K", folder / "BTCV"
        if not folder.exists():
            phantom.write(folder, unlabelled=args.phantom)
    settings = train_ssl.PHANTOM if args.phantom else PRETRAINING
    store = datasets.prepare(args.ssl, args.out / "stores" / "ssl", "pretrain", size=settings["size"])
    one = processes.Processes(0, 1, torch.device("cpu"))
    given = argparse.Namespace(**vars(train_ssl.parse([])) | settings)
    args.per_epoch = {n: datasets.Batches(given, store.of(every=n), one).steps_per_epoch
                      for n in {1} | {every(name) for name in args.rows}}
    if few := [n for n, steps in args.per_epoch.items() if not steps]:
        raise BadInput(f"{args.ssl}: one slice in {few[0]} is less than a batch of {settings['batch_size']}; give "
                       "--rows without such methods")
    log = args.out / "study.log"
    print(f"{len(store):,} slices, {args.per_epoch[1]} steps an epoch; the output of all commands: {log}")
    starts = dict.fromkeys(AUTHOR * name.startswith(AUTHOR) for name in args.rows)
    beside((start(args, seed, author) for seed in args.seeds for author in starts), args.jobs, log)
    before = dict.fromkeys(args.rows)  # shares of few epochs can be the same epoch
    for share in SHARES:
        due = [name for name in args.rows if points(args, name)[share] != before[name]]
        beside((row(args, seed, name, share) for seed in args.seeds for name in due), args.jobs, log)
        before |= {name: points(args, name)[share] for name in due}


# --------------------------------------------------------------------------------------------------- what it showed


def measured(out: Path) -> dict[tuple[str, int], dict[int, dict]]:
    """{(run without its seed, step): {seed: {look or side of the slices: value}}} of what is there, Dice in percent;
    under "horizon" the steps that the run has in all.
    """
    found: dict[tuple[str, int], dict[int, dict]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(out.glob("heads/*/results.jsonl")):
        for r in origin.newest(origin.read(path, backbone=str, seed=int, crop_size=int, mDS=(int, float),
                                           pretraining=dict)):
            author = AUTHOR * path.parent.name.startswith(AUTHOR) * (r["backbone"] == "random")
            name = author + r["backbone"].removesuffix(seed_suffix(r["seed"]))
            step = r["pretraining"]["step"] or 0
            found[name, step][r["seed"]] |= {r["crop_size"]: 100 * r["mDS"],
                                             "horizon": r["pretraining"].get("horizon") or 0}
    for (name, step), seeds in found.items():
        for seed, values in seeds.items():
            log = out / f"{name}{seed_suffix(seed)}" / "log.jsonl"
            looks = [r for r in runs.read_log(log) if r["step"] == step] if not name.endswith("random") else []
            values |= {key: r[key] for r in looks for key in LOOKS if key in r}
    return found


def over_seeds(seeds: dict[int, dict], key: object) -> tuple[float, float | None] | None:
    """Mean and standard deviation (n - 1) of one value over the seeds that have it; None for none."""
    values = [v[key] for v in seeds.values() if key in v]
    return metrics.mean_std(values) if values else None


def shown(value: tuple[float, float | None] | None, digits: int) -> str:
    """`mean ± sd`, for a cell of a table."""
    if value is None:
        return "-"
    mean, std = value
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def doubts(step: int, seeds: dict[int, dict]) -> list[str]:
    """What makes measurements after a step doubtful, in the words of `report.remarks_on`."""
    untrained = sum(v.get("held_out_gap", 1) < metrics.LEAST_GAP for v in seeds.values())
    marks = [f"{untrained} of {len(seeds)} seeds " * (untrained < len(seeds)) + "did not train"] * bool(untrained)
    horizon = max(v["horizon"] for v in seeds.values())
    return marks + [f"unfinished: step {step} of {horizon}"] * (step < horizon)


def tables(found: dict) -> str:
    """Markdown: each method at the last step that was measured, then Dice over the steps; mean ± sd over the seeds."""
    names = [n for n in (*LEVELS, *ROWS) if any(name == n for name, _ in found)]
    head = ["method", "seeds", "steps", *LOOKS.values(), *(f"Dice at {side} px" for side in SIDES)]
    lines = [head, ["---"] * len(head)]
    for name in names:
        step = max(step for n, step in found if n == name)
        seeds = found[name, step]
        looks = {key: over_seeds(seeds, key) for key in LOOKS}
        marks = "; ".join(f"**{mark}**" for mark in doubts(step, seeds))
        lines.append([NAMES.get(name, name) + f" ({marks})" * bool(marks), str(len(seeds)),
                      f"{step:,}" if step else "-",
                      *(shown(value, 1 if key == "effective_rank" else 2) for key, value in looks.items()),
                      *(shown(over_seeds(seeds, side), 1) for side in SIDES)])
    on_the_way = {n: sorted(step for name, step in found if name == n) for n in names if n in ROWS}
    sides = " / ".join(map(str, SIDES))
    most = max(map(len, on_the_way.values()), default=0)
    lines += [[], [f"steps: Dice at {sides} px", *[""] * most], ["---"] * (1 + most)]
    for name, steps in on_the_way.items():
        cells = [f"{s:,}: " + " / ".join(shown(over_seeds(found[name, s], side), 1) for side in SIDES) for s in steps]
        lines.append([NAMES.get(name, name), *cells, *[""] * (most - len(cells))])
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines)


def write(out: Path, found: dict) -> list[Path]:
    """study.md, study.csv (a line for each run, step and seed) and study.png of `out`; returns those written."""
    keys = (*LOOKS, *SIDES)
    lines = [["row", "step", "seed", *LOOKS, *(f"dice_{side}px" for side in SIDES), "remarks"]]
    lines += [[name, step, seed, *(f"{values[k]:.4f}" if k in values else "" for k in keys),
               "; ".join(doubts(step, {seed: values}))]
              for (name, step), seeds in sorted(found.items()) for seed, values in sorted(seeds.items())]
    report.write_csv(out / "study.csv", lines)
    runs.write_text(out / "study.md", f"{tables(found)}\n\n{processes.hardware()}; commit {origin.commit()}\n")
    panels = {}
    for side in SIDES:
        points = [(name, step, *value) for (name, step), seeds in sorted(found.items())
                  if (value := over_seeds(seeds, side))]
        levels = {name: value for kept in LEVELS for name, _, *value in points if name == kept}
        curves = {kept: [point for name, *point in points if name == kept] for kept in ROWS}
        panels[f"slices of {side} px"] = levels, {name: curve for name, curve in curves.items() if curve}
    last = {name: (step, seeds) for (name, step), seeds in sorted(found.items())}
    labels = {name: "\n".join([NAMES.get(name, name), *doubts(*last[name])]) for name in last}
    written = [out / "study.md", out / "study.csv"]
    return written + [out / "study.png"] * figures.attempt(figures.over_steps, out / "study.png", panels, labels)


@launch.command
def main(argv: list[str] | None = None) -> None:
    """All seeds, then the tables."""
    parser = Parser(prog="python -m tools.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ssl", type=Path, help="folder of CT volumes to pre-train on")
    parser.add_argument("--seg", type=Path, help="folder of labelled volumes in BTCV's layout")
    parser.add_argument("--phantom", type=whole(1), metavar="N", help="instead of these, a generated phantom with N "
                        "unlabelled patients, written into --out")
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), help="methods (default: all)")
    parser.add_argument("--steps", type=whole(1), nargs=2, default=[220, 1540], metavar=("START", "ROWS"),
                        help="pre-training steps of the initial checkpoint and of each method, rounded up to whole "
                        "epochs (default 220 1540)")
    parser.add_argument("--jobs", type=whole(1), default=1, help="methods and seeds at a time (%(default)s)")
    parser.add_argument("--table", action="store_true", help="run nothing; print the tables of what is there")
    args = parser.parse_args(argv)
    if not args.table:
        run(args)
    found = measured(args.out)
    if not found:
        raise BadInput(f"{args.out}: nothing was measured there yet; leave out --table, or give another --out")
    written = write(args.out, found)
    print(tables(found))
    print(", ".join(map(str, written)))


if __name__ == "__main__":
    main()
