"""Labelled CT in the layouts that people have: which image has which label, and what the labels are called.

- BTCV: RawData/Training/img/img0001.nii.gz, label/label0001.nii.gz;
- MSD (Medical Segmentation Decathlon, AMOS22, MONAI): dataset.json lists images and labels and names the ids;
- nnU-Net v2: dataset.json names the ids; imagesTr/x_0000.nii.gz, labelsTr/x.nii.gz;
- two folders: images/x.nii.gz or x_0000.nii.gz, labels/x.nii.gz, or img0001 and label0001; ids as found, or named by a
  text file, which BTCV's folders may have, too: then the ids are not BTCV's;
- TotalSegmentator: s0000/ct.nii.gz, s0000/segmentations/ORGAN.nii.gz, a mask for each organ.
"""

from collections.abc import Sequence
from pathlib import Path

from ct import dataset_json
from ct.dataset_json import UNLISTED, Found
from ct.intake import btcv_root, find_volumes
from ct.label_maps import check_labels
from ct.names import BY_NAME, Listing, by_name, composed, files, named, pair, partner, refuse_second, skip, survey
from ct.tasks import BTCV
from ct.volumes import BadInput, is_nifti, stem

PAIRS = (("images", "labels"), ("imagesTr", "labelsTr"), ("img", "label"))
NO_LABEL = "a volume without a label"


def is_labelled(data: Path) -> bool:
    """Whether a folder says by itself that it is there for its labels: BTCV's, or one with a dataset.json."""
    return btcv_root(data) is not None or dataset_json.file_in(data) is not None


def usual_kind(data: Path, names: Path | None = None, organs: Sequence[str] | None = None) -> str:
    """What a folder is prepared for unless --kind says otherwise: "segment" where it, or a flag, speaks of labels."""
    return "segment" if is_labelled(data) or names or organs else "pretrain"


def find(data: Path, names: Path | None = None, organs: Sequence[str] | None = None) -> Found:
    """The labelled volumes of a folder in any layout, sorted by id.

    names: a text file with `id name` a line, where the layout has no names; organs: of TotalSegmentator's, which and in
    which order (all, sorted). What is listed or paired and cannot be used is skipped, unusable. Raises BadInput where
    no layout is met, or what describes the data is wrong.
    """
    root, json_file = btcv_root(data), dataset_json.file_in(data)
    if not data.is_dir() or root and not names:
        found = Found("BTCV", BTCV.labels, *find_volumes(data, "segment"))
        return _refuse_flags(data, found, names, organs)
    there, parent = Listing.of(data), root or data
    folders = next(([parent / part for part in pair] for pair in PAIRS
                    if all((parent / part).is_dir() for part in pair)), None)
    if json_file and not root:
        found = dataset_json.follow(json_file, there)
    elif folders:
        found = Found("two folders", _read_names(names) if names else None, *pair(there, *folders))
    elif subjects := _subjects(there):
        found = _totalsegmentator(there, subjects, organs)
    else:
        raise BadInput(f"{data}: no labels in a known layout; expected BTCV's RawData/Training/img (unpack RawData.zip "
                       "into it), a dataset.json of MSD or nnU-Net, folders images and labels (imagesTr and labelsTr, "
                       "img and label), or TotalSegmentator's s0000/ct.nii.gz with s0000/segmentations")
    return _with_others(there, _refuse_flags(data, found, names, organs))


def _refuse_flags(data: Path, found: Found, names: Path | None, organs: Sequence[str] | None) -> Found:
    if names and found.layout != "two folders":
        raise BadInput(f"--labels {names}: {data} names its labels itself ({found.layout}); leave the flag out")
    if organs and found.layout != "TotalSegmentator":
        raise BadInput(f"--organs: picks among TotalSegmentator's masks; {data} has label maps ({found.layout}); "
                       "leave the flag out")
    return found


def _with_others(there: Listing, found: Found) -> Found:
    """With all else that the folder holds, skipped; without the volumes of which a file is not there."""
    data, (images, others) = there.folder, survey(there)
    volumes, skipped, owned = [], list(found.skipped), {s["file"] for s in found.skipped}
    for volume in sorted(found.volumes, key=lambda v: v["id"]):
        owned.update(map(str, files(volume)))
        if missing := [path for path in files(volume) if not there.has(path)]:
            skipped.append(skip(missing[0], f"missing, or a broken link; volume {volume['id']} needs it"
                                + f" ({len(missing)} such)" * (len(missing) > 1)))
        else:
            volumes.append(volume)
    if found.layout == "TotalSegmentator":  # over 100 masks a subject, of which --organs has picked
        others = [s for s in others if s["reason"] != BY_NAME]
    others = [s for s in others if s["file"] not in owned]
    skipped += others
    if not volumes:
        first = next((s for s in skipped if not s["no_image"]), None)
        raise BadInput(f"{data}: no labelled volume there can be used" + (f"; {named(first)}" if first else ""))
    labelled = {partner(Path(s["file"]).relative_to(data)) for s in others if s["reason"] == BY_NAME}
    skipped += [skip(path, UNLISTED if partner(path.relative_to(data)) in labelled else NO_LABEL, no_image=True)
                for path in images if str(path) not in owned]
    return found._replace(volumes=volumes, skipped=skipped)


# ----------------------------------------------------------------------------------------------------------- labels


def _read_names(path: Path) -> dict[int, str]:
    """A text file's `id name`, one a line; the background need not be there."""
    try:
        lines = [line.split(None, 1) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: cannot be read as text ({getattr(e, 'strerror', None) or e})") from None
    if short := [line for line in lines if len(line) < 2]:
        raise BadInput(f"{path}: {short[0][0]!r} is not an id and its name, such as `1 liver`")
    background = [] if any(key.strip("0") == "" for key, _ in lines) else [(0, "background")]
    return check_labels([*background, *lines], path)


# ---------------------------------------------------------------------------------------------------- files and masks


def _subjects(there: Listing) -> list[Path]:
    """TotalSegmentator's images, where a folder of masks lies beside one of them."""
    inner = {folder.parent for folder in there.folders if folder.name == "segmentations"}
    images = [p for folder, content in there.folders.items() if folder.parent == there.folder for p in content
              if is_nifti(p) and p.name.startswith("ct.nii")]
    return sorted(images) if any(folder.parent == there.folder for folder in inner) else []


def _totalsegmentator(there: Listing, images: list[Path], organs: Sequence[str] | None) -> Found:
    volumes, data = {}, there.folder
    for image in images:
        name = composed(image.parent.name)
        refuse_second(name, image, volumes.get(name, {}).get("image"))
        masks = by_name(there.volumes(image.parent / "segmentations"), stem)
        volumes[name] = {"id": name, "image": image, "label": masks}
    known = sorted(set().union(*(v["label"] for v in volumes.values())))
    organs = list(organs or known)
    if twice := [organ for organ in organs if organs.count(organ) > 1]:
        raise BadInput(f"--organs: {twice[0]} is named twice")
    if absent := [organ for organ in organs if organ not in known]:
        raise BadInput(f"--organs {absent[0]}: no subject of {data} has segmentations/{absent[0]}.nii.gz; there are "
                       f"{', '.join(known)}")
    for volume in volumes.values():  # a mask for each, empty where there is none of the organ
        masks, folder = volume["label"], volume["image"].parent / "segmentations"
        volume["label"] = [masks.get(organ, folder / f"{organ}.nii.gz") for organ in organs]
    return Found("TotalSegmentator", check_labels([(0, "background"), *enumerate(organs, 1)], data),
                 list(volumes.values()), [])
