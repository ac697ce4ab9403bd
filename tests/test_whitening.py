"""whitening.py against the recursion on eigenvalues, the exact ZCA, and finite differences."""

import copy
import warnings

import pytest
import torch
import torchvision

from whitening import ZCAWhitening, fold, to_batch_norm, whiten_last_norm


def correlated(channels, positions, seed=0, decay=1.0):
    """(positions, channels) float64 with a covariance spectrum i^-decay, randomly rotated, off-centre."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, channels, generator=g, dtype=torch.float64)
    x *= torch.arange(1, channels + 1, dtype=torch.float64) ** (-decay / 2)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=g, dtype=torch.float64))[0]
    return x @ rotation + torch.randn(channels, generator=g, dtype=torch.float64)


def covariance(rows, eps):
    centred = rows - rows.mean(0)
    return centred.mT @ centred / len(rows) + eps * torch.eye(rows.shape[1], dtype=rows.dtype)


@pytest.mark.parametrize("iterations", [1, 3, 5, 7])
def test_newton_is_the_scalar_recursion_on_the_eigenvalues(iterations):
    """p <- 1.5 p - 0.5 p^3 l for every eigenvalue of the trace-normalised covariance, same eigenvectors."""
    x = correlated(16, 500)
    layer = ZCAWhitening(16, group_size=16, iterations=iterations).double()
    values, vectors = torch.linalg.eigh(covariance(x, layer.eps))
    trace = values.sum()
    p = torch.ones_like(values)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p**3 * (values / trace)
    expected = (x - x.mean(0)) @ (vectors * (p / trace.sqrt())) @ vectors.mT
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_many_iterations_give_the_exact_zca():
    """Eq. 5 by eigendecomposition, one group at a time."""
    x = torch.cat([correlated(8, 4000, seed=1, decay=0.5), correlated(8, 4000, seed=2, decay=0.5)], 1)
    out = ZCAWhitening(16, group_size=8, iterations=20).double()(x)
    for group in (slice(0, 8), slice(8, 16)):
        values, vectors = torch.linalg.eigh(covariance(x[:, group], 1e-5))
        expected = (x[:, group] - x[:, group].mean(0)) @ vectors @ torch.diag(values**-0.5) @ vectors.mT
        torch.testing.assert_close(out[:, group], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(covariance(out[:, group], 0), torch.eye(8, dtype=out.dtype), rtol=0, atol=1e-3)


def test_images_are_whitened_over_all_positions_in_either_memory_format():
    rows = correlated(8, 4 * 5 * 6)
    images = rows.view(4, 5, 6, 8).movedim(-1, 1)
    layer = ZCAWhitening(8, group_size=4).double()
    expected = layer(rows).view(4, 5, 6, 8).movedim(-1, 1)
    torch.testing.assert_close(layer(images.contiguous()), expected)
    torch.testing.assert_close(layer(images.contiguous(memory_format=torch.channels_last)), expected)


def test_affine_and_running_statistics():
    x = correlated(8, 400)
    layer = ZCAWhitening(8, group_size=8, momentum=0.3).double()
    plain = layer(x)
    mean, whitening = x.mean(0), torch.linalg.lstsq(x - x.mean(0), plain).solution.mT  # plain = (x - mean) W^T
    torch.testing.assert_close(layer.running_mean.flatten(), 0.3 * mean)
    torch.testing.assert_close(layer.running_whitening[0], 0.7 * torch.eye(8).double() + 0.3 * whitening)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 9))
        layer.bias.copy_(torch.arange(8.0))
    torch.testing.assert_close(layer(x), plain * torch.arange(1.0, 9) + torch.arange(8.0))
    layer.eval()
    by_hand = (x - layer.running_mean.flatten()) @ layer.running_whitening[0].mT * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_against_finite_differences(training):
    x = correlated(6, 30).requires_grad_()
    layer = ZCAWhitening(6, group_size=3, iterations=4).double().train(training)

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, weight, bias))


@pytest.mark.filterwarnings("ignore:whitening")
def test_finite_under_rank_deficiency_and_constant_channels():
    for x in (torch.randn(20, 64), torch.zeros(300, 64), torch.randn(300, 1).expand(300, 64) * 1e3,
              torch.cat([torch.randn(300, 32), torch.full((300, 32), 7.0)], 1)):
        x = x.clone().requires_grad_()
        out = ZCAWhitening(64)(x)
        out.square().sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()


def test_the_same_under_autocast_and_the_inputs_type_comes_back():
    x = correlated(64, 512).float()
    plain, cast = ZCAWhitening(64), ZCAWhitening(64)
    expected = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cast(x), expected)
        half = cast(x.bfloat16())
    assert half.dtype == torch.bfloat16 and cast.running_whitening.dtype == torch.float32
    torch.testing.assert_close(half.float(), plain(x.bfloat16().float()), rtol=1e-2, atol=1e-2)


def test_few_positions_warn_and_uneven_groups_are_refused():
    for positions in (100, 127):
        with pytest.warns(UserWarning, match=f"{positions} positions: below twice the group size"):
            ZCAWhitening(64)(torch.randn(positions, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ZCAWhitening(64)(torch.randn(128, 64))
    with pytest.raises(ValueError, match="groups of 48"):
        ZCAWhitening(64, group_size=48)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_fold_is_the_evaluation_mode_network(arch):
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch, weights=None)
    affine = copy.deepcopy(net.layer4[-1])
    whiten_last_norm(net, group_size=64)
    norm = net.layer4[-1].bn3 if arch == "resnet50" else net.layer4[-1].bn2
    before = affine.bn3 if arch == "resnet50" else affine.bn2
    assert isinstance(norm, ZCAWhitening) and torch.equal(norm.weight, before.weight)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            net(torch.randn(8, 3, 128, 128) * 2)
    net.eval()
    folded, x = fold(net), torch.randn(3, 3, 96, 96)
    assert not any(isinstance(m, ZCAWhitening) for m in folded.modules())
    torchvision.models.get_model(arch, weights=None).load_state_dict(folded.state_dict())
    assert isinstance(net.layer4[-1].bn3 if arch == "resnet50" else net.layer4[-1].bn2, ZCAWhitening)
    with torch.no_grad():
        a, b = (torch.nn.Sequential(*list(n.children())[:-2])(x) for n in (net, folded))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * a.abs().max().item())


def test_to_batch_norm_copies_the_affine_and_has_fresh_statistics():
    net = whiten_last_norm(torchvision.models.resnet18(weights=None))
    with torch.no_grad():
        net.layer4[1].bn2.weight.uniform_()
        net.layer4[1].bn2.running_mean.fill_(3)
    norm = to_batch_norm(net).layer4[1].bn2
    assert type(norm) is torch.nn.BatchNorm2d and torch.equal(norm.weight, net.layer4[1].bn2.weight)
    assert not norm.running_mean.any() and (norm.running_var == 1).all()
