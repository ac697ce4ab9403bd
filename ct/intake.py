"""What is in a folder and what of it is a CT: which layout, which volumes, what is left out and why.

Every command comes in by these two doors. `find_volumes` goes by names: files and folders that name labels are left
out, what is not read here is counted. `judge` goes by a volume's values (judgement.py) and geometry: what is no CT in
HU, or no stack of axial slices, is refused; what is usable and yet unusual is listed as odd.
"""

import functools
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np

from ct import judgement, phantom, volumes
from ct.volumes import BadInput, Volume, is_nifti, stem

LEAST_SIDE = 16  # rows and columns of a slice; a scout stored as a stack is 1 pixel high
LEAST_SLICES = 3
SQUARE, OTHER_PLANE = 1.1, 2.0  # ratio of a pixel's sides: above the first odd, above the second no axial slices

# Words that name labels, in names of files and folders, each apart from the letters around it: labelsTr, liver_mask,
# Segmentations, RibFrac1-label, GT; not "unlabelled". A folder of images below a folder of labels is one of images.
LABELS = re.compile(r"(label(map)?s?|masks?|msk|d?segs?|segmentations?|annotations?|groundtruth|gt)(t[rs])?")
IMAGES = re.compile(r"(images?|imgs?|imaging|volumes?|scans?)(t[rs])?")
BY_NAME = "a label map by its name"
# Images that are not read here: ending -> (what they are, what converts them to .nii.gz)
DICOM, PAIR, ITK = (("DICOM", "dcm2niix"), ("NIfTI or Analyze pairs", "SimpleITK"), ("MetaImage or NRRD", "SimpleITK"))
OTHERS = {".dcm": DICOM, ".dicom": DICOM, ".ima": DICOM, ".hdr": PAIR, ".img": PAIR, ".hdr.gz": PAIR, ".img.gz": PAIR,
          ".mha": ITK, ".mhd": ITK, ".nrrd": ITK, ".nhdr": ITK, ".mgz": ("FreeSurfer", "nibabel"),
          ".nii.bz2": ("bzip2", "bunzip2 and gzip"), ".nii.xz": ("xz", "unxz and gzip"),
          ".nii.zip": ("zipped", "unzip"), ".nii.zst": ("zstd", "unzstd and gzip")}


# ------------------------------------------------------------------------------------------------------ by its names


def find_volumes(data: Path, kind: str) -> tuple[list[dict], list[dict]]:
    """What a folder holds: ({id, image, label or None} sorted by id, skipped {file, reason, no_image}).

    Known layouts: BTCV's RawData/Training/{img,label}, AbdomenCT-1K's Case_00001_0000.nii.gz in one folder or
    in part folders, and any folder of NIfTI volumes (labelled ones of other layouts: `layouts.find`).
    kind "segment": with the labels of BTCV; all other volumes have none here. no_image: the file's name says that it is
    none, so nothing is missed; all other skipped ones are unusable. Raises BadInput for a missing or empty folder and
    for two files of one id.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; give --data the folder of the CT volumes")
    if root := btcv_root(data):
        return _without(*_find_btcv(root, kind), _others_in_btcv(root, kind))
    files, skipped = survey(data)
    if any(_is_case(p) and stem(p).endswith("_0000") for p in files):  # AbdomenCT-1K: masks lack the _0000
        masks = [p for p in files if _is_case(p) and not stem(p).endswith("_0000")]
        skipped += [skip(p, BY_NAME, no_image=True) for p in masks]
        files = [p for p in files if p not in set(masks)]
    if not files:
        others = "; ".join(named(s) for s in skipped[:3]) + f" ... ({len(skipped)} such)" * (len(skipped) > 3)
        raise BadInput(f"{data}: no .nii or .nii.gz volumes in this folder or below it" + f"; {others}" * bool(others))
    found: dict[str, dict] = {}
    for p in files:
        name = (stem(p).removesuffix("_0000") if _is_case(p) else
                "__".join([*p.relative_to(data).parts[:-1], stem(p)]))
        if name in found:
            raise BadInput(f"{found[name]['image']} and {p}: two files of one id, {name}; rename one, or take out the "
                           "one that is no image or not wanted")
        found[name] = {"id": name, "image": p, "label": None}
    return [found[name] for name in sorted(found)], skipped


def btcv_root(data: Path) -> Path | None:
    """The folder of BTCV's img and label in a data folder, as RawData.zip or Abdomen.zip unpacks there, or None.

    Images of other names than img... are not BTCV's.
    """
    return next((root for root in (data / "RawData" / "Training", data / "Abdomen" / "RawData" / "Training",
                                   data / "Training", data) if (root / "img").is_dir() and _as_in_btcv(root)), None)


def _as_in_btcv(root: Path) -> bool:
    images = [p.name for p in (root / "img").glob("*") if is_nifti(p)]
    return not images or any(name.startswith("img") for name in images)


def named(skipped: dict) -> str:
    """A skipped file in a line; a reason that comes from reading begins with the file's name."""
    return skipped["reason"] if skipped["file"] in skipped["reason"] else f"{skipped['file']}: {skipped['reason']}"


def skip(path: Path, reason: str, no_image: bool = False) -> dict:
    """A skipped file, as `find_volumes` lists it."""
    return {"file": str(path), "reason": reason, "no_image": no_image}


def _others_in_btcv(root: Path, kind: str) -> list[dict]:
    """What else there is in BTCV's folder; its labels are nothing else, and a label that is missing is one too few."""
    others = []
    for s in survey(root)[1]:
        if Path(s["file"]).is_relative_to(root / "label"):
            if s["reason"] != BY_NAME:
                others.append(s | {"no_image": kind != "segment"})
        else:
            others.append(s)
    return others


def _without(found: list[dict], skipped: list[dict], others: list[dict]) -> tuple[list[dict], list[dict]]:
    """BTCV's volumes without what cannot be opened, which is among `others`; a missing label is refused later."""
    gone = {s["file"] for s in others}
    usable = [v if str(v["label"]) not in gone else v | {"label": None} for v in found if str(v["image"]) not in gone]
    if not usable:
        raise BadInput(f"not one image there can be used; {named(others[0])} ({len(others)} such)")
    return usable, [s for s in skipped if s["file"] not in gone] + others


def survey(folder: Path) -> tuple[list[Path], list[dict]]:
    """(the NIfTI files in a folder and below it that may be images, sorted; what else there is, skipped).

    In linked folders too, each folder once. Images of other formats are counted, one line for each format.
    """
    files, skipped, seen, others = [], [], set(), {}

    def unreadable(error: OSError) -> None:
        if not _hidden(path := Path(error.filename), folder):
            skipped.append(skip(path, f"a folder that cannot be opened ({error.strerror})",
                                 names_labels(path.relative_to(folder) / "any")))

    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(root)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        for path in sorted(Path(root, name) for name in names):
            if _hidden(path, folder):
                if is_nifti(path):
                    skipped.append(skip(path, "hidden file", no_image=True))
            elif not is_nifti(path) and (what := _other_format(path)):
                label = names_labels(path.relative_to(folder)) or _converted(path, names)
                others.setdefault((what, label), []).append(path)
            elif path.is_symlink() and not os.path.exists(path) or is_nifti(path) and not os.path.isfile(path):
                skipped.append(skip(path, "a broken link, or no file", names_labels(path.relative_to(folder))))
            elif is_nifti(path) and names_labels(path.relative_to(folder)):
                skipped.append(skip(path, BY_NAME, no_image=True))
            elif is_nifti(path):
                files.append(path)
    for ((what, tool), no_image), paths in others.items():
        first = ", ".join(str(p.relative_to(folder)) for p in paths[:3]) + " ..." * (len(paths) > 3)
        hint = "labels by their names, or there as .nii too" if no_image else f"convert them with {tool}, or move them"
        skipped.append(skip(folder, f"{len(paths)} files of another format, {what}, not read ({first}); {hint}",
                             no_image))
    return sorted(files), skipped


def names_labels(path: Path) -> bool:
    """Whether a file's name, or the nearest of its folders that says what it holds, names labels and not images."""
    if has_word(stem(path), LABELS):
        return True
    for name in reversed(path.parts[:-1]):
        if has_word(name, IMAGES):
            return False
        if has_word(name, LABELS):
            return True
    return False


@functools.lru_cache(1 << 14)  # folders come again with each of their files
def has_word(name: str, words: re.Pattern) -> bool:
    """liverMask has the words liver and mask, label0001 and labelsTr the word label(s)."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", re.sub("(?i)ground[ _-]?truth", "groundtruth", name))
    return any(words.fullmatch(part.lower()) for part in parts)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _other_format(path: Path) -> tuple[str, str] | None:
    """(what, the tool that converts it) of an image file that is not read here; of a pair, the header alone."""
    if (ending := _ending(path)) in (".img", ".img.gz"):
        header = path.with_name(path.name[: -len(ending)] + ending.replace("img", "hdr"))
        return None if header.exists() else PAIR
    if ending:
        return OTHERS[ending]
    if path.suffix[1:].isdigit() or not path.suffix:  # as scanners and archives name DICOM files
        try:
            with open(path, "rb") as f:
                return DICOM if f.read(132)[128:] == b"DICM" else None
        except OSError:
            return None
    return None


def _ending(path: Path) -> str:
    return max((e for e in OTHERS if path.name.lower().endswith(e)), key=len, default="")


def _converted(path: Path, names: list[str]) -> bool:
    """Whether a NIfTI file of the same name lies beside a file of another format."""
    ending = _ending(path)
    own = path.name[: -len(ending)] if ending else path.name
    return any(is_nifti(Path(n)) and stem(Path(n)) == own for n in names)


def _is_case(path: Path) -> bool:
    return path.name.startswith("Case_")


def _find_btcv(root: Path, kind: str) -> tuple[list[dict], list[dict]]:
    def numbered(part: str, name: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(p for p in (root / part).glob(f"{name}*") if is_nifti(p)):
            if (other := found.setdefault(stem(path).removeprefix(name), path)) != path:
                raise BadInput(f"{path}: the same case as {other}; remove one of the two")
        return found

    images, labels = numbered("img", "img"), numbered("label", "label") if kind == "segment" else {}
    if not images:
        raise BadInput(f"{root / 'img'}: no img0001.nii.gz and so on in it")
    return ([{"id": case, "image": image, "label": labels.get(case)} for case, image in sorted(images.items())],
            [skip(label, "a label without its image") for case, label in labels.items() if case not in images])


def locate(data: Path | None, name: str) -> tuple[Path, bool]:
    """The data folder and whether it is the phantom: `data`, else data/NAME where it exists, else the phantom.

    The phantom is made when it is needed and missing.
    """
    if data is None:
        data = Path("data") / name
        if not data.is_dir():
            data = phantom.ensure() / name
    return data, is_phantom(data)


def is_phantom(data: Path) -> bool:
    """True when the folder's first volume was generated by phantom.py (its header says so)."""
    return volumes.is_phantom(find_volumes(data, "pretrain")[0][0]["image"])


# ----------------------------------------------------------------------------------------- by its values and geometry


def judge(read: Volume) -> list[str]:
    """What is odd about a volume, a line each.

    Raises BadInput for what is no CT by its values, whatever the window (`judgement.refuse`), and for what is no stack
    of axial slices by its geometry.
    """
    (slices, rows, columns), (_, y, x) = read.stored.shape, read.spacing
    if min(rows, columns) < LEAST_SIDE:
        raise BadInput(f"{read.path}: no stack of axial slices by its geometry, {slices} of {rows} x {columns} pixels "
                       "(a scout?); leave it out")
    if max(x, y) > OTHER_PLANE * min(x, y):
        plane = "coronal" if y > x else "sagittal"
        raise BadInput(f"{read.path}: no stack of axial slices by its geometry, pixels of {y:.3g} x {x:.3g} mm "
                       f"({plane} slices?); resample it to square pixels or leave it out")
    judgement.refuse(read.path, read.sample)
    return [*judgement.odd(read.sample), *_odd_geometry(read)]


def _odd_geometry(read: Volume) -> list[str]:
    """Where the grid is unusual for a CT, or the header contradicts itself."""
    header, slices, (_, y, x), odd = read.header, len(read.stored), read.spacing, []
    if not np.isfinite(slope := float(header["scl_slope"])):
        odd.append(f"scl_slope {slope} in its header; taken for no scaling")
    if slices < LEAST_SLICES:
        odd.append(f"{slices} slice{'s' * (slices > 1)} only (a scout?)")
    if read.spacing == (1.0, 1.0, 1.0):
        odd.append("spacing (1, 1, 1) mm, most likely a placeholder")
    if max(x, y) > SQUARE * min(x, y):
        odd.append(f"pixels of {y:.3g} x {x:.3g} mm, far from square")
    sizes = nib.affines.voxel_sizes(read.affine)
    axes = read.affine[:3, :3] / sizes
    if (turned := np.degrees(np.arccos(np.clip(np.abs(axes).max(0).min(), 0, 1)))) > 20:
        odd.append(f"axes turned by {turned:.0f} degrees against the patient's; the slices are not axial")
    if (shear := np.abs(axes.T @ axes - np.eye(3)).max()) > 0.01:
        odd.append(f"axes {90 - np.degrees(np.arcsin(min(shear, 1))):.0f} degrees apart, not at right angles")
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not sform and not qform:
        odd.append("no orientation in its header; NIfTI's default was assumed")
    if volumes.empty_sform(header):
        odd.append("an sform of zeros in its header; the qform was used")
    elif sform and not np.allclose(header["pixdim"][1:4], sizes, rtol=0.01):
        odd.append(f"a spacing of {_by(header['pixdim'][1:4])} mm in its header, of {_by(sizes)} mm in its sform, "
                   "which was used")
    if sform and qform and not volumes.empty_sform(header):
        try:
            other = header.get_qform()
        except (nib.spatialimages.HeaderDataError, ValueError):
            odd.append("a damaged qform in its header; the sform was used")
        else:
            shift = volumes.corner_shift(header["dim"][1:4], other, read.affine)
            if not shift <= 0.1 * min(read.spacing):  # nor is NaN
                odd.append(f"its qform and its sform place voxels up to {shift:.3g} mm apart; the sform was used")
    return odd


def _by(sizes: np.ndarray) -> str:
    return " x ".join(f"{s:.3g}" for s in sizes)
