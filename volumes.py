"""One NIfTI volume in and out: HU, one display orientation, spacing; labels back on the file's own grid.

Whatever the affine says (RAS, LPS, oblique, slices stored on another axis), a volume is read as
(Z, Y, X) with slice 0 the most inferior, row 0 anterior and column 0 the patient's right, so that a slice
shown as a picture has the radiologist's orientation. Oblique grids are not resampled: their axes go to the
nearest patient axes.
"""

import gzip
import io
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

SUFFIXES = (".nii.gz", ".nii")
# A file's axes in the order (x, y, z) towards Left, Posterior, Superior; transposed, that is (Z, Y, X).
DISPLAY = axcodes2ornt(("L", "P", "S"))
MAX_VOXELS = 2**31  # 2,147 million: 8,000 slices of 512 x 512. A header that declares more is damaged.


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line: the file, what is wrong, what to do."""


@dataclass(frozen=True)
class Volume:
    """hu (Z, Y, X) float32; spacing (z, y, x) in mm; the rest is what writing on the file's grid needs."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    path: Path
    header: nib.Nifti1Header
    affine: np.ndarray

    @property
    def is_phantom(self) -> bool:
        return bytes(self.header["descrip"]).strip(b"\0 ") == b"phantom"


def stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return next(path.name[: -len(s)] for s in SUFFIXES if path.name.endswith(s))


def read_volume(path: str | os.PathLike) -> Volume:
    """Read one CT volume.

    Returns a Volume with hu (Z, Y, X) in HU (scl_slope and scl_inter applied).
    Raises BadInput when the file is missing, no NIfTI, damaged, no 3-D image, or holds NaN or infinity.
    """
    path = Path(path)
    image = _load(path)
    raw, slope, inter = _display(image), image.dataobj.slope, image.dataobj.inter
    if slope != 1 or inter != 0:  # in float64, where int32 times a float keeps its digits
        raw = raw * float(slope) + float(inter)
    with np.errstate(over="ignore", invalid="ignore"):
        hu = np.ascontiguousarray(raw, dtype=np.float32)
    if (raw.dtype.kind == "f" or slope != 1 or inter != 0) and not np.isfinite(hu).all():
        bad = int((~np.isfinite(hu)).sum())
        raise BadInput(f"{path}: {bad} of {hu.size} voxels are NaN or infinite; export it again or remove it")
    spacing = nib.affines.voxel_sizes(image.affine)[np.argsort(_to_display(image.affine)[:, 0])]
    return Volume(hu, tuple(float(s) for s in spacing[::-1]), path, image.header, image.affine)


def read_labels(path: str | os.PathLike, volume: Volume, classes: int) -> np.ndarray:
    """Read the label map of a volume: (Z, Y, X) uint8 with ids 0..classes-1.

    Raises BadInput when it is unreadable, lies on another grid than the volume (shape, or an affine that
    moves a corner by over a tenth of a voxel), or holds anything but those ids.
    """
    path = Path(path)
    image = _load(path)
    shape = tuple(image.shape[:3])
    # a volume's hu is the file's grid with its axes permuted and flipped: compare in the file's own order
    own = tuple(volume.header.get_data_shape()[:3])
    if shape != own:
        raise BadInput(f"{path}: label of {shape} voxels for an image of {own} ({volume.path.name}); "
                       "they must be on one grid")
    corners = np.array([[x, y, z, 1] for x in (0, own[0]) for y in (0, own[1]) for z in (0, own[2])], float)
    shift = np.abs((corners @ (image.affine - volume.affine).T)[:, :3]).max()
    if shift > 0.1 * min(volume.spacing):
        raise BadInput(f"{path}: its affine differs from that of {volume.path.name} by up to {shift:.2f} mm; "
                       "label and image must be on one grid")
    labels = np.ascontiguousarray(_display(image))
    if image.dataobj.slope != 1 or image.dataobj.inter != 0:
        labels = labels * float(image.dataobj.slope) + float(image.dataobj.inter)
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
        raise BadInput(f"{path}: label values are not all whole numbers; resample labels by nearest neighbour")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise BadInput(f"{path}: unknown label id {int(low if low < 0 else high)}; "
                       f"expected 0 to {classes - 1} (see datasets.ORGANS)")
    return labels.astype(np.uint8)


def write_labels(path: str | os.PathLike, labels: np.ndarray, volume: Volume) -> None:
    """Write labels (Z, Y, X) of `volume`'s display grid as uint8 NIfTI on the volume file's own grid.

    The file's affine, units and form codes are kept; it appears whole or not at all.
    Raises ValueError when the shape is not the volume's.
    """
    if labels.shape != volume.hu.shape:
        raise ValueError(f"labels of shape {labels.shape} for a volume of {volume.hu.shape}")
    back = ornt_transform(DISPLAY, io_orientation(volume.affine))
    data = apply_orientation(labels.astype(np.uint8).transpose(2, 1, 0), back)
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_xyzt_units("mm")
    header["descrip"] = volume.header["descrip"]  # a phantom's labels stay marked as such
    image = nib.Nifti1Image(data, None, header)
    image.set_qform(volume.affine, int(volume.header["qform_code"]) or None)
    image.set_sform(volume.affine, int(volume.header["sform_code"]) or 1)
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nib.save(image, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _to_display(affine: np.ndarray) -> np.ndarray:
    return ornt_transform(io_orientation(affine), DISPLAY)


def _display(image: nib.Nifti1Image) -> np.ndarray:
    """The stored numbers, unscaled, as (Z, Y, X) in display orientation (a view where possible)."""
    data = image.dataobj.get_unscaled()
    data = data.reshape(data.shape[:3])
    return apply_orientation(data, _to_display(image.affine)).transpose(2, 1, 0)


def _load(path: Path) -> nib.Nifti1Image:
    """The checked image of one 3-D file, its bytes read to the end. Raises BadInput."""
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    if not path.name.endswith(SUFFIXES):
        raise BadInput(f"{path}: not a NIfTI name; expected {' or '.join(SUFFIXES)}")
    if not blob:
        raise BadInput(f"{path}: empty file (0 bytes); download it again")
    zipped = blob[:2] == b"\x1f\x8b"  # by content: an unzipped file may have kept its .gz
    stream = gzip.GzipFile(fileobj=io.BytesIO(blob)) if zipped else io.BytesIO(blob)
    try:
        start = stream.read(544)  # the longer of the two headers (NIfTI-1: 348 bytes, NIfTI-2: 540) and 4 bytes
        kind = _kind(path, start)
        header = kind.header_class.from_fileobj(io.BytesIO(start), check=False)
        end = _check_header(path, header)
        # Not more than the header declares is kept; the rest is read for gzip's checksum, and dropped.
        body = start + stream.read(max(0, end - len(start)))
        if len(body) < end:
            raise BadInput(f"{path}: truncated, {len(body)} of {end} bytes; download it again")
        while stream.read(1 << 22):
            pass
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise BadInput(f"{path}: damaged gzip file ({e}); download it again") from None
    except nib.filebasedimages.ImageFileError as e:
        raise BadInput(f"{path}: not a readable NIfTI file ({e})") from None
    try:
        image = kind.from_bytes(body)
    except (nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError, ValueError) as e:
        raise BadInput(f"{path}: not a readable NIfTI file ({e})") from None
    return _check_grid(path, image)


def _kind(path: Path, start: bytes) -> type[nib.Nifti1Image]:
    for kind, magic in ((nib.Nifti1Image, start[344:348]), (nib.Nifti2Image, start[4:8])):
        if magic[:3] in (b"n+1", b"n+2") and kind.header_class.may_contain_header(start):
            return kind
    raise BadInput(f"{path}: not a NIfTI file (no n+1 or n+2 in its header); convert it to .nii.gz")


def _check_header(path: Path, header: nib.Nifti1Header) -> int:
    """Check dimensions and type before anything is allocated; returns where the image's bytes end."""
    dim = [int(d) for d in header["dim"]]
    shape = dim[1 : 1 + dim[0]] if 0 < dim[0] < 8 else []
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]  # one time point
    if len(shape) != 3 or min(shape) < 1:
        raise BadInput(f"{path}: a {dim[0]}-D image of {dim[1:1 + max(0, min(dim[0], 7))]}; "
                       "expected one 3-D volume")
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        raise BadInput(f"{path}: unknown data type code {int(header['datatype'])} in its header") from None
    if dtype.kind not in "iuf":
        raise BadInput(f"{path}: voxels of type {dtype}; expected numbers in HU")
    if math.prod(shape) > MAX_VOXELS:
        raise BadInput(f"{path}: header declares {shape} voxels, too many for a CT volume; the file is damaged")
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and header.sizeof_hdr <= offset <= 1 << 24 and offset == int(offset)):
        raise BadInput(f"{path}: damaged header (image starts at byte {offset})")
    return int(offset) + math.prod(shape) * dtype.itemsize


def _check_grid(path: Path, image: nib.Nifti1Image) -> nib.Nifti1Image:
    affine = image.affine
    with np.errstate(all="ignore"):
        sizes = nib.affines.voxel_sizes(affine)
        usable = (np.isfinite(affine).all() and (sizes > 1e-3).all() and (sizes < 1e3).all()
                  and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-2)
    if not usable or np.isnan(io_orientation(affine)).any():
        raise BadInput(f"{path}: its affine maps voxels to no usable place {affine[:3].round(3).tolist()}; "
                       "set sform or qform")
    if not (math.isfinite(image.dataobj.slope) and math.isfinite(image.dataobj.inter)):
        raise BadInput(f"{path}: scl_slope or scl_inter is not a number")
    return image
