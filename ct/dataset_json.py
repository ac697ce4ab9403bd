"""What a dataset.json lists: MSD's and MONAI's images and labels, nnU-Net's folders; and what is to validate on.

- MSD, AMOS22, MONAI: training and validation [{image, label}], labels {"1": "spleen"}, modality {"0": "CT"};
- MONAI's folds: training [{image, label, fold}]; fold 0 is to validate on, as MONAI takes it;
- nnU-Net v2: labels {"spleen": 1}, channel_names {"0": "CT"}; imagesTr/x_0000.nii.gz and labelsTr/x.nii.gz, or
  dataset {x: {images, label}}; where a splits_final.json lies beside it, its first fold is what is validated on.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from ct.command import counted
from ct.label_maps import check_labels
from ct.names import IMAGES, Listing, composed, pair, refuse_second, said, skip, without_channel
from ct.tasks import Listed
from ct.volumes import BadInput, is_nifti, stem

NAMES = ("dataset.json", "dataset_0.json")  # MSD's and nnU-Net's, MONAI's
SPLITS = "splits_final.json"
VALIDATION = ("validation", "val")  # the names that lists to validate on have
UNLISTED = "labelled, and in none of the data set's lists"


class Found(NamedTuple):
    """labels {id: name}, ascending from 0 (None: those that the label files hold); volumes and skipped as those of
    `intake.find_volumes`, a label being one path or, where each organ has a file, their list in the order of the ids;
    what the data's own list has to validate on.
    """

    layout: str
    labels: dict[int, str] | None
    volumes: list[dict]
    skipped: list[dict]
    listed: Listed | None = None


def file_in(data: Path) -> Path | None:
    """A data folder's dataset.json, under the names that it has, or None."""
    return next((data / name for name in NAMES if (data / name).is_file()), None)


def follow(path: Path, there: Listing) -> Found:
    """What a dataset.json lists, of what is `there` in its folder. Raises BadInput where it cannot be followed."""
    content = _read(path)
    if "channel_names" in content:
        return _nnunet(path, content, there)
    if "training" in content:
        return _msd(path, content, there)
    raise BadInput(f"{path}: neither MSD's (there is no training) nor nnU-Net's (there is no channel_names)")


# ----------------------------------------------------------------------------------------------------- MSD and MONAI


def _msd(path: Path, content: dict, there: Listing) -> Found:
    _refuse_modality(path, "modality", content)
    labels = _labels(path, content)
    if not isinstance(content["training"], list) or not content["training"]:
        raise BadInput(f"{path}: training is not a list of images and labels")
    training = _volumes(path, "training", content["training"], there, {})
    skipped = _count(path, "numTraining", content, len(training), "and training lists")
    listed = None
    for key in (key for key in VALIDATION if content.get(key)):
        labelled = [e for e in _list(path, key, content) if isinstance(e, dict) and e.get("label")]
        held_out = _volumes(path, key, labelled, there, training)
        if held_out and not any(there.has(v["label"]) for v in held_out.values()):
            skipped.append(skip(path, f"{key} lists {counted(len(held_out), 'volume')} without a label file there; "
                                "others are held out", odd=True))
        elif held_out:
            skipped += _count(path, "numValidation", content, len(held_out), f"and {key} lists")
            listed = Listed(f"{key} of {path.name}", tuple(held_out))
            training |= held_out
    folds = [e["fold"] for e in content["training"] if isinstance(e.get("fold"), int)]
    if not listed and len(folds) == len(content["training"]) and 0 < folds.count(0) < len(folds):
        first = [name for name, fold in zip(training, folds, strict=True) if fold == 0]
        listed = Listed(f"fold 0 of {path.name}", tuple(first))
    return Found("MSD", labels, list(training.values()), skipped, listed)


def _volumes(path: Path, key: str, entries: list, there: Listing, others: dict[str, dict]) -> dict[str, dict]:
    """{id: volume} of a list's entries; none may be in the list of `others`, too."""
    volumes: dict[str, dict] = {}
    for entry in entries:
        parts = [_single(entry.get(part)) if isinstance(entry, dict) else None for part in ("image", "label")]
        if not all(isinstance(part, str) for part in parts):
            raise BadInput(f"{path}: an entry of {key} is not {{image, label}} but {str(entry)[:80]}")
        image, label = (there.meant(_inside(path, part)) for part in parts)
        if not os.path.lexists(image) and not stem(image).endswith("_0000"):  # listed without, stored with its channel
            channel = there.meant(image.with_name(image.name.replace(stem(image), f"{stem(image)}_0000", 1)))
            image = channel if os.path.lexists(channel) else image
        *folders, _ = _inside(path, parts[0]).relative_to(path.parent).parts
        folders = folders[1:] if folders and said(folders[0], IMAGES) else folders
        name = composed("__".join([*folders, without_channel(image)]))
        if name in others and others[name]["image"] == image:
            raise BadInput(f"{path}: {name} is in training and in {key}, too; take it out of one of the two")
        refuse_second(name, image, (volumes.get(name) or others.get(name, {})).get("image"))
        volumes[name] = {"id": name, "image": image, "label": label}
    return volumes


def _count(path: Path, key: str, content: dict, there: int, what: str, odd: bool = True) -> list[dict]:
    """What is to be said of a number that the list gives itself: nothing where it is right, or not given."""
    told = content.get(key, there)
    return [] if told == there else [skip(path, f"{key} is {str(told)[:80]}, {what} {there}", odd=odd)]


# ------------------------------------------------------------------------------------------------------------ nnU-Net


def _nnunet(path: Path, content: dict, there: Listing) -> Found:
    _refuse_modality(path, "channel_names", content)
    labels = _object(path, "labels", content)
    if regions := [name for name, value in labels.items() if isinstance(value, (list, tuple))]:
        raise BadInput(f"{path}: {regions[0]} is a region of several ids; give each label one id")
    if "ignore" in labels:
        raise BadInput(f"{path}: has an ignore label, which cannot be used here; give those voxels another label")
    if (ending := content.get("file_ending")) not in (".nii.gz", ".nii"):
        raise BadInput(f"{path}: file_ending {ending}; convert the files to .nii.gz or .nii")
    known = _labels(path, content)
    if "dataset" in content:
        volumes, skipped = _dataset(path, content, there), []
    else:
        folders = [path.parent / part for part in ("imagesTr", "labelsTr")]
        if absent := [folder for folder in folders if not folder.is_dir()]:
            raise BadInput(f"{absent[0]}: no such folder; by {path.name} the volumes lie there")
        volumes, skipped = pair(there, *folders)
        other = [v["image"] for v in volumes if not stem(v["image"]).endswith("_0000")]
        skipped += [skip(image, "its name does not end in _0000, the number of the one channel") for image in other]
        volumes = [v for v in volumes if v["image"] not in other]
    pairs = sum(there.has(v["image"]) and there.has(v["label"]) for v in volumes)
    # as in nnU-Net: where some are not there, no one knows which
    skipped += _count(path, "numTraining", content, pairs, "the pairs of image and label that are there are", odd=False)
    return _first_fold(path.with_name(SPLITS), Found("nnU-Net", known, volumes, skipped))


def _dataset(path: Path, content: dict, there: Listing) -> list[dict]:
    """Those that dataset {x: {"images": [one file], "label": file}} lists."""
    volumes = []
    for name, entry in _object(path, "dataset", content).items():
        parts = [_single(entry.get(part)) if isinstance(entry, dict) else None for part in ("images", "label")]
        if not all(isinstance(part, str) for part in parts):
            raise BadInput(f"{path}: {name} of dataset is not {{images: [one file], label}} but {str(entry)[:80]}")
        image, label = (there.meant(_inside(path, part)) for part in parts)
        volumes.append({"id": composed(name), "image": image, "label": label})
    return volumes


def _first_fold(path: Path, found: Found) -> Found:
    """With the validation set of the first fold; volumes that it lists nowhere are left out, as nnU-Net does."""
    if not path.is_file():
        return found
    folds = _json(path)
    fold = folds[0] if isinstance(folds, list) and folds else None
    lists = [fold.get(part) if isinstance(fold, dict) else None for part in ("train", "val")]
    if not all(isinstance(ids, list) and ids and all(isinstance(i, str) for i in ids) for ids in lists):
        raise BadInput(f"{path}: its first fold is not {{train: [ids], val: [ids]}}; correct it or remove the file")
    train, val = ({composed(i) for i in ids} for ids in lists)
    if both := train & val:
        raise BadInput(f"{path}: {min(both)} is in train and in val of its first fold; take it out of one of the two")
    names = {v["id"] for v in found.volumes}
    skipped = [skip(v["image"], UNLISTED, no_image=True) for v in found.volumes if v["id"] not in train | val]
    if missing := sorted((train | val) - names):
        skipped.append(skip(path, f"lists {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}, of which nothing is "
                            f"there ({len(missing)} such)"))
    return found._replace(volumes=[v for v in found.volumes if v["id"] in train | val],
                          skipped=found.skipped + skipped, listed=Listed(f"fold 0 of {path.name}", tuple(sorted(val))))


# --------------------------------------------------------------------------------------------------------- its fields


def _read(path: Path) -> dict:
    content = _json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path}: a JSON {type(content).__name__}; expected an object with labels")
    return content


def _json(path: Path) -> object:
    def unique(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadInput(f"{path}: {twice} stands twice in one object; keep one of the two")
        return dict(pairs)

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({' '.join(str(e).split())})") from None


def _object(path: Path, key: str, content: dict) -> dict:
    if not isinstance(value := content.get(key), dict) or not value:
        raise BadInput(f"{path}: {key} must be an object with entries")
    return value


def _list(path: Path, key: str, content: dict) -> list:
    if not isinstance(value := content[key], list):
        raise BadInput(f"{path}: {key} must be a list")
    return value


def _labels(path: Path, content: dict) -> dict[int, str]:
    """labels {"1": "spleen"} or {"spleen": 1}, whichever it is."""
    labels = _object(path, "labels", content)
    if not any(isinstance(name, str) for name in labels.values()):
        return check_labels(((value, name) for name, value in labels.items()), path)
    return check_labels(labels.items(), path)


def _refuse_modality(path: Path, key: str, content: dict) -> None:
    value = content.get(key)
    channels = [value] if isinstance(value, str) else list(_object(path, key, content).values())
    if len(channels) > 1:
        raise BadInput(f"{path}: {len(channels)} channels in {key}; expected one, CT")
    if str(channels[0]).strip().upper() != "CT":
        raise BadInput(f"{path}: {key} {channels[0]}, no CT; if the volumes are CT in HU, write CT there")


def _single(value: object) -> object:
    """A file, also where a list of one stands for the channels."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _inside(path: Path, entry: str) -> Path:
    """A file that a dataset.json names, which lies in its folder. Raises BadInput."""
    inner = os.path.normpath(entry)
    if os.path.isabs(inner) or inner.split(os.sep)[0] == ".." or "\0" in inner:
        raise BadInput(f"{path}: {entry!r} lies outside its folder; only files in it are read")
    if not is_nifti(Path(inner)):
        raise BadInput(f"{path}: {entry} is not a .nii.gz or .nii file; convert it")
    return path.parent / inner
