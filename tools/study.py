"""A study of all rows on few slices and one small machine: does it train, does it collapse, what is it worth, at which
scale. The existing commands one after the other, and a table of what they left.

    python -m tools.study --ssl my_ct --seg my_btcv --out study --seeds 0 1 2

Rows: random weights, a start (MoCo v2 without geometry, from random weights), and from it MoCo v2, its control without
geometry, either contribution, both, and both with geometry kept. The frozen linear head is trained and evaluated on
whole slices at 1, 1.5 and 2 times the views' side: a network that never saw a crop knows one scale only. The same
command continues; several may run beside each other with other seeds.
"""

import csv
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import metrics
from ct.command import Parser, whole
from engine import processes, runs

ROOT = Path(__file__).parent.parent
PRETRAINING = dict(arch="resnet18", image_size=64, batch_size=64, bn_group=32, lr=0.01, queue=128, ema=0.99, size=256)
PROBE = dict(split="100", protocol="linear-frozen", iterations=300, batch_size=16, lr=0.2, arch="resnet18")
ROWS = {"moco": [], "moco-nogeo": ["--no-geometric"], "moco-zca": ["--zca"], "moco-local": ["--local"],
        "moco-local-zca": ["--local", "--zca"], "moco-local-zca-aligned": ["--local", "--zca", "--geometric"]}
SCALES = (1, 1.5, 2)  # side of the slices that the head sees, in sides of a view


def flags(settings: dict) -> list[str]:
    """Settings as a command line."""
    return [x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", str(value))]


def run(script: str, *more: object) -> None:
    """One command, its output to the terminal; what it has done before it skips. Ends the study where it fails."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, more)]
    print("$", " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)


def study(args, seed: int) -> None:
    """Pre-train the start and every row with this seed, then measure their ranks and heads; what is done is skipped."""
    suffix = processes.seed_suffix(seed)
    pretrain = ["--data", args.ssl, "--store", args.out / "stores" / "ssl", "--out", args.out, "--seed", seed,
                *flags(PRETRAINING)]
    run("train_ssl", *pretrain, "--no-geometric", "--init", "random", "--name",
        f"start{suffix}", "--epochs", args.epochs[0])
    for row in ROWS.values():
        run("train_ssl", *pretrain, *row, "--init", f"start{suffix}", "--epochs", args.epochs[1])
    names = ["random", *(f"{name}{suffix}" for name in ("start", *ROWS))]
    segment = ["--data", args.seg, "--store", args.out / "stores" / "seg", "--seed", seed]
    for scale in SCALES:
        side = round(scale * PRETRAINING["image_size"])
        for name in names:
            backbone = name if name == "random" else (args.out / name).resolve()
            run("train_seg", *segment, "--out", args.out / f"probe-{side}", "--backbone", backbone, "--crop-size", side,
                "--whole-slices", *flags(PROBE))
    folders = [n if n == "random" else (args.out / n).resolve() for n in names]
    run("svd_spectrum", *segment, "--out", args.out / f"spectrum-{seed}", "--image-size", PRETRAINING["image_size"],
        "--arch", "resnet18", *folders)


def table(out: Path, seeds: list[int]) -> str:
    """Mean ± standard deviation over the seeds (n - 1) of gap, effective rank and Dice at each scale, as Markdown."""
    measured: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        suffix = processes.seed_suffix(seed)
        for name in ("start", *ROWS):
            looks = [r["held_out_gap"] for r in runs.read_log(out / f"{name}{suffix}" / "log.jsonl")
                     if "held_out_gap" in r]
            measured[name]["gap"].append(looks[-1])
        with open(out / f"spectrum-{seed}" / "spectrum.csv", newline="") as f:
            for row in csv.DictReader(f):
                measured[row["backbone"].removesuffix(suffix)]["rank"].append(float(row["effective_rank"]))
    sides = [round(s * PRETRAINING["image_size"]) for s in SCALES]
    for side in sides:
        for r in runs.read_log(out / f"probe-{side}" / "results.jsonl"):
            if r["seed"] in seeds:
                measured[r["backbone"].removesuffix(processes.seed_suffix(r["seed"]))][side].append(100 * r["mDS"])
    lines = ["| row | gap | effective rank | " + " | ".join(f"Dice at {s} px" for s in sides) + " |", "|---" * 6 + "|"]
    for name in ("random", "start", *ROWS):
        columns = []
        for key, digits in (("gap", 2), ("rank", 1), *((s, 1) for s in sides)):
            values = measured[name][key]
            mean, std = metrics.mean_std(values) if values else (None, None)
            columns.append("-" if mean is None else f"{mean:.{digits}f}"
                           + (f" ± {std:.{digits}f}" if std is not None else ""))
        untrained = " (**did not train**)" * (min(measured[name]["gap"], default=1) < metrics.LEAST_GAP)
        lines.append(f"| {name}{untrained} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


@processes.command
def main(argv: list[str] | None = None) -> None:
    """All seeds, then the table."""
    parser = Parser(prog="python -m tools.study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ssl", type=Path, required=True, help="folder of CT volumes to pre-train on")
    parser.add_argument("--seg", type=Path, required=True, help="folder of labelled volumes in BTCV's layout")
    parser.add_argument("--out", type=Path, default=Path("study"))
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=whole(1), nargs=2, default=[35, 46], metavar=("START", "ROWS"),
                        help="horizons; about 140 and 184 steps on 300 slices (default 35 46)")
    parser.add_argument("--table", action="store_true", help="run nothing; the table of what is there")
    args = parser.parse_args(argv)
    for seed in [] if args.table else args.seeds:
        study(args, seed)
    print(f"{len(args.seeds)} seeds; {processes.hardware()}; commit {processes.commit()}")
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
