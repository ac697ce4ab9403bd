"""From a name to a network, and back to a file under torchvision's names."""

import json
from dataclasses import dataclass
from pathlib import Path

import torchvision
from torch import Tensor, nn

from ct.volumes import BadInput
from engine.processes import INIT, seed_torch
from engine.runs import load
from segment import checksum
from whitening import fold, to_batch_norm, whiten_last_norm

IMAGENET = "IMAGENET1K_V1"  # torchvision's first weights, the ones mmselfsup and mmsegmentation start from


def architecture(arch: str) -> nn.Module:
    """A torchvision ResNet by name, randomly initialised. Raises BadInput for an unknown name."""
    if not arch.startswith(("resnet", "wide_resnet", "resnext")) or arch not in torchvision.models.list_models():
        raise BadInput(f"--arch {arch}: no such ResNet in torchvision; try resnet50 or resnet18")
    return torchvision.models.get_model(arch, weights=None)


def resolve(name: str, out: Path, phantom: bool) -> str:
    """What a name of a backbone stands for: a run of `out` (`moco` also for `phantom-moco`, on the phantom) or the
    folder of one, imagenet, random or a file. Raises BadInput for none of them.
    """
    for run in (name, "phantom-" * phantom + name):
        if (out / run / "checkpoint.pt").exists():
            return run
    if (Path(name) / "checkpoint.pt").exists():
        return str(Path(name).resolve())
    if name in ("imagenet", "random") or Path(name).is_file():
        return name
    raise BadInput(f"{name}: no such run in {out} and no such file; pre-train it first (torchrun train_ssl.py --local "
                   "--zca) or name another")


def build_backbone(init: str, arch: str) -> nn.Module:
    """A ResNet with `init` imagenet | random | FILE. Raises BadInput when a file fits not or a download fails."""
    backbone = architecture(arch)
    if init == "random":
        return backbone
    if init == "imagenet":
        try:
            weights = torchvision.models.get_model_weights(arch)[IMAGENET].get_state_dict(progress=False)
        except Exception as e:  # URLError, HTTPError, timeouts, a hash that differs, a read-only cache
            raise BadInput(f"ImageNet weights of {arch} could not be downloaded ({type(e).__name__}); "
                           "use --init random, or --init FILE with weights downloaded elsewhere") from None
        backbone.load_state_dict(weights)
        return backbone
    return load_backbone(backbone, Path(init), arch)


def load_backbone(backbone: nn.Module, path: Path, arch: str) -> nn.Module:
    """Fill a ResNet from a file of torchvision-named weights (bare, or under state_dict or a known prefix)."""
    weights = load(path)
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    weights = {k: v for k, v in weights.items() if isinstance(v, Tensor)}
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
        raise BadInput(f"{path}: not a backbone of architecture {arch} ({why}); give the --arch it was trained with")
    backbone.load_state_dict({k: weights[k] for k in own}, strict=False)
    print(f"{path}: all {len(own)} weights of {arch} matched")
    return backbone


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
    if not (folder / "checkpoint.pt").exists():
        net = build_backbone(name, arch)
    else:
        if (json.loads((folder / "config.json").read_text())["data"] == "phantom") != phantom:
            raise BadInput(f"{folder}: was pre-trained on {'real CT' if phantom else 'the phantom'}; a backbone of the "
                           "phantom is measured on the phantom only, and no other there")
        state = load(folder / "checkpoint.pt")
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
