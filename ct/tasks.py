"""BTCV as a task: its organs and their label ids, its splits and draws of cases."""

from pathlib import Path

from ct.volumes import BadInput

ORGANS = ("background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
          "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland",
          "left adrenal gland")  # BTCV's label ids 0 to 13
SPLITS = Path(__file__).parent.parent / "splits"


def cases(split: str, draw: int = 0) -> list[str]:
    """BTCV case numbers of a split: '12.5' and '25' (draws 0 to 2), '100', or 'val'. Raises BadInput."""
    name = {"100": "btcv_train", "val": "btcv_val"}.get(split, f"btcv_{split}_{draw}")
    path = SPLITS / f"{name}.txt"
    if not path.exists():
        known = sorted(p.stem for p in SPLITS.glob("btcv_*.txt"))
        raise BadInput(f"{path}: no such split; there are {', '.join(known)}")
    return path.read_text().split()
