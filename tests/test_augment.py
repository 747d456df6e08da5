"""Augmentation: what a label says is what was done to the image."""
import math

import numpy as np
import pytest
import torch

from twosdm import Augment, filters

COLUMNS = ("coin flip zoom turn angle stretch frame direction shift "
           "n_zoom n_stretch n_x n_y").split()


def draws(batch=1, **values):
    """Draws that leave the image alone, except for the given columns; angles in radians."""
    table = torch.ones(batch, 13)
    for name, value in values.items():
        angle = name in ("angle", "direction")
        table[:, COLUMNS.index(name)] = value / (2 * math.pi) + 0.5 if angle else value
    return table


def smooth(x, y):
    """A function of position (in pixels from the centre) without symmetry, (..., 2 channels)."""
    wave = np.cos(0.21 * x + 0.34 * y + 0.5) * 0.6
    blob = np.exp(-((x - 5) ** 2 + (y + 3) ** 2) / 60)
    return np.stack([wave, blob * 1.5 - 0.7])


def picture(size=32, height=None):
    y, x = np.mgrid[:height or size, :size] - np.array([(height or size) - 1, size - 1])[:, None, None] / 2
    return torch.from_numpy(smooth(x, y)).float()[None], x, y


def by_label(label, size):
    """(what the label claims the image to be, where the source lies inside) from the exact function."""
    image, x, y = picture(size)
    flip_x, flip_y, zoom, cos, sin, a, b, n_x, n_y = label.double().numpy()
    n, r = np.hypot(a, b), np.arctan2(b, a)
    up = np.array([[1, 0], [0, -1]])                     # to axes in which y points up, and back

    def turn(t):
        return up @ np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) @ up

    stretch = turn(r) @ np.diag([2 ** (0.2 * n), 2 ** (-0.2 * n)]) @ turn(-r)
    flip = np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
    forward = stretch @ turn(np.arctan2(sin, cos + 1)) * 2 ** (0.2 * zoom) @ flip
    moved = np.stack([x - 0.125 * size * n_x, y - 0.125 * size * n_y]).reshape(2, -1)
    source = (np.linalg.inv(forward) @ moved).reshape(2, size, size)
    inside = (np.abs(source) < size / 2 - 4).all(0)
    return torch.from_numpy(smooth(*source)).float(), torch.from_numpy(inside)


def test_label_zero_is_the_identity_bit_for_bit():
    images = torch.randn(64, 3, 16, 16)
    out, labels = Augment(0.3)(images, Augment(0.3).draw(64, torch.Generator().manual_seed(0)))
    zero = (labels == 0).all(1)
    assert 0 < zero.sum() < 64 and torch.equal(out[zero], images[zero])
    out, labels = Augment(0)(images, draws(64))
    assert torch.equal(out, images) and not labels.any()


def test_flips_are_exact_and_the_x_flip_does_not_depend_on_p():
    images = torch.randn(3, 3, 9, 12)
    for p, columns, dims, bits in [(0, dict(coin=0), [3], [1, 0]), (0.5, dict(flip=0), [2], [0, 1]),
                                   (0.5, dict(coin=0, flip=0), [2, 3], [1, 1])]:
        out, labels = Augment(p)(images, draws(3, **columns))
        assert torch.equal(out, images.flip(dims))
        assert torch.equal(labels, torch.tensor([bits + [0] * 7]).expand(3, 9).float())


@pytest.mark.parametrize("columns", [
    dict(zoom=0, n_zoom=1.0), dict(zoom=0, n_zoom=-1.5), dict(turn=0, angle=0.4), dict(turn=0, angle=-2.0),
    dict(stretch=0, n_stretch=1.2), dict(stretch=0, n_stretch=1.2, frame=0, direction=0.7),
    dict(shift=0, n_x=0.6, n_y=-0.3), dict(coin=0, turn=0, angle=0.4), dict(flip=0, shift=0, n_x=0.5, n_y=0),
    dict(coin=0, flip=0, zoom=0, n_zoom=-0.7, turn=0, angle=2.5, stretch=0, n_stretch=0.9, frame=0,
         direction=-1.0, shift=0, n_x=0.3, n_y=-0.4)])
def test_a_label_says_what_was_done(columns):
    image = picture()[0]
    out, labels = Augment(0.5)(image, draws(**columns))
    expected, inside = by_label(labels[0], 32)
    assert inside.sum() > 200
    assert (out[0] - expected)[:, inside].abs().max() < 0.02


def test_a_negative_stretch_is_the_other_axis():
    image = picture()[0]
    a = Augment(1)(image, draws(zoom=2, turn=2, shift=2, flip=2, stretch=0, n_stretch=-1.0))[0]
    b = Augment(1)(image, draws(zoom=2, turn=2, shift=2, flip=2, stretch=0, n_stretch=1.0, frame=0,
                                direction=math.pi / 2))[0]
    assert (a - b).abs().max() < 1e-4


def test_a_quarter_turn_is_rot90_and_a_half_turn_both_flips():
    image = picture()[0]
    for angle, expected in ((math.pi / 2, image.rot90(1, (2, 3))), (-math.pi / 2, image.rot90(-1, (2, 3))),
                            (math.pi * 0.999999, image.flip(2, 3))):
        out, _ = Augment(0.5)(image, draws(turn=0, angle=angle))
        assert (out - expected)[:, :, 3:-3, 3:-3].abs().max() < 0.01


@pytest.mark.parametrize("height", [32, 48])
def test_a_shift_by_whole_pixels_is_a_roll(height):
    image = picture(32, height)[0]
    out, labels = Augment(0.5)(image, draws(shift=0, n_x=5 / (32 / 8), n_y=-3 / (height / 8)))
    assert (out - image.roll((-3, 5), (2, 3)))[:, :, 6:-6, 11:-6].abs().max() < 1e-5
    assert torch.equal(labels[0, 7:], torch.tensor([1.25, -24 / height]))


def test_the_surroundings_are_a_reflection():
    image = picture()[0]
    out, _ = Augment(0.5)(image, draws(shift=0, n_x=2.0, n_y=0))                # by 8 pixels
    assert (out[..., 4:-4, 1:8] - image[..., 4:-4, 1:8].flip(3)).abs().max() < 0.02
    far, _ = Augment(0.5)(image, draws(shift=0, n_x=31 / 2, n_y=0))             # by 62, one period
    assert (far - image).abs().max() < 0.05


def test_scale_two_doubles():
    image, x, y = picture()
    out, labels = Augment(0.5)(image, draws(zoom=0, n_zoom=5.0))
    assert (out[0] - torch.from_numpy(smooth(x / 2, y / 2)).float())[:, 2:-2, 2:-2].abs().max() < 0.01


def test_doubling_then_halving_is_the_identity_inside():
    up, down, at = filters(16, torch.device("cpu"))
    assert (down @ up - torch.eye(16))[4:-4].abs().max() < 1e-6
    line = up @ torch.arange(16.0)
    assert (line - at)[10:-10].abs().max() < 1e-5              # a fine sample has the value of its place


def test_there_and_back_loses_little():
    image = picture(64)[0]
    there = Augment(0.5)(image, draws(turn=0, angle=0.6))[0]
    back = Augment(0.5)(there, draws(turn=0, angle=-0.6))[0]
    assert (back - image)[:, :, 16:-16, 16:-16].abs().max() < 0.02


def test_processes_and_micro_batches_see_the_same():
    augment, images = Augment(0.5), torch.randn(13, 3, 16, 16).clamp(-1, 1)
    table = augment.draw(13, torch.Generator().manual_seed(3))
    out, labels = augment(images, table)
    for a, b in ((0, 1), (1, 6), (6, 13)):
        part, part_labels = augment(images[a:b], table[a:b])
        assert (part - out[a:b]).abs().max() < 1e-5 and torch.equal(part_labels, labels[a:b])


def test_draws_depend_on_the_generator_alone():
    one, two = (Augment(0.2).draw(5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (5, 13)
    assert not torch.equal(one, Augment(0.2).draw(5))


def test_each_transform_comes_at_its_rate():
    p, count = 0.15, 20_000
    augment = Augment(p)
    labels = augment(torch.zeros(count, 1, 2, 2), augment.draw(count, torch.Generator().manual_seed(0)))[1]
    on = torch.stack([labels[:, 0], labels[:, 1], labels[:, 2], labels[:, 4], labels[:, 5:7].abs().amax(1),
                      labels[:, 6], labels[:, 7], labels[:, 8]]).ne(0).float().mean(1)
    assert (on - torch.tensor([0.5, p / 2, p, p, p, p / 2, p, p])).abs().max() < 0.012
    normal = labels[:, 2][labels[:, 2] != 0]
    assert abs(normal.std() - 1) < 0.05 and abs(labels[:, 4].mean()) < 0.01
    cos = labels[:, 3][labels[:, 4] != 0] + 1
    assert abs(cos.mean()) < 0.05 and cos.min() < -0.99 and cos.max() > 0.99           # the full circle


def test_dtype_and_inputs_are_kept():
    images = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16)
    before = images.clone()
    out, labels = Augment(1)(images)
    assert out.dtype == images.dtype and out.shape == images.shape and torch.equal(images, before)
    assert labels.shape == (4, 9) and labels.dtype == torch.float32 and out.isfinite().all()
