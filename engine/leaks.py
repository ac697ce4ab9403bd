"""Has a validation volume been seen in training: by the pre-training, or by the head under another id?

A pre-training keeps what it saw with its run, as checksums of slices (ct/repeats.py): 12 bytes a slice, 2.6 MB for the
paper's 215,325. They are compared with those of the validation volumes, whatever window, size or file either had.
Runs of older commits know the checksums of whole prepared volumes only, which are equal where slices were stored as
they are: square, of the store's size, in the same window.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path

from ct import repeats, stores
from ct.volumes import BadInput
from engine import runs
from engine.origin import BUILT_IN, folder_of

SEEN = "seen.json"  # in a pre-training's folder: {"slices": {id: ct.repeats.slice_sums}, "files": {id: checksum}}
SHOWN = 3  # volumes that a line names
LEAKS = ("pretraining", "training")


def keep(folder: Path, store, init: str, out: Path) -> None:
    """Write down in a pre-training's folder what it sees, with what its start `init` saw."""
    seen = {"slices": {v["id"]: v["slice_sums"] for v in store.volumes if v.get("slice_sums")},
            "files": store.contents()}
    for kind, before in (seen_by(init, out) or {}).items():
        known = set(seen[kind].values())
        seen[kind] |= {f"{name} of {init}": sums for name, sums in before.items() if sums not in known}
    runs.write_text(folder / SEEN, json.dumps(seen) + "\n")


def seen_by(backbone: str, out: Path) -> dict[str, dict[str, str]] | None:
    """What a backbone, by its name as `backbones.resolve` gives it, was pre-trained on, as SEEN holds it.

    Empty for ImageNet's and random weights; None where it is not known: of a file that is no run's backbone.pth.
    """
    if backbone in BUILT_IN:
        return {"slices": {}, "files": {}}
    folder = folder_of(backbone, out)
    try:
        return folder and _seen_in(folder)
    except BadInput:
        if folder == out / backbone:
            raise
        return None  # beside a file: it tells nothing


def _seen_in(folder: Path) -> dict[str, dict[str, str]] | None:
    if (folder / SEEN).exists():
        return runs.read_json(folder / SEEN, "slices", "files", remedy="give that pre-training's command again")
    if (folder / "config.json").exists():
        return {"slices": {}, "files": runs.read_config(folder).get("store", {})}
    return None


def find(store, training: Collection[str], backbone: str, out: Path) -> dict:
    """Which volumes of a store's validation set were seen before: what result.json has as `leaks`.

    validation: their number; pretraining and training: {id: the volume there, and how many slices are in it}, the first
    None where it is not known; sources: what of AbdomenCT-1K the volumes are by their names, if it was pre-trained on.
    """
    cases, seen = store.task.cases("val"), seen_by(backbone, out)
    own = {v["id"]: v for v in store.volumes}
    sums = {i: v.get("slice_sums", "") for i, v in own.items()}
    files = {i: v["checksums"][stores.array(store.folder, i).name] for i, v in own.items()}

    def among(slices: dict[str, str], whole: dict[str, str]) -> dict[str, str]:
        owner = {one: name for name, one in whole.items()}
        found = {case: f"{owner[files[case]]}, the whole volume" for case in cases if files[case] in owner}
        shared = repeats.shared(slices, {case: sums[case] for case in cases})
        return found | {case: f"{name}, {some} of {of} slices" for case, (name, some, of) in shared.items()}

    found = {"validation": len(cases), "pretraining": seen and among(seen["slices"], seen["files"]),
             "training": among({i: sums[i] for i in training}, {i: files[i] for i in training})}
    comparable = seen and seen["slices"] and all(sums[case] for case in cases)
    if not found["pretraining"] and not comparable and backbone not in BUILT_IN:
        found["pretraining"] = None
    if seen and sum(bool(re.match(r"Case_\d{5}", name)) for name in seen["files"]) * 2 > len(seen["files"]):
        found["sources"] = repeats.in_abdomenct(Path(store.data), own)
    return found


def lines(found: dict, backbone: str) -> list[str]:
    """`find` of a backbone and all volumes that its heads are trained on, as a command says it before it starts."""
    def named(kind: str) -> str:
        volumes = [f"{case} is {other}" for case, other in found[kind].items()]
        return "; ".join(volumes[:SHOWN]) + f" ... {len(volumes)} in all" * (len(volumes) > SHOWN)

    said, of = [], f"of the {found['validation']} validation volumes"
    if found["training"]:
        said.append(f"{len(found['training'])} {of} are among those to train on, under another id: "
                    f"{named('training')}; results are marked")
    if found["pretraining"]:
        said.append(f"{backbone}: its pre-training saw {len(found['pretraining'])} {of}: {named('pretraining')}; "
                    "results are marked")
    elif found.get("sources"):
        said.append(f"{backbone}: pre-trained on AbdomenCT-1K, which by its sources holds {found['sources']}, though "
                    "no slice was found in both; results are marked")
    elif found["pretraining"] is None:
        said.append(f"{backbone}: the slices of its pre-training are not known; whether the validation volumes are "
                    "among them cannot be said")
    return said


def marks(result: dict) -> list[str]:
    """What stands beside a number whose validation volumes were seen before; nothing of results of older commits."""
    found = result.get("leaks") or {}
    words = {"pretraining": "its pre-training saw", "training": "its head was trained on"}
    said = [f"**{words[kind]} {len(found[kind])} of {found['validation']} validation volumes**"
            for kind in LEAKS if found.get(kind)]
    if found.get("sources") and not found["pretraining"]:
        said.append(f"**pre-trained on AbdomenCT-1K, which by its sources holds {found['sources']}**")
    return said
