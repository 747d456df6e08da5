"""The paper's metrics, each straight from its formula, of folders of images.

    python evaluate.py                         all that sample.py has drawn on shapes, a row for each folder
    python evaluate.py --dataset afhq
    python evaluate.py --images a/ b.npz --reference afhqv2-64x64.npz       any images, any usual reference
    python evaluate.py --nearest clip          does the model copy? Figs. 6, 7 and 11 to 13
    python evaluate.py --tables                Tables 1, 3, 4 and 5, of all evaluations so far
    python evaluate.py --figure 5              FID during training; 4: against the dimension of y

    frechet_distance    FID and sFID: how far apart two sets are, as Gaussians of their features
    inception_score     how sure a classifier is of each image, and how varied it finds them all
    precision_recall    the share of samples that look real; the share of the data that can be sampled
    nearest             the most similar training images

A value means something only beside others with the same features, reference and number of images, so each is
kept with its protocol, in samples/<dataset>/results.jsonl. No diffusion model is loaded here: evaluate.py
reads images, and what sample.py says of them in settings.json.
"""
import argparse
import csv
import io
import json
import math
import re
import statistics
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import twosdm
from twosdm import ATTRIBUTES, Images, UserError, one_line, progress, to_uint8


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
        """-> mu (D,), sigma (D, D); the covariance divides by N - 1. Raises UserError if N < 2."""
        if self.n < 2:
            raise UserError(f"a covariance needs two images or more, got {self.n}: give more images")
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

    (N, C) -> (mean, std) over splits of equal size, each score at least 1. Rows that are sorted by class
    score far too low: shuffle them first.
    """
    logits = torch.as_tensor(logits).double()
    N = len(logits)
    assert N >= splits, "a score needs an image in each split"
    cuts = [i * N // splits for i in range(1, splits)]
    scores = []
    for part in logits.tensor_split(cuts):
        log_p = part.log_softmax(1)                                                       # (n, C)
        p = log_p.exp()
        marginal = p.mean(0)                                                              # (C,)
        # xlogy(0, 0) = 0: a class whose probability underflows adds nothing.
        negative_entropy = torch.xlogy(p, p).sum(1).mean()
        information = negative_entropy - torch.xlogy(marginal, marginal).sum()
        scores.append(information.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


ROUNDING = 1e-12                  # below it, relative to |x|² + |y|², float64 cannot tell |x - y|² from 0


def squared_norms(x):
    """(N, D) -> (N,)"""
    return torch.linalg.vector_norm(x, dim=1).square()


def squared_distances(x, y):
    """(N, D), (M, D) float64 -> (N, M), by one matrix product; copies are at distance 0."""
    scale = squared_norms(x)[:, None] + squared_norms(y)
    distances = torch.addmm(scale, x, y.T, alpha=-2)
    return distances.masked_fill(distances <= ROUNDING * scale, 0)


def distance_blocks(x, y):
    """The rows of `squared_distances`, as many at a time as fill 8 MB, which stay in the cache."""
    for part in x.split(max(1, 2**20 // len(y))):
        yield squared_distances(part, y)


def squared_radii(x, k):
    """(N, D) -> (N,): the squared distance of each row to its k-th nearest other row."""
    # The nearest of all, at distance 0, is the row itself.
    radii = torch.cat([distances.kthvalue(k + 1).values for distances in distance_blocks(x, x)])
    # On the rim is inside, however the distance to it is rounded.
    return radii + ROUNDING * (radii + squared_norms(x))


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
        raise UserError(f"precision and recall need more than {k} images on both sides, got {len(real)} real "
                        f"and {len(fake)} generated ones: give more")
    precision = covered(fake, real, squared_radii(real, k))
    recall = covered(real, fake, squared_radii(fake, k))
    return precision, recall


def nearest(queries, gallery, k=1):
    """The k nearest rows of the gallery for each query: (Q, D), (G, D) -> distances, indices (Q, k), sorted.

    The gallery may also be an iterable of chunks (n, D), each seen once: a data set need not fit in memory.
    Raises UserError if it has fewer than k rows.
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
    if seen < k:
        raise UserError(f"{k} nearest neighbors need {k} images to search, got {seen}")
    return best.sqrt().cpu().numpy(), index.cpu().numpy()


# ============================================================================================================
# 2 Networks: from images to features
# ============================================================================================================
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth"


def load_public(net, path, url, name):
    """Loads a public file of weights into a network -> the file's name, the first 8 digits of its sha256.

    path: where it is; None: as `name`, which ends in these digits, in PyTorch's cache, or else downloaded.
    Raises UserError.
    """
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem[-8:])
        except (OSError, RuntimeError) as error:              # no connection; another file than expected
            raise UserError(f"{name} cannot be downloaded ({one_line(error)}): fetch {url} on another "
                            f"machine and save it as {path}") from error
    try:
        content = Path(path).read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        net.load_state_dict(dict(state))                      # strict: every name and shape must fit
    except Exception as error:                                # other files fail in any way they like
        raise UserError(f"{path} is missing, damaged or not {name}: fetch {url}") from error
    return f"{Path(path).name} {twosdm.hash_of(content)[:8]}"


def tf1_resize(images, size=299):
    """TensorFlow 1's bilinear resize: (N, C, H, W) floats -> (N, C, size, size).

    Output i reads input coordinate i * in / size: the top left corners are aligned and nothing is smoothed,
    which no mode of F.interpolate does. Every published FID contains it. It is linear in each axis.
    """
    def weights(n):
        source = (torch.arange(size, dtype=torch.float64) * n / size).clip(max=n - 1)
        tents = (1 - (source[:, None] - torch.arange(n)).abs()).clip(min=0)               # (size, n)
        return tents.to(images)

    _, _, height, width = images.shape
    return weights(height) @ images @ weights(width).T


class LastBlock(torchvision.models.inception.InceptionE):
    """In the network of 2015-12-05, the pooling branch of the last block has a maximum, not an average."""

    def _forward(self, x):
        branches = super()._forward(x)
        branches[-1] = self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return branches


def average_inside(branch, inputs):
    """TensorFlow's average over 3 x 3 pixels does not count the padding: corrects one that does."""
    x, = inputs
    inside = torch.ones_like(x[:1, :1])
    counted = F.avg_pool2d(inside, 3, 1, 1)                                   # 1; at the border 2/3 or 4/9
    return x / counted


class InceptionFeatures(nn.Module):
    """The Inception-v3 of 2015-12-05, which FID is defined by: (N, 3, H, W) uint8 or [-1, 1] -> dict of

    pool     (N, 2048)   the last feature map, averaged: FID, precision and recall
    spatial  (N, 2023)   seven channels of a 17 x 17 map: sFID, Nash et al. 2021
    logits   (N, 1008)   without the bias: the Inception Score

    weights: the path of the public file; None downloads it. Raises UserError.
    """
    name = "inception"
    dims = dict(pool=2048, spatial=2023)                      # of what is compared as a Gaussian
    kept = ["pool", "logits"]                                 # for what needs each image's
    resize = "TF1 bilinear to 299"

    def __init__(self, weights=None):
        super().__init__()
        self.net = torchvision.models.Inception3(
            num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
        self.net.Mixed_7c = LastBlock(2048)
        self.weights = load_public(self.net, weights, INCEPTION, Path(INCEPTION).name)
        self.net.fc.bias.data.zero_()
        for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            pooled = self.net.get_submodule(f"Mixed_{block}.branch_pool")
            pooled.register_forward_pre_hook(average_inside)
        self.net.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images):
        with twosdm.full_float32(images.device):
            x = to_uint8(images).float()                                                  # (N, 3, H, W)
            x = (tf1_resize(x) - 128) / 128                                               # (N, 3, 299, 299)
            x = x.contiguous(memory_format=torch.channels_last)
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
    dims = dict(pool=192)
    kept = ["pool"]
    resize = "box filter to 8"
    weights = "none"

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
    dims = dict(pool=64, spatial=448)
    kept = ["pool", "logits"]
    resize = "none"

    def __init__(self):
        super().__init__(sum(ATTRIBUTES.values()), width=16)

    def forward(self, images):
        x = twosdm.to_float(to_uint8(images))
        last = self.features(x)                                                           # (N, 64, 4, 4)
        pool = self.hidden(last)                                                          # (N, 64)
        joint = torch.zeros_like(pool[:, :1])
        for logits in self.out(pool).split(list(ATTRIBUTES.values()), dim=1):
            # log p of independent attributes adds up.
            joint = (joint[:, :, None] + logits.log_softmax(1)[:, None]).flatten(1)
        return dict(pool=pool, spatial=last[:, :28].flatten(1), logits=joint)


def train_classifier(resolution, steps=300, batch=128):
    """The weights of `WorldFeatures` for images of a resolution, always the same: 10 seconds."""
    torch.manual_seed(0)
    net = WorldFeatures()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in progress(range(steps), "the world's classifier", unit=" steps"):
        index = 10**9 + batch * step + torch.arange(batch)    # far from any training set
        target = torch.zeros_like(index)
        for name, values in twosdm.shapes_attributes(index).items():
            target = target * ATTRIBUTES[name] + values
        images = twosdm.shapes_images(index, resolution).permute(0, 3, 1, 2)
        loss = F.cross_entropy(net(images)["logits"], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


def make_features(args, resolution):
    """--features -> a module that makes a dict of features of images."""
    kind = args.features or FEATURES.get(args.dataset, "inception")
    if kind == "inception":
        return InceptionFeatures(args.inception_weights)
    torch.set_num_threads(1)                                  # with so little to do, two wait for each other
    if kind == "pixels":
        return PixelFeatures()
    if args.dataset != "shapes":
        raise UserError("--features world knows the embedded world alone: give pixels or inception")
    path = Path(args.samples, args.dataset, f"features/classifier-{resolution}.pt")
    network = WorldFeatures()
    network.load_state_dict(twosdm.cached(path, lambda: train_classifier(resolution)))
    network.weights = f"{path.name} {twosdm.fingerprint(network)[:8]}"
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
        linear = {}                                           # named as in the public file
        for i, channels in enumerate(self.taps.values()):
            layers = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
            linear[f"lin{i}"] = nn.ModuleDict({"model": layers})
        self.linear = nn.ModuleDict(linear)
        load_public(alexnet, trunk_path, ALEXNET, Path(ALEXNET).name)
        load_public(self.linear, linear_path, LPIPS, "lpips-v0.1-alex-df73285e.pth")
        self.trunk = alexnet.features[:12]                    # the rest would fail at 32 pixels
        # The mean and deviation of ImageNet's pixels, for the range [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)

    def embed(self, x):
        """(N, 3, H, W) -> (N, M): each layer's features, of unit length per pixel, times sqrt(w / (h w))."""
        layers = iter(self.linear.values())
        parts = []
        with twosdm.full_float32(x.device):
            x = (x - self.shift) / self.scale
            for i, layer in enumerate(self.trunk):
                x = layer(x)                                                              # (N, C, h, w)
                if i in self.taps:
                    weight = next(layers)["model"][1].weight                              # (1, C, 1, 1)
                    unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
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


def open_images(path, flag):
    """A folder or zip of equal squares, read when they are looked at, or arr_0 of an .npz -> Images."""
    path = str(path)
    if not Path(path).is_dir() and not zipfile.is_zipfile(path):
        raise UserError(f"{flag} {path} is missing or damaged: give a folder or zip of images, or an .npz")
    if not path.endswith(".npz"):
        files = twosdm.ImageFiles(path)
        return Images(files.key, files)
    try:
        pixels = np.load(path)["arr_0"]
        N, height, width, channels = pixels.shape
        fits = height == width and channels == 3 and pixels.dtype == np.uint8
    except (KeyError, ValueError):                            # of another name; of several sizes
        fits = False
    if not fits:
        raise UserError(f"{flag} {path} needs images in arr_0, uint8 (N, R, R, 3); statistics, mu and sigma, "
                        f"are for --reference alone")
    return Images(twosdm.hash_of(pixels), pixels)


def read_settings(folder):
    """What sample.py wrote of the images in a folder; {} of others' images."""
    path = Path(folder, "settings.json")
    if path.exists():
        return json.loads(path.read_text())
    return {}


def find_samples(args):
    """-> list of Samples: --images, or all folders that sample.py has filled with independent images."""
    folder = Path(args.samples, args.dataset)
    paths = args.images or []
    if not args.images:
        drawn = sorted(file.parent for file in folder.glob("*/settings.json"))
        drawn = [path for path in drawn if read_settings(path)["columns"] == 1]
        if not drawn:
            raise UserError(f"{folder} has no samples: run python sample.py --dataset {args.dataset} first")
        usual = statistics.mode([read_settings(path)["images"] for path in drawn])
        for path in drawn:
            if read_settings(path)["images"] == usual:
                paths.append(path)
            else:
                print(f"{path} is left out, as its model has seen other training images: give it as --images")
    return [Samples(Path(path).absolute().name, open_images(path, "--images"), read_settings(path))
            for path in paths]


def find_config(sets, args):
    """The settings of the training of a model that drew samples, or None if none are known."""
    for samples in sets:
        if "config" in samples.settings:
            config = SimpleNamespace(**samples.settings["config"])
            config.runs = args.runs
            config.data = args.data or config.data
            return config
    return None


def find_reference(args, config):
    """-> Images to compare with: --reference's or the training images; None if they are statistics alone."""
    path = args.reference
    if path and path.endswith(".npz") and zipfile.is_zipfile(path):
        names = set(np.load(path))
        if {"mu", "sigma"} <= names and "arr_0" not in names:
            return None
    if path:
        return open_images(path, "--reference")
    if config is None:
        raise UserError("--images are compared with what? Add --reference FOLDER, ZIP or .npz")
    return twosdm.load_images(config)


def check_sizes(sets, real):
    """UserError unless all images are of one size: resized ones would have other values."""
    sizes = {samples.name: samples.images.resolution for samples in sets}
    if real is not None:
        sizes["the reference"] = real.resolution
    if len(set(sizes.values())) > 1:
        raise UserError(f"these images differ in size, and nothing is resized here: {sizes}")


# ============================================================================================================
# 4 From images to features to metrics
# ============================================================================================================
FEATURES = {"shapes": "world", "fashion-mnist": "pixels"}     # of others: inception
TRAINING = "training images"
BALL_NEIGHBORS = 3
IS_BLOCK = 5000
REAL_ROWS = 10_000                                            # at most so many enter precision and recall,
FAKE_ROWS = 50_000                                            # and of the samples also the Inception Score
BATCH = 64
# The names that OpenAI's files have for the mean and covariance of these features.
GAUSSIANS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def batches(n, what):
    """Row numbers 0, ..., n - 1, BATCH at a time, with a progress bar."""
    return progress(np.split(np.arange(n), range(BATCH, n, BATCH)), what, unit=" batches")


def features(images, network, folder, device, most):
    """What the metrics need of a set of images, from the folder's cache or by one pass, in memory flat in N.

    -> dict of mu, sigma and mu_s, sigma_s, the mean and covariance (float64) of pool and spatial features;
    and pool and logits of `most` images drawn at random; of what the network makes.
    """
    def compute():
        chosen = np.zeros(len(images), bool)                  # at random, as files may be sorted by class
        chosen[np.random.RandomState(0).permutation(len(images))[:most]] = True
        stats = {name: RunningStats() for name in network.dims}
        kept = {name: [] for name in network.kept}
        for rows in batches(len(images), f"{network.name} features"):
            out = network(images.batch(rows, device))
            for name in stats:
                stats[name].update(out[name])
            for name in kept:
                kept[name].append(out[name][chosen[rows]])
        result = {name: torch.cat(parts) for name, parts in kept.items()}
        for name in stats:
            mu, sigma = GAUSSIANS[name]
            result[mu], result[sigma] = stats[name].result()
        return result

    weights = network.weights.split()[-1]
    path = folder / f"{images.name}-{len(images)}-{network.name}-{weights}-{most}.pt"
    return {name: x.to(device) for name, x in twosdm.cached(path, compute).items()}


def read_statistics(path, network, device):
    """The statistics in an .npz, EDM's (mu, sigma) or OpenAI's (also mu_s, sigma_s); {} of images alone."""
    found = {}
    if path and path.endswith(".npz"):
        file = np.load(path)
        for name, dims in network.dims.items():
            for key, shape in zip(GAUSSIANS[name], [(dims,), (dims, dims)]):
                if key in file:
                    found[key] = torch.from_numpy(file[key]).to(device)
                    if found[key].shape != shape or not found[key].isfinite().all():
                        raise UserError(f"{key} in {path} is not finite, or not of the {dims} features "
                                        f"{network.name}: give another file, or images")
    return found


def score(real, fake):
    """Two sets as `features` gives them -> {metric: value}, of what can be had of these."""
    values = {}
    for name, (mu, sigma) in dict(fid=GAUSSIANS["pool"], sfid=GAUSSIANS["spatial"]).items():
        if mu in real:
            values[name] = frechet_distance(real[mu], real[sigma], fake[mu], fake[sigma])
    if "logits" in fake:
        order = np.random.RandomState(0).permutation(len(fake["logits"]))
        blocks = fake["logits"][order].split(IS_BLOCK)
        scores = [inception_score(block, splits=1)[0] for block in blocks]
        values["is"] = float(np.mean(scores))
        values["is_std"] = float(np.std(scores))
    if "pool" in real:
        values["precision"], values["recall"] = precision_recall(real["pool"], fake["pool"], BALL_NEIGHBORS)
    return values


def measure(sets, real, args, device):
    """Yields each of the sets and its metrics, with the protocol without which they mean nothing."""
    folder = Path(args.samples, args.dataset, "features")
    resolution = sets[0].images.resolution
    network = make_features(args, resolution).to(device)
    known = read_statistics(args.reference, network, device)
    if real is not None:
        # OpenAI's files have the statistics of a whole data set, and images for precision and recall alone.
        known = features(real, network, folder, device, REAL_ROWS) | known
    protocol = dict(
        reference=args.reference or TRAINING,
        n_real=None if real is None else len(real),
        features=network.name,
        weights=network.weights,
        resolution=resolution,
        resize=network.resize,
        k=BALL_NEIGHBORS,
        is_block=IS_BLOCK)
    for samples in sets:
        n = len(samples.images)
        if n <= network.dims["pool"]:
            print(f"{samples.name} has fewer images than features: its FID is biased upward")
        values = score(known, features(samples.images, network, folder, device, FAKE_ROWS))
        yield samples, dict(n=n, **values), protocol


# ============================================================================================================
# 5 The nearest training images: Figs. 6, 7 and 11-13
# ============================================================================================================
NEIGHBORS = 3                                                 # that a picture shows of each sample


def similarity(args, config, resolution, device):
    """--nearest -> embed, (B, 3, R, R) in [-1, 1] -> (B, D), and the power of distances that it is about."""
    if args.nearest == "pixels":
        return flat_pixels, 1
    if args.nearest == "lpips":
        if resolution < 31:
            raise UserError("LPIPS needs images of 31x31 or more: give --nearest clip or pixels")
        return Lpips(args.lpips_weights).to(device).embed, 2
    name = "clip"
    weights = "openai"
    if config is not None and config.embedder != "pixels":    # the run's own: another file, or the world's
        name = config.embedder
        weights = twosdm.embedder_weights(config)
    clip = twosdm.Embedder(name, weights).to(device)

    def embed(x):
        return F.normalize(clip(x)) / math.sqrt(2)            # of these, |u - v|² = 1 - cos

    return embed, 2


def flat_pixels(x):
    return x.flatten(1) / 2                                   # distances are those of pixels in [0, 1]


def measure_distances(sets, real, args, config, device):
    """--nearest: yields each of the sets and how near it is to training images; leaves pictures and Fig. 6.

    copies: the share of samples that are nearer than 95 % of training images are to another one.
    """
    if real is None:
        raise UserError(f"--nearest needs images, and {args.reference} has statistics alone: give images")
    embed, power = similarity(args, config, real.resolution, device)
    sets = [Samples(TRAINING, real, {}), *sets]
    chosen = [np.random.RandomState(0).permutation(len(samples.images))[:args.n] for samples in sets]
    queries = [embed(samples.images.batch(rows, device)) for samples, rows in zip(sets, chosen)]
    gallery = (embed(real.batch(rows, device)) for rows in batches(len(real), TRAINING))
    distances, neighbors = nearest(torch.cat(queries), gallery, min(NEIGHBORS + 5, len(real)))
    ends = np.cumsum([len(rows) for rows in chosen])[:-1]
    distances = np.split(distances**power, ends)                          # (n, K) of each set
    neighbors = np.split(neighbors[:, :NEIGHBORS], ends)
    # The black curve: the smallest distance of training images to each other that is not zero, as is that to
    # themselves and their copies, up to rounding.
    own = distances[0]
    own[own <= 1e-6 * np.median(own)] = math.inf
    curves = {}
    path = Path(args.samples, args.dataset, f"nearest-{args.nearest}")
    for samples, rows, near, found in zip(sets, chosen, distances, neighbors):
        smallest = near.min(axis=1)                                                       # (n,)
        if samples.images is real:
            smallest = smallest[np.isfinite(smallest)]
        if len(smallest):                                     # a single training image has no other
            curves[samples.name] = smallest
        if samples.images is real:
            continue
        pictures = {}
        shown = {
            "samples, their nearest training images": np.arange(len(rows))[:8],
            "the samples that are nearest": smallest.argsort()[:8]
        }
        for title, order in shown.items():
            columns = [real.pixels[column] for column in found[order].T]
            columns.insert(0, samples.images.pixels[rows[order]])         # (8, R, R, 3) each
            pictures[title] = np.concatenate(np.stack(columns, axis=1))
        twosdm.save_picture(f"{path}-{samples.name}.png", twosdm.titled(pictures, len(columns)))
        values = dict(n=len(rows), smallest=float(smallest.min()), median=float(np.median(smallest)))
        if TRAINING in curves:
            values["copies"] = float(np.mean(smallest <= np.quantile(curves[TRAINING], 0.05)))
        protocol = dict(features=args.nearest, reference=args.reference or TRAINING, n_real=len(real))
        yield samples, values, protocol
    edges = np.histogram_bin_edges(np.concatenate(list(curves.values())), 20)
    shares = {}
    for name, smallest in curves.items():
        counts, _ = np.histogram(smallest, edges)
        shares[name] = {x: [count / len(smallest)] for x, count in zip(edges, counts)}
    save_curves(path, {"": shares}, f"distance ({args.nearest})", "share", drawstyle="steps-post")


# ============================================================================================================
# 6 Tables and figures
# ============================================================================================================
DIGITS = {                                                    # of the columns of tables
    "is": 1, "precision": 3, "recall": 3, "fid": 3, "sfid": 2,            # Tables 1 and 4
    "gain": 1, "ratio": 1                                                 # Table 3, in percent
}


def append_row(path, row):
    """Adds a line to results.jsonl. It begins with the line break, as the last one may have been cut off."""
    start = "\n" if path.exists() else ""
    with open(path, "a") as file:
        file.write(start + json.dumps(row, allow_nan=False))


def read_results(paths):
    """results.jsonl of one or more training runs -> {(group, name, run): row}.

    Rows of one group can be compared: (data set, features, images, reference). A run is a file and a seed of
    training; of its repeated evaluations the last one counts. Raises UserError.
    """
    rows = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path} does not exist: run evaluate.py without --tables and --figure first")
        for line in Path(path).read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:                                # a killed process did not finish it
                continue
            if "fid" in row:
                protocol = row["protocol"]
                features = protocol["features"] + " " + protocol["weights"].split()[-1]
                group = row["dataset"], features, row["n"], protocol["reference"]
                run = str(path), row["settings"].get("train_seed")
                rows[group, row["name"], run] = row
    return rows


def deviation(values):
    """Over training runs: the standard deviation (ddof 1); 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(rows, column, digits):
    """The values of a column -> "mean ± deviation"; a single one stands alone."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return "–"
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {deviation(values):.{digits}f}"
    return text


def table(rows):
    """Tables 1, 3, 4 and 5 in one, as Markdown: means and deviations over training runs.

    gain: by how much FID is lower than EDM's with the same flags; ratio: that divided by the oracle's gain.
    """
    digits = dict(DIGITS)
    methods = {}
    for (group, name, run), row in rows.items():
        if row["settings"].get("snapshot"):                   # of Fig. 5
            continue
        methods.setdefault((*group, name), []).append(row)
        edm = rows.get((group, name.replace(row["method"], "baseline"), run), row)
        oracle = rows.get((group, name.replace(row["method"], "oracle"), run), edm)
        if edm is not row:
            row["gain"] = 100 * (1 - row["fid"] / edm["fid"])
            if oracle is not edm:
                row["ratio"] = 100 * (edm["fid"] - row["fid"]) / (edm["fid"] - oracle["fid"])
        timing = row["settings"].get("timing")
        if timing:                                            # without these two a time means nothing
            column = f"ms per image, batch {timing['batch']}, {timing['device']}"
            row[column] = timing["ms_per_image"]
            digits[column] = 1
    lines = [["data set", "features", "images", "reference", "method", "runs", *digits]]
    for names, runs in methods.items():
        cells = [spread(runs, column, digits[column]) for column in digits]
        lines.append([*names, len(runs), *cells])
    return markdown(lines)


def markdown(lines):
    """Lists of cells, the first of which is the head -> a table."""
    text = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    text.insert(1, "|---" * len(lines[0]) + "|")
    return "\n".join(text)


def place_in_figure(number, row):
    """Of Fig. 4 or 5 -> the curve that a row belongs to, or None, and its place x."""
    settings = row["settings"]
    if not settings:                                          # real images, or others'
        return None, 0
    seen = settings["images_seen"]
    curve = re.sub(r"-snapshot-\d+", "", row["name"])
    if number == 5:
        return curve, seen
    if row["method"] not in ("oracle", "baseline"):
        return None, 0
    # The whole of y belongs to the curve of PCA; without any, the model is EDM.
    kind = "kmeans" if settings["y"].startswith("kmeans") else "pca"
    flags = re.sub(r"^(oracle|baseline)|-y=\w+", "", curve)
    x = settings["y_dim"] if row["method"] == "oracle" else 0
    return f"{kind}{flags}, {seen:,} images seen", x


def write_figure(number, rows, path):
    """Fig. 4: FID of the oracle against the dimension of y. Fig. 5: FID against images seen in training."""
    panels = {}
    for (group, _, _), row in rows.items():
        curve, x = place_in_figure(number, row)
        if curve is not None:
            curves = panels.setdefault("{}, {}, {} images, {}".format(*group), {})
            curves.setdefault(curve, {}).setdefault(x, []).append(row["fid"])
    if not panels:
        raise UserError(f"no evaluation belongs to Fig. {number} yet: draw with sample.py --method oracle "
                        f"--y pca:8 (Fig. 4) or --snapshots (Fig. 5), and evaluate")
    if number == 4:
        save_curves(path, panels, "dimensions or clusters of y", "FID", xscale="symlog", yscale="log")
    else:
        save_curves(path, panels, "images seen in training", "FID", yscale="log")


def save_curves(path, panels, xlabel, ylabel, drawstyle="default", **axes):
    """{title: {curve: {x: values}}} -> path.csv and, with matplotlib, path.png: means and deviations."""
    lines = []
    for title, curves in panels.items():
        for curve, points in curves.items():
            for x, values in sorted(points.items()):
                lines.append([title, curve, x, np.mean(values), deviation(values), len(values)])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["panel", "curve", xlabel, ylabel, "deviation", "values"])
    writer.writerows(lines)
    with twosdm.written(f"{path}.csv") as file:
        file.write(text.getvalue().encode())
    print(f"{path}.csv")
    try:
        from matplotlib.figure import Figure                  # optional: only pictures of curves need it
    except ImportError:
        print("for a picture of it: pip install matplotlib, then the same command again")
        return
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained", dpi=150)
    plots = figure.subplots(1, len(panels), squeeze=False)[0]
    for plot, (title, curves) in zip(plots, panels.items()):
        plot.set(title=title, xlabel=xlabel, ylabel=ylabel, **axes)
        for curve in curves:
            _, _, x, mean, error, _ = zip(*[line for line in lines if line[:2] == [title, curve]])
            color = "black" if curve == TRAINING else None
            plot.errorbar(x, mean, error, fmt=".-", color=color, drawstyle=drawstyle, label=curve)
        plot.legend(frameon=False)
    with twosdm.written(f"{path}.png") as file:
        figure.savefig(file, format="png")
    print(f"{path}.png")


# ============================================================================================================
# 7 The command line
# ============================================================================================================
def parse():
    title, commands, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        usage="python evaluate.py [--FLAG VALUE ...]",
        description=f"{title}\n\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    flag = parser.add_argument
    flag("--dataset", help="whose samples (default: shapes; of --images what they say)")
    flag("--images", nargs="+", help="folders, zips or .npz with arr_0 (default: all folders "
         "of sample.py with independent images)")
    flag("--reference", help="the same, or an .npz of statistics, EDM's or OpenAI's (default: the training "
         "images)")
    flag("--data", help="where the training images are now (default: where they were)")
    flag("--features", choices=["world", "inception", "pixels"], help="what FID compares (default: world on "
         "shapes, pixels on fashion-mnist, else inception)")
    flag("--nearest", choices=["lpips", "clip", "pixels"], help="instead of metrics: the nearest training "
         "images, by this distance (default: no)")
    flag("--n", type=int, default=100, help="images of each folder for --nearest (default: 100)")
    flag("--tables", nargs="*", help="instead: the paper's tables, from these results.jsonl, of one or more "
         "training runs (default: no; without files the data set's)")
    flag("--figure", type=int, choices=[4, 5], help="instead: this figure, from the same files (default: no)")
    flag("--runs", default="runs", help="folder of all runs (default: runs)")
    flag("--samples", default="samples", help="folder of all samples and results (default: samples)")
    flag("--inception-weights", help="the public file (default: downloaded once)")
    flag("--lpips-weights", nargs=2, metavar=("LINEAR", "ALEXNET"), help="the public files (default: "
         "downloaded once)")
    flag("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda, else cpu)")
    return parser.parse_args()


def show_results(args, folder):
    """--tables, --figure"""
    rows = read_results(args.tables or [folder / "results.jsonl"])
    if args.figure:
        write_figure(args.figure, rows, folder / f"figure-{args.figure}")
    else:
        print(table(rows))


def main():
    args = parse()
    if args.dataset is None:
        args.dataset = "shapes"
        if args.images:
            args.dataset = read_settings(args.images[0]).get("dataset", "images")
    folder = Path(args.samples, args.dataset)
    if twosdm.processes() > 1:
        raise UserError("evaluate.py is one process: start it without torchrun, and sample.py with it")
    if args.figure or args.tables is not None:
        show_results(args, folder)
        return
    device = twosdm.pick_device(args.device)
    if device.type == "mps":
        device = torch.device("cpu")                          # Apple's GPU has no float64
    twosdm.set_precision("fp32", device)                      # TF32 would change the third digit
    sets = find_samples(args)
    config = find_config(sets, args)
    real = find_reference(args, config)
    check_sizes(sets, real)
    if not args.images and not args.reference and not args.nearest:
        most = max(len(samples.images) for samples in sets)
        others = twosdm.test_images(config, most)             # what a perfect model would draw
        if others is not None:
            sets.insert(0, Samples("real", others, {}))
    if args.nearest:
        rows = measure_distances(sets, real, args, config, device)
    else:
        rows = measure(sets, real, args, device)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for samples, values, protocol in rows:
        lines.append([samples.name, *[f"{value:g}" for value in values.values()]])
        append_row(folder / "results.jsonl", dict(
            name=samples.name,
            method=samples.settings.get("method", samples.name),
            dataset=args.dataset,
            features=protocol["features"],
            **values,
            protocol=protocol,
            settings=samples.settings))
    print(", ".join(f"{name} {value}" for name, value in protocol.items()))
    print(markdown([["", *values], *lines]))


if __name__ == "__main__":
    twosdm.run(main)
