"""Label your own CT with a finished segmentation run: NIfTI in, NIfTI on the same grid out.

    python train_seg.py --predict my_ct.nii.gz --run RUN [--predict-out FOLDER]

Beside each prediction is a picture of it. volumes.csv has the volume of each class in ml, and sources.jsonl the CT that
each prediction is of: none is overwritten by another CT's. `volume` also evaluates a run, so a prediction of a
validation volume is the evaluated one, voxel for voxel.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ct import intake, reading, tasks, volumes
from ct.command import counted
from ct.files import checksum
from ct.volumes import BadInput
from engine import backbones, figures, processes, report, runs
from segment import Segmenter
from views import resize

SOURCES = "sources.jsonl"  # beside predictions: which volume each is of, what its ids mean, and the ml of each
VOLUMES = "volumes.csv"  # beside predictions: the ml of each class, as a table
INSTEAD = "--predict-out FOLDER"  # where predictions go elsewhere
SHOWN = 6  # slices in the picture of a prediction
BATCH = 8  # slices predicted at once
CLASSES = 16  # of their logits at full size at once: 105 classes of 512 px would take 0.9 GB, twice


@torch.no_grad()
def slices(model: Segmenter, images: torch.Tensor, side: int, amp: str) -> torch.Tensor:
    """Slices (B, H, W) uint8 -> labels (B, H, W) uint8: shorter side resized to `side`, logits resized back.

    The label is the first of the greatest logits, as of argmax; they are resized a few classes at a time.
    """
    whole = resize.whole(images, side).contiguous(memory_format=torch.channels_last)
    with processes.autocast(amp, images.device):
        coarse = model.coarse(model.features(whole))
    best = torch.full(images.shape, -torch.inf, device=images.device)
    labels, first = torch.zeros_like(images), 0
    # with multiples of 16, no rest under 4, and dense copies torch's kernels give each class the bits it has among all
    for part in coarse.tensor_split(list(range(CLASSES, coarse.shape[1] - 3, CLASSES)), 1):
        part = F.interpolate(part.clone(), whole.shape[2:], mode="bilinear")
        part = F.interpolate(part, images.shape[1:], mode="bilinear")
        value, index = part.max(1)
        labels = torch.where(value > best, (first + index).to(torch.uint8), labels)
        best, first = torch.maximum(best, value), first + part.shape[1]
    return labels


def volume(model: Segmenter, levels: np.ndarray, side: int, amp: str, device: torch.device,
           title: str = "") -> np.ndarray:
    """The windowed slices of one volume -> its labels, both (Z, H, W) uint8; with a title, a progress bar.

    Takes no random number and leaves the model's mode as it was.
    """
    was_training = model.training
    model.eval()
    labels = np.empty_like(levels)
    with tqdm(desc=title, total=len(levels), unit="slice", disable=None if title else True, leave=False) as bar:
        for z in range(0, len(levels), BATCH):
            part = torch.from_numpy(levels[z : z + BATCH]).to(device)
            labels[z : z + BATCH] = slices(model, part, side, amp).cpu().numpy()
            bar.update(len(part))
    model.train(was_training)
    return labels


def find_run(name: str, out: Path) -> Path:
    """The folder of a finished segmentation run, by its name in OUT/seg or its path. Raises BadInput for others."""
    folder = next((f for f in (out / "seg" / name, Path(name), out / name) if (f / "config.json").exists()), None)
    if folder is None:
        raise BadInput(f"--run {name}: no such run in {out / 'seg'} and no such folder")
    if "protocol" not in runs.read_config(folder, "arch", "data"):
        raise BadInput(f"--run {name}: a pre-training run, which cannot label; train_seg.py --backbone "
                       f"{folder.name} --split 100 trains one that can")
    if not (folder / "result.json").exists():
        raise BadInput(f"--run {name}: not finished yet; the command that started it continues it")
    return folder


def find_volumes(source: Path, images: Sequence[str] | None = None) -> tuple[dict[str, Path], list[dict]]:
    """A volume, or the volumes of a folder -> ({name of its prediction: file}, what else the folder holds, skipped).

    images: those of `intake.find_volumes`. Raises BadInput for a folder without volumes.
    """
    if not source.is_dir():
        return {volumes.stem(source): source}, []
    found, skipped = intake.find_volumes(source, "pretrain", images)
    stems = [volumes.stem(v["image"]) for v in found]
    # the file's own name, unless two subfolders have a file of that name
    names = [stem if stems.count(stem) == 1 else v["id"] for stem, v in zip(stems, found, strict=True)]
    if len(set(names)) < len(names):  # a__ct.nii.gz beside a/ct.nii.gz and b/ct.nii.gz
        names = [v["id"] for v in found]
    return {name: v["image"] for name, v in zip(names, found, strict=True)}, skipped


def name_of(path: Path, case: str) -> str:
    """What the prediction of a volume of labelled data is called: as its file, without nnU-Net's number of the channel,
    if its id is in that name; else (TotalSegmentator's s0000/ct.nii.gz) as its id.
    """
    name = volumes.stem(path).removesuffix("_0000")
    return name if case in name else case


def load(folder: Path, amp: str, device: torch.device) -> tuple[Segmenter, dict, str]:
    """The model of a finished segmentation run, its config, and the precision to predict in ("auto": the run's)."""
    config = runs.read_config(folder, "arch", "protocol", "crop_size", "window", "data")
    saved = runs.load(folder / "checkpoint.pt", device)
    model = Segmenter(backbones.architecture(config["arch"]), config["protocol"], len(task_of(config).organs))
    model.load_state_dict(saved["model"])
    if amp == "auto":  # what a CPU cannot do in half precision it does in full
        amp = "off" if saved["amp"] == "fp16" and device.type == "cpu" else saved["amp"]
    return model.to(device, memory_format=torch.channels_last), config, processes.precision(amp, device)


def files(paths: dict[str, Path], folder: Path, amp: str, device: torch.device, into: Path | None = None,
          skipped: Sequence[dict] = ()) -> None:
    """Write the labels that the run in `folder` gives to these volumes: NAME.nii.gz in `into` (folder/predictions),
    NAME-overlay.png of each, and volumes.csv.

    Warnings about a volume are printed before its prediction. Volumes that cannot be used, those whose place another
    volume's prediction has, and what was skipped as unusable where they were found, are left out and, at the end,
    raise one BadInput.
    """
    into = into or folder / "predictions"
    model, config, amp = load(folder, amp, device)
    task, warned, bad = task_of(config), 0, [intake.named(s) for s in skipped if not s["no_image"]]
    if others := [s["file"] for s in skipped if s["no_image"] and not s.get("odd")]:
        first = ", ".join(others[:3]) + " ..." * (len(others) > 3)
        print(f"left out, no images by their names: {len(others)} ({first})")
    several = None if len(paths) > 1 else True
    for name, path in tqdm(paths.items(), "predicting", unit="volume", disable=several, leave=False):
        try:
            read, levels, _, warnings = reading.read_ct(path, config["window"])
            refuse_another(into / f"{name}.nii.gz", path)  # before the work
        except BadInput as e:
            bad.append(str(e))
            continue
        for line in warnings:
            tqdm.write(f"warning: {path}: {line}")
        warned += len(warnings)
        labels = volume(model, levels, config["crop_size"], amp, device, name)
        foreign = config["data"] == "phantom" and not read.is_phantom
        tqdm.write(f"{write(into, name, labels, read, task)}: {len(np.unique(labels[labels > 0]))} of "
                   f"{len(task.organs) - 1} classes in {len(labels)} slices"
                   + ", by a model that knows only the generated phantom" * foreign)
        figures.attempt(figures.overlays, into / f"{name}-overlay.png", spread(levels, labels),
                        f"{name}, by {folder.name}", task.organs, ("prediction",))
    if (into / SOURCES).exists():
        print(f"volumes in ml: {write_volumes(into)}")
    if warned:
        print(f"warnings: {warned}, printed above")
    for line in bad[1:]:
        print(line, file=sys.stderr)
    if bad:
        raise BadInput(bad[0] + (f" ({len(bad)} such volumes or files, all named here)" if len(bad) > 1 else ""))


def spread(levels: np.ndarray, labels: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Up to SHOWN slices to look at, (caption, image, labels): spread over those that hold a class, or over all."""
    holding = np.flatnonzero(labels.any((1, 2)))
    if not len(holding):
        holding = np.arange(len(labels))
    places = holding[np.unique(np.linspace(0, len(holding) - 1, SHOWN).round().astype(int))]
    return [(f"slice {z}", levels[z], labels[z]) for z in places]


def task_of(config: dict) -> tasks.Task:
    """What a segmentation run can label, by its config.json: that of BTCV has no labels of its own."""
    if "labels" not in config:
        return tasks.BTCV
    return tasks.of(config["data"], {int(i): organ for i, organ in config["labels"].items()}, Path())


def write(folder: Path, name: str, labels: np.ndarray, read: volumes.Volume, task: tasks.Task) -> Path:
    """Classes (Z, Y, X) as folder/NAME.nii.gz, with the task's ids on the grid of the volume's file; returns that path.

    SOURCES beside it says of which volume it is, the name of each id and its ml. Raises BadInput where another volume's
    prediction is in its place, or nothing can be written.
    """
    path = folder / f"{name}.nii.gz"
    refuse_another(path, read.path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(folder / SOURCES, [{"prediction": name, "volume": os.path.realpath(read.path),
                                        "checksum": checksum(read.path), "labels": task.labels,
                                        "ml": dict(zip(task.ids, millilitres(labels, read, len(task.ids)), strict=True))
                                        }], INSTEAD)
        volumes.write_labels(path, np.array(task.ids)[labels], read)
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({e.strerror}); give {INSTEAD}") from None
    return path


def millilitres(labels: np.ndarray, read: volumes.Volume, classes: int) -> list[float]:
    """Classes (Z, Y, X) on a volume's grid -> the volume of each class, background too, in ml (1,000 cubic mm).

    A voxel's volume is the determinant of the file's affine: the product of its spacing, unless the grid is sheared.
    """
    voxels = sum(np.bincount(part.ravel(), minlength=classes) for part in labels)  # a slice at a time: it takes int64
    return (voxels * abs(np.linalg.det(read.affine[:3, :3])) / 1000).tolist()


def write_volumes(folder: Path) -> Path:
    """VOLUMES of all predictions in a folder, by its SOURCES: a line for each class but background; returns its path.

    Said on stderr: what is left out, predictions of older commits, whose ml are not recorded.
    """
    newest = {r["prediction"]: r for r in runs.read_log(folder / SOURCES)}
    if without := [name for name, r in newest.items() if "ml" not in r]:
        print(f"note: {folder / VOLUMES} leaves out {counted(len(without), 'prediction')} of an older version, which "
              f"kept no ml ({', '.join(without)}); predict them again", file=sys.stderr)
    lines = [[name, i, r["labels"][i], f"{ml:.3f}"] for name, r in newest.items() if "ml" in r
             for i, ml in [*r["ml"].items()][1:]]
    report.write_csv(folder / VOLUMES, [["prediction", "class id", "class", "ml"], *lines])
    return folder / VOLUMES


def refuse_another(path: Path, source: Path) -> None:
    """Raise BadInput where a prediction exists that is not of `source`, neither by its place nor by its content."""
    if not os.path.lexists(path):
        return
    listed = path.parent / SOURCES
    known = {r.get("prediction"): r for r in (runs.read_log(listed) if listed.exists() else ())}
    owner = known.get(path.name.removesuffix(".nii.gz"))
    if owner and (owner.get("volume") == os.path.realpath(source) or owner.get("checksum") == checksum(source)):
        return
    whose = owner.get("volume") if owner else "no known volume"
    raise BadInput(f"{path}: exists and is the prediction of {whose}, not of {source}; give {INSTEAD}, or "
                   "move it away")
