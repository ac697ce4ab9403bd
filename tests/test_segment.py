"""segment.py against the stock ResNets, layer lists written out by hand, and losses computed by hand."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import segment
from engine.backbones import checksum
from segment import AUX_WEIGHT, PROTOCOLS, DeepLabV3PlusHead, FCNHead, LinearHead, Segmenter, dilate

CLASSES = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The maps here are so small that, on a busy machine, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resnet(arch, seed=0):
    """A torchvision ResNet in eval mode with random weights and BN statistics far from their defaults."""
    torch.manual_seed(seed)
    net = getattr(torchvision.models, arch)(weights=None)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.3, 0.9)
        nn.init.normal_(norm.bias, std=0.2)
    return net.eval()


def layer4(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def batch(height=65, width=97, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (2, height, width), generator=g)
    labels[0, :20] = 255
    return torch.randn(2, 3, height, width, generator=g), labels


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
@torch.no_grad()
def test_dilated_features_equal_the_stock_ones_at_every_fourth_pixel(arch, size):
    net = resnet(arch).double()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = layer4(net, x)
    assert dilate(net) is net
    out = layer4(net, x)
    assert out.shape[2:] == tuple(-(-side // 8) for side in size)
    torch.testing.assert_close(out[..., ::4, ::4], expected, rtol=1e-9, atol=1e-9 * expected.abs().max())


def test_dilations_of_the_stages():
    """mmseg's R50-d8: the 3x3 of each block of layer3 and layer4, the first one contracted."""
    net = dilate(resnet("resnet50"))
    assert [block.conv2.dilation[0] for block in net.layer3] == [1, 2, 2, 2, 2, 2]
    assert [block.conv2.dilation[0] for block in net.layer4] == [2, 4, 4]
    assert [getattr(net, f"layer{i}")[0].conv2.stride[0] for i in (1, 2, 3, 4)] == [1, 2, 1, 1]


def test_a_dilated_backbone_is_refused():
    with pytest.raises(ValueError, match="already dilated"):
        dilate(dilate(resnet("resnet18")))
    with pytest.raises(ValueError, match="already dilated"):
        dilate(torchvision.models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True]))


def convolutions(module):
    """(in, out, kernel, dilation, groups) of every convolution, in order; padding must keep the size."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        assert conv.stride == (1, 1)
        assert conv.padding == tuple(d * (conv.kernel_size[0] // 2) for d in conv.dilation)
    return [(c.in_channels, c.out_channels, c.kernel_size[0], c.dilation[0], c.groups) for c in convs]


def test_layers_of_the_deeplabv3plus_head():
    head = DeepLabV3PlusHead(2048, 256, CLASSES)
    assert convolutions(head) == [
        (2048, 512, 1, 1, 1),  # image pooling
        (2048, 512, 1, 1, 1),  # rate 1
        (2048, 2048, 3, 12, 2048), (2048, 512, 1, 1, 1),
        (2048, 2048, 3, 24, 2048), (2048, 512, 1, 1, 1),
        (2048, 2048, 3, 36, 2048), (2048, 512, 1, 1, 1),
        (2560, 512, 3, 1, 1),  # all five
        (256, 48, 1, 1, 1),  # layer1
        (560, 560, 3, 1, 560), (560, 512, 1, 1, 1),
        (512, 512, 3, 1, 512), (512, 512, 1, 1, 1),
        (512, CLASSES, 1, 1, 1),
    ]
    *inner, last = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in inner) and not last.bias.any()
    assert last.weight.std().item() == pytest.approx(0.01, rel=0.1)
    norms = [m.num_features for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [conv.out_channels for conv in inner]
    assert sum(isinstance(m, nn.ReLU) for m in head.modules()) == len(inner)
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout2d)] == [0.1]


@torch.no_grad()
def test_every_branch_reaches_the_output_of_the_deeplabv3plus_head():
    torch.manual_seed(0)
    head = DeepLabV3PlusHead(16, 8, 3).eval()
    high, low = torch.randn(1, 16, 9, 11), torch.randn(1, 8, 18, 22)
    out = head(high, low)
    assert out.shape == (1, 3, 18, 22)
    for name in ("image_pool.1", "aspp_modules.0", "aspp_modules.1.1", "aspp_modules.2.1", "aspp_modules.3.1",
                 "c1_bottleneck"):
        shift = head.get_submodule(name)[1].bias
        shift.add_(1)
        assert not torch.allclose(head(high, low), out), name
        shift.sub_(1)
    torch.testing.assert_close(head(high, low), out)


def test_layers_of_the_linear_and_the_auxiliary_head():
    def kinds(head):
        return [type(m) for m in head]

    linear, auxiliary = LinearHead(2048, CLASSES), FCNHead(1024, CLASSES)
    assert kinds(linear) == [nn.BatchNorm2d, nn.Dropout2d, nn.Conv2d]
    assert linear[0].num_features == 2048 and convolutions(linear) == [(2048, CLASSES, 1, 1, 1)]
    assert kinds(auxiliary) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d, nn.Conv2d]
    assert convolutions(auxiliary) == [(1024, 256, 3, 1, 1), (256, CLASSES, 1, 1, 1)]
    for head in (linear, auxiliary):
        assert head[-1].weight.std().item() == pytest.approx(0.01, rel=0.1) and not head[-1].bias.any()
        assert head[-2].p == 0.1


def test_heads_get_the_widths_of_a_bottleneck_backbone():
    model = Segmenter(resnet("resnet50"), "deeplabv3plus")
    assert model.decode_head.c1_bottleneck[0].in_channels == 256 and model.decode_head.bottleneck[0].in_channels == 2560
    assert model.decode_head.image_pool[1][0].in_channels == 2048 and model.auxiliary_head[0].in_channels == 1024


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_logits_and_loss_by_hand(protocol):
    """Odd sizes; the cross entropies of the labelled pixels, summed, over the number of all pixels."""
    model = Segmenter(resnet("resnet18"), protocol).eval()
    images, labels = batch()
    with torch.no_grad():
        features = model.features(images)
        assert [tuple(f.shape[1:]) for f in features] == [
            (64, 17, 25), (128, 9, 13), (256, 9, 13), (512, 9, 13)]

        def by_hand(logits):
            logits = nn.functional.interpolate(logits, size=(65, 97), mode="bilinear", align_corners=False)
            kept = labels != 255
            rows = logits.double().movedim(1, -1)[kept]
            own = rows[torch.arange(len(rows)), labels[kept]]
            return logits, (rows.exp().sum(1).log() - own).sum().item() / labels.numel()

        if protocol == "deeplabv3plus":
            logits, expected = by_hand(model.decode_head(features[3], features[0]))
            expected += 0.4 * by_hand(model.auxiliary_head(features[2]))[1]
        else:
            logits, expected = by_hand(model.decode_head(features[3]))
        torch.testing.assert_close(model(images), logits)
        loss = model.loss(images, labels)
        assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
        assert model(images, labels).item() == loss.item()
        assert model.loss(images, torch.full_like(labels, 255)).item() == 0
    assert AUX_WEIGHT == 0.4


def test_features_are_the_stages_of_the_backbone_one_after_the_other():
    """By hooks on a stock ResNet whose strides were exchanged for dilations as DeepLab has them."""
    images, kept = batch()[0], []
    model, stock = Segmenter(resnet("resnet18"), "linear-finetune").eval(), dilate(resnet("resnet18"))
    for i in (1, 2, 3, 4):
        getattr(stock, f"layer{i}").register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.no_grad():
        stock(images)
        for found, expected in zip(model.features(images), kept, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_parameter_and_no_buffer_is_left_uninitialised(memory_of_nan, protocol):
    model = Segmenter(resnet("resnet18"), protocol)
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and value.abs().max() < 2**62, name
    # mmseg's ConvModule: He's normal numbers by fan-out
    convs = [m for m in model.decode_head.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    for conv in convs:
        fan_out = conv.weight[:, 0].numel()
        if conv.weight.numel() > 10_000:
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), conv
    assert len(convs) == (14 if protocol == "deeplabv3plus" else 0)


def step(protocol):
    """(model, its state before, its state after) one step of SGD in training mode."""
    model = Segmenter(resnet("resnet18"), protocol).eval().train()
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.loss(*batch(33, 49)).backward()
    sgd.step()
    return model, before, model.state_dict()


def test_a_frozen_backbone_keeps_parameters_and_buffers():
    model, before, after = step("linear-frozen")
    assert model.decode_head.training and not any(m.training for m in model.backbone.modules())
    assert not model.features(batch()[0])[3].requires_grad
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "decode_head.0.weight", "decode_head.0.bias", "decode_head.2.weight", "decode_head.2.bias"]
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


@pytest.mark.parametrize("protocol", PROTOCOLS[1:])
def test_fine_tuning_changes_everything(protocol):
    model, before, after = step(protocol)
    assert all(m.training for m in model.modules())
    assert not [name for name, value in after.items() if torch.equal(value, before[name])]
    assert all(p.grad is not None for p in model.parameters())  # what DistributedDataParallel requires


def test_evaluation_keeps_no_graph_when_told_so():
    model = Segmenter(resnet("resnet18"), "linear-finetune").eval()
    with torch.no_grad():
        assert not any(f.requires_grad for f in model.features(batch()[0]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_logits_are_float32_under_autocast(protocol):
    model = Segmenter(resnet("resnet18"), protocol)
    images, labels = batch(33, 49)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.features(images)[3].dtype == torch.bfloat16
        assert model(images).dtype == torch.float32
        loss = model.loss(images, labels)
    assert loss.dtype == torch.float32 and loss.isfinite()


class LogSoftmax(TorchDispatchMode):
    """Notes whether what log-softmax is given lies as it reads it."""

    def __init__(self):
        super().__init__()
        self.dense = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._log_softmax.default:
            self.dense.append(args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_logits_need_no_copy_at_full_size(protocol):
    model = Segmenter(resnet("resnet18"), protocol).to(memory_format=torch.channels_last)
    with LogSoftmax() as seen:
        model.loss(*batch(33, 49))
    assert seen.dense == [True] * (2 if protocol == "deeplabv3plus" else 1)


class Logits(nn.Module):
    """A head of no weight of its own, so that all memory is that of logits and loss."""

    def __init__(self, stride, classes):
        super().__init__()
        logits = torch.randn(4, classes, 96 // stride, 96 // stride)
        self.logits = nn.Parameter(logits.contiguous(memory_format=torch.channels_last))

    def forward(self, *_):
        return self.logits


@pytest.mark.parametrize("classes", [2, 14, 105])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_memory_of_logits_and_loss_is_what_torch_allocates(protocol, classes):
    model = Segmenter(resnet("resnet18"), protocol, classes)
    model.decode_head = Logits(4 if protocol == "deeplabv3plus" else 8, classes)
    model.auxiliary_head = model.auxiliary_head and Logits(8, classes)
    labels = torch.randint(0, classes, (4, 96, 96))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.loss((None,) * 4, labels).backward()
    moments = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = torch.tensor([e.nbytes() for e in sorted(moments, key=lambda e: e.start_ns())]).cumsum(0)
    assert allocated.max().item() == pytest.approx(segment.loss_bytes(protocol, 4, classes, 96), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_coarse_logits_are_those_that_forward_resizes(protocol):
    model = Segmenter(resnet("resnet18"), protocol, 5).eval()
    images, _ = batch()
    coarse = model.coarse(model.features(images))
    assert coarse.shape == (2, 5, *((17, 25) if protocol == "deeplabv3plus" else (9, 13)))
    resized = nn.functional.interpolate(coarse, (65, 97), mode="bilinear", align_corners=False)
    assert torch.equal(model(images), resized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.coarse(model.features(images)).dtype == torch.float32


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="linear-frozen"):
        Segmenter(resnet("resnet18"), "linear")


def test_one_image_is_refused_by_the_pooled_branch_in_training():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Segmenter(resnet("resnet18"), "deeplabv3plus")(batch()[0][:1])


def test_the_checksum_sees_every_parameter_and_buffer_and_nothing_else():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    before = checksum(net)
    swapped = copy.deepcopy(net)
    swapped[1].weight, swapped[1].bias = nn.Parameter(net[1].bias.detach()), nn.Parameter(net[1].weight.detach())
    named = nn.ModuleDict({"other" if i == "0" else i: m for i, m in net.named_children()})
    assert before not in (checksum(swapped), checksum(named))  # the same bytes under other names
    assert before == checksum(copy.deepcopy(net).eval().to(memory_format=torch.channels_last)) and len(before) == 32
    for name, value in net.state_dict().items():
        kept = value.clone()
        value.view(-1)[-1] += 1
        assert checksum(net) != before, name
        value.copy_(kept)
    assert checksum(net) == before
    nn.init.ones_(net[1].bias)
    assert checksum(net) != checksum(nn.Sequential(net[0], net[3], net[2], net[1]))
