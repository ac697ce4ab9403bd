"""A generated abdomen: CT volumes with BTCV's 13 organs, written as NIfTI in the layouts of both data sets.

    python -m ct.phantom --out data/phantom
    python -m ct.phantom --layout msd --out data/phantom-msd            labelled patients as others store them

Stands in for AbdomenCT-1K and BTCV where they are absent: the same files, the same conventions, exact labels. How a
patient is made: phantom_scene.py, phantom_anatomy.py. The orientation on disk varies from patient to patient.
"""

import gzip
import os
import shutil
import time
import uuid
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

from ct import phantom_layouts, pool
from ct.command import Parser, command, counted, whole
from ct.phantom_anatomy import patient
from ct.volumes import BadInput

BTCV_IDS = (*range(1, 11), *range(21, 41))  # img0001 is patient 1
UNLABELLED = 1000  # Case_00001 is patient 1001
UNLABELLED_PATIENTS = 40
ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "ASR")  # of the axes on disk; the affine tells readers which


def _save(path: Path, array: np.ndarray, spacing: tuple[float, float, float], axes: str) -> None:
    """Write (Z, Y, X) as NIfTI whose axes on disk point to `axes`, with the affine that says so."""
    size = np.array(spacing[::-1])
    affine = np.diag([*(size * (-1, -1, 1)), 1.0])
    affine[:3, 3] = -(np.array(array.shape[::-1]) - 1) / 2 * np.diag(affine)[:3]
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image = image.as_reoriented(ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(axes)))
    image.header["descrip"] = b"phantom"
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    path.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))


def _write_patient(job: tuple[int, int, tuple, Path, Path | dict[int, Path] | None]) -> int:
    """A patient's files, of (seed, number, shape, image, label). Returns the number of slices."""
    seed, number, shape, image, label = job
    hu, labels, spacing = patient(seed, number, shape)
    axes = ORIENTATIONS[number % len(ORIENTATIONS)]
    _save(image, hu, spacing, axes)
    for organ, path in _masks(label).items():
        _save(path, labels if organ is None else (labels == organ).astype(np.uint8), spacing, axes)
    return len(hu)


def _masks(label: Path | dict[int, Path] | None) -> dict[int | None, Path]:
    """{organ, None of all: file} of a patient's label."""
    return label if isinstance(label, dict) else {None: label} if label else {}


def write(folder: str | os.PathLike, seed: int = 0, labelled: int = len(BTCV_IDS),
          unlabelled: int = UNLABELLED_PATIENTS, shape: tuple[int, int, int] = (40, 192, 192),
          workers: int | None = None, layout: str | None = None) -> int:
    """Write the phantom: `labelled` patients under BTCV's ids, `unlabelled` ones as AbdomenCT-1K's cases.

    BTCV/RawData/Training/{img/img,label/label}0001.nii.gz are patient(seed, 1) and so on;
    AbdomenCT-1K/Case_00001_0000.nii.gz is patient(seed, 1001). In one of phantom_layouts.LAYOUTS the labelled ones lie
    in `folder` itself, as there. Returns the number of slices. The folder appears whole or not at all. Raises BadInput
    when it exists or the numbers are out of range.
    """
    folder = Path(folder)
    if not 0 <= labelled <= len(BTCV_IDS) or unlabelled < 0 or labelled + unlabelled == 0:
        raise BadInput(f"{labelled} labelled and {unlabelled} unlabelled patients; "
                       f"give 0 to {len(BTCV_IDS)} labelled ones, any number unlabelled, and one at least")
    if seed < 0:
        raise BadInput(f"seed {seed} is negative; give 0 or more")
    if os.path.lexists(folder):
        raise BadInput(f"{folder}: exists already; remove it or give another folder")
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    training = Path("BTCV", "RawData", "Training")
    jobs = [(seed, UNLABELLED + i, shape, part / "AbdomenCT-1K" / f"Case_{i:05d}_0000.nii.gz", None)
            for i in range(1, unlabelled + 1)]
    for i in BTCV_IDS[:labelled]:
        files = (phantom_layouts.places(layout, part, i) if layout else
                 (part / training / "img" / f"img{i:04d}.nii.gz", part / training / "label" / f"label{i:04d}.nii.gz"))
        jobs.append((seed, i, shape, *files))
    try:
        for *_, image, label in jobs:
            for path in (image, *_masks(label).values()):
                path.parent.mkdir(parents=True, exist_ok=True)
        if layout:
            phantom_layouts.describe(layout, part, BTCV_IDS[:labelled])
        slices = 0
        for _, written in pool.in_processes(_write_patient, jobs, workers, "phantom", "patient"):
            if isinstance(written, BadInput):
                raise written
            slices += written
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            raise BadInput(f"{folder}: was made by another process meanwhile; use it as it is") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return slices


def ensure(folder: str | os.PathLike = "data/phantom") -> Path:
    """The phantom's folder, made with the defaults first when it is missing; safe from several processes."""
    folder = Path(folder)
    if not folder.exists():
        try:
            write(folder)
        except BadInput:
            if not folder.exists():
                raise
        else:
            size = sum(p.stat().st_size for p in folder.rglob("*.nii.gz"))
            print(f"{folder}: generated CT volumes written ({size / 1e6:,.0f} MB on disk); later starts use them, and "
                  "you may delete them")
    return folder


@command
def main(argv: list[str] | None = None) -> None:
    """Write the phantom that the flags ask for, and say how much it is."""
    parser = Parser(description="Write a generated abdomen in both data sets' layouts.")
    parser.add_argument("--out", type=Path, default=Path("data/phantom"), help="folder to make (%(default)s)")
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of all random numbers (%(default)s)")
    parser.add_argument("--layout", choices=phantom_layouts.LAYOUTS, help="labelled patients only, in this layout")
    parser.add_argument("--labelled", type=whole(0), default=len(BTCV_IDS),
                        help="number of patients under BTCV's ids, at most %(default)s")
    parser.add_argument("--unlabelled", type=whole(0), help="number of patients as cases of "
                        f"AbdomenCT-1K ({UNLABELLED_PATIENTS}; none with --layout)")
    args = parser.parse_args(argv)
    if args.layout and args.unlabelled:
        parser.error(f"--layout {args.layout} takes labelled patients only; leave --unlabelled out")
    if args.unlabelled is None:
        args.unlabelled = 0 if args.layout else UNLABELLED_PATIENTS
    start = time.perf_counter()
    slices = write(args.out, args.seed, args.labelled, args.unlabelled, layout=args.layout)
    print(f"{args.labelled} labelled and {args.unlabelled} unlabelled patients, {counted(slices, 'slice')} in "
          f"{args.out}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
