"""The whole paper, as a loop of the commands that docs/training.md explains: `make paper` says what it takes.

Whatever is done is skipped by the commands themselves. The Makefile's variables come through the environment; with PLAN
nothing is run.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import train_seg
import train_ssl
from ct import intake
from ct.volumes import BadInput
from engine import launch, report, runs
from engine.recipes import AUTHOR
from engine.seeds import seed_suffix
from segment import PROTOCOLS

ROWS = ("", "--zca", "--local", "--local --zca",  # Table 2
        "--no-geometric", "--zca --no-geometric",  # the missing controls
        "--local --geometric", "--local --zca --geometric",  # beyond the paper: aligned
        "--recipe author", "--recipe author --zca")  # the first author's settings, in one or two micro-batches
TABLE_1, TABLE_2 = ("moco", "moco-local-zca"), ("all", "author-moco", "author-zca")  # what heads are trained on
GIVEN = {"SSL": "data/AbdomenCT-1K", "SEG": "data/BTCV", "OUT": "runs", "SEEDS": "0", "INIT": "imagenet", "ARGS": "",
         "SEG_ARGS": "", "RUN": shlex.quote(sys.executable), "PLAN": ""}


def commands(given: dict[str, str], phantom: bool) -> Iterator[tuple[str, list[str]]]:
    """(script, its flags) of all that is run, in order."""
    ssl, seg = (["--data", given[data], "--out", given["OUT"]] for data in ("SSL", "SEG"))
    more, seg_more = shlex.split(given["ARGS"]), shlex.split(given["SEG_ARGS"])
    window = ["--window", *map(str, AUTHOR["window"])]
    for seed in given["SEEDS"].split():
        suffix, init = seed_suffix(int(seed)), given["INIT"]
        untrained = "imagenet" if init == "imagenet" else "random"
        if init == "start":
            init += suffix
            yield "train_ssl.py", [*ssl, "--seed", seed, "--init", "random", "--no-geometric", "--name", init, *more]
        for row in ROWS:  # the phantom's start is trained by itself
            yield "train_ssl.py", [*ssl, "--seed", seed, *["--init", init] * (not phantom), *row.split(), *more]
        for split in report.DRAWS:
            for name in TABLE_2 if split == "100" else (untrained, *TABLE_1):
                backbone = name if name in (untrained, "all") else "phantom-" * phantom + name + suffix
                yield "train_seg.py", [*seg, "--seed", seed, "--split", split, *window * name.startswith("author"),
                                       "--backbone", backbone, *seg_more]
    yield "svd_spectrum.py", seg
    yield "train_seg.py", ["--report", "--out", given["OUT"]]


def plan(given: dict[str, str], phantom: bool) -> None:
    """Say what of it is done."""
    print("Plan, in {OUT}: pre-training on {SSL}, segmentation of {SEG}, seeds {SEEDS}, from {INIT}".format(**given))
    trained, done = {}, []
    for script, flags in commands(given, phantom):
        if script == "train_ssl.py":
            args = train_ssl.parse(flags)
            train_ssl.resolve_defaults(args, phantom)
            folder = args.out / args.name
            log = runs.read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
            print(f"  pre-train {args.name}:", "done" if (folder / "backbone.pth").exists() else
                  f"begun, at step {log[-1]['step']}" if log else "to do")
            trained[args.name] = args
        elif "--split" in flags:
            args = train_seg.parse(flags)
            suffix, names = seed_suffix(args.seed), [args.backbone]
            if args.backbone == "all":
                names = ["imagenet" if given["INIT"] == "imagenet" else "random", *(
                    name for name, of in trained.items() if (of.seed, of.recipe) == (args.seed, "paper")
                    and not name.startswith("start"))]
            done += [(args.out / "seg" / f"{name.removesuffix(suffix)}{suffix}-{protocol}-{args.split}-{draw}"
                      / "result.json").exists()
                     for name in names for protocol in PROTOCOLS for draw in range(report.DRAWS[args.split])]
    print(f"  segmentation: {sum(done)} of {len(done)} runs done", flush=True)


@launch.command
def main(argv: list[str] | None = None) -> None:
    """The plan, then the commands, up to the first that fails."""
    given = {name: os.environ.get(name) or default for name, default in GIVEN.items()}
    for folder in (given["SSL"], given["SEG"]):
        if not Path(folder).is_dir():
            raise BadInput(f"{folder}: no such folder; give SSL=... and SEG=... (docs/data.md)")
    phantom = intake.is_phantom(Path(given["SSL"]))
    given["INIT"] = "phantom-start" if phantom else given["INIT"]
    plan(given, phantom)
    if given["PLAN"]:
        return
    signal.signal(signal.SIGINT, lambda *_: None)  # the command at work saves and ends, and this loop with it
    for script, flags in commands(given, phantom):
        several = script == "train_ssl.py" and "author" not in flags  # the author's micro-batches are too few for RUN
        command = [*(shlex.split(given["RUN"]) if several else [sys.executable]), script, *flags]
        print("$", shlex.join(command), flush=True)
        if code := subprocess.run(command).returncode:
            raise SystemExit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
