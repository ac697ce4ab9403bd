"""From a name to a network, and back to a file under torchvision's names."""

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from ct.command import printable
from ct.volumes import BadInput
from engine.origin import BUILT_IN, CHECKPOINT, made_with, window_of
from engine.recipes import BASIC
from engine.runs import load, read_config, tensors_in
from engine.seeds import INIT, seed_torch
from metrics import LEAST_GAP
from whitening import fold, to_batch_norm, whiten_last_norm

IMAGENET = "IMAGENET1K_V1"  # torchvision's first weights; mmsegmentation's recipe has others (resnet50_v1c: deep stem)
UNFIT = {*'\\/:*?"<>|`'}  # of a name: what cuts tables of Markdown, or what some file systems refuse
ARCHITECTURES = [m for m in torchvision.models.list_models() if m.startswith(("resnet", "resnext", "wide_resnet"))]
# A file's ResNet stands under a chain of these. What stands under any other word is left out: MoCo's encoder_k,
# lightly's backbone_momentum, solo-learn's momentum_backbone are not what their projects measure.
WORDS = {"state_dict", "model", "teacher", "student", "backbone", "module", "encoder", "encoder_q", "resnet",
         "_orig_mod"}  # torch.compile's
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
NUMBERED = dict(zip("014567", CHILDREN, strict=True))  # as nn.Sequential(*resnet.children()); 2 and 3: ReLU, max-pool


def architecture(arch: str) -> nn.Module:
    """A torchvision ResNet by name, randomly initialised. Raises BadInput for an unknown name.

    A bottleneck's last BN starts at zero (Goyal et al. 2017, section 5.1). With torchvision's default of one, features
    of a random ResNet-50 hardly differ from slice to slice, and MoCo v2 does not start from them (docs/training.md).
    """
    if arch not in ARCHITECTURES:
        raise BadInput(f"--arch {arch}: no such ResNet in torchvision; try resnet50 or resnet18")
    return torchvision.models.get_model(arch, weights=None, zero_init_residual=arch not in BASIC)


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
    if name in BUILT_IN or path.is_file():
        return name
    raise BadInput(f"{name}: no such run in {out} and no such file; pre-train it first (python train_ssl.py --local "
                   "--zca) or name another")


def _of_out(folder: Path, out: Path) -> str:
    """The folder of a run, by its name alone where it lies in `out`: one run has one name, however it was given."""
    folder = Path(os.path.abspath(folder))
    return folder.name if folder.parent == Path(os.path.abspath(out)) else str(folder)


def pretrained(folders: Iterable[Path], window: Sequence[float]) -> dict[Path, dict]:
    """{folder: config} of those in which a pre-training has left a checkpoint.

    Two are reported on stderr and left out, which is no reason to leave out others: a checkpoint without a readable
    config.json, and a run on slices of another HU window than this one, whose grey values mean something else.
    """
    found = {}
    for folder in folders:
        if (folder / CHECKPOINT).exists():
            try:
                config = read_config(folder, "arch", "data", "init")
                if other := window_of(config, window):
                    raise BadInput(f"{folder.name}: pre-trained with --window {other}; give it to measure such runs")
                found[folder] = config
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
    """Fill a torchvision ResNet from a file that holds one, and say what was stripped of its names and left out.

    It may stand under any chain of WORDS, by torchvision's names or numbered as its children. What stands beside it is
    left out: its fc, projectors, a queue, other networks. Of a teacher and a student the teacher is taken. The fc,
    which nothing here uses, becomes zeros. Raises BadInput where the file cannot be read or holds no whole ResNet of
    `arch`, or several that differ.
    """
    held = load(path)
    if isinstance(held, dict) and {"model", "arch", "zca"} <= held.keys():
        raise BadInput(f"{path}: the checkpoint of a run; name that run's folder (its config.json must be in it), or "
                       "give its backbone.pth")
    tensors, own = dict(tensors_in(held) if isinstance(held, dict) else ()), _without_fc(backbone)
    names = _resnets(tensors)
    found = {prefix: {k: tensors[name] for k, name in named.items()} for prefix, named in names.items()}
    fitting = [prefix for prefix, weights in found.items() if not _misfit(weights, own)]
    if not fitting:
        nearest = max(found.values(), key=lambda weights: len(own.keys() & weights), default={})
        raise BadInput(f"{path}: not a backbone of architecture {arch} ({_misfit(nearest, own)}); "
                       f"{_remedy(tensors, found, nearest)}")
    teacher, student = ([prefix for prefix in fitting if role in prefix.split(".")] for role in ("teacher", "student"))
    chosen, *others = [prefix for prefix in fitting if not (teacher and prefix in student)]
    weights = found[chosen]
    if any(not torch.equal(found[other].get(k, v), v) for other in others for k, v in weights.items()):
        raise BadInput(f"{path}: holds several ResNets, under {_listed([chosen, *others])}: save one of them alone")
    backbone.load_state_dict(weights, strict=False)
    for p in backbone.fc.parameters():  # drawn at random, it would give one file another checksum with every seed
        nn.init.zeros_(p)
    rule = " (the teacher, not the student)" * bool(teacher and student)
    left = {_branch(name, chosen) for name in tensors.keys() - names[chosen].values()}
    print(printable(f"{path}: all {len(weights)} weights of {arch} matched" + f" under '{chosen}'{rule}" * bool(chosen)
                    + f"; left out: {_listed(sorted(left))}" * bool(left)))
    return backbone


def _without_fc(resnet: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in resnet.state_dict().items() if not k.startswith("fc.")}


@functools.cache
def _shapes(arch: str) -> dict[str, Tensor]:
    """The weights of a ResNet without content."""
    with torch.device("meta"):
        return _without_fc(architecture(arch))


def _resnets(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """{chain of WORDS: {torchvision's name of a weight: its name in the file}}, of what may be a ResNet or a part."""
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        prefix = "".join(f"{word}." for word in takewhile(WORDS.__contains__, name.split(".")[:-1]))
        parts.setdefault(prefix, {})[name.removeprefix(prefix)] = name
    for prefix, part in parts.items():
        split = {rest: rest.split(".", 1) for rest in part}
        if "conv1.weight" not in part:
            split = {rest: [NUMBERED.get(child, child), *more] for rest, (child, *more) in split.items()}
        parts[prefix] = {".".join(split[rest]): name for rest, name in part.items() if split[rest][0] in CHILDREN}
    return {prefix: part for prefix, part in parts.items() if part}


def _misfit(weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Why weights are not exactly those of a ResNet; nothing where they are. Old files lack the counters of batches."""
    missing = [k for k in own if k not in weights]
    if all(k.endswith("num_batches_tracked") for k in missing):
        missing = []
    other = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    extra = [k for k in weights if k not in own]
    return (f"{len(missing)} of {len(own)} weights missing, {len(other)} of another shape, {len(extra)} unknown, "
            f"first {(missing + other + extra)[0]}") if missing or other or extra else ""


def _remedy(tensors: dict[str, Tensor], found: dict[str, dict[str, Tensor]], nearest: dict[str, Tensor]) -> str:
    """What to do about a file without a fitting ResNet: another --arch, a prefix that is none of WORDS, no ResNet."""
    for arch in ARCHITECTURES:
        if any(not _misfit(weights, _shapes(arch)) for weights in found.values()):
            return f"it is a {arch}: give --arch {arch}"
    marks = ("layer4.0.conv1.weight", "7.0.conv1.weight")  # every ResNet has it
    begins = {name.removesuffix(mark) for name in tensors for mark in marks if name.endswith(f".{mark}")} - found.keys()
    if begins:
        return f"a ResNet is there under {_listed(sorted(begins))}: save one without that prefix"
    if nearest:
        return "nor is it whole and of another of torchvision's architectures (a different stem? a part?)"
    if tensors:
        return (f"its names begin with {_listed(sorted({name.split('.')[0] + '.' for name in tensors}))}, as none of "
                "torchvision's ResNet does: save the ResNet's weights alone, under torchvision's names")
    return "it holds no tensors by name: save a state_dict"


def _branch(name: str, prefix: str) -> str:
    """A name as far as the first word in which it leaves the prefix: what is left out in few words."""
    words = name.split(".")
    return ".".join(words[: len(os.path.commonprefix([words, prefix.split(".")])) + 1])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + f" and {len(names) - 5} more" * (len(names) > 5)


@dataclass(frozen=True)
class Backbone:
    """A network with what is known of its pre-training: what stands beside every number measured on it.

    source: the name that `resolve` gives. name: its short one, of folders and rows (`title_of`). pretraining: arch,
    checksum of the weights and, of a run, its step and total steps (`horizon`), the similarity margin of its last look
    (`gap`), view_px and slice_px; those are None for a file, for ImageNet's and random weights. config: `made_with`.
    """

    net: nn.Module
    source: str
    name: str
    pretraining: dict
    config: dict | None = None

    @property
    def arch(self) -> str:
        """torchvision's name of its architecture."""
        return self.pretraining["arch"]

    @property
    def made(self) -> dict:
        """What is known of it with all that it was made with: what a result keeps."""
        return self.pretraining | ({"config": self.config} if self.config else {})

    @property
    def unfinished(self) -> str:
        """`its pre-training is at step 3 of 15` for a run that has not come to its total steps, else nothing."""
        step, horizon = self.pretraining["step"], self.pretraining["horizon"]
        return f"its pre-training is at step {step:,} of {horizon:,}" if horizon and step < horizon else ""

    @property
    def untrained(self) -> str:
        """`it does not tell slices apart` with the margin, for a run whose last look said so, else nothing."""
        gap = self.pretraining["gap"]
        apart = gap is None or gap >= LEAST_GAP
        return "" if apart else f"it does not tell slices apart (similarity margin {gap:.3f} in its last look)"


def open_backbone(name: str, out: Path, arch: str, seed: int, whitening: str, phantom: bool,
                  row: str | None = None) -> Backbone:
    """A backbone by name, see `resolve`: a run of `out`, imagenet, random or a file (these of architecture `arch`; in
    the tables it stands as `row`, see `title_of`).

    A run is read from its checkpoint; whitening: 'fold' it, or 'bn' for a plain BN in its place. Raises BadInput
    when there is no such thing, or where a run on the phantom would meet real CT, or the reverse.
    """
    seed_torch(seed, INIT)
    name = resolve(name, out, phantom)
    title = title_of(name, row)
    folder, state = out / name, {}
    if not (folder / CHECKPOINT).exists():
        net = build_backbone(name, arch)
        if row is None and Path(name).is_file() and _is_of(Path(name), _imagenet_url(arch)):
            title = "imagenet"  # by its content: the same row of the tables
    else:
        if (read_config(folder, "data")["data"] == "phantom") != phantom:
            raise BadInput(f"{folder}: was pre-trained on " + (
                "real CT, and these slices are the phantom's; give your CT by --data (without it, data/AbdomenCT-1K or "
                "data/BTCV is looked for)" if phantom else "the phantom, and these slices are real CT, on which its "
                "numbers would say nothing; name another backbone"))
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
    return Backbone(net, name, title, {"arch": arch, "checksum": checksum(net), **known}, made_with(name, out))


def title_of(name: str, row: str | None = None) -> str:
    """The short name of a resolved backbone, for folders and tables: a run's own, a file's `row` or its name without
    suffix (with it where that alone is another row's name). Raises BadInput for a row that cannot be one.
    """
    path = Path(name)
    if row is None:
        return path.stem if path.is_file() and path.stem not in BUILT_IN else path.name
    if not path.is_file():
        raise BadInput(f"--row {row}: only a FILE is given a name, {name} has its own")
    return fit_name("--row", row, "")


def fit_name(flag: str, name: str, *taken: str) -> str:
    """A name that a flag gives: of a folder, a file and a row of a table. Raises BadInput where it is unfit for one."""
    if name in (taken := (*BUILT_IN, *taken)) or name == ".." or Path(name).name != name or UNFIT & {*name} or (
            not name.isprintable() or name != name.strip()):
        raise BadInput(f"{flag} {name}: must be fit to name a folder and a row of a table, without any of "
                       f"{' '.join(sorted(UNFIT))} or blanks at its ends, and none of {', '.join(filter(None, taken))}")
    return name


def checksum(module: nn.Module) -> str:
    """blake2b of the names and bytes of all parameters and buffers, 32 hex digits: equal if nothing has changed."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def export(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's weights under torchvision's names, whitening folded, without fc: what backbone.pth holds."""
    weights = fold(backbone).state_dict()
    return {k: v.detach().cpu().contiguous().clone() for k, v in weights.items() if not k.startswith("fc.")}
