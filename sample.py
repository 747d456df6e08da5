"""Samples from trained models: prior -> embedding -> image (2SDM), or one of the methods it is compared with.

    python sample.py                                 64 images of the newest runs, as PNGs and one grid
    python sample.py --method baseline --n 1000      the EDM model without embeddings
    python sample.py --method baseline --checkpoint edm-ffhq-64x64-uncond-vp.pkl      EDM's own
    python sample.py --n 50000 --npz --out big       also `arr_0` (N, H, W, 3) uint8 for OpenAI's evaluator
    python sample.py --interpolate                   rows share y, columns the image noise (Figs. 8 to 10)
    python sample.py --same-y 8                      eight images of each embedding (Fig. 2)
    python sample.py --like cat.png dog.jpg          variations of given images: y = e_i(image)

Image i depends on seed + i alone, not on the batch or the number of processes (torchrun sample.py ...).
The same command again continues where it stopped.
"""
import argparse
import hashlib
import json
import re
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

import twosdm
from twosdm import UserError

METHODS = {"2sdm": ("prior", "image"), "oracle": ("image",), "baseline": ("baseline",),   # the runs they need
           "joint": ("joint",)}


def stages(method, y):
    """The runs that a method needs. Clusters are drawn by their frequency, without a prior: Class-cond."""
    return ("image",) if method == "2sdm" and not twosdm.has_prior(y) else METHODS[method]


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
        given, y = load_given(args.checkpoint), args.y
        if "image" in given:
            y = given["image"][1]["config"].get("y", "clip")
        files = self.files = {
            stage: given[stage][0] if stage in given else find_run(args, stage, y)
            for stage in stages(method, y)}
        if method == "2sdm" and "prior" in given and "prior" not in files:
            raise UserError(f"{files['image']} draws its y ({y}) without a prior: leave "
                            f"{given['prior'][0]} away")
        self.checkpoints = {
            stage: given[stage][1] if stage in given else twosdm.load_checkpoint(path, stage=stage)
            for stage, path in files.items()}
        if method == "joint":
            self.checkpoints = split_joint(self.checkpoints["joint"])
        self.models = {stage: twosdm.load_denoiser(c, device) for stage, c in self.checkpoints.items()}
        for checkpoint in self.checkpoints.values():  # gigabytes, and no longer of use
            for weights in ("net", "optimizer", "ema"):
                checkpoint.pop(weights, None)
        for model in self.models.values():
            twosdm.compile_network(model.net, args.compile, device)
        self.prior, self.main = self.checkpoints.get("prior"), list(self.checkpoints.values())[-1]
        self.image = list(self.models.values())[-1]                     # the network that draws the pixels
        if args.temperature != 1 and not (self.prior and "y_mean" in self.prior):
            raise UserError("--temperature is for --method 2sdm, with a prior trained by this version")
        if self.prior and self.prior["fingerprints"] != self.main["fingerprints"]:
            raise UserError(f"{files['prior']} and {files['image']} were trained on different images or "
                            f"embeddings: train both with the same settings")
        saved, self.data = self.main["config"], self.main["data"]
        self.text = self.prior is not None and self.prior["config"]["a"] == "text"
        if self.text != (args.prompt is not None):
            raise UserError("--prompt needs a prior that knows captions, and such a prior needs a --prompt: "
                            "python train.py --stage prior --a text")
        if self.text and saved["a"] != "none":
            raise UserError(f"{files['image']} was trained with classes, of which captions know nothing: "
                            f"train it with --a none")
        if not self.text and any(c["config"]["a"] != saved["a"] for c in self.checkpoints.values()):
            raise UserError(f"one of {' and '.join(map(str, files.values()))} was trained with classes and "
                            f"the other without: train both with the same --a")
        churn = saved["churn"] if args.churn is None else args.churn
        steps, s_noise = args.steps or saved["steps"], args.s_noise
        self.sampler = twosdm.Sampler(steps, churn, s_noise=s_noise)
        self.image_sampler = twosdm.Sampler(args.image_steps or steps, churn, s_noise=s_noise,
                                            guidance=args.guidance)
        if args.guidance != 1 and not (self.main["stage"] == "image" and saved.get("y_dropout")):
            raise UserError("--guidance needs an image model that sometimes was not told y: train.py --stage "
                            "image --y-dropout 0.1 --tag guided, then --checkpoint FOLDER/checkpoint.pt")
        self.classes = len(self.data["classes"]) if saved["a"] == "class" else 0
        if args.label is not None and not 0 <= args.label < self.classes:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(self.data["classes"][:20]))
            raise UserError(f"--class {args.label}: " + (
                f"the classes are {names}" + ", ..." * (self.classes > 20) if self.classes
                else "this model was trained without classes (train.py --a class)"))
        if args.label is not None and not self.data["class_counts"][args.label]:
            raise UserError(f"--class {args.label}: no training image has this class")
        vae, self.images = args.vae or saved.get("vae"), None
        self.autoencoder = twosdm.Autoencoder(vae).to(device) if vae else None
        packed = self.main["embedder"]
        self.clusters = packed["reduction"]["counts"].double() if packed and "counts" in packed.get(
            "reduction", ()) else None
        self.embedder = None
        if packed and (method == "oracle" or self.text):
            self.embedder = twosdm.unpack_embedder(packed, saved["resolution"],
                                                   args.clip_weights or saved["clip_weights"]).to(device)
        if self.text:                                 # a wrong word is said before anything is drawn
            getattr(self.embedder, "inner", self.embedder).text_condition([args.prompt])
        if method == "oracle" and not own_images:
            config = twosdm.TrainConfig(**saved)
            config.runs, config.data = args.runs, args.data or config.data
            self.images = twosdm.load_images(config, self.autoencoder)
            if self.images.fingerprint != self.data["fingerprint"]:
                raise UserError("the training images are not those of this run: give its own with --data")
        self.shape = (saved["resolution"], saved["resolution"], 3)

    def describe(self):
        """What the images depend on, for the record."""
        saved, packed = self.main["config"], self.main["embedder"]
        tags = {stage: c["config"].get("tag", "") for stage, c in self.checkpoints.items()}
        alike = len(set(tags.values())) == 1
        tags = {tag if alike else f"{stage} {tag}" for stage, tag in tags.items() if tag}
        return dict(sampler="Algorithm 2, streams by name", device=self.device.type, method=self.method,
                    dataset=self.main["dataset"], steps=self.sampler.steps,
                    image_steps=self.image_sampler.steps, churn=self.sampler.s_churn,
                    s_noise=self.sampler.s_noise, label=self.args.label, arithmetic=self.precision,
                    y=saved.get("y", "clip"), y_dim=packed["dim"] if packed else 0, prompt=self.args.prompt,
                    guidance=self.args.guidance, temperature=self.args.temperature,
                    train_seed=saved.get("seed"), tags=sorted(tags),
                    vae=twosdm.fingerprint(self.autoencoder) if self.autoencoder else None,
                    fingerprints=self.main["fingerprints"],
                    images_seen={s: c["seen"] for s, c in self.checkpoints.items()},
                    networks={s: twosdm.fingerprint(m) for s, m in self.models.items()})

    def items(self, seeds):
        """Per seed a random training item, of the class asked for: rows (B,) for the oracle's y and a."""
        rows = []
        pool = np.arange(len(self.images)) if self.args.label is None else \
            np.flatnonzero(self.images.labels == self.args.label)
        for seed in seeds:
            generator = torch.Generator().manual_seed(twosdm.mix_seed("label", seed))
            rows.append(pool[int(torch.randint(len(pool), (), generator=generator))])
        return np.array(rows)

    def labels(self, seeds):
        """Per seed a class, as asked for or by its frequency in the training set: one-hot (B, A)."""
        if self.args.label is not None:
            drawn = torch.full((len(seeds),), self.args.label)
        else:
            drawn = self.drawn("label", seeds, torch.tensor(self.data["class_counts"], dtype=torch.float64))
        return F.one_hot(drawn, self.classes).float().to(self.device)

    @torch.no_grad()
    def embed(self, images, rows):
        """y = e_i(x) of a data set's rows (B,) -> (B, D)."""
        return self.embedder(images.batch(rows, self.device))

    @torch.no_grad()
    def conditions(self, seeds, way=None):
        """Stage 1: (B,) seeds -> y (B, D) and a (B, A), either of them None if the method has none.

        With `way` (B,) the prior goes from the noise of the first of two seeds to that of the second; a is
        the first's throughout.
        """
        items = seeds if way is None else [seeds[0]] * len(way)
        a, y = self.labels(items) if self.classes else None, None
        if self.text:
            clip = getattr(self.embedder, "inner", self.embedder)                     # beneath a PCA
            a = clip.text_condition([self.args.prompt]).expand(len(items), -1)
        if self.method == "oracle":
            rows = self.items(seeds)
            if self.classes:
                labels = torch.from_numpy(self.images.labels[rows])
                a = F.one_hot(labels, self.classes).float().to(self.device)
            if self.embedder is not None:
                y = self.embed(self.images, rows)
        elif self.prior is not None:
            with self.autocast():
                y = twosdm.sample_embeddings(self.models["prior"], seeds, a, self.sampler, way)
            if self.args.temperature != 1:
                mean = self.prior["y_mean"].to(self.device)
                y = mean + self.args.temperature * (y - mean)
        elif self.clusters is not None:
            y = F.one_hot(self.drawn("cluster", seeds, self.clusters), len(self.clusters)).float()
        return None if y is None else y.to(self.device), None if self.text else a

    @torch.no_grad()
    def draw(self, seeds, y, a, way=None):
        """Stage 2: (B,) seeds, or two and `way` (B,), and what `conditions` gives -> (B, H, W, 3) uint8."""
        with self.autocast():
            x = twosdm.sample_images(self.image, seeds, y, a, self.image_sampler, way)
        x = x if self.autoencoder is None else self.autoencoder.decode(x)
        return twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def __call__(self, seeds):
        """(B,) whole numbers -> (B, H, W, 3) uint8."""
        began = self.clock()
        conditions = self.conditions(seeds)
        between = self.clock()
        pixels = self.draw(seeds, *conditions)
        self.batches.append((between - began, self.clock() - between, len(pixels)))
        return pixels

    def clock(self):
        """Seconds, when the device has done all it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

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

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @staticmethod
    def drawn(name, seeds, shares):
        """Per seed a number i with probability ~ shares[i]: (B,)."""
        return torch.cat([torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(
            twosdm.mix_seed(name, seed))) for seed in seeds])


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def load_given(paths, methods=()):
    """{stage: (path, checkpoint)} of checkpoints given by name; EDM's .pkl files are baselines."""
    given = {}
    for path in paths or ():
        edm = str(path).endswith(".pkl")
        checkpoint = twosdm.edm_checkpoint(path) if edm else twosdm.load_checkpoint(path)
        if checkpoint["stage"] in given:
            raise UserError(f"--checkpoint: {given[checkpoint['stage']][0]} and {path} are both of the stage "
                            f"{checkpoint['stage']}: give one of each")
        if not any(checkpoint["stage"] in METHODS[method] for method in methods or METHODS):
            raise UserError(f"--checkpoint: {path} is of the stage {checkpoint['stage']}, for which --method "
                            f"{' '.join(methods)} has no use")
        given[checkpoint["stage"]] = path, checkpoint
    return given


def split_joint(checkpoint):
    """The joint stage's checkpoint -> {stage: what the checkpoints of prior and image model would be}."""
    weights = checkpoint["ema"]

    def part(name):
        return {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}

    return {stage: dict(checkpoint, model=checkpoint["model"][stage], ema=part(stage), embedder=None)
            for stage in ("prior", "image")}


def find_run(args, stage, y=None):
    """The newest checkpoint of a stage (for this y) below args.runs, of args.dataset if it is given."""
    text, y = args.prompt is not None and stage == "prior", y or args.y
    twosdm.check_y(y)
    name = twosdm.run_name(stage, y, "text" if text else "none")
    found = list(Path(args.runs).glob(f"{args.dataset or '*'}/{name}/checkpoint.pt"))
    if not found:
        where = f"--dataset {args.dataset}" if args.dataset else "any data set"
        told = stage in ("prior", "image") and y != "clip"
        flags = stage + f" --y {y}" * told + " --a text" * text
        raise UserError(f"{args.runs} has no trained '{name}' of {where}: run python train.py first (for "
                        f"this alone: --stage {flags}), or say where the runs are with --runs")
    return max(found, key=lambda path: path.stat().st_mtime)


def add_sampling_flags(parser):
    """The flags of everything that samples; evaluate.py has them too."""
    def at_least(low, kind):
        def number(text):
            value = kind(text)
            if not low <= value <= 2**31:
                raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low}, at most 2^31")
            return value
        return number

    add = parser.add_argument
    add("--seed", type=at_least(0, int), default=0,
        help="image i is drawn from seed + i (default: %(default)s)")
    add("--steps", type=at_least(2, int),
        help="sampling steps of prior and image model (default: the run's preset)")
    add("--image-steps", type=at_least(2, int), help="steps of the image model alone (default: as --steps)")
    add("--churn", type=at_least(0, float), help="S_churn; 0 = deterministic (default: the run's preset)")
    add("--y", default="clip", help="which variant of prior and image model: clip, pca:D, kmeans:K, none "
        "(default: %(default)s)")
    add("--guidance", type=at_least(0, float), default=1.0, help="classifier-free guidance on y; "
        "1 = none, otherwise the model must have been trained with --y-dropout (default: %(default)s)")
    add("--temperature", type=at_least(0, float), default=1.0, help="scales the prior's embeddings about "
        "their mean in the training set (default: %(default)s)")
    add("--prompt", metavar="TEXT", help='a caption, such as "three red stars on a blue background", for '
        "priors trained with --a text")
    add("--s-noise", type=at_least(0, float), default=1.007,
        help="S_noise of the churn (default: %(default)s)")
    add("--class", type=int, dest="label", metavar="CLASS",
        help="draw this class alone (default: as in the data)")
    add("--batch", type=at_least(1, int), default=64, help="images drawn at a time (default: %(default)s)")
    add("--runs", default="runs", help="folder of all runs (default: %(default)s)")
    add("--dataset", help="whose runs to take (default: those trained last)")
    add("--checkpoint", nargs="+", metavar="FILE", help="checkpoints of prior, image model or baseline, in "
        "place of the newest; EDM's published .pkl files serve as baseline")
    add("--data", help="the training images, for the oracle (default: where they were)")
    add("--clip-weights", help="CLIP's weights, for the oracle (default: where they were)")
    add("--vae", help="Stable Diffusion's VAE, for latent models (default: where it was)")
    add("--device", default="auto", help="auto = cuda, else mps, else cpu (default: %(default)s)")
    add("--precision", choices=("auto", *twosdm.PRECISIONS), default="auto",
        help="of the networks; auto = tf32 on cuda, else fp32 (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the networks, which pays for thousands of images on cuda (default: no)")
    return at_least


def same_dataset(args):
    """Without --dataset: the one whose image model or baseline was trained last, for all stages alike."""
    if not args.dataset and not args.checkpoint:
        names = (twosdm.run_name("image", args.y), "baseline", "joint")
        found = [path for name in names for path in Path(args.runs).glob(f"*/{name}/checkpoint.pt")]
        if found:
            args.dataset = max(found, key=lambda path: path.stat().st_mtime).parts[-3]


def open_folder(out, settings, default):
    """A folder for samples of these settings: new, or one that holds the same. Never another's."""
    candidates = [Path(out)] if out else [
        Path(default + (f"-{i}" if i > 1 else "")) for i in range(1, 10_000)]
    for folder in candidates:
        record = folder / "settings.json"
        with twosdm.user_errors(f"{folder} cannot be written"):
            if record.is_file() and record.read_text() == settings:
                return folder
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                folder.mkdir(parents=True, exist_ok=True)
                record.write_text(settings)
                return folder
    raise UserError(f"{out} holds something else already: give another --out")


def write_npz(folder, shape):
    """samples.npz: a folder's images as `arr_0` (N, H, W, 3) uint8 in the order of their `seeds` (N,); -> N.

    Streamed: memory does not grow with N.
    """
    seeds = sorted(int(path.stem) for path in folder.glob("*.png") if re.fullmatch(r"\d{6,}", path.stem))
    with twosdm.written(folder / "samples.npz") as fresh, zipfile.ZipFile(fresh, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, dict(descr="|u1", fortran_order=False, shape=(len(seeds), *shape)))
            for seed in seeds:
                file.write(np.asarray(Image.open(folder / f"{seed:06d}.png")).tobytes())
        with archive.open("seeds.npy", "w") as file:
            np.lib.format.write_array(file, np.array(seeds, np.int64))
    return len(seeds)


class Job(NamedTuple):
    """Which images to draw, how, and how the grid shows them."""
    names: dict                     # key of each image, such as its seed -> file name
    draw: Callable                  # keys (B,) -> (B, H, W, 3) uint8
    columns: int
    rows: int                       # of the grid, at most
    recorded: dict = {}             # what the images depend on beside Pipeline.describe()
    given: "np.ndarray | None" = None        # images (rows, H, W, 3) that come first in their rows


def independent(pipeline, args):
    """--n images, each with y and noise of its own."""
    n = args.n or 64
    names = {seed: f"{seed:06d}.png" for seed in range(args.seed, args.seed + n)}
    return Job(names, pipeline, columns=min(8, n), rows=8)


def interpolation(pipeline, args):
    """--interpolate N, Appendix C: y changes from row to row, the image noise from column to column."""
    N, ends = args.interpolate, [args.seed, args.seed + 1]
    way = torch.linspace(0, 1, N, dtype=torch.float64)
    y, a = pipeline.conditions(ends, way if args.slerp == "noise" else way[[0, -1]])
    y = y if args.slerp == "noise" else twosdm.slerp(*y, way)
    a = None if a is None else a[:1]

    def draw(cells):
        rows, columns = map(list, zip(*cells))
        return pipeline.draw(ends, y[rows], None if a is None else a.expand(len(cells), -1), way[columns])

    names = {(row, column): f"row{row:02d}-column{column:02d}.png" for row in range(N) for column in range(N)}
    return Job(names, draw, N, N, dict(interpolate=N, slerp=args.slerp, seed=args.seed))


def variations(pipeline, args):
    """--same-y K: K images of each y, that of a seed or, with --like, the embedding of a given image."""
    K, given, recorded = args.same_y or 8, None, dict(same_y=True)
    count = len(args.like) if args.like else -(-(args.n or 8 * K) // K)
    seeds, batches = range(args.seed, args.seed + count), []
    if args.like:
        given = read_images(args.like, pipeline.shape[0])
        recorded = dict(like=[hashlib.sha256(image.tobytes()).hexdigest()[:12] for image in given],
                        seed=args.seed)
    for part in (np.arange(count)[i:i + args.batch] for i in range(0, count, args.batch)):
        items = [seeds[i] for i in part]
        batches.append(pipeline.conditions(items) if given is None else (
            pipeline.embed(twosdm.Images(given), part), pipeline.labels(items) if pipeline.classes else None))
    y, a = (None if parts[0] is None else torch.cat(parts) for parts in zip(*batches))

    def draw(cells):
        rows = [row for row, _ in cells]
        # The first image of a row is what its seed alone would give; the others do not depend on K.
        noise = [seeds[row] if k == 0 else twosdm.mix_seed("variation", seeds[row], k) for row, k in cells]
        return pipeline.draw(noise, y[rows], None if a is None else a[rows])

    names = {(row, k): f"{seed:06d}-{k:02d}.png" for row, seed in enumerate(seeds) for k in range(K)}
    return Job(names, draw, K, 64, recorded, given)


def read_images(paths, resolution):
    """Image files, treated as training images are -> (N, R, R, 3) uint8. Raises UserError."""
    entries = [twosdm.Entry(str(path), size=0, stamp=0) for path in paths]
    pixels, bad, _ = twosdm.read_chunk("", entries, resolution)
    for _, name, reason in bad:
        raise UserError(f"--like {name}: {reason}: give image files")
    return pixels


def grid(job, folder):
    """The first rows of a job's images as one picture."""
    names = list(job.names.values())[:job.rows * job.columns]
    shown = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    if job.given is None:
        return twosdm.image_grid(shown, job.columns)
    rows = shown.reshape(-1, job.columns, *shown.shape[1:])
    rows = np.concatenate([job.given[:len(rows), None], rows], axis=1)
    return twosdm.image_grid(rows.reshape(-1, *shown.shape[1:]), job.columns + 1)


def choose_mode(args):
    """None (independent images) or the flag that says otherwise. Raises UserError for flags at odds."""
    def given(flag):
        return getattr(args, flag.replace("-", "_"))

    at_odds = {"interpolate": ("like", "same-y", "n", "npz", "churn"), "like": ("n", "npz"),
               "same-y": ("npz",)}
    mode = next((flag for flag in at_odds if given(flag)), None)
    for other in at_odds.get(mode, ()):
        if given(other):
            raise UserError(f"--{mode} and --{other} do not go together: leave one of them away")
    if args.slerp == "y" and mode != "interpolate":
        raise UserError("--slerp y is for --interpolate: add it, or leave --slerp away")
    if mode == "like" and args.method not in ("2sdm", "oracle"):
        raise UserError(f"--like draws with the image model of 2SDM: leave --method {args.method} away")
    return mode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    at_least = add_sampling_flags(parser)
    add = parser.add_argument
    add("--method", choices=list(METHODS), default="2sdm", help="(default: %(default)s)")
    add("--n", type=at_least(1, int),
        help="number of images, with --same-y rounded up to whole rows (default: 64, with --same-y 8 rows)")
    add("--interpolate", nargs="?", type=at_least(2, int), const=8, metavar="N",
        help="an N×N grid between two embeddings and two noises, those of the seed and the next; without "
             "churn (default: no; without N: 8)")
    add("--slerp", choices=("noise", "y"), default="noise",
        help="what --interpolate turns from one embedding into the other: the prior's noise, or y itself "
             "(default: %(default)s)")
    add("--same-y", type=at_least(1, int), metavar="K",
        help="K images of each embedding, each with noise of its own (default: 1, with --like 8)")
    add("--like", nargs="+", metavar="IMAGE",
        help="variations of image files: y is their embedding; the grid shows them in its first column")
    add("--out", help="folder for the images (default: samples/<dataset>-<method>, with -interpolate, "
        "-same-y or -like where it applies, numbered)")
    add("--npz", action="store_true",
        help="also write samples.npz: all images in the folder as one array, by their seeds")
    args = parser.parse_args()
    mode = choose_mode(args)
    if mode == "interpolate":
        args.churn = 0.0
    if mode == "like":
        args.method = "oracle"
    same_dataset(args)
    device = twosdm.pick_device(args.device)
    twosdm.join_processes(device)
    load_given(args.checkpoint, [args.method])
    pipeline = Pipeline(args, args.method, device, own_images=mode == "like")
    if mode == "interpolate" and pipeline.prior is None:
        raise UserError("--interpolate needs a prior of embeddings: --method 2sdm with --y clip or pca:D")
    if mode and (pipeline.clusters is not None or not (pipeline.prior or pipeline.embedder)):
        raise UserError(f"--{mode} needs embeddings y, which the baseline, K-means and --y none do not have: "
                        f"--method 2sdm with --y clip or pca:D")
    job = (interpolation if mode == "interpolate" else variations if mode else independent)(pipeline, args)
    settings = json.dumps(pipeline.describe() | job.recorded, indent=1)
    sources = ", ".join(map(str, pipeline.files.values()))
    print(f"{args.method} from {sources}, {pipeline.sampler.steps} steps", file=sys.stderr)
    folder = None
    if not twosdm.rank():
        kind = f"{args.method}-{mode}" if mode else args.method
        folder = open_folder(args.out, settings, f"samples/{pipeline.main['dataset']}-{kind}")
    folder = twosdm.gather(folder)[0]
    missing = [key for key, name in job.names.items() if not (folder / name).exists()]
    twosdm.gather(None)                               # nobody draws before all have looked
    total = len(job.names)
    bar = tqdm(total=total, initial=total - len(missing), desc=args.method, unit=" images")
    for part in twosdm.share([missing[i:i + args.batch] for i in range(0, len(missing), args.batch)]):
        for key, pixels in zip(part, job.draw(part)):
            twosdm.save_picture(folder / job.names[key], pixels)
        bar.update(min(len(part) * twosdm.processes(), bar.total - bar.n))
    bar.close()
    twosdm.gather(None)
    if twosdm.rank():
        return 0
    picture = folder / (f"grid-{args.seed:06d}.png" if args.seed else "grid.png")      # never another seed's
    twosdm.save_picture(picture, grid(job, folder), least=512)
    if args.npz:
        count = write_npz(folder, pipeline.shape)
        print(f"{folder / 'samples.npz'} holds all {count} images of the folder", file=sys.stderr)
    print(picture)
    return 0


if __name__ == "__main__":
    twosdm.run(main)
