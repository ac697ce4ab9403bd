"""local_loss.py: Eq. 2 and the pooling of cells against loops in float64."""

import math

import pytest
import torch
from torchvision.ops import roi_align

from local_loss import local_info_nce, pool_boxes, pool_cells, take_patches


def test_eq_2_against_a_loop():
    torch.manual_seed(0)
    query, key, tau = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64), 0.3

    def sim(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)) / tau

    losses = []
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        for i in range(5):
            losses.append(-math.log(math.exp(sim(q[i], k[i])) / sum(math.exp(sim(q[i], k[j])) for j in range(5))))
    torch.testing.assert_close(local_info_nce(query, key, tau).item(), sum(losses) / len(losses))


def test_limits():
    x = torch.eye(20)[None].repeat(2, 1, 1)
    assert local_info_nce(x, x, 0.05) < 1e-6  # orthogonal patches that agree with themselves
    assert local_info_nce(torch.ones(2, 20, 4), torch.ones(2, 20, 4), 0.2).item() == pytest.approx(math.log(20))
    with torch.autocast("cpu", torch.bfloat16):
        assert local_info_nce(x.bfloat16(), x.bfloat16(), 0.2).dtype == torch.float32


@pytest.mark.parametrize("height,width", [(7, 7), (56, 56), (61, 45)])
def test_cells_are_means_of_disjoint_blocks(height, width):
    x = torch.randn(2, 3, height, width)
    h, w = height // 7, width // 7
    cells = pool_cells(x)
    assert cells.shape == (2, 49, 3)
    for row in range(7):
        for column in range(7):
            block = x[:, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
            torch.testing.assert_close(cells[:, 7 * row + column], block.mean((2, 3)))


def test_patches_are_the_cells_asked_for_and_too_many_are_refused():
    cells, patches = torch.randn(2, 49, 3), torch.tensor([[4, 48], [0, 7]])
    taken = take_patches(cells, patches)
    assert torch.equal(taken[0, 1], cells[0, 48]) and torch.equal(taken[1, 0], cells[1, 0])
    with pytest.raises(ValueError, match="50 patches"):
        take_patches(cells, torch.zeros(2, 50, dtype=torch.int64))
    with pytest.raises(ValueError, match="50"):
        local_info_nce(torch.randn(1, 50, 3), torch.randn(1, 50, 3), 0.2)
    with pytest.raises(ValueError, match="6, 9"):
        pool_cells(torch.randn(1, 3, 6, 9))


@pytest.mark.parametrize("side", [7, 14, 56])
def test_whole_boxes_are_the_cells(side):
    x = torch.randn(3, 5, side, side)
    whole, still = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3), torch.zeros(3, dtype=torch.bool)
    torch.testing.assert_close(pool_boxes(x, whole, still), pool_cells(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(pool_boxes(x.flip(3), whole, ~still), pool_cells(x), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert pool_boxes(x.bfloat16(), whole, still).dtype == torch.float32


def test_boxes_are_read_where_they_lie_and_gradients_reach_them():
    """A box of whole pixels against the mean of its blocks, in a mirrored and in a plain map."""
    x = torch.randn(2, 3, 28, 28)
    box = torch.tensor([[7 / 28, 14 / 28, 7 / 28, 14 / 28]] * 2)  # rows 7 to 13, columns 14 to 27
    blocks = x[:, :, 7:14, 14:28].reshape(2, 3, 7, 1, 7, 2).mean((3, 5)).flatten(2).mT
    for mirrored in (False, True):
        seen = (x.flip(3) if mirrored else x).clone().requires_grad_()
        cells = pool_boxes(seen, box, torch.full((2,), mirrored))
        torch.testing.assert_close(cells, blocks, rtol=0, atol=1e-5)
        cells.sum().backward()
        grad = seen.grad.flip(3) if mirrored else seen.grad
        assert (grad[:, :, 7:14, 14:28] > 0).all() and grad.abs().sum() == pytest.approx(2 * 3 * 49, rel=1e-4)


@pytest.mark.parametrize("height,width", [(16, 16), (56, 56), (9, 30)])
def test_boxes_are_pooled_as_torchvisions_roi_align_does(height, width):
    """Of any size, within a pixel too, in plain and in mirrored maps; values and gradients."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, height, width).contiguous(memory_format=torch.channels_last)
    length = torch.rand(40, 2) * 0.95 + 0.05
    box = torch.cat([torch.rand(40, 2) * (1 - length), length], 1)
    top, left, tall, wide = box.unbind(1)
    corners = torch.stack([left * width, top * height, (left + wide) * width, (top + tall) * height], 1)
    corners = torch.cat([torch.arange(40.0)[:, None], corners], 1)
    weight = torch.randn(40, 49, 3)
    for mirrored in (False, True):
        plain, seen = x.clone().requires_grad_(), (x.flip(3) if mirrored else x.clone()).requires_grad_()
        expected = roi_align(plain, corners, 7, aligned=True).flatten(2).mT
        cells = pool_boxes(seen, box, torch.full((40,), mirrored))
        torch.testing.assert_close(cells, expected, rtol=0, atol=2e-5)
        (expected * weight).sum().backward()
        (cells * weight).sum().backward()
        grad = seen.grad.flip(3) if mirrored else seen.grad
        torch.testing.assert_close(grad, plain.grad, rtol=0, atol=1e-4)
