"""A step of pre-training against an independent one, against its own past, and what is drawn for it."""

import math
import shutil
from pathlib import Path

import narrow
import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torchvision.ops import roi_align

import datasets
import train_seg
import train_ssl
from engine import recipes, seeds

COMMON = ("--data . --init random --image-size 64 --size 128 --batch-size 12 --bn-group 4 --queue 24 --epochs 1 "
          "--lr 0.02 --ema 0.7 --temperature 0.15")
LOCAL = " --local --temperature-local 0.35 --lambda-local 0.6"
# Four channels over at least 16 positions: the covariance is well-conditioned.
METHODS = {"moco": "", "local + zca": LOCAL + " --zca --zca-group 4 --zca-iterations 3",
           "aligned + zca": LOCAL + " --zca --zca-group 4 --zca-iterations 3 --geometric"}
HORIZON = 7  # steps: 88 of 100 slices are trained on, in batches of 12, for one epoch


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    narrow.register(monkeypatch)


# ------------------------------------------------------------------------------------ an independent step of MoCo v2


class Newton(nn.Module):
    """Eq. 5 by Newton's iteration, after Huang et al. 2019, one group of channels after the other."""

    def __init__(self, channels, size, iterations):
        super().__init__()
        self.size, self.iterations = size, iterations
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels // size, size, 1))
        self.register_buffer("running_whitening", torch.empty(channels // size, size, size))

    def forward(self, x):
        out = []
        for i, channels in enumerate(x.split(self.size, 1)):  # (N, D, H, W) each
            rows = channels.transpose(0, 1).flatten(1)  # (D, m)
            mean, whitening = self.running_mean[i], self.running_whitening[i]
            if self.training:
                mean = rows.mean(1, keepdim=True)
                eye = torch.eye(self.size, dtype=x.dtype)
                p, covariance = eye, (rows - mean) @ (rows - mean).T / rows.shape[1] + 1e-5 * eye
                for _ in range(self.iterations):
                    p = (3 * p - p @ p @ p @ covariance / covariance.trace()) / 2
                whitening = p / covariance.trace().sqrt()
                with torch.no_grad():
                    self.running_mean[i] = 0.9 * self.running_mean[i] + 0.1 * mean
                    self.running_whitening[i] = 0.9 * self.running_whitening[i] + 0.1 * whitening
            out.append((whitening @ (rows - mean)).unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1))
        return torch.cat(out, 1) * self.weight[:, None, None] + self.bias[:, None, None]


def network(args, weights):
    """torchvision's own ResNet, its fc the projector, and Newton in place of its last BN."""
    net = narrow.NETWORKS[args.arch]()
    width = net.fc.in_features
    net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
    if args.zca:
        last = "bn3" if args.arch.endswith("bottleneck") else "bn2"
        setattr(net.layer4[-1], last, Newton(width, args.zca_group, args.zca_iterations))
    names = {"backbone.": "", "projector.": "fc."}
    net.double().load_state_dict({k.replace(old, new): v for k, v in weights.items()
                                  for old, new in names.items() if k.startswith(old)})
    net.layer1.register_forward_hook(lambda module, given, out: setattr(net, "first", out))
    return net


def in_groups(net, grey, group):
    """First-stage maps and embeddings of grey views (N, 1, S, S), each group with its own batch statistics; running
    statistics become the mean of what each group would have made of them."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=grey.dtype).view(2, 3, 1, 1)
    maps, embeddings, ends = [], [], []
    for images in grey.split(group):
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        embeddings.append(functional_call(net, buffers, (images.expand(-1, 3, -1, -1) - mean) / std))
        maps.append(net.first)
        ends.append(buffers)
    for name, b in net.named_buffers():
        b.copy_(torch.stack([end[name] for end in ends]).double().mean(0))
    return torch.cat(maps), torch.cat(embeddings)


def cells(features, box, flip):
    """The 49 cells (49, C) of one map (C, H, W): of all of it, or of a box (top, left, height, width) in fractions of
    the view before its flip."""
    if box is None:
        height, width = (n // 7 for n in features.shape[1:])
        return features[:, : 7 * height, : 7 * width].unflatten(1, (7, height)).unflatten(3, (7, width)).mean((2, 4)
                                                                                                    ).flatten(1).T
    features = features.flip(2) if flip else features
    (top, left, tall, wide), side = box, features.shape[1]
    corners = features.new_tensor([[0, left * side, top * side, (left + wide) * side, (top + tall) * side]])
    return roi_align(features[None], corners, 7, aligned=True)[0].flatten(1).T


def common_part(query, key, side):
    """What two crops of a slice share: its box in each, in fractions of the view; None where a side is too short."""
    (q, k), found = ([[round(float(x) * side) for x in box] for box in (query, key)]), []
    for a in (0, 1):
        start, end = max(q[a], k[a]), min(q[a] + q[a + 2], k[a] + k[a + 2])
        if end - start < 0.1 * side:
            return None
        found.append([((start - b[a]) / b[a + 2], (end - start) / b[a + 2]) for b in (q, k)])
    ((top_q, tall_q), (top_k, tall_k)), ((left_q, wide_q), (left_k, wide_k)) = found
    return (top_q, left_q, tall_q, wide_q), (top_k, left_k, tall_k, wide_k)


class Reference:
    """MoCo v2 with Eq. 1 to 3, written down from the papers: a loop over groups, and one over images for Eq. 2."""

    def __init__(self, args, state):
        self.args, self.queue, self.place = args, state["queue"].clone(), 0
        self.q, self.k = (network(args, {name.removeprefix(part): v for name, v in state.items() if
                                         name.startswith(part)}) for part in ("encoder_q.", "encoder_k."))
        self.usable = []  # pairs of each group, of the last step
        self.momentum = [torch.zeros_like(p) for p in self.q.parameters()]

    def local_loss(self, maps_q, maps_k, patches, drawn_q, drawn_k):
        """Eq. 2: the mean over a group's pairs, then over groups; one without a usable pair counts as 0."""
        groups = [[] for _ in range(len(maps_q) // self.args.bn_group)]
        for i, chosen in enumerate(patches):
            boxes, flips = (None, None), (False, False)
            if self.args.geometric:
                boxes = common_part(drawn_q["box"][i], drawn_k["box"][i], self.args.size)
                flips = drawn_q["flip"][i], drawn_k["flip"][i]
            if boxes:
                a, b = (cells(m[i], box, flip)[chosen] for m, box, flip in
                        zip((maps_q, maps_k), boxes, flips, strict=True))
                a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
                own = [a[j] @ b[j] / self.args.temperature_local - torch.logsumexp(
                    b @ a[j] / self.args.temperature_local, 0) for j in range(len(chosen))]
                groups[i // self.args.bn_group].append(-sum(own) / len(own))
        self.usable = [len(g) for g in groups]
        return sum(sum(g) / len(g) if g else torch.zeros((), dtype=torch.float64) for g in groups) / len(groups)

    def step(self, t, view_q, view_k, drawn_q, drawn_k, order, patches):
        args = self.args
        with torch.no_grad():  # the keys' encoder moves first; keys are encoded in another order
            for k, q in zip(self.k.parameters(), self.q.parameters(), strict=True):
                k.copy_(args.ema * k + (1 - args.ema) * q)
            maps, embeddings = in_groups(self.k, view_k[order], args.bn_group)
            maps_k, keys = torch.empty_like(maps), torch.empty_like(embeddings)
            maps_k[order], keys[order] = maps, embeddings / embeddings.norm(dim=1, keepdim=True)
        maps_q, embeddings = in_groups(self.q, view_q, args.bn_group)
        queries = embeddings / embeddings.norm(dim=1, keepdim=True)
        own, others = (queries * keys).sum(1), queries @ self.queue.T
        every = torch.cat([own[:, None], others], 1) / args.temperature
        loss_global = (torch.logsumexp(every, 1) - own / args.temperature).mean()  # Eq. 1
        loss_local = torch.zeros((), dtype=torch.float64)
        if args.local:
            loss_local = self.local_loss(maps_q, maps_k, patches, drawn_q, drawn_k)
        loss = loss_global + args.lambda_local * loss_local  # Eq. 3
        gradients = torch.autograd.grad(loss, list(self.q.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        lr = args.lr * (1 + math.cos(math.pi * t / HORIZON)) / 2
        with torch.no_grad():  # SGD
            for p, m, g in zip(self.q.parameters(), self.momentum, gradients, strict=True):
                m.copy_(0.9 * m + g + 1e-4 * p)
                p.sub_(lr * m)
        for key in keys:  # the oldest goes
            self.queue[self.place] = key
            self.place = (self.place + 1) % len(self.queue)
        nearest = (own > others.max(1).values).double().mean()
        return torch.stack([loss, loss_global, loss_local, nearest, own.mean(), others.mean(), norm]).detach()


# Both agree to 2e-14 after three steps: at 16 positions or more to a whitening of 4 channels, and at this learning
# rate, rounding is not amplified much. What is left out or exchanged moves the 3rd to the 6th digit.
CLOSE = dict(rtol=1e-10, atol=1e-11)


def assert_equal_state(trainer, reference):
    """Every parameter, statistic and counter of both encoders, the queue and SGD's momentum."""
    state = trainer.moco.state_dict()
    torch.testing.assert_close(state["queue"], reference.queue, **CLOSE)
    assert state["queue_ptr"] == reference.place
    for part, net in (("encoder_q.", reference.q), ("encoder_k.", reference.k)):
        for name, value in net.state_dict().items():
            name = name.replace("fc.", "projector.") if name.startswith("fc.") else f"backbone.{name}"
            torch.testing.assert_close(state[part + name], value, **CLOSE, msg=lambda m, n=part + name: f"{n}: {m}")
    momentum = trainer.state(0)["optimizer"]["state"]
    assert len(state) == 2 + 2 * len(reference.q.state_dict()) and len(momentum) == len(reference.momentum)
    for i, value in enumerate(reference.momentum):
        torch.testing.assert_close(momentum[i]["momentum_buffer"], value, **CLOSE)



def steps_of_both(monkeypatch, flags, count=3):
    """Yields (trainer, reference, t, stats of the one, stats of the other) after each step."""
    narrow.dyadic_boxes(monkeypatch)
    args = narrow.settings(COMMON + flags)
    trainer = narrow.trainer(args)
    reference = Reference(args, {k: v.clone() for k, v in trainer.moco.state_dict().items()})
    calls = narrow.double_views(monkeypatch)
    for t in range(count):
        stats = trainer.step(t, narrow.slices(args, t))
        drawn = [trainer.batches.views(t, purpose) for purpose in (seeds.VIEW_Q, seeds.VIEW_K)]
        *given, view_q, view_k = calls[t]
        for one, other in zip(given, drawn, strict=True):  # each view was made of its own draw
            assert all(np.array_equal(one[name], other[name]) for name in {*one, *other})
        patches = trainer.batches.patch_idx(t) if args.local else None
        yield trainer, reference, t, stats, reference.step(t, view_q, view_k, *drawn, trainer.batches.permutation(t),
                                                           patches)


@pytest.mark.parametrize("arch", narrow.NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_papers(monkeypatch, arch, method):
    """Losses, gradient, weights, statistics, queue and momentum, after one step and after three."""
    usable = []
    for trainer, reference, t, stats, expected in steps_of_both(monkeypatch, f" --arch {arch}" + METHODS[method]):
        torch.testing.assert_close(stats, expected, **CLOSE)
        usable += reference.usable
        if t in (0, 2):
            assert_equal_state(trainer, reference)
    if method.startswith("aligned"):  # groups without a usable pair, with one and with several are among them
        assert {0, 1, 3} <= set(usable)


def test_a_run_starts_from_equal_encoders_and_a_queue_of_unit_length():
    moco = train_ssl.build(narrow.settings(COMMON + LOCAL + " --arch resnet_basic"))
    state = moco.state_dict()
    assert state["queue"].shape == (24, 128) and state["queue_ptr"] == 0
    torch.testing.assert_close(state["queue"].norm(dim=1), torch.ones(24))
    cosines = state["queue"] @ state["queue"].T - torch.eye(24)
    assert cosines.abs().max() < 0.5  # spread over the sphere: a standard deviation is 128^-0.5 = 0.09
    for name, value in state.items():
        if name.startswith("encoder_q."):
            assert torch.equal(value, state[name.replace("encoder_q.", "encoder_k.")])
    assert all(p.requires_grad for p in moco.encoder_q.parameters())
    assert not any(p.requires_grad for p in moco.encoder_k.parameters())


def test_a_whitened_start_keeps_its_outputs(tmp_path):
    """A run whose last norm is a whitening, given by --init: its backbone, the whitening folded into a convolution."""
    def part(state, prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    run = Path(__file__).parent / "golden" / "moco-local-zca-aligned"
    shutil.copytree(run, tmp_path / run.name)
    plain, whitened = (narrow.settings(COMMON + f" --arch resnet_basic --out {tmp_path} --init {run.name}" + more)
                       for more in ("", " --zca --zca-group 4"))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    expected, found = network(whitened, part(saved, "encoder_q.")), narrow.NETWORKS["resnet_basic"]().double()
    found.fc = expected.fc = nn.Identity()
    opened, anew = (part(train_ssl.build(args).state_dict(), "encoder_q.backbone.") for args in (plain, whitened))
    found.load_state_dict(opened)
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = found.eval()(images)
    assert outputs.std(0).mean() > 0.1  # they tell images apart
    torch.testing.assert_close(outputs, expected.eval()(images), rtol=1e-4, atol=1e-5)  # the weights are float32
    for name in opened.keys() & anew.keys() - {"layer4.0.bn2.running_mean"}:  # whitened anew, with fresh statistics
        assert torch.equal(opened[name], anew[name]), name


# ------------------------------------------------------------------------------------------ what is drawn for a step


def test_views_differ_from_step_to_step_and_between_query_and_key():
    batches = narrow.batches(narrow.settings(COMMON))
    drawn = [batches.views(t, purpose) for t in range(40) for purpose in (seeds.VIEW_Q, seeds.VIEW_K)]
    for name in ("box", "brightness", "contrast", "sigma", "flip", "contrast_first"):
        values = np.stack([d[name].reshape(12, -1) for d in drawn]).reshape(40, 2, 12, -1)  # step, view, image, number
        assert name != "box" or len(np.unique(values.reshape(960, 4), axis=0)) == 960
        for query, key in np.moveaxis(values, (3, 1), (0, 1)):  # (40, 12) each
            assert len(np.unique(query, axis=0)) > 38 and len(np.unique(key, axis=0)) > 38  # 12 flips may agree
            assert abs(np.corrcoef(query.ravel(), key.ravel())[0, 1]) < 0.15  # of 480: 0.05 is a standard deviation
    whole = narrow.batches(narrow.settings(COMMON + " --no-geometric"))
    for purpose in (seeds.VIEW_Q, seeds.VIEW_K):
        assert (whole.views(3, purpose)["box"] == [0, 0, 1, 1]).all() and not whole.views(3, purpose)["flip"].any()


def test_keys_are_shuffled_anew_at_every_step():
    batches = narrow.batches(narrow.settings(COMMON))
    orders = torch.stack([batches.permutation(t) for t in range(400)])  # (400, 12)
    assert (orders.sort(1).values == torch.arange(12)).all()
    assert len(orders.unique(dim=0)) == 400 and not (orders == torch.arange(12)).all(1).any()
    seen = torch.nn.functional.one_hot(orders).sum(0)  # (12, 12): how often an image came to a place, 33 expected
    assert seen.min() > 10 and seen.max() < 60


def test_patches_differ_from_step_to_step_and_from_image_to_image():
    batches = narrow.batches(narrow.settings(COMMON + LOCAL))
    patches = torch.cat([batches.patch_idx(t) for t in range(50)])  # (600, 20)
    ordered = patches.sort(1).values
    assert patches.shape == (600, 20) and (ordered.diff(dim=1) > 0).all() and len(ordered.unique(dim=0)) == 600
    share = torch.bincount(patches.flatten(), minlength=49) / 600  # 20 of 49, give or take 0.02
    assert len(share) == 49 and (share - 20 / 49).abs().max() < 0.08
    few = narrow.batches(narrow.settings(COMMON + LOCAL + " --patches 5"))
    assert few.patch_idx(0).shape == (12, 5)


def test_slices_are_trained_on_in_another_order_each_epoch():
    batches = narrow.batches(narrow.settings(COMMON))
    assert batches.steps_per_epoch == 7 and len(batches.held_out) == 12
    epochs = np.stack([np.concatenate([batches.indices(7 * e + t) for t in range(7)]) for e in range(5)])  # (5, 84)
    assert all(len(set(e)) == 84 and not set(e) & set(batches.held_out) for e in epochs)
    assert all((a != b).mean() > 0.9 for a, b in zip(epochs, epochs[1:], strict=False))


def test_held_out_are_128_slices_from_anywhere_or_an_eighth_of_few():
    for count, held_out in ((100, 12), (1023, 127), (1025, 128), (5000, 128), (10, 2)):
        one, other = (datasets.Batches(narrow.settings(COMMON + f" --seed {seed}"), count, narrow.ALONE)
                      for seed in (0, 1))
        assert len(one.held_out) == held_out == len(set(one.held_out))
        assert sorted([*one.held_out, *one.trained]) == list(range(count))
        if count > 10:  # of all volumes, not of the first ones; each seed has its own
            assert 0.3 < np.mean(one.held_out) / count < 0.7 and set(one.held_out) != set(other.held_out)


# ---------------------------------------------------------------------------------------- what holds without any flag

# Of mmselfsup (configs/selfsup/_base_/{models/mocov2,schedules/sgd_coslr-200e_in1k,datasets/imagenet_mocov2}.py and
# 8 GPUs x 32), of the paper (ResNet-50, ImageNet's weights, K = 20), of IterNorm (64, 5); ours, as docs/decisions.md
# says, are the temperature of Eq. 2, lambda, the HU window and the side of a slice.
PRE_TRAINING = dict(batch_size=256, bn_group=32, lr=0.03, weight_decay=1e-4, epochs=200, queue=65536, ema=0.999,
                    temperature=0.2, image_size=224, arch="resnet50", init="imagenet", patches=20, zca_group=64,
                    zca_iterations=5, temperature_local=0.2, lambda_local=1.0, window=(-175, 250), size=512, every=1,
                    seed=0, recipe="paper", geometric=True, local=False, zca=False)
# Of mmsegmentation: configs/_base_/schedules/schedule_40k.py, crops of 512 px and 4 GPUs x 4 images.
SEGMENTATION = dict(iterations=40_000, batch_size=16, crop_size=512, lr=0.01, arch="resnet50", whitening="bn",
                    flip=True, whole_slices=False, window=(-175, 250), seed=0, eval_every=4000)


@pytest.mark.parametrize("phantom", [False, True])
def test_settings_without_flags_are_the_toolboxes(phantom):
    """On the phantom, where nothing is the toolboxes', what docs/training.md says of its preset."""
    args, expected = train_ssl.parse([]), dict(PRE_TRAINING)
    train_ssl.resolve_defaults(args, phantom)
    if phantom:
        expected |= dict(arch="resnet18", init="phantom-start", image_size=64, size=192, batch_size=64, epochs=10,
                         queue=256, ema=0.99, lr=0.01)
    for key, value in expected.items():
        found = getattr(args, key)
        assert (tuple(found) if key == "window" else found) == value, key
    args, expected = train_seg.parse(["--split", "100"]), dict(SEGMENTATION)
    train_seg.resolve_defaults(args, phantom)
    if phantom:
        expected |= dict(arch="resnet18", crop_size=96)
    for protocol, iterations, lr, whole in (("linear-frozen", 300, 0.2, True), ("linear-finetune", 100, 0.05, False),
                                            ("deeplabv3plus", 60, 0.05, False)):
        own = dict(iterations=iterations, lr=lr, whole_slices=whole) if phantom else {}
        of_one = train_seg.recipe(args, protocol)
        for key, value in (expected | own).items():
            found = getattr(of_one, key)
            assert (tuple(found) if key == "window" else found) == value, (protocol, key)


@pytest.mark.parametrize("batch, lr", [(64, 0.0075), (128, 0.015), (256, 0.03), (512, 0.06)])
def test_the_learning_rate_follows_the_batch_unless_it_is_given(batch, lr):
    """0.03 for a batch of 256, in proportion: MoCo's README has 0.015 for 128."""
    assert narrow.settings(f"--batch-size {batch}").lr == pytest.approx(lr)
    assert narrow.settings(f"--batch-size {batch} --lr 0.5").lr == 0.5


def test_what_the_first_authors_recipe_sets_otherwise():
    """The published code (e6e1990): weight decay 1e-6, one group of all channels; LinearLR from epoch 5 to 500 of 300,
    from a third."""
    for flags, batch in (("--recipe author", 128), ("--recipe author --zca", 64)):
        args = narrow.settings(flags)
        assert (args.weight_decay, args.zca_group, args.lr, args.epochs, args.image_size, args.geometric) == (
            1e-6, 0, 0.03, 300, 336, True)
        assert (args.batch_size, args.bn_group, *args.window) == (batch, 64, -1024, 3071)
    share = [recipes.author_schedule(t, 3000) for t in (0, 49, 50, 2999)]
    assert share == pytest.approx([1, 1, 1 / 3, 1 / 3 + 2 / 3 * 2949 / 4949])


@pytest.mark.parametrize("recipe", ["paper", "author"])
def test_the_whitening_has_the_affine_of_the_norm_that_it_replaces(tmp_path, recipe):
    """Which has learned in the run that --init names. The first author's published code has a fresh one."""
    run = Path(__file__).parent / "golden" / "moco-local-zca-aligned"
    shutil.copytree(run, tmp_path / run.name)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    norm = train_ssl.build(narrow.settings(
        COMMON + f" --arch resnet_basic --zca --zca-group 4 --recipe {recipe} --bn-group 12 --out {tmp_path} --init "
        f"{run.name}")).encoder_q.backbone.layer4[-1].bn2
    for name, fresh in (("weight", 1), ("bias", 0)):
        before = saved[f"encoder_q.backbone.layer4.0.bn2.{name}"]
        assert (before != fresh).all() and before.std() > 1e-3
        expected = before if recipe == "paper" else torch.full_like(before, fresh)
        assert torch.equal(getattr(norm, name).detach(), expected)
