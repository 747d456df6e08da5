"""The paper's metrics, each straight from its formula, of folders of images.

    python evaluate.py                         all that sample.py has drawn on shapes, a row for each folder
    python evaluate.py --dataset afhq
    python evaluate.py --images a/ b.npz --reference afhqv2-64x64.npz       any images, any usual reference
    python evaluate.py --nearest clip          does the model copy? Figs. 6, 7 and 11 to 13
    python evaluate.py --tables                Tables 1, 3, 4 and 5, of all evaluations so far
    python evaluate.py --figure 5              FID during training; 4: against the dimension of y

A value means something only beside others with the same features, reference and number of images, so each is
kept with its protocol, in samples/<dataset>/results.jsonl. No diffusion model is loaded here: evaluate.py
reads images, and what sample.py says of them in settings.json.
"""
import csv
import json
import math
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import twosdm
from twosdm import ATTRIBUTES, Images, UserError, progress, to_uint8


# ============================================================================================================
# 1 Metrics: functions of arrays, of NumPy or torch, in float64
# ============================================================================================================
class RunningStats:
    """Mean and covariance of a stream of feature rows, in memory of size D x D however many rows pass."""

    def __init__(self):
        self.n = 0
        self.total = 0.0                                      # sum x
        self.outer = 0.0                                      # sum x x'

    def update(self, features):
        """Add the rows of features (N, D)."""
        x = torch.as_tensor(features).double()                                            # (N, D)
        self.n += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def result(self):
        """-> mu (D,), sigma (D, D); the covariance divides by N - 1."""
        mu = self.total / self.n
        sigma = (self.outer - self.n * mu.outer(mu)) / (self.n - 1)
        return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|² + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): Heusel et al. 2017, Eq. 6.

    (D,), (D, D), (D,), (D, D) -> float, at least 0. With sigma1 = R R', sigma1 sigma2 has the eigenvalues of
    the symmetric R' sigma2 R: real, and nonnegative up to rounding, also with fewer images than dimensions,
    where a general matrix root turns complex or needs an epsilon that changes the value.
    """
    mu1, sigma1, mu2, sigma2 = [torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2)]
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clip(min=0).sqrt()                                            # (D, D), R
    squares = torch.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = squares.clip(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root
    return max(distance.item(), 0.0)


def inception_score(logits, splits=10):
    """exp of the mutual information of image and class: Salimans et al. 2016, Sec. 4.

    (N, C) -> (mean, std) over splits of equal size, N or fewer, each score at least 1. Rows that are sorted
    by class score far too low: shuffle them first.
    """
    logits = torch.as_tensor(logits).double()
    scores = []
    for part in logits.tensor_split(splits):
        p = part.softmax(1)                                                               # (n, C)
        marginal = p.mean(0)                                                              # (C,)
        # entr(p) = -p log p and entr(0) = 0: a class whose probability underflows adds nothing.
        information = torch.special.entr(marginal).sum() - torch.special.entr(p).sum(1).mean()
        scores.append(information.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


ROUNDING = 1e-12                  # below it, relative to |x|² + |y|², float64 cannot tell |x - y|² from 0


def squared_distances(x, y):
    """(N, D), (M, D) float64 -> (N, M), by one matrix product; copies are at distance 0."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)                                # (N, M)
    distances = torch.addmm(scale, x, y.T, alpha=-2)
    return distances.masked_fill(distances <= ROUNDING * scale, 0)


def distance_blocks(x, y):
    """The rows of `squared_distances`, a few at a time: of 10,000 and 50,000 images all are 4 GB."""
    for part in x.split(64):
        yield squared_distances(part, y)


def squared_radii(x, k):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest other row."""
    # The nearest of all, at distance 0, is the row itself.
    return torch.cat([distances.kthvalue(k + 1).values for distances in distance_blocks(x, x)])


def covered(x, centers, radii):
    """The share of x (N, D) inside a ball around one of the centers (M, D), of squared radii (M,)."""
    inside = [(distances <= radii).any(1) for distances in distance_blocks(x, centers)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real, fake, k=3):
    """Improved precision and recall: Kynkäänniemi et al. 2019, Eq. 1-2; (N, D), (M, D) -> two shares.

    A set covers the balls around its images, each reaching to the k-th nearest other one. Precision is the
    share of fake that real covers, recall the share of real that fake covers. In float64: the float16 of
    OpenAI's evaluator reads 0.001 to 0.003 higher. Raises UserError unless N, M > k.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images, got {len(real)} and {len(fake)}")
    precision = covered(fake, real, squared_radii(real, k))
    recall = covered(real, fake, squared_radii(fake, k))
    return precision, recall


def nearest(queries, gallery, k=1):
    """The k nearest rows of the gallery for each query: (Q, D), (G, D) -> distances, indices (Q, k), sorted.

    The gallery may also be an iterable of chunks (n, D), each seen once: a data set need not fit in memory.
    If it has fewer than k rows, the other distances are infinite.
    """
    queries = torch.as_tensor(queries).double()
    if hasattr(gallery, "shape"):
        gallery = torch.as_tensor(gallery).split(1024)
    best = queries.new_full((len(queries), k), math.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    seen = 0
    for chunk in gallery:
        distances = squared_distances(queries, torch.as_tensor(chunk).double())           # (Q, n)
        rows = torch.arange(seen, seen + len(chunk), device=index.device)
        index = torch.cat([index, rows.expand_as(distances)], dim=1)                      # (Q, k + n)
        best, order = torch.cat([best, distances], dim=1).topk(k, largest=False)
        index = index.gather(1, order)
        seen += len(chunk)
    return best.sqrt().cpu().numpy(), index.cpu().numpy()


# ============================================================================================================
# 2 Networks: from images to features
# ============================================================================================================
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth"


def load_public(net, path, url):
    """Loads a public file of weights into a network -> the first 8 digits of the file's sha256.

    path: where it is; None: in PyTorch's cache, or else downloaded to there. Raises UserError.
    """
    try:
        if path is None:
            path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
            # Downloads what is not there; a name that ends in digits of the hash is checked.
            torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(dict(state))                      # strict: every name and shape must fit
    except Exception as error:                                # no connection; files fail in any way they like
        raise UserError(f"{path} is missing, damaged or another file ({error!r:.200}): fetch {url} and "
                        f"save it as {path}") from error
    return twosdm.hash_of(Path(path).read_bytes())[:8]


def tf1_resize(images):
    """TensorFlow 1's bilinear resize: (N, C, H, W) floats -> (N, C, 299, 299).

    Output i reads input coordinate i * in / 299: the top left corners are aligned and nothing is smoothed,
    which no mode of F.interpolate does. Every published FID contains it. It is linear in each axis.
    """
    def weights(n):
        source = (torch.arange(299, dtype=torch.float64) * n / 299).clip(max=n - 1)
        tents = (1 - (source[:, None] - torch.arange(n)).abs()).clip(min=0)               # (299, n)
        return tents.to(images)

    _, _, height, width = images.shape
    return weights(height) @ images @ weights(width).T


def pool_as_in_2015(block, inputs, output):
    """Computes the pooling branch of a block of torchvision anew: the last channels of output (N, C, h, w).

    TensorFlow's average over 3 x 3 pixels does not count the padding, and in the network of 2015-12-05 the
    last block has a maximum in its place.
    """
    x, = inputs
    if x.shape[1] == 2048:                                    # the last block
        pooled = F.max_pool2d(x, 3, 1, 1)
    else:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    branch = block.branch_pool(pooled)
    output[:, -branch.shape[1]:] = branch


class InceptionFeatures(nn.Module):
    """The Inception-v3 of 2015-12-05, which FID is defined by: (N, 3, H, W) uint8 or [-1, 1] -> dict of

    pool     (N, 2048)   the last feature map, averaged: FID, precision and recall
    spatial  (N, 2023)   seven channels of a 17 x 17 map: sFID, Nash et al. 2021
    logits   (N, 1008)   without the bias: the Inception Score

    weights: the path of the public file; None downloads it. Raises UserError.
    """
    name = "inception"

    def __init__(self, weights=None):
        super().__init__()
        self.net = torchvision.models.Inception3(
            num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        self.weights = load_public(self.net, weights, INCEPTION)
        self.net.fc.bias.data.zero_()
        for block in self.net.children():
            if hasattr(block, "branch_pool"):                 # the others have none, or a maximum
                block.register_forward_hook(pool_as_in_2015)
        self.eval().requires_grad_(False)

    def forward(self, images):
        with twosdm.full_float32(images.device):
            x = to_uint8(images).float()                                                  # (N, 3, H, W)
            x = (tf1_resize(x) - 128) / 128                                               # (N, 3, 299, 299)
            for name, layer in self.net.named_children():
                if name == "fc":
                    x = x.flatten(1)
                    pool = x
                x = layer(x)
                if name == "Mixed_6d":
                    # Channels last in the row: the order of OpenAI's published mu_s and sigma_s.
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return dict(pool=pool, spatial=spatial, logits=x)


class PixelFeatures(nn.Module):
    """A neutral space, without a network: (N, 3, H, W) uint8 or [-1, 1] -> dict of

    pool     (N, 192)    the image at 8 x 8 pixels, each the mean of its box, in [0, 1]
    """
    name = "pixels"
    weights = "8x8"

    def forward(self, images):
        x = to_uint8(images).float() / 255
        return dict(pool=F.adaptive_avg_pool2d(x, 8).flatten(1))


class WorldFeatures(twosdm.ConvNet):
    """On the embedded world, where Inception means nothing: a small classifier of the world's attributes.

    (N, 3, H, W) uint8 or [-1, 1] -> dict of pool (N, 64), spatial (N, 448) and logits (N, 1536), those of the
    joint distribution of shape, color, background and count as a product of four. It is a network like the
    embedder's, but independent of it: other images, labels instead of captions.
    """
    name = "world"

    def __init__(self):
        super().__init__(sum(ATTRIBUTES.values()), width=16)

    def forward(self, images):
        x = twosdm.to_float(to_uint8(images))
        last = self.features(x)                                                           # (N, 64, 4, 4)
        pool = self.hidden(last)                                                          # (N, 64)
        joint = torch.zeros_like(pool[:, :1])
        for logits in self.out(pool).split(list(ATTRIBUTES.values()), dim=1):
            # Logits add up: the softmax of all sums is the product of the softmaxes.
            joint = (joint[:, :, None] + logits[:, None]).flatten(1)
        return dict(pool=pool, spatial=last[:, :28].flatten(1), logits=joint)


def train_classifier(resolution):
    """The weights of `WorldFeatures` for images of a resolution, always the same: 10 seconds."""
    torch.manual_seed(0)
    net = WorldFeatures()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(300):
        index = 10**9 + 128 * step + torch.arange(128)        # far from any training set
        target = torch.zeros_like(index)
        for name, values in twosdm.shapes_attributes(index).items():
            target = target * ATTRIBUTES[name] + values
        images = twosdm.shapes_images(index, resolution).permute(0, 3, 1, 2)
        loss = F.cross_entropy(net(images)["logits"], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


def make_features(args, folder, resolution):
    """--features -> a module that makes a dict of features of images."""
    kind = args.features or FEATURES.get(args.dataset, "inception")
    if kind == "inception":
        return InceptionFeatures(args.inception_weights)
    torch.set_num_threads(1)                                  # with so little to do, two wait for each other
    if kind == "pixels":
        return PixelFeatures()
    path = folder / f"classifier-{resolution}.pt"
    network = WorldFeatures()
    network.load_state_dict(twosdm.cached(path, lambda: train_classifier(resolution)))
    network.weights = twosdm.fingerprint(network)[:8]
    return network.requires_grad_(False)


class Lpips(nn.Module):
    """LPIPS v0.1 of AlexNet, Zhang et al. 2018, Eq. 1: two (N, 3, H, W) in [-1, 1], not [0, 1] -> (N,).

    It is |embed(a) - embed(b)|², so the neighbors in a data set are a matrix product away. Images need 31
    pixels or more. weights: the paths of (linear layers, torchvision's AlexNet); None downloads both.
    """
    taps = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}           # the ReLUs that are compared: their channels

    def __init__(self, weights=None):
        super().__init__()
        linear_path, trunk_path = weights or (None, None)
        alexnet = torchvision.models.alexnet()
        self.linear = nn.ModuleDict()
        for i, channels in enumerate(self.taps.values()):     # named as in the public file
            layers = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            self.linear[f"lin{i}"] = nn.ModuleDict({"model": layers})
        load_public(alexnet, trunk_path, ALEXNET)
        load_public(self.linear, linear_path, LPIPS)
        self.trunk = alexnet.features[:12]                    # the rest would fail at 32 pixels
        self.eval().requires_grad_(False)

    def embed(self, x):
        """(N, 3, H, W) -> (N, M): each layer's features, of unit length per pixel, times sqrt(w / (h w))."""
        weights = self.linear.parameters()
        parts = []
        # The mean and deviation of ImageNet's pixels, for the range [-1, 1].
        mean = x.new_tensor([-0.030, -0.088, -0.188])
        deviation = x.new_tensor([0.458, 0.448, 0.450])
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        for i, layer in enumerate(self.trunk):
            x = layer(x)                                                                  # (N, C, h, w)
            if i in self.taps:
                weight = next(weights)                                                    # (1, C, 1, 1)
                unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
                parts.append((unit * (weight / x[0, 0].numel()).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)

    def forward(self, a, b):
        return (self.embed(a) - self.embed(b)).square().sum(1)


# ============================================================================================================
# 3 Sets of images
# ============================================================================================================
@dataclass
class Samples:
    """Images to evaluate, and what sample.py says of them: {} if they are not from there."""
    name: str
    images: Images
    settings: dict


def read_npz(path):
    """-> {name: array} of an .npz. Raises UserError."""
    try:
        return dict(np.load(path))
    except (OSError, ValueError, zipfile.BadZipFile) as error:            # ValueError: not only numbers
        raise UserError(f"{path} is missing, damaged or not an .npz of arrays: give another") from error


def open_images(path):
    """A folder or zip of equal squares, read when they are looked at, or arr_0 of an .npz -> Images."""
    if not str(path).endswith(".npz"):
        files = twosdm.ImageFiles(path)
        return Images(files.key, files)
    pixels = read_npz(path).get("arr_0", np.empty(0))
    if pixels.dtype != np.uint8 or pixels.shape[3:] != (3,):
        raise UserError(f"{path} needs images in arr_0, uint8 (N, R, R, 3): statistics serve FID alone")
    return Images(twosdm.hash_of(pixels), pixels)


def read_settings(folder):
    """What sample.py wrote of the images in a folder; {} of others' images."""
    path = Path(folder, "settings.json")
    if path.exists():
        return json.loads(path.read_text())
    return {}


def find_samples(args, folder):
    """-> list of Samples: --images, or all folders that sample.py has filled with independent images."""
    sets = []
    for path in args.images or sorted(file.parent for file in folder.glob("*/settings.json")):
        settings = read_settings(path)
        if args.images or settings["columns"] == 1:
            sets.append(Samples(Path(path).name, open_images(path), settings))
    if not sets:
        raise UserError(f"{folder} has no samples: run python sample.py --dataset {args.dataset} first")
    return sets


def find_config(sets, args):
    """The settings of the training of a model that drew samples, or None if none are known."""
    for samples in sets:
        if "config" in samples.settings:
            config = SimpleNamespace(**samples.settings["config"])
            config.runs = args.runs
            config.data = args.data or config.data
            return config
    return None


def find_reference(sets, args, config):
    """What to compare with, --reference's or the training images -> Images, or None; {statistic: array}.

    EDM's files have statistics alone, mu and sigma; OpenAI's have mu_s and sigma_s too, of a whole data set,
    and images for precision and recall. Raises UserError unless all images are of one size, and all models
    have seen the same images.
    """
    statistics = {}
    if args.reference is None:
        if config is None:
            raise UserError("--images are compared with what? Add --reference FOLDER, ZIP or .npz")
        real = twosdm.load_images(config)
    else:
        if args.reference.endswith(".npz"):
            statistics = read_npz(args.reference)
            pixels = statistics.pop("arr_0", None)
            if "mu" in statistics and pixels is None and not args.nearest:
                return None, statistics
        real = open_images(args.reference)
    for samples in sets:
        if samples.images.resolution != real.resolution:      # resized images would have other values
            raise UserError(f"{samples.name} and the reference differ in size, and nothing is resized here")
        seen = samples.settings.get("images", real.name)
        if args.reference is None and seen != real.name:
            raise UserError(f"{samples.name} is of a model that has seen other training images: evaluate it "
                            f"alone, by --images, or give a --reference")
    return real, statistics


# ============================================================================================================
# 4 From images to features to metrics
# ============================================================================================================
FEATURES = {"shapes": "world", "fashion-mnist": "pixels", "folder": "pixels"}     # of others: inception
TRAINING = "training images"
BALL_NEIGHBORS = 3
IS_BLOCK = 5000
REAL_ROWS = 10_000                                            # at most so many enter precision and recall,
FAKE_ROWS = 50_000                                            # and of the samples also the Inception Score
BATCH = 64
# OpenAI's files name the mean and covariance of these features mu and sigma, or mu_s and sigma_s.
GAUSSIANS = {"pool": "", "spatial": "_s"}


def batches(rows, what):
    """Row numbers, BATCH at a time, with a progress bar."""
    return progress(np.split(rows, range(BATCH, len(rows), BATCH)), what, unit=" batches")


def features(images, network, folder, device, most):
    """What the metrics need of a set of images, from the folder's cache or by one pass, in memory flat in N.

    -> dict of mu, sigma and mu_s, sigma_s, the mean and covariance (float64) of pool and spatial features;
    and pool and logits of `most` images drawn at random; of what the network makes.
    """
    def compute():
        order = np.random.RandomState(0).permutation(len(images))         # files may be sorted by class
        stats = defaultdict(RunningStats)
        kept = defaultdict(list)
        for rows in batches(order, f"{network.name} features"):
            for name, x in network(images.batch(rows, device)).items():
                if name in GAUSSIANS:
                    stats[name].update(x)
                if name != "spatial" and len(kept[name]) * BATCH < most:  # only sFID is of these
                    kept[name].append(x)
        result = {name: torch.cat(parts)[:most] for name, parts in kept.items()}
        for name in stats:
            mu, sigma = stats[name].result()
            result["mu" + GAUSSIANS[name]] = mu
            result["sigma" + GAUSSIANS[name]] = sigma
        return result

    path = folder / f"{images.name}-{len(images)}-{network.name}-{network.weights}-{most}.pt"
    return {name: x.to(device) for name, x in twosdm.cached(path, compute).items()}


def score(real, fake):
    """Two sets as `features` gives them -> {metric: value}, of what can be had of these."""
    if real["mu"].shape != fake["mu"].shape:
        raise UserError("the statistics in --reference are not of these --features: give images, or others")
    values = {}
    if "pool" in real:
        values["precision"], values["recall"] = precision_recall(real["pool"], fake["pool"], BALL_NEIGHBORS)
    values["fid"] = frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])
    if "mu_s" in real and "mu_s" in fake:
        values["sfid"] = frechet_distance(real["mu_s"], real["sigma_s"], fake["mu_s"], fake["sigma_s"])
    if "logits" in fake:
        splits = math.ceil(len(fake["logits"]) / IS_BLOCK)
        values["is"], values["is_std"] = inception_score(fake["logits"], splits)
    return values


def measure(sets, real, statistics, args, folder, device):
    """Yields each of the sets and its metrics."""
    network = make_features(args, folder, sets[0].images.resolution).to(device)
    known = {name: torch.from_numpy(x).to(device) for name, x in statistics.items()}
    if real is not None:
        known = features(real, network, folder, device, REAL_ROWS) | known
    for samples in sets:
        values = score(known, features(samples.images, network, folder, device, FAKE_ROWS))
        yield samples, dict(features=network.name, weights=network.weights, n=len(samples.images), **values)


# ============================================================================================================
# 5 The nearest training images: Figs. 6, 7 and 11-13
# ============================================================================================================
NEIGHBORS = 3                                                 # that a picture shows of each sample


def make_embedding(args, config, device):
    """--nearest -> embed, (B, 3, R, R) in [-1, 1] -> (B, D)."""
    if args.nearest == "pixels":
        return nn.Flatten()
    if args.nearest == "lpips":
        return Lpips(args.lpips_weights).to(device).embed
    if config is None:                                        # else the model's own, such as the world's
        config = SimpleNamespace(embedder="clip", embedder_weights="openai")
    clip = twosdm.Embedder(config.embedder, twosdm.embedder_weights(config)).to(device)

    def embed(x):
        return F.normalize(clip(x)) / math.sqrt(2)            # of these, |u - v|² = 1 - cos

    return embed


def neighbor_rows(images, rows, real, neighbors):
    """(n,), (n, K) -> (n (1 + K), R, R, 3): each of these images and its nearest of the real ones."""
    parts = []
    for row, near in zip(rows, neighbors):
        parts += [images.pixels[[row]], real.pixels[near]]
    return np.concatenate(parts)


def measure_distances(sets, real, args, config, folder, device):
    """--nearest: yields each of the sets and how near it is to training images; leaves pictures and Fig. 6.

    copies: the share of samples that are nearer than 95 % of training images are to another one.
    """
    embed = make_embedding(args, config, device)
    sets = [Samples(TRAINING, real, {}), *sets]
    chosen = [np.random.RandomState(0).permutation(len(samples.images))[:args.n] for samples in sets]
    queries = [embed(samples.images.batch(rows, device)) for samples, rows in zip(sets, chosen)]
    gallery = (embed(real.batch(rows, device)) for rows in batches(np.arange(len(real)), TRAINING))
    distances, neighbors = nearest(torch.cat(queries), gallery, NEIGHBORS + 5)
    if args.nearest == "pixels":
        distances = distances / 2                             # those of pixels in [0, 1]
    else:
        distances = distances**2                              # as are LPIPS and 1 - cos
    # Of training images: the smallest distance to each other that is not zero, as is that to themselves and
    # their copies, up to rounding.
    own = distances[:len(chosen[0])]
    own[own <= 1e-6 * np.median(own)] = math.inf
    smallest = distances.min(axis=1)
    edges = np.histogram_bin_edges(smallest, 20)
    ends = np.cumsum([len(rows) for rows in chosen])[:-1]
    smallest = np.split(smallest, ends)                                   # (n,) of each set
    neighbors = np.split(neighbors[:, :NEIGHBORS], ends)                  # (n, K)
    usual = np.quantile(smallest[0], 0.05)
    path = folder / f"nearest-{args.nearest}"
    shares = {}
    for samples, rows, found, near in zip(sets, chosen, neighbors, smallest):
        counts, _ = np.histogram(near, edges)
        for x, count in zip(edges, counts):
            shares[samples.name, x] = [count / len(near)]
        if samples.images is real:
            continue
        first = near.argsort()[:8]
        pictures = {
            "samples, their nearest training images":
                neighbor_rows(samples.images, rows[:8], real, found[:8]),
            "the samples that are nearest":
                neighbor_rows(samples.images, rows[first], real, found[first])
        }
        twosdm.save_picture(f"{path}-{samples.name}.png", twosdm.picture(pictures, 1 + NEIGHBORS))
        yield samples, dict(features=args.nearest, n=len(rows), copies=float(np.mean(near <= usual)))
    save_curves(path, shares, f"distance ({args.nearest})", "share")


# ============================================================================================================
# 6 Tables and figures
# ============================================================================================================
COLUMNS = [
    "fid", "sfid", "is", "precision", "recall",                           # Tables 1 and 4
    "gain", "ratio",                                                      # Table 3, in percent
    "copies"                                                              # of --nearest
]


def append_row(path, row):
    """Adds a line to results.jsonl."""
    with open(path, "a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def key_of(row):
    """-> (group, name, seed of training). Only rows of one group can be compared with each other."""
    features = f"{row['features']} {row.get('weights', 'distances')}"
    group = f"{row['dataset']}, {features}, {row['n']} images, {row['protocol']['reference']}"
    return group, row["name"], row["settings"].get("config", {}).get("seed")


def read_results(paths):
    """results.jsonl of one or more training runs -> {key: row}; of repeated evaluations the last one counts.

    Raises UserError.
    """
    rows = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist: run evaluate.py without --tables and --figure first")
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            if "fid" in row:
                rows[key_of(row)] = row
    return rows


def spread(rows, column):
    """The values of a column -> "mean ± standard deviation (ddof 1)"; a single one stands alone."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return "–"
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2g}"
    return text


def table(rows):
    """{key: row} -> Tables 1, 3, 4 and 5 in one, as Markdown: means and deviations over training runs.

    gain: by how much FID is lower than that of EDM, the folder `baseline` of the same group and seed;
    ratio: that divided by the gain of the folder `oracle`.
    """
    columns = dict.fromkeys(COLUMNS)                          # an ordered set
    methods = defaultdict(list)
    for (group, name, seed), row in rows.items():
        edm = rows.get((group, "baseline", seed), row)
        oracle = rows.get((group, "oracle", seed), row)
        if "fid" in row and edm is not row:
            row["gain"] = 100 * (1 - row["fid"] / edm["fid"])
            if oracle is not row:
                row["ratio"] = 100 * (edm["fid"] - row["fid"]) / (edm["fid"] - oracle["fid"])
        timing = row["settings"].get("timing")
        if timing:                                            # without these two a time means nothing
            column = f"ms per image, batch {timing['batch']}, {timing['device']}"
            row[column] = timing["ms_per_image"]
            columns[column] = None
        methods[group, name].append(row)
    known = set().union(*rows.values())
    columns = [column for column in columns if column in known]
    lines = []
    shown = None
    for (group, name), runs in sorted(methods.items()):
        if group != shown:
            lines += [
                "",
                group,
                "",
                markdown(["method", "runs", *columns]),
                "|---" * (2 + len(columns)) + "|"
            ]
            shown = group
        cells = [spread(runs, column) for column in columns]
        lines.append(markdown([name, str(len(runs)), *cells]))
    return "\n".join(lines)


def markdown(cells):
    return f"| {' | '.join(cells)} |"


def write_figure(number, rows, path):
    """Fig. 4: FID of the oracle against the dimension of y. Fig. 5: FID against images seen in training.

    A curve is of one group of rows, which can be compared.
    """
    points = defaultdict(list)
    for (group, name, _), row in rows.items():
        settings = row["settings"]
        if number == 4 and row["method"] in ("oracle", "baseline"):
            # The whole of y ends the curve of PCA; without any, where it begins, the model is EDM.
            curve = re.sub(r"-y=pca\d+|(?<=-y=kmeans)\d+", "", name.replace("baseline", "oracle"))
            x = settings["y_dim"]
        elif number == 5 and settings:
            curve = re.sub(r"-snapshot-\d+", "", name)
            x = settings["images_seen"]
        else:
            continue
        points[f"{curve}, {group}", x].append(row["fid"])
    if not points:
        raise UserError(f"no evaluation is for Fig. {number}: draw with sample.py --y pca:8 or --snapshots")
    xlabel = "dimensions or clusters of y" if number == 4 else "images seen in training"
    save_curves(path, points, xlabel, "FID", xscale="symlog", yscale="log")


def save_curves(path, points, xlabel, ylabel, **axes):
    """{(curve, x): values} -> their means in path.csv and, with matplotlib, path.png."""
    lines = [[curve, x, np.mean(values)] for (curve, x), values in sorted(points.items())]
    with open(f"{path}.csv", "w", newline="") as file:
        csv.writer(file).writerows([["curve", xlabel, ylabel], *lines])
    try:
        from matplotlib.figure import Figure                  # optional: only pictures of curves need it
    except ImportError:
        print(f"{path}.csv; for a picture of it: pip install matplotlib, then the same command again")
        return
    figure = Figure(layout="constrained", dpi=150)
    plot = figure.subplots()
    plot.set(xlabel=xlabel, ylabel=ylabel, **axes)
    for curve, group in groupby(lines, itemgetter(0)):
        _, x, mean = zip(*group)
        plot.plot(x, mean, ".-", label=curve)
    figure.legend(loc="outside lower center")
    figure.savefig(f"{path}.png")
    print(f"{path}.csv, {path}.png")


# ============================================================================================================
# 7 The command line
# ============================================================================================================
@dataclass
class Flags:
    """The flags; - stands for _, as in --lpips-weights."""
    dataset: str = None             # whose samples; default: shapes, or what --images say
    images: list = ()               # folders, zips, .npz with arr_0; default: what sample.py has drawn
    reference: str = None           # the same, or EDM's or OpenAI's .npz; default: the training images
    data: str = ""                  # where the training images are now
    features: str = None            # what FID compares: world (default on shapes), pixels (default on
                                    # fashion-mnist and folder) or inception (default elsewhere)
    nearest: str = None             # instead: the nearest training images, by lpips, clip or pixels
    n: int = 100                    # images of each folder for --nearest
    tables: list = None             # instead: the paper's tables, of these results.jsonl or --dataset's
    figure: int = None              # instead: figure 4 or 5, from the same files
    runs: str = "runs"              # folder of all runs
    samples: str = "samples"        # folder of all samples and results
    inception_weights: str = None   # the public file; default: downloaded once
    lpips_weights: list = None      # two public files: linear layers, AlexNet; default: downloaded once
    device: str = "auto"            # cuda, cuda:1, cpu; auto: cuda, else cpu


CHOICES = {
    "features": ["world", "inception", "pixels"],
    "nearest": ["lpips", "clip", "pixels"],
    "figure": [4, 5]
}


def main():
    args = Flags(**twosdm.parse_flags(Flags, __doc__, CHOICES))
    if twosdm.processes() > 1:
        raise UserError("evaluate.py is one process: start it without torchrun, and sample.py with it")
    if args.dataset is None:
        args.dataset = "shapes"
        if args.images:
            args.dataset = read_settings(args.images[0]).get("dataset", "images")
    folder = Path(args.samples, args.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    if args.figure or args.tables is not None:
        rows = read_results(args.tables or [path])
        if args.figure:
            write_figure(args.figure, rows, folder / f"figure-{args.figure}")
        else:
            print(table({key: row for key, row in rows.items() if not row["settings"].get("snapshot")}))
        return
    device = twosdm.pick_device(args.device)
    twosdm.set_precision("fp32", device)                      # TF32 would change the third digit
    sets = find_samples(args, folder)
    config = find_config(sets, args)
    real, statistics = find_reference(sets, args, config)
    if args.reference is None:
        # What a perfect model would draw.
        others = twosdm.test_images(config, max(len(samples.images) for samples in sets))
        if others is not None:
            sets.append(Samples("real", others, {}))
    if args.nearest:
        found = measure_distances(sets, real, args, config, folder, device)
    else:
        found = measure(sets, real, statistics, args, folder / "features", device)
    rows = {}
    for samples, values in found:
        row = dict(
            name=samples.name,
            method=samples.settings.get("method", samples.name),
            dataset=args.dataset,
            **values,
            protocol=dict(
                reference=args.reference or TRAINING,
                n_real=real and len(real),
                k=BALL_NEIGHBORS,
                is_block=IS_BLOCK),
            settings=samples.settings)
        append_row(path, row)
        rows[key_of(row)] = row
    print(table(rows))


if __name__ == "__main__":
    twosdm.run(main)
