"""Samples from trained models: prior -> embedding -> image (2SDM), or one of the methods it is compared with.

    python sample.py                                 64 images of the newest runs, as PNGs and one grid
    python sample.py --method baseline --n 1000      the EDM model without embeddings
    python sample.py --method baseline --checkpoint edm-ffhq-64x64-uncond-vp.pkl      EDM's own
    python sample.py --n 50000 --npz --out big       also `arr_0` (N, H, W, 3) uint8 for OpenAI's evaluator
    python sample.py --interpolate                   rows share y, columns the image noise (Figs. 8 to 10)
    python sample.py --same-y 8                      eight images of each embedding (Fig. 2)
    python sample.py --like cat.png dog.jpg          variations of given images: y = e_i(image)

Image i depends on seed + i alone, but for rounding: not on the batch or the number of processes
(torchrun sample.py ...). The same command again continues where it stopped. Standard output is the path of
the grid; all else goes to standard error.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import sys
import time
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import train
import twosdm
from twosdm import UserError

METHODS = {"2sdm": ("prior", "image"), "oracle": ("image",), "baseline": ("baseline",), "joint": ("joint",)}
AGAIN = "train it again, or give another with --checkpoint"


# ============================================================================================================
# 1 A method with its networks: seeds -> images
# ============================================================================================================
class Pipeline:
    """A method with its networks: seeds -> images. Raises UserError if a run is missing or two do not fit.

    2sdm: y ~ prior, x ~ image model. oracle: y is the embedding of a training image. baseline: no y at all.
    joint: 2sdm, its networks and embedder trained together (Overfit-2SDM). With own_images, the oracle does
    without the training images: the caller has others to `embed`.
    """

    def __init__(self, args, method, device, own_images=False):
        self.args, self.method, self.device = args, method, device
        self.batches = []                             # of each: seconds of stage 1, of stage 2, images
        self.precision = twosdm.set_precision(args.precision, device, auto="tf32")
        self.runs = find_checkpoints(args, method)                            # {stage: checkpoint}
        self.files = {stage: run["file"] for stage, run in self.runs.items()}
        with twosdm.reading(" and ".join(map(str, self.files.values())), AGAIN):
            self.load(own_images)

    def load(self, own_images):
        """Everything that the checkpoints say, and what they need besides."""
        args, last = self.args, "baseline" if self.method == "baseline" else "image"
        self.networks = {stage: self.load_network(run) for stage, run in self.runs.items()}
        self.prior, self.image_model = self.networks.get("prior"), self.networks[last]
        self.run, self.file = self.runs[last], self.files[last]
        self.dataset, self.data, self.seen = self.run["dataset"], self.run["data"], self.run["seen"]
        self.config, self.packed_embedder = self.run["config"], self.run["embedder"]
        self.resolution = self.config["resolution"]
        self.y_dim = self.packed_embedder["dim"] if self.packed_embedder else 0
        self.check()
        self.class_counts = self.count_classes()
        churn = self.config["churn"] if args.churn is None else args.churn
        steps = args.steps or self.config["steps"]
        self.sampler = twosdm.Sampler(steps, churn, s_noise=args.s_noise)
        self.image_sampler = twosdm.Sampler(
            args.image_steps or steps, churn, s_noise=args.s_noise, guidance=args.guidance)
        self.caption, self.autoencoder, self.images = None, None, None
        if args.prompt is not None:                   # a word that it does not know is said here
            clip = getattr(self.embedder, "inner", self.embedder)             # beneath a PCA
            self.caption = clip.text_condition([args.prompt])                 # (1, A)
        if self.config["vae"]:
            self.autoencoder = twosdm.Autoencoder(args.vae or self.config["vae"]).to(self.device)
        if self.method == "oracle" and not own_images:
            self.images = self.training_images()

    def load_network(self, run):
        network = twosdm.load_denoiser(run, self.device)
        for weights in ("net", "ema", "optimizer"):   # gigabytes, and no longer of use
            run.pop(weights, None)
        twosdm.compile_network(network.net, self.args.compile, self.device)
        return network

    def check(self):
        """Raises UserError for networks that do not fit each other, and for flags that they cannot follow."""
        args, prior, a = self.args, self.runs.get("prior", {}), self.config["a"]
        if prior:
            pair, a = f"{prior['file']} and {self.file}", prior["config"]["a"]
            if prior["fingerprints"] != self.run["fingerprints"]:
                raise UserError(f"{pair} were trained on different images or embeddings: train both with the "
                                f"same settings")
            if self.config["a"] != a.replace("text", "none"):                 # captions are for priors alone
                raise UserError(f"{pair} were trained with different classes: train both with the same --a "
                                f"(and the image model with --a none if the prior has --a text)")
        if (a == "text") != (args.prompt is not None):
            raise UserError("--prompt needs a prior that knows captions, and such a prior needs a --prompt: "
                            "python train.py --stage prior --a text")
        if args.temperature != 1 and "y_mean" not in prior:
            raise UserError("--temperature is for --method 2sdm, with a prior of its own")
        if args.guidance != 1 and not self.config["y_dropout"]:
            raise UserError("--guidance needs an image model that sometimes was not told y: train.py --stage "
                            "image --y-dropout 0.1 --tag guided, then --checkpoint FOLDER/checkpoint.pt")

    def count_classes(self):
        """How often each class is to come: (A,), as in the training set or, with --class, only that one."""
        counts = self.data["class_counts"] if self.config["a"] == "class" else []
        label = self.args.label
        if label is None:
            return counts
        chosen = [count if i == label else 0 for i, count in enumerate(counts)]
        if not any(chosen):
            names = [f"{i} {self.data['classes'][i]}" for i, count in enumerate(counts) if count]
            known = ", ".join(names)[:300] or f"none, as {self.file} was trained without classes (--a class)"
            raise UserError(f"--class {label}: the classes are {known}")
        return chosen

    @functools.cached_property
    def embedder(self):
        """e_i, loaded when it is first asked for, since 2SDM draws without it; None without y."""
        if self.packed_embedder is None:
            return None
        weights = self.args.clip_weights or self.config["clip_weights"]
        with twosdm.reading(self.file, AGAIN):
            return twosdm.unpack_embedder(self.packed_embedder, weights).to(self.device)

    def training_images(self):
        assert self.packed_embedder or twosdm.told_nothing(self.config["y"])
        config = train.restore_config(self.config)
        config.runs, config.data = self.args.runs, self.args.data or config.data
        if config.data and not Path(config.data).exists():
            raise UserError(f"{config.data} does not exist: give the training images with --data")
        images = twosdm.load_images(config, self.autoencoder)
        if images.fingerprint != self.data["fingerprint"]:
            raise UserError("the training images are not those of this run: give its own with --data")
        if self.args.label is not None:
            images = images.subset(np.flatnonzero(images.labels == self.args.label))
        return images

    @torch.no_grad()
    def conditions(self, seeds, noise=None):
        """Stage 1: (B,) seeds -> y (B, D) and a (B, A), either of them None if the method has none.

        `noise` takes the place of the prior's own noise of these seeds.
        """
        y, a, rows = None, None, None
        if self.images is not None:                                           # the oracle
            rows = pick("image", seeds, [1] * len(self.images))
            y = self.embed(self.images, rows)
        if self.class_counts:
            numbers = pick("class", seeds, self.class_counts) if rows is None else self.images.labels[rows]
            a = self.one_hot(numbers, len(self.class_counts))
        if self.prior is not None:
            y = self.sample_prior(noise or twosdm.SampleNoise(seeds, self.device), a)
        elif self.method == "2sdm" and self.packed_embedder:                  # Class-cond
            counts = self.packed_embedder["reduction"]["counts"].tolist()
            y = self.one_hot(pick("cluster", seeds, counts), len(counts))
        return y, a

    def sample_prior(self, noise, a):
        """Eq. 2: y ~ p(y | a), where a is the class or the caption: noise of B rows -> (B, D)."""
        if self.caption is not None:
            a = self.caption.expand(len(noise), -1)
        with self.autocast():
            y = twosdm.sample_embeddings(self.prior, noise, a, self.sampler)
        if self.args.temperature != 1:
            mean = self.runs["prior"]["y_mean"].to(self.device)
            y = mean + self.args.temperature * (y - mean)
        check_finite(y, self.files["prior"])
        return y

    @torch.no_grad()
    def render(self, noise, y, a):
        """Stage 2: x ~ p(x | y, a), noise of B rows and what `conditions` gives -> (B, R, R, 3) uint8."""
        with self.autocast():
            x = twosdm.sample_images(self.image_model, noise, y, a, self.image_sampler)
        if self.autoencoder is not None:
            x = self.autoencoder.decode(x)
        check_finite(x, self.file)
        return twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def __call__(self, seeds):
        """Eq. 3, both stages: (B,) whole numbers -> (B, R, R, 3) uint8."""
        began = time.perf_counter()
        y, a = self.conditions(seeds)
        between = time.perf_counter()                 # `check_finite` has waited for the device
        pixels = self.render(twosdm.image_noise(seeds, self.device), y, a)
        self.batches.append((between - began, time.perf_counter() - between, len(pixels)))
        return pixels

    @torch.no_grad()
    def embed(self, images, rows):
        """y = e_i(x) of rows (B,) of a set of images -> (B, D); None without y."""
        return self.embedder and self.embedder(images.batch(rows, self.device))

    def one_hot(self, numbers, count):
        return torch.eye(count, device=self.device)[numbers]

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def describe(self):
        """What the images depend on, for the record."""
        args, runs = self.args, self.runs.items()
        return dict(
            sampler="Algorithm 2, streams by name", device=self.device.type, method=self.method,
            dataset=self.dataset, steps=self.sampler.steps, image_steps=self.image_sampler.steps,
            churn=self.sampler.s_churn, s_noise=args.s_noise, label=args.label, arithmetic=self.precision,
            y=self.config["y"], y_dim=self.y_dim, prompt=args.prompt,
            guidance=args.guidance, temperature=args.temperature,
            train_seed=self.seen and self.config["seed"],         # a published network does not tell it
            tags=[f"{stage} {run['config']['tag']}" for stage, run in runs if run["config"]["tag"]],
            vae=self.autoencoder and twosdm.fingerprint(self.autoencoder),
            fingerprints=self.run["fingerprints"], images_seen={stage: run["seen"] for stage, run in runs},
            networks={stage: twosdm.fingerprint(network) for stage, network in self.networks.items()})

    def timing(self):
        """What this pipeline has measured of itself (Table 5), or None if it has drawn nothing.

        The first of several batches is left out: it warms up caches, kernels and clocks.
        """
        if not self.batches:
            return None
        prior, image, images = np.sum(self.batches[1:] or self.batches, 0)
        return dict(ms_per_image=round(1000 * (prior + image) / images, 3),
                    prior_share=round(prior / (prior + image), 5), images=int(images),
                    batch=self.args.batch, device=device_name(self.device))


def pick(stream, seeds, counts):
    """Per seed a number i with probability counts[i] / sum(counts): (B,)."""
    ends = np.cumsum(counts)
    positions = [twosdm.mix_seed(stream, seed) % ends[-1] for seed in seeds]
    return np.searchsorted(ends, positions, side="right")


def check_finite(samples, file):
    if not samples.isfinite().all():
        raise UserError(f"{file} gives samples that are not finite: try --precision fp32, or an earlier "
                        f"snapshot with --checkpoint")


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


# ============================================================================================================
# 2 What to draw: independent images, an interpolation, variations
# ============================================================================================================
def slerp(start, end, way):
    """From start (...) to end (...) by way (T,) in [0, 1] -> (T, ...): way 0 and 1 give the ends, to the bit.

    Directions move along the great circle, lengths in proportion. Gaussian noise of many dimensions lies on a
    sphere; halfway along a straight line it would be shorter by 30 %, which no denoiser has ever seen.
    """
    a, b = start.cpu().double().flatten(), end.cpu().double().flatten()       # Apple's GPU has no float64
    way = torch.as_tensor(way, dtype=torch.float64)[:, None]                  # (T, 1)
    length = (1 - way) * a.norm() + way * b.norm()
    a, b = F.normalize(a, dim=0), F.normalize(b, dim=0)
    # Between parallel ends there is no one circle: clipped, they are not quite parallel.
    angle = (a @ b).clip(-1 + 1e-12, 1 - 1e-12).acos()
    between = length * (((1 - way) * angle).sin() * a + (way * angle).sin() * b) / angle.sin()
    return between.unflatten(1, start.shape).to(start)           # rounded to float32, the ends are exact


class NoiseBetween(twosdm.SampleNoise):
    """A Sampler's noise on the way between two seeds (Appendix C): row i at way[i] in [0, 1].

    `ends` is the noise of the two seeds. Rows at 0 and 1 are theirs, to the bit.
    """

    def __init__(self, ends, way):
        self.ends, self.way = ends, way

    def __len__(self):
        return len(self.way)

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32."""
        start, end = self.ends.randn(2, *shape[1:])
        return slerp(start, end, self.way)


class Job(NamedTuple):
    """Which images to make, how, and how the grid shows them."""
    names: dict                     # key of each image, such as its seed -> file name
    make: Callable                  # keys (B,) -> (B, R, R, 3) uint8
    columns: int
    rows: int                       # of the grid, at most
    recorded: dict = {}             # what the images depend on beside Pipeline.describe()
    given: "np.ndarray | None" = None        # images (rows, R, R, 3) that come first in their rows


def independent(pipeline, args):
    """--n images, each with y and noise of its own."""
    n = args.n or 64
    names = {seed: f"{seed:06d}.png" for seed in range(args.seed, args.seed + n)}
    return Job(names, pipeline, columns=min(8, n), rows=8)


def interpolation(pipeline, args):
    """--interpolate N, Appendix C: y changes from row to row, the image noise from column to column."""
    side, ends, device = args.interpolate, [args.seed, args.seed + 1], pipeline.device
    way = torch.linspace(0, 1, side, dtype=torch.float64)
    rows = way if args.slerp == "noise" else way[[0, -1]]
    noise = NoiseBetween(twosdm.SampleNoise(ends, device), rows)
    y, a = pipeline.conditions([args.seed] * len(rows), noise)                # of one class, the first seed's
    if args.slerp == "y":
        y = slerp(*y, way)                                                    # (2, D) -> (N, D)

    def make(cells):
        rows, columns = np.array(cells).T                                     # (B,), (B,)
        noise = NoiseBetween(twosdm.image_noise(ends, device), way[columns])
        return pipeline.render(noise, y[rows], None if a is None else a[:1].expand(len(cells), -1))

    names = {(row, column): f"row{row:02d}-column{column:02d}.png"
             for row in range(side) for column in range(side)}
    return Job(names, make, side, side, dict(interpolate=side, slerp=args.slerp, seed=args.seed))


def variations(pipeline, args):
    """--same-y K: K images of each y, that of a seed or, with --like, the embedding of a given image."""
    columns, given, recorded = args.same_y or 8, None, dict(same_y=True)
    rows = math.ceil((args.n or 8 * columns) / columns)
    if args.like:
        given, rows = read_images(args.like, pipeline.resolution), len(args.like)
        recorded = dict(like=[hashlib.sha256(image).hexdigest()[:12] for image in given], seed=args.seed)

    @functools.cache
    def condition(row):
        """y and a, which all images of a row share to the bit."""
        y, a = pipeline.conditions([args.seed + row])
        return y if given is None else pipeline.embed(twosdm.Images("given", given, ""), [row]), a

    def make(cells):
        y, a = zip(*[condition(row) for row, _ in cells])
        # The first image of a row is what its seed alone would give; the others do not depend on K.
        seeds = [args.seed + row if k == 0 else twosdm.mix_seed("variation", args.seed + row, k)
                 for row, k in cells]
        noise = twosdm.image_noise(seeds, pipeline.device)
        return pipeline.render(noise, torch.cat(y), None if a[0] is None else torch.cat(a))

    names = {(row, k): f"{args.seed + row:06d}-{k:02d}.png" for row in range(rows) for k in range(columns)}
    return Job(names, make, columns, 64, recorded, given)


# ============================================================================================================
# 3 Finding the runs
# ============================================================================================================
def stages(method, y):
    """The runs that a method needs. Clusters are drawn by their frequency, without a prior: Class-cond."""
    return ("image",) if method == "2sdm" and not twosdm.has_prior(y) else METHODS[method]


def newest(args, *names):
    """The checkpoint trained last of runs of these names, of --dataset if it is given; None without any."""
    found = [path for name in names
             for path in Path(args.runs).glob(f"{args.dataset or '*'}/{name}/checkpoint.pt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def same_dataset(args):
    """Without --dataset: the one whose image model or baseline was trained last, for all stages alike."""
    if not args.dataset and not args.checkpoint:
        path = newest(args, twosdm.run_name("image", args.y or "clip"), "baseline", "joint")
        args.dataset = path and path.parts[-3]


def find_run(args, stage, y=None):
    """The newest checkpoint of a stage (for this y) below args.runs, of args.dataset if it is given."""
    y, a = y or args.y or "clip", "none"
    twosdm.check_y(y)
    flags = f"--stage {stage} --y {y}"
    if stage == "prior" and args.prompt is not None:
        a, flags = "text", flags + " --a text"
    name = twosdm.run_name(stage, y, a)
    path = newest(args, name)
    if path is None:
        raise UserError(f"{args.runs} has no trained '{name}' of --dataset {args.dataset or 'any'}: run "
                        f"python train.py first (for this alone: {flags}), or say with --runs where it is")
    return path


def load(path, **expected):
    """A checkpoint by train.py, with its file's name; EDM's .pkl files are baselines."""
    edm = str(path).endswith(".pkl")
    checkpoint = twosdm.edm_checkpoint(path) if edm else twosdm.load_checkpoint(path, **expected)
    with twosdm.reading(path, AGAIN):
        config = vars(train.restore_config(checkpoint["config"]))
        return dict(checkpoint, file=path, config=config, stage=str(checkpoint["stage"]))


def load_given(paths, methods=()):
    """{stage: (path, checkpoint)} of the files of --checkpoint, each of use to one of the methods."""
    given = {}
    for path in paths or ():
        checkpoint = load(path)
        stage = checkpoint["stage"]
        if stage in given:
            raise UserError(f"--checkpoint: {given[stage][0]} and {path} are both of the stage {stage}: give "
                            f"one of each")
        if not any(stage in METHODS[method] for method in methods or METHODS):
            raise UserError(f"--checkpoint: {path} is of the stage {stage}, for which --method "
                            f"{' '.join(methods)} has no use")
        given[stage] = path, checkpoint
    return given


def find_checkpoints(args, method):
    """{stage: checkpoint} of a method's networks: those given, and for the others the newest."""
    given, y, found = load_given(args.checkpoint), args.y or "clip", {}
    if "image" in given:
        y = given["image"][1]["config"]["y"]
        if args.y not in (None, y):
            raise UserError(f"{given['image'][0]} was trained with --y {y}: leave --y {args.y} out")
    for stage in stages(method, y):
        found[stage] = given[stage][1] if stage in given else load(find_run(args, stage, y), stage=stage)
    if method == "2sdm" and "prior" in given and "prior" not in found:
        raise UserError(f"--y {y} is drawn without a prior: leave {given['prior'][0]} out")
    if method == "joint":
        return {stage: part_of(found["joint"], stage) for stage in ("prior", "image")}
    return found


def part_of(joint, stage):
    """What would be the checkpoint of the prior or of the image model, out of that of the joint stage."""
    weights = {name.removeprefix(f"{stage}."): tensor for name, tensor in joint["ema"].items()
               if name.startswith(f"{stage}.")}
    return dict(joint, model=joint["model"][stage], ema=weights, embedder=None)


# ============================================================================================================
# 4 Files
# ============================================================================================================
def open_folder(out, settings, default):
    """A folder for samples of these settings (bytes): new, or one that holds the same. Never another's."""
    numbered = (Path(f"{default}-{i}" if i > 1 else default) for i in itertools.count(1))
    for folder in [Path(out)] if out else numbered:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "settings.json"
        content = record.read_bytes() if record.is_file() else b""
        others = [file for file in folder.iterdir() if not file.name.startswith((".", record.name))]
        if not others and not content.endswith(b"}"):             # new, or some failure cut the record short
            with twosdm.written(record) as file:
                file.write(settings)
            return folder
        if content == settings:
            return folder
    raise UserError(f"{out} holds something else already: give another --out")


def read_images(paths, resolution):
    """Image files, treated as training images are -> (N, R, R, 3) uint8."""
    pixels = []
    for path in paths:
        with twosdm.reading(path, "--like needs image files"):
            pixels.append(twosdm.read_square(Path(path).read_bytes(), resolution))
    return np.stack(pixels)


def read_sample(path):
    with twosdm.reading(path, "delete it, and the same command draws it again"):
        return np.asarray(Image.open(path))


def grid(job, folder):
    """The first rows of a job's images as one picture."""
    names, columns = list(job.names.values())[:job.rows * job.columns], job.columns
    shown = [read_sample(folder / name) for name in names]
    if job.given is not None:
        columns += 1
        for row, image in enumerate(job.given[:job.rows]):
            shown.insert(row * columns, image)
    return twosdm.image_grid(np.stack(shown), columns)


def write_npz(folder, shape):
    """samples.npz: a folder's images as `arr_0` (N, R, R, 3) uint8 in the order of their `seeds` (N,).

    Streamed: memory does not grow with N.
    """
    seeds = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit())
    header = dict(descr="|u1", fortran_order=False, shape=(len(seeds), *shape))
    with twosdm.written(folder / "samples.npz") as fresh, zipfile.ZipFile(fresh, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for seed in tqdm(seeds, desc="samples.npz", unit=" images"):
                file.write(read_sample(folder / f"{seed:06d}.png").tobytes())
        with archive.open("seeds.npy", "w") as file:
            np.save(file, seeds)
    print(f"{folder / 'samples.npz'} holds all {len(seeds)} images of the folder", file=sys.stderr)


# ============================================================================================================
# 5 The command line
# ============================================================================================================
def at_least(low, kind, high=10**6):
    """An argparse type: numbers from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low}, at most {high:,}")
        return value
    return number


def add_sampling_flags(parser):
    """The flags of everything that samples; evaluate.py has them too, and `at_least` for its own."""
    add, amount = parser.add_argument_group("which runs").add_argument, at_least(0, float)
    add("--y", help="which variant of prior and image model: clip, pca:D, kmeans:K, none (default: clip)")
    add("--runs", default="runs", help="folder of all runs (default: %(default)s)")
    add("--dataset", choices=train.PRESETS, help="whose runs to take (default: those trained last)")
    add("--checkpoint", nargs="+", metavar="FILE", help="checkpoints of prior, image model or baseline, in "
        "place of the newest; EDM's published .pkl files serve as baseline (default: none)")
    add("--data", help="the training images, for the oracle (default: where they were)")
    add("--clip-weights", help="CLIP's weights, for the oracle (default: where they were)")
    add("--vae", help="Stable Diffusion's VAE, for latent models (default: where it was)")

    add = parser.add_argument_group("sampling").add_argument
    add("--seed", type=at_least(0, int, 2**31), default=0,
        help="image i is drawn from seed + i (default: %(default)s)")
    add("--steps", type=at_least(2, int),
        help="sampling steps of prior and image model (default: the run's preset)")
    add("--image-steps", type=at_least(2, int), help="steps of the image model alone (default: as --steps)")
    add("--churn", type=amount, help="S_churn; 0 = deterministic (default: the run's preset)")
    add("--s-noise", type=amount, default=1.007, help="S_noise of the churn (default: %(default)s)")
    add("--class", type=at_least(0, int), dest="label", metavar="CLASS",
        help="draw this class alone (default: as in the data)")
    add("--prompt", metavar="TEXT", help='a caption, such as "three red stars on a blue background", for '
        "priors trained with --a text (default: none)")
    add("--guidance", type=amount, default=1.0, help="classifier-free guidance on y; 1 = none, otherwise the "
        "model must have been trained with --y-dropout (default: %(default)s)")
    add("--temperature", type=amount, default=1.0, help="scales the prior's embeddings about their mean in "
        "the training set (default: %(default)s)")

    add = parser.add_argument_group("machine and files").add_argument
    add("--batch", type=at_least(1, int), default=64, help="images drawn at a time (default: %(default)s)")
    add("--device", default="auto", help="auto = cuda, else mps, else cpu (default: %(default)s)")
    add("--precision", choices=("auto", *train.PRECISIONS), default="auto",
        help="of the networks; auto = tf32 on cuda, else fp32 (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the networks, which pays for thousands of images on cuda (default: no)")
    return at_least


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("what to draw").add_argument
    add("--method", choices=METHODS, default="2sdm", help="(default: %(default)s)")
    add("--n", type=at_least(1, int, 10**7),
        help="number of images, with --same-y rounded up to whole rows (default: 64, with --same-y 8 rows)")
    add("--interpolate", nargs="?", type=at_least(2, int, 256), const=8, metavar="N",
        help="an N×N grid between two embeddings and two noises, those of the seed and the next; without "
             "churn (default: no; without N: 8)")
    add("--slerp", choices=("noise", "y"), default="noise",
        help="what --interpolate turns from one embedding into the other: the prior's noise, or y itself "
             "(default: %(default)s)")
    add("--same-y", type=at_least(1, int), metavar="K",
        help="K images of each embedding, each with noise of its own (default: 1, with --like 8)")
    add("--like", nargs="+", metavar="IMAGE", help="variations of image files: y is their embedding; the "
        "grid shows them in its first column (default: none)")
    add("--out", help="folder for the images (default: samples/<dataset>-<method>, with -interpolate, "
        "-same-y or -like where it applies, numbered)")
    add("--npz", action="store_true",
        help="also write samples.npz: all images in the folder as one array, by their seeds (default: no)")
    add_sampling_flags(parser)
    return parser.parse_args()


def choose_mode(args):
    """None (independent images) or the flag that says otherwise. Raises UserError for flags at odds."""
    at_odds = {"interpolate": ("like", "same-y", "n", "npz", "churn"), "like": ("n", "npz"),
               "same-y": ("npz",)}
    flags = {name.replace("_", "-"): value for name, value in vars(args).items()}
    mode = next((flag for flag in at_odds if flags[flag]), None)
    for other in at_odds.get(mode, ()):
        if flags[other]:
            raise UserError(f"--{mode} and --{other} do not go together: leave one of them out")
    if args.slerp == "y" and mode != "interpolate":
        raise UserError("--slerp y is for --interpolate: add it, or leave --slerp out")
    if args.y and args.method in ("baseline", "joint"):
        raise UserError(f"--method {args.method} has no variants of y: leave --y out")
    if mode == "interpolate":
        args.churn = 0.0
    if mode == "like" and args.method == "2sdm":
        args.method = "oracle"
    return mode


def check_mode(mode, pipeline):
    """Raises UserError if the pipeline has no embeddings y of the kind that the mode needs."""
    y = pipeline.config["y"]
    embeds = pipeline.method == "oracle" and twosdm.has_prior(y)
    able = {"interpolate": pipeline.prior, "like": embeds, "same-y": pipeline.prior or embeds, None: True}
    if not able[mode]:
        raise UserError(f"--{mode} needs embeddings that --method {pipeline.method} with --y {y} does not "
                        f"have: take --method 2sdm with --y clip or pca:D")


def main():
    args = parse()
    mode = choose_mode(args)
    same_dataset(args)
    device = twosdm.pick_device(args.device)
    twosdm.join_processes(device)
    load_given(args.checkpoint, [args.method])        # refuses those of no use
    pipeline = Pipeline(args, args.method, device, own_images=mode == "like")
    check_mode(mode, pipeline)
    jobs = {None: independent, "interpolate": interpolation, "same-y": variations, "like": variations}
    job = jobs[mode](pipeline, args)
    print(args.method, "from", *pipeline.files.values(), file=sys.stderr)

    folder = None
    if not twosdm.rank():
        settings = json.dumps(pipeline.describe() | job.recorded, indent=1).encode()
        default = f"samples/{pipeline.dataset}-{args.method}" + (f"-{mode}" if mode else "")
        folder = open_folder(args.out, settings, default)
    folder = twosdm.gather(folder)[0]
    missing = [key for key, name in job.names.items() if not (folder / name).exists()]
    twosdm.gather(None)                               # nobody draws before all have looked
    batches = twosdm.share([missing[i:i + args.batch] for i in range(0, len(missing), args.batch)])
    with tqdm(total=sum(map(len, batches)), desc=args.method, unit=" images") as bar:
        for keys in batches:
            for key, pixels in zip(keys, job.make(keys)):
                twosdm.save_picture(folder / job.names[key], pixels)
            bar.update(len(keys))
    twosdm.gather(None)
    if twosdm.rank():
        return 0

    picture = folder / (f"grid-{args.seed:06d}.png" if args.seed else "grid.png")      # never another seed's
    twosdm.save_picture(picture, grid(job, folder), least=512)
    if args.npz:
        write_npz(folder, (pipeline.resolution, pipeline.resolution, 3))
    print(picture)
    return 0


if __name__ == "__main__":
    twosdm.run(main)
