"""The paper's metrics: each a function of plain arrays, straight from its formula.

    python evaluate.py                                       the newest runs: a row of Table 1 for each method
    python evaluate.py --dataset afhq --n 50000 --method 2sdm baseline
    python evaluate.py --images samples/ --reference afhqv2-64x64.npz       any images, any usual reference
    python evaluate.py --history                             FID at each snapshot: Fig. 5
    python evaluate.py --nearest clip                        does the model copy? Figs. 6, 7 and 11 to 13
    python evaluate.py --embeddings                          the prior alone, in the space of y

    frechet_distance    FID and sFID: how far apart two sets are, as Gaussians of their features
    inception_score     how sure a classifier is of each image, and how varied over the images
    precision_recall    the share of samples that look real; the share of the data that can be sampled
    nearest             the most similar training images
    InceptionFeatures   images -> the features that the first three are computed from
    Lpips               perceptual distance of two images, also as an embedding for `nearest`

Values are comparable only with the same network (Inception of 2015-12-05), the same resize (TensorFlow 1's
bilinear), the same rounding to uint8 and the same number of images: a number is reported with its protocol.
Features are cached in runs/<dataset>/features, so that metrics are recomputed in seconds and an interrupted
evaluation goes on where it stopped. torchrun spreads sampling and networks over processes.
"""
import argparse
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import sample
import twosdm
from twosdm import UserError, to_uint8

# ============================================================================================================
# 1 Metrics: functions of arrays, of NumPy or torch, in float64
# ============================================================================================================

class RunningStats:
    """Mean and covariance of a stream of feature rows, in memory of size D x D however many rows pass.

    A union's scatter matrix comes from those of its parts (Chan, Golub & LeVeque 1979). No large sums are
    subtracted from each other, so an offset costs no digits, and processes combine theirs with `merge`.
    """

    def __init__(self, dims, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dims, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dims, dims, dtype=torch.float64, device=device)  # sum (x - mu)(x - mu)'

    def update(self, features):
        """Add the rows of features (N, D)."""
        x = torch.as_tensor(features).to(self.mean)                                       # (N, D)
        centred = x - x.mean(0)
        return self.merge(len(x), x.mean(0), centred.T @ centred)

    def merge(self, n, mean, scatter):
        """Add the n rows that another process has seen, of mean (D,) and scatter (D, D)."""
        if n:
            step = mean.to(self.mean) - self.mean
            self.scatter += scatter.to(self.mean) + torch.outer(step, step * (self.n * n / (self.n + n)))
            self.mean += step * (n / (self.n + n))
            self.n += n
        return self

    def result(self):
        """-> mu (D,), sigma (D, D), float64 arrays; the covariance divides by N - 1. UserError if N < 2."""
        if self.n < 2:
            raise UserError(f"A covariance needs at least two images, got {self.n}: evaluate more images.")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017, Eq. 6.

    (D,), (D, D), (D,), (D, D) -> float >= 0. With sigma1 = R R', sigma1 sigma2 has the eigenvalues of the
    symmetric R' sigma2 R: real, and nonnegative up to rounding, also with fewer images than dimensions, where
    a general matrix root turns complex or needs an epsilon that changes the value.
    """
    mu1, mu2 = (np.atleast_1d(mu).astype(np.float64) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(sigma).astype(np.float64) for sigma in (sigma1, sigma2))
    assert mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))                                              # (D, D), R
    trace = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(logits, splits=10, block=None, shuffle_seed=None):
    """exp of the mutual information of image and class: Salimans et al. 2016, Sec. 4.

    (N, K) -> (mean, std) over the splits, each at least 1. `splits` cuts the rows evenly; `block` cuts after
    every so many rows instead, and the last block is what is left. Cuts are consecutive, so rows sorted by
    class score far too low: `shuffle_seed` shuffles them first. Our protocol is block=5000, shuffled.
    Raises UserError if there are fewer rows than splits.
    """
    logits = torch.as_tensor(logits)
    n = len(logits)
    if n < (splits if block is None else 1):
        raise UserError(f"An Inception Score needs an image in each of its {splits if block is None else 1} "
                        f"splits, got {n} images: use fewer splits or more images.")
    if shuffle_seed is not None:                              # RandomState: NumPy promises never to change it
        order = np.random.RandomState(shuffle_seed).permutation(n)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    edges = [i * n // splits for i in range(splits + 1)] if block is None else [*range(0, n, block), n]
    scores = []
    for start, stop in zip(edges, edges[1:]):
        log_p = logits[start:stop].double().log_softmax(1)                                # (n, K)
        p, marginal = log_p.exp(), log_p.exp().mean(0)                                    # (n, K), (K,)
        # xlogy(0, 0) = 0: a class whose probability underflows adds nothing.
        information = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(information.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def _blocks(x, centre=None):
    """(N, ...) -> pairs of first row and float64 rows (n, D) minus centre, about 64 MB or less at a time."""
    size = min(1024, max(16, 2**23 // math.prod(x.shape[1:])))
    for start in range(0, len(x), size):
        rows = torch.as_tensor(x[start:start + size]).flatten(1)
        yield start, rows.double() if centre is None else rows - centre


def _centre(x):
    """(N, ...) -> (D,): the origin for both sides of a distance, so that an offset costs no digits."""
    return sum(rows.sum(0) for _, rows in _blocks(x)) / len(x)


def _rounding(dims):
    """How far |a|^2 - 2ab + |b|^2 may be off in float64, relative to |a|^2 + |b|^2, with room to spare."""
    return 16 * math.sqrt(dims) * torch.finfo(torch.float64).eps


def _squared_norms(a):
    return torch.linalg.vector_norm(a, dim=1).square()        # a.square() would fill another 16 MB


def _squared_distances(a, b):
    """(n, D), (m, D) -> (n, m). What rounding cannot tell from 0 is 0, so copies are at distance 0."""
    scale = _squared_norms(a)[:, None] + _squared_norms(b)                                # (n, m)
    distances = torch.addmm(scale, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= _rounding(a.shape[1]) * scale, 0)


def _balls(x, k, centre):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest other row, its rim included."""
    nearby = torch.full((len(x), k), math.inf, dtype=torch.float64, device=centre.device)
    norms = torch.empty_like(nearby[:, 0])

    def keep(rows, distances):
        nearby[rows] = torch.cat([nearby[rows], distances], 1).topk(k, largest=False).values

    for i, a in _blocks(x, centre):
        rows = slice(i, i + len(a))
        norms[rows] = _squared_norms(a)
        for j, b in _blocks(x[i:], centre):                   # each pair once: the distance is symmetric
            distances = _squared_distances(a, b)                                          # (n, m)
            if j == 0:
                distances.fill_diagonal_(math.inf)
            else:
                keep(slice(i + j, i + j + len(b)), distances.T)
            keep(rows, distances)
    radii = nearby[:, -1]
    # A radius is compared with another rounded distance: on the rim they must count as equal.
    return radii + 6 * _rounding(x.shape[1]) * (norms + radii)


def precision_recall(real, fake, k=3):
    """Improved precision and recall: Kynkäänniemi et al. 2019, Eq. 1-2; (N, D), (M, D) -> two shares.

    A set covers the balls around its samples, each reaching to the k-th nearest other one. Precision is the
    share of fake that real covers, recall the share of real that fake covers; on the rim is inside. In
    float64: the float16 of OpenAI's evaluator reads 0.001 to 0.003 higher. Raises UserError unless N, M > k.
    """
    for name, x in ("real", real), ("generated", fake):
        if len(x) <= k:
            raise UserError(f"Precision and recall need more than k = {k} {name} images, got {len(x)}.")
    centre = _centre(real)
    real_balls, fake_balls = _balls(real, k, centre), _balls(fake, k, centre)             # (N,), (M,)
    real_inside = torch.zeros_like(real_balls, dtype=torch.bool)
    fake_inside = torch.zeros_like(fake_balls, dtype=torch.bool)
    for i, a in _blocks(real, centre):
        for j, b in _blocks(fake, centre):
            distances, rows, columns = _squared_distances(a, b), slice(i, i + len(a)), slice(j, j + len(b))
            fake_inside[columns] |= (distances <= real_balls[rows, None]).any(0)
            real_inside[rows] |= (distances <= fake_balls[columns]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def nearest(queries, gallery, k=1, metric="euclidean", exclude_self=False):
    """The k nearest rows of the gallery for each query: (Q, ...), (G, ...) -> distances, indices (Q, k).

    Arrays, the nearest first. `gallery` may also be an iterable of chunks, each seen once, so that a data set
    need not fit in memory. metric: "euclidean", or "cosine" for 1 - cos. `exclude_self`: queries and gallery
    are the same rows, and none is its own neighbour. Distances between rows of `Lpips.embed`, squared, are
    LPIPS. Raises UserError if the gallery has too few rows.
    """
    assert metric in ("euclidean", "cosine") and k >= 1
    chunks = [gallery] if hasattr(gallery, "shape") else gallery
    if metric == "cosine":                                    # of unit vectors, 1 - cos = |u - v|^2 / 2
        def unit(x):
            return F.normalize(torch.as_tensor(x).flatten(1).double(), dim=1)

        queries, chunks = unit(queries), map(unit, chunks)
    centre, seen = _centre(queries), 0
    best = torch.full((len(queries), k), math.inf, dtype=torch.float64, device=centre.device)
    index = torch.full_like(best, -1, dtype=torch.int64)
    for chunk in chunks:
        for _, b in _blocks(chunk, centre):
            columns = torch.arange(seen, seen + len(b), device=centre.device)
            for i, a in _blocks(queries, centre):
                distances, rows = _squared_distances(a, b), slice(i, i + len(a))          # (n, m)
                if exclude_self:
                    itself = columns == torch.arange(i, i + len(a), device=centre.device)[:, None]
                    distances.masked_fill_(itself, math.inf)
                best[rows], order = torch.cat([best[rows], distances], 1).topk(k, largest=False)
                index[rows] = torch.cat([index[rows], columns.expand_as(distances)], 1).gather(1, order)
            seen += len(b)
    if seen < k + exclude_self:
        raise UserError(f"{k} nearest neighbours need {k + exclude_self} images to search, got {seen}.")
    return (best / 2 if metric == "cosine" else best.sqrt()).cpu().numpy(), index.cpu().numpy()


# ============================================================================================================
# 2 Networks: from images to features
# ============================================================================================================

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
TORCHVISION_URL = "https://download.pytorch.org/models/"
LPIPS_NETS = {                     # the ReLUs that are compared, the files of the linear layers and the trunk
    "alex": ((1, 4, 7, 9, 11), "lpips-v0.1-alex-df73285e.pth", "alexnet-owt-7be5be79.pth"),
    "vgg": ((3, 8, 15, 22, 29), "lpips-v0.1-vgg-a78928a0.pth", "vgg16-397923af.pth"),
}


@contextlib.contextmanager
def _exactly():
    """Plain float32 without gradients: TF32 or autocast would change the third digit of a feature."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.autocast("cuda", enabled=False):
            with torch.autocast("cpu", enabled=False):
                yield
    finally:
        for switch, allowed in zip(switches, before):
            switch.allow_tf32 = allowed


def _load_public(module, path, url, name, prefix=""):
    """Fill module with the tensors of a public file named prefix...; -> the first 8 digits of its sha256.

    path None: the file `name` in PyTorch's cache, downloaded from `url` if it is not there; the name ends in
    the hash it must have. Raises UserError if the file is missing, or does not fit tensor for tensor.
    """
    file = Path(path) if path is not None else Path(torch.hub.get_dir(), "checkpoints", name)
    if path is None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:              # no connection; a file with another hash
            raise UserError(f"{name} could not be downloaded ({error}): fetch {url} on another machine and "
                            f"give its path, or save it as {file}.") from None
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        if path is None and not name.endswith(f"-{digest}.pth"):
            raise ValueError(f"its sha256 begins with {digest}")
        state = torch.load(file, map_location="cpu", weights_only=True)
        # A plain dict carries no version, and without one BatchNorm does not ask for its batch counter.
        module.load_state_dict({key[len(prefix):]: x for key, x in state.items() if key.startswith(prefix)})
    except Exception as error:                                # a wrong file fails in a dozen ways
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{file} is not {name}, which is wanted here: fetch {url} ({reason}).") from None
    return digest


def tf1_resize(images, size=299):
    """TensorFlow 1's bilinear resize: (N, C, H, W) floats -> (N, C, size, size).

    Output i reads input coordinate i * in / size: the top left corners are aligned and nothing is smoothed,
    which no mode of F.interpolate does. Every published FID contains it. It is linear in each axis.
    """
    def weights(n):
        source = (torch.arange(size, dtype=torch.float64) * n / size).clamp(max=n - 1)
        tents = (1 - (source[:, None] - torch.arange(n)).abs()).clamp(min=0)              # (size, n)
        return tents.to(images)

    return weights(images.shape[2]) @ images @ weights(images.shape[3]).T


def _repool(block, pool):
    """Give the pooling branch of a torchvision Inception block pool(input), not a zero-padded average."""
    held = []
    block.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, args: (pool(held.pop()),))


class InceptionFeatures(nn.Module):
    """The Inception-v3 of 2015-12-05, which FID is defined by: (N, 3, H, W) uint8 or [-1, 1] -> dict of

    pool     (N, 2048)   the last feature map, averaged: FID, precision and recall
    spatial  (N, 2023)   seven channels of a 17 x 17 map: sFID, Nash et al. 2021
    logits   (N, 1008)   without the bias: the Inception Score

    weights: the path of the public file, or None to download it. `sha256` is the beginning of its hash, for
    the protocol: the public one is 6726825d. Raises UserError if the file is missing or wrong.
    """
    label, resize, dims = "Inception 2015-12-05", "TF1 bilinear to 299", (2048, 2023)

    def __init__(self, weights=None):
        super().__init__()
        self.net = torchvision.models.Inception3(
            num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        self.sha256 = _load_public(self.net, weights, INCEPTION_URL, INCEPTION_URL.rsplit("/", 1)[1])
        self.net.fc.bias.data.zero_()
        # TensorFlow's average does not count the padding, and in this graph the last block has a maximum.
        for name in "5b 5c 5d 6b 6c 6d 6e 7b".split():
            _repool(self.net.get_submodule("Mixed_" + name),
                    lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        _repool(self.net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
        taps = self.taps = {}
        self.net.avgpool.register_forward_hook(lambda _, args, x: taps.update(pool=x.flatten(1)))
        # Channels last in the row: the order of OpenAI's published mu_s and sigma_s.
        self.net.Mixed_6d.branch1x1.register_forward_hook(
            lambda _, args, x: taps.update(spatial=x[:, :7].permute(0, 2, 3, 1).flatten(1)))
        self.net.to(memory_format=torch.channels_last)        # in memory: half as fast again on a CPU
        self.eval()

    @_exactly()
    def forward(self, images):
        assert images.ndim == 4 and images.shape[1] == 3, f"(N, 3, H, W) expected, not {tuple(images.shape)}"
        x = to_uint8(images.to(self.net.fc.weight.device)).float()                        # (N, 3, H, W)
        x = (tf1_resize(x) - 128) / 128                                                   # (N, 3, 299, 299)
        logits = self.net(x.contiguous(memory_format=torch.channels_last))                # (N, 1008)
        return {"pool": self.taps.pop("pool"), "spatial": self.taps.pop("spatial"), "logits": logits}

    def train(self, mode=True):
        return super().train(False)                           # with a batch's statistics it is no metric


class Lpips(nn.Module):
    """LPIPS v0.1, Zhang et al. 2018, Eq. 1: two (N, 3, H, W), uint8 or floats in [-1, 1], not [0, 1] -> (N,).

    It is |embed(a) - embed(b)|^2, so the neighbours in a data set are a matrix product away. Images need 31
    pixels or more. weights: the paths (linear layers, torchvision's trunk); None for either downloads it.
    `sha256` has the beginnings of both hashes. Raises UserError if a file is missing or wrong.
    """

    def __init__(self, weights=None, net="alex"):
        super().__init__()
        self.taps, linear, trunk = LPIPS_NETS[net]
        linear_path, trunk_path = weights or (None, None)
        with torch.device("meta"):                            # most of these nets is a classifier, not wanted
            model = torchvision.models.alexnet() if net == "alex" else torchvision.models.vgg16()
        features = model.features.to_empty(device="cpu")
        self.trunk = features[:self.taps[-1] + 1]             # the last max-pool would fail at 32 pixels
        self.linear = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": nn.Sequential(    # the file's names
            nn.Identity(), nn.Conv2d(self.trunk[tap - 1].out_channels, 1, 1, bias=False))})
            for i, tap in enumerate(self.taps)})
        linear_url = LPIPS_URL + net + ".pth"
        self.sha256 = (_load_public(self.linear, linear_path, linear_url, linear),
                       _load_public(features, trunk_path, TORCHVISION_URL + trunk, trunk, prefix="features."))
        if any((w < 0).any() for w in self.linear.parameters()):
            raise UserError(f"{linear_path} has negative weights, so it is no distance: fetch {linear_url}.")
        # The mean and deviation of ImageNet's pixels, for the range [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @_exactly()
    def embed(self, images):
        """(N, 3, H, W) -> (N, M): each layer's features, of unit length per pixel, times sqrt(w / (h w))."""
        assert images.ndim == 4 and images.shape[1] == 3, f"(N, 3, H, W) expected, not {tuple(images.shape)}"
        x = images.to(self.shift.device)
        x = x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        x, parts = (x - self.shift) / self.scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)                                                                  # (N, C, h, w)
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                weight = self.linear[f"lin{self.taps.index(i)}"]["model"][1].weight       # (1, C, 1, 1)
                parts.append((unit * (weight / x[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, a, b):
        return (self.embed(a) - self.embed(b)).square().sum(1)


class WorldFeatures(nn.Module):
    """On the embedded world, where Inception means nothing: a small classifier of the world's attributes.

    (N, 3, H, W) uint8 or [-1, 1] -> dict of pool (N, 64), spatial (N, 448) and logits (N, 1536), those of the
    joint distribution of shape, colour, background and count as a product of four. It is independent of the
    embedder: other images, labels instead of captions. Its values compare with each other, not
    with Inception's.
    """
    label, resize, dims = "the world's own classifier (not comparable with Inception's)", "none", (64, 448)

    def __init__(self, width=24):
        super().__init__()
        w, relu = width, nn.ReLU()
        self.map = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), relu,
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.BatchNorm2d(2 * w), relu,
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.BatchNorm2d(2 * w), relu,
            nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1), nn.BatchNorm2d(2 * w), relu,
            nn.AdaptiveAvgPool2d(4))
        self.pool = nn.Sequential(nn.Flatten(), nn.Linear(32 * w, 64), relu)
        self.head = nn.Linear(64, sum(twosdm.ATTRIBUTES.values()))

    def features(self, x):
        """(N, 3, H, W) in [-1, 1] -> the last map (N, 2w, 4, 4) and its pooled form (N, 64)."""
        last = self.map(F.interpolate(x, (32, 32), mode="area") if x.shape[-1] > 32 else x)
        return last, self.pool(last)

    def heads(self, pool):
        """(N, 64) -> the logits of each attribute, a list of (N, K)."""
        return self.head(pool).split(list(twosdm.ATTRIBUTES.values()), 1)

    @_exactly()
    def forward(self, images):
        x = to_uint8(images.to(self.head.weight.device)).float() / 127.5 - 1
        last, pool = self.features(x)
        joint = torch.zeros(len(x), 1, device=x.device)
        for logits in self.heads(pool):                       # log p of independent attributes adds up
            joint = (joint[:, :, None] + logits.log_softmax(1)[:, None]).flatten(1)
        return {"pool": pool, "spatial": last[:, :28].flatten(1), "logits": joint}

    @classmethod
    def trained(cls, folder, resolution, device="cpu"):
        """The classifier for a resolution from its cache in `folder`; if absent, it is trained: a minute."""
        path, net = Path(folder) / f"classifier-{resolution}.pt", cls()
        if path.exists():
            net.load_state_dict(twosdm.load_checkpoint(path, stage="classifier")["net"])
        else:
            with torch.random.fork_rng():
                net = cls.fit(resolution, device)
            twosdm.save_checkpoint(path, stage="classifier", net=net.cpu().state_dict())
        net.sha256 = twosdm.fingerprint(net)
        return net.to(device).eval()

    @classmethod
    def fit(cls, resolution, device, size=20_000, epochs=3, batch=128):
        torch.manual_seed(0)
        net, index = cls().to(device).train(), torch.arange(10**9, 10**9 + size)   # far from any training set
        pixels = twosdm.shapes_world(index, resolution).pixels
        targets = twosdm.shapes_attributes(index)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        steps = epochs * (size // batch)
        ramp = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        bar = tqdm(total=steps * batch, desc="training the world's classifier",
                   unit=" images", unit_scale=True)
        for _ in range(epochs):
            for rows in torch.randperm(size)[:size // batch * batch].split(batch):
                x = twosdm.to_float(torch.from_numpy(pixels[rows.numpy()])).permute(0, 3, 1, 2).to(device)
                logits = net.heads(net.features(x)[1])
                loss = sum(F.cross_entropy(out, targets[name][rows].to(device))
                           for out, name in zip(logits, twosdm.ATTRIBUTES))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ramp.step()
                bar.update(batch)
        bar.close()
        return net.eval()


# ============================================================================================================
# 3 Sets of images, streamed
# ============================================================================================================

@dataclass
class Source:
    """n images of R x R pixels that are read in batches and never held together.

    `read(spans)` yields for each of these slices of range(n) its pixels (b, R, R, 3) uint8 and its faults:
    (index, file, reason) of each image that cannot be read. `key` says all that the images depend on.
    """
    name: str
    n: int
    resolution: int
    key: list
    read: Callable
    timing: Callable = lambda: None               # of the drawing of samples


def from_pixels(name, pixels, fingerprint):
    """An array (N, R, R, 3) uint8, in memory, mapped or lazy, whose content has this fingerprint."""
    return Source(name, len(pixels), pixels.shape[1], ["pixels", fingerprint],
                  lambda spans: ((pixels[span], []) for span in spans))


def from_pipeline(pipeline, seed, n):
    """The samples of a method from the seeds seed, seed + 1, ..."""
    def read(spans):
        return ((pipeline(list(range(seed + span.start, seed + span.stop))), []) for span in spans)

    key = [pipeline.describe(), seed, n]
    return Source(pipeline.method, n, pipeline.shape[0], key, read, pipeline.timing)


def from_world(images, config, n):
    """Other images of the embedded world than these first ones: what a perfect model would draw."""
    first, resolution, seed = len(images), config.resolution, config.seed

    def read(spans):
        for span in spans:
            index = torch.arange(first + span.start, first + span.stop)
            yield twosdm.shapes_images(index, resolution, seed).numpy(), []

    return Source("real", n, resolution, ["shapes", resolution, seed, first, n], read)


def from_files(path, resolution=None):
    """A folder or zip of images. Squares of one size stay as they are; others need the resolution to become.

    Everything else is as in training: centre squares by Lanczos, transparency on white, 16 bits to 8.
    """
    entries = twosdm.list_images(path)[0]
    if (Path(path) / "settings.json").is_file():              # a folder of sample.py: its grid is no sample
        entries = [entry for entry in entries if not entry.name.startswith("grid")]
    side = resolution or common_side(path, entries)
    if not side:
        raise UserError(f"{path} holds images of several sizes, or not square: say with --resolution what "
                        f"side their centre squares shall have")
    listed = "".join(f"{entry.name}\0{entry.size}\0{entry.stamp}\n" for entry in entries)
    digest = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
    workers = max(1, twosdm.cores() // twosdm.processes())

    def read(spans):
        chunks = twosdm.read_chunks(str(path), [entries[span] for span in spans], side,
                                    max(1, min(workers, len(spans))))
        with contextlib.closing(chunks):
            for span, (pixels, faults, _) in zip(spans, chunks):
                yield pixels, [(span.start + i, name, reason) for i, name, reason in faults]

    return Source(str(path), len(entries), side, ["files", digest, side, twosdm.RECIPE], read)


def common_side(path, entries):
    """The side R if all images are R x R, by their headers, else None. Unreadable ones are not counted."""
    sides = set()
    for entry in entries:
        with contextlib.suppress(Exception):                  # a bad file is named when it is read
            file = (io.BytesIO(twosdm.read_entry(path, entry)) if entry.method >= 0 else
                    Path(path, entry.name))
            with Image.open(file, formats=twosdm.FORMATS) as image:
                sides.add(image.size)
        if len(sides) > 1:
            return None
    width, height = sides.pop() if sides else (0, 0)
    return width if width == height else None


def from_npz(path):
    """`arr_0` (N, R, R, 3) uint8 of an .npz, as sample.py --npz and OpenAI's evaluator have it, streamed."""
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = formats[np.lib.format.read_magic(file)](file)
            crc, begin = archive.getinfo("arr_0.npy").CRC, file.tell()
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = "has no arr_0" if isinstance(error, KeyError) else f"is not a whole .npz file ({error})"
        raise UserError(f"{path} {what}: give an .npz whose arr_0 holds images (N, R, R, 3), uint8") from None
    square = len(shape) == 4 and shape == (shape[0], shape[1], shape[1], 3) and shape[0]
    if dtype != np.uint8 or fortran or not square:
        odd = ("images of several sizes" if dtype == object else
               f"{dtype} of shape {shape}" + ", in Fortran's order" * fortran)
        raise UserError(f"arr_0 in {path} is {odd}: it must be uint8 of shape (N, R, R, 3)")
    row = 3 * shape[1] ** 2

    def read(spans):
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            for span in spans:
                try:
                    file.seek(begin + span.start * row)
                    content = file.read((span.stop - span.start) * row)
                    yield np.frombuffer(content, np.uint8).reshape(-1, *shape[1:]), []
                except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                    raise UserError(f"{path} is damaged ({error}): make or fetch it again") from None

    return Source(str(path), shape[0], shape[1], ["npz", crc, shape], read)


def open_images(path, resolution=None):
    """A folder, a zip or an .npz of images."""
    if Path(path).suffix != ".npz":
        return from_files(path, resolution)
    source = from_npz(path)
    if resolution not in (None, source.resolution):
        raise UserError(f"{path} holds images of {source.resolution}x{source.resolution}, not {resolution}x"
                        f"{resolution}: compare images of one size (those of a folder are resized)")
    return source


# ============================================================================================================
# 4 From images to features to metrics
# ============================================================================================================

METRICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "is": ("logits",), "precision": ("pool",),
           "recall": ("pool",)}                               # and what of a set's features each is made of
HEADINGS = dict(zip(METRICS, ("FID", "sFID", "IS", "precision", "recall")))
K, IS_BLOCK = 3, 5000
REAL_ROWS, FAKE_ROWS = 10_000, 50_000              # how many images at most enter precision and recall


def spans(rows, size):
    """Ascending row numbers -> slices of at most `size` consecutive ones."""
    rows, found = np.asarray(rows), []
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        found += [slice(int(part[0]), int(part[-1]) + 1)
                  for part in np.array_split(run, -(-len(run) // size))] if len(run) else []
    return found


def readable(span, faults):
    """The indices in a span without those of its faults, as an array."""
    return np.setdiff1d(np.arange(span.start, span.stop), [fault[0] for fault in faults])


def load_arrays(path, names):
    """These arrays of an .npz file as a dict, or None if it does not exist or is damaged."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        return None                                           # a damaged cache is only a slow one


def save_arrays(path, **arrays):
    with twosdm.written(path) as fresh, open(fresh, "wb") as file:
        np.savez(file, **arrays)


def features(source, network, folder, most, names, batch=64, skip_bad=False, logits=False):
    """What the metrics need of a set, from the cache in `folder` or by one pass over its images.

    -> dict of those `names` among mu, sigma, mu_s, sigma_s (float64), pool (of `most` images, drawn at
    random), logits (N, K), and of n; None in all processes of torchrun but the first. The pass is cut into
    parts, which the processes share. Each is a file until all are there, so that nothing is computed twice
    after an interruption and the numbers do not depend on the processes; that takes 16 to 20 KB per image.
    """
    key = json.dumps([source.key, network.sha256, most, logits], sort_keys=True)
    path = Path(folder) / (hashlib.sha256(key.encode()).hexdigest()[:16] + ".npz")
    wanted = ("faults", "n", *names)
    arrays = None if twosdm.rank() else load_arrays(path, wanted)
    if not twosdm.gather(arrays is not None)[0]:
        batches = spans(range(source.n), batch)
        size = max(1, min(1024 // batch, len(batches) // 32))         # 32 parts or more can be shared well
        parts = {path.with_suffix(".parts") / f"{group[0].start}-{group[-1].stop}.npz": group
                 for group in (batches[i:i + size] for i in range(0, len(batches), size))}
        extract(source, network, parts, logits)
        if not twosdm.rank():
            fold(source, parts, path, most, logits, skip_bad)
            arrays = load_arrays(path, wanted)
        twosdm.gather(None)
    if not twosdm.rank():
        refuse_faults(json.loads(str(arrays.pop("faults"))), source, skip_bad)
    return arrays


def extract(source, network, parts, logits):
    """Writes the missing ones of {file: spans}, each the features of its images."""
    missing = twosdm.gather(None if twosdm.rank() else [
        part for part in parts if load_arrays(part, ["rows"]) is None])[0]
    done = source.n - sum(parts[part][-1].stop - parts[part][0].start for part in missing)
    mine = twosdm.share(missing)
    batches = source.read([span for part in mine for span in parts[part]])
    with tqdm(total=source.n, initial=done, desc=source.name[-30:], unit=" images") as bar:
        for part in mine:
            rows, kept, bad = [], [], []
            for span in parts[part]:
                pixels, faults = next(batches)
                if len(pixels):
                    out = network(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2))
                    kept.append({name: out[name].cpu().numpy()
                                 for name in out if name != "logits" or logits})
                rows, bad = [*rows, readable(span, faults)], bad + faults
                bar.update(min((span.stop - span.start) * twosdm.processes(), bar.total - bar.n))
            save_arrays(part, rows=np.concatenate(rows), faults=np.array(json.dumps(bad)), **{
                name: np.concatenate([x[name] for x in kept]) for name in (kept[0] if kept else ())})
    twosdm.gather(None)                                       # all parts are there for all


def fold(source, parts, path, most, logits, skip_bad):
    """The parts, in order, become the one file that `features` reads."""
    chosen = np.zeros(source.n, bool)             # at random: files are sorted by name, and so by class
    chosen[np.random.RandomState(0).permutation(source.n)[:most]] = True
    stats, kept, n, bad = {}, {"pool": [], "logits": []}, 0, []
    for part in parts:
        with np.load(part) as arrays:
            rows, bad = arrays["rows"], bad + json.loads(str(arrays["faults"]))
            if len(rows):
                pool, n = arrays["pool"], n + len(rows)
                for name, x in ("pool", pool), ("spatial", arrays["spatial"]):
                    stats.setdefault(name, RunningStats(x.shape[1])).update(x)
                kept["pool"].append(pool[chosen[rows]])
                kept["logits"] += [arrays["logits"]] if logits else []
    refuse_faults(bad, source, skip_bad or not n)
    if n < 2:
        raise UserError(f"{source.name} has {n} images that can be read: a covariance needs two or more")
    (mu, sigma), (mu_s, sigma_s) = stats["pool"].result(), stats["spatial"].result()
    save_arrays(path, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, n=np.array(n),
                faults=np.array(json.dumps(bad)), **{k: np.concatenate(x) for k, x in kept.items() if x})
    shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)


def refuse_faults(faults, source, skip_bad):
    if faults and not skip_bad:
        raise UserError(twosdm.describe(faults, source.n))


def score(real, fake, metrics):
    """Two sets as `features` gives them -> {metric: value}."""
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
    if "is" in metrics:
        values["is"], values["is_std"] = inception_score(fake["logits"], block=IS_BLOCK, shuffle_seed=0)
    if "precision" in metrics or "recall" in metrics:
        values["precision"], values["recall"] = precision_recall(real["pool"], fake["pool"], K)
    return {name: value for name, value in values.items() if name in metrics or name == "is_std"}


def read_statistics(path, network):
    """The reference statistics of an .npz: EDM's (mu, sigma), OpenAI's (also mu_s, sigma_s), or our own.

    -> dict of these, and of pool, n, weights if they are ours; None if the file holds images only. UserError.
    """
    try:
        with np.load(path) as file:
            names, arrays = file.files, {name: file[name] for name in file.files if name != "arr_0"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as an .npz ({type(error).__name__}): give one, or fetch or "
                        f"make it again") from None
    if "mu" not in arrays and "arr_0" in names:
        return None
    pairs = [pair for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if any(name in arrays for name in pair)]
    if lacking := [name for pair in pairs or [("mu", "sigma")] for name in pair if name not in arrays]:
        raise UserError(f"{path} lacks {lacking[0]} (it holds {', '.join(names) or 'nothing'}): a reference "
                        f"holds mu and sigma, or images as arr_0")
    for (mean, covariance), dims in zip(pairs, network.dims):
        for name, shape in (mean, (dims,)), (covariance, (dims, dims)):
            x = arrays[name]
            if x.dtype.kind != "f" or x.shape != shape:
                raise UserError(f"{name} in {path} is {x.dtype} of shape {x.shape}, not floats of shape "
                                f"{shape}: it belongs to another network than {network.label}")
            if not np.isfinite(x).all():
                raise UserError(f"{name} in {path} has NaN or infinite values: fetch or make it again")
    if "pool" in arrays and arrays["pool"].shape[1:] != arrays["mu"].shape:
        raise UserError(f"pool in {path} has the shape {arrays['pool'].shape}, which does not go with its mu")
    if str(arrays.get("weights", network.sha256)) != network.sha256:
        raise UserError(f"{path} was made with the weights {arrays['weights']}, not {network.sha256}: use "
                        f"one file of weights for both sides")
    return arrays


def reference(args, network, folder, training, names):
    """The side of the real images -> (dict of those `names` that can be had; its record for the protocol).

    What the statistics of --reference lack comes from the images beside them (arr_0), or from the training
    images if there are any.
    """
    given, real, images, beside = args.reference, {}, training, None
    if given and Path(given).suffix == ".npz" and (statistics := read_statistics(given, network)):
        real = statistics
        beside = from_npz(given) if "pool" not in real and "arr_0" in np.load(given).files else None
        digest = hashlib.sha256(real["mu"].tobytes() + real["sigma"].tobytes()).hexdigest()[:8]
        record = dict(reference=given, reference_sha256=digest,
                      n_real=int(real["n"]) if "n" in real else None)
    else:
        images = open_images(given, args.resolution) if given else training
        record = dict(reference=images.name, reference_key=images.key)

    def add(source, names):
        missing = [name for name in names if name not in real]
        if source and missing:
            found = features(source, network, folder, REAL_ROWS, missing, args.batch, args.skip_bad)
            real.update({name: found and found[name] for name in missing})
            record["n_real"] = record.get("n_real") or (found and int(found["n"]))

    add(beside, {"pool"}.intersection(names))     # a part of the data: enough for these, not for a mean
    add(images, names)
    record.setdefault("n_real", images and images.n)
    return {name: real[name] for name in names if name in real}, record


# ============================================================================================================
# 5 The nearest training images: Figs. 6, 7 and 11-13
# ============================================================================================================

NEIGHBOURS = 3                                                # that a picture shows of each sample
QUANTILE = 0.05


def load(source, rows, batch, skip_bad=False):
    """The images of these ascending rows, read by all processes: those readable (N,), (N, R, R, 3)."""
    parts = spans(rows, batch)
    mine, found = twosdm.share(parts), []
    for span, (pixels, faults) in zip(mine, source.read(mine)):
        refuse_faults(faults, source, skip_bad)
        found.append((readable(span, faults), np.array(pixels)))
    every = sorted((pair for some in twosdm.gather(found) for pair in some if len(pair[0])),
                   key=lambda pair: pair[0][0])
    if not every:
        raise UserError(f"none of {len(rows)} images of {source.name} can be read: repair or remove them")
    return tuple(np.concatenate(x) for x in zip(*every))


def search(queries, gallery, embed, k, metric, batch, skip_bad=False):
    """The k nearest images of a source to the queries (Q, D), in one pass that the processes share.

    -> distances, rows (Q, k), the nearest first.
    """
    parts = twosdm.share(spans(range(gallery.n), min(batch, -(-gallery.n // twosdm.processes()))))
    rows, mine = [np.empty(0, int)], sum(span.stop - span.start for span in parts)

    def chunks():
        with tqdm(total=gallery.n, desc=f"searching {gallery.name[-30:]}", unit=" images") as bar:
            for span, (pixels, faults) in zip(parts, gallery.read(parts)):
                refuse_faults(faults, gallery, skip_bad)
                rows.append(readable(span, faults))
                yield embed(pixels)
                bar.update(min((span.stop - span.start) * twosdm.processes(), bar.total - bar.n))

    best = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1)    # few may be a process's
    if mine:
        distances, index = nearest(queries, chunks(), min(k, mine), metric)
        best[0][:, :mine], best[1][:, :mine] = distances, np.concatenate(rows)[index]
    found = twosdm.gather(best)
    distances, rows = (np.concatenate(x, 1) for x in zip(*found))                         # (Q, processes * k)
    order = np.lexsort((rows, distances))[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)


def without_itself(distances, rows, own):
    """Neighbours (N, k + 1) of images that are in the gallery, at the rows `own` -> (N, k) others."""
    itself = rows == own[:, None]
    itself[~itself.any(1), -1] = True                         # more copies than k hide it: drop any of them
    return (x[~itself].reshape(len(x), -1) for x in (distances, rows))


def floats(pixels, device):
    """(B, R, R, 3) uint8 -> (B, 3, R, R) float32 in [-1, 1] on the device."""
    return twosdm.to_float(twosdm.send(np.array(pixels), device)).permute(0, 3, 1, 2)


def embedding(args, kind, dataset, saved, device):
    """What `--nearest kind` compares: pixels (B, R, R, 3) -> (B, D); the metric; its power; its name."""
    if kind == "pixel":
        return lambda pixels: pixels.reshape(len(pixels), -1) / 255.0, "euclidean", 1, "pixels in [0, 1]"
    if kind == "lpips":
        net = Lpips(args.lpips_weights).to(device)
        name = f"LPIPS 0.1 (alex {' '.join(net.sha256)})"
        return lambda pixels: net.embed(floats(pixels, device)).cpu(), "euclidean", 2, name
    if dataset == "shapes":                                   # the world's own CLIP
        run = Path(args.runs) / dataset / "embedder" / "checkpoint.pt"
        weights = twosdm.load_checkpoint(run, stage="embedder").get("ema")
        if weights is None:
            raise UserError(f"{run} is no CLIP: --nearest pixel, or train with --embedder shapes")
        net = twosdm.SmallClip()
        net.load_state_dict(weights)
        net.to(device)
    else:
        net = twosdm.ClipEmbedder(args.clip_weights or saved.get("clip_weights", "openai")).to(device)

    @_exactly()
    def embed(pixels):
        return net(floats(pixels, device)).cpu()

    name = f"cosine of CLIP {twosdm.fingerprint(net)}" + " (the world's own)" * (dataset == "shapes")
    return embed, "cosine", 1, name


def compare_neighbours(args, candidates, gallery, how):
    """Each candidate's nearest training images -> rows of results, {method: distances}, pictures of pairs.

    Beside them, as "training", the same number of training images and their nearest *other* ones. A model
    that copies lies to the left: `copies` is the share of samples within the 5 % quantile of "training".
    """
    embed, metric, power, name = how
    sets = [(source, described, *load(
        source, np.linspace(0, source.n - 1, min(args.n or 100, source.n)).astype(int), args.batch,
        args.skip_bad)) for described, source in candidates]
    n = min(max(len(rows) for _, _, rows, _ in sets), gallery.n)
    own, training = load(gallery, np.sort(np.random.RandomState(args.seed).permutation(gallery.n)[:n]),
                         args.batch, args.skip_bad)
    queries = [torch.cat([torch.as_tensor(embed(images[part]))
                          for part in spans(range(len(images)), args.batch)])
               for images in (training, *(images for *_, images in sets))]
    k = min(NEIGHBOURS, gallery.n - 1)
    distances, rows = search(torch.cat(queries), gallery, embed, k + 1, metric, args.batch, args.skip_bad)
    ends = np.cumsum([len(part) for part in queries])[:-1]
    (black, *distances), (others, *rows) = np.split(distances**power, ends), np.split(rows, ends)
    black, others = without_itself(black, others, own)
    edge = float(np.quantile(black[:, 0], QUANTILE))
    results = [dict(method="training", items=own, distances=black[:, 0], neighbours=others[:, 0],
                    copies=float((black[:, 0] <= edge).mean()))]
    for (source, described, items, images), d, r in zip(sets, distances, rows):
        shown = np.argsort(d[:, 0], kind="stable")[:32]       # the most suspicious first
        found, pixels = load(gallery, np.unique(r[shown, :k]), args.batch, args.skip_bad)
        tiles = [np.concatenate([images[i:i + 1], pixels[np.searchsorted(found, r[i, :k])],
                                 np.full_like(images[:1], 255)]) for i in shown]
        sheet = twosdm.image_grid(np.concatenate(tiles), (k + 2) * min(4, len(tiles)))
        results.append(dict(described, items=items, distances=d[:, 0], neighbours=r[:, 0],
                            copies=float((d[:, 0] <= edge).mean()),
                            picture=sheet[:, :-1 - images.shape[2]]))               # without the last gap
    return results, edge, name


@torch.no_grad()
def compare_embeddings(args, device):
    """--embeddings: the prior's samples among embeddings of training images -> (rows, text).

    Beside them other training embeddings, as good as can be, and draws from a Gaussian of their mean and
    covariance: all that the Fréchet distance knows of a set, but no more than that.
    """
    sample.load_given(args.checkpoint, ["2sdm"])              # refuses others
    pipeline = sample.Pipeline(args, "2sdm", device)
    saved = pipeline.main["config"]
    if pipeline.prior is None:
        raise UserError(f"--embeddings compares the samples of a prior: {saved['y']} is drawn without one")
    embedder = twosdm.unpack_embedder(pipeline.main["embedder"], saved["resolution"],
                                      args.clip_weights or saved["clip_weights"]).to(device)
    images, training = training_images(args, saved, saved["resolution"], pipeline.autoencoder)
    if images and images.fingerprint != pipeline.data["fingerprint"]:
        raise UserError("the training images are not those of this prior: give its own with --data")
    n, generator = min(args.n or 1000, training.n // 2), np.random.default_rng(args.seed)
    if n <= K:
        raise UserError(f"--embeddings needs --n of more than {K}, and twice as many training images")
    rows = generator.permutation(training.n)[:n + REAL_ROWS]

    def embeddings(rows):
        with tqdm(total=len(rows), desc="embeddings", unit=" images") as bar:
            for part in spans(range(len(rows)), args.batch):
                _, pixels = load(training, rows[part], args.batch, args.skip_bad)
                yield embedder(floats(pixels, device)).cpu()
                bar.update(len(pixels))

    other, real = (torch.cat(list(embeddings(np.sort(part)))).double() for part in (rows[:n], rows[n:]))
    seeds = range(args.seed, args.seed + n)
    drawn = torch.cat([pipeline.conditions(list(seeds[part]))[0].cpu() for part in tqdm(
        spans(range(n), args.batch), desc="prior", unit=" batches")]).double()
    dims, results = real.shape[1], []
    known = RunningStats(dims).update(real).result()
    gaussian = torch.from_numpy(generator.multivariate_normal(*known, n, method="eigh"))
    protocol = dict(dataset=pipeline.main["dataset"], metric="of embeddings", n_real=len(real), n_generated=n,
                    k=K, seed=args.seed, reference_key=training.key)
    for described, y in ((dict(method="training"), other), (dict(method="Gaussian"), gaussian),
                         (pipeline.describe(), drawn)):
        precision, recall = precision_recall(real, y, K)
        results.append(dict(
            described, frechet=frechet_distance(*known, *RunningStats(dims).update(y).result()),
            precision=precision, recall=recall, median_distance=float(np.median(nearest(y, real)[0])),
            rms=float(y.square().mean().sqrt()), protocol=protocol))
    columns = {"Fréchet": "frechet", "precision": "precision", "recall": "recall",
               "nearest": "median_distance", "rms": "rms"}
    return results, (f"{n} embeddings of each kind, of {dims} dimensions, against {len(real)} of training "
                     "images.\nnearest: the median distance to the nearest of these. rms: of an element\n"
                     + table(results, columns))


# ============================================================================================================
# 6 Tables and figures
# ============================================================================================================

NAMES = {"baseline": "baseline (EDM)", "training": "training, others"}
COLOURS = {"2sdm": "tab:red", "oracle": "tab:green", "baseline": "tab:blue", "real": "tab:gray"}


def table(rows, columns, first="method"):
    """Rows of results -> text, aligned; {heading: key}. What a row lacks is a dash."""
    def shown(value):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"

    names = [row[first] if isinstance(row[first], str) else f"{row[first]:,}" for row in rows]
    names = [NAMES.get(name, name) for name in names]
    width = max(map(len, ["x" * 15, *names])) + 1
    lines = [f"{first.replace('_', ' '):<{width}}" + "".join(f"{heading:>11}" for heading in columns)]
    lines += [f"{name:<{width}}" + "".join(f"{shown(row.get(key)):>11}" for key in columns.values())
              for name, row in zip(names, rows)]
    return "\n".join(lines)


def save_csv(path, rows, columns):
    with twosdm.written(path) as fresh, open(fresh, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([row.get(column) for column in columns] for row in rows)


def save_figure(path, draw, **labels):
    """Lets draw(axes) fill a figure -> [path], or [] if there is no matplotlib to do so."""
    try:
        from matplotlib.figure import Figure                  # optional: only figures need it
    except ImportError:
        print(f"No {path}: for figures, pip install matplotlib; nothing has to be computed again.",
              file=sys.stderr)
        return []
    figure = Figure(figsize=(5.5, 3.8), layout="constrained", dpi=150)
    axes = figure.add_subplot(**labels)
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with twosdm.written(path) as fresh:
        figure.savefig(fresh, format="png")
    return [path]


def write_history(folder, results, metrics):
    """Fig. 5: each metric against the images seen, one curve per method -> a table; the files."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    seen = sorted({row["images"] for row in results})
    lines, files = [], [folder / "history.csv"]
    save_csv(files[0], results, ["method", "images", *metrics])
    for metric in metrics:
        values = {(row["method"], row["images"]): row[metric] for row in results}
        lines.append(f"{HEADINGS[metric]} at\n" + table(
            [dict(images_seen=n, **{m: values.get((m, n)) for m in methods}) for n in seen],
            {m: m for m in methods}, "images_seen"))

        def draw(axes):
            for method in methods:
                points = [(n, values[method, n]) for n in seen if (method, n) in values]
                axes.plot(*zip(*points), "o-", color=COLOURS.get(method), label=NAMES.get(method, method))
            if max(values.values()) > 10 * min(values.values()) > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")

        files += save_figure(folder / f"history-{metric}.png", draw, xlabel="training images seen",
                             ylabel=HEADINGS[metric])
    return "\n\n".join(lines), files


def write_neighbours(folder, kind, results, edge, name):
    """Fig. 6, the pictures of Figs. 7 and 11-13, all distances -> a table with the verdict; the files."""
    files = [folder / f"nearest-{kind}.csv"]
    save_csv(files[0], [dict(method=row["method"], item=int(i), distance=d, neighbour=int(j))
                        for row in results
                        for i, d, j in zip(row["items"], row["distances"], row["neighbours"])],
             ["method", "item", "distance", "neighbour"])
    for row in results:
        if "picture" in row:
            files.append(folder / f"nearest-{kind}-{row['method']}.png")
            twosdm.save_picture(files[-1], row.pop("picture"), least=800)

    def draw(axes):
        bins = np.linspace(0, max(row["distances"].max() for row in results) or 1, 41)
        for row in results:
            weights = np.full(len(row["distances"]), 1 / len(row["distances"]))
            axes.hist(row["distances"], bins, weights=weights, histtype="step", linewidth=1.5,
                      color=COLOURS.get(row["method"], "black" if row["method"] == "training" else None),
                      label=NAMES.get(row["method"], row["method"]))
        axes.axvline(edge, color="black", linestyle=":", linewidth=1)

    files += save_figure(folder / f"nearest-{kind}.png", draw, ylabel="share",
                         xlabel=f"distance to the nearest training image\n{name}")
    for row in results:
        row["median"] = float(np.median(row["distances"]))
        row["smallest"] = float(row["distances"].min())
    return table(results, {"smallest": "smallest", "median": "median", "copies": "copies"}), files


# Table 1 of the paper (Table 4 for its Overfit-2SDM): IS, precision, recall, FID, sFID of 50,000 samples.
PAPER = {
    "afhq": {"EDM": (8.91, .752, .614, 2.04, 13.7), "2SDM": (10.00, .844, .619, 1.56, 13.7),
             "Overfit-2SDM": (10.70, .977, .869, 1.16, 10.6)},
    "ffhq": {"EDM": (3.33, .697, .569, 2.46, 4.90), "2SDM": (3.47, .721, .697, 2.32, 4.98),
             "Overfit-2SDM": (3.37, .695, .552, 3.33, 5.37)},
    "imagenet": {"EDM": (11.3, .523, .524, 35.1, 9.14), "2SDM": (15.6, .614, .526, 21.0, 5.59)},
    "imagenet-class": {"EDM": (13.6, .530, .532, 25.4, 6.50), "2SDM": (17.3, .541, .573, 17.4, 4.63)},
    "imagenet-latent": {"EDM": (40.4, .532, .610, 34.2, 9.59), "2SDM": (52.1, .590, .603, 24.3, 7.36)}}
# Table 3, from scratch; its values fit 20,000 samples (inferred). FID of EDM, 2SDM, oracle.
PAPER_ORACLE = {"afhq": (3.53, 1.83, 1.57), "ffhq": (6.39, 4.73, 4.35), "imagenet-class": (26.5, 18.1, 19.7)}
# Table 5, on a V100: ms per image and FID of EDM, 2SDM, 2SDM with less steps.
PAPER_TIME = {"afhq": ((789, 2.04), (824, 1.56), (784, 1.58)),
              "ffhq": ((789, 2.46), (824, 2.32), (784, 2.32))}
ORDER = ("IS", "precision", "recall", "FID", "sFID")


def title(row):
    """What the paper calls the method of a row of results, with all in which it is another than the usual."""
    y, parts = row.get("y", "clip"), list(row.get("tags", ()))
    if row["method"] == "2sdm" and y.startswith("kmeans"):
        parts.insert(0, f"K = {y[7:]}")
    elif y != "clip" and row["method"] in ("2sdm", "oracle"):
        parts.insert(0, y)
    if row.get("dataset", row["protocol"]["dataset"]) != row["protocol"]["dataset"]:
        parts.append(row["dataset"])                  # a published network
    if row.get("image_steps") != row.get("steps"):
        parts.append(f"{row['image_steps']} steps")
    for name, sign in (("guidance", "W"), ("temperature", "T")):
        if row.get(name, 1) != 1:
            parts.append(f"{sign} = {row[name]:g}")
    if row.get("label") is not None or row.get("prompt"):
        parts.append(row.get("prompt") or f"class {row['label']}")
    name = {"2sdm": "Class-cond" if y.startswith("kmeans") else "2SDM", "oracle": "2SDM + oracle",
            "baseline": "EDM", "joint": "Overfit-2SDM", "real": "other real images"}[row["method"]]
    return name + f" ({', '.join(parts)})" * bool(parts)


def read_rows(paths):
    """(file, row) of each evaluation in results.jsonl files; a line that a kill cut short is passed over."""
    for path in paths:
        for line in Path(path).read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "protocol" in row and "metric" not in row["protocol"]:
                    yield str(path), row


def ways(row):
    """What evaluations must have in common to be compared: that of their metrics, that of their sampler."""
    steps, churn, s_noise = (row.get(name) for name in ("steps", "churn", "s_noise"))
    return (tuple(row["protocol"].get(name) for name in (
        "dataset", "n_generated", "reference", "n_real", "resolution", "weights", "seed")),
        (steps, churn, s_noise if churn else None))


def read_results(paths):
    """Evaluations -> [(the two `ways`, {title: [row of each training run]})].

    A run is told by file and training seed: several seeds are averaged. Of a run's history the end counts; of
    repeated evaluations of the same networks the last value of each metric. Runs of other lengths than the
    longest are named apart.
    """
    found, real, tables = {}, {}, []
    for path, row in read_rows(paths):
        metrics, sampler = ways(row)
        row, run = dict(row, path=path), (path, row.get("train_seed"))
        if row["method"] == "real":
            real.setdefault(metrics, {})[run] = row
            continue
        runs = found.setdefault((metrics, sampler), {}).setdefault(title(row), {})
        before = runs.get(run, {})
        if before and all(before.get(name) == row.get(name) for name in ("networks", "arithmetic")):
            runs[run] = before | {name: value for name, value in row.items() if value is not None}
        elif trained_on(row) >= trained_on(before):
            runs[run] = row
    compared = {metrics for metrics, _ in found}
    found |= {(metrics, (None, None, None)): {} for metrics in real if metrics not in compared}
    for (metrics, sampler), titles in found.items():
        methods = {}
        for name, runs in titles.items():
            longest = max(map(trained_on, runs.values()))
            for row in sorted(runs.values(), key=trained_on, reverse=True):
                shorter = f" after {trained_on(row):,} images" * (trained_on(row) < longest)
                methods.setdefault(name + shorter, []).append(row)
        if metrics in real:
            methods["other real images"] = list(real[metrics].values())
        tables.append((metrics, sampler, methods))
    return tables


def trained_on(row):
    """The images that the network which draws the pixels has seen."""
    return max((n or 0 for stage, n in row.get("images_seen", {}).items() if stage != "prior"), default=0)


def spread(values, digits):
    """Numbers, of which some may be None -> "mean ± standard deviation"; one number stands alone."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def markdown(headings, rows):
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(paths):
    """Tables 1, 3, 4 and 5 from all evaluations in results.jsonl files, beside the paper's, as Markdown."""
    keys, text = dict(zip(ORDER, ("is", "precision", "recall", "fid", "sfid"))), []
    for (dataset, n, against, known, _, weights, seed), (steps, churn, _), methods in read_results(paths):
        seeds = sorted({row.get("train_seed") for rows in methods.values() for row in rows} - {None})
        devices = sorted({row["machine"] for rows in methods.values() for row in rows if "machine" in row})
        how = f", from seed {seed}" * bool(seed) + f", {steps} steps" * (steps is not None)
        how += f" of churn {churn:g}" if churn else ""
        text.append(f"## {dataset}: {n:,} samples against {f'{known:,} images, ' if known else ''}{against}"
                    f"{f', features {weights}' if weights else ''}{how}, training seeds "
                    f"{', '.join(map(str, seeds)) or 'unknown'}, on {', '.join(devices) or 'unknown'}")
        rows = [[name, *(spread([row.get(key) for row in runs], 3 if "r" in key else 1 if key == "is" else 2)
                         for key in keys.values()), str(len(runs))] for name, runs in methods.items()]
        rows += [[f"{name}, paper, n = 50,000", *(f"{x:g}" for x in values), ""]
                 for name, values in PAPER.get(dataset, {}).items()]
        text.append("Tables 1 and 4\n\n" + markdown(["", *ORDER, "runs"], rows))
        if gains := improvements(dataset, methods):
            text.append("Table 3\n\n" + markdown(
                ["", "FID EDM", "2SDM", "oracle", "improvement", "oracle's", "ratio"], gains))
        timed = [[name, spread([row["timing"]["ms_per_image"] for row in runs if row.get("timing")], 1),
                  spread([100 * row["timing"]["prior_share"] for row in runs if row.get("timing")], 1) + " %",
                  spread([row.get("fid") for row in runs], 2)]
                 for name, runs in methods.items() if any(row.get("timing") for row in runs)]
        timed += [[f"{name}, paper (V100)", str(ms), "", f"{fid:g}"] for name, (ms, fid) in zip(
            ("EDM", "2SDM", "2SDM (38 steps)"), PAPER_TIME.get(dataset, ()))]
        if timed:
            text.append("Table 5\n\n" + markdown(["", "ms per image", "the prior's share", "FID"], timed))
    return "\n\n".join(text)


def improvements(dataset, methods):
    """The rows of Table 3: by how much of EDM's FID 2SDM and the oracle are lower."""
    def runs(name):
        return {(row["path"], row.get("train_seed"), trained_on(row)): row["fid"]
                for row in methods.get(name, ()) if "fid" in row}

    edm, ours, oracle = runs("EDM"), runs("2SDM"), runs("2SDM + oracle")
    cases = [("here", [(edm[s], ours[s], oracle.get(s)) for s in edm if s in ours])]
    cases += [("paper, from scratch", [PAPER_ORACLE[dataset]])] if dataset in PAPER_ORACLE else []
    rows = []
    for name, values in cases:
        if values:
            gain = [100 * (1 - b / a) for a, b, c in values]
            best = [None if c is None else 100 * (1 - c / a) for a, b, c in values]
            ratio = [100 * g / o for g, o in zip(gain, best) if o]
            rows.append([name, *(spread(column, 2) for column in zip(*values)),
                         *(spread(column, 1) + " %" for column in (gain, best, ratio))])
    return rows


def write_figure_4(paths, folder):
    """FID of the oracle against the dimension of y, one curve per reduction and budget -> text, files."""
    points = {}
    for path, row in read_rows(paths):
        y = row.get("y", "clip") if row["method"] == "oracle" else "none"
        kind, _, size = y.partition(":")
        plain = title(row) in ("EDM", "2SDM + oracle", f"2SDM + oracle ({y})")          # no tags, no guidance
        if plain and "fid" in row:
            size = int(size) if size else row["y_dim"]
            places = [("pca", 0), ("kmeans", 1)] if y == "none" else [
                ("pca" if kind == "clip" else kind, size)]
            for curve, size in places:                # EDM is told as little as one cluster tells
                points.setdefault((curve, ways(row), trained_on(row), size), {})[
                    path, row.get("train_seed")] = row["fid"]
    told = {(curve, *which) for curve, *which, size in points if (curve, size) != ("kmeans", 1)}
    points = {key: runs for key, runs in points.items() if key[0] == "pca" or key[:3] in told}
    if not points:
        raise UserError("there are no evaluations of the oracle yet: train.py --stage image --y pca:8, then "
                        "evaluate.py --method oracle --y pca:8, and so on")
    rows = []
    several = len({(way[0][2:], way[1]) for _, way, _, _ in points}) > 1
    for (curve, way, images, size), runs in sorted(
            points.items(), key=lambda point: (point[0][0], str(point[0][1]), *point[0][2:])):
        fids, (dataset, n, *which), steps = list(runs.values()), way[0], way[1]
        said = f" ({', '.join(str(x) for x in (*which, *steps) if x is not None)})" * several
        rows.append(dict(y=f"{dataset}, {curve}{said}", images=images, n=n, dims=size,
                         fid=float(np.mean(fids)), runs=len(fids),
                         std=float(np.std(fids, ddof=1)) if len(fids) > 1 else 0.0))
    files = [folder / "figure-4.csv"]
    save_csv(files[0], rows, ["y", "images", "n", "dims", "fid", "std", "runs"])

    def draw(axes):
        from matplotlib.ticker import LogLocator

        sizes = {row["n"] for row in rows}
        for curve in dict.fromkeys((row["y"], row["images"], row["n"]) for row in rows):
            line = [row for row in rows if (row["y"], row["images"], row["n"]) == curve]
            dims, fid, std = ([row[name] for row in line] for name in ("dims", "fid", "std"))
            if len(line) > 1:
                label = f"{curve[0]}, {curve[1]:,} images" + f", n = {curve[2]:,}" * (len(sizes) > 1)
                axes.errorbar(dims, fid, std, fmt="o--" if "kmeans" in curve[0] else "o-", capsize=2,
                              label=label)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(sorted({row["dims"] for row in rows}))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        for axis in axes.xaxis, axes.yaxis:
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")

    files += save_figure(folder / "figure-4.png", draw, xlabel="dimensions (pca) or clusters (kmeans) of y",
                         ylabel="FID, oracle")
    columns = {"images seen": "images", "n": "n", "dims": "dims", "FID": "fid", "std": "std", "runs": "runs"}
    return table(rows, columns, "y"), files


# ============================================================================================================
# 7 The command line
# ============================================================================================================

def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    at_least = sample.add_sampling_flags(parser)
    add = parser.add_argument
    add("--method", nargs="+", choices=list(sample.METHODS),
        help="what to compare (default: all that are trained)")
    add("--n", type=at_least(2, int), help="images per method (default: 1000 on shapes and folders, "
        "otherwise 50000; with --history 20000, --embeddings 1000, --nearest 100)")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all; with --history fid)")
    add("--images", metavar="PATH",
        help="evaluate these instead of runs: a folder, a zip, or an .npz with arr_0")
    add("--reference", metavar="PATH", help="compare with these images, or with an .npz of statistics: "
        "EDM's, OpenAI's, --save-reference's (default: the training images, the run's or those of --data)")
    add("--save-reference", metavar="FILE", help="write the reference's statistics, and features of 10,000 "
        "of its images, as .npz; that is all, unless --images or --method is given")
    add("--history", action="store_true", help="the metrics at every snapshot of image model and baseline "
        "(train.py --snapshots), with the newest prior: table, CSV and figure")
    add("--nearest", choices=("lpips", "clip", "pixel"), help="instead of metrics the nearest training "
        "images of each sample: pictures, CSV, histogram, and the share of samples that look like copies")
    add("--embeddings", action="store_true", help="instead of metrics of images those of the prior's samples "
        "among the embeddings of training images")
    add("--tables", nargs="*", metavar="FILE", help="instead: the paper's Tables 1, 3, 4, 5 as Markdown, "
        "from these results.jsonl (default: all below --runs) of one or several training seeds")
    add("--figure", type=int, choices=(4,), help="instead: Fig. 4, the oracle's FID against the dimension "
        "of y, from the results.jsonl below --runs or of --tables")
    add("--resolution", type=at_least(2, int), help="side to which images in folders of --images and "
        "--reference are resized (default: none if all are squares of one size)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read instead of stopping")
    add("--inception-weights", help="the public Inception file (default: downloaded once). Shapes have a "
        "classifier of their own in its place: with --images if --dataset shapes is given, or if sample.py "
        "made the folder from shapes")
    add("--lpips-weights", nargs=2, metavar=("LINEAR", "TRUNK"), help="LPIPS's alex.pth and torchvision's "
        "AlexNet (default: downloaded once)")
    add("--out", metavar="FOLDER", help="for what --history and --nearest write (default: the run's)")
    add("--json", metavar="FILE",
        help="also write this evaluation as JSON; - prints it instead of the table")
    args = parser.parse_args()
    args.metrics = [m.strip().lower() for m in (args.metrics or (
        "fid" if args.history else ",".join(METRICS))).split(",")]
    if unknown := [m for m in args.metrics if m not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is unknown: choose among {','.join(METRICS)}")
    if args.history and (args.nearest or args.checkpoint):
        raise UserError("--history evaluates all snapshots of a run: leave --nearest and --checkpoint away")
    if args.images and (args.method or args.checkpoint or args.history):
        raise UserError("--images evaluates these alone: leave --method, --checkpoint and --history away")
    if args.embeddings and (args.images or args.method or args.history or args.nearest or args.reference
                            or args.save_reference):
        raise UserError("--embeddings compares a prior with its training images: leave --images, --method, "
                        "--history, --nearest, --reference and --save-reference away")
    if args.images and args.n and not args.nearest:
        raise UserError("--images evaluates all of them: leave --n away")
    if args.images and not args.dataset:
        with contextlib.suppress(OSError, ValueError, KeyError):      # of sample.py
            drawn = json.loads(Path(args.images, "settings.json").read_text())["dataset"]
            args.dataset = drawn if drawn in twosdm.PRESETS else None
    if args.tables is not None or args.figure:
        return args
    if not args.images and (args.method or not (args.save_reference and args.reference)):
        sample.same_dataset(args)
    return args


@dataclass
class Task:
    """(description, Source) of each candidate, made when its turn comes; and what they are compared with."""
    candidates: Iterable
    training: Source | None
    dataset: str | None                                       # None: images of no run
    config: dict
    resolution: int | None
    folder: Path                                              # of caches and results


def find_task(args, device):
    """What the flags mean. Raises UserError."""
    resolution, config, pipelines, autoencoder = args.resolution, None, (), None
    if args.images:
        source = open_images(args.images, args.resolution)
        resolution, config = source.resolution, run_config(args)
    elif args.save_reference and not args.method:
        config = run_config(args)
    else:
        pipelines = find_pipelines(args, device)
        if args.history:
            base = next(pipelines)
            pipelines = itertools.chain([base], pipelines)
        else:                                                 # a missing run is said before hours of sampling
            pipelines = of_one_kind(list(pipelines), args)
            # A published network does not say where its training images are.
            base = next((p for p in pipelines if p.data["fingerprint"]), pipelines[0])
        resolution, autoencoder = base.shape[0], base.autoencoder
        config = dict(base.main["config"], dataset=args.dataset or base.main["dataset"])
    dataset = config["dataset"] if config else args.dataset
    try:
        images, training = training_images(args, config, resolution, autoencoder)
    except UserError:
        if not args.reference:
            raise
        images = training = None                              # not needed
    if training and resolution not in (None, training.resolution):
        if not args.reference:
            raise UserError(f"the training images have {training.resolution}x{training.resolution} pixels, "
                            f"not {resolution}x{resolution}: compare images of one size")
        images = training = None
    n = args.n or (100 if args.nearest else 1000 if dataset in ("shapes", "folder") else
                   20_000 if args.history else 50_000)

    def candidates():
        if args.images:
            yield dict(method=Path(args.images).name, images=str(args.images)), source
        if dataset == "shapes" and images and pipelines and not args.history:
            yield dict(method="real"), from_world(images, twosdm.TrainConfig(**config), n)
        for pipeline in pipelines:
            if images and pipeline.data["fingerprint"] not in (None, images.fingerprint):
                raise UserError("the training images are not those of all the runs: give theirs with --data, "
                                "or --dataset")
            progress = dict(images=pipeline.main["seen"]) if args.history else {}
            yield dict(pipeline.describe(), **progress), from_pipeline(pipeline, args.seed, n)

    args.resolution = resolution or (training and training.resolution)        # for folders of --reference
    return Task(candidates(), training, dataset, config or {}, args.resolution,
                Path(args.runs) / (dataset or "images"))


def of_one_kind(pipelines, args):
    """Pipelines of equal size and, where known, training images; others not asked for are left out."""
    kept = pipelines[:1]
    for pipeline in pipelines[1:]:
        images = {p.data["fingerprint"] for p in (*kept, pipeline)} - {None}
        if pipeline.shape == kept[0].shape and len(images) <= 1:
            kept.append(pipeline)
        elif args.method or args.checkpoint:
            raise UserError(f"{pipeline.method} and {kept[0].method} are of different sizes or were trained "
                            f"on different images: evaluate one --method at a time")
        else:
            print(f"Left out: {pipeline.method}, which was trained on other images than {kept[0].method}",
                  file=sys.stderr)
    return kept


def find_pipelines(args, device):
    """The methods to compare; with --history a pipeline for each snapshot, made when its turn comes."""
    given = sample.load_given(args.checkpoint)

    def trained(method):
        with contextlib.suppress(UserError):
            return all(stage in given or sample.find_run(args, stage)
                       for stage in sample.stages(method, args.y))

    methods = args.method or [
        m for m in sample.METHODS if trained(m) and not (args.history and m == "oracle")]
    if not methods:
        raise UserError(f"{args.runs} has no trained models: run python train.py first, or give --runs")
    for method in methods:
        if not args.history:
            yield sample.Pipeline(args, method, device)
            continue
        newest, before = sample.find_run(args, sample.stages(method, args.y)[-1]), None
        for path in [*sorted(newest.parent.glob("snapshot-*.pt")), newest]:
            at_path = argparse.Namespace(**dict(vars(args), checkpoint=[path]))
            pipeline = sample.Pipeline(at_path, method, device)
            if pipeline.main["seen"] != before:               # the last snapshot may be the end of the run
                before = pipeline.main["seen"]
                yield pipeline


def run_config(args):
    """The settings of the newest run of --dataset, for what is no run itself; or None."""
    for stage in ("image", "baseline"):
        with contextlib.suppress(UserError):
            if args.dataset:
                return twosdm.load_checkpoint(sample.find_run(args, stage), stage=stage)["config"]


def training_images(args, config, resolution, autoencoder):
    """The training images of a run or preset: (Images, their Source). Of --data alone: (None, Source)."""
    if not config and not args.dataset:
        if args.data:
            return None, open_images(args.data, resolution)
        if args.reference:
            return None, None
        raise UserError("--images are compared with what? Add --reference PATH, or --dataset to take its "
                        "training images")
    config = twosdm.TrainConfig(**config) if config else dataclasses.replace(
        twosdm.configure(args.dataset), **dict(resolution=resolution) if resolution else {})
    config = dataclasses.replace(config, runs=args.runs, data=args.data or config.data,
                                 skip_bad=args.skip_bad or config.skip_bad)
    if config.vae and autoencoder is None:                    # no pixels are kept beside latents: a stream
        return None, from_files(config.data, config.resolution)
    images = twosdm.load_images(config, autoencoder)
    return images, from_pixels("training set", images.pixels, images.fingerprint)


def make_network(args, task, device):
    """What the features come from. The first process downloads or trains it, for the others to find."""
    network = None
    for turn in range(2):
        if bool(twosdm.rank()) == bool(turn):
            if task.dataset == "shapes":
                network = WorldFeatures.trained(task.folder, task.resolution, device)
            else:
                try:
                    network = InceptionFeatures(args.inception_weights).to(device)
                except UserError as error:
                    raise UserError(f"--inception-weights: {error}") from None
        twosdm.gather(None)
    return network


def measure(args, task, device):
    """The metrics of all candidates, each printed or kept as soon as it is there -> (rows, text, files)."""
    network = make_network(args, task, device)
    names = sorted({name for metric in METRICS if args.save_reference or metric in args.metrics
                    for name in METRICS[metric]} - {"logits"})
    cache = task.folder / "features"
    real, record = reference(args, network, cache, task.training, names)
    if args.save_reference and not twosdm.rank():
        known = dict(n=np.array(record["n_real"])) if record["n_real"] else {}
        save_arrays(args.save_reference, **real, **known, weights=np.array(network.sha256))
        print(f"-> {args.save_reference}", file=sys.stderr)
    metrics = [m for m in args.metrics if m == "is" or all(name in real for name in METRICS[m])]
    lacking = [HEADINGS[m] for m in args.metrics if m not in metrics]
    if lacking:
        print(f"Left out: {', '.join(lacking)}, for which {args.reference} has nothing: give the images "
              f"themselves, as --reference or as --data", file=sys.stderr)
    names, rows = sorted({name for metric in metrics for name in METRICS[metric]}), []
    for described, source in task.candidates if metrics else ():
        began = time.perf_counter()
        fake = features(source, network, cache, FAKE_ROWS, names, args.batch, args.skip_bad, logits=True)
        if not twosdm.rank():
            rows.append(dict(score(real, fake, metrics), **described, protocol=dict(
                dataset=task.dataset, features=network.label, weights=network.sha256, resize=network.resize,
                **record, n_generated=int(fake["n"]), precision_recall_real=len(real.get("pool", ())),
                precision_recall_generated=len(fake.get("pool", ())), k=K, is_block=IS_BLOCK,
                resolution=source.resolution, seed=args.seed),
                seconds=round(time.perf_counter() - began, 2), machine=sample.device_name(device),
                timing=source.timing()))
            if not args.images:
                append(task.folder, rows[-1])
    if not rows:
        return rows, "", []
    warn(rows, metrics, network)
    against = record["reference"] if args.reference else f"{record['n_real']} training images"
    text = (f"{task.dataset or args.images} {source.resolution}x{source.resolution}, "
            f"{rows[-1]['protocol']['n_generated']} samples against {against}, features of {network.label}\n")
    if args.history:
        history, files = write_history(output(args, task), rows, metrics)
        return rows, text + history, files
    return rows, text + table(rows, {HEADINGS[m]: m for m in metrics}), []


def warn(rows, metrics, network):
    n = min(row["protocol"][side] or math.inf for row in rows for side in ("n_generated", "n_real"))
    for name, dims in zip(("fid", "sfid"), network.dims):
        if name in metrics and n <= dims:
            print(f"Warning: {n} samples for the {dims} dimensions of {HEADINGS[name]}: it is biased "
                  f"upwards, compare it at equal n only.", file=sys.stderr)
    lengths = {n for row in rows for stage, n in row.get("images_seen", {}).items()
               if stage != "prior" and n and "images" not in row}
    if len(lengths) > 1:
        print(f"Warning: the networks have seen {sorted(lengths)} images: not the same compute.",
              file=sys.stderr)


def append(folder, row):
    """Adds a line to the run's results.jsonl, which grows: no evaluation is ever lost."""
    path = folder / "results.jsonl"
    with twosdm.user_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.exists() and not path.read_bytes().endswith(b"\n")        # by a kill
        with open(path, "a") as file:
            file.write("\n" * cut + json.dumps(row) + "\n")


def output(args, task):
    return Path(args.out) if args.out else task.folder


def find_copies(args, task, device):
    """--nearest -> (rows, text, files)."""
    gallery = task.training
    if args.reference:
        gallery = open_images(args.reference, args.resolution)
    if args.nearest == "lpips" and task.resolution < 31:
        raise UserError(f"LPIPS needs 31x31 pixels, these images have {task.resolution}x{task.resolution}: "
                        f"use --nearest clip or --nearest pixel")
    how = embedding(args, args.nearest, task.dataset, task.config, device)
    results, edge, name = compare_neighbours(args, task.candidates, gallery, how)
    if twosdm.rank():
        return [], "", []
    text, files = write_neighbours(output(args, task), args.nearest, results, edge, name)
    protocol = dict(dataset=task.dataset, metric=name, n_real=gallery.n, reference=gallery.name,
                    reference_key=gallery.key, quantile=QUANTILE, seed=args.seed, resolution=task.resolution)
    rows = []
    for row in results:
        rows.append(dict({key: x for key, x in row.items() if not isinstance(x, np.ndarray)},
                         nearest=args.nearest, protocol=dict(protocol, n_generated=len(row["items"]))))
        if not args.images:
            append(task.folder, rows[-1])
    return rows, (f"{name}: distance to the nearest of {gallery.n} training images. copies: the share "
                  f"of samples nearer to\none than 95 % of training images are to another; {QUANTILE} is "
                  f"chance, 1 is a copier\n{text}"), files


def main():
    args = parse()
    if args.tables is not None or args.figure:
        paths = args.tables or sorted(Path(args.runs).glob(f"{args.dataset or '*'}/results.jsonl"))
        if not paths or not all(Path(path).is_file() for path in paths):
            raise UserError(f"{args.runs} has no results.jsonl yet, or a file given is missing: run "
                            f"evaluate.py first, or give --tables FILE ...")
        text, files = tables(paths), []
        if args.figure:
            text, files = write_figure_4(paths, Path(args.out or args.runs))
        print(text)
        for file in files:
            print(f"-> {file}", file=sys.stderr)
        return 0
    device = twosdm.pick_device(args.device)
    twosdm.join_processes(device)
    if args.embeddings:
        (rows, text), files = compare_embeddings(args, device), []
        folder = Path(args.runs) / rows[0]["protocol"]["dataset"]
        for row in () if twosdm.rank() else rows:
            append(folder, row)
    else:
        task = find_task(args, device)
        rows, text, files = (find_copies if args.nearest else measure)(args, task, device)
        folder = task.folder
    if twosdm.rank() or not rows:
        return 0
    print(json.dumps(rows, indent=1) if args.json == "-" else text)
    if args.json not in (None, "-"):
        with twosdm.written(args.json) as fresh:
            fresh.write_text(json.dumps(rows, indent=1))
    for file in files if args.images else [*files, folder / "results.jsonl"]:
        print(f"-> {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    twosdm.run(main)
