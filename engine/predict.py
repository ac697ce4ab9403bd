"""The organs of anyone's CT, by a finished segmentation run: NIfTI in, NIfTI on the same grid out.

    python train_seg.py --predict my_ct.nii.gz --run RUN

`volume` is also what evaluates a run, so a prediction of a validation volume is the evaluated one, voxel for voxel.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
from ct import intake, prepare, tasks, volumes
from ct.volumes import BadInput
from engine import backbones, processes, runs
from segment import Segmenter

BATCH = 8  # slices predicted at once
PADDING = -8192  # HU; scanners write -1024 to -8192 where they measured nothing
HIGHEST = 32767  # HU that 16 bits can hold


@torch.no_grad()
def slices(model: Segmenter, images: torch.Tensor, side: int, amp: str) -> torch.Tensor:
    """Slices (B, H, W) uint8 -> labels (B, H, W) uint8: shorter side resized to `side`, logits resized back."""
    with processes.autocast(amp, images.device):
        logits = model(augment.whole(images, side).contiguous(memory_format=torch.channels_last))
    return F.interpolate(logits, images.shape[1:], mode="bilinear").argmax(1).to(torch.uint8)


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
        raise BadInput(f"--run {name}: a pre-training run, which knows no organs; train_seg.py --backbone "
                       f"{folder.name} --split 100 trains one that does")
    if not (folder / "result.json").exists():
        raise BadInput(f"--run {name}: not finished yet; the command that started it continues it")
    return folder


def read_ct(path: Path, window: Sequence[float]) -> tuple[volumes.Volume, np.ndarray]:
    """A volume to predict and its 8-bit slices. Raises BadInput when unreadable, or by its values no CT in HU.

    A CT's values cover at least a third of the window: soft tissue together with air, fat or bone does. Constant
    volumes, label maps, images normalised to 0..1 or to unit deviation, and soft tissue stored without its
    intercept do not; and no CT has values below PADDING or above HIGHEST.
    """
    read = volumes.read_volume(path)
    levels, low, high = prepare.levels(read, window)
    covered = min(high, window[1]) - max(low, window[0])
    if low < PADDING or high > HIGHEST or covered < (window[1] - window[0]) / 3:
        raise BadInput(f"{path}: no CT by its values, {low:g} to {high:g}; expected HU that cover at least a third of "
                       f"{window[0]:g} to {window[1]:g} (a label map? normalised?)")
    return read, levels


def find_volumes(source: Path) -> dict[str, Path]:
    """A volume, or the volumes of a folder -> {name of its prediction: file}. Raises BadInput for an empty folder."""
    if not source.is_dir():
        return {source.name.removesuffix(".gz").removesuffix(".nii"): source}
    found, _ = intake.find_volumes(source, "pretrain")
    stems = [volumes.stem(v["image"]) for v in found]
    # the file's own name, unless two subfolders have a file of that name
    return {stem if stems.count(stem) == 1 else v["id"]: v["image"] for stem, v in zip(stems, found, strict=True)}


def files(paths: dict[str, Path], folder: Path, amp: str, device: torch.device) -> None:
    """Write the labels that the run in `folder` gives to these volumes: folder/predictions/NAME.nii.gz.

    Volumes that cannot be used are left out and, at the end, raise one BadInput.
    """
    config = runs.read_config(folder, "arch", "protocol", "crop_size", "window", "data")
    saved = runs.load(folder / "checkpoint.pt", device)
    model = Segmenter(backbones.architecture(config["arch"]), config["protocol"], len(tasks.ORGANS))
    model.load_state_dict(saved["model"])
    model = model.to(device, memory_format=torch.channels_last)
    if amp == "auto":  # as in the run; what a CPU cannot do in half precision it does in full
        amp = "off" if saved["amp"] == "fp16" and device.type == "cpu" else saved["amp"]
    amp, bad = processes.precision(amp, device), []
    several = None if len(paths) > 1 else True
    for name, path in tqdm(paths.items(), "predicting", unit="volume", disable=several, leave=False):
        try:
            read, levels = read_ct(path, config["window"])
        except BadInput as e:
            bad.append(str(e))
            continue
        labels = volume(model, levels, config["crop_size"], amp, device, name)
        foreign = config["data"] == "phantom" and not read.is_phantom
        tqdm.write(f"{write(folder, name, labels, read)}: {len(np.unique(labels[labels > 0]))} organs in {len(labels)} "
                   "slices" + ", by a model that knows only the generated phantom" * foreign)
    for line in bad[1:]:
        print(line, file=sys.stderr)
    if bad:
        raise BadInput(bad[0] + (f" ({len(bad)} of {len(paths)} volumes, all named here)" if len(bad) > 1 else ""))


def write(folder: Path, name: str, labels: np.ndarray, read: volumes.Volume) -> Path:
    """Labels (Z, Y, X) as folder/predictions/NAME.nii.gz on the grid of the volume's file; returns that path."""
    path = folder / "predictions" / f"{name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    volumes.write_labels(path, labels, read)
    return path
