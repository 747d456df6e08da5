"""The paper's metrics: each a function of plain arrays, straight from its formula.

    python evaluate.py                                       the newest runs: a row of Table 1 for each method
    python evaluate.py --dataset afhq --n 50000 --method 2sdm baseline
    python evaluate.py --images samples/ --reference afhqv2-64x64.npz       any images, any usual reference
    python evaluate.py --history                             FID at each snapshot: Fig. 5
    python evaluate.py --nearest clip                        does the model copy? Figs. 6, 7 and 11 to 13
    python evaluate.py --embeddings                          the prior alone, in the space of y
    python evaluate.py --tables                              the paper's tables, of all evaluations so far

    frechet_distance    FID and sFID: how far apart two sets are, as Gaussians of their features
    inception_score     how sure a classifier is of each image, and how varied over the images
    precision_recall    the share of samples that look real; the share of the data that can be sampled
    nearest             the most similar training images
    InceptionFeatures   images -> the features that the first three are computed from
    Lpips               perceptual distance of two images, also as an embedding for `nearest`

Values are comparable only with the same network (Inception of 2015-12-05), the same resize (TensorFlow 1's
bilinear), the same rounding to uint8 and the same number of images: a number is reported with its protocol.
Every set of images, whether files, an array or the samples of a method, is a `twosdm.Images`; its features
are cached in runs/<dataset>/features, so that metrics are recomputed in seconds. evaluate.py runs in one
process: for many samples from several GPUs, evaluate what `torchrun -- sample.py --npz` has written.
"""
import codecs
import csv
import functools
import io
import json
import math
import sys
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tqdm import tqdm

import sample
import train
import twosdm
from train import option
from twosdm import ATTRIBUTES, Images, Rows, UserError, cached, reading, to_float, to_uint8, written

# ============================================================================================================
# 1 Metrics: functions of arrays, of NumPy or torch, in float64
# ============================================================================================================

class RunningStats:
    """Mean and covariance of a stream of feature rows, in memory of size D x D however many rows pass.

    A union's scatter matrix comes from those of its parts (Chan, Golub & LeVeque 1979). No large sums are
    subtracted from each other, so an offset costs no digits.
    """

    def __init__(self, dims):
        self.n = 0
        self.mean = torch.zeros(dims, dtype=torch.float64)
        self.scatter = torch.zeros(dims, dims, dtype=torch.float64)           # sum (x - mu)(x - mu)'

    def update(self, features):
        """Add the rows of features (N, D)."""
        x = torch.as_tensor(features).to(self.mean)                                       # (N, D)
        n, total = len(x), self.n + len(x)
        if n:
            step, centered = x.mean(0) - self.mean, x - x.mean(0)
            self.scatter += centered.T @ centered + torch.outer(step, step) * (self.n * n / total)
            self.mean += step * (n / total)
            self.n = total
        return self

    def result(self):
        """-> mu (D,), sigma (D, D), float64 arrays; the covariance divides by N - 1. UserError if N < 2."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least two images, got {self.n}: evaluate more images")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def check_gaussian(mu, sigma, source="a mean or a covariance"):
    """UserError unless mu (D,) and sigma (D, D) are finite and sigma is symmetric, as a covariance is."""
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    if not (finite and np.abs(sigma - sigma.T).max() <= 1e-5 * np.abs(sigma).max()):
        raise UserError(f"{source} has NaN or infinite values or is not symmetric: fetch or make it again")


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017, Eq. 6.

    Arrays (D,), (D, D), (D,), (D, D) -> float >= 0. With sigma1 = R R', sigma1 sigma2 has the eigenvalues of
    the symmetric R' sigma2 R: real, and nonnegative up to rounding, also with fewer images than dimensions,
    where a general matrix root turns complex or needs an epsilon that changes the value. Raises UserError if
    a value is not finite or a covariance not symmetric.
    """
    mu1, mu2 = (np.atleast_1d(mu).astype(np.float64) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(sigma).astype(np.float64) for sigma in (sigma1, sigma2))
    assert mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2
    check_gaussian(mu1, sigma1)
    check_gaussian(mu2, sigma2)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))                                              # (D, D), R
    trace = np.sqrt(np.linalg.eigvalsh(root.T @ sigma2 @ root).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def inception_score(logits, splits=10, block=None, shuffle_seed=None):
    """exp of the mutual information of image and class: Salimans et al. 2016, Sec. 4.

    (N, C) -> (mean, std) over the splits, each at least 1. `splits` cuts the rows evenly; `block` cuts after
    that many rows instead, and the last block is what is left. Cuts are consecutive, so rows sorted by
    class score far too low: `shuffle_seed` shuffles them first. Our protocol is block=5000, shuffled.
    Raises UserError if there are fewer rows than splits.
    """
    logits = torch.as_tensor(logits)
    n = len(logits)
    if n < splits and not block:
        raise UserError(f"an Inception Score needs an image in each of its {splits} splits, got {n} images: "
                        f"use fewer splits or more images")
    if shuffle_seed is not None:                              # RandomState: NumPy promises never to change it
        order = np.random.RandomState(shuffle_seed).permutation(n)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    cuts = [i * n // splits for i in range(1, splits)]
    scores = []
    for part in logits.split(block) if block else logits.tensor_split(cuts):
        log_p = part.double().log_softmax(1)                                              # (n, C)
        p, marginal = log_p.exp(), log_p.exp().mean(0)                                    # (n, C), (C,)
        # xlogy(0, 0) = 0: a class whose probability underflows adds nothing.
        information = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(information.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def _blocks(x, center=0.0, first=0):
    """(N, ...) -> slices of the rows and these as float64 (n, D) minus center, at most 64 MB at a time."""
    size = min(1024, max(16, 2**23 // math.prod(x.shape[1:])))
    for start in range(first, len(x), size):
        rows = torch.as_tensor(x[start:start + size]).flatten(1).double()
        yield slice(start, start + len(rows)), rows - center


def _center(x):
    """(N, ...) -> (D,): the origin for both sides of a distance, so that an offset costs no digits."""
    return sum(rows.sum(0) for _, rows in _blocks(x)) / len(x)


def _rounding(dims):
    """How far |a|^2 - 2ab + |b|^2 may be off in float64, relative to |a|^2 + |b|^2, with room to spare."""
    return 16 * math.sqrt(dims) * torch.finfo(torch.float64).eps


def _squared_norms(a):
    return torch.linalg.vector_norm(a, dim=1).square()        # a.square() would fill another 16 MB


def _pairs(x, y, center):
    """(N, ...), (M, ...) -> slices of the rows of both, block by block, and squared distances (n, m).

    Of a set and itself half of the blocks are computed: the distance is symmetric.
    """
    for rows, a in _blocks(x, center):
        for columns, b in _blocks(y, center, rows.start if x is y else 0):
            distances = _squared_distances(a, b)
            yield rows, columns, distances
            if x is y and columns != rows:
                yield columns, rows, distances.T


def _squared_distances(a, b):
    """(n, D), (m, D) -> (n, m). What rounding cannot tell from 0 is 0, so copies are at distance 0.

    One matrix product: torch.cdist is as exact only without it, and then takes many times as long.
    """
    scale = _squared_norms(a)[:, None] + _squared_norms(b)                                # (n, m)
    distances = torch.addmm(scale, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= _rounding(a.shape[1]) * scale, 0)


def _balls(x, k, center):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest other row, its rim included."""
    distances, _ = nearest(x, x, k + 1)                       # the nearest of all, at 0, is the row itself
    radii = torch.from_numpy(distances[:, k]).to(center.device).square()
    norms = torch.cat([_squared_norms(rows) for _, rows in _blocks(x, center)])
    # A radius is compared with another rounded distance: on the rim they must count as equal.
    return radii + 6 * _rounding(len(center)) * (norms + radii)


def precision_recall(real, fake, k=3):
    """Improved precision and recall: Kynkäänniemi et al. 2019, Eq. 1-2; (N, D), (M, D) -> two shares.

    A set covers the balls around its samples, each reaching to the k-th nearest other one. Precision is the
    share of fake that real covers, recall the share of real that fake covers; on the rim is inside. In
    float64: the float16 of OpenAI's evaluator reads 0.001 to 0.003 higher. Raises UserError unless N, M > k.
    """
    for name, x in ("real", real), ("generated", fake):
        if len(x) <= k:
            raise UserError(f"precision and recall need more than k = {k} {name} images, got {len(x)}")
    center = _center(real)
    real_balls = _balls(real, k, center)                                                  # (N,)
    fake_balls = _balls(fake, k, center)                                                  # (M,)
    real_inside = torch.zeros_like(real_balls, dtype=torch.bool)
    fake_inside = torch.zeros_like(fake_balls, dtype=torch.bool)
    for rows, columns, distances in _pairs(real, fake, center):
        fake_inside[columns] |= (distances <= real_balls[rows, None]).any(0)
        real_inside[rows] |= (distances <= fake_balls[columns]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def nearest(queries, gallery, k=1, metric="euclidean"):
    """The k nearest rows of the gallery for each query: (Q, ...), (G, ...) -> distances, indices (Q, k).

    Arrays, the nearest first; copies are at distance 0. `gallery` may also be an iterable of chunks, each
    seen once, so that a data set need not fit in memory. metric: "euclidean", or "cosine" for 1 - cos.
    Distances between rows of `Lpips.embed`, squared, are LPIPS. Raises UserError if the gallery has too few
    rows.
    """
    assert metric in ("euclidean", "cosine") and k >= 1
    chunks = [gallery] if hasattr(gallery, "shape") else gallery
    if metric == "cosine":                                    # of unit vectors, 1 - cos = |u - v|^2 / 2
        def unit(x):
            return F.normalize(torch.as_tensor(x).flatten(1).double(), dim=1)

        queries, chunks = unit(queries), map(unit, chunks)
    center, seen = _center(queries), 0
    best = torch.full((len(queries), k), math.inf, dtype=torch.float64, device=center.device)
    index = torch.full_like(best, -1, dtype=torch.int64)
    for chunk in chunks:
        for rows, columns, distances in _pairs(queries, chunk, center):
            near, found = distances.topk(min(k, distances.shape[1]), largest=False)       # (n, k)
            found += seen + columns.start
            best[rows], order = torch.cat([best[rows], near], 1).topk(k, largest=False)
            index[rows] = torch.cat([index[rows], found], 1).gather(1, order)
        seen += len(chunk)
    if seen < k:
        raise UserError(f"{k} nearest neighbors need {k} images to search, got {seen}")
    return (best / 2 if metric == "cosine" else best.sqrt()).cpu().numpy(), index.cpu().numpy()


# ============================================================================================================
# 2 Networks: from images to features
# ============================================================================================================

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
TORCHVISION_URL = "https://download.pytorch.org/models/"
LPIPS_NETS = {             # the ReLUs that are compared, the files of linear layers and trunk, and the trunk
    "alex": ((1, 4, 7, 9, 11), "lpips-v0.1-alex-df73285e.pth", "alexnet-owt-7be5be79.pth",
             torchvision.models.alexnet),
    "vgg": ((3, 8, 15, 22, 29), "lpips-v0.1-vgg-a78928a0.pth", "vgg16-397923af.pth",
            torchvision.models.vgg16)
}


@contextmanager
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


@contextmanager
def _public(path, url, name=None):
    """Opens a public file of weights -> (its tensors by name, the first 8 digits of its sha256).

    path None: the file `name` (or as in the url) in PyTorch's cache, downloaded if it is not there; the name
    ends in the hash it must have. Raises UserError if it is missing, or for whatever fails in the body: a
    tensor too many, too few, or of another shape.
    """
    name = name or url.rsplit("/", 1)[1]
    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", name))
    if path is None and not file.exists():
        remedy = f"fetch {url} on another machine and give its path, or save it as {file}"
        with twosdm.loading(name, remedy):                    # no connection; a file with another hash
            torch.hub.load_state_dict_from_url(url, file_name=name, check_hash=True, map_location="cpu")
    with reading(file, f"it should be {name}, fetch {url}"):
        content = file.read_bytes()
        digest = twosdm.hash_of(content)[:8]                  # of its sha256
        if path is None and not name.endswith(f"-{digest}.pth"):
            raise UserError(f"{file} has the sha256 {digest}, not that in its name: delete it")
        yield torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), digest


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
        with _public(weights, INCEPTION_URL) as (state, self.sha256):
            # A plain dict carries no version, and without one BatchNorm does not ask for its batch counter.
            self.net.load_state_dict(dict(state))
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
        x = to_uint8(images.to(self.net.fc.weight.device)).float()                        # (N, 3, H, W)
        x = (tf1_resize(x) - 128) / 128                                                   # (N, 3, 299, 299)
        logits = self.net(x.contiguous(memory_format=torch.channels_last))                # (N, 1008)
        return dict(self.taps, logits=logits)

    def train(self, mode=True):
        return super().train(False)                           # with a batch's statistics it is no metric


class Lpips(nn.Module):
    """LPIPS v0.1, Zhang et al. 2018, Eq. 1: two (N, 3, H, W), uint8 or floats in [-1, 1], not [0, 1] -> (N,).

    It is |embed(a) - embed(b)|^2, so the neighbors in a data set are a matrix product away. Images need 31
    pixels or more. weights: the paths (linear layers, torchvision's trunk); None for either downloads it.
    `sha256` has the beginnings of both hashes. Raises UserError if a file is missing or wrong.
    """

    def __init__(self, weights=None, net="alex"):
        super().__init__()
        self.taps, linear, trunk, make = LPIPS_NETS[net]
        linear_path, trunk_path = weights or (None, None)
        with torch.device("meta"):                            # most of these nets is a classifier, not wanted
            features = make().features
        with _public(trunk_path, TORCHVISION_URL + trunk, trunk) as (state, trunk_digest):
            own = {name: state[f"features.{name}"] for name in features.state_dict()}
            features.load_state_dict(own, assign=True)
        self.trunk = features[:self.taps[-1] + 1]             # the last max-pool would fail at 32 pixels
        self.linear = nn.ParameterList()
        with _public(linear_path, LPIPS_URL + net + ".pth", linear) as (state, linear_digest):
            for i, tap in enumerate(self.taps):
                weight = state[f"lin{i}.model.1.weight"]                                  # (1, C, 1, 1)
                assert weight.shape == (1, self.trunk[tap - 1].out_channels, 1, 1)
                assert (weight >= 0).all()                    # or it would be no distance
                self.linear.append(nn.Parameter(weight, requires_grad=False))
        self.sha256 = linear_digest, trunk_digest
        # The mean and deviation of ImageNet's pixels, for the range [-1, 1].
        colors = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("colors", colors[:, :, None, None])

    @_exactly()
    def embed(self, images):
        """(N, 3, H, W) -> (N, M): each layer's features, of unit length per pixel, times sqrt(w / (h w))."""
        x, (shift, scale) = images.to(self.colors.device), self.colors
        x = to_float(x) if x.dtype == torch.uint8 else x.float()
        x, parts = (x - shift) / scale, []
        for i, layer in enumerate(self.trunk):
            x = layer(x)                                                                  # (N, C, h, w)
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                weight = self.linear[self.taps.index(i)]                                  # (1, C, 1, 1)
                parts.append((unit * (weight / x[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, a, b):
        return (self.embed(a) - self.embed(b)).square().sum(1)


class WorldFeatures(twosdm.SmallClip):
    """On the embedded world, where Inception means nothing: a small classifier of the world's attributes.

    (N, 3, H, W) uint8 or [-1, 1] -> dict of pool (N, 64), spatial (N, 448) and logits (N, 1536), those of the
    joint distribution of shape, color, background and count as a product of four. It is an image tower like
    the embedder's, but independent of it: other images, labels instead of captions. Its values compare with
    each other, not with Inception's.
    """
    label, resize, dims = "the world's own classifier (not comparable with Inception's)", "none", (64, 448)

    def __init__(self):
        self.values = list(ATTRIBUTES.values())               # how many each attribute has
        super().__init__(sum(self.values), width=16)

    def features(self, images):
        x = to_float(to_uint8(images.to(self.embed.weight.device)))
        last = self.image[:-4](twosdm.at_most_32(x))
        pool = self.image[-4:-1](last)                                                    # (N, 64)
        joint = torch.zeros_like(pool[:, :1])
        for logits in self.image[-1](pool).split(self.values, 1):
            # log p of independent attributes adds up.
            joint = (joint[:, :, None] + logits.log_softmax(1)[:, None]).flatten(1)
        return {"pool": pool, "spatial": last[:, :28].flatten(1), "logits": joint}

    forward = _exactly()(features)                            # training needs gradients

    @classmethod
    def trained(cls, folder, resolution, device="cpu", steps=300, batch=128):
        """The classifier for a resolution from its cache in `folder`; if absent, it is trained: a minute."""
        torch.manual_seed(0)                                  # always the same
        net = cls().to(device)

        def make():
            optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
            for step in tqdm(range(steps), "training the world's classifier"):
                index = 10**9 + step * batch + torch.arange(batch)            # far from any training set
                target = torch.zeros_like(index)
                for name, values in twosdm.shapes_attributes(index).items():
                    target = target * ATTRIBUTES[name] + values
                images = twosdm.shapes_images(index, resolution).permute(0, 3, 1, 2)
                loss = F.cross_entropy(net.features(images)["logits"], target.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return net.state_dict()

        net.load_state_dict(cached(folder / f"classifier-{resolution}.pt", make))
        net.sha256 = twosdm.fingerprint(net)
        return net


# ============================================================================================================
# 3 Sets of images: whatever they are, a twosdm.Images; what must be drawn or unpacked is made when looked at
# ============================================================================================================


def samples(pipeline, seed, n):
    """The images that a method draws from the seeds seed, ..., seed + n - 1, when they are looked at."""
    shape = pipeline.resolution, pipeline.resolution, 3
    pixels = Rows(lambda rows: pipeline((seed + rows).tolist()), n, shape)
    settings = json.dumps((pipeline.describe(), seed, n), sort_keys=True)
    return Images(pipeline.method, pixels, twosdm.hash_of(settings.encode()))


def npz_images(path):
    """`arr_0` (N, R, R, 3) uint8 of an .npz, as sample.py --npz and OpenAI's evaluator have it, streamed."""
    with reading(path, "give a whole .npz whose arr_0 holds images (N, R, R, 3), uint8"):
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    begin, size = file.tell(), math.prod(shape[1:])
    square = len(shape) == 4 and min(shape) > 0 and shape[1] == shape[2] <= 2048 and shape[3] == 3
    if dtype != np.uint8 or fortran or not square:
        raise UserError(f"arr_0 in {path} is {dtype} of shape {shape}: it must be uint8 of shape "
                        f"(N, R, R, 3), R at most 2048, not of several sizes nor in Fortran's order")

    def read(rows):
        content = b""
        with reading(path, "make or fetch it again"):
            for row in rows:
                file.seek(begin + size * row)                 # read in order, its checksum is checked
                content += file.read(size)
            return np.frombuffer(content, np.uint8).reshape(-1, *shape[1:])

    fingerprint = "{:08x}-{}-{}".format(archive.getinfo("arr_0.npy").CRC, *shape)
    return Images(str(path), Rows(read, shape[0], shape[1:]), fingerprint)


def file_images(path, task):
    """The images of a folder or zip at the task's resolution; None: squares of one size stay as they are.

    Everything else is as in training: center squares by Lanczos, transparency on white, 16 bits to 8.
    """
    files, sides, resolution = twosdm.ImageFiles(path), set(), task.resolution
    drawn = Path(path, "settings.json").is_file()             # by sample.py, whose grid is no sample
    rows = [i for i, name in enumerate(files.names) if not (drawn and name.startswith("grid"))]
    if resolution is None:
        for i in rows:
            with suppress(Exception):              # a bad file is named when it is read
                sides.update(Image.open(io.BytesIO(twosdm.content(files.files[i]))).size)
        if len(sides) != 1:
            raise UserError(f"{path} holds images of several sizes, or not square: say with --resolution "
                            f"what side their center squares shall have")
        resolution, = sides
    images = twosdm.prepare_images(path, resolution, task.folder / "data", task.args.skip_bad and not drawn)
    return images.subset(np.array(rows)) if drawn else images


# ============================================================================================================
# 4 From images to features to metrics
# ============================================================================================================

METRICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s"), "is": (), "precision": ("pool",),
           "recall": ("pool",)}                               # and what each needs of the real features
BALL_NEIGHBORS, IS_BLOCK = 3, 5000                            # k of precision and recall; images per split
REAL_ROWS, FAKE_ROWS = 10_000, 50_000              # how many images at most enter precision, recall and IS



@functools.cache
def say(text):
    """To standard error, once."""
    print(text, file=sys.stderr)


def batches(rows, size):
    """(N,) row numbers -> a list of arrays of at most `size` of them."""
    return np.split(np.asarray(rows), range(size, len(rows), size))


@torch.no_grad()
def embeddings(embed, images, rows, task):
    """Yields embed(x) of these rows of a set, batch by batch."""
    for part in tqdm(batches(rows, task.args.batch), images.name[-30:], leave=False):
        yield embed(images.batch(part, task.device)).cpu()


def features(images, network, task, most):
    """What the metrics need of a set, from the task's cache or by one pass, in memory that is flat in N.

    -> dict of n, the number of images; mu, sigma and mu_s, sigma_s, the mean and the covariance (float64) of
    pool and spatial features; and, of `most` images drawn at random, pool and logits. Raises UserError.
    """
    def make():
        chosen = np.zeros(len(images), bool)      # at random: files are sorted by name, and so by class
        chosen[np.random.RandomState(0).permutation(len(images))[:most]] = True
        pool_stats, spatial_stats = map(RunningStats, network.dims)
        pool, logits = [], []
        # A covariance costs the same for 1 row and 1024.
        for block in tqdm(batches(range(len(images)), 1024), f"features of {images.name[-30:]}"):
            parts = [network(images.batch(part, task.device)) for part in batches(block, task.args.batch)]
            out = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
            if not twosdm.all_finite(out):
                raise UserError(f"the features of {images.name} are not finite: the network's weights or the "
                                f"device are faulty, try --device cpu")
            pool_stats.update(out["pool"])
            spatial_stats.update(out["spatial"])
            pool.append(out["pool"][chosen[block]])
            logits.append(out["logits"][chosen[block]])
        moments = *pool_stats.result(), *spatial_stats.result()
        mu, sigma, mu_s, sigma_s = map(torch.from_numpy, moments)
        return dict(n=len(images), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, pool=torch.cat(pool),
                    logits=torch.cat(logits))

    return cached(task.folder / f"features/{images.fingerprint}-{network.sha256}-{most}.pt", make)


def score(real, fake, metrics):
    """Two sets as `features` gives them -> {metric: value}."""
    values = {}
    for name in ("fid", "sfid"):
        if name in metrics:
            mu, sigma = METRICS[name]
            values[name] = frechet_distance(real[mu], real[sigma], fake[mu], fake[sigma])
    if "is" in metrics:
        values["is"], values["is_std"] = inception_score(fake["logits"], block=IS_BLOCK, shuffle_seed=0)
    if "precision" in metrics or "recall" in metrics:         # one costs as much as both
        values["precision"], values["recall"] = precision_recall(real["pool"], fake["pool"], BALL_NEIGHBORS)
    return values


def read_statistics(path, network):
    """The reference statistics of an .npz: EDM's (mu, sigma), OpenAI's (also mu_s, sigma_s), or our own.

    -> dict of these, and of pool, n, weights if they are ours; empty if the file holds images alone. Raises
    UserError if an array is missing, of another network, not finite or not symmetric.
    """
    names = "n mu sigma mu_s sigma_s pool weights".split()
    with reading(path, f"give mu (D,) and sigma (D, D) of {network.label}, D = {network.dims[0]}, for sFID "
                 f"also mu_s and sigma_s, D = {network.dims[1]}, or images as arr_0"):
        with np.load(path) as file:
            arrays = {name: file[name] for name in names if name in file}
        for metric, dims in zip(("fid", "sfid"), network.dims):
            mu, sigma = METRICS[metric]
            if mu in arrays or sigma in arrays:
                assert arrays[mu].shape == (dims,) and arrays[sigma].shape == (dims, dims)
                check_gaussian(arrays[mu], arrays[sigma], f"{mu} or {sigma} in {path}")
        assert np.isfinite(arrays.get("pool", 0)).all()
    if str(arrays.get("weights", network.sha256)) != network.sha256:
        raise UserError(f"{path} was made with the weights {arrays['weights']}, not {network.sha256}: use "
                        f"one file of weights for both sides")
    return arrays


def reference(task, network):
    """The side of the real images -> dict of what can be had of what `features` gives.

    One row, one reference: what the statistics of --reference lack is had from the images beside them
    (arr_0 of OpenAI's files: enough for precision and recall, not for a mean), and from nowhere else.
    """
    path, real = task.args.reference, {}
    if path and path.endswith(".npz"):
        real = read_statistics(path, network)
    if "mu" not in real:
        return features(task.real(), network, task, REAL_ROWS)
    if "pool" not in real and "arr_0" in np.load(path).files:
        real["pool"] = features(npz_images(path), network, task, REAL_ROWS)["pool"]
    return real


def measure(task):
    """Yields the row of each candidate: its metrics, what it is, and the protocol that they depend on."""
    args = task.args
    if task.dataset == "shapes":
        network = WorldFeatures.trained(task.folder, task.resolution, task.device)
    else:
        network = InceptionFeatures(args.inception_weights).to(task.device)
    real = reference(task, network)
    if args.save_reference:
        with written(args.save_reference) as file:
            np.savez(file, **real | dict(weights=network.sha256))
        say(f"-> {args.save_reference}")
    metrics = [name for name in args.metrics if real.keys() >= set(METRICS[name])]
    for lacking in set(args.metrics) - set(metrics):
        say(f"left out: {lacking}, for which {args.reference} has nothing: give the images themselves as "
            f"--reference")
    for described, images, pipeline in task.candidates() if metrics else ():
        fake = features(images, network, task, FAKE_ROWS)
        if len(images) <= network.dims[0]:
            say(f"{len(images)} samples for the {network.dims[0]} dimensions of FID: it is biased upward, "
                f"compare it at equal n only")
        protocol = task.protocol(
            reference=args.reference or "training set",
            n_real=int(real["n"]) if "n" in real else None,
            features=network.label,
            weights=network.sha256,
            resize=network.resize,
            n_generated=len(images),
            k=BALL_NEIGHBORS,
            is_block=IS_BLOCK)
        yield dict(
            score(real, fake, metrics),
            **described,
            protocol=protocol,
            timing=pipeline and pipeline.timing())


# ============================================================================================================
# 5 The nearest training images: Figs. 6, 7 and 11-13; and the prior alone
# ============================================================================================================

NEIGHBORS = 3                                                 # that a picture shows of each sample
QUANTILE = 0.05



def similarity(task):
    """What --nearest compares: (x (B, 3, R, R) -> (B, D), the power of their distances, its name)."""
    args = task.args
    if args.nearest == "pixel":
        return lambda x: x.flatten(1) / 2, 1, "pixels in [0, 1]"
    if args.nearest == "lpips":
        if task.resolution < 31:
            raise UserError(f"LPIPS needs 31x31 pixels, these images have {task.resolution}x"
                            f"{task.resolution}: use --nearest clip or --nearest pixel")
        net = Lpips(args.lpips_weights).to(task.device)
        return net.embed, 2, f"LPIPS 0.1 (alex {' '.join(net.sha256)})"
    if task.dataset == "shapes":
        net = twosdm.trained_clip(sample.find_run(args, "embedder"))
    else:
        net = twosdm.ClipEmbedder(args.clip_weights or getattr(task.config, "clip_weights", "openai"))
    net = net.to(task.device)

    @_exactly()
    def embed(x):
        return F.normalize(net(x)) / math.sqrt(2)             # of these, |u - v|^2 = 1 - cos

    return embed, 2, f"cosine of {type(getattr(net, 'inner', net)).__name__} {twosdm.fingerprint(net)}"


def find_copies(task):
    """--nearest: yields a row for each candidate, on its nearest training images; leaves pictures and a CSV.

    Beside them, as "training", as many training images and their nearest *other* ones. A model that copies
    lies to the left: `copies` is the share of samples within the 5% quantile of "training".
    """
    args = task.args
    embed, power, name = similarity(task)
    gallery, sets, queries = task.real(), [], []
    for described, images, _ in ((dict(method="training"), gallery, None), *task.candidates()):
        items = np.random.RandomState(args.seed).permutation(len(images))[:args.n or 100]
        items.sort()
        sets.append((described, images, items))
        queries += embeddings(embed, images, items, task)
    chunks = embeddings(embed, gallery, range(len(gallery)), task)
    distances, index = nearest(torch.cat(queries), chunks, min(NEIGHBORS + 1, len(gallery)))
    lines, path = [], task.out / f"nearest-{args.nearest}"
    for described, images, items in sets:
        method, n = described["method"], len(items)
        own = int(images is gallery)                          # the nearest of all is the image itself
        d, distances = distances[:n, own] ** power, distances[n:]                         # (n,)
        found, index = index[:n, own:own + NEIGHBORS], index[n:]                          # (n, NEIGHBORS)
        if own:
            edge = float(np.quantile(d, QUANTILE))
        order = np.argsort(d, kind="stable")
        for share, i in zip(np.arange(1, n + 1) / n, order):  # that is as near, or nearer
            lines.append(dict(method=method, item=items[i], distance=d[i], neighbour=found[i, 0],
                              share=share))
        worst = order[:16]                                    # a row for each, and its neighbors
        columns = [images.pixels[items[worst]], *(gallery.pixels[rows] for rows in found[worst].T)]
        sheet = twosdm.image_grid(np.concatenate(np.stack(columns, 1)), len(columns))
        twosdm.save_picture(f"{path}-{method}.png", sheet, least=256)
        say(f"-> {path}-{method}.png")
        yield dict(
            described,
            nearest=args.nearest,
            smallest=float(d.min()),
            median=float(np.median(d)),
            copies=float((d <= edge).mean()),
            protocol=task.protocol(metric=name, n_generated=n, n_real=len(gallery)))

    save_curves(path, lines, "distance", "share", title=f"nearest training image, {name}")


def compare_embeddings(task):
    """--embeddings: yields rows on the prior's samples among embeddings of training images.

    Beside them other training embeddings, as good as can be, and draws from a Gaussian of their mean and
    covariance: all that the Fréchet distance knows of a set, but no more than that. median_distance: to the
    nearest training embedding.
    """
    args, images, pipeline = task.args, task.real(), task.pipelines[0]
    if pipeline.prior is None:
        raise UserError("--embeddings compares the samples of a prior, and this y is drawn without one")
    n, generator = min(args.n or 1000, len(images) // 2), np.random.default_rng(args.seed)
    order = generator.permutation(len(images))[:n + REAL_ROWS]
    y = torch.cat(list(embeddings(pipeline.embedder, images, order, task))).double()
    others, real = y[:n], y[n:]                                                           # (n, D), (M, D)
    drawn = [pipeline.conditions(seeds.tolist())[0].cpu().double()
             for seeds in batches(range(args.seed, args.seed + n), args.batch)]
    known = RunningStats(real.shape[1]).update(real).result()
    gaussian = torch.from_numpy(generator.multivariate_normal(*known, n, method="eigh"))
    protocol = task.protocol(metric="of embeddings", n_generated=n, n_real=len(real))
    for described, y in ((dict(method="training"), others), (dict(method="Gaussian"), gaussian),
                         (pipeline.describe(), torch.cat(drawn))):
        precision, recall = precision_recall(real, y, BALL_NEIGHBORS)
        yield dict(
            described,
            frechet=frechet_distance(*known, *RunningStats(y.shape[1]).update(y).result()),
            precision=precision,
            recall=recall,
            median_distance=float(np.median(nearest(y, real)[0])),
            protocol=protocol)


# ============================================================================================================
# 6 Tables and figures
# ============================================================================================================

NAMES = {"2sdm": "2SDM", "oracle": "2SDM + oracle", "baseline": "EDM", "joint": "Overfit-2SDM",
         "real": "other real images"}                         # as the paper has them
# What tables show, and with how many digits. gain: by how much, in percent, FID is lower than EDM's.
DIGITS = {"is": 1, "precision": 3, "recall": 3, "fid": 2, "sfid": 2, "ms_per_image": 1, "prior_share": 3,
          "gain": 1}
SHOWN = "method images fid sfid is precision recall frechet median_distance smallest median copies".split()
# What else must be equal for evaluations to be averaged; a table has columns for those that differ.
COLUMNS = ("method dataset y tags image_steps guidance temperature label prompt images steps churn s_noise "
           "seed n_generated n_real reference resolution weights").split()
# The paper's values, n = 50,000: Table 1 (for Overfit-2SDM Table 4), with the times per image of Table 5, on
# a V100. From scratch: Table 3, whose values fit n = 20,000 (inferred).
PAPER = """
| paper           |                      |    IS | precision | recall |  FID | sFID | ms per image | gain |
| ---             | ---                  |   --- |       --- |    --- |  --- |  --- |          --- |  --- |
| afhq            | EDM                  |  8.91 |      .752 |   .614 | 2.04 | 13.7 |          789 |      |
| afhq            | 2SDM                 | 10.00 |      .844 |   .619 | 1.56 | 13.7 |          824 |      |
| afhq            | 2SDM, 38 image steps |       |           |        | 1.58 |      |          784 |      |
| afhq            | Overfit-2SDM         | 10.70 |      .977 |   .869 | 1.16 | 10.6 |              |      |
| afhq            | EDM, scratch         |       |           |        | 3.53 |      |              |      |
| afhq            | 2SDM, scratch        |       |           |        | 1.83 |      |              | 48.2 |
| afhq            | oracle, scratch      |       |           |        | 1.57 |      |              | 55.6 |
| ffhq            | EDM                  |  3.33 |      .697 |   .569 | 2.46 | 4.90 |          789 |      |
| ffhq            | 2SDM                 |  3.47 |      .721 |   .697 | 2.32 | 4.98 |          824 |      |
| ffhq            | 2SDM, 38 image steps |       |           |        | 2.32 |      |          784 |      |
| ffhq            | Overfit-2SDM         |  3.37 |      .695 |   .552 | 3.33 | 5.37 |              |      |
| ffhq            | EDM, scratch         |       |           |        | 6.39 |      |              |      |
| ffhq            | 2SDM, scratch        |       |           |        | 4.73 |      |              | 26.0 |
| ffhq            | oracle, scratch      |       |           |        | 4.35 |      |              | 31.9 |
| imagenet        | EDM                  |  11.3 |      .523 |   .524 | 35.1 | 9.14 |              |      |
| imagenet        | 2SDM                 |  15.6 |      .614 |   .526 | 21.0 | 5.59 |              |      |
| imagenet-class  | EDM                  |  13.6 |      .530 |   .532 | 25.4 | 6.50 |              |      |
| imagenet-class  | 2SDM                 |  17.3 |      .541 |   .573 | 17.4 | 4.63 |              |      |
| imagenet-class  | EDM, scratch         |       |           |        | 26.5 |      |              |      |
| imagenet-class  | 2SDM, scratch        |       |           |        | 18.1 |      |              | 31.5 |
| imagenet-class  | oracle, scratch      |       |           |        | 19.7 |      |              | 25.6 |
| imagenet-latent | EDM                  |  40.4 |      .532 |   .610 | 34.2 | 9.59 |              |      |
| imagenet-latent | 2SDM                 |  52.1 |      .590 |   .603 | 24.3 | 7.36 |              |      |
"""


def table(rows):
    """Rows, dicts of the same columns -> Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    def shown(x):
        return f"{x:.3f}" if isinstance(x, float) else str(x)

    return "\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines)


def save_curves(path, rows, x, y, **axes):
    """Rows -> path.csv and, if there is matplotlib, path.png: a curve for each method.

    It goes through (row[x], row[y] ± row["std"]).
    """
    with written(f"{path}.csv") as file:
        writer = csv.DictWriter(codecs.getwriter("utf8")(file), rows[0])
        writer.writeheader()
        writer.writerows(rows)
    say(f"-> {path}.csv")
    try:
        from matplotlib.figure import Figure                  # optional: only figures need it
    except ImportError:
        say(f"no {path}.png: for figures, pip install matplotlib; nothing has to be computed again")
        return
    figure = Figure(figsize=(5.5, 3.8), layout="constrained", dpi=150)
    plot = figure.add_subplot(**dict(xlabel=x, ylabel=y) | axes)
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row[x], row[y], row.get("std", 0)) for row in rows if row["method"] == method]
        plot.errorbar(*zip(*points), fmt=".-", capsize=2, label=method)
    plot.legend(frameon=False)
    with written(f"{path}.png") as file:
        figure.savefig(file, format="png")
    say(f"-> {path}.png")


def read_results(paths):
    """Evaluations in results.jsonl files -> one dict for all of equal COLUMNS: these, and lists of values.

    There is a value for each training run, identified by file and training seed. Of repeated evaluations of
    the same networks the last value of each metric counts; of networks trained again, the last evaluation.
    """
    groups = {}
    for path in paths:
        with reading(path, "it should be a results.jsonl"):
            lines = Path(path).read_text(errors="replace").splitlines()
        for line in lines:
            with suppress(Exception):              # what is no evaluation is passed over
                row = json.loads(line)
                row = (row.get("timing") or {}) | row | row["protocol"]
                row = {name: value for name, value in row.items() if value is not None}
                if "metric" in row:                           # of --nearest and --embeddings
                    continue
                row["method"] = NAMES[row["method"]]
                row["tags"] = " ".join(row.get("tags", ())) or "–"
                run = str(path), row.get("train_seed", "–")
                runs = groups.setdefault(tuple(row.get(name, "–") for name in COLUMNS), {})
                before = runs.get(run, {})
                again = before.get("networks") == row.get("networks")
                runs[run] = before | row if again else row
    results = []
    # EDM has no y, whatever --y its training was given.
    edms = {(dataset, *more): runs for (method, dataset, y, *more), runs in groups.items()
            if method == NAMES["baseline"]}
    for (method, *columns), runs in groups.items():
        edm = edms.get((columns[0], *columns[2:]), {})
        for run, row in runs.items():
            if "fid" in row and edm.get(run, {}).get("fid"):
                row["gain"] = 100 * (1 - row["fid"] / edm[run]["fid"])
        result = dict(zip(COLUMNS, (method, *columns)), runs=len(runs))
        for name in (*DIGITS, "y_dim"):
            result[name] = [row[name] for row in runs.values() if name in row]
        results.append(result)
    return results


def varying(results):
    """Those of COLUMNS in which results differ, those of real images, which nothing has drawn, left out."""
    drawn = [result for result in results if result["method"] != NAMES["real"]]
    return [name for name in COLUMNS[2:] if len({result[name] for result in drawn}) > 1]


def label(result, names):
    return ", ".join(f"{name} {result[name]}" for name in names if result[name] != "–")


def spread(values, digits):
    """Numbers -> "mean ± standard deviation"; one number stands alone."""
    shown = f"{np.mean(values):.{digits}f}" if values else "–"
    return f"{shown} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else shown


def tables(paths):
    """Tables 1, 3, 4 and 5 from all evaluations in results.jsonl files, above the paper's, as Markdown."""
    text, results = "", read_results(paths)
    for dataset in dict.fromkeys(result["dataset"] for result in results):
        chosen = [result for result in results if result["dataset"] == dataset]
        names, rows = varying(chosen), []
        for result in chosen:
            row = {name: result[name] for name in ("method", *names)}
            row |= {name: spread(result[name], digits) for name, digits in DIGITS.items()}
            rows.append(dict(row, runs=result["runs"]))
        common = [name for name in COLUMNS[2:] if name not in names]
        text += f"\n## {dataset}, {label(chosen[-1], common)}\n\n{table(rows)}\n"
        if f"| {dataset} " in PAPER:
            shown = "| paper", "| ---", f"| {dataset} "
            text += "\n" + "\n".join(line for line in PAPER.splitlines() if line.startswith(shown))
    return text


def write_figure_4(paths, folder):
    """FID of the oracle against the dimension of y, one curve per reduction and budget."""
    methods = NAMES["oracle"], NAMES["baseline"]
    results = [result for result in read_results(paths) if result["method"] in methods and result["fid"]]
    names, rows = [name for name in varying(results) if name != "y"], []
    for result in results:
        kind, _, size = result["y"].partition(":")
        if not size or result["method"] == NAMES["baseline"]:       # all components; or none, which is EDM
            kind, size = "pca", max(result["y_dim"])
        curve = ", ".join(filter(None, (result["dataset"], kind, label(result, names))))
        rows.append(dict(method=curve, images=result["images"], dims=int(size), fid=np.mean(result["fid"]),
                         std=np.std(result["fid"]), runs=result["runs"]))
    if not rows:
        raise UserError("there are no evaluations of the oracle yet: train.py --stage image --y pca:8, then "
                        "evaluate.py --method oracle --y pca:8, and so on")
    rows.sort(key=lambda row: (row["method"], row["dims"]))
    xlabel = "dimensions (pca) or clusters (kmeans) of y"
    save_curves(folder / "figure-4", rows, "dims", "fid", xlabel=xlabel, xscale="symlog", yscale="log")


# ============================================================================================================
# 7 The command line
# ============================================================================================================
AT_ODDS = dict(                                               # of each mode: the flags that do not go with it
    tables="resolution y", figure="resolution y", history="nearest checkpoint",
    images="method checkpoint history y prompt",
    embeddings="images method history nearest reference save_reference")


@dataclass
class EvaluationFlags:
    """What is evaluated, and how."""
    method: list = option(None, "what to compare (default: all that are trained)", choices=sample.METHODS,
                          group="what is evaluated, and against what", nargs="+")
    images: str = option(None, "evaluate these instead of runs: a folder, a zip, or an .npz with arr_0 "
                         "(default: none)")
    n: int = option(None, "images per method (default: 1000 on shapes and folders, otherwise 50000 or with "
                    "--history 20000; with --embeddings 1000, --nearest 100)", 2, 10**7)
    resolution: int = option(None, "side to which images in folders of --images and --reference are resized "
                             "(default: none if all are squares of one size)", 2, 2048)
    skip_bad: bool = option(False, "leave out images that cannot be read instead of stopping")
    reference: str = option(None, "these images, or an .npz of statistics: EDM's, OpenAI's, "
                            "--save-reference's (default: the training images, the run's or those of --data)")
    save_reference: str = option(None, "a file for the reference's statistics, and features of 10,000 of its "
                                 "images, as .npz; that is all, unless --images or --method is given "
                                 "(default: no)")

    metrics: list = option(None, f"some of {','.join(METRICS)} (default: all; with --history fid)",
                           choices=METRICS, group="metrics and modes", metavar="NAME,...",
                           type=lambda names: names.lower().split(","))
    history: bool = option(False, "the metrics at every snapshot of image model and baseline (train.py "
                           "--snapshots), with the newest prior: table, CSV and figure")
    nearest: str = option(None, "instead of metrics the nearest training images of each sample: pictures, "
                          "CSV, histogram, and copies: the share nearer to one than 95 % of training images "
                          "are to another, 0.05 is chance (default: no)", choices=("lpips", "clip", "pixel"))
    embeddings: bool = option(False, "instead of metrics of images those of the prior's samples among the "
                              "embeddings of training images")
    tables: list = option(None, "instead: the paper's Tables 1, 3, 4, 5 as Markdown, from these "
                          "results.jsonl of one or several training seeds (default: all below --runs)",
                          nargs="*")
    figure: str = option(None, "instead: Fig. 4, the oracle's FID against the dimension of y, from the "
                         "results.jsonl below --runs or of --tables (default: no)", choices="4")

    inception_weights: str = option(None, "the public Inception file; shapes have a classifier of their own "
                                    "in its place, also with --images and --dataset shapes (default: "
                                    "downloaded once)", group="networks and output")
    lpips_weights: list = option(None, "LPIPS's alex.pth and torchvision's AlexNet (default: downloaded "
                                 "once)", nargs=2, metavar=("LINEAR", "TRUNK"))
    out: str = option(None, "folder for what --history and --nearest write (default: the run's)")
    json: str = option(None, "also write this evaluation as JSON to a file; - prints it instead of the table "
                       "(default: no)")


@dataclass
class Flags(sample.SamplingFlags, EvaluationFlags):
    pass


def parse():
    args = Flags(**vars(train.new_parser(__doc__, Flags()).parse_args()))
    train.check_options(args)
    args.metrics = args.metrics or (["fid"] if args.history else list(METRICS))
    train.check_together(args, AT_ODDS)
    if args.embeddings:
        args.method = ["2sdm"]
    if args.images and args.n and not args.nearest:
        raise UserError("--images evaluates all of them: leave out --n")
    if args.images and not args.dataset:
        with suppress(Exception):                  # a folder of sample.py says whose it is
            drawn = json.loads(Path(args.images, "settings.json").read_bytes())["dataset"]
            args.dataset = drawn if drawn in train.PRESETS else None
    args.of_runs = not args.images and (args.method or not args.save_reference)
    if args.of_runs and args.resolution:
        raise UserError("--resolution is for --images and --reference: runs have a resolution of their own")
    return args


class Task:
    """What the flags mean: what is evaluated, against which images, and where its caches and results are.

    dataset: None for images of no run. resolution: of all images; None until the first say it. Raises
    UserError.
    """

    config = dataset = None
    pipelines = trained_on = ()                               # fingerprint and autoencoder of the real images

    def __init__(self, args):
        self.args, self.device, self.resolution = args, twosdm.pick_device(args.device), args.resolution
        if args.of_runs or not (args.images or args.reference):
            sample.same_dataset(args)
        if args.of_runs:
            self.pipelines = find_pipelines(args, self.device)
            # A published network does not say what its training images are.
            base = max(self.pipelines, key=lambda p: p.fingerprints["images"] is not None)
            self.trained_on = base.fingerprints["images"], base.autoencoder
            self.config = replace(base.config, dataset=args.dataset or base.dataset)
        elif args.dataset:
            self.config = train.configure(args.dataset, "image")
            path = sample.newest(args, "image*", "baseline*", "joint*")       # its newest run
            if path:
                self.config = sample.load(path)["config"]
        if self.config:
            self.dataset = self.config.dataset
        self.folder = Path(args.runs, self.dataset or "images")
        self.out = Path(args.out or self.folder)
        if args.images:
            self.images = self.open(args.images)
        elif self.config:
            self.resolution = self.config.resolution

    def open(self, path):
        """A folder, a zip or an .npz of images -> Images."""
        return self.of_one_size(npz_images(path) if path.endswith(".npz") else file_images(path, self))

    def of_one_size(self, images):
        """The same images, if they are of the resolution of all others."""
        self.resolution = self.resolution or images.resolution
        if images.resolution != self.resolution:
            raise UserError(f"{images.name} holds images of {images.resolution}x{images.resolution}, not "
                            f"{self.resolution}x{self.resolution}: compare images of one size")
        return images

    def real(self):
        """What samples are compared with: --reference, or the training images of the runs or the preset."""
        args, config = self.args, self.config
        path = args.reference or (not config and args.data)
        if path:
            return self.open(path)
        if not config:
            raise UserError("--images are compared with what? Add --reference PATH, or --dataset to take its "
                            "training images")
        config.skip_bad |= args.skip_bad
        return self.of_one_size(sample.training_images(args, config, *self.trained_on))

    def candidates(self):
        """Yields (description, Images, Pipeline or None); nothing is drawn before it is looked at."""
        args, n = self.args, self.args.n
        if args.images:
            yield dict(method=Path(args.images).name), self.images, None
        if args.nearest:
            n = n or 100
        if self.dataset in ("shapes", "folder"):
            n = n or 1000
        n = n or (20_000 if args.history else 50_000)
        if self.dataset == "shapes" and self.pipelines and not args.history:
            first = self.pipelines[0].data["count"]           # others are what a perfect model would draw
            world = twosdm.shapes_world(torch.arange(first, first + n), self.resolution, self.config.seed)
            yield dict(method="real"), world, None
        for pipeline in self.pipelines:
            for each in history(pipeline, args) if args.history else [pipeline]:
                images = self.of_one_size(samples(each, args.seed, n))
                yield dict(each.describe(), images=each.seen), images, each

    def protocol(self, **more):
        return dict(more, dataset=self.dataset, resolution=self.resolution, seed=self.args.seed)

    def keep(self, row):
        """Adds an evaluation of runs to their results.jsonl, which grows: none is ever lost."""
        if self.args.images:
            return
        path = self.folder / "results.jsonl"
        start = "\n" * path.exists()                          # ends a line even if a full disk has cut it
        with open(path, "a") as file:
            file.write(start + json.dumps(row))


def find_pipelines(args, device):
    """The methods to compare, all on the same images. UserError, but for methods that nobody asked for."""
    sample.load_given(args.checkpoint, args.method or ())     # refuses those of no use
    asked, pipelines = args.method, []
    for method in asked or sample.METHODS:
        try:
            if asked or method != "oracle" or not args.history:
                pipelines.append(sample.Pipeline(args, method, device))
            if len({p.fingerprints["images"] for p in pipelines} - {None}) > 1:
                pipelines.pop()
                raise UserError(f"--method {method} was trained on other images than {pipelines[0].method}: "
                                f"evaluate one at a time")
        except UserError as error:
            if asked:
                raise
            if "has no trained" not in str(error):
                say(f"left out: {method} ({error})")
    if not pipelines:
        raise UserError(f"{args.runs} has no trained models of use here: run python train.py first, give "
                        f"--runs, or other flags")
    return pipelines


def history(pipeline, args):
    """Yields the pipeline with each snapshot of its image model, the last of which is the end of its run."""
    folder = Path(pipeline.file).parent
    paths = sorted(folder.glob("snapshot-*.pt"))
    if folder / f"snapshot-{pipeline.seen:010d}.pt" not in paths:             # the run was stopped later
        paths.append(pipeline.file)
    for path in paths:
        yield sample.Pipeline(replace(args, checkpoint=[path]), pipeline.method, pipeline.device)


def main():
    args, rows = parse(), []
    if args.tables is not None or args.figure:
        paths = args.tables or sorted(Path(args.runs).glob(f"{args.dataset or '*'}/results.jsonl"))
        if not paths:
            raise UserError(f"{args.runs} has no results.jsonl yet: run evaluate.py, or give --tables FILE")
        text = tables(paths)
        if args.figure:
            write_figure_4(paths, Path(args.out or args.runs))
    else:
        task, mode, text = Task(args), measure, ""
        if args.nearest:
            mode = find_copies
        if args.embeddings:
            mode = compare_embeddings
        for row in mode(task):
            rows.append(row)
            task.keep(row)
        if rows:
            protocol = rows[-1]["protocol"]
            names = [name for name in SHOWN if all(row.get(name) is not None for row in rows)]
            shown = [{name: row[name] for name in names} for row in rows]
            text = f"{label(protocol, protocol)}\n\n{table(shown)}"
            if args.history:                                  # Fig. 5
                save_curves(task.out / "history", shown, "images", names[2])
    record = json.dumps(rows, indent=1)
    print(record if args.json == "-" else text)
    if args.json not in (None, "-"):
        with written(args.json) as file:
            file.write(record.encode())
    return 0


if __name__ == "__main__":
    twosdm.run(main)
