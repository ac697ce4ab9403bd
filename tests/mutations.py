"""Mutated NIfTI files, and what has to follow: an independent writer and reader after the standard, no nibabel."""

import gzip
import signal
import struct
import traceback
from itertools import permutations, product
from pathlib import Path

import numpy as np

from ct import volumes

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
         1536: "g"}
# NIfTI-1: field -> (byte, struct code); NIfTI-2 alike. Written down here from the standard, not taken from nibabel.
FIELDS = {1: {"dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
              "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
              "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "6f"), "srow": (280, "12f")},
          2: {"datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"), "pixdim": (104, "8d"),
              "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"), "qform_code": (344, "i"),
              "sform_code": (348, "i"), "quatern": (352, "6d"), "srow": (400, "12d"), "xyzt_units": (500, "i")}}
# stretches that no reader needs
HARMLESS = {1: [(4, 40), (56, 70), (124, 252), (328, 344)], 2: [(192, 344), (504, 540)]}


class Nifti:
    """An unzipped NIfTI file: its bytes, and its fields by name."""

    def __init__(self, raw: bytes, version: int, order: str):
        self.raw, self.version, self.order = bytearray(raw), version, order

    def get(self, name: str) -> tuple:
        return struct.unpack_from(self.order + FIELDS[self.version][name][1], self.raw, FIELDS[self.version][name][0])

    def set(self, name: str, *values) -> None:
        place, code = FIELDS[self.version][name]
        struct.pack_into(self.order + code, self.raw, place, *values)

    @staticmethod
    def make(rng: np.random.Generator) -> "Nifti":
        """A valid file, drawn: version, byte order, type, scale, orientation, sform or qform, an extension."""
        version, order = int(rng.choice([1, 1, 1, 2])), str(rng.choice(["<", "<", ">"]))
        length = {1: 348, 2: 540}[version]
        code = int(rng.choice([4, 4, 512, 16, 64, 8, 2]))
        shape = tuple(int(n) for n in rng.integers(16, 24, 3))
        data = rng.integers(0, 200, shape).astype(order + TYPES[code])
        extension = b"\0\0\0\0"
        if rng.random() < 0.3:
            extension = b"\1\0\0\0" + struct.pack(order + "2i", 32, 6) + b"a comment".ljust(24)
        file = Nifti(bytes(length) + extension + data.tobytes(order="F"), version, order)
        struct.pack_into(order + "i", file.raw, 0, length)
        place, magic = (344, b"n+1\0") if version == 1 else (4, b"n+2\0\r\n\x1a\n")
        file.raw[place : place + len(magic)] = magic
        file.set("dim", *((4, *shape, 1, 1, 1, 1) if rng.random() < 0.2 else (3, *shape, 1, 1, 1, 1)))
        file.set("datatype", code)
        file.set("bitpix", 8 * data.itemsize)
        file.set("vox_offset", length + len(extension))
        file.set("scl_slope", float(rng.choice([0, 1, 1, 0.5, 2])))
        file.set("scl_inter", float(rng.choice([0, -1024])))
        file.set("xyzt_units", 2)
        sizes = rng.uniform(0.5, 3, 3)
        turn = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        file.set("srow", *np.c_[turn * sizes, rng.uniform(-99, 99, 3)].ravel())
        file.set("quatern", *rng.choice([0, 0.5, -0.5], 3), *rng.uniform(-99, 99, 3))
        file.set("pixdim", float(rng.choice([-1, 1])), *sizes, 1, 1, 1, 1)
        file.set("sform_code", int(rng.choice([0, 1, 2])))
        file.set("qform_code", 1)
        return file

    def affine(self) -> np.ndarray:
        """The standard's methods 3 and 2; its method 1 (no codes) as nibabel has it: x towards the patient's left."""
        srow, (b, c, d), pixdim = self.get("srow"), self.get("quatern")[:3], np.array(self.get("pixdim"))
        if self.get("sform_code")[0] > 0 and (np.reshape(srow, (3, 4))[:, :3].any() or self.get("qform_code")[0] <= 0):
            return np.reshape(srow, (3, 4))[:, :3]
        if self.get("qform_code")[0] == 0:
            return np.diag(pixdim[1:4] * (-1, 1, 1))
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        rotation = np.array([[a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                             [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                             [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c]])
        return rotation * pixdim[1:4] * (1, 1, -1 if pixdim[0] < 0 else 1)

    def read(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What its header says: (HU (Z, Y, X), spacing), in every orientation that is as near as the nearest."""
        shape, dtype = self.get("dim")[1:4], np.dtype(TYPES[self.get("datatype")[0]])
        dtype = dtype.newbyteorder(self.order)
        data = np.frombuffer(self.raw, dtype, int(np.prod(shape)), int(self.get("vox_offset")[0]))
        data = data.reshape(shape, order="F")
        (slope,), (inter,) = self.get("scl_slope"), self.get("scl_inter")
        scaled = np.isfinite(slope) and slope != 0 and (slope, inter) != (1, 0)
        hu = data * np.float64(slope) + np.float64(inter) if scaled else data
        affine = self.affine().astype(float)
        sizes = np.sqrt((affine**2).sum(0))
        scores = {}
        for axes in permutations(range(3)):  # the file's axis that runs along x, y, z
            column = [affine[w, axes[w]] / sizes[axes[w]] for w in range(3)]
            for flips in product((1, -1), repeat=3):
                scores[axes, flips] = sum(f * c for f, c in zip(flips, column, strict=True))
        best, found = max(scores.values()), []
        for (axes, flips), score in scores.items():
            if score > best - 0.3:
                turned = hu.transpose(axes)[tuple(slice(None, None, -f * t) for f, t in zip(flips, (1, 1, -1),
                                                                                        strict=True))]
                found.append((turned.transpose(2, 1, 0).astype(np.float32), sizes[list(axes)][::-1]))
        return found


def _values(rng: np.random.Generator, file: Nifti, name: str) -> None:
    """One entry of a field becomes something else."""
    values, code = list(file.get(name)), FIELDS[file.version][name][1][-1]
    place = int(rng.integers(len(values)))
    if code in "fd":
        values[place] = float(rng.choice([0, -1, 1, 1e-30, 1e30, np.nan, np.inf, -np.inf, rng.normal() * 100]))
    else:
        bits = 8 * struct.calcsize(code)
        top = 2**bits - 1 if code == "B" else 2 ** (bits - 1) - 1
        values[place] = int(rng.choice([0, 1, 2, 3, 4, 5, 7, 16, 64, 100, top, *([] if code == "B" else [-top, -1])]))
    file.set(name, *values)


def mutate(rng: np.random.Generator, kind: str, file: Nifti) -> tuple[bytes, str]:
    """(the bytes on disk, what must follow). 'read': read as if not mutated; 'refused'; 'header': read as its header
    says, or refused; 'same': read as if not mutated, or refused."""
    length = {1: 348, 2: 540}[file.version]
    if kind == "fields nobody needs":
        for _ in range(3):
            first, last = HARMLESS[file.version][rng.integers(len(HARMLESS[file.version]))]
            file.raw[int(rng.integers(first, last))] = int(rng.integers(256))
        return _disk(rng, file), "read"
    if kind == "any header bytes":
        for _ in range(int(rng.integers(1, 4))):
            file.raw[int(rng.integers(length + 4))] = int(rng.integers(256))
        return _disk(rng, file), "header"
    if kind == "dimensions, types, sizes":
        _values(rng, file, str(rng.choice(["dim", "dim", "datatype", "bitpix"])))
        return _disk(rng, file), "header"
    if kind == "scale factors":
        _values(rng, file, str(rng.choice(["scl_slope", "scl_inter"])))
        return _disk(rng, file), "header"
    if kind == "affines, codes, units":
        _values(rng, file, str(rng.choice(["srow", "quatern", "pixdim", "sform_code", "qform_code", "xyzt_units"])))
        return _disk(rng, file), "header"
    if kind == "offsets and extensions":
        if rng.random() < 0.5:
            _values(rng, file, "vox_offset")
        else:
            file.raw[length : length + 12] = rng.bytes(12)
        return _disk(rng, file), "header"
    if kind == "huge declared sizes":
        dim = [3, *(int(d) for d in rng.choice([32767, 32000, 9999], 3)), 1, 1, 1, 1]
        dim[int(rng.integers(1, 4))] = int(rng.choice([1, 300, 32767]))
        file.set("dim", *dim)
        return _disk(rng, file), "refused"
    if kind == "byte order":
        # the whole file swapped is a file again; a swapped header alone, or swapped numbers alone, is not seen
        swapped = Nifti(bytes(file.raw), file.version, {"<": ">", ">": "<"}[file.order])
        struct.pack_into(swapped.order + "i", swapped.raw, 0, length)
        if rng.random() < 0.5:  # the first field alone
            return _disk(rng, swapped), "refused"
        for name in FIELDS[file.version]:
            swapped.set(name, *file.get(name))
        (code,), (start,) = file.get("datatype"), file.get("vox_offset")
        data = np.frombuffer(file.raw, np.dtype(TYPES[code]).newbyteorder(file.order), offset=int(start))
        swapped.raw[int(start) :] = data.astype(np.dtype(TYPES[code]).newbyteorder(swapped.order)).tobytes()
        return _disk(rng, swapped), "same"
    raw = _disk(rng, file, zipped=kind == "corrupted gzip" or None)
    if kind == "truncated":
        return raw[: int(rng.integers(len(raw)))], "refused"
    if kind == "corrupted gzip":
        raw = bytearray(raw)
        for _ in range(int(rng.integers(1, 4))):
            raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
        return bytes(raw), "same"
    if kind == "something behind the end":
        more = rng.bytes(int(rng.integers(1, 99))) + b"!"
        return raw + (gzip.compress(more) if rng.random() < 0.3 else more), "refused"
    return [b"", b"\x1f\x8b", rng.bytes(2000), gzip.compress(gzip.compress(file.raw)), gzip.compress(b""), bytes(4000),
            bytes(file.raw[:length]), b"PK\3\4" + raw][int(rng.integers(8))], "refused"


KINDS = ("fields nobody needs", "any header bytes", "dimensions, types, sizes", "scale factors",
         "affines, codes, units", "offsets and extensions", "huge declared sizes", "byte order", "truncated",
         "corrupted gzip", "something behind the end", "no NIfTI at all")


def _disk(rng: np.random.Generator, file: Nifti, zipped: bool | None = None) -> bytes:
    zipped = rng.random() < 0.6 if zipped is None else zipped
    return gzip.compress(bytes(file.raw), 1) if zipped else bytes(file.raw)


def agrees(volume: volumes.Volume, file: Nifti) -> bool:
    return any(np.array_equal(volume.hu, hu) and np.allclose(volume.spacing, spacing, rtol=1e-4)
               for hu, spacing in file.read())


def try_one(path: Path, seed: int, number: int) -> tuple[str, str, str]:
    """Mutate a file, read it: (kind, how it ended, message). Ended: read right, refused, or what is a failure."""
    rng = np.random.default_rng([seed, number])
    kind = KINDS[number % len(KINDS)]
    file = Nifti.make(rng)
    original = Nifti(bytes(file.raw), file.version, file.order)
    raw, must = mutate(rng, kind, file)
    path.write_bytes(raw)
    signal.alarm(10)
    try:
        volume = volumes.read_volume(path)
    except volumes.BadInput as e:
        message = str(e)
        if must == "read" or str(path) not in message or "\n" in message or "memory" in message:
            return kind, "REFUSED WRONGLY", message
        return kind, "refused", message
    except BaseException as e:
        return kind, f"FAILED: {type(e).__name__}", traceback.format_exc()
    finally:
        signal.alarm(0)
    if must == "refused":
        return kind, "READ WRONGLY", "must be refused"
    with np.errstate(all="ignore"):
        try:
            right = agrees(volume, file if must == "header" else original)
        except Exception:  # the header says nothing that can be read, and yet it was
            return kind, "READ WRONGLY", traceback.format_exc()
    return kind, "read right" if right else "READ WRONGLY", "differs from what its header says"
