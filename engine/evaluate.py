"""What a segmentation run is worth: its validation curve, its result in every convention, and its pictures."""

import json
import math
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import metrics
from ct import coverage, volumes
from ct.command import counted, duration
from engine import backbones, distances, figures, methods, origin, predict, processes, report, runs
from engine.signals import StopRequest

CASE_COLUMNS = ("case", "organ id", "organ", "intersection", "prediction", "truth", "dice", *distances.HD95)
SHOWN = 6  # slices in overlays.png


def predictions(trainer) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
    """Of each validation volume: its record among the prepared slices, truth and prediction, (Z, H, W) uint8."""
    store = trainer.store
    records = {v["id"]: v for v in store.volumes}
    for case in tqdm(store.task.cases("val"), "evaluating", unit="volume", disable=None, leave=False):
        levels, truth = (np.stack([store.slice(int(i), label) for i in store.of([case])]) for label in (False, True))
        labels = predict.volume(trainer.model, levels, trainer.args.crop_size, trainer.amp, trainer.device)
        yield records[case], truth, labels


def validate(trainer, run: runs.Run, done: int, stop: StopRequest) -> None:
    """A point of the validation curve after `done` iterations, where it is not there yet. It chooses nothing.

    A stop request ends it between two volumes, without a point; the next start makes it.
    """
    curve = run.folder / "validation.jsonl"
    if curve.exists() and any(r["step"] == done for r in runs.read_log(curve)):
        return
    counts = {}
    for record, truth, labels in predictions(trainer):
        counts[record["id"]] = metrics.count_slices(labels, truth, len(trainer.store.task.organs))
        if stop.signal:
            return
    left = coverage.uncounted(trainer.store.volumes, trainer.store.task)
    mds = add_point(run, done, *metrics.join(counts), left)["mDS"]
    tqdm.write(f"{run.folder.name}: iteration {done:,}/{trainer.args.iterations:,}, validation mDS {100 * mds:.2f} %")


def add_point(run: runs.Run, done: int, table: np.ndarray, ids: np.ndarray, left: Collection[int] = ()) -> dict:
    """Append every convention's mean of a table to validation.jsonl; returns them.

    left: classes that count as if they did not occur, `coverage.uncounted`.
    """
    table = table.copy()
    table[:, list(left)] = 0
    summary = metrics.summarise(table, ids)
    runs.append(run.folder / "validation.jsonl", [{"step": done, **summary}])
    return summary


def finish(trainer, run: runs.Run, config: dict) -> None:
    """Evaluate the last iteration's model: result.json, a line of results.jsonl, dice.csv, predictions, pictures.

    Raises RuntimeError where a backbone that was to stay frozen has changed.
    """
    args, folder, title, task = trainer.args, run.folder, run.folder.name, trainer.store.task
    after = backbones.checksum(trainer.model.backbone)
    if trainer.model.frozen and after != trainer.backbone:
        raise RuntimeError(f"{title}: the frozen backbone changed during training (checksum {trainer.backbone} before, "
                           f"{after} after); its result would not be what it says")
    counts, hd95, predicted = {}, {}, {}
    for record, truth, labels in predictions(trainer):
        case = record["id"]
        counts[case], predicted[case] = metrics.count_slices(labels, truth, len(task.organs)), labels
        hd95[case] = distances.hd95_organs(labels, truth, record["spacing"], len(task.organs))
    table, ids = metrics.join(counts)
    left = coverage.uncounted(trainer.store.volumes, task)
    absent = np.isin(np.arange(1, len(task.organs)), list(left))[:, None]
    result = {**config, **add_point(run, args.iterations, table, ids, left),
              **distances.summarise_hd95([np.where(absent, distances.ABSENT, d) for d in hd95.values()]),
              "uncounted": {task.organs[c]: why for c, why in left.items()},
              "backbone_before": trainer.backbone, "backbone_after": after,
              "wall_s": round(time.time() - trainer.started, 1), "amp": trainer.amp,
              "processes": trainer.ranks.world_size, "hardware": processes.hardware(), "commit": origin.commit(),
              "date": time.strftime("%Y-%m-%d")}
    report.write_csv(folder / "dice.csv", [CASE_COLUMNS, *per_case(table, ids, hd95, task.labels)])
    runs.append(args.out / "results.jsonl", [result])  # first: with result.json the run counts as done
    runs.write_text(folder / "result.json", json.dumps(result) + "\n")
    occur = sum(dice is not None for dice in result["organs"])
    over = f"{counted(occur, 'class')}, pooled over the validation set"
    print(f"{title}: mDS {100 * result['mDS']:.2f} % ({over}), with background "
          f"{100 * result['mDice_with_background']:.2f} %, {duration(result['wall_s'])}")
    if args.save_predictions:
        for case, (name, path) in validation_files(trainer.store).items():
            predict.write(folder / "predictions", name, predicted[case], volumes.read_volume(path), task)
        predict.write_volumes(folder / "predictions")
    title = ", ".join([methods.label(result), *report.doubts(report.remarks_on(result)), config["protocol"],
                       f"{config['split']} % of the training volumes (random subset {config['draw']})"])
    if config["data"] == "phantom":
        title += ", on the generated phantom"
    pictures(trainer.store, folder, title, table, ids, predicted)


def pictures(store, folder: Path, title: str, table: np.ndarray, ids: np.ndarray,
             predicted: dict[str, np.ndarray]) -> None:
    """overlays.png of a run and, of one that was evaluated on its way, validation.png."""
    rows, shown = [], spread(table, SHOWN)
    for i, (row, score) in enumerate(shown):
        case, z = str(ids[row]), row - int(np.argmax(ids == ids[row]))
        place = int(store.of([case])[z])
        rank = "worst: " if i == 0 else "best: " if i == len(shown) - 1 else ""
        rows.append((f"{rank}{case} slice {z}, Dice {100 * score:.0f} %", store.slice(place),
                     store.slice(place, label=True), predicted[case][z]))
    curve = runs.read_log(folder / "validation.jsonl")
    if len(curve) > 1:
        figures.attempt(figures.validation, folder / "validation.png", curve, title)
    figures.attempt(figures.overlays, folder / "overlays.png", rows,
                    f"{title}\nvalidation slices that hold most of the classes, from the worst to the best mean Dice",
                    store.task.organs)


def spread(table: np.ndarray, number: int) -> list[tuple[int, float]]:
    """Rows of the table to look at, with their mean Dice over classes: worst, best, and evenly spaced ranks between.

    Of the slices that truly hold at least half as many classes as the fullest one, so that a slice with the tip of
    one organ is not "the worst"; fewer than `number` where there are fewer.
    """
    organs = (table[:, 1:, 2] > 0).sum(1)  # (slices,): how many classes a slice truly holds
    score = metrics.nan_mean(metrics.dice(*np.moveaxis(table[:, 1:], -1, 0)), 1)
    full = np.flatnonzero((organs > 0) & (2 * organs >= organs.max()))
    ranked = full[np.argsort(score[full], kind="stable")]
    places = np.unique(np.linspace(0, len(ranked) - 1, number).round().astype(int)) if len(ranked) else []
    return [(int(ranked[i]), float(score[ranked[i]])) for i in places]


def per_case(table: np.ndarray, volumes: Sequence, hd95: dict[object, np.ndarray],
             labels: dict[int, str]) -> list[list]:
    """A row of CASE_COLUMNS for each volume and class, from which every convention can be computed again.

    labels: {id: name} of the classes, in their order; hd95: volume id -> `distances.hd95_organs`. Background (id
    0) is listed for its counts; undefined values are "".
    """
    rows, ids = [], np.unique(np.asarray(volumes)).tolist()
    for volume, voxels in zip(ids, metrics.volume_counts(table, volumes), strict=True):
        scores, surface = metrics.dice(*voxels.T), [[math.nan] * len(distances.HD95), *hd95[volume]]
        for c, (label, name) in enumerate(labels.items()):
            shown = ((scores[c], 6), *((x, 3) for x in surface[c]))
            rows.append([volume, label, name, *voxels[c].tolist(),
                         *("" if math.isnan(x) else f"{x:.{digits}f}" for x, digits in shown)])
    return rows


def validation_files(store) -> dict[str, tuple[str, Path]]:
    """{id: (name of its prediction, file)} of each validation volume."""
    files = {v["id"]: Path(v["source"]["image"]["file"]) for v in store.volumes}
    return {case: (predict.name_of(files[case], case), files[case]) for case in store.task.cases("val")}
