"""The strip at the top of README, from what `make demo` leaves: a slice, two views of it, the spectra, its organs.

    make demo && python -m tools.overview --out demo --picture docs/overview.png
"""

import csv
from pathlib import Path

import numpy as np
import torch

import augment
from ct import intake, reading, tasks
from ct.command import Parser
from ct.prepare import WINDOW, square
from ct.volumes import BadInput
from engine import figures, launch, predict

CASE, SEGMENTED = "0035", "phantom-moco-local-zca-aligned"  # the first validation case; whose head segments it
SPECTRA = {"phantom-moco": "MoCo v2", "phantom-moco-local-zca": "local + ZCA (the paper)",
           SEGMENTED: "local + ZCA, with crops"}
SEED = 20  # of the views, chosen by eye: both crops show organs


def spectra(path: Path) -> list[tuple[str, str, np.ndarray]]:
    """(method, label, descending singular values) of each of SPECTRA. Raises BadInput where spectrum.csv lacks one."""
    with open(path, newline="") as f:
        rows = {r["backbone"]: r for r in csv.DictReader(f)}
    if absent := SPECTRA.keys() - rows.keys():
        raise BadInput(f"{path}: has no {', '.join(sorted(absent))}; `make demo` makes them")
    return [(run.removeprefix("phantom-"), label, np.array([float(v) for k, v in rows[run].items()
                                                            if k.isdigit() and v])) for run, label in SPECTRA.items()]


@launch.command
def main(argv: list[str] | None = None) -> None:
    """Draw the strip."""
    parser = Parser(prog="python -m tools.overview", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the demo's runs are (%(default)s)")
    parser.add_argument("--picture", type=Path, default=Path("docs/overview.png"), help="(%(default)s)")
    args = parser.parse_args(argv)
    data, _ = intake.locate(None, "BTCV")
    volumes = reading.find(data, "segment").volumes
    _, slices, truth = reading.describe(next(v for v in volumes if v["id"] == CASE), tasks.BTCV, WINDOW)
    z = int(np.argmax([len(np.unique(labels)) for labels in truth]))  # the slice with most organs
    cpu = torch.device("cpu")
    model, config, amp = predict.load(predict.find_run(f"{SEGMENTED}-linear-frozen-100-0", args.out), "auto", cpu)
    predicted = predict.volume(model, slices[z : z + 1], config["crop_size"], amp, cpu)[0]
    batch = torch.from_numpy(square(slices[z : z + 1], 192))
    rng = np.random.default_rng(SEED)
    views = augment.pair(batch, augment.draw(rng, 1), augment.draw(rng, 1), 160)
    figures.overview(args.picture, [view[0, 0].numpy() for view in views], spectra(args.out / "spectrum.csv"),
                     [("truth", truth[z]), ("a linear head's organs", predicted)], slices[z])
    print(args.picture)


if __name__ == "__main__":
    main()
