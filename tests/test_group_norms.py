"""group_norms.py: BN of groups against a loop over them, in eager and for a compiler; running statistics of a step."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from group_norms import GroupBatchNorm, Groups, by_formula, end_step, group_norms
from whitening import ZCAWhitening, whiten_last_norm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def batch(count, images=3, channels=5, dtype=torch.float64):
    """(count x images, channels, 4, 6): each group with its own mean and scale."""
    g = torch.Generator().manual_seed(count)
    scale = torch.arange(1.0, count + 1).repeat_interleave(images)[:, None, None, None]
    return (scale * torch.randn(count * images, channels, 4, 6, generator=g, dtype=torch.float64) + scale).to(dtype)


def norm(images=3, channels=5, dtype=torch.float64):
    layer = nn.Sequential(nn.BatchNorm2d(channels, momentum=0.3)).to(dtype)
    with torch.no_grad():
        for p in layer.state_dict().values():
            if p.is_floating_point():
                p.uniform_(0.5, 1.5)
    return group_norms(layer, images)


def loop(layer, x, images):
    """Eq. 4 for each group by its formula: outputs, and the running mean and variance that each alone would leave."""
    bn, outs, means, variances = layer[0], [], [], []
    for group in x.split(images):
        mean, var = group.mean((0, 2, 3)), group.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        outs.append((group - mean.view(shape)) / (var + bn.eps).sqrt().view(shape) * bn.weight.view(shape)
                    + bn.bias.view(shape))
        means.append(0.7 * bn.running_mean + 0.3 * mean.detach())
        variances.append(0.7 * bn.running_var + 0.3 * group.var((0, 2, 3)).detach())
    return torch.cat(outs), torch.stack(means).mean(0), torch.stack(variances).mean(0)


def formula(layer, x):
    bn, groups = layer[0], layer.groups
    return by_formula(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, groups.of(len(x)),
                      groups.share(bn.momentum), bn.eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("way", [lambda layer, x: layer(x), formula], ids=["kernels", "formula"])
def test_each_group_is_normalised_by_its_own(layout, count, way):
    """Outputs, gradients and running statistics."""
    layer, x = norm(), batch(count).contiguous(memory_format=layout).requires_grad_()
    out, mean, var = loop(layer, x, 3)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad((out * weight).sum(), (x, layer[0].weight, layer[0].bias))
    found = way(layer, x)
    torch.testing.assert_close(found, out)
    assert found.is_contiguous(memory_format=layout)
    for one, other in zip(torch.autograd.grad((found * weight).sum(), (x, layer[0].weight, layer[0].bias)), expected,
                          strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(layer[0].running_mean, mean)
    torch.testing.assert_close(layer[0].running_var, var)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_against_finite_differences(layout):
    layer = norm(images=2, channels=3)
    x = batch(2, 2, 3).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in "ab")

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"0.weight": weight, "0.bias": bias}, (x,))

    assert torch.autograd.gradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", [lambda layer, x: layer(x), formula], ids=["kernels", "formula"])
def test_half_types_with_weights_in_float32(layout, way):
    """As under autocast: to the rounding of bf16, of which one step is 2^-8 of a number."""
    layer, x = norm(dtype=torch.float32), batch(3).bfloat16().contiguous(memory_format=layout).requires_grad_()
    exact = copy.deepcopy(layer).double()
    out, mean, var = loop(exact, x.detach().double(), 3)
    found = way(layer, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), out, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(layer[0].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer[0].running_var.double(), var, rtol=1e-5, atol=1e-5)
    found.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("passes", [[8], [3, 3, 2], [1] * 8, [5, 3]])
def test_running_statistics_do_not_depend_on_the_passes(passes):
    """The mean over groups of what each would have made of the statistics before the step, which counts once."""
    layer, x = norm(), batch(8)
    _, mean, var = loop(layer, x, 3)
    first = 0
    for count in passes:
        last = first + 3 * count
        layer.groups.begin(first, last, len(x), x.device)
        layer(x[first:last])
        first = last
    end_step(layer)
    torch.testing.assert_close(layer[0].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer[0].running_var, var, rtol=1e-12, atol=1e-12)
    assert layer[0].num_batches_tracked == 1


def test_shares_telescope():
    """n moves leave what stood before with 1 - m, and give each group m / G."""
    groups, left, given = Groups(2), 1.0, []
    for first, last in ((0, 6), (6, 12), (12, 16)):  # 3, 3 and 2 of 8 groups
        groups.begin(first, last, 16, torch.device("cpu"))
        for share in groups.shares((last - first) // 2, 0.1):
            left, given = left * (1 - share), [g * (1 - share) for g in given] + [share]
    assert left == pytest.approx(0.9, abs=1e-14) and given == pytest.approx([0.1 / 8] * 8, abs=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whitening_of_groups_is_that_of_each(layout):
    """Eq. 5 in one call for three groups of images, against three calls: outputs, gradients, running statistics."""
    torch.manual_seed(0)
    x = (torch.randn(12, 8, 5, 5, dtype=torch.float64) * torch.rand(12, 8, 1, 1)).contiguous(memory_format=layout)
    alone = ZCAWhitening(8, group_size=4, momentum=0.3).double()
    with torch.no_grad():
        alone.weight.uniform_(0.5, 1.5)
        alone.running_whitening.add_(0.1)
    together = group_norms(nn.Sequential(copy.deepcopy(alone)), 4)
    calls = [copy.deepcopy(alone) for _ in range(3)]
    x.requires_grad_()
    out, expected = together(x), torch.cat([call(part) for call, part in zip(calls, x.split(4), strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    (grad,), (expected,) = (torch.autograd.grad((o * weight).sum(), x) for o in (out, expected))
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    for name in ("running_mean", "running_whitening"):
        mean = torch.stack([getattr(call, name) for call in calls]).mean(0)
        torch.testing.assert_close(getattr(together[0], name), mean, rtol=1e-12, atol=1e-12)
    together.eval()
    calls[0].load_state_dict(together[0].state_dict())
    assert torch.equal(together(x), calls[0].eval()(x))  # in evaluation mode there are no groups


def test_a_network_keeps_its_names_and_its_evaluation():
    net = whiten_last_norm(torchvision.models.resnet18(weights=None))
    grouped = group_norms(copy.deepcopy(net), 2)
    assert list(grouped.state_dict()) == list(net.state_dict())
    assert sum(isinstance(m, GroupBatchNorm) for m in grouped.modules()) == 19
    assert all(m.groups is grouped.groups for m in grouped.modules() if isinstance(m, GroupBatchNorm | ZCAWhitening))
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(grouped.eval()(images), net.eval()(images))
    other = copy.deepcopy(grouped)  # a key encoder has its own
    assert other.groups is not grouped.groups and other.bn1.groups is other.groups


def test_images_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match="one value of a channel"):
        norm(images=1)(torch.zeros(3, 5, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="7 images do not divide into groups of 3"):
        norm()(batch(3)[:7])


def test_a_gradient_of_a_gradient_is_refused():
    layer, x = norm(), batch(2).requires_grad_()
    grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_formula_is_what_a_compiler_sees():
    """One graph for all passes of a step: another share is another number in it, not another graph."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer, plain, x = norm(), norm(), batch(6)
    plain.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=False)
    for first, last in ((0, 6), (6, 12), (12, 18)):
        for module in (layer, plain):
            module.groups.begin(first, last, 18, x.device)
        torch.testing.assert_close(compiled(x), plain(x))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer[0], name), getattr(plain[0], name))
    assert len(graphs) == 1 and not any("batch_norm" in str(node.target) for node in graphs[0].graph.nodes)
