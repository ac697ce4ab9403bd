"""One NIfTI volume: HU, one display orientation, spacing, and what writing on the file's own grid needs.

Whatever the affine says (RAS, LPS, oblique, slices stored on another axis), a volume is read as
(Z, Y, X) with slice 0 the most inferior, row 0 anterior and column 0 the patient's right, so that a slice
shown as a picture has the radiologist's orientation. Oblique grids are not resampled: their axes go to the
nearest patient axes.

Headers are not repaired on the way in: one that contradicts itself or the file's length is refused, because a
guess that is wrong would show up in no number afterwards.
"""

import contextlib
import functools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from ct.files import replacing

SUFFIXES = (".nii.gz", ".nii")
# A file's axes in the order (x, y, z) towards Left, Posterior, Superior; transposed, that is (Z, Y, X).
DISPLAY = axcodes2ornt(("L", "P", "S"))
# a header's fields that say where a voxel lies
PLACE = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
         "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
MAX_VOXELS = 2**31  # 2,147 million: 8,000 slices of 512 x 512. A header that declares more is damaged.
BLOCK = 1 << 20  # bytes of a compressed file that are read at once
MAX_RATIO = 1100  # of gzip's compression: deflate cannot do better than 1,032


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line: the file, what is wrong, what to do.

    relayed: every process raises it, since one of them passed it on; only the main one prints it.
    """

    relayed = False


@dataclass(frozen=True)
class Volume:
    """stored (Z, Y, X): the file's own numbers; spacing (z, y, x) in mm; the rest writing on the file's grid needs."""

    stored: np.ndarray
    spacing: tuple[float, float, float]
    path: Path
    header: nib.Nifti1Header
    affine: np.ndarray

    @functools.cached_property
    def hu(self) -> np.ndarray:
        """(Z, Y, X) float32 in HU, its own writable memory."""
        return np.require(_hu(self.stored, self.header), np.float32, ["C", "W"])

    def slice(self, z: int) -> np.ndarray:
        """hu[z], (Y, X) float32, without the memory of a whole volume in float32."""
        return self.in_hu(self.stored[z])

    @functools.cached_property
    def sample(self) -> np.ndarray:
        """HU of one voxel in so many along each axis, (n,) float32 ascending: of up to 32 x 128 x 128."""
        slices, rows, columns = self.stored.shape
        some = self.stored[:: 1 + slices // 16, :: 1 + rows // 64, :: 1 + columns // 64]
        ascending = self.in_hu(np.sort(some, axis=None))  # whole numbers sort faster
        return ascending if ascending[0] <= ascending[-1] else ascending[::-1]

    def in_hu(self, stored: np.ndarray) -> np.ndarray:
        """Some of its stored voxels in HU, float32."""
        return _hu(stored, self.header)

    @property
    def is_phantom(self) -> bool:
        """Whether its header says that phantom.py made it."""
        return _marked(self.header)


def is_nifti(path: Path) -> bool:
    """Whether a file's name says NIfTI, in small letters or in capitals."""
    return path.name.lower().endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz; whole where it has another ending."""
    return next((path.name[: -len(s)] for s in SUFFIXES if path.name.lower().endswith(s)), path.name)


def read_volume(path: str | os.PathLike) -> Volume:
    """Read one CT volume.

    Returns a Volume whose hu (Z, Y, X) has scl_slope and scl_inter applied.
    Raises BadInput when the file is missing, no NIfTI, damaged, no 3-D image, or holds NaN or infinity.
    """
    path = Path(path)
    data, header, affine = load(path)
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(_to_display(affine)[:, 0])]
    read = Volume(display(data, affine), tuple(float(s) for s in spacing[::-1]), path, header, affine)
    # the ends decide for integers (scaling keeps their order), a slice at a time else: no volume in float beside it
    parts = range(len(read.stored)) if data.dtype.kind == "f" else ()
    if not np.isfinite(_hu(np.array([data.min(), data.max()]), header)).all():
        parts = range(len(read.stored))
    if bad := sum(int((~np.isfinite(read.slice(z))).sum()) for z in parts):
        raise BadInput(f"{path}: {bad} of {data.size} voxels are NaN or infinite; export it again or remove it")
    return read


def write_labels(path: str | os.PathLike, labels: np.ndarray, volume: Volume) -> None:
    """Write labels (Z, Y, X) of `volume`'s display grid as NIfTI on the volume file's own grid: uint8, or uint16.

    All that says where a voxel lies is copied from the file's header as it stands, qform and sform each: one computed
    from the other would move the labels for readers that prefer the other (ITK the qform, where the sform is sheared).
    The file appears whole or not at all. Raises ValueError when the shape is not the volume's.
    """
    if labels.shape != volume.stored.shape:
        raise ValueError(f"labels of shape {labels.shape} for a volume of {volume.stored.shape}")
    back = ornt_transform(DISPLAY, io_orientation(volume.affine))
    stored = labels.astype(np.uint8 if labels.max() <= 255 else np.uint16)
    data = apply_orientation(stored.transpose(2, 1, 0), back)
    image = (nib.Nifti2Image if isinstance(volume.header, nib.Nifti2Header) else nib.Nifti1Image)(data, None)
    image.set_data_dtype(stored.dtype)
    for field in (*PLACE, "descrip"):  # a phantom's labels stay marked as such
        image.header[field] = volume.header[field]
    with replacing(Path(path)) as part:
        nib.save(image, part)


def is_phantom(path: Path) -> bool:
    """Whether a file's header says that phantom.py made it; False also where it is no readable NIfTI file."""
    try:
        with _opened(path) as (_, header):
            return _marked(header)
    except BadInput:
        return False  # read_volume will say what is wrong with it


def empty_sform(header: nib.Nifti1Header) -> bool:
    """Whether the sform's code is set, its numbers are all zero, and a qform says where the voxels are."""
    return (int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0
            and not any(header[f"srow_{axis}"][:3].any() for axis in "xyz"))


def corner_shift(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """By how many mm, along one of the axes, two affines place a corner of a grid (X, Y, Z) apart at most."""
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])], float)
    return np.abs((corners @ (affine - other).T)[:, :3]).max()


def _marked(header: nib.Nifti1Header) -> bool:
    return bytes(header["descrip"]).strip(b"\0 ") == b"phantom"


def _to_display(affine: np.ndarray) -> np.ndarray:
    return ornt_transform(io_orientation(affine), DISPLAY)


def display(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A file's (X, Y, Z) -> (Z, Y, X) in display orientation, a view."""
    return apply_orientation(data, _to_display(affine)).transpose(2, 1, 0)


def _is_scaled(header: nib.Nifti1Header) -> bool:
    """Whether scl_slope and scl_inter change anything; a slope of 0 is none, nor is one that is no number (nibabel)."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    return slope != 0 and math.isfinite(slope) and (slope, inter) != (1, 0)


def scaled(data: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """scl_slope and scl_inter applied in float64, where int32 times a float keeps its digits."""
    if not _is_scaled(header):
        return data
    with np.errstate(over="ignore", invalid="ignore"):
        return data * np.float64(header["scl_slope"]) + np.float64(header["scl_inter"])


def _hu(stored: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return scaled(stored, header).astype(np.float32)


class _Gunzip:
    """What gzip.GzipFile reads, faster: in blocks of 1 MB instead of 8 KB (Python before 3.12).

    zlib itself verifies length and checksum at the end of each of the file's members, and raises zlib.error.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.inflate, self.rest = file, zlib.decompressobj(31), b""

    def read(self, size: int) -> bytearray:
        """Up to `size` bytes, fewer only at the end. Raises zlib.error and, where the file is cut short, EOFError."""
        whole, done = bytearray(size), 0  # filled in place: pieces joined would need the memory twice
        while done < size:
            if self.inflate.eof:  # of a member: the end of the file, zeros or another member follow
                self.rest = self.inflate.unused_data.lstrip(b"\0")
                while not self.rest and (block := self.file.read(BLOCK)):
                    self.rest = block.lstrip(b"\0")
                if not self.rest:
                    break
                self.inflate = zlib.decompressobj(31)
            self.rest = self.rest or self.file.read(BLOCK)
            if not self.rest:
                raise EOFError("it ends too early")
            part = self.inflate.decompress(self.rest, min(BLOCK, size - done))
            self.rest = self.inflate.unconsumed_tail
            whole[done : done + len(part)] = part
            done += len(part)
        del whole[done:]
        return whole


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple["BinaryIO | _Gunzip", nib.Nifti1Header]]:
    """The file's unzipped bytes behind its header, and that header. Raises BadInput, for what fails later too."""
    if not is_nifti(path):
        raise BadInput(f"{path}: not a NIfTI name; expected {' or '.join(SUFFIXES)}")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"  # by content: an unzipped file may have kept its .gz
            if not file.tell():
                raise BadInput(f"{path}: empty file (0 bytes); download it again")
            file.seek(0)
            stream = _Gunzip(file) if zipped else file
            yield stream, _header(path, stream)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (EOFError, zlib.error) as e:
        raise BadInput(f"{path}: damaged gzip file ({e}); download it again") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    except MemoryError:
        raise BadInput(f"{path}: too large for this machine's memory") from None


def _header(path: Path, stream: BinaryIO | _Gunzip) -> nib.Nifti1Header:
    start = stream.read(348)
    kind = nib.Nifti1Header
    if start[4:7] == b"n+2":
        kind, start = nib.Nifti2Header, start + stream.read(192)
    elif start[344:347] not in (b"n+1", b"n+2"):
        raise BadInput(f"{path}: not a NIfTI file ({_instead(start)}")
    header = kind(start, check=False) if len(start) == kind.sizeof_hdr else None
    if header is None or int(header["sizeof_hdr"]) != kind.sizeof_hdr:
        raise BadInput(f"{path}: damaged header (its length or byte order)")
    return header


def _instead(start: bytes) -> str:
    """What a file is that begins like this and is no NIfTI, and what to do about it."""
    if start.startswith(b"\x1f\x8b"):
        return "gzip within gzip); gunzip it once"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer in its place); fetch the file with git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page in its place); download it again, from a page that asks for no login"
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive); unpack it"
    return "no n+1 or n+2 in its header); convert it to .nii.gz"


def load(path: Path) -> tuple[np.ndarray, nib.Nifti1Header, np.ndarray]:
    """(stored numbers (X, Y, Z), header, affine in mm) of one 3-D file, checked, its bytes read to the end.

    Raises BadInput when it is missing, no NIfTI, damaged or no 3-D image.
    """
    with _opened(path) as (stream, header):
        shape, dtype, offset = _check_header(path, header)
        affine = _affine(path, header)
        size = math.prod(shape) * dtype.itemsize
        on_disk = path.stat().st_size * (MAX_RATIO if isinstance(stream, _Gunzip) else 1)
        if size > on_disk:  # before anything of that size is allocated
            raise BadInput(f"{path}: truncated, its header declares {size:,} bytes of voxels; download it again")
        stream.read(offset - header.sizeof_hdr)
        body = stream.read(size)
        if len(body) < size:
            raise BadInput(f"{path}: truncated, {len(body):,} of {size:,} bytes of voxels; download it again")
        if stream.read(1):  # at its end, gzip's checksum has been verified
            raise BadInput(f"{path}: longer than its header declares, {shape} voxels of {dtype}; one is damaged")
    return np.frombuffer(body, dtype).reshape(shape, order="F"), header, affine


def planes(path: Path) -> Iterator[np.ndarray]:
    """The stored numbers (X, Y) of one plane of a file after the other, in its own order; only what is asked for is
    inflated. Raises BadInput as `load` does.
    """
    with _opened(path) as (stream, header):
        shape, dtype, offset = _check_header(path, header)
        stream.read(offset - header.sizeof_hdr)
        size = shape[0] * shape[1] * dtype.itemsize
        for _ in range(shape[2]):
            if len(body := stream.read(size)) < size:
                raise BadInput(f"{path}: truncated; download it again")
            yield np.frombuffer(body, dtype).reshape(shape[:2], order="F")


def _check_header(path: Path, header: nib.Nifti1Header) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type of the voxels, byte at which they start), before anything is allocated."""
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
    if int(header["bitpix"]) not in (0, 8 * dtype.itemsize):
        raise BadInput(f"{path}: damaged header ({int(header['bitpix'])} bits a voxel, but of type {dtype})")
    if math.prod(shape) > MAX_VOXELS:
        raise BadInput(f"{path}: header declares {shape} voxels, too many for a CT volume; the file is damaged")
    offset = float(header["vox_offset"])
    if not (math.isfinite(offset) and header.sizeof_hdr + 4 <= offset <= 1 << 24 and offset == int(offset)):
        raise BadInput(f"{path}: damaged header (image starts at byte {offset})")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope != 0 and math.isfinite(slope) and not math.isfinite(inter):
        raise BadInput(f"{path}: scl_inter {inter} is not a number; export it again")
    return tuple(shape), dtype, int(offset)


def _affine(path: Path, header: nib.Nifti1Header) -> np.ndarray:
    """Voxels -> mm: the sform where its code is set, else the qform, else the spacing alone. Raises BadInput.

    An sform of zeros is none, where a qform stands beside it.
    """
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if empty_sform(header):
        sform = 0
    if not 0 <= sform <= 5 or (sform == 0 and not 0 <= qform <= 5):
        raise BadInput(f"{path}: damaged header (sform_code {sform}, qform_code {qform})")
    if int(header["xyzt_units"]) & 7 in (1, 3):
        raise BadInput(f"{path}: lengths in metres or micrometres; convert it to mm")
    if sform == 0:
        steps = header["pixdim"][1:4]
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise BadInput(f"{path}: a spacing of {steps.tolist()} mm; set sform or pixdim")
        if header["pixdim"][0] == 0:
            header["pixdim"][0] = 1  # the standard: a handedness of 0 counts as 1
    try:
        affine = header.get_best_affine() if not empty_sform(header) else header.get_qform()
    except (nib.spatialimages.HeaderDataError, ValueError) as e:
        raise BadInput(f"{path}: damaged qform ({' '.join(str(e).split())})") from None
    with np.errstate(all="ignore"):
        sizes = nib.affines.voxel_sizes(affine)
        usable = (np.isfinite(affine).all() and (sizes > 1e-3).all() and (sizes < 1e3).all()
                  and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-2)
    if not usable or np.isnan(io_orientation(affine)).any():
        raise BadInput(f"{path}: its affine maps voxels to no usable place {affine[:3].round(3).tolist()}; "
                       "set sform or qform")
    return affine
