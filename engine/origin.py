"""What a backbone and a result were made with: what may be averaged, and what is unlike the paper."""

import hashlib
import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ct.command import announce, printable
from ct.phantom import UNLABELLED_PATIENTS
from ct.prepare import WINDOW
from ct.volumes import BadInput
from engine import recipes, runs
from engine.seeds import seed_suffix
from views.resize import IMAGENET_MEAN, IMAGENET_STD

CHECKPOINT, EXPORTED = "checkpoint.pt", "backbone.pth"  # what makes a folder a run; what a run leaves for others
BUILT_IN = ("imagenet", "random")
NORMALISATION = [list(IMAGENET_MEAN), list(IMAGENET_STD)]  # of the HU window's [0, 1], in a run's config
ABDOMEN = 1062  # volumes of AbdomenCT-1K: a data set that counts another number is not the paper's
UNTOLD = "a file, which does not tell the HU window and normalisation of its pre-training"

# What one folder of a segmentation run stands for: a later result of it, after --overwrite or a kill, is the result.
IDENTITY = ("data", "slices", "labels", "backbone", "split", "protocol", "draw", "seed")
# Of a result, what may differ within a cell: all that a draw and a seed change, what was measured, where and when.
FREE = {"backbone", "draw", "seed", "cases", "split_sha256", "validation_sha256", "store", "pretraining", "mDS",
        "mDice_with_background", "organs", "backbone_before", "backbone_after", "amp", "processes", "hardware",
        "commit", "date", "wall_s", "leaks", "uncounted"}
PLACE = {"data", "slices", "labels", "split", "protocol"}  # in which table, line and column it stands
MEASURED = ("per_volume_", "hd95_")  # begin the names of the rest that was measured
IDLE = {"temperature_local": "local", "lambda_local": "local", "patches": "local", "zca_group": "zca",
        "zca_iterations": "zca"}  # {setting: the flag without which it does nothing}
METHOD = {"local", "zca", "geometric", "every", "recipe"}  # settings that the row's name tells
NOT_SAID = METHOD | {"arch", "data", "volumes", "slices", "store", "step", "horizon"}  # of a pre-training, as a setting
SAID = {"arch": "{}", "image_size": "views of {} px", "size": "slices of {} px", "batch_size": "batch {}",
        "bn_group": "groups of {}", "epochs": "{} epochs", "iterations": "{} iterations", "crop_size": "crops of {} px",
        "flip": "mirrored crops: {}", "lr": "learning rate {}", "ema": "EMA {}", "window": "HU {}"}


# ------------------------------------------------------------------------------------------------------- of weights


def folder_of(name: str, out: Path) -> Path | None:
    """The run's folder behind a resolved name, or the one in which a backbone.pth lies; None for all others."""
    if (out / name / CHECKPOINT).exists():
        return out / name
    return Path(name).parent if Path(name).name == EXPORTED else None


def made_with(name: str, out: Path) -> dict | None:
    """All that the weights behind a resolved name were made with: the run's config, of its start the same.

    Of backbone.pth, what the config.json beside it says; None where nothing tells it: any other file, ImageNet's and
    random weights. Checksums of slices are one here, and of a path only its last name says what it was.
    """
    folder = folder_of(name, out)
    if folder is None or not (folder / "config.json").exists():
        return None
    try:
        config = runs.read_config(folder, "data", "arch")
    except BadInput:
        if folder == out / name:
            raise
        return None  # beside a file: it tells nothing
    if isinstance(config.get("store"), dict):
        contents = json.dumps(config["store"], sort_keys=True).encode()
        config["store"] = hashlib.blake2b(contents, digest_size=8).hexdigest()
    if "init" in config:
        config["init"] = Path(config["init"]).name
    return config


def other_input(name: str, out: Path, window: Sequence[float]) -> str:
    """What the weights behind a resolved name saw otherwise than slices of this HU window, normalised as here.

    That it is not known, of a file that does not tell it; nothing where it was the same, or no CT at all.
    """
    config = made_with(name, out)
    if config is None:
        return "" if name in BUILT_IN else UNTOLD
    low, high = window
    other = window_of(config, window)
    found = [f"pre-trained with --window {other}; these slices have another, {low:g} {high:g}"] if other else []
    if config.get("normalisation", NORMALISATION) != NORMALISATION:
        found.append(f"pre-trained with another normalisation, {config['normalisation']}")
    return "; ".join(found)


def commit() -> str:
    """The commit of the code that runs, with + where the tree has changes; 'unknown' outside a clone."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*run, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.strip() else "")


def announce_phantom(store) -> None:
    """Loudly, before anything is run on generated volumes; where they, and their slices in a datasets.Store, lie."""
    announce(f"THE PHANTOM: the volumes in {store.data} are generated, and the settings are small.\nNumbers on it say "
             "nothing about patients and are no AbdomenCT-1K or BTCV results; --data takes your own CT.\nThe prepared "
             f"slices are kept in {store.folder}.")


def announce_input(name: str, out: Path, window: Sequence[float]) -> None:
    """Say loudly, before the work, that a backbone meets grey values that mean something else than those it knows."""
    unlike = printable(f"{name}: {other_input(name, out, window)}")
    if unlike.endswith(UNTOLD):
        print(f"note: {unlike}; here {window[0]:g} to {window[1]:g} HU are [0, 1], then ImageNet's normalisation")
    elif not unlike.endswith(": "):
        announce(f"WARNING: {unlike}.\nA grey value means another tissue to it. Give its --window, unless you mean "
                 "it; the tables will say so.")


def window_of(config: dict, window: Sequence[float]) -> str:
    """The HU window of a pre-training as the values of --window, where it is another than this one; else nothing."""
    own = config.get("window", window)
    return f"{own[0]:g} {own[1]:g}" if tuple(own) != tuple(window) else ""


# ------------------------------------------------------------------------------------------------------- of results


def read(path: Path, **needed: type | tuple[type, ...]) -> list[dict]:
    """The results in a results.jsonl, oldest first; needed: {key: type of its value}.

    Lines that are no results are reported on stderr and left out. Raises BadInput where no other is there.
    """
    found, odd = [], []
    for r in runs.read_log(path):
        lacking = [key for key, kind in needed.items() if not isinstance(r.get(key), kind)]
        (odd if lacking else found).append(r)
        if lacking and len(odd) == 1:
            first = printable(f"{json.dumps(r)[:60]} has no {lacking[0]}")
    if odd:
        line = f"{path}: lines that are no results of train_seg.py: {len(odd)} ({first}); delete them"
        if not found:
            raise BadInput(line)
        print(f"left out: {line}", file=sys.stderr)
    return found


def newest(results: Sequence[dict]) -> list[dict]:
    """Of results, oldest first, the newest of each run: it was measured again, or written twice around a kill."""
    return [*{json.dumps([r.get(key) for key in IDENTITY]): r for r in results}.values()]


def known(result: dict) -> dict:
    """What a result tells of the pre-training of its backbone."""
    return result.get("pretraining") or {}


def is_file(result: dict) -> bool:
    """Whether its backbone is a file of weights: neither a run, as far as is told, nor ImageNet's or random ones."""
    return known(result).get("step", 0) is None and result["backbone"] not in BUILT_IN


def backbone_key(result: dict) -> dict:
    """All of a backbone that results of one row must have in common, {setting: value}: whatever its config and that of
    its start name, but for what a seed changes.
    """
    told = {k: v for k, v in known(result).items() if k not in ("checksum", "gap", "config")}
    if is_file(result):
        told["checksum"] = known(result)["checksum"]
    return dict(runs.flat(told | {"config": _without_seed(known(result).get("config") or {})}, "pretraining."))


def _without_seed(config: dict) -> dict:
    """A run's settings without its seed, and its start's, which a run of another seed has of that seed."""
    own = {k: v for k, v in config.items() if k != "seed" and (k not in IDLE or config.get(IDLE[k]))}
    if "start" in own:
        own |= {"start": _without_seed(own["start"])}
        own["init"] = own["init"].removesuffix(seed_suffix(config.get("seed", 0)))
    if "start" in own or own.get("init") == "random":
        own.pop("init_checksum", None)
    return (runs.SINCE if own else {}) | own


def head_key(result: dict) -> dict:
    """All of the segmentation that results of one cell must have in common, {setting: value}: whatever the result
    names, but for FREE and what was measured.
    """
    own = runs.SINCE_SEGMENTATION | result
    return dict(runs.flat({k: v for k, v in own.items() if k not in FREE and not k.startswith(MEASURED)}))


def contents(result: dict) -> dict:
    """{volume or draw: what it held}: results of one cell may have others, but none that differ."""
    return result.get("store", {}) | {f"draw {result['draw']}": result.get("split_sha256", "")}


def validation(result: dict) -> str:
    """A checksum of what a result was validated on: the cases, their labels and spacing; of old ones the list's."""
    held = {case: what.split()[1:] for case, what in result.get("store", {}).items() if case not in result["cases"]}
    if not held:
        return result.get("validation_sha256", "")
    return hashlib.blake2b(json.dumps(held, sort_keys=True).encode(), digest_size=4).hexdigest()


def of_this(result: dict) -> str:
    """The row that the pre-training's settings make it, whatever its name; nothing where they are not told."""
    config = known(result).get("config")
    return recipes.row(Namespace(**runs.SINCE | config)) if config and {*runs.SINCE, *config} >= METHOD else ""


def bare(name: str, phantom: bool) -> tuple[str, str]:
    """(a run's name without the phantom's prefix and its seed, the seed in it, "" for none)."""
    run, seed = re.fullmatch(r"(.*?)(?:-seed(\d+))?", name, re.DOTALL).groups()
    return run.removeprefix("phantom-") if phantom else run, seed or ""


def unlike_pretraining(result: dict) -> dict[str, str]:
    """{setting: in words} of all that is not as the paper's pre-training (on the phantom its preset) has it; what is
    not told, too. The architecture is the segmentation's.
    """
    config, phantom = known(result).get("config"), result["data"] == "phantom"
    if result["backbone"] in BUILT_IN:
        return {}
    if not of_this(result):
        return {"config": UNTOLD if is_file(result) and not config else "settings of the pre-training not recorded"}
    found = _unlike(config, phantom, bare(result["backbone"], phantom)[0] == "start")
    if config.get("volumes") != (UNLABELLED_PATIENTS if phantom else ABDOMEN):
        found["data"] = f"on {config['data']} of {_shown(config.get('volumes', '?'))} volumes"
    return found


def _unlike(config: dict, phantom: bool, start: bool) -> dict[str, str]:
    """`unlike_pretraining` of a config, but for the data; start: of the phantom's start."""
    config, paper = runs.SINCE | config, recipes.PHANTOM if phantom else recipes.PAPER
    if config["recipe"] == "author":
        paper = recipes.author(Namespace(batch_size=config.get("batch_size"), zca=config["zca"]), paper, phantom)
    paper = paper | (recipes.START if start and phantom else {}) | {"normalisation": NORMALISATION}
    if not paper["lr"] and config.get("lr") == recipes.LR * config.get("batch_size", 0) / 256:
        paper["lr"] = config["lr"]  # it follows the batch
    paper["lr"] = paper["lr"] or recipes.LR
    if not paper["zca_group"]:  # all channels
        paper["zca_group"] = 512 if config["arch"] in recipes.BASIC else 2048
    silent = NOT_SAID | {"seed", "init", "init_checksum", "start"} | {k for k, flag in IDLE.items() if not config[flag]}
    found = compare(config, {k: v for k, v in paper.items() if k not in ("steps", "overwrite")}, silent)
    if "normalisation" not in config:
        del found["normalisation"]  # there never was another
    return found | _unlike_start(config, phantom, start)


def _unlike_start(config: dict, phantom: bool, start: bool) -> dict[str, str]:
    """The start of a pre-training in words, where it is not the paper's: ImageNet's weights, the phantom's start."""
    own = config.get("init", "?")
    if own == ("random" if start and phantom else "imagenet"):
        return {}
    if own == "random":
        return {"init": "from random weights"}
    begun, name = config.get("start"), f"phantom-start{seed_suffix(config.get('seed', 0))}"
    if phantom and own == name:
        if not begun:
            return {"init": f"from {own}, whose settings are not recorded"}
        other = [*_unlike(begun, phantom, True).values()]
        other += [f"at step {begun['step']} of {begun['horizon']}"] * (begun["step"] < begun["horizon"])
        return {"init": f"from another start ({', '.join(other)})"} if other else {}
    name = "ImageNet weights" if own == "imagenet" else own.removesuffix(seed_suffix(config.get("seed", 0)))
    other = window_of(begun, config["window"]).replace(" ", " to ") if begun and "window" in config else ""
    return {"init": f"from {name}" + f", which saw HU {other}" * bool(other)}


def unlike_segmentation(result: dict) -> dict[str, str]:
    """{setting: in words} of all that is not as the paper's segmentation (on the phantom its preset) has it."""
    paper = recipes.SEGMENTATION
    if result["data"] == "phantom":
        paper = recipes.SEGMENTATION_PHANTOM | recipes.PHANTOM_RECIPES.get(result["protocol"], {})
    author = (known(result).get("config") or {}).get("recipe") == "author"
    paper = paper | {"whitening": "fold" if result["protocol"] == "linear-frozen" else "bn",
                     "window": recipes.AUTHOR["window"] if author else WINDOW}
    own = {k: v for k, v in (runs.SINCE_SEGMENTATION | result).items()
           if k not in FREE | PLACE and not k.startswith(MEASURED)}
    return compare(own, paper | runs.SINCE_SEGMENTATION, set())


def compare(own: dict, paper: dict, silent: set[str]) -> dict[str, str]:
    """{setting: in words} where settings differ: `batch 8 instead of 256`; those that one of the two lacks, too."""
    found = {}
    for key in [k for k in (*own, *(k for k in paper if k not in own)) if k not in silent]:
        words = SAID.get(key, key.replace("_", " ") + " {}")
        if key not in own:
            found[key] = words.format("unknown")
        elif key not in paper:
            found[key] = words.format(_shown(own[key]))
        elif own[key] != paper[key] and not (key == "window" and tuple(own[key]) == tuple(paper[key])):
            found[key] = f"{words.format(_shown(own[key]))} instead of {_shown(paper[key])}"
    return found


def _shown(value: object) -> str:
    if isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[0], list):
        return f"{value[0]:g} to {value[1]:g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
