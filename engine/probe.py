"""Is what a run learns worth anything? Each epoch a ridge regression goes from frozen features to labelled slices.

It stands for the frozen linear head of train_seg.py, which sees the same features: those of the dilated backbone at
stride 8. It is fitted in closed form at the positions of slices of the training cases, and scored at those of slices of
the validation cases, all at the side of the views. The run trains on none of it: a run with the probe is the run
without it.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metrics
from ct import prepare, tasks
from ct.command import duration
from ct.volumes import BadInput
from engine import processes, seeds
from segment import dilate
from views import resize
from whitening import fold

FITTED, SCORED = 128, 64  # slices that hold an organ, of the training and of the validation cases: so many at most
STRIDE = 8  # of the dilated backbone: pixels of a view's side for a position
PENALTY = 0.01  # of the ridge, in variances of a feature


class Probe:
    """The slices of a labelled store (datasets.Store) on which a pre-training's features are looked at.

    Which slices these are depends on the prepared slices alone, so all runs are scored on the same ones. Raises
    BadInput where a case of its splits is missing, or no slice of theirs holds a class.
    """

    def __init__(self, trainer, store):
        self.trainer, self.classes = trainer, len(store.task.organs)
        size, side = trainer.batches.slice_px, math.ceil(trainer.batches.view_px / STRIDE)  # of a slice, of a map
        self.fitted, self.scored = (with_organs(store, store.task.cases(split), most, size, side)
                                    for split, most in (("100", FITTED), ("val", SCORED)))
        began = time.perf_counter()
        self.start = self.dice()  # of the weights that the run starts from
        self.seconds = time.perf_counter() - began

    def look(self) -> dict[str, float]:
        """What log.jsonl has of it: the Dice now, and that of the weights from which the run started."""
        return {"probe_dice": self.dice(), "probe_dice_start": self.start}

    @torch.no_grad()
    def dice(self) -> float:
        """Mean Dice, in [0, 1], of the classes that the scored slices hold, pooled over all positions (metrics.mDS).

        Of the query encoder's backbone as it is now, in evaluation mode, with its whitening folded, which changes no
        output. NaN where a feature is not finite.
        """
        backbone = dilate(fold(self.trainer.moco.encoder_q.backbone)).eval()
        net = nn.Sequential(*list(backbone.children())[:-2])  # all but average pooling and fc
        solution = ridge(self.positions(net, *self.fitted), class_weights(self.fitted[1], self.classes))
        if not all(x.isfinite().all() for x in solution):
            return math.nan
        weights, bias = solution
        found = [((features @ weights + bias).argmax(1).cpu().numpy(), labels.cpu().numpy())
                 for features, labels in self.positions(net, *self.scored)]
        table = [metrics.counts(*pair, self.classes).T for pair in found]
        return metrics.summarise(np.stack(table), range(len(table)))["mDS"]

    def positions(self, net: nn.Module, slices: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices (N, size, size) uint8, labels (N, h, h): features (n, d) float64, labels (n,) of some after others."""
        trainer = self.trainer
        for part, truth in zip(*(x.split(trainer.moco.group) for x in (slices, labels)), strict=True):
            images = resize.whole(part.to(trainer.device), trainer.batches.view_px)
            with processes.autocast(trainer.amp, trainer.device):
                maps = net(images.contiguous(memory_format=torch.channels_last))  # (N, d, h, h)
            yield maps.movedim(1, 3).flatten(0, 2).double(), truth.flatten().to(trainer.device)


def begin(trainer, store, labelled, ranks: processes.Processes) -> Probe | None:
    """The probe of a run on `store`, with its first look; `labelled`: the store of --probe, None without the flag.

    Called by all processes; None on all but the main one. Raises BadInput.
    """
    if labelled is None:
        return None
    if labelled.is_phantom != store.is_phantom:
        raise BadInput(f"--probe {labelled.data}: real CT and the phantom do not meet; give --data and --probe both as "
                       "real CT, or both as the phantom")
    made = []

    def make() -> None:
        """Draws the splits where there are none, takes the first look and says what was found."""
        tasks.draw_splits(labelled.task, [v["id"] for v in labelled.volumes])
        made.append(probe := Probe(trainer, labelled))
        (fitted, _), (scored, labels) = probe.fitted, probe.scored
        print(f"probe: {labelled.data}, fitted to {len(fitted)} slices and scored on {len(scored)} of other cases, "
              f"{' x '.join(map(str, labels.shape[1:]))} positions each: mean Dice {100 * probe.start:.1f} % before the"
              f" first step; a look takes {duration(probe.seconds)}, one an epoch")

    processes.on_main(ranks.is_main, make)
    return made[0] if made else None


def with_organs(store, cases: list[str], most: int, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Up to `most` slices of these cases that hold a class: (N, size, size) uint8, as a pre-training stores them, and
    the labels (N, side, side) uint8 at the positions of a map. Raises BadInput where there is none.
    """
    slices, labels = [], []
    for i in seeds.rng(0, seeds.PROBE).permutation(store.of(cases)).tolist():
        truth = at_positions(store.slice(i, label=True), side)
        if ((truth > 0) & (truth != metrics.IGNORE)).any():
            slices.append(prepare.square(store.slice(i)[None], size)[0])
            labels.append(truth)
        if len(slices) == most:
            break
    if not slices:
        raise BadInput(f"--probe {store.data}: no slice of {', '.join(cases[:3])} ... holds a class")
    return torch.from_numpy(np.stack(slices)), torch.from_numpy(np.stack(labels))


def at_positions(labels: np.ndarray, side: int) -> np.ndarray:
    """A label map (H, W), padded to a square as its slice is, with what counts nowhere -> (side, side): the labels of
    the pixels in the middle of so many equal parts. Small organs keep their share, which a majority would take.
    """
    square = np.full((max(labels.shape),) * 2, metrics.IGNORE, labels.dtype)
    top, left = ((len(square) - n) // 2 for n in labels.shape)
    square[top : top + labels.shape[0], left : left + labels.shape[1]] = labels
    middle = ((np.arange(side) + 0.5) * len(square) / side).astype(int)
    return square[np.ix_(middle, middle)]


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """What a position of each class weighs, (classes,) float64: one over the root of their number, 0 without any.

    Between equal positions, with which small organs are never found, and equal classes, which are found everywhere.
    """
    number = torch.bincount(labels.flatten(), minlength=metrics.IGNORE + 1)[:classes].double()
    return torch.where(number > 0, number.clamp(min=1).rsqrt(), 0)


def ridge(parts: Iterable[tuple[Tensor, Tensor]], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, d) float64 and labels (n,), part after part -> weights (d, classes), bias (classes,).

    In closed form, by the normal equations: with z the features at mean 0 and variance 1, y the one-hot labels and w
    the `weights` (classes,) of their classes, scaled to a sum of 1 over all positions and part of all these means, a
    and b minimise sum w |y - z a - b|^2 + PENALTY |a|^2. Labels of 255 count nowhere.
    """
    classes, moments = len(weights), 0
    for features, labels in parts:
        counted = labels != metrics.IGNORE
        y = F.one_hot(labels[counted].long(), classes).double()  # (n, classes)
        rows = torch.cat([features[counted], y, torch.ones_like(y[:, :1])], 1)  # (n, d + classes + 1)
        moments = moments + (rows * (y @ weights.to(y.device))[:, None]).mT @ rows
    moments = moments / moments[-1, -1]
    mean = moments[-1, :-1]
    covariance = moments[:-1, :-1] - mean[:, None] * mean  # (d + classes, d + classes)
    variance, square = (x.diagonal()[: -classes] for x in (covariance, moments[:-1, :-1]))  # (d,) each
    scale = torch.where(variance > 1e-12 * square, variance.clamp(min=0).sqrt(), torch.inf)  # what never changes is 0
    z = covariance[:-classes] / scale[:, None]
    normal = z[:, :-classes] / scale + PENALTY * torch.eye(len(scale), dtype=z.dtype, device=z.device)
    if not normal.isfinite().all():
        return normal, mean
    solution = torch.linalg.solve(normal, z[:, -classes:]) / scale[:, None]  # (d, classes)
    return solution, mean[-classes:] - mean[:-classes] @ solution


def summary(log: Sequence[dict]) -> list[str]:
    """What the records of log.jsonl have of the probe, in a line: its last, its best, its first; [] for none."""
    looks = [r for r in log if r.get("probe_dice") is not None]
    if not looks:
        return []
    last, best = looks[-1], max(looks, key=lambda r: r["probe_dice"])
    last_at, best_at = last["step"], best["step"]
    first, best, last = (f"{100 * x:.1f} %" for x in (last["probe_dice_start"], best["probe_dice"], last["probe_dice"]))
    return [f"probe: mean Dice {first} before the first step, at best {best} after step {best_at:,}, {last} after step "
            f"{last_at:,}"]
