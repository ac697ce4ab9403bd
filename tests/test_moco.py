"""moco.py: Eq. 1 against a loop, queue, EMA, Shuffling BN, statistics of groups."""

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from moco import MoCo
from whitening import ZCAWhitening, fold, to_batch_norm, whiten_last_norm


@pytest.fixture
def moco():
    torch.manual_seed(0)
    return MoCo(torchvision.models.resnet18(weights=None), dim=16, queue=24, group=4, local=True)


def test_eq_1_against_a_loop(moco):
    views = torch.randn(4, 3, 64, 64)
    keys = nn.functional.normalize(torch.randn(4, 16), dim=1)
    cells, patches = torch.randn(4, 49, 64), torch.stack([torch.randperm(49)[:20] for _ in range(4)])
    start = copy.deepcopy(moco.state_dict())
    loss_global, loss_local = moco(views, keys, cells, patches)
    moco.load_state_dict(start)
    first, z = moco.encoder_q(views)
    q = (z / z.norm(dim=1, keepdim=True)).double()
    losses, right = [], 0
    for i in range(4):
        positive = math.exp((q[i] @ keys[i].double()).item() / 0.2)
        negatives = [math.exp((q[i] @ k.double()).item() / 0.2) for k in moco.queue]
        losses.append(-math.log(positive / (positive + sum(negatives))))
        right += positive > max(negatives)
    assert loss_global.item() == pytest.approx(sum(losses) / 4, abs=1e-5)
    cosines = [(q[i] @ keys[i].double()).item() for i in range(4)]
    others = (q @ moco.queue.double().T).mean().item()
    assert moco.query_stats.tolist() == pytest.approx([right / 4, sum(cosines) / 4, others], abs=1e-5)
    # Eq. 2 on the pooled cells, Eq. 3
    pooled = nn.functional.adaptive_avg_pool2d(first[..., :14, :14], 7).flatten(2).mT
    own = []
    for b in range(4):
        a, k = (nn.functional.normalize(x[b, patches[b]], dim=1) for x in (pooled, cells))
        own.append(-torch.log_softmax(a @ k.T / 0.2, 1).diagonal().mean())
    assert loss_local.item() == pytest.approx(torch.stack(own).mean().item(), abs=1e-5)
    moco.lambda_local = 0.5
    assert moco.total(torch.tensor(2.0), torch.tensor(3.0)).item() == 3.5


def test_queue_is_first_in_first_out_and_wraps_around(moco):
    expected = [row.clone() for row in moco.queue]
    place = 0
    for batch in (8, 8, 8, 8, 12, 12):
        keys = torch.randn(batch, 16)
        moco.enqueue(keys)
        for key in keys:
            expected[place % 24] = key
            place += 1
        torch.testing.assert_close(moco.queue, torch.stack(expected), rtol=0, atol=0)
        assert moco.queue_ptr.item() == place % 24


def test_ema_of_parameters_and_no_gradient_into_the_key_encoder(moco):
    with torch.no_grad():
        for p in moco.encoder_q.parameters():
            p.add_(torch.randn_like(p))
    expected = [0.999 * k.double() + 0.001 * q.double()
                for k, q in zip(moco.encoder_k.parameters(), moco.encoder_q.parameters(), strict=True)]
    moco.update_key_encoder()
    for p, e in zip(moco.encoder_k.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-7)
        assert not p.requires_grad


def test_keys_come_back_in_order_and_see_the_statistics_of_their_shuffled_group(moco):
    views, permutation = torch.randn(8, 3, 64, 64), torch.tensor([3, 0, 6, 5, 1, 7, 2, 4])
    reference = copy.deepcopy(moco.encoder_k)
    keys, cells = moco.keys(views, permutation)
    for group in (permutation[:4], permutation[4:]):
        first, z = copy.deepcopy(reference)(views[group])
        torch.testing.assert_close(keys[group], nn.functional.normalize(z, dim=1).detach())
        torch.testing.assert_close(cells[group], nn.functional.adaptive_avg_pool2d(first[..., :14, :14], 7)
                                   .flatten(2).mT.detach())
    assert keys.norm(dim=1).allclose(torch.ones(8)) and not keys.requires_grad
    # shuffling matters: other company, other keys
    assert not torch.allclose(moco.keys(views, torch.arange(8))[0], keys, atol=1e-3)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_no_parameter_and_no_buffer_is_left_uninitialised(memory_of_nan, arch):
    net = whiten_last_norm(getattr(torchvision.models, arch)(weights=None), fresh=True)
    for module in (MoCo(net, 16, 8), ZCAWhitening(64), fold(net), to_batch_norm(net)):
        for name, value in module.state_dict().items():
            assert value.isfinite().all() and value.abs().max() < 2**62, name


def test_where_no_argument_says_otherwise_the_settings_are_mmselfsups_and_iternorms():
    """configs/selfsup/_base_/models/mocov2.py; the README of IterNorm: G = 64, T = 5, eps and momentum by its code."""
    moco, zca = MoCo(torchvision.models.resnet18(weights=None)), ZCAWhitening(128)
    assert moco.queue.shape == (65536, 128) and moco.queue_ptr == 0
    assert (moco.group, moco.ema, moco.temperature, moco.local) == (32, 0.999, 0.2, False)
    assert (moco.temperature_local, moco.lambda_local) == (0.2, 1.0)  # ours, docs/decisions.md
    assert zca.running_whitening.shape == (2, 64, 64)
    assert (zca.iterations, zca.eps, zca.momentum) == (5, 1e-5, 0.1)
    assert zca.weight.tolist() == [1] * 128 and zca.bias.tolist() == [0] * 128
    assert torch.equal(zca.running_whitening, torch.eye(64).repeat(2, 1, 1)) and not zca.running_mean.any()
    # the affine of the norm that it replaces, unless it is to be fresh
    for fresh in (False, True):
        net = torchvision.models.resnet18(weights=None)
        nn.init.constant_(net.layer4[-1].bn2.weight, 3), nn.init.constant_(net.layer4[-1].bn2.bias, 2)
        norm = whiten_last_norm(net, fresh).layer4[-1].bn2
        assert (norm.weight[0].item(), norm.bias[0].item()) == ((1, 0) if fresh else (3, 2))
