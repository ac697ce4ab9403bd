"""What is in a folder and what of it is a CT: which layout, which volumes, what is left out and why.

Every command comes in by these two doors. `find_volumes` goes by names: files and folders that name labels are left
out, what is not read here is counted; where a name is unsure, the file's first planes decide. `judge` goes by a
volume's values (judgement.py) and geometry: what is no CT in HU, or no stack of axial slices, is refused; what is
usable and yet unusual gets a warning.
"""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from ct import judgement, maps, names, phantom, volumes
from ct.command import counted
from ct.names import BY_NAME, Listing, named, skip, survey
from ct.volumes import BadInput, Volume, is_nifti, stem

LEAST_SIDE = 16  # rows and columns of a slice; a scout stored as a stack is 1 pixel high
LEAST_SLICES = 3
SQUARE, OTHER_PLANE = 1.1, 2.0  # ratio of a pixel's sides: above the first odd, above the second no axial slices

BY_VOXELS = "a distance, dose or probability map by its name and its voxels"
READ_ANYWAY = "its name says labels, but its voxels are a CT's, so it is used; --images says which files are the images"


# ------------------------------------------------------------------------------------------------------ by its names


def find_volumes(data: Path, kind: str, images: Sequence[str] | None = None) -> tuple[list[dict], list[dict]]:
    """What a folder holds: ({id, image, label or None} sorted by id, skipped {file, reason, no_image}).

    Known layouts: BTCV's RawData/Training/{img,label}, AbdomenCT-1K's Case_00001_0000.nii.gz in one folder or
    in part folders, and any folder of NIfTI volumes (labelled ones of other layouts: `layouts.find`).
    kind "segment": with the labels of BTCV; all other volumes have none here. images: the images are the files that
    match one of these patterns (Path.match), whatever names and voxels say. no_image: the file is none by its name, so
    nothing is missed; all other skipped ones are unusable. Raises BadInput for a missing or empty folder and for two
    files of one id.
    """
    if not data.is_dir():
        raise BadInput(f"{data}: no such folder; give --data the folder of the CT volumes")
    if (root := btcv_root(data)) and not images:
        there = Listing.of(root)
        return _without(*_find_btcv(there, kind), _others_in_btcv(there, kind))
    there = Listing.of(data)
    files, skipped = survey(there)
    if any(_is_case(p) and stem(p).endswith("_0000") for p in files):  # AbdomenCT-1K: masks lack the _0000
        masks = [p for p in files if _is_case(p) and not stem(p).endswith("_0000")]
        skipped += [skip(p, BY_NAME, no_image=True) for p in masks]
        files = [p for p in files if p not in set(masks)]
    files, skipped = _by_pattern(data, files, skipped, images) if images else _by_voxels(data, files, skipped)
    if not files:
        others = "; ".join(named(s) for s in skipped[:3]) + f" ... ({len(skipped)} such)" * (len(skipped) > 3)
        raise BadInput(f"{data}: no .nii or .nii.gz volumes in this folder or below it" + f"; {others}" * bool(others))
    found = names.by_name(files, lambda p: names.without_channel(p) if _is_case(p) else
                          "__".join([*p.relative_to(data).parts[:-1], stem(p)]))
    return [{"id": name, "image": found[name], "label": None} for name in sorted(found)], skipped


def _by_pattern(data: Path, files: list[Path], skipped: list[dict],
                images: Sequence[str]) -> tuple[list[Path], list[dict]]:
    """The files that match one of `images`, of those whose name says an image and of those whose name says labels."""
    labels = [Path(s["file"]) for s in skipped if s["reason"] == BY_NAME]
    wanted = {p for p in (*files, *labels) if any(p.relative_to(data).match(pattern) for pattern in images)}
    if not wanted:
        raise BadInput(f"--images {','.join(images)}: matches no .nii or .nii.gz file in {data}")
    others = [skip(p, "none of --images", no_image=True) for p in files if p not in wanted]
    return sorted(wanted), [s for s in skipped if s["reason"] != BY_NAME or Path(s["file"]) not in wanted] + others


def _by_voxels(data: Path, files: list[Path], skipped: list[dict]) -> tuple[list[Path], list[dict]]:
    """Where a name is unsure, the voxels decide, if they can be read: labels and maps that are CT become images, images
    that are called distance or dose and show no CT are left out.

    A name is sure that lies in a folder of labels and nothing else, and is an image's but for the words. Where one of
    the two holds, the first of all that are called by the same word is looked at, and where that is a CT, all.
    """
    # of the whole path, and of the file alone: AbdomenCT-1K's images may lie in folders of parts
    partners = {names.partner(inner) for p in files for inner in (p.relative_to(data), Path(p.name))}
    likely, unsure = {}, []
    for path in (Path(s["file"]) for s in skipped if s["reason"] == BY_NAME):
        inner = path.relative_to(data)
        name = names.naming(inner, names.LABELS) or ""  # none: AbdomenCT-1K's
        alike = any(key and key in partners for key in map(names.partner, (inner, Path(inner.name))))
        reasons = alike + (name in inner.parts[:-1] and names.holds_labels(name))
        if reasons == 1:
            likely.setdefault(names.said(name, names.LABELS), []).append(path)
        elif not reasons:
            unsure.append(path)
    unsure += [p for paths in likely.values() if maps.shows_ct(paths[0]) for p in paths]
    found = {p for p in unsure if maps.shows_ct(p)}
    left_out = {p for p in files if names.naming(p.relative_to(data), names.MAPS) and maps.shows_ct(p) is False}
    remarks = [skip(p, READ_ANYWAY, odd=True) for p in sorted(found)]
    return (sorted(found.union(files) - left_out),
            [s for s in skipped if s["reason"] != BY_NAME or Path(s["file"]) not in found]
            + [skip(p, BY_VOXELS, no_image=True) for p in sorted(left_out)] + remarks)


def btcv_root(data: Path) -> Path | None:
    """The folder of BTCV's img and label in a data folder, as RawData.zip or Abdomen.zip unpacks there, or None.

    Images of other names than img... are not BTCV's.
    """
    return next((root for root in (data / "RawData" / "Training", data / "Abdomen" / "RawData" / "Training",
                                   data / "Training", data) if (root / "img").is_dir() and _as_in_btcv(root)), None)


def _as_in_btcv(root: Path) -> bool:
    images = [p.name for p in (root / "img").glob("*") if is_nifti(p) or not p.name.startswith(".") and p.is_dir()]
    return not images or any(name.startswith("img") for name in images)


def _others_in_btcv(there: Listing, kind: str) -> list[dict]:
    """What else there is in BTCV's folder; its labels are nothing else, and a label that is missing is one too few."""
    others = []
    for s in survey(there)[1]:
        if Path(s["file"]).is_relative_to(there.folder / "label"):
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
        raise BadInput(f"no image can be used: {named(others[0])} ({len(others)} such)")
    return usable, [s for s in skipped if s["file"] not in gone] + others


def _is_case(path: Path) -> bool:
    return path.name.startswith("Case_")


def _find_btcv(there: Listing, kind: str) -> tuple[list[dict], list[dict]]:
    root = there.folder

    def numbered(part: str, name: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in (p for p in there.volumes(root / part) if p.name.startswith(name)):
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
    """True when the folder's first file was generated by phantom.py: its header says so, that of labels too.

    The folder is not walked to its end. Raises BadInput as `find_volumes` does where there is nothing in it.
    """
    files = (p for _, there in names.walk(data) if not isinstance(there, OSError) for p in there)
    first = next((p for p in files if is_nifti(p) and not names.is_hidden(p, data)), None)
    return volumes.is_phantom(first or find_volumes(data, "pretrain")[0][0]["image"])


# ----------------------------------------------------------------------------------------- by its values and geometry


def judge(read: Volume) -> list[str]:
    """The warnings about a volume, a line each.

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
        odd.append(f"{counted(slices, 'slice')} only (a scout?)")
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
