"""From a name to a network, and back to a file under torchvision's names."""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from ct.command import printable
from ct.volumes import BadInput
from engine.processes import INIT, seed_torch
from engine.runs import load, read_config
from segment import checksum
from whitening import fold, to_batch_norm, whiten_last_norm

CHECKPOINT = "checkpoint.pt"  # what makes a folder a run
IMAGENET = "IMAGENET1K_V1"  # torchvision's first weights; mmsegmentation's recipe has others (resnet50_v1c: deep stem)


def architecture(arch: str) -> nn.Module:
    """A torchvision ResNet by name, randomly initialised. Raises BadInput for an unknown name."""
    if not arch.startswith(("resnet", "wide_resnet", "resnext")) or arch not in torchvision.models.list_models():
        raise BadInput(f"--arch {arch}: no such ResNet in torchvision; try resnet50 or resnet18")
    return torchvision.models.get_model(arch, weights=None)


def resolve(name: str, out: Path, phantom: bool) -> str:
    """What a name of a backbone stands for, the same in all commands: a run of `out` (on the phantom `moco` also for
    `phantom-moco`), the folder of a run or its checkpoint.pt, imagenet, random or a file. Raises BadInput for no such.
    """
    for run in (name, "phantom-" * phantom + name):
        if (out / run / CHECKPOINT).exists():
            return _of_out(out / run, out)
    path = Path(name)
    folder = path.parent if path.name == CHECKPOINT and (path.parent / "config.json").exists() else path
    if (folder / CHECKPOINT).exists():
        return _of_out(folder, out)
    if name in ("imagenet", "random") or path.is_file():
        return name
    raise BadInput(f"{name}: no such run in {out} and no such file; pre-train it first (torchrun train_ssl.py --local "
                   "--zca) or name another")


def _of_out(folder: Path, out: Path) -> str:
    """The folder of a run, by its name alone where it lies in `out`: one run has one name, however it was given."""
    folder = Path(os.path.abspath(folder))
    return folder.name if folder.parent == Path(os.path.abspath(out)) else str(folder)


def pretrained(folders: Iterable[Path]) -> dict[Path, dict]:
    """{folder: config} of those in which a pre-training has left a checkpoint.

    A checkpoint without a readable config.json is told on stderr and left out: it is no reason to leave out others.
    """
    found = {}
    for folder in folders:
        if (folder / CHECKPOINT).exists():
            try:
                found[folder] = read_config(folder, "arch", "data", "init")
            except BadInput as e:
                print(f"left out: {printable(e)}", file=sys.stderr)
    return found


def build_backbone(init: str, arch: str) -> nn.Module:
    """A ResNet with `init` imagenet | random | FILE. Raises BadInput when a file fits not or a download fails."""
    backbone = architecture(arch)
    if init == "random":
        return backbone
    if init == "imagenet":
        backbone.load_state_dict(imagenet_weights(arch))
        return backbone
    return load_backbone(backbone, Path(init), arch)


def imagenet_weights(arch: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, from torch's cache or downloaded into it. Raises BadInput.

    Their name holds the start of their SHA-256. Here it is compared whenever they are read: torchvision trusts any file
    of that name in the cache, and runs the code in it.
    """
    url = _imagenet_url(arch)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), _hash_in(url), progress=False)
        except Exception as e:  # URLError, HTTPError, timeouts, a hash that differs, a read-only cache
            raise BadInput(f"ImageNet weights of {arch} could not be downloaded ({type(e).__name__}); fetch {url} "
                           f"elsewhere and put it at {path}, or start from random, a run or a file") from None
    if not _is_of(path, url):
        raise BadInput(f"{path}: is damaged, or other weights (another SHA-256): delete it, and it is fetched again")
    return load(path)


def _imagenet_url(arch: str) -> str:
    return torchvision.models.get_model_weights(arch)[IMAGENET].url


def _hash_in(url: str) -> str:
    return url.rpartition("-")[2].removesuffix(".pth")


def _is_of(path: Path, url: str) -> bool:
    """Whether a file's SHA-256 begins as a URL of torchvision's says."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest().startswith(_hash_in(url))


def load_backbone(backbone: nn.Module, path: Path, arch: str) -> nn.Module:
    """Fill a ResNet from a file of torchvision-named weights (bare, or under state_dict or a known prefix)."""
    held = load(path)
    if isinstance(held, dict) and {"model", "arch", "zca"} <= held.keys():
        raise BadInput(f"{path}: the checkpoint of a run; name that run's folder (its config.json must be in it), or "
                       "give its backbone.pth")
    weights = held.get("state_dict", held) if isinstance(held, dict) else {}
    weights = {k: v for k, v in weights.items() if isinstance(v, Tensor)} if isinstance(weights, dict) else {}
    for prefix in ("module.encoder_q.", "backbone.", "module."):  # MoCo's release, mmselfsup, DDP
        if any(k.startswith(prefix + "conv1") for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
    missing = [k for k in own if k not in weights]
    other = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    extra = [k for k in weights if k not in own and not k.startswith("fc.")]
    if missing or other or extra:
        why = (f"{len(missing)} of {len(own)} weights missing, {len(other)} of another shape, {len(extra)} unknown, "
               f"first {(missing + other + extra)[0]}")
        raise BadInput(f"{path}: not a backbone of architecture {arch} ({why}); {_remedy(held, weights, own)}")
    backbone.load_state_dict({k: weights[k] for k in own}, strict=False)
    print(f"{path}: all {len(own)} weights of {arch} matched")
    return backbone


def _remedy(held: object, weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What to do about weights that do not fit: SwAV's heads, DINO's two networks, lightly's numbered layers."""
    mark = "layer4.0.conv1.weight"  # every ResNet has it
    names = list(_names(held))
    begins = sorted({k[: -len(mark)] for k in names if k.endswith(mark)} - {""})
    if begins and not any(k in own for k in weights):
        return f"a ResNet is there under {' and '.join(map(repr, begins))}: save one without that prefix"
    tops = {k.split(".")[0] for k in own}
    if foreign := sorted({k.split(".")[0] for k in weights or names} - tops - {"fc"}):
        told = ", ".join(repr(f + ".") for f in foreign[:5])
        return (f"its names begin with {told}, as none of torchvision's ResNet does: save the ResNet's weights alone, "
                "under torchvision's names")
    return "give the --arch it was trained with"


def _names(held: object, prefix: str = "") -> Iterator[str]:
    """The full names of all tensors in nested dicts."""
    for key, value in held.items() if isinstance(held, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}"
        else:
            yield from _names(value, f"{prefix}{key}.")


@dataclass(frozen=True)
class Backbone:
    """A network with what is known of its pre-training: what stands beside every number measured on it.

    pretraining: arch, checksum of the weights and, of a run, its step and horizon, the gap of its last look (see
    train_ssl.py), view_px and slice_px; those are None for a file, for ImageNet's and for random weights.
    """

    net: nn.Module
    name: str
    pretraining: dict

    @property
    def unfinished(self) -> str:
        """`its pre-training is at step 3 of 15` for a run that has not reached its horizon, else nothing."""
        step, horizon = self.pretraining["step"], self.pretraining["horizon"]
        return f"its pre-training is at step {step:,} of {horizon:,}" if horizon and step < horizon else ""


def open_backbone(name: str, out: Path, arch: str, seed: int, whitening: str, phantom: bool) -> Backbone:
    """A backbone by name, see `resolve`: a run of `out`, imagenet, random or a file (these of architecture `arch`).

    A run is read from its checkpoint; whitening: 'fold' it, or 'bn' for a plain BN in its place. Raises BadInput
    when there is no such thing, or where a run on the phantom would meet real CT, or the reverse.
    """
    seed_torch(seed, INIT)
    name = resolve(name, out, phantom)
    folder, state = out / name, {}
    if not (folder / CHECKPOINT).exists():
        net = build_backbone(name, arch)
        if Path(name).is_file() and _is_of(Path(name), _imagenet_url(arch)):
            name = "imagenet"  # by its content: the same row of the tables
    else:
        if (read_config(folder, "data")["data"] == "phantom") != phantom:
            raise BadInput(f"{folder}: was pre-trained on {'real CT' if phantom else 'the phantom'}; a backbone of the "
                           "phantom is measured on the phantom only, and no other there")
        state = load(folder / CHECKPOINT)
        if not (isinstance(state, dict) and {"arch", "zca", "model"} <= state.keys()):
            raise BadInput(f"{folder / CHECKPOINT}: no checkpoint of a pre-training (train_ssl.py)")
        arch, net = state["arch"], architecture(state["arch"])
        if state["zca"]:
            whiten_last_norm(net, group_size=state["zca"][0], iterations=state["zca"][1])
        prefix = "encoder_q.backbone."
        weights = {k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
        net.load_state_dict(weights | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
        net = fold(net) if whitening == "fold" else to_batch_norm(net)
    known = {key: state.get(key) for key in ("step", "horizon", "gap", "view_px", "slice_px")}
    return Backbone(net, title_of(name), {"arch": arch, "checksum": checksum(net), **known})


def title_of(name: str) -> str:
    """The short name of a resolved backbone, for folders and tables: a run's own, a file's without its suffix."""
    return Path(name).stem if Path(name).is_file() else Path(name).name


def export(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's weights under torchvision's names, whitening folded, without fc: what backbone.pth holds."""
    weights = fold(backbone).state_dict()
    return {k: v.detach().cpu().contiguous().clone() for k, v in weights.items() if not k.startswith("fc.")}
