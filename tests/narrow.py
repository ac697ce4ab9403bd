"""Small ResNets and steps in float64, for tests of whole steps and for golden/make.py, which runs an old commit."""

import math

import numpy as np
import torch
from torch import nn
from torchvision.models import _api
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import augment
import datasets
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


def narrow_basic(weights=None) -> Narrow:
    """As ResNet-18, with one block a stage."""
    return Narrow(BasicBlock)


def narrow_bottleneck(weights=None) -> Narrow:
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
    return train_ssl.Trainer(args, moco, datasets.Batches(args, SLICES, ALONE), ALONE, "off")


def slices(args, seed: int) -> torch.Tensor:
    """A batch of slices (N, H, H) uint8: blots of a few pixels, each slice its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (args.batch_size, args.size // 8, args.size // 8))
    return torch.from_numpy(coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8))


def double_views(monkeypatch) -> list[tuple]:
    """Let views be float64, and with them the whole step; returns what `augment.pair` was given and gave, by call."""
    calls, pair = [], augment.pair

    def recorded(batch, params_q, params_k, size):
        views = tuple(view.double() for view in pair(batch, params_q, params_k, size))
        calls.append((params_q, params_k, *views))
        return views

    monkeypatch.setattr(augment, "pair", recorded)
    return calls
