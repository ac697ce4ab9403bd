"""What tools/bench.py times: networks, batches and the bare step that others are compared with."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

import datasets
import train_seg
import train_ssl
from engine import backbones, processes
from segment import Segmenter
from tools.stores import SIDE
from views import resize


class Setting:
    """What is timed: the paper's network, or a small one with --quick."""

    def __init__(self, quick: bool, peers: bool = False):
        self.quick, self.peers = quick, peers
        self.ranks = processes.start()  # as training: with cuDNN's choice of the fastest convolutions
        self.device = self.ranks.device
        self.amp = processes.precision("auto", self.device)
        self.arch, self.size, self.batch, self.group = ("resnet18", 96, 32, 16) if quick else ("resnet50", 224, 64, 32)
        self.queue, self.repeats = (4096, 3) if quick else (65536, 2)
        if self.device.type == "cuda" and not quick:
            self.batch, self.repeats = 256, 10
        self.steps, self.stored = 20, 20 * self.batch  # from a store of so many slices

    def trainer(self, *flags: str, amp: str | None = None, queue: int | None = None) -> train_ssl.Trainer:
        """A pre-training of this setting from random weights, with these flags of train_ssl.py."""
        args = train_ssl.parse(["--arch", self.arch, "--init", "random", "--image-size", str(self.size), "--batch-size",
                                str(self.batch), "--bn-group", str(self.group), "--queue", str(queue or self.queue),
                                *flags])
        train_ssl.resolve_defaults(args, False)
        batches = datasets.Batches(args, self.stored, self.ranks)
        return train_ssl.Trainer(args, train_ssl.build(args), batches, self.ranks, amp or self.amp)

    def slices(self) -> torch.Tensor:
        """A batch of noise (B, 512, 512) uint8, from which a copy to the device need not be waited for."""
        slices = np.random.default_rng(0).integers(0, 256, (self.batch, SIDE, SIDE), np.uint8)
        return resize.pinned(torch.from_numpy(slices), self.device)

    def segmentation(self, protocol: str, side: int, *flags: str) -> tuple[train_seg.Trainer, list]:
        """A training of a protocol on crops of noise, from random weights, and what its first iteration reads."""
        args = train_seg.parse(["--split", "100", "--protocol", protocol, "--crop-size", str(side), *flags])
        train_seg.resolve_defaults(args, False)
        args, rng = train_seg.recipe(args, protocol), np.random.default_rng(0)
        noise = SimpleNamespace(slice=lambda i, label=False: rng.integers(0, 14 if label else 256, (SIDE, SIDE),
                                                                         np.uint8))
        crops = datasets.Crops(args, noise, np.arange(args.batch_size), self.ranks)
        model = Segmenter(backbones.architecture(self.arch), protocol)
        return train_seg.Trainer(args, model, crops, self.ranks, self.amp), crops.fetch(0)

    def bare(self, trainer: train_ssl.Trainer, amp: str | None = None) -> Callable:
        """Query forward and backward plus key forward of the trainer's encoders, in its passes, and nothing else."""
        views = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        query, key = trainer.moco.encoder_q, trainer.moco.encoder_k
        images = trainer.moco.groups_per_pass * self.group

        def step() -> None:
            """Keys first, as the full step has it."""
            for part in views.split(images):
                with torch.no_grad(), processes.autocast(amp or self.amp, self.device):
                    key(part)
            for part in views.split(images):
                with processes.autocast(amp or self.amp, self.device):
                    loss = query(part)[1].float().mean()
                loss.backward()
            query.zero_grad(set_to_none=True)

        return step
