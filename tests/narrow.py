"""Small ResNets and steps in float64, for tests of whole steps and for golden/make.py, which runs an old commit."""

import math

import nibabel as nib
import numpy as np
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, _api
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import augment
import datasets
import segment
import train_ssl
from engine import backbones, processes

SHARE = 16  # of the widths of torchvision's networks: 4 channels in the stem, 32 or 128 at the end
SLICES = 100  # of a store that there is not: 12 are held out
ALONE = processes.Processes(0, 1, torch.device("cpu"))


class Narrow(ResNet):
    """torchvision's ResNet with a sixteenth of its channels and one block a stage, its weights drawn by numpy.

    Numpy's uniform numbers are the same on every machine and in every version of torch; so is a network made of them.
    """

    def __init__(self, block: type):
        super().__init__(block, [1, 1, 1, 1])
        self.fc = nn.Linear(512 // SHARE * block.expansion, 1000)
        draw_weights(self, np.random.default_rng(0))

    def _make_layer(self, block, planes, *rest, **kw):
        if planes == 64:  # the first stage: the stem before it becomes as narrow
            self.inplanes = planes // SHARE
            self.conv1, self.bn1 = nn.Conv2d(3, self.inplanes, 7, 2, 3, bias=False), nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, planes // SHARE, *rest, **kw)


def narrow_basic(weights: ResNet18_Weights | None = None, **_) -> Narrow:
    """As ResNet-18, with one block a stage."""
    return Narrow(BasicBlock)


def narrow_bottleneck(weights: ResNet50_Weights | None = None, **_) -> Narrow:
    """As ResNet-50, with one block a stage."""
    return Narrow(Bottleneck)


NETWORKS = {"resnet_basic": narrow_basic, "resnet_bottleneck": narrow_bottleneck}


def register(monkeypatch) -> None:
    """Let --arch accept their names."""
    for name, build in NETWORKS.items():
        monkeypatch.setitem(_api.BUILTIN_MODELS, name, build)
    monkeypatch.setattr(backbones, "ARCHITECTURES", [*backbones.ARCHITECTURES, *NETWORKS])


@torch.no_grad()
def draw_weights(module: nn.Module, rng: np.random.Generator) -> None:
    """Draw every parameter and every statistic, so that none of them is a zero or one that could be left out."""
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            drawn = rng.uniform(-1, 1, value.shape)
            if value.ndim in (2, 4):  # as He has it
                drawn *= math.sqrt(6 / value[0].numel())
            elif name.endswith(("weight", "running_var")):
                drawn = 1 + drawn / 2
            elif name.endswith("running_whitening"):
                drawn = np.eye(value.shape[1]) + drawn / 10
            value.copy_(torch.from_numpy(drawn))


def settings(flags: str):
    """The command line, with the paper's defaults where it says nothing."""
    args = train_ssl.parse(flags.split())
    train_ssl.resolve_defaults(args, False)
    return args


def trainer(args, seed: int = 0) -> train_ssl.Trainer:
    """A trainer in float64 whose weights, statistics and queue are drawn; the keys' encoder resembles the queries'."""
    rng = np.random.default_rng(seed)
    moco = train_ssl.build(args).double()
    draw_weights(moco.encoder_q, rng)
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    with torch.no_grad():
        for p in moco.encoder_k.state_dict().values():
            if p.is_floating_point():
                p.mul_(torch.from_numpy(1 + rng.uniform(-0.2, 0.2, p.shape)))
        queue = torch.from_numpy(rng.uniform(-1, 1, moco.queue.shape))
        moco.queue.copy_(queue / queue.norm(dim=1, keepdim=True))
    return train_ssl.Trainer(args, moco, batches(args), ALONE, "off")


def batches(args) -> datasets.Batches:
    """What the steps of one process are made of, from a store that there is not."""
    return datasets.Batches(args, SLICES, ALONE)


def slices(args, seed: int) -> torch.Tensor:
    """A batch of slices (N, H, H) uint8: blots of 8 pixels with noise, each slice its own."""
    rng, side = np.random.default_rng(seed), args.size
    blots = rng.integers(0, 200, (args.batch_size, side // 8, side // 8)).repeat(8, 1).repeat(8, 2)
    return torch.from_numpy((blots + rng.integers(0, 56, blots.shape)).astype(np.uint8))


def ct_flags(folder) -> list[str]:
    """Write two small CT volumes, of whole numbers from numpy and so the same everywhere; flags of a run on them."""
    rng, data = np.random.default_rng(0), folder / "ct"
    if not data.exists():
        data.mkdir()
        for name in ("a", "b"):
            blots = rng.integers(-400, 300, (12, 12, 16)).repeat(8, 0).repeat(8, 1)
            hu = (blots + rng.integers(-50, 50, blots.shape)).astype(np.int16)  # (96, 96, 16)
            nib.save(nib.Nifti1Image(hu, np.diag([-1.5, -1.5, 5.0, 1.0])), data / f"{name}.nii.gz")
    flags = ("--init random --arch resnet_basic --local --zca --zca-group 4 --geometric --image-size 64 --size 96 "
             "--batch-size 8 --bn-group 4 --queue 32 --epochs 3 --lr 0.002 --ema 0.9 --amp off --workers 1")
    return [*flags.split(), "--data", str(data), "--store", str(folder / "store")]


def labelled_flags(folder) -> list[str]:
    """Write five small labelled CT volumes, of whole numbers as those of `ct_flags`; flags of a segmentation of them.

    Two organs are to be found: blots of more than 150 HU, and of less than -250.
    """
    rng, data = np.random.default_rng(1), folder / "labelled"
    if not data.exists():
        for part in ("images", "labels"):
            (data / part).mkdir(parents=True)
        (folder / "names.txt").write_text("1 bright\n2 dark\n")
        for name in "abcde":
            blots = rng.integers(-400, 300, (4, 4, 8)).repeat(16, 0).repeat(16, 1)
            hu = (blots + rng.integers(-50, 50, blots.shape)).astype(np.int16)  # (64, 64, 8)
            organs = np.where(blots > 150, 1, np.where(blots < -250, 2, 0)).astype(np.uint8)
            for part, voxels in (("images", hu), ("labels", organs)):
                nib.save(nib.Nifti1Image(voxels, np.diag([-1.5, -1.5, 5.0, 1.0])), data / part / f"{name}.nii.gz")
    flags = ("--backbone random --arch resnet_basic --split 100 --protocol linear-finetune --crop-size 48 "
             "--batch-size 4 --iterations 24 --eval-every 12 --lr 0.2 --amp off --workers 1")
    return [*flags.split(), "--data", str(data), "--labels", str(folder / "names.txt"), "--store",
            str(folder / "segment")]


def without_dropout(monkeypatch) -> None:
    """Let the heads drop nothing: what is drawn for that, not every build of torch draws alike."""
    monkeypatch.setattr(segment, "DROPOUT", 0.0)


def projections(state: dict) -> dict[str, list[float]]:
    """Two numbers for each tensor by name: it times two drawn unit vectors. Weights that differ by d give differences
    of the length of d over the root of their number."""
    found = {}
    for name, value in state.items():
        drawn = np.random.default_rng(0).uniform(-1, 1, (2, value.numel()))
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        found[name] = (drawn @ value.double().numpy().ravel()).tolist()
    return found


def dyadic_boxes(monkeypatch) -> None:
    """Let crops be 32 or 64 pixels of 128, before they are rounded to pixels; some pairs then share too little.

    Fractions of such sides are exact in float32, too, in which boxes go to a device.
    """
    draw = augment.draw

    def drawn(rng, batch_size, geometric=True, *recipe):
        params = draw(rng, batch_size, geometric, *recipe)
        if geometric:
            length = rng.choice([32, 64], (batch_size, 2))
            box = np.concatenate([rng.integers(0, 129 - length), length], 1)
            params["box"] = (box + rng.uniform(-0.4, 0.4, box.shape)).clip(0, 128) / 128
        return params

    monkeypatch.setattr(augment, "draw", drawn)


def plain_views(monkeypatch) -> None:
    """Let views be float64 and of plain arithmetic: the crop's nearest pixels, brightness, contrast, flip.

    Those of `augment.pair` are float32, which another machine rounds otherwise. In some steps that is enough for an
    activation to change its sign, and with it the gradient, in its fourth digit.
    """
    def view(batch, params, size):
        top, left, height, width = np.rint(params["box"] * batch.shape[1]).T[:, :, None]  # (N, 1) each
        at = (np.arange(size) + 0.5) / size
        rows, columns = (top + at * height).astype(int), (left + at * width).astype(int)  # (N, size)
        images = batch[np.arange(len(batch))[:, None, None], rows[:, :, None], columns[:, None]] / 255
        images = (images * params["brightness"][:, None, None]).clip(0, 1)
        images = (0.5 + (images - 0.5) * params["contrast"][:, None, None]).clip(0, 1)
        images = np.where(params["flip"][:, None, None], images[..., ::-1], images)
        return torch.from_numpy(images)[:, None]

    monkeypatch.setattr(augment, "pair", lambda batch, params_q, params_k, size: tuple(
        view(batch.numpy(), params, size) for params in (params_q, params_k)))


def double_views(monkeypatch) -> list[tuple]:
    """Let views be float64, and with them the whole step; returns what `augment.pair` was given and gave, by call."""
    calls, pair = [], augment.pair

    def recorded(batch, params_q, params_k, size):
        views = tuple(view.double() for view in pair(batch, params_q, params_k, size))
        calls.append((params_q, params_k, *views))
        return views

    monkeypatch.setattr(augment, "pair", recorded)
    return calls
