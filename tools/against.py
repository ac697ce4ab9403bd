"""Steps of this code against those of another checkout of it, in turns, in one run.

    git worktree add ../old 31b420e
    python -m tools.against ../old

Each side is a process of its own on one thread, which steps when it is told to. CPU time is compared, since on a shared
machine time on the clock is others' time, too; medians of pairs of steps.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from ct.command import Parser, whole
from engine import launch, origin, processes

HERE = Path(__file__).parent.parent
SMALL = "--arch resnet18 --queue 256 --size 192"
LARGE = "--arch resnet50 --queue 65536 --size 512 --image-size 224"
BOTH = "--local --zca"
SETTINGS = {"resnet18, 64 px, 2 x 32, MoCo v2": f"{SMALL} --image-size 64 --batch-size 64",
            "resnet18, 64 px, 2 x 32, local + ZCA": f"{SMALL} --image-size 64 --batch-size 64 {BOTH}",
            "resnet18, 64 px, 8 x 4, local + ZCA":
                f"{SMALL} --image-size 64 --batch-size 32 --bn-group 4 {BOTH} --zca-group 8",
            "resnet18, 64 px, 8 x 32, aligned": f"{SMALL} --image-size 64 --batch-size 256 {BOTH} --geometric",
            "resnet18, 96 px, 2 x 16, local + ZCA": f"{SMALL} --image-size 96 --batch-size 32 --bn-group 16 {BOTH}",
            "resnet18, 128 px, 2 x 32, local + ZCA": f"{SMALL} --image-size 128 --batch-size 64 {BOTH}",
            "resnet50, 224 px, 2 x 32, MoCo v2": f"{LARGE} --batch-size 64",
            "resnet50, 224 px, 2 x 32, local + ZCA": f"{LARGE} --batch-size 64 {BOTH}"}
SIDE = """
import json, sys, time, warnings
import numpy as np, torch
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import datasets, train_ssl
from engine import processes
args = train_ssl.parse(["--data", ".", "--init", "random", *sys.argv[2:]])
train_ssl.resolve_defaults(args, False)
ranks = processes.start()
amp = processes.precision("auto", ranks.device)
trainer = train_ssl.Trainer(args, train_ssl.build(args), datasets.Batches(args, 60_000, ranks), ranks, amp)
slices = np.random.default_rng(0).integers(0, 256, (args.batch_size, args.size, args.size), np.uint8)
for t, _ in enumerate(sys.stdin):
    start = time.process_time()
    trainer.step(t, torch.from_numpy(slices))
    print(json.dumps(time.process_time() - start), flush=True)
"""


def compared(other: Path, flags: str, pairs: int) -> tuple[float, float, float]:
    """(median over pairs of steps of the ratio here / there, seconds of CPU time of a step here, there)."""
    sides = [subprocess.Popen([sys.executable, "-c", SIDE, str(folder), *flags.split()], cwd=folder, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) for folder in (HERE, other)]
    found = []
    for n in range(pairs + 1):  # the first warms up
        row = []
        for side in sides if n % 2 else sides[::-1]:
            side.stdin.write("step\n")
            side.stdin.flush()
            row.append(json.loads(side.stdout.readline()))
        found.append(row if n % 2 else row[::-1])
    for side in sides:
        side.stdin.close()
        side.wait()
    here, there = zip(*found[1:], strict=True)
    return statistics.median(h / t for h, t in found[1:]), statistics.median(here), statistics.median(there)


@launch.command
def main(argv: list[str] | None = None) -> None:
    """A row a setting, as Markdown."""
    parser = Parser(prog="python -m tools.against", description=__doc__.split("\n\n")[0])
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--pairs", type=whole(1), default=8, help="of steps; of ResNet-50 a third as many")
    args = parser.parse_args(argv)
    other = args.other.resolve()
    print(f"{processes.hardware()}; commit {origin.commit()}\n")
    print("| a step of | here / there | here | there |\n|---|---|---|---|")
    for what, flags in SETTINGS.items():
        ratio, here, there = compared(other, flags, args.pairs // (3 if "resnet50" in what else 1) or 1)
        print(f"| {what} | {ratio:.3f} | {here:.2f} s | {there:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
