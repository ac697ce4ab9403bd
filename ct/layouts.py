"""Labelled CT in the layouts that people have: which image has which label, and what the labels are called.

- BTCV: RawData/Training/img/img0001.nii.gz, label/label0001.nii.gz;
- MSD (Medical Segmentation Decathlon, AMOS22): dataset.json lists images and labels and names the ids;
- nnU-Net v2: dataset.json names the ids; imagesTr/x_0000.nii.gz, labelsTr/x.nii.gz;
- two folders: images/x.nii.gz or x_0000.nii.gz, labels/x.nii.gz; ids as found, or named by a text file;
- TotalSegmentator: s0000/ct.nii.gz, s0000/segmentations/ORGAN.nii.gz, a mask for each organ.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ct.intake import BY_NAME, IMAGES, btcv_root, find_volumes, has_word, named, skip, survey
from ct.label_maps import HIGHEST_ID, UNKNOWN
from ct.tasks import BTCV
from ct.volumes import BadInput, is_nifti, stem

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"), ("img", "label"))
NO_LABEL = "a volume without a label"


class Found(NamedTuple):
    """labels {id: name}, ascending from 0 (None: those that the label files hold); volumes and skipped as those of
    `intake.find_volumes`, a label being one path or, where each organ has a file, their list in the order of the ids.
    """

    layout: str
    labels: dict[int, str] | None
    volumes: list[dict]
    skipped: list[dict]


def is_labelled(data: Path) -> bool:
    """Whether a folder says by itself that it is there for its labels: BTCV's, or one with a dataset.json."""
    return btcv_root(data) is not None or (data / "dataset.json").is_file()


def find(data: Path, names: Path | None = None, organs: Sequence[str] | None = None) -> Found:
    """The labelled volumes of a folder in any layout, sorted by id.

    names: a text file with `id name` a line, where the layout has no names; organs: of TotalSegmentator's, which and in
    which order (all, sorted). What is listed or paired and cannot be used is skipped, unusable. Raises BadInput where
    no layout is met, or what describes the data is wrong.
    """
    root, json_file = btcv_root(data), data / "dataset.json"
    pair = next((p for p in PAIRS if (data / p[0]).is_dir() and (data / p[1]).is_dir()), None)
    if root or not data.is_dir():
        found = Found("BTCV", BTCV.labels, *find_volumes(data, "segment"))
    elif json_file.is_file():
        found = _from_json(json_file)
    elif pair:
        images, labels = (data / part for part in pair)
        known = _read_names(names) if names else None
        found = Found("two folders", known, *_paired(images, labels, _without_channel, _without_channel))
    elif any(data.glob("*/segmentations")) and (subjects := sorted(p for p in data.glob("*/ct.nii*") if is_nifti(p))):
        found = _totalsegmentator(data, subjects, organs)
    else:
        raise BadInput(f"{data}: no labels in a known layout; expected BTCV's RawData/Training/img (unpack RawData.zip "
                       "into it), a dataset.json of MSD or nnU-Net, folders images and labels (imagesTr and labelsTr, "
                       "img and label), or TotalSegmentator's s0000/ct.nii.gz with s0000/segmentations")
    if names and found.layout != "two folders":
        raise BadInput(f"--labels {names}: the labels of {data} have their names ({found.layout}); leave it out")
    if organs and found.layout != "TotalSegmentator":
        raise BadInput(f"--organs: picks among TotalSegmentator's masks; {data} has label maps ({found.layout})")
    return found if found.layout == "BTCV" else _with_others(data, found)


def files(volume: dict) -> list[Path]:
    """The files that a labelled volume is made of."""
    label = volume["label"]
    return [volume["image"], *(label if isinstance(label, list) else [label])]


def _with_others(data: Path, found: Found) -> Found:
    """With all else that the folder holds, skipped; without the volumes of which a file is not there."""
    images, others = survey(data)
    volumes, skipped, owned = [], list(found.skipped), {s["file"] for s in found.skipped}
    for volume in sorted(found.volumes, key=lambda v: v["id"]):
        owned.update(map(str, files(volume)))
        if missing := [path for path in files(volume) if not path.is_file()]:
            skipped.append(skip(missing[0], f"missing, or a broken link; volume {volume['id']} needs it"
                                + f" ({len(missing)} such)" * (len(missing) > 1)))
        else:
            volumes.append(volume)
    if found.layout == "TotalSegmentator":  # over 100 masks a subject, of which --organs has picked
        others = [s for s in others if s["reason"] != BY_NAME]
    skipped += [s for s in others if s["file"] not in owned]
    if not volumes:
        first = next((s for s in skipped if not s["no_image"]), None)
        raise BadInput(f"{data}: not one labelled volume there can be used" + (f"; {named(first)}" if first else ""))
    skipped += [skip(path, NO_LABEL, no_image=True) for path in images if str(path) not in owned]
    return found._replace(volumes=volumes, skipped=skipped)


# ------------------------------------------------------------------------------------------------------ dataset.json


def _from_json(path: Path) -> Found:
    content = _read_json(path)
    if "channel_names" in content:
        return _nnunet(path, content)
    if "training" in content:
        return _msd(path, content)
    raise BadInput(f"{path}: neither MSD's, with training, nor nnU-Net's, with channel_names")


def _msd(path: Path, content: dict) -> Found:
    """MSD's: labels {"1": "spleen"}, modality {"0": "CT"}, training [{"image": ..., "label": ...}]."""
    _refuse_modality(path, "modality", content)
    labels = check_labels(((key, name) for key, name in _object(path, "labels", content).items()), path)
    if not isinstance(content["training"], list) or not content["training"]:
        raise BadInput(f"{path}: training is no list of images and labels")
    volumes: dict[str, dict] = {}
    for entry in content["training"]:
        parts = [entry.get(part) if isinstance(entry, dict) else None for part in ("image", "label")]
        if not all(isinstance(part, str) for part in parts):
            raise BadInput(f"{path}: an entry of training is not {{image, label}} but {str(entry)[:80]}")
        image, label = (_inside(path, part) for part in parts)
        if not os.path.lexists(image) and not stem(image).endswith("_0000"):  # listed without, stored with its channel
            channel = image.with_name(image.name.replace(stem(image), f"{stem(image)}_0000", 1))
            image = channel if os.path.lexists(channel) else image
        *folders, _ = image.relative_to(path.parent).parts
        folders = folders[1:] if folders and has_word(folders[0], IMAGES) else folders
        name = "__".join([*folders, _without_channel(image)])
        _refuse_second(name, image, volumes.get(name, {}).get("image"))
        volumes[name] = {"id": name, "image": image, "label": label}
    return Found("MSD", labels, list(volumes.values()), [])


def _nnunet(path: Path, content: dict) -> Found:
    """nnU-Net v2's: labels {"spleen": 1}, channel_names {"0": "CT"}, file_ending; x_0000 of imagesTr is x of labelsTr.
    """
    _refuse_modality(path, "channel_names", content)
    labels = _object(path, "labels", content)
    if regions := [name for name, value in labels.items() if isinstance(value, (list, tuple))]:
        raise BadInput(f"{path}: {regions[0]} is a region of several ids; only labels of one id each are read here")
    if "ignore" in labels:
        raise BadInput(f"{path}: has an ignore label, which is not known here; give those voxels another label")
    if (ending := content.get("file_ending")) not in (".nii.gz", ".nii"):
        raise BadInput(f"{path}: file_ending {ending}; only .nii.gz and .nii are read here, convert the files")
    known = check_labels(((value, name) for name, value in labels.items()), path)
    folders = [path.parent / part for part in ("imagesTr", "labelsTr")]
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise BadInput(f"{absent[0]}: no such folder, in which {path.name} has its volumes")
    volumes, skipped = _paired(*folders, _without_channel, stem)
    other = [v["image"] for v in volumes if not stem(v["image"]).endswith("_0000")]
    skipped += [skip(image, "its name does not end in _0000, the number of the one channel") for image in other]
    return Found("nnU-Net", known, [v for v in volumes if v["image"] not in other], skipped)


def _read_json(path: Path) -> dict:
    def unique(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadInput(f"{path}: {twice} stands twice in one object; keep one of the two")
        return dict(pairs)

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: no JSON that can be read ({' '.join(str(e).split())})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: a JSON {type(content).__name__}; expected an object with labels")
    return content


def _object(path: Path, key: str, content: dict) -> dict:
    if not isinstance(value := content.get(key), dict) or not value:
        raise BadInput(f"{path}: {key} is no object with entries")
    return value


def _refuse_modality(path: Path, key: str, content: dict) -> None:
    channels = list(_object(path, key, content).values())
    if len(channels) > 1:
        raise BadInput(f"{path}: {len(channels)} channels in {key}; only one, CT, is read here")
    if str(channels[0]).strip().upper() != "CT":
        raise BadInput(f"{path}: {key} {channels[0]}, no CT; if the volumes are CT in HU, write CT there")


def _inside(path: Path, entry: str) -> Path:
    """A file that a dataset.json names, which lies in its folder. Raises BadInput."""
    inner = os.path.normpath(entry)
    if os.path.isabs(inner) or inner.split(os.sep)[0] == ".." or "\0" in inner:
        raise BadInput(f"{path}: {entry!r} lies outside its folder; only files in it are read")
    if not is_nifti(Path(inner)):
        raise BadInput(f"{path}: {entry} is no .nii.gz or .nii, the only ones that are read here; convert the files")
    return path.parent / inner


# ----------------------------------------------------------------------------------------------------------- labels


def check_labels(pairs: Iterable[tuple[object, object]], path: Path) -> dict[int, str]:
    """{id: name} ascending, of (id, name) as `path` has them. Raises BadInput where they are not one name for one id,
    with the background at 0, or too many.
    """
    labels: dict[int, str] = {}
    for key, name in pairs:
        if not re.fullmatch("[0-9]{1,9}", str(key)) or int(key) > HIGHEST_ID:
            raise BadInput(f"{path}: {key} is no label id, a whole number from 0 to {HIGHEST_ID}")
        if not isinstance(name, str) or not name.strip() or not name.strip().isprintable():
            raise BadInput(f"{path}: label id {key} has no name but {name!r}")
        key, name = int(key), name.strip()
        if key in labels:
            raise BadInput(f"{path}: two names for label id {key}, {labels[key]} and {name}")
        if name in labels.values():
            raise BadInput(f"{path}: label id {key} has the name of another, {name}")
        labels[key] = name
    if labels.get(0, "").lower() != "background":
        raise BadInput(f"{path}: label id 0 is {labels.get(0, 'missing')}; it must be there, and be the background")
    if len(labels) > UNKNOWN:
        raise BadInput(f"{path}: {len(labels) - 1} labels beside the background; at most {UNKNOWN - 1} are possible")
    return dict(sorted(labels.items())) | {0: "background"}


def _read_names(path: Path) -> dict[int, str]:
    """A text file's `id name`, one a line; the background need not be there."""
    try:
        lines = [line.split(None, 1) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: cannot be read as text ({getattr(e, 'strerror', None) or e})") from None
    if short := [line for line in lines if len(line) < 2]:
        raise BadInput(f"{path}: {short[0][0]!r} is not an id and its name")
    background = [] if any(key.strip("0") == "" for key, _ in lines) else [(0, "background")]
    return check_labels([*background, *lines], path)


# ---------------------------------------------------------------------------------------------------- files and masks


def _paired(images: Path, labels: Path, of_image: Callable[[Path], str],
            of_label: Callable[[Path], str]) -> tuple[list[dict], list[dict]]:
    """(volumes, skipped) of two folders whose files belong together where their names say so."""
    image, label = _by_name(images, of_image), _by_name(labels, of_label)
    return ([{"id": name, "image": path, "label": label.get(name, labels / f"{name}.nii.gz")}
             for name, path in image.items()],
            [skip(path, "a label without its image") for name, path in label.items() if name not in image])


def _by_name(folder: Path, name_of: Callable[[Path], str]) -> dict[str, Path]:
    """{name: file} of the NIfTI files in a folder. Raises BadInput for two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.glob("*") if is_nifti(p) and not p.name.startswith(".")):
        _refuse_second(name_of(path), path, found.get(name_of(path)))
        found[name_of(path)] = path
    return found


def _without_channel(path: Path) -> str:
    """A file's name without nnU-Net's number of its first channel."""
    return stem(path).removesuffix("_0000")


def _refuse_second(name: str, path: Path, first: Path | None) -> None:
    if first:
        raise BadInput(f"{first} and {path}: two files of one id, {name}; rename or remove one of the two")


def _totalsegmentator(data: Path, images: list[Path], organs: Sequence[str] | None) -> Found:
    volumes: dict[str, dict] = {}
    for image in images:
        name = image.parent.name
        _refuse_second(name, image, volumes.get(name, {}).get("image"))
        volumes[name] = {"id": name, "image": image, "label": _by_name(image.parent / "segmentations", stem)}
    known = sorted(set().union(*(v["label"] for v in volumes.values())))
    organs = list(organs or known)
    if twice := [organ for organ in organs if organs.count(organ) > 1]:
        raise BadInput(f"--organs: {twice[0]} is there twice")
    if absent := [organ for organ in organs if organ not in known]:
        raise BadInput(f"--organs {absent[0]}: no subject of {data} has segmentations/{absent[0]}.nii.gz; there are "
                       f"{', '.join(known)}")
    for volume in volumes.values():  # a mask for each, empty where there is none of the organ
        masks, folder = volume["label"], volume["image"].parent / "segmentations"
        volume["label"] = [masks.get(organ, folder / f"{organ}.nii.gz") for organ in organs]
    return Found("TotalSegmentator", check_labels([(0, "background"), *enumerate(organs, 1)], data),
                 list(volumes.values()), [])
