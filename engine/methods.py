"""What a result's method is called in every table, and the colours of methods and classes in every picture."""

import colorsys
import functools
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from engine import origin

# A run's name and its method in words: first what the paper has, in its order; the stand-ins for its ImageNet weights
# (random ones, and the checkpoint from which all runs on few slices begin) come before it.
ROWS = {"imagenet": "No SSL", "random": "Random weights", "start": "Initial checkpoint", "moco": "MoCo v2",
        "moco-local": "MoCo v2 + local", "moco-zca": "MoCo v2 + ZCA", "moco-local-zca": "MoCo v2 + local + ZCA"}
BEYOND = {"moco-every4": "MoCo v2, each 4th slice",
          "moco-nogeo": "MoCo v2, no crops or flips", "moco-zca-nogeo": "MoCo v2 + ZCA, no crops or flips",
          "moco-local-aligned": "MoCo v2 + aligned local", "moco-local-zca-aligned": "MoCo v2 + aligned local + ZCA",
          "author-moco": "MoCo v2, first author's settings", "author-zca": "MoCo v2 + ZCA, first author's settings"}
NAMES = {name: run for run, name in (ROWS | BEYOND).items()}


def label(result: dict) -> str:
    """A result's method for a picture: with its seed, and that it was not made with the paper's settings."""
    method, seed = method_of(result), origin.bare(result["backbone"], result["data"] == "phantom")[1]
    more = f", seed {seed}" * bool(seed) + ", other settings" * bool(origin.unlike_pretraining(result))
    return method + more * (method in NAMES)


def method_of(result: dict) -> str:
    """The method that a result measures, whatever its seed: a run's by its name, if its settings are that method's.

    A file, and a run of another name, is a method of its own.
    """
    name = result["backbone"]
    run, _ = origin.bare(name, result["data"] == "phantom")
    made = origin.of_this(result).replace("moco-nogeo", run) if run == "start" else origin.of_this(result)
    row = (ROWS | BEYOND).get(run)
    if row is None or file_of(result) or (made and made != run):
        taken = row is not None or name in NAMES
        return f"{name} ({'a file' if file_of(result) else 'a run'})" if taken else name
    return row


def file_of(result: dict) -> str:
    """The checksum of the weights that a file held; nothing of a run, ImageNet's or random weights.

    Files of one name and different content are methods of their own.
    """
    return origin.known(result)["checksum"] if origin.is_file(result) else ""


class Look(NamedTuple):
    """What is drawn for a method; line and marker tell it from the others in a grey print."""

    colour: str
    line: object
    marker: str


# Greys and brown for what is compared with, a hue for each method, its pale form for the same with other views.
LOOKS = {
    "imagenet": Look("#000000", "-", "s"),
    "random": Look("#7a7a7a", ":", "o"),
    "start": Look("#8a5a2b", "--", "D"),
    "moco": Look("#1f5fa8", "-", "^"),
    "moco-nogeo": Look("#12a5b8", "-.", "v"),
    "moco-every4": Look("#86b9e8", (0, (6, 1)), "h"),
    "moco-zca": Look("#6c3483", "--", "d"),
    "moco-zca-nogeo": Look("#b893d1", ":", "p"),
    "moco-local": Look("#1e8449", "-.", "<"),
    "moco-local-aligned": Look("#82cf95", (0, (3, 1, 1, 1)), ">"),
    "moco-local-zca": Look("#c0392b", "-", "X"),
    "moco-local-zca-aligned": Look("#e8940c", "--", "P"),
    "author-moco": Look("#e07ab8", "-.", "H"),
    "author-zca": Look("#a3187a", ":", "*"),
    "author-random": Look("#b9b9b9", (0, (1, 3)), "8"),
    "author-start": Look("#cfa97d", (0, (4, 3)), "1"),
}
# what is left for other names; where there are more names than colours, with another one's marker
SPARE = (Look("#00695c", "-", "H"), Look("#c2a500", "--", "*"), Look("#5d6d7e", "-.", "D"), Look("#3d3fc4", ":", "8"),
         Look("#8ba30f", (0, (6, 1)), "^"), Look("#00b894", (0, (3, 1, 1, 1)), "X"), Look("#a29bdb", (0, (1, 2)), "p"),
         Look("#3b4a1f", (0, (8, 2, 2, 2)), "v"))


def looks(names: Iterable[str]) -> dict[str, Look]:
    """{name: its look}; names: of runs, or of their methods in words.

    A method looks the same in every picture, and no other name has its colour. Other names get what is left, each the
    place that its checksum gives it, or the next one that is free: the same names look the same again.
    """
    found = {name: LOOKS[NAMES.get(name, name)] for name in names if NAMES.get(name, name) in LOOKS}
    taken: list[int] = []
    for name in sorted({*names} - found.keys()):
        place = zlib.crc32(name.encode(errors="surrogatepass")) % len(SPARE)
        while taken.count(place) > len(taken) // len(SPARE):
            place = (place + 1) % len(SPARE)
        marker = SPARE[(place + taken.count(place)) % len(SPARE)].marker
        found[name] = SPARE[place]._replace(marker=marker)
        taken.append(place)
    return found


# BTCV's organs 1 to 13, the same in every picture: warm left, cold right, vessels red and blue
ORGAN_COLOURS = ("#8e44ad", "#f1c40f", "#e67e22", "#27ae60", "#f5b7b1", "#a0522d", "#76d7c4", "#e74c3c", "#3498db",
                 "#1a5fb4", "#d4e157", "#ff5fb0", "#00e5ff")


@functools.cache
def organ_colours() -> np.ndarray:
    """(255, 3) in [0, 1], a colour a label: black, ORGAN_COLOURS, then always the one least like those before."""
    chosen = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in ("#000000", *ORGAN_COLOURS)]
    hues = np.arange(48) / 48  # no grey and nothing dark, which CT is
    candidates = np.array([colorsys.hsv_to_rgb(h, s, v) for h in hues for s in (0.45, 0.7, 1) for v in (0.55, 0.75, 1)])
    eye = np.sqrt([2, 4, 3])  # green differs most
    apart = np.min([np.linalg.norm((candidates - c) * eye, axis=1) for c in chosen], axis=0)
    while len(chosen) < 255:
        chosen.append(candidates[apart.argmax()])
        apart = np.minimum(apart, np.linalg.norm((candidates - chosen[-1]) * eye, axis=1))
    return np.array(chosen)
