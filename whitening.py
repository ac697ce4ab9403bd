"""Eq. 5: ZCA whitening by Newton's iteration in place of the backbone's last BN, and folding it away.

X_ZCA = D L^(-1/2) D^T (X - mu 1^T), the inverse square root of the covariance D L D^T, here without an
eigendecomposition: the trace-normalised covariance S has eigenvalues l in (0, 1], and the iteration
P <- 1.5 P - 0.5 P^3 S, from P = I, takes every eigenvalue towards l^(-1/2). T steps amplify by 1.5^T at
most, so small eigenvalues are lifted only part of the way; that is why the channels are whitened in groups
of 64 (8 = sqrt(64) <= 1.5^5.2), the setting of the authors of the iteration (Huang et al., CVPR 2019).
"""

import copy
import warnings

import torch
from torch import Tensor, nn

from group_norms import Groups, move


class ZCAWhitening(nn.Module):
    """Whitens (N, C, H, W) or (N, C) over all positions, in G = C / D groups of D = `group_size` channels.

    Training uses the batch's own mean and whitening matrix and updates their running averages (of the
    matrix, not of the covariance); evaluation uses these. With `groups` set, each group of images in training is
    whitened by its own. Computed in at least float32 whatever the input's type or autocast; the output has the
    input's type. Raises ValueError when D does not divide C.
    """

    groups: Groups | None = None  # of images, as `group_norms` sets it; None: the batch is one

    def __init__(self, num_features: int, group_size: int = 64, iterations: int = 5, eps: float = 1e-5,
                 momentum: float = 0.1):
        super().__init__()
        if num_features % group_size:
            raise ValueError(f"{num_features} channels do not divide into whitening groups of {group_size}")
        self.group_size, self.iterations = group_size, iterations  # D, T
        self.eps, self.momentum = eps, momentum
        groups = num_features // group_size  # G
        self.weight = nn.Parameter(torch.ones(num_features))  # the affine of the BN that it replaces: (C,)
        self.bias = nn.Parameter(torch.zeros(num_features))
        # for evaluation: the running means of mu and of Sigma^(-1/2)
        self.register_buffer("running_mean", torch.zeros(groups, group_size, 1))
        self.register_buffer("running_whitening", torch.eye(group_size).repeat(groups, 1, 1))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, group_size={self.group_size}, iterations={self.iterations}"

    def forward(self, x: Tensor) -> Tensor:
        """Eq. 5 and the affine: (N, C, H, W) or (N, C) -> the same shape and type."""
        blocks, size = self.running_mean.shape[:2]  # G, D
        count = self.groups.of(len(x)) if self.training and self.groups else 1  # P groups of images
        with torch.autocast(x.device.type, enabled=False):
            wide = x if x.dtype == torch.float64 else x.float()
            rows = wide.movedim(1, -1)  # (N, H, W, C): a view, and free of copies in channels_last
            positions = rows.reshape(count, -1, blocks, size).transpose(1, 2)  # (P, G, m, D), m = N / P x H x W
            positions = positions.flatten(0, 1).mT  # (P x G, D, m): P is one more batch dimension of all products
            if self.training:
                mean = positions.mean(2, keepdim=True)  # mu of Eq. 5: (P x G, D, 1)
                whitening = self.matrix(positions - mean)  # Sigma^(-1/2) of Eq. 5: (P x G, D, D)
                share = self.groups.share(self.momentum) if self.groups else self.momentum
                for running, found in ((self.running_mean, mean), (self.running_whitening, whitening)):
                    move(running, found.unflatten(0, (count, blocks)).mean(0), share)
            else:
                mean, whitening = self.running_mean.to(wide.dtype), self.running_whitening.to(wide.dtype)
            # with the affine: weight * W (x - mu) + bias, as one product, the mean moved into the shift
            weight, bias = (p.to(wide.dtype).view(blocks, size, 1).repeat(count, 1, 1)
                            for p in (self.weight, self.bias))  # (P x G, D, 1)
            scaled = weight * whitening  # (P x G, D, D)
            shift = bias - scaled @ mean  # (P x G, D, 1)
            out = torch.baddbmm(shift.mT, positions.mT, scaled.mT)  # Eq. 5: (P x G, m, D)
            out = out.unflatten(0, (count, blocks)).transpose(1, 2)  # (P, m, G, D)
            return out.reshape(rows.shape).movedim(-1, 1).to(x.dtype)

    def matrix(self, centred: Tensor) -> Tensor:
        """Sigma^(-1/2) of centred (G, D, m) after T Newton steps: (G, D, D)."""
        positions = centred.shape[2]  # m
        if positions < 2 * self.group_size:
            warnings.warn(f"whitening {self.group_size} channels over {positions} positions: below twice the group "
                          "size the covariance is close to singular; use larger batches or a smaller --zca-group",
                          stacklevel=2)
        eye = torch.eye(self.group_size, dtype=centred.dtype, device=centred.device)
        sigma = centred @ centred.mT / positions + self.eps * eye  # covariance: (G, D, D)
        trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]  # (G, 1, 1)
        s = sigma / trace  # S: eigenvalues in (0, 1], where the iteration converges
        p = eye.expand_as(s)  # P_0 = I
        for _ in range(self.iterations):
            p = 1.5 * p - 0.5 * (p @ p @ p) @ s  # P_k = (3 P_{k-1} - P_{k-1}^3 S) / 2
        return p / trace.sqrt()  # Sigma^(-1/2) = S^(-1/2) / sqrt(trace)


def _last_norm(backbone: nn.Module) -> tuple[nn.Module, str, str]:
    """(block, name of its last convolution, name of its last norm): conv3, bn3 in a bottleneck, else conv2, bn2."""
    block = backbone.layer4[-1]
    return (block, "conv3", "bn3") if hasattr(block, "bn3") else (block, "conv2", "bn2")


def whiten_last_norm(backbone: nn.Module, fresh: bool = False, **kw) -> nn.Module:
    """Replace, in place, the last BN of a torchvision ResNet (before the residual addition) by ZCAWhitening.

    The affine is copied, or fresh: weight 1, bias 0. `kw` goes to ZCAWhitening. Section 2.3. Returns the backbone.
    """
    block, _, name = _last_norm(backbone)
    zca = ZCAWhitening(getattr(block, name).num_features, **kw)
    setattr(block, name, zca if fresh else _copy_affine(getattr(block, name), zca))
    return backbone


def fold(backbone: nn.Module) -> nn.Module:
    """A stock torchvision ResNet with the same evaluation-mode outputs: W goes into the convolution before.

    weight * W (conv(x) - mu) + bias is a BN of (W conv)(x) whose running mean is W mu and whose running
    variance is one. The given backbone is left as it is; without a whitening layer, a plain copy comes back.
    """
    backbone = copy.deepcopy(backbone)
    block, conv_name, norm_name = _last_norm(backbone)
    zca, conv = getattr(block, norm_name), getattr(block, conv_name)
    if isinstance(zca, ZCAWhitening):
        norm = _copy_affine(zca, nn.BatchNorm2d(zca.weight.numel()))
        with torch.no_grad():
            whitening = zca.running_whitening.double()  # W: (G, D, D)
            filters = conv.weight.double().reshape(*zca.running_mean.shape[:2], -1)  # (G, D, in * kh * kw)
            conv.weight.copy_((whitening @ filters).reshape(conv.weight.shape))
            norm.running_mean.copy_((whitening @ zca.running_mean.double()).flatten())
            norm.running_var.fill_(1 - norm.eps)  # so that BN divides by one
        setattr(block, norm_name, norm.train(backbone.training))
    return backbone


def to_batch_norm(backbone: nn.Module) -> nn.Module:
    """A copy whose whitening is a plain BN (Eq. 4) with its affine and fresh statistics: the paper's fine-tuning."""
    backbone = copy.deepcopy(backbone)
    block, _, name = _last_norm(backbone)
    norm = getattr(block, name)
    if isinstance(norm, ZCAWhitening):
        setattr(block, name, _copy_affine(norm, nn.BatchNorm2d(norm.weight.numel()).train(backbone.training)))
    return backbone


def _copy_affine(source: nn.Module, target: nn.Module) -> nn.Module:
    target.to(source.weight.device)
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)
    return target
