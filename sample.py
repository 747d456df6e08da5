"""Draws images with the trained models.

    python sample.py                          64 images by every method that is trained, side by side
    python sample.py --y kmeans:64            Class-cond: y is a cluster, drawn by its frequency
    python sample.py --image-steps 17         fewer steps (Table 5)
    python sample.py --snapshots              by every snapshot of the image model (Figs. 4 and 5)
    python sample.py --same-y 8               rows of images that share y (Fig. 2)
    python sample.py --interpolate 8          rows share y, columns the image noise (Figs. 8 to 10)
    python sample.py --like cat.png dog.png   variations: y is the embedding of a given image
    torchrun --nproc_per_node 8 -- sample.py --method 2sdm --n 50000

Images go to samples/<dataset>/<method>[-flag=value...]/ and are named by their seeds; settings.json says how
they were drawn. The same command again draws what is missing.
"""
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import twosdm
from twosdm import SampleNoise, Sampler, UserError, pick_numbers, rank

METHODS = {                                           # and the stage whose model draws the images
    "2sdm": "image",
    "oracle": "image",
    "baseline": "baseline",
    "joint": "joint"
}
TITLES = {
    "2sdm": "2SDM",
    "oracle": "2SDM with the oracle's y",
    "baseline": "EDM",
    "joint": "Overfit-2SDM"
}


# ============================================================================================================
# 1 A method with its networks: seeds -> y and a -> images
# ============================================================================================================
class Pipeline:
    """A method with its networks: `conditions` is stage 1, `render` stage 2; together they are Eq. 3.

    2sdm: y is drawn by the prior or, if it is a cluster of embeddings, by the clusters' frequency (Class-cond
    in the paper). oracle: y is the embedding of a training image. baseline: EDM, without y. joint: as 2sdm,
    but prior, image model and embedder were trained together (Overfit-2SDM).
    """

    def __init__(self, method, paths, args, device):
        self.method = method
        self.args = args
        self.device = device
        checkpoints = {stage: twosdm.load_checkpoint(path) for stage, path in paths.items()}
        self.checkpoint = checkpoints[METHODS[method]]                        # of the image model
        self.config = SimpleNamespace(**self.checkpoint["config"])            # of its training
        self.class_counts = []                        # how often each class is to come
        if self.config.a == "class":
            self.class_counts = self.checkpoint["class_counts"]
        self.y_dim = self.checkpoint["models"]["image"]["settings"]["cond_dim"] - len(self.class_counts)
        self.check(checkpoints)
        steps = args.steps or self.config.steps
        churn = self.config.churn if args.churn is None else args.churn
        if args.interpolate:
            churn = 0.0                               # whose noise would have to change, too
        self.sampler = Sampler(steps, churn)
        self.image_sampler = Sampler(args.image_steps or steps, churn, guidance=args.guidance)
        self.networks = {}
        for checkpoint in checkpoints.values():
            for part in checkpoint["models"]:         # prior, image or, of stage joint, both
                self.networks[part] = twosdm.load_denoiser(checkpoint, part, device)
                if args.compile:
                    self.networks[part].net.compile()
        if self.config.vae:
            self.autoencoder = twosdm.Autoencoder(self.config.vae).to(device)
        if method == "oracle":
            packed = self.checkpoint["embedder"]
            self.embedder = twosdm.unpack_embedder(packed, args.embedder_weights).to(device)
            self.images = self.open_images()

    def check(self, checkpoints):
        """Raises UserError for checkpoints that do not fit each other, and for flags that do not fit them."""
        args = self.args
        for other in checkpoints.values():
            if what_is_known(other) != what_is_known(self.checkpoint):
                raise UserError("prior and image model were trained on other images, embeddings or classes: "
                                "give two of the same settings, with their --y")
        if args.class_ is not None and args.class_ not in np.flatnonzero(self.class_counts):
            raise UserError(f"--class {args.class_}: the model has {len(self.class_counts)} classes, from 0, "
                            f"of which some may have no images; train.py --a class teaches them")
        if args.guidance != 1 and ("image" not in checkpoints or not self.config.y_dropout):
            raise UserError("--guidance needs an image model that sometimes was not told y: python train.py "
                            "--stage image --y-dropout 0.1")

    def open_images(self):
        """The images whose embeddings are the oracle's y: those of --like, or else the training images."""
        config = self.config
        if self.args.like:
            return twosdm.Images("given", twosdm.ImageFiles(".", config.resolution, self.args.like)[:])
        config.runs = self.args.runs
        config.data = self.args.data or config.data
        images = twosdm.load_images(config)
        name = self.checkpoint["identity"]["images"]
        if images.name != name:
            raise UserError(f"the model was trained on {name}, but these are {images.name}: give its --data")
        return images

    def choose_images(self, seeds):
        """(B,) seeds -> (B,) numbers of the oracle's images; with --like in their order."""
        if self.args.like:
            return np.array(seeds) - self.args.seed
        chances = np.ones(len(self.images))
        if self.args.class_ is not None:
            chances = self.images.labels == self.args.class_
        return pick_numbers(seeds, chances, twosdm.ORACLE)

    @torch.no_grad()
    def conditions(self, seeds, noise):
        """Stage 1: (B,) seeds, noise of B rows for the prior -> y (B, D), a (B, A), or None for either."""
        y = None
        a = None
        labels = None
        if self.method == "oracle":
            rows = self.choose_images(seeds)
            y = self.embedder(self.images.batch(rows, self.device))
            if self.images.classes:
                labels = self.images.labels[rows]
        if self.class_counts:
            if self.args.class_ is not None:
                labels = [self.args.class_] * len(seeds)
            elif labels is None:
                labels = pick_numbers(seeds, self.class_counts, twosdm.CLASS)
            a = torch.eye(len(self.class_counts), device=self.device)[labels]                 # one-hot
        if "prior" in self.networks:
            y = twosdm.sample_embeddings(self.networks["prior"], noise, a, self.sampler)          # p(y | a)
        elif self.method == "2sdm":                            # Class-cond
            counts = self.checkpoint["embedder"]["reduction"]["counts"].numpy()
            y = torch.eye(self.y_dim, device=self.device)[pick_numbers(seeds, counts, twosdm.CLUSTER)]
        return y, a

    @torch.no_grad()
    def render(self, noise, y, a):
        """Stage 2: noise of B rows, and y and a as `conditions` gives them -> (B, R, R, 3) uint8."""
        # The prior, which predicts y itself, computes in float32.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            x = twosdm.sample_images(self.networks["image"], noise, y, a, self.image_sampler)  # p(x | y, a)
        if self.config.vae:
            x = self.autoencoder.decode(x)
        if not x.isfinite().all():
            raise UserError("the samples are not finite: give --precision fp32, or an earlier snapshot by "
                            "--checkpoint")
        return twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def settings(self):
        """What determines the image of a seed, and what tables and figures say of it, for settings.json."""
        args = self.args
        return {
            "method": self.method,
            "dataset": args.dataset,
            "class": args.class_,
            "like": args.like,
            "y_dim": self.y_dim,
            "steps": self.sampler.steps,
            "image_steps": self.image_sampler.steps,
            "churn": self.sampler.s_churn,
            "guidance": args.guidance,
            "precision": args.precision,
            "compile": args.compile,
            "weights": {part: twosdm.fingerprint(network) for part, network in self.networks.items()},
            "images_seen": self.checkpoint["seen"],
            "images": self.checkpoint["identity"]["images"],
            "config": self.checkpoint["config"]
        }


def what_is_known(checkpoint):
    """What must be the same for prior and image model: the images, whether they are told the class, and y."""
    identity = checkpoint["identity"]
    embedder = checkpoint["embedder"] or {}
    return identity["images"], checkpoint["config"]["a"], identity["y"], embedder.get("fingerprint")


# ============================================================================================================
# 2 What to draw: a table of images, whose rows share y and a
# ============================================================================================================
def lay_out(args):
    """-> (numbers of the rows, number of columns) of the table.

    A row for each seed: an image or, with --same-y K, K images of one y (Fig. 2). With --like, a row for each
    given image, of images whose y is its embedding. --interpolate N: N rows and N columns.
    """
    if args.interpolate:
        return range(args.interpolate), args.interpolate
    columns = args.same_y or 1
    count = math.ceil(args.n / columns)
    if args.like:
        columns = args.same_y or 8
        count = len(args.like)
    return range(args.seed, args.seed + count), columns


def draw(pipeline, rows, column):
    """(B,) rows of the table, one of its columns -> (B, R, R, 3) uint8.

    The first column is what the seeds give alone. --interpolate, Appendix C: y changes from row to row, the
    image noise from column to column. The corners belong to two seeds: two of them are the images that these
    give alone.
    """
    device = pipeline.device
    if pipeline.args.interpolate:
        seed = pipeline.args.seed
        way = torch.linspace(0, 1, pipeline.args.interpolate, device=device)
        between = NoiseBetween(seed, twosdm.PRIOR, way[rows])
        y, a = pipeline.conditions([seed] * len(rows), between)               # a: the seed's
        noise = NoiseBetween(seed, twosdm.IMAGE, way[column].expand(len(rows)))
    else:
        y, a = pipeline.conditions(rows, SampleNoise(rows, device, twosdm.PRIOR))
        stream = twosdm.IMAGE
        if column > 0:
            stream = twosdm.FURTHER + column - 1
        noise = SampleNoise(rows, device, stream)
    return pipeline.render(noise, y, a)


class NoiseBetween:
    """Noise on the great circle between that of a seed and of the next (slerp): row i at way[i] in [0, 1].

    Gaussian noise of many dimensions lies on a sphere. Halfway along a straight line it would be shorter by
    30 %, which no denoiser has ever seen.
    """
    randn_like = None                                 # without churn, no other noise is drawn

    def __init__(self, seed, stream, way):
        self.ends = SampleNoise([seed, seed + 1], way.device, stream)
        self.way = way

    def __len__(self):
        return len(self.way)

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32."""
        start, end = self.ends.randn(2, *shape[1:])
        angle = torch.cosine_similarity(start.flatten(), end.flatten(), dim=0).acos()
        way = twosdm.per_example(self.way, start[None])                       # (B, 1, ..., 1)
        between = ((1 - way) * angle).sin() * start + (way * angle).sin() * end
        return between / angle.sin()


# ============================================================================================================
# 3 Folders of images
# ============================================================================================================
def keep_settings(folder, settings):
    """Writes a folder's settings.json. Raises UserError if there is one of other settings."""
    path = folder / "settings.json"
    if path.exists():
        known = json.loads(path.read_text())
        for name, value in json.loads(json.dumps(settings)).items():          # lists in place of tuples
            if name not in ("n", "timing") and known.get(name) != value:
                raise UserError(f"{folder} holds images of other settings or of an earlier training (another "
                                f"{name}): move it away, or give another --samples folder")
        settings = known | settings | dict(n=max(known["n"], settings["n"]))
    with twosdm.written(path) as file:
        file.write(json.dumps(settings, indent=1).encode())


def name_files(folder, rows, columns):
    """-> {(row, column): file} of a table of images, row by row."""
    files = {}
    for row in rows:
        for column in range(columns):
            place = f"-{column:02d}" if columns > 1 else ""
            files[row, column] = folder / f"{row:06d}{place}.png"
    return files


def draw_missing(pipeline, files, rows, columns):
    """Draws the images whose files are missing -> seconds and number of images of each batch.

    Of several processes, each draws a part of the batches.
    """
    device = pipeline.device
    size = pipeline.args.batch
    batches = []                                      # (rows, their column)
    for column in range(columns):
        missing = [row for row in rows if not files[row, column].exists()]
        for start in range(0, len(missing), size):
            batches.append((missing[start:start + size], column))
    twosdm.wait_for_all()                             # nobody draws before all have looked
    batches = batches[rank()::twosdm.processes()]

    at_once = 1
    if pipeline.config.threads and device.type == "cpu":
        # Small networks do not keep several threads busy. Several batches do.
        torch.set_num_threads(1)
        at_once = os.cpu_count()
    times = []

    def draw_batch(batch):
        if device.type == "cuda":
            torch.cuda.set_device(device)             # which is each thread's own
        start = time.perf_counter()
        pixels = draw(pipeline, *batch)               # in the CPU's memory: the GPU has finished
        times.append([time.perf_counter() - start, len(pixels)])
        return pixels

    bar = twosdm.progress(batches, pipeline.method, " batches")
    # This thread writes the pictures of a batch while the others draw the next ones.
    with ThreadPoolExecutor(at_once) as threads:
        for (batch_rows, column), pixels in zip(bar, threads.map(draw_batch, batches)):
            for row, picture in zip(batch_rows, pixels):
                twosdm.save_picture(files[row, column], picture)
    twosdm.wait_for_all()
    return times


def timing(times, batch, device):
    """What Table 5 shows. The first batch is left out, as it warms up the device."""
    seconds, images = np.sum(times[1:], axis=0)
    if device.type == "cuda":
        device = torch.cuda.get_device_name(device)
    return dict(ms_per_image=1000 * seconds / images, batch=batch, device=str(device))


def draw_method(method, paths, args, device):
    """Draws what a method's folder lacks, and its grid. paths: {stage: checkpoint}.

    -> the images of the grid, (N, R, R, 3) uint8; None in all processes but the first.
    """
    pipeline = Pipeline(method, paths, args, device)
    name = folder_name(method, args)
    snapshot = paths[METHODS[method]].stem.replace("checkpoint", "")          # "" of the last checkpoint
    if snapshot:
        name += "-" + snapshot
    folder = Path(args.samples, args.dataset, name)
    rows, columns = lay_out(args)
    files = name_files(folder, rows, columns)
    settings = dict(pipeline.settings(), name=name, snapshot=snapshot, columns=columns, n=len(files))
    if rank() == 0:
        keep_settings(folder, settings)
    times = draw_missing(pipeline, files, rows, columns)
    if rank() > 0:
        return None
    if len(times) > 1:                                # a few images that were missing replace no earlier time
        settings["timing"] = timing(times, args.batch, device)
        keep_settings(folder, settings)
    drawn = twosdm.ImageFiles(folder, pipeline.config.resolution, [file.name for file in files.values()])
    if args.npz:
        with twosdm.written(folder / "samples.npz") as file:
            np.savez(file, arr_0=drawn[:])
    width = columns if columns > 1 or args.like else 8
    shown = drawn[:8 * width]
    if args.like:                                     # each before its variations
        given = pipeline.images.pixels[:8]
        shown = np.insert(shown, np.arange(0, len(shown), width), given, axis=0)
        width += 1
    twosdm.save_picture(folder / "grid.png", twosdm.picture({name: shown}, width))
    print(folder / "grid.png")
    return shown


# ============================================================================================================
# 4 The command line
# ============================================================================================================
@dataclass
class Flags:
    """The flags; - stands for _, as in --same-y 8, and the one for class_ is --class."""
    # Whose models
    dataset: str = "shapes"
    method: list = ()               # of 2sdm, oracle, baseline, joint; default: all that are trained
    y: str = "all"                  # as in training: all, pca:D or kmeans:K
    tag: str = ""                   # take the runs with this tag where there are any
    snapshots: bool = False         # draw with each snapshot of the image model
    checkpoint: list = ()           # files, in place of the runs' own
    runs: str = "runs"              # folder of all runs
    # What to draw
    n: int = 64                     # number of images
    class_: int = None              # this class alone; default: as in the training set
    seed: int = 0                   # of the first image; the others follow
    same_y: int = None              # images of each y; default: 1
    interpolate: int = None         # a grid of N x N images between two seeds, without churn
    like: list = ()                 # image files; draw --same-y variations of each, by default 8
    # How, and where to
    steps: int = None               # of prior and image model; default: the run's
    image_steps: int = None         # of the image model alone; default: as --steps
    churn: float = None             # S_churn; 0 = deterministic; default: the run's
    guidance: float = 1.0           # on y, for runs with --y-dropout; 1 = none
    batch: int = 64                 # images drawn at a time
    device: str = "auto"            # cuda, cuda:1, cpu; auto: cuda, else cpu
    precision: str = "auto"         # fp32, tf32, bf16; auto: tf32 on cuda, else fp32
    compile: bool = False           # torch.compile the networks: pays for thousands of images
    samples: str = "samples"        # folder of all samples
    npz: bool = False               # also write samples.npz: all images as one array, arr_0
    data: str = ""                  # where the training images are now, for the oracle
    embedder_weights: str = None    # where CLIP's weights are now, for the oracle


CHOICES = {
    "method": METHODS,
    "precision": ["auto", "fp32", "tf32", "bf16"]
}


def choose_methods(args):
    """-> the methods that the flags name or need, or else all that are trained. UserError if none is."""
    if args.like:
        return ["oracle"]
    if args.method:
        return args.method
    if args.y != "all" or args.checkpoint or args.guidance != 1 or args.same_y or args.interpolate:
        return ["2sdm"]
    methods = []
    for method in METHODS:
        if all(path.exists() for path in find_checkpoints(method, args).values()):
            methods.append(method)
    if not methods:
        trained = ", ".join(str(path.parent) for path in Path(args.runs).glob("*/*/checkpoint.pt"))
        raise UserError(f"nothing of --dataset {args.dataset} with this --tag is trained in {args.runs}: run "
                        f"python train.py first; trained is {trained or 'nothing at all'}")
    return methods


def find_checkpoints(method, args):
    """-> {stage: file} of a method's networks, whether they are there or not. UserError for --checkpoint."""
    stages = [METHODS[method]]
    if method == "2sdm" and twosdm.has_prior(args.y):
        stages.append("prior")
    paths = {}
    for stage in stages:
        paths[stage] = twosdm.run_folder(args.runs, args.dataset, stage, args.y, args.tag) / "checkpoint.pt"
    # A tagged prior goes with the plain image model, and the other way around.
    if any(path.exists() for path in paths.values()):
        for stage, path in paths.items():
            if not path.exists():
                paths[stage] = twosdm.run_folder(args.runs, args.dataset, stage, args.y) / "checkpoint.pt"
    for file in args.checkpoint:
        stage = twosdm.load_checkpoint(file)["stage"]
        if stage not in stages:
            raise UserError(f"{file} is of stage {stage}, not for --method {method}: leave one of them out")
        paths[stage] = Path(file)
    return paths


def folder_name(method, args):
    """-> the method and all flags that change its images."""
    name = method
    if args.y != "all" and METHODS[method] == "image":
        name += "-y=" + args.y.replace(":", "")
    for flag in ("tag", "class_", "seed", "steps", "image_steps", "churn", "guidance", "same_y",
                 "interpolate"):
        value = getattr(args, flag)
        if value != getattr(Flags, flag):
            name += f"-{flag.strip('_')}={value}"
    for file in args.checkpoint:
        name += "-" + Path(file).parent.name
    if args.like:
        name += "-like"
    return name


def main():
    args = Flags(**twosdm.parse_flags(Flags, __doc__, CHOICES))
    if min(args.n, args.batch) < 1 or 1 in (args.steps, args.image_steps):
        raise UserError("--n and --batch are numbers from 1, --steps and --image-steps from 2")
    device = twosdm.pick_device(args.device)
    twosdm.start_processes(device)
    args.precision = twosdm.set_precision(args.precision, device, auto="tf32")
    pictures = {}
    for method in choose_methods(args):
        paths = find_checkpoints(method, args)
        stage = METHODS[method]
        files = [paths[stage]]
        if args.snapshots:
            files = sorted(paths[stage].parent.glob("snapshot-*.pt"))
            if not files:
                raise UserError(f"{paths[stage].parent} has no snapshots: train with --snapshot-every 100k")
        for file in files:
            pictures[TITLES[method]] = draw_method(method, paths | {stage: file}, args, device)
    if rank() == 0 and len(pictures) > 1 and not args.snapshots:
        path = Path(args.samples, args.dataset, "grid.png")
        twosdm.save_picture(path, twosdm.picture(pictures, columns=8))
        print(path)


if __name__ == "__main__":
    twosdm.run(main)
