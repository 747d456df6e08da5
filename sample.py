"""Samples from trained models: prior -> embedding -> image (2SDM), or one of the methods it is compared with.

    python sample.py                                 64 images of the newest runs, as PNGs and one grid
    python sample.py --method baseline --n 1000      the EDM model without embeddings
    python sample.py --method baseline --checkpoint edm-ffhq-64x64-uncond-vp.pkl      EDM's own
    python sample.py --n 50000 --npz --out big       also `arr_0` (N, H, W, 3) uint8 for OpenAI's evaluator
    python sample.py --interpolate                   rows share y, columns the image noise (Figs. 8 to 10)
    python sample.py --same-y 8                      eight images of each embedding (Fig. 2)
    python sample.py --like cat.png dog.jpg          variations of given images: y = e_i(image)

Image i depends on seed + i alone, but for rounding: not on the batch or the number of processes
(torchrun -- sample.py ...). The same command again continues where it stopped. Standard output is the path of
the grid; all else goes to standard error.
"""
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import train
import twosdm
from train import option
from twosdm import (
    Images, SampleNoise, UserError, fingerprint, gather, has_prior, image_noise, mix_seed, rank, reading,
    run_name, save_picture, written)

METHODS = {"2sdm": "prior image", "oracle": "image", "baseline": "baseline", "joint": "joint"}
RECORDED = "steps image_steps churn s_noise prompt guidance temperature".split()


# ============================================================================================================
# 1 A method with its networks: seeds -> images
# ============================================================================================================
class Pipeline:
    """A method with its networks: seeds -> images. Raises UserError if a run is missing or two do not fit.

    2sdm: y ~ prior, x ~ image model. oracle: y is the embedding of a training image. baseline: no y at all.
    joint: 2sdm, its networks and embedder trained together (Overfit-2SDM). With own_images, the oracle does
    without the training images: the caller has others to `embed`.
    """
    caption = autoencoder = images = None             # of the methods and runs that have none

    def __init__(self, args, method, device, own_images=False):
        self.args = args = replace(args)                                      # its own, to be completed
        self.method, self.device = method, device
        self.batches = []                             # of each: seconds of stage 1, of stage 2, images
        self.precision = twosdm.set_precision(args.precision, device, auto="tf32")
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        self.runs = find_checkpoints(args, method)                            # {stage: checkpoint}
        self.networks = {}
        for stage, run in self.runs.items():          # the last of which is that of the image model
            with reading(run["file"], "train it again, or give another --checkpoint"):
                self.networks[stage] = network = twosdm.load_denoiser(run, device)
            run.pop("ema")                            # gigabytes, and no longer of use
            twosdm.compile_network(network.net, args.compile, device)
        self.prior, self.image_model, self.run = self.networks.get("prior"), network, run
        self.file, self.config, self.data = run["file"], run["config"], run["data"]
        self.seen, self.fingerprints = run["seen"], run["fingerprints"]
        self.dataset, self.resolution = self.config.dataset, self.config.resolution
        self.check()
        self.class_counts = self.count_classes()
        args.steps = args.steps or self.config.steps
        args.image_steps = args.image_steps or args.steps
        args.churn = self.config.churn if args.churn is None else args.churn
        self.sampler = twosdm.Sampler(args.steps, args.churn, s_noise=args.s_noise)
        self.image_sampler = replace(
            self.sampler, steps=args.image_steps, guidance=args.guidance)
        if args.prompt:                               # a word that it does not know is said here
            self.caption = self.embedder.text_condition([args.prompt])        # (1, A)
        if self.config.vae:
            self.autoencoder = twosdm.Autoencoder(args.vae or self.config.vae).to(device)
        if method == "oracle" and not own_images:
            self.images = training_images(args, self.config, self.fingerprints["images"], self.autoencoder)

    def check(self):
        """Raises UserError for networks that do not fit each other, and for flags that they cannot follow."""
        args, prior, a = self.args, self.runs.get("prior", {}), self.config.a
        if prior:
            a = prior["config"].a
            # Captions are for priors alone.
            told = prior["fingerprints"], a.replace("text", "none")
            if told != (self.fingerprints, self.config.a):
                raise UserError(f"{prior['file']} and {self.file} were trained on different images or "
                                f"embeddings or with different classes: train both with the same settings "
                                f"(but the image model with --a none if the prior has --a text)")
        if (a == "text") != bool(args.prompt):
            raise UserError("--prompt needs a prior that knows captions, and such a prior needs a --prompt: "
                            "python train.py --stage prior --a text")
        if args.temperature != 1 and "y_mean" not in prior:
            raise UserError("--temperature is for --method 2sdm, with a prior of its own")
        if args.guidance != 1 and not self.config.y_dropout:
            raise UserError("--guidance needs an image model that sometimes was not told y: train.py --stage "
                            "image --y-dropout 0.1 --tag guided, then --checkpoint FOLDER/checkpoint.pt")

    def count_classes(self):
        """How often each class is to come: (A,), as in the training set or, with --class, only that one."""
        counts = self.data["class_counts"] if self.config.a == "class" else []
        label = self.args.class_
        if label is None:
            return counts
        if not sum(counts[label:label + 1]):          # such a class has no images, or there is none
            names = ", ".join(map("{} {}".format, range(len(counts)), self.data["classes"]))[:300]
            raise UserError(f"--class {label}: the classes are "
                            f"{names or f'none, as {self.file} was trained without classes (--a class)'}")
        return [int(i == label) for i in range(len(counts))]

    @functools.cached_property
    def embedder(self):
        """e_i, loaded when it is first asked for, since 2SDM draws without it; None without y."""
        if self.run["embedder"] is None:
            return None
        weights = self.args.clip_weights or self.config.clip_weights
        with reading(self.file, "train it again, or give another --checkpoint"):
            return twosdm.unpack_embedder(self.run["embedder"], weights).to(self.device)

    @torch.no_grad()
    def conditions(self, seeds, noise=None):
        """Stage 1: (B,) seeds -> y (B, D) and a (B, A), either of them None if the method has none.

        `noise` takes the place of the prior's own noise of these seeds.
        """
        y, a, counts = None, None, self.class_counts
        if self.images:                                                       # the oracle
            label, labels = self.args.class_, self.images.labels
            rows = pick("image", seeds, [1] * len(self.images) if label is None else labels == label)
            y = self.embed(self.images, rows)
        if counts:
            a = self.one_hot(labels[rows] if self.images else pick("class", seeds, counts), counts)
        if self.prior:
            y = self.sample_prior(noise or SampleNoise(seeds, self.device), a)
        elif self.method == "2sdm" and self.run["embedder"]:                  # Class-cond
            counts = self.run["embedder"]["reduction"]["counts"].tolist()
            y = self.one_hot(pick("cluster", seeds, counts), counts)
        return y, a

    def sample_prior(self, noise, a):
        """Eq. 2: y ~ p(y | a), where a is the class or the caption: noise of B rows -> (B, D)."""
        if self.caption is not None:
            a = self.caption.expand(len(noise), -1)
        with self.autocast:
            y = twosdm.sample_embeddings(self.prior, noise, a, self.sampler)
        if self.args.temperature != 1:
            y = self.runs["prior"]["y_mean"].to(y).lerp(y, self.args.temperature)
        check_finite(y, self.runs["prior"]["file"])
        return y

    @torch.no_grad()
    def render(self, noise, y, a):
        """Stage 2: x ~ p(x | y, a), noise of B rows and what `conditions` gives -> (B, R, R, 3) uint8."""
        with self.autocast:
            x = twosdm.sample_images(self.image_model, noise, y, a, self.image_sampler)
        if self.autoencoder:
            x = self.autoencoder.decode(x)
        check_finite(x, self.file)
        return twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def __call__(self, seeds):
        """Eq. 3, both stages: (B,) whole numbers -> (B, R, R, 3) uint8."""
        began = time.perf_counter()
        y, a = self.conditions(seeds)
        between = time.perf_counter()                 # with a prior, `check_finite` has waited for the device
        pixels = self.render(image_noise(seeds, self.device), y, a)
        self.batches.append((between - began, time.perf_counter() - between, len(pixels)))
        return pixels

    @torch.no_grad()
    def embed(self, images, rows):
        """y = e_i(x) of rows (B,) of a set of images -> (B, D); None without y."""
        return self.embedder and self.embedder(images.batch(rows, self.device))

    def one_hot(self, numbers, counts):
        """The rows of as many classes as there are counts: (B,) -> (B, A)."""
        return torch.eye(len(counts), device=self.device)[numbers]

    def describe(self):
        """What the images depend on, for the record."""
        args, runs = self.args, self.runs.items()
        return dict(
            {name: vars(args)[name] for name in RECORDED}, label=args.class_,
            sampler="Algorithm 2, streams by name", device=self.device.type, method=self.method,
            dataset=self.dataset, arithmetic=self.precision, y=self.config.y,
            y_dim=(self.run["embedder"] or dict(dim=0))["dim"],
            train_seed=self.seen and self.config.seed,         # a published network does not tell it
            tags=[f"{stage} {run['config'].tag}" for stage, run in runs if run["config"].tag],
            vae=self.autoencoder and fingerprint(self.autoencoder),
            fingerprints=self.fingerprints, images_seen={stage: run["seen"] for stage, run in runs},
            networks={stage: fingerprint(network) for stage, network in self.networks.items()})

    def timing(self):
        """What this pipeline has measured of itself (Table 5), or None if it has drawn nothing.

        The first of several batches is left out: it warms up caches, kernels and clocks.
        """
        if self.batches:
            prior, image, images = np.sum(self.batches[1:] or self.batches, 0)
            device = f"{self.device.type}, {torch.get_num_threads()} threads"
            if self.device.type == "cuda":
                device = torch.cuda.get_device_name(self.device)
            return dict(ms_per_image=1000 * (prior + image) / images, prior_share=prior / (prior + image),
                        images=int(images), batch=self.args.batch, device=device)


def training_images(args, config, expected=None, autoencoder=None):
    """The images that a run, or a preset, is trained on. Raises UserError for another fingerprint."""
    config = replace(config, runs=args.runs, data=args.data or config.data)
    images = twosdm.load_images(config, autoencoder)
    if expected not in (None, images.fingerprint):
        raise UserError("the training images are not those of the run: give its own with --data")
    return images


def pick(stream, seeds, counts):
    """Per seed a number i with probability counts[i] / sum(counts): (B,)."""
    ends = np.cumsum(counts)
    positions = [mix_seed(stream, seed) % ends[-1] for seed in seeds]
    return np.searchsorted(ends, positions, side="right")


def check_finite(samples, file):
    if not samples.isfinite().all():
        raise UserError(f"{file} gives samples that are not finite: try --precision fp32, or an earlier "
                        f"snapshot with --checkpoint")


# ============================================================================================================
# 2 What to draw: independent images, an interpolation, variations
# ============================================================================================================
def slerp(start, end, way):
    """From start (...) to end (...) by way (T,) in [0, 1] -> (T, ...): way 0 and 1 give the ends, to the bit.

    Directions move along the great circle, lengths in proportion. Gaussian noise of many dimensions lies on a
    sphere; halfway along a straight line it would be shorter by 30%, which no denoiser has ever seen.
    """
    ends = torch.stack([start, end]).cpu().double().flatten(1)                # Apple's GPU has no float64
    way = torch.as_tensor(way, dtype=torch.float64)
    shares = torch.stack([1 - way, way], dim=1)                               # (T, 2)
    lengths = ends.norm(dim=1, keepdim=True)                                  # (2, 1)
    directions = F.normalize(ends)
    # Between parallel ends there is no one circle: clipped, they are not quite parallel.
    angle = directions.prod(dim=0).sum().clip(-1 + 1e-12, 1 - 1e-12).acos()
    turned = (shares * angle).sin() @ directions / angle.sin()
    between = shares @ lengths * turned
    return between.unflatten(1, start.shape).to(start)           # rounded to float32, the ends are exact


@dataclass
class NoiseBetween(SampleNoise):
    """A Sampler's noise on the way between two seeds (Appendix C): row i at way[i] in [0, 1].

    `ends` is the noise of the two seeds. Rows at 0 and 1 are theirs, to the bit.
    """

    ends: SampleNoise
    way: torch.Tensor

    def __len__(self):
        return len(self.way)

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32."""
        return slerp(*self.ends.randn(2, *shape[1:]), self.way)


class Job(NamedTuple):
    """A table of images, in which those of a row share y and a."""
    rows: range
    columns: int
    name: str                       # of the file of a row and a column, to be formatted
    inputs: Callable                # rows [B], columns [B] -> what Pipeline.render takes
    recorded: dict                  # what the images depend on beside Pipeline.describe()
    given: Images | None = None       # images that come first in their rows


def samples(pipeline, args):
    """Images of the y of each seed, or (--like) of each given image: one of each or, with --same-y, K."""
    columns, given, recorded = args.same_y or 1, None, dict(same_y=bool(args.same_y))
    rows = -(-(args.n or 64) // columns)              # rounded up
    if args.like:
        given, columns = read_images(args.like, pipeline.resolution), args.same_y or 8
        rows, recorded = len(given), dict(like=given.fingerprint, seed=args.seed)

    def inputs(rows, columns):
        y, a = pipeline.conditions(rows)
        if given:
            y = pipeline.embed(given, np.subtract(rows, args.seed))
        # The first image of a row is what its seed alone would give; the others do not depend on K.
        seeds = [mix_seed("variation", seed, column) if column else seed
                 for seed, column in zip(rows, columns)]
        return image_noise(seeds, pipeline.device), y, a

    name = "{:06d}-{:02d}.png" if args.like or args.same_y else "{:06d}.png"
    return Job(range(args.seed, args.seed + rows), columns, name, inputs, recorded, given)


def interpolation(pipeline, args):
    """--interpolate N, Appendix C: y changes from row to row, the image noise from column to column."""
    side, ends, device = args.interpolate, [args.seed, args.seed + 1], pipeline.device
    way = torch.linspace(0, 1, side, dtype=torch.float64)
    noise = NoiseBetween(SampleNoise(ends, device), way)
    y, a = pipeline.conditions([args.seed] * side, noise)                     # of one class, the first seed's
    if args.slerp == "y":
        y = slerp(y[0], y[-1], way)                                           # (N, D)

    def inputs(rows, columns):
        noise = NoiseBetween(image_noise(ends, device), way[columns])
        return noise, y[rows], a if a is None else a[rows]

    recorded = dict(interpolate=side, slerp=args.slerp, seed=args.seed)
    return Job(range(side), side, "row{:02d}-column{:02d}.png", inputs, recorded)


# ============================================================================================================
# 3 Finding the runs
# ============================================================================================================
def newest(args, *names):
    """The checkpoint trained last of runs of these names, of --dataset if it is given; None without any."""
    found = [path for name in names
             for path in Path(args.runs).glob(f"{args.dataset or '*'}/{name}/checkpoint.pt")]
    return max(found, key=os.path.getmtime, default=None)


def same_dataset(args):
    """Without --dataset: the one whose image model or baseline was trained last, for all stages alike."""
    if not args.dataset and not args.checkpoint:
        path = newest(args, run_name("image", args.y or "clip"), "baseline", "joint")
        args.dataset = path and path.parts[-3]


def find_run(args, stage, y=None):
    """The newest checkpoint of a stage (for this y) below args.runs, of args.dataset if it is given."""
    y = y or args.y or "clip"
    twosdm.check_y(y)
    a = "text" if stage == "prior" and args.prompt else "none"
    name = run_name(stage, y, a)
    path = newest(args, name)
    if path is None:
        raise UserError(f"{args.runs} has no trained '{name}' of --dataset {args.dataset or 'any'}: run "
                        f"python train.py first (for this alone: --stage {stage} --y {y} --a {a}), or say "
                        f"with --runs where it is")
    return path


def load(path, stage=None):
    """A checkpoint by train.py, with its file's name; EDM's .pkl files are baselines."""
    edm = str(path).endswith(".pkl")
    checkpoint = twosdm.edm_checkpoint(path) if edm else twosdm.load_checkpoint(path, stage)
    with reading(path, "give the checkpoint of a network that this version trained"):
        config = train.TrainConfig(**checkpoint["config"])
    return dict(checkpoint, file=path, config=config, net=None, optimizer=None)         # gigabytes of no use


def load_given(paths, methods=()):
    """{stage: checkpoint} of the files of --checkpoint, each of use to one of the methods (none: to any)."""
    useful, given = {stage for method in methods or METHODS for stage in METHODS[method].split()}, {}
    for path in paths or ():
        checkpoint = load(path)
        stage = checkpoint.get("stage")
        if stage in given or stage not in useful:
            raise UserError(f"{path} is of the stage {stage}: give --checkpoint at most one file of each of "
                            f"the stages that --method {' '.join(methods or METHODS)} has")
        given[stage] = checkpoint
    return given


def find_checkpoints(args, method):
    """{stage: checkpoint} of a method's networks: those given, and for the others the newest."""
    given, y, stages = load_given(args.checkpoint, args.method), args.y or "clip", METHODS[method].split()
    if "image" in given:
        y = given["image"]["config"].y
    if args.y and (args.y != y or "image" not in stages):
        raise UserError(f"--y {args.y} does not fit --method {method} or --checkpoint: leave one of them out")
    # The others are of the same data set.
    args.dataset = args.dataset or next(
        (run["config"].dataset for run in given.values() if run["seen"]), None)
    if method == "2sdm" and not has_prior(y) and "prior" not in given:
        stages = ["image"]                            # clusters are drawn by their frequency: Class-cond
    found = {stage: given.get(stage) or load(find_run(args, stage, y), stage) for stage in stages}
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
        if not any(folder.glob("[!.]*")):             # new, or its record failed
            with written(record) as file:
                file.write(settings)
        if record.is_file() and record.read_bytes() == settings:
            return folder
    raise UserError(f"{out} holds something else already: give another --out")


def read_images(paths, resolution):
    """Image files, treated as training images are -> Images."""
    pixels = []
    for path in paths:
        with reading(path, "--like needs image files"):
            pixels.append(twosdm.read_square(Path(path).read_bytes(), resolution))
    pixels = np.stack(pixels)
    return Images("given", pixels, twosdm.hash_of(pixels))


def fill(folder, pipeline, job, batch):
    """Draws the images of a job that its folder lacks; of several processes, each a part of them."""
    cells = itertools.product(job.rows, range(job.columns))
    missing = [cell for cell in cells if not (folder / job.name.format(*cell)).exists()]
    gather(None)                                      # nobody draws before all have looked
    batches = [missing[i:i + batch] for i in range(0, len(missing), batch)]
    for cells in tqdm(batches[rank()::twosdm.processes()], desc=pipeline.method, unit=" batches"):
        rows, columns = map(list, zip(*cells))
        pixels = pipeline.render(*job.inputs(rows, columns))
        for cell, image in zip(cells, pixels):
            save_picture(folder / job.name.format(*cell), image)
    gather(None)


def grid(job, folder):
    """The first 64 rows of a job's images as one picture; rows of one image stand side by side."""
    shown = []
    for i, row in enumerate(job.rows[:64]):
        if job.given:
            shown.append(job.given.pixels[i])
        paths = [folder / job.name.format(row, column) for column in range(job.columns)]
        shown += [np.asarray(Image.open(path)) for path in paths]
    width = job.columns + bool(job.given)
    return twosdm.image_grid(np.stack(shown), width if width > 1 else 8)


def write_npz(folder):
    """samples.npz: a folder's images as `arr_0` (N, R, R, 3) uint8 in the order of their `seeds` (N,).

    By way of a file: memory does not grow with N.
    """
    seeds = sorted(int(path.stem) for path in folder.glob("[0-9]*.png"))
    path = folder / "samples.npz"
    with written(path) as fresh, tempfile.TemporaryFile(dir=folder) as file:
        for seed in tqdm(seeds, desc=path.name, unit=" images"):
            image = np.asarray(Image.open(folder / f"{seed:06d}.png"))
            file.write(image)
        file.flush()
        np.savez(fresh, arr_0=np.memmap(file, np.uint8).reshape(-1, *image.shape), seeds=seeds)


# ============================================================================================================
# 5 The command line
# ============================================================================================================
@dataclass
class SamplingFlags:
    """The flags of everything that samples; evaluate.py has them, too."""
    y: str = option(None, "which variant of prior and image model: clip, pca:D, kmeans:K, none (default: "
                    "clip)", group="which runs")
    runs: str = option("runs", "folder of all runs")
    dataset: str = option(None, "whose runs to take (default: those trained last)", choices=train.PRESETS)
    checkpoint: list = option(None, "checkpoints of prior, image model or baseline, in place of the newest; "
                              "EDM's published .pkl files serve as baseline (default: none)", nargs="+")
    data: str = option(None, "the training images, for the oracle (default: where they were)")
    clip_weights: str = option(None, "CLIP's weights, for the oracle (default: where they were)")
    vae: str = option(None, "Stable Diffusion's VAE, for latent models (default: where it was)")

    seed: int = option(0, "image i is drawn from seed + i", 0, 2**31, group="sampling")
    steps: int = option(None, "sampling steps of prior and image model (default: the run's preset)", 2)
    image_steps: int = option(None, "steps of the image model alone (default: as --steps)", 2)
    churn: float = option(None, "S_churn; 0 = deterministic (default: the run's preset)", 0)
    s_noise: float = option(1.007, "S_noise of the churn", 0)
    class_: int = option(None, "draw this class alone (default: as in the data)", 0, metavar="N")
    prompt: str = option(None, 'a caption, such as "three red stars on a blue background", for priors '
                         "trained with --a text (default: none)")
    guidance: float = option(1.0, "classifier-free guidance on y; 1 = none, otherwise the model must have "
                             "been trained with --y-dropout", 0)
    temperature: float = option(1.0, "scales the prior's embeddings about their mean in the training set", 0)

    batch: int = option(64, "images drawn at a time", 1, 2**20, group="machine and files")
    device: str = option("auto", "auto = cuda, else mps, else cpu")
    precision: str = option("auto", "of the networks; auto = tf32 on cuda, else fp32",
                            choices=("auto", *train.PRECISIONS))
    compile: bool = option(False, "torch.compile the networks, which pays for thousands of images on cuda")


@dataclass
class DrawingFlags:
    """What sample.py draws."""
    method: list = option(None, "what draws it (default: 2sdm)", choices=METHODS, group="what to draw",
                          nargs=1)
    n: int = option(None, "number of images, with --same-y rounded up to whole rows (default: 64)", 1)
    interpolate: int = option(None, "an N×N grid between two embeddings and two noises, those of the seed "
                              "and the next; without churn (default: no; without N: 8)", 2, 256,
                              nargs="?", const=8, metavar="N")
    slerp: str = option("noise", "what --interpolate turns from one embedding into the other: the prior's "
                        "noise, or y itself", choices=("noise", "y"))
    same_y: int = option(None, "images of each embedding, each with noise of its own (default: 1, with "
                         "--like 8)", 1)
    like: list = option(None, "variations of image files: y is their embedding; the grid shows them in its "
                        "first column (default: none)", nargs="+")
    out: str = option(None, "folder for the images (default: samples/<dataset>-<method>, with -interpolate, "
                      "-same-y or -like where it applies, numbered)")
    npz: bool = option(False, "also write samples.npz: all images in the folder as one array, by their seeds")


@dataclass
class Flags(SamplingFlags, DrawingFlags):
    pass


AT_ODDS = dict(                                       # of each mode: the flags that do not go with it
    interpolate="like same_y n npz churn", like="n npz", same_y="npz")


def choose_mode(args):
    """The flag that makes other than independent images, or "". Raises UserError for flags at odds."""
    train.check_together(args, AT_ODDS)
    mode = next((name for name in AT_ODDS if vars(args)[name]), "")
    if args.slerp == "y" and not args.interpolate:
        raise UserError("--slerp y is for --interpolate: add it, or leave --slerp out")
    if args.interpolate:
        args.churn = 0.0
    if args.like and args.method in (None, ["2sdm"]):
        args.method = ["oracle"]
    args.method = args.method or ["2sdm"]
    return mode


def check_mode(mode, pipeline):
    """Raises UserError if the pipeline has no embeddings y of the kind that the mode needs."""
    y = pipeline.config.y
    embeds = pipeline.method == "oracle" and has_prior(y)
    able = dict(interpolate=pipeline.prior, like=embeds, same_y=pipeline.prior or embeds)
    if mode and not able[mode]:
        raise UserError(f"{train.flag(mode)} needs embeddings that --method {pipeline.method} with --y {y} "
                        f"does not have: take --method 2sdm with --y clip or pca:D")


def main():
    args = Flags(**vars(train.new_parser(__doc__, Flags()).parse_args()))
    train.check_options(args)
    mode = choose_mode(args)
    same_dataset(args)
    device, [method] = twosdm.pick_device(args.device), args.method
    twosdm.join_processes(device)
    pipeline = Pipeline(args, method, device, own_images=args.like)
    check_mode(mode, pipeline)
    job = (interpolation if args.interpolate else samples)(pipeline, args)
    print(method, "from", *(run["file"] for run in pipeline.runs.values()), file=sys.stderr)
    folder = None
    if not rank():
        settings = json.dumps(pipeline.describe() | job.recorded, indent=1).encode()
        default = f"samples/{pipeline.dataset}-{method}{train.flag(mode)[1:]}".removesuffix("-")
        folder = open_folder(args.out, settings, default)
    folder = gather(folder)[0]
    busy = f"another process draws into {folder}: wait for it, or give another --out"
    with twosdm.locked(folder / f".lock{rank()}", busy):               # each process has its own
        twosdm.clear_unfinished(folder)
        fill(folder, pipeline, job, args.batch)
        if not rank():
            seed = f"-{args.seed:06d}" if args.seed else ""                   # never another seed's grid
            picture = folder / f"grid{seed}.png"
            save_picture(picture, grid(job, folder), least=512)
            if args.npz:
                write_npz(folder)
            print(picture)
    return 0


if __name__ == "__main__":
    twosdm.run(main)
