"""The phantom's labelled patients in the layouts of other labelled CT (see layouts.py): which file goes where.

    python -m ct.phantom --layout msd --out data/phantom-msd
"""

import json
from pathlib import Path

from ct.tasks import BTCV

# TotalSegmentator's own names of BTCV's organs, in BTCV's order
MASKS = ("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach", "aorta",
         "inferior_vena_cava", "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left")
LAYOUTS = ("msd", "nnunet", "totalsegmentator")


def places(layout: str, folder: Path, number: int) -> tuple[Path, Path | dict[int, Path]]:
    """Where a patient's image goes, and the label map or the mask of each label."""
    case = f"{number:04d}"  # as in BTCV's layout
    if layout == "totalsegmentator":
        subject = folder / f"s{case}"
        return subject / "ct.nii.gz", {label: subject / "segmentations" / f"{organ}.nii.gz"
                                       for label, organ in enumerate(MASKS, 1)}
    channel = "_0000" if layout == "nnunet" else ""
    return folder / "imagesTr" / f"{case}{channel}.nii.gz", folder / "labelsTr" / f"{case}.nii.gz"


def describe(layout: str, folder: Path, numbers: tuple[int, ...]) -> None:
    """Write the layout's dataset.json for these patients, where it has one."""
    content = {"name": "phantom", "numTraining": len(numbers)}
    if layout == "msd":
        listed = [[f"./{path.relative_to(folder)}" for path in places(layout, folder, n)] for n in numbers]
        content |= {"modality": {"0": "CT"}, "labels": {str(i): organ for i, organ in BTCV.labels.items()},
                 "training": [{"image": image, "label": label} for image, label in listed], "test": []}
    elif layout == "nnunet":
        content |= {"channel_names": {"0": "CT"}, "labels": {organ: i for i, organ in BTCV.labels.items()},
                 "file_ending": ".nii.gz"}
    else:
        return
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))
