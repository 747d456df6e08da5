"""Augmentation: what a label says is what was done to the image."""
import numpy as np
import pytest
import torch

from twosdm import Augment


def smooth(x, y):
    """A function of position (in pixels from the center) without symmetry, (2 channels, H, W)."""
    wave = 0.6 * np.cos(0.21 * x + 0.34 * y + 0.5)
    blob = 1.5 * np.exp(-((x - 5) ** 2 + (y + 3) ** 2) / 60)
    return torch.from_numpy(np.stack([wave, blob - 0.7]))


def positions(height, width):
    """(2, H, W): x and y of each pixel, from the center."""
    y, x = np.mgrid[:height, :width]
    x = x - (width - 1) / 2
    y = y - (height - 1) / 2
    return np.stack([x, y])


def turn(angle):
    """Counter-clockwise as one looks at the image, whose y points down."""
    cos = np.cos(angle)
    sin = np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]])


def claimed(label, height, width, sign):
    """What a label says that an image of `smooth` became, and where that is not near a reflection's kink.

    `sign` is that of the stretch, which the label leaves open: n along r is -n along r + 180 degrees.
    """
    flip_x, flip_y, zoom, cos, sin, a, b, *n_xy = label.double().numpy()
    n = sign * np.hypot(a, b)
    axes = turn(np.arctan2(b, a))
    forward = np.diag([1 - 2 * flip_x, 1 - 2 * flip_y])
    forward = 2 ** (0.2 * zoom) * forward
    forward = turn(np.arctan2(sin, cos + 1)) @ forward
    forward = axes @ np.diag([2 ** (0.2 * n), 2 ** (-0.2 * n)]) @ axes.T @ forward
    size = np.array([[width], [height]])
    shift = 0.125 * size * np.array(n_xy)[:, None]
    moved = positions(height, width).reshape(2, -1) - shift
    source = np.linalg.inv(forward) @ moved
    last = (size - 1) / 2
    source = last - np.abs((source + last) % (4 * last) - 2 * last)
    clear = (np.abs(source) < last - 3.5).all(0)
    image = smooth(*source.reshape(2, height, width))
    return image, torch.from_numpy(clear).reshape(height, width)


@pytest.mark.parametrize("p", [0.15, 1])
def test_a_label_says_what_was_done(p):
    """Also that the surroundings are a reflection of the image."""
    torch.manual_seed(0)
    height = 48
    image = smooth(*positions(height, 32)).float()
    out, labels = Augment(p)(image.expand(200, 2, height, 32))
    signs = set()
    for got, label in zip(out, labels):
        errors = {}
        for sign in (1, -1):
            expected, clear = claimed(label, height, 32, sign)
            assert clear.sum() > 200
            errors[sign] = (got - expected)[:, clear].abs().max()
        assert min(errors.values()) < 0.01, label
        signs.add(min(errors, key=errors.get))
    assert signs == {1, -1}


def test_flips_and_leaving_an_image_alone_are_exact():
    torch.manual_seed(0)
    images = torch.randn(400, 3, 9, 12)
    before = images.clone()
    out, labels = Augment(0.3)(images)
    for x_flip, dims in ((0, ()), (1, (3,))):
        for y_flip, more in ((0, ()), (1, (2,))):
            rows = (labels == torch.tensor([x_flip, y_flip] + [0] * 7)).all(1)
            assert rows.any()
            assert torch.equal(out[rows], before[rows].flip([*dims, *more]))


def test_each_transform_comes_at_its_rate():
    torch.manual_seed(0)
    p = 0.15
    _, labels = Augment(p)(torch.zeros(20_000, 1, 2, 2))
    # x-flip, y-flip, scale, rotation, stretch (half of them along the image's axes), shifts
    rates = torch.tensor([0.5, p / 2, p, p, p, p, p / 2, p, p])
    assert ((labels != 0).float().mean(0) - rates).abs().max() < 0.012
    x_flip, y_flip, zoom, cos, sin, a, b, n_x, n_y = labels.T
    for normal in (zoom, torch.hypot(a, b) * a.sign(), n_x, n_y):
        assert abs(normal[normal != 0].std() - 1) < 0.05
    turned = cos[sin != 0] + 1                        # by any angle of the full circle
    assert abs(turned.mean()) < 0.05
    assert turned.min() < -0.99
    assert abs(sin.mean()) < 0.01
