"""Segmentation of BTCV with a pre-trained ResNet: the dilated backbone, the linear head, DeepLabv3+.

Section 3.1 names three protocols: a linear head on a frozen backbone, the same fine-tuned, and the decoder
of DeepLabv3+ fine-tuned. Their layers follow the toolbox the paper used, mmsegmentation's
`deeplabv3plus_r50-d8` ("mmseg" below), and, for the linear head, VICRegL's segmentation protocol.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROTOCOLS = ("linear-frozen", "linear-finetune", "deeplabv3plus")
IGNORE = 255  # the label of pixels without one, as the padding of a crop
AUX_WEIGHT = 0.4  # mmseg: weight of the auxiliary head's loss
DROPOUT = 0.1  # mmseg: of whole channels, before every classifier
WIDTH, LOW_WIDTH = 512, 48  # mmseg: channels of the decoder, and of its low-level branch
RATES = (1, 12, 24, 36)  # mmseg: dilations of the pyramid at output stride 8


def dilate(backbone: nn.Module) -> nn.Module:
    """Change a torchvision ResNet, in place, from output stride 32 to 8: strides (1, 2, 1, 1). Returns it.

    A-trous exact: where a stride of 2 is given up, every later convolution sees a grid twice as fine and
    doubles its dilation, so layer4 takes the values it had before at every fourth pixel. Stage dilations are
    (1, 1, 2, 4), the first block of a dilated stage contracted, as in mmseg's R50-d8. Weights are untouched.
    torchvision's own `replace_stride_with_dilation` refuses basic blocks, hence this.
    Raises ValueError when layer3 or layer4 has no stride left to give up.
    """
    stages = (backbone.layer3, backbone.layer4)  # the last two; stem, layer1 and layer2 stay at strides 4 and 8
    if any(stage[0].downsample[0].stride != (2, 2) for stage in stages):
        raise ValueError("the backbone is already dilated: layer3 and layer4 must start with stride 2")
    rate = 1  # how much finer the grid is than the one that the weights were trained on
    for block in (block for stage in stages for block in stage):
        for conv in (m for m in block.children() if isinstance(m, nn.Conv2d)):  # in the order of forward
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (rate, rate)
            if conv.stride == (2, 2):
                conv.stride = (1, 1)
                rate *= 2  # from the next convolution on
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)  # the shortcut keeps up with its block
    return backbone


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # (N, any, h, w) -> (N, any, *size)


def conv_module(inputs: int, outputs: int, kernel: int, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """mmseg's ConvModule: convolution, BN, ReLU at stride 1 and equal size; He's initialisation by fan-out."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation,
                     groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def separable_conv_module(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """mmseg's DepthwiseSeparableConvModule: depthwise 3x3, then pointwise 1x1, each with BN and ReLU."""
    return nn.Sequential(conv_module(inputs, inputs, 3, dilation, groups=inputs), conv_module(inputs, outputs, 1))


def cls_seg(channels: int, classes: int) -> nn.Sequential:
    """Dropout of channels and a 1x1 convolution, N(0, 0.01) and zero: the end of every mmseg head."""
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(DROPOUT), conv)


class LinearHead(nn.Sequential):
    """BN, dropout, 1x1 convolution on layer4: (N, C, h, w) -> (N, classes, h, w). As in VICRegL."""

    def __init__(self, channels: int, classes: int):
        super().__init__(nn.BatchNorm2d(channels), *cls_seg(channels, classes))  # (N, C, h, w) -> (N, classes, h, w)


class FCNHead(nn.Sequential):
    """mmseg's auxiliary head on layer3: (N, C, h, w) -> (N, classes, h, w); 3x3 to C / 4, then 1x1."""

    def __init__(self, channels: int, classes: int):
        super().__init__(*conv_module(channels, channels // 4, 3), *cls_seg(channels // 4, classes))  # C, C/4, classes


class DeepLabV3PlusHead(nn.Module):
    """mmseg's DepthwiseSeparableASPPHead: layer4 (N, C, h, w), layer1 (N, L, H, W) -> (N, classes, H, W).

    Its parts have mmseg's names. The pooled branch normalises one value per image and channel, so a training batch
    needs two images: with one, PyTorch's BN raises ValueError.
    """

    def __init__(self, channels: int, low_channels: int, classes: int):
        super().__init__()
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_module(channels, WIDTH, 1))  # (N, WIDTH, 1, 1)
        self.aspp_modules = nn.ModuleList(conv_module(channels, WIDTH, 1) if rate == 1 else
                                          separable_conv_module(channels, WIDTH, rate) for rate in RATES)
        self.bottleneck = conv_module((1 + len(RATES)) * WIDTH, WIDTH, 3)
        self.c1_bottleneck = conv_module(low_channels, LOW_WIDTH, 1)
        self.sep_bottleneck = nn.Sequential(separable_conv_module(WIDTH + LOW_WIDTH, WIDTH),
                                            separable_conv_module(WIDTH, WIDTH))
        self.conv_seg = cls_seg(WIDTH, classes)

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """layer4 (N, C, h, w) and layer1 (N, L, H, W) -> logits (N, classes, H, W)."""
        pooled = _resize(self.image_pool(high), high.shape[2:])  # (N, WIDTH, 1, 1) -> (N, WIDTH, h, w)
        pyramid = torch.cat([pooled, *(branch(high) for branch in self.aspp_modules)], 1)  # (N, 5 WIDTH, h, w)
        high = self.bottleneck(pyramid)  # (N, WIDTH, h, w)
        low = self.c1_bottleneck(low)  # (N, LOW_WIDTH, H, W)
        joined = torch.cat([_resize(high, low.shape[2:]), low], 1)  # (N, WIDTH + LOW_WIDTH, H, W)
        return self.conv_seg(self.sep_bottleneck(joined))  # (N, classes, H, W)


class Segmenter(nn.Module):
    """A ResNet of torchvision, dilated here, under one of PROTOCOLS. 14 classes: background and 13 organs.

    What to train is what requires gradients. "linear-frozen" means what it does in mmseg: the backbone's
    parameters require none, and it stays in evaluation mode whatever `train` is given, so its BN uses the
    running statistics of pre-training. Raises ValueError for another protocol or a dilated backbone.
    """

    def __init__(self, backbone: nn.Module, protocol: str, classes: int = 14):
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        self.frozen = protocol == "linear-frozen"  # the others fine-tune every weight
        self.backbone = dilate(backbone).requires_grad_(not self.frozen)
        self.backbone.fc = nn.Identity()  # unused: DDP refuses parameters without a gradient
        # channels L of layer1, 4 L of layer3, 8 L of layer4
        low, _, middle, high = (getattr(stage[-1], "conv3", stage[-1].conv2).out_channels for stage in
                                (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4))
        if protocol == "deeplabv3plus":
            self.decode_head = DeepLabV3PlusHead(high, low, classes)
            self.auxiliary_head = FCNHead(middle, classes)
        else:
            self.decode_head, self.auxiliary_head = LinearHead(high, classes), None
        self.train()

    def train(self, mode: bool = True) -> "Segmenter":
        """As of every module, but a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W) -> the outputs of layer1 at stride 4 and of layer2 to layer4 at stride 8."""
        net = self.backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))  # (N, 64, H/4, W/4)
            layer1 = net.layer1(stem)  # (N, L, H/4, W/4)
            layer2 = net.layer2(layer1)  # (N, 2 L, H/8, W/8)
            layer3 = net.layer3(layer2)  # (N, 4 L, H/8, W/8): dilated, not strided
            return layer1, layer2, layer3, net.layer4(layer3)  # (N, 8 L, H/8, W/8)

    def forward(self, images: Tensor | tuple[Tensor, ...], labels: Tensor | None = None) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes, H, W), float32 also under autocast.

        With labels, `loss(images, labels)` instead: DistributedDataParallel sees only calls of `forward`.
        """
        if labels is not None:
            return self.loss(images, labels)
        return _resize(self.coarse(self.features(images)), images.shape[2:])  # (N, classes, h, w) -> (N, classes, H, W)

    def loss(self, images: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Images (N, 3, H, W), or their `features`, and labels (N, H, W) int64, 255 to ignore -> the loss, a scalar.

        Cross entropy at the labels' size, for DeepLabv3+ plus AUX_WEIGHT times that of the auxiliary head.
        """
        features = self.features(images) if isinstance(images, Tensor) else images
        loss = _cross_entropy(self.coarse(features), labels)  # ()
        if self.auxiliary_head is not None:
            loss = loss + AUX_WEIGHT * _cross_entropy(self.auxiliary_head(features[2]), labels)  # of layer3's map
        return loss

    def coarse(self, features: tuple[Tensor, ...]) -> Tensor:
        """The outputs of `features` -> logits before they are resized, float32 also under autocast.

        (N, classes, h, w) at stride 8, of DeepLabv3+ at stride 4: of many classes a small part of what `forward` gives.
        """
        layer1, _, _, layer4 = features  # (N, L, H/4, W/4) and (N, 8 L, h, w)
        logits = self.decode_head(layer4) if self.auxiliary_head is None else self.decode_head(layer4, layer1)
        return logits.float()


def _cross_entropy(coarse: Tensor, labels: Tensor) -> Tensor:
    """Logits (N, classes, h, w), resized to the labels (N, H, W) -> the mean over all pixels, ignored ones as zero.

    mmseg's default (`avg_non_ignore=False`): a pixel weighs the same in every crop and process; no label gives 0.
    """
    # log-softmax reads a class after the other: logits in channels_last would be copied for it at their full size
    logits = _resize(coarse.float().contiguous(), labels.shape[1:])  # (N, classes, h, w) -> (N, classes, H, W)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").mean()  # (N, H, W) -> ()


def loss_bytes(protocol: str, batch: int, classes: int, side: int) -> int:
    """What logits and loss take of a device's memory at the peak of a training step, of crops of side x side pixels.

    In float32 each head's log-probabilities, which wait for backward, and of one head at a time two gradients as large.
    """
    return 4 * batch * classes * side**2 * (4 if protocol == "deeplabv3plus" else 3)
