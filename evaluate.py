"""The paper's metrics: each a function of plain arrays, straight from its formula.

    frechet_distance    FID and sFID: how far apart two sets are, as Gaussians of their features
    inception_score     how sure a classifier is of each image, and how varied over the images
    precision_recall    the share of samples that look real; the share of the data that can be sampled
    nearest             the most similar training images: does the model copy?
    InceptionFeatures   images -> the features that the first three are computed from
    Lpips               perceptual distance of two images, also as an embedding for `nearest`

Values are comparable only with the same network (Inception of 2015-12-05), the same resize (TensorFlow 1's
bilinear), the same rounding to uint8 and the same number of images: a number is reported with its protocol.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
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
# 3 The command line
# ============================================================================================================

METRICS = ("fid", "sfid", "is", "precision", "recall")
HEADINGS = dict(zip(METRICS, ("FID", "sFID", "IS", "precision", "recall")))


def extract(batches, network, total, what, keep=None, logits=True):
    """Batches of (B, H, W, 3) uint8 -> what the metrics need of a set, as a dict of arrays, in one pass.

    mu, sigma, mu_s, sigma_s (float64), pool (the first `keep` rows), logits (N, K) if wanted, n.
    """
    stats, pools, kept, n = {}, [], [], 0
    bar = tqdm(total=total, desc=what, unit=" images")
    for pixels in batches:
        features = network(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2))
        for name in ("pool", "spatial"):
            stats.setdefault(name, RunningStats(features[name].shape[1])).update(features[name].cpu())
        if keep is None or n < keep:
            pools.append(features["pool"].cpu()[:None if keep is None else keep - n])
        if logits:
            kept.append(features["logits"].cpu())
        n += len(pixels)
        bar.update(len(pixels))
    bar.close()
    (mu, sigma), (mu_s, sigma_s) = stats["pool"].result(), stats["spatial"].result()
    return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, pool=torch.cat(pools).numpy(), n=np.array(n),
                **(dict(logits=torch.cat(kept).numpy()) if logits else {}))


def cached(folder, key, make):
    """The dict of arrays under a key that says all it depends on; made and kept if it is not there."""
    path = Path(folder) / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] + ".npz")
    if path.exists():
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile):     # a damaged cache is only a slow one
            path.unlink()
    arrays = make()
    with twosdm.user_errors(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        with open(fresh, "wb") as file:
            np.savez(file, **arrays)
        os.replace(fresh, path)
    return arrays


def score(real, fake, metrics, k=3):
    """Two sets as `extract` gives them -> {metric: value}."""
    values = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
    if "is" in metrics:
        values["is"], values["is_std"] = inception_score(fake["logits"], block=5000, shuffle_seed=0)
    if "precision" in metrics or "recall" in metrics:
        values["precision"], values["recall"] = precision_recall(real["pool"], fake["pool"], k)
    return {name: value for name, value in values.items() if name in metrics or name == "is_std"}


def table(results, metrics):
    """One line per method, aligned."""
    lines = [f"{'method':<16}" + "".join(f"{HEADINGS[m]:>11}" for m in metrics)]
    for row in results:
        name = "baseline (EDM)" if row["method"] == "baseline" else row["method"]
        lines.append(f"{name:<16}" + "".join(f"{row[m]:>11.3f}" for m in metrics))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    at_least = sample.add_sampling_flags(parser)
    add = parser.add_argument
    add("--method", nargs="+", choices=list(sample.METHODS),
        help="what to compare (default: all that are trained)")
    add("--n", type=at_least(2, int),
        help="images per method (default: 1000 on shapes and folders, otherwise 50000)")
    add("--metrics", default="fid,sfid,is,precision,recall", help="comma-separated (default: %(default)s)")
    add("--inception-weights", help="the public Inception file (default: downloaded once)")
    add("--json", metavar="FILE", help="also write this evaluation as JSON; - prints it instead of the table")
    args = parser.parse_args()
    metrics = [m.strip().lower() for m in args.metrics.split(",")]
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UserError(f"--metrics {unknown[0]} is unknown: choose among {','.join(METRICS)}")
    sample.same_dataset(args)
    device = twosdm.pick_device(args.device)

    methods = args.method or [m for m, stages in sample.METHODS.items() if all(
        stage in sample.load_given(args.checkpoint) or list(
            Path(args.runs).glob(f"{args.dataset or '*'}/{stage}/checkpoint.pt")) for stage in stages)]
    if not methods:
        raise UserError(f"{args.runs} has no trained models: run python train.py first, or give --runs")
    pipelines = [sample.Pipeline(args, method, device) for method in methods]
    saved = dict(pipelines[0].main["config"], runs=args.runs)
    dataset, folder = saved["dataset"], Path(args.runs) / saved["dataset"]
    n = args.n or (1000 if dataset in ("shapes", "folder") else 50_000)
    seeds = list(range(args.seed, args.seed + n))
    if dataset == "shapes":
        network, label = (WorldFeatures.trained(folder, saved["resolution"], device),
                          "the world's own classifier")
    else:
        try:
            network, label = InceptionFeatures(args.inception_weights).to(device), "Inception 2015-12-05"
        except UserError as error:
            raise UserError(f"--inception-weights: {error}") from None
    images = twosdm.load_images(twosdm.TrainConfig(**dict(saved, data=args.data or saved["data"])))
    if any(pipeline.data["fingerprint"] != images.fingerprint for pipeline in pipelines):
        raise UserError("the training images are not those of all the runs: give theirs with --data, or "
                        "--dataset")
    lengths = {seen for p in pipelines for stage, seen in p.describe()["images_seen"].items()
               if stage != "prior"}
    if len(lengths) > 1:
        print(f"Warning: the networks have seen {sorted(lengths)} images: not the same compute.",
              file=sys.stderr)

    protocol = dict(dataset=dataset, features=label, weights=network.sha256, resize="TF1 bilinear to 299"
                    if dataset != "shapes" else "none", n_real=len(images), n_generated=n, k=3,
                    is_block=5000, precision_recall_real=min(10_000, len(images)), seed=args.seed,
                    reference=images.fingerprint, resolution=saved["resolution"])
    # A subset for precision and recall, drawn at random: files are sorted by name, and so by class.
    order = np.random.RandomState(0).permutation(len(images))
    real = cached(
        folder / "features", ["real, shuffled", network.sha256, images.fingerprint], lambda: extract(
            (images.pixels[order[i:i + 250]] for i in range(0, len(images), 250)), network, len(images),
            "training set", keep=10_000, logits=False))
    sets = [(p.method, p.describe(), p, seeds) for p in pipelines]
    if dataset == "shapes":                                   # the floor: other images of the same world
        index = torch.arange(len(images), len(images) + n)
        sets.insert(0, ("real", dict(method="real"), lambda part: twosdm.shapes_images(
            index[part], saved["resolution"], saved["seed"]).numpy(), list(range(n))))
    results = []
    for method, described, draw, items in sets:
        began = time.perf_counter()
        fake = cached(folder / "features", [described, images.fingerprint, args.seed, n, network.sha256],
                      lambda: extract((draw(items[i:i + args.batch]) for i in range(0, n, args.batch)),
                                      network, n, method))
        results.append(dict(score(real, fake, metrics), **described, protocol=protocol,
                            seconds=round(time.perf_counter() - began, 2)))
    with twosdm.user_errors(f"{folder / 'results.jsonl'} cannot be written"), open(
            folder / "results.jsonl", "a") as file:           # grows: no evaluation is ever lost
        file.writelines(json.dumps(row) + "\n" for row in results)
    if args.json == "-":
        print(json.dumps(results, indent=1))
        return 0
    print(f"{dataset} {saved['resolution']}x{saved['resolution']}, "
          f"{n} samples against {len(images)} training images, features of {label}"
          + (" (not comparable with Inception's)" if dataset == "shapes" else ""))
    print(table(results, metrics))
    print(f"-> {folder / 'results.jsonl'}", file=sys.stderr)
    for name, dims in ("fid", len(real["mu"])), ("sfid", len(real["mu_s"])):
        if name in metrics and n <= dims:
            print(f"Warning: {n} samples for the {dims} dimensions of {HEADINGS[name]}: it is biased "
                  f"upwards, compare it at equal n only.", file=sys.stderr)
    if args.json:
        with twosdm.user_errors(f"{args.json} cannot be written"):
            fresh = Path(args.json + ".new")
            fresh.write_text(json.dumps(results, indent=1))
            os.replace(fresh, args.json)
    return 0


if __name__ == "__main__":
    twosdm.run(main)
