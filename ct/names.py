"""Which files are below a folder, by one walk, and what their names say: images, labels, which belong together.

A folder of 129,000 masks is walked once in a process, without a look at each file: `walk` goes by what the folders
themselves say of their entries, and all that asks what is there asks its `Listing`.
"""

import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ct.volumes import SUFFIXES, BadInput, is_nifti, stem

# Words that name labels, in names of files and folders, each apart from the letters around it: labelsTr, liver_mask,
# Segmentations, RibFrac1-label, GT; not "unlabelled". A folder of images below a folder of labels is one of images.
LABELS = re.compile(r"(label(map)?s?|masks?|msk|d?segs?|segmentations?|annotations?|groundtruth|gt)(t[rs])?")
IMAGES = re.compile(r"(images?|imgs?|imaging|volumes?|scans?)(t[rs])?")
# what is computed on the grid of a CT, and no CT: distances, doses, probabilities
MAPS = re.compile(r"(rt)?doses?|dist(ance)?s?|s?edt|sd[fmt]|prob(abilit(y|ie))?s?|heatmaps?|uncertainty|entropy")
EITHER = re.compile(f"{LABELS.pattern}|{IMAGES.pattern}|ct")
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # liverMask has the parts liver and Mask
# what may stand beside the word in the name of a folder that holds labels and nothing else
HALF = ("", "tr", "ts", "va", "val", "validation", "train", "training", "test", "testing")

BY_NAME = "a label map by its name"
# Images that are not read here: ending -> (what they are, what converts them to .nii.gz)
DICOM, PAIR, ITK = (("DICOM", "dcm2niix"), ("NIfTI or Analyze pairs", "SimpleITK"), ("MetaImage or NRRD", "SimpleITK"))
OTHERS = {".dcm": DICOM, ".dicom": DICOM, ".ima": DICOM, ".hdr": PAIR, ".img": PAIR, ".hdr.gz": PAIR, ".img.gz": PAIR,
          ".mha": ITK, ".mhd": ITK, ".nrrd": ITK, ".nhdr": ITK, ".mgz": ("FreeSurfer", "nibabel"),
          ".nii.bz2": ("bzip2", "bunzip2 and gzip"), ".nii.xz": ("xz", "unxz and gzip"),
          ".nii.zip": ("zipped", "unzip"), ".nii.zst": ("zstd", "unzstd and gzip")}

# Of two names that look equal, é as one letter (NFC) and as e with an accent (NFD, as macOS writes it), one form.
composed = functools.partial(unicodedata.normalize, "NFC")


# ---------------------------------------------------------------------------------------------------------- one walk


def walk(folder: Path) -> Iterator[tuple[Path, dict[Path, bool] | OSError]]:
    """(folder, its files in order and whether each can be opened) of a folder and of all below it, the upper first.

    In linked folders too, each folder once. Where one cannot be listed the error stands for its files.
    """
    todo, seen = [(folder, os.path.realpath(folder))], set()
    while todo:
        here, real = todo.pop()
        if real in seen:  # a link back up
            continue
        seen.add(real)
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda e: e.name)
        except OSError as e:
            yield here, e
            continue
        folders = {e.name: e for e in entries if _is(e.is_dir)}
        yield here, {here / e.name: _is(e.is_file) for e in entries if e.name not in folders}
        todo += [(here / e.name, os.path.realpath(e.path) if e.is_symlink() else os.path.join(real, e.name))
                 for e in reversed(folders.values())]


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


@dataclass(frozen=True)
class Listing:
    """What is below a folder: folders {folder: {its file: whether it can be opened}}; closed {folder: why}."""

    folder: Path
    folders: dict[Path, dict[Path, bool]]
    closed: dict[Path, OSError]

    @classmethod
    def of(cls, folder: Path) -> "Listing":
        """By one walk."""
        found = dict(walk(folder))
        closed = {here: e for here, e in found.items() if isinstance(e, OSError)}
        return cls(folder, {here: files for here, files in found.items() if here not in closed}, closed)

    def has(self, path: Path) -> bool:
        """Whether a file is there; one outside the folder, or in a folder that was walked by another name, too."""
        return self.folders.get(path.parent, {}).get(path) or path.is_file()

    def volumes(self, folder: Path) -> list[Path]:
        """The NIfTI files of a folder, sorted; those that lie in a folder of their own name too."""
        inner = [p for part in self._below.get(folder, ()) for p in self.folders[part]
                 if stem(p) in (part.name, stem(part))]
        return sorted(p for p in (*self.folders.get(folder, ()), *inner) if is_nifti(p) and not p.name.startswith("."))

    def meant(self, path: Path) -> Path:
        """The file that a list means: itself, or that in a folder of its name, or one whose name looks the same."""
        if self.folders.get(path.parent, {}).get(path):
            return path
        inner = [p for ending in ("", *SUFFIXES) for p in self.folders.get(path.with_name(stem(path) + ending), ())
                 if is_nifti(p) and stem(p) == stem(path)]
        return inner[0] if inner else self._looks.get(composed(str(path)), path)

    @functools.cached_property
    def _below(self) -> dict[Path, list[Path]]:
        below: dict[Path, list[Path]] = {}
        for folder in self.folders:
            below.setdefault(folder.parent, []).append(folder)
        return below

    @functools.cached_property
    def _looks(self) -> dict[str, Path]:
        return {composed(str(path)): path for files in self.folders.values() for path in files}


def survey(there: Listing) -> tuple[list[Path], list[dict]]:
    """(the NIfTI files below a folder that are images by their names, sorted; what else there is, skipped).

    Images of other formats are counted, one line for each format.
    """
    folder, files, others = there.folder, [], {}
    skipped = [skip(here, f"a folder that cannot be opened ({e.strerror})",
                    bool(naming(here.relative_to(folder) / "any", LABELS)))
               for here, e in there.closed.items() if not is_hidden(here, folder)]
    for here, content in there.folders.items():
        inner, hidden = here.relative_to(folder), is_hidden(here, folder)
        for path, usable in content.items():
            if hidden or path.name.startswith("."):
                if is_nifti(path):
                    skipped.append(skip(path, "hidden file", no_image=True))
                continue
            nifti, label = is_nifti(path), bool(naming(inner / path.name, LABELS))
            if not nifti and (what := _other_format(path)):
                others.setdefault((what, label or _converted(path, content)), []).append(path)
            elif not usable and (nifti or path.is_symlink()):
                skipped.append(skip(path, "a broken link, or no file", label))
            elif nifti and label:
                skipped.append(skip(path, BY_NAME, no_image=True))
            elif nifti:
                files.append(path)
    for ((what, tool), no_image), paths in others.items():
        first = ", ".join(str(p.relative_to(folder)) for p in paths[:3]) + " ..." * (len(paths) > 3)
        hint = "labels by their names, or there as .nii too" if no_image else f"convert them with {tool}, or move them"
        skipped.append(skip(folder, f"{len(paths)} files of another format, {what}, not read ({first}); {hint}",
                             no_image))
    return sorted(files), skipped


def skip(path: Path, reason: str, no_image: bool = False, odd: bool = False) -> dict:
    """A skipped file, as `intake.find_volumes` lists it. odd: nothing is left out, it is a warning."""
    return {"file": str(path), "reason": reason, "no_image": no_image or odd} | ({"odd": True} if odd else {})


def named(skipped: dict) -> str:
    """A skipped file in a line; a reason that comes from reading begins with the file's name."""
    return skipped["reason"] if skipped["file"] in skipped["reason"] else f"{skipped['file']}: {skipped['reason']}"


# ------------------------------------------------------------------------------------------------------------- words


def naming(path: Path, words: re.Pattern) -> str | None:
    """What of a path, relative to its data folder, has such a word: the file's name without its ending, or else the
    nearest of its folders, unless a nearer one names images.
    """
    if said(stem(path), words):
        return stem(path)
    for name in reversed(path.parts[:-1]):
        if said(name, IMAGES):
            return None
        if said(name, words):
            return name
    return None


@functools.lru_cache(1 << 14)  # folders come again with each of their files
def said(name: str, words: re.Pattern) -> str:
    """Which of these words a name has: mask of liverMask, label of label0001, labels of labelsTr; or none."""
    return " ".join(part.lower() for part in PART.findall(_joined(name)) if words.fullmatch(part.lower()))


@functools.lru_cache(1 << 14)
def without(name: str, words: re.Pattern) -> str:
    """A name without these words, and without what joined them to the rest: 0001 of img0001, a of a_seg."""
    left = PART.sub(lambda part: "" if words.fullmatch(part[0].lower()) else part[0], _joined(name))
    return re.sub(r"[\s_.-]+", "_", left).strip("_")


def _joined(name: str) -> str:
    return re.sub("(?i)ground[ _-]?truth", "groundtruth", name)


def holds_labels(name: str) -> bool:
    """Whether a folder's name says labels and nothing else: labelsTr, Ground Truth; not Segmentation study 2021."""
    return without(name, LABELS).lower() in HALF


def partner(path: Path) -> str:
    """What an image and its label map have in common, of a path relative to their data folder."""
    parts = [without(composed(part), EITHER) for part in (*path.parts[:-1], without_channel(path))]
    return "/".join(part for part in parts if part)


def is_hidden(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder on the way to it from `folder`, has a name that begins with a dot."""
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


def _converted(path: Path, beside: dict[Path, bool]) -> bool:
    """Whether a NIfTI file of the same name lies beside a file of another format."""
    ending = _ending(path)
    own = path.name[: -len(ending)] if ending else path.name
    return any(is_nifti(other) and stem(other) == own for other in beside)


# ------------------------------------------------------------------------------------------------- image and label map


def pair(there: Listing, images: Path, labels: Path) -> tuple[list[dict], list[dict]]:
    """(volumes, skipped) of two folders whose files belong together where their names say so.

    x.nii.gz or x_0000.nii.gz and x.nii.gz; and of what that leaves over img0001 and label0001, a_image and a_mask. An
    image without a label has the name that its label would have. Raises BadInput for two of one name.
    """
    image, label = (by_name(there.volumes(folder)) for folder in (images, labels))
    volumes = {name: label[name] for name in image if name in label}
    rest: dict[str, list[str]] = {}
    for name in sorted(image.keys() - volumes):
        rest.setdefault(without(name, EITHER), []).append(name)
    for name in sorted(label.keys() - volumes):
        if like := rest.get(without(name, EITHER)):
            if len(like) > 1 or like[0] in volumes:
                others = [image[i] for i in like] if len(like) > 1 else [volumes[like[0]]]
                raise BadInput(f"{label[name]}: its name does not say which image it belongs to, beside "
                               f"{', '.join(map(str, others))}; give image and label the same name")
            volumes[like[0]] = label[name]
    owned = set(volumes.values())
    return ([{"id": name, "image": path, "label": volumes.get(name, labels / f"{name}.nii.gz")}
             for name, path in image.items()],
            [skip(path, "a label without its image") for path in label.values() if path not in owned])


def by_name(files: list[Path], name_of: Callable[[Path], str] | None = None) -> dict[str, Path]:
    """{id: file}. Raises BadInput for two of one id."""
    found: dict[str, Path] = {}
    for path in files:
        name = composed((name_of or without_channel)(path))
        refuse_second(name, path, found.get(name))
        found[name] = path
    return found


def without_channel(path: Path) -> str:
    """A file's name without its ending and nnU-Net's number of its first channel."""
    return stem(path).removesuffix("_0000")


def refuse_second(name: str, path: Path, first: Path | None) -> None:
    """Raise BadInput where an id has a file already."""
    if first:
        alike = composed(str(first)) == composed(str(path)) and first != path
        why = " (they look the same: é is one letter in one of them, e and an accent in the other)" * alike
        raise BadInput(f"{first} and {path}: two files of one id, {name}{why}; rename one, or take out the one that is "
                       "no image or not wanted")


def files(volume: dict) -> list[Path]:
    """The files that a volume is made of: its image, and its label's, of which there may be none or a mask an organ."""
    label = volume["label"] or []
    return [volume["image"], *(label if isinstance(label, list) else [label])]
