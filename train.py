"""Trains the stages of 2SDM: embedder (where it is not the public CLIP), prior, image model, EDM baseline.

    python train.py                                                   everything, on the embedded world
    python train.py --dataset afhq --data afhq_v2/ --stage prior      one stage of one of the paper's settings

A run lives in runs/<dataset>/<stage>/: checkpoint.pt, log.jsonl, samples-*.png.
Started again it goes on where it stopped.
"""
import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

import twosdm
from twosdm import (
    ARCHITECTURES, LABEL_DIM, STAGES, ClipEmbedder, Denoiser, Pixels, Reduced, Sampler, SmallClip,
    UserError, embedding_bank, gather, has_prior, mix_seed, processes, rank, send, shapes_captions)


# ============================================================================================================
# 1 Settings: each field is a flag
# ============================================================================================================
def option(default, help, low=None, high=2**50, choices=None, group="", **parsing):
    """A setting: its meaning, its bounds, the group of --help that it begins, more for argparse if need be.

    A default of None is one that other settings or runs decide.
    """
    return field(default=default, metadata=locals())


PRECISIONS = "fp32 tf32 bf16".split()
K, M = 1_000, 1_000_000


@dataclass
class TrainConfig:
    """All that determines a training run. Presets change some of the defaults."""
    stage: str = option("all", "what to train; all = embedder, prior, image, baseline, what of it is missing",
                        choices=("all", *STAGES, "joint"), group="what matters first")
    dataset: str = option("shapes", "the preset: the data set and the settings that go with it")
    data: str = option("", "folder or zip with the images (shapes draws its own, cifar10 is downloaded)")
    images: int = option(25 * M, "length of each stage's training, in images seen", 1)
    batch: int = option(256, "images per optimizer step", 1, 2**20)
    lr: float = option(2e-4, "Adam's step size after the ramp", 0, 1)
    seed: int = option(0, "seed of everything random", 0, 2**31)
    tag: str = option("", "suffix for the run's folder, to keep a variant beside others")
    runs: str = option("runs", "folder of all runs")
    device: str = option("auto", "auto = cuda, else mps, else cpu")

    resolution: int = option(16, "height and width of the images, in pixels", 4, 4096, group="data")
    size: int = option(20_000, "number of training images of shapes", 1, 10 * M)
    limit: int = option(0, "train on so many of the images, chosen at random; 0 = all", 0)
    skip_bad: bool = option(False, "leave out images that cannot be read instead of stopping")
    vae: str = option("", "diffuse in the latents of this Stable Diffusion VAE, a hub's name or a folder")
    augment: float = option(0.0, "probability of each geometric augmentation", 0, 1)
    views: int = option(32, "augmented views per image that the prior is trained on", 1, K)

    embedder: str = option("clip", "what y is: OpenAI's CLIP ViT-B/32, the image at 4×4 pixels, or a small "
                           "CLIP of the shapes", choices=("clip", "pixels", "shapes"), group="embedding")
    clip_weights: str = option("openai", "'openai' or another's that open_clip downloads, or a file")
    y: str = option("clip", "what of the embedding is used: all of it (clip), its first D principal "
                    "components (pca:D), which of K clusters it is in (kmeans:K), nothing (none)")
    y_dropout: float = option(0.0, "how often the image model is not told y, for guidance in sampling", 0, 1)
    a: str = option("none", "what the user conditions on: nothing, the class, or (the prior of shapes alone) "
                    "the caption's text embedding", choices=("none", "class", "text"))

    prior_width: int = option(512, "width of the prior's tokens", 4, 2**14, group="prior")
    prior_depth: int = option(6, "number of transformer blocks of the prior", 1, K)
    prior_heads: int = option(8, "number of attention heads of the prior", 1, K)
    # Departure: "edm" is not in the paper; it shows what the choice of "data" does.
    prior_predicts: str = option("data", "the prior's output: y itself, or as EDM's networks",
                                 choices=("data", "edm"))

    arch: str = option("ddpm++", "U-Net of the image model and the baseline", choices=tuple(ARCHITECTURES),
                       group="image network")
    width: int = option(128, "channels of the U-Net at its finest level, divisible by 4", 4, 2**12)
    mults: tuple = option((1, 2, 2, 2), "channel multiplier of each level", 1, 64)
    blocks: int = option(4, "residual blocks per level", 1, 100)
    attention: tuple = option((16,), "resolutions with self-attention", 1, 4096)
    dropout: float = option(0.0, "dropout in the U-Net", 0, 0.99)
    init_from: str = option("", "EDM's .pkl whose weights the image model or baseline starts from")

    lr_ramp: int = option(10 * M, "images over which the step size rises from 0", 0, group="training")
    ema_half_life: int = option(500 * K, "half-life of the weights' moving average, in images", 0)
    ema_ramp: float = option(0.05, "half-life at most this share of the images seen", 0, 1e9)
    short: bool = option(False, "a run shorter than the preset's: scale with --images the ramp of the step "
                         "size and the EMA's half-life")

    steps: int = option(40, "sampling steps (2·steps - 1 network evaluations)", 2, M,
                        group="sampling, kept in the checkpoint")
    churn: float = option(50.0, "S_churn of the sampler; 0 = deterministic", 0, 1e9)

    precision: str = option("auto", "of the networks' arithmetic, weights stay fp32; auto = bf16 on cuda, "
                            "else fp32", choices=("auto", *PRECISIONS), group="machine and files")
    compile: bool = option(None, "torch.compile the network; unset = on cuda")
    batch_gpu: int = option(0, "images per forward pass, to save memory; 0 = the whole batch", 0)
    log: int = option(50 * K, "images between lines of log.jsonl", 1)
    preview: int = option(M, "images between pictures of samples, which the image model draws after "
                          "embeddings of training images; 0 = none", 0)
    save: int = option(500 * K, "images between checkpoints", 1)
    snapshots: int = option(0, "images between snapshots of the averaged weights, which are kept for "
                            "evaluate.py --history; 0 = none", 0)

    def __post_init__(self):
        check(self)


SOURCES = dict(                                       # of the defaults above; all others are ours
    paper="embedder prior_predicts arch steps churn",
    authors="prior_width prior_depth prior_heads",
    EDM="width mults blocks attention lr_ramp ema_half_life ema_ramp"
)
# The settings that make a run what it is: it may not change them on its way.
ALWAYS = "dataset resolution size limit seed batch lr lr_ramp ema_half_life ema_ramp"
PRIOR = " prior_width prior_depth prior_heads"
UNET = " arch width mults blocks attention dropout"
IDENTITY = dict(
    embedder=ALWAYS,
    prior=ALWAYS + " embedder y a augment views prior_predicts" + PRIOR,
    image=ALWAYS + " embedder y y_dropout a augment init_from" + UNET,
    baseline=ALWAYS + " a augment init_from" + UNET,
    joint=ALWAYS + " embedder a augment prior_predicts init_from" + PRIOR + UNET
)

# Settings by data set, in layers (source, stages, settings), of which later ones win. Sources: the paper, its
# authors' code where the paper is silent, EDM, or ours. Layers of "image" hold for the baseline as well.
IMAGE = "image baseline joint all"                    # all: what --help shows
EVERY = "embedder prior " + IMAGE
SMALL_PRIOR = dict(lr=1e-3, prior_width=128, prior_depth=3, prior_heads=4)
SMALL_UNET = dict(batch=32, width=24, mults=(1, 2, 2), blocks=1)
PAPER_PRIOR = [
    ("authors", "prior", dict(batch=256, lr=1e-4)),
    ("ours", "prior", dict(images=100 * M))           # the paper: a day on a V100
]
PAPER_64 = [
    ("paper", EVERY, dict(resolution=64, augment=0.15)),
    ("paper", IMAGE, dict(images=25 * M, batch=256, lr=2e-4)),
    *PAPER_PRIOR
]
IMAGENET = [
    ("paper", EVERY, dict(augment=0.0)),
    ("EDM", IMAGE, dict(dropout=0.10)),
    ("paper", IMAGE, dict(arch="adm", batch=128, lr=1e-4)),
    ("ours", IMAGE, dict(ema_half_life=500 * K)),     # EDM's 50 M belong to its 2,500 M images
    *PAPER_PRIOR
]
CLASSES = {"shapes": 6, "cifar10": 10, "imagenet-class": 1000, "imagenet-latent": 1000}
PRESETS = {
    "shapes": [
        ("ours", EVERY, dict(embedder="shapes", lr_ramp=4 * K, views=1, steps=18, churn=0.0,
                             log=2 * K, preview=14 * K, save=5 * K)),
        # Minutes on two CPU cores. In so short a training many small steps learn more than few large ones.
        ("ours", "embedder", dict(images=40 * K, lr=2e-3)),
        ("ours", "prior joint", dict(SMALL_PRIOR, images=250 * K, batch=64, lr=2e-3,
                                     log=10 * K, save=50 * K)),
        ("ours", IMAGE, dict(SMALL_UNET, images=28 * K, batch=16, lr=4e-3, attention=(4,), snapshots=10 * K))
    ],
    "folder": [                                       # minutes on a CPU; on a GPU, give the U-Net more width
        ("EDM", EVERY, dict(augment=0.15)),
        ("ours", EVERY, dict(resolution=32, lr_ramp=4 * K, log=2 * K, preview=6 * K, save=6 * K)),
        ("ours", "prior joint", dict(images=400 * K, **SMALL_PRIOR)),
        ("ours", IMAGE, dict(images=50 * K, lr=2e-3, attention=(8,), dropout=0.05, **SMALL_UNET))
    ],
    "cifar10": [
        ("EDM", EVERY, dict(resolution=32, a="class", augment=0.12)),
        *PAPER_PRIOR,
        ("EDM", IMAGE, dict(images=200 * M, batch=512, lr=1e-3, dropout=0.13, mults=(2, 2, 2)))
    ],
    "afhq": [*PAPER_64, ("paper", IMAGE, dict(dropout=0.25))],
    "ffhq": [*PAPER_64, ("paper", IMAGE, dict(dropout=0.05))],
    "imagenet": [("paper", EVERY, dict(resolution=64)), *IMAGENET],
    "imagenet-class": [("paper", EVERY, dict(resolution=64, a="class")), *IMAGENET],
    "imagenet-latent": [
        ("paper", EVERY, dict(resolution=256, a="class", vae="stabilityai/sd-vae-ft-mse")),
        *IMAGENET
    ]
}


def settle(dataset, stage, changes):
    """All layers of settings -> ({setting: value}, {setting: where it is from}). Raises UserError.

    Later ones win: the defaults, EDM's sizes of the network, the preset, `changes`; then --short.
    """
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset} is unknown: choose one of {', '.join(PRESETS)}")
    values = vars(TrainConfig(stage, dataset))
    sources = dict.fromkeys(values, "ours")
    for source, names in SOURCES.items():
        sources |= dict.fromkeys(names.split(), source)
    layers = [(source, settings) for source, stages, settings in PRESETS[dataset]
              if stage in stages.split()]
    layers.append(("you", changes))
    for _, settings in layers:
        values |= ARCHITECTURES.get(settings.get("arch"), {})
    for source, settings in layers:
        length = values["images"]                     # in the end the preset's, as changes are the last layer
        values |= settings
        sources |= dict.fromkeys(settings, source)
    if values["short"] and values["images"] < length:
        for name in {"lr_ramp", "ema_half_life"} - changes.keys():
            values[name] = -(-values[name] * values["images"] // length)
            sources[name] += ", scaled by --short"
    return values, sources


def configure(dataset="shapes", stage="image", **changes):
    """The settings of one stage: the defaults, then the preset's, then `changes`. Raises UserError."""
    return TrainConfig(**settle(dataset, stage, changes)[0])


def flag(name):
    return "--" + name.strip("_").replace("_", "-")


def check_options(settings):
    """Raises UserError for settings, of any dataclass of options, of a wrong type or out of range."""
    for setting in fields(settings):
        name, known, value = setting.name, setting.metadata, getattr(settings, setting.name)
        if value is None and setting.default is None:
            continue
        if not isinstance(value, int | float if setting.type is float else setting.type):
            raise UserError(f"{flag(name)} {value!r} is of the wrong kind: see --help")
        values = value if isinstance(value, tuple | list) else [value]
        if known["choices"] and not set(values) <= set(known["choices"]):
            raise UserError(f"{flag(name)} {' '.join(map(str, values))} is unknown: choose one of "
                            f"{', '.join(known['choices'])}")
        low, high = known["low"], known["high"]
        if low is not None and not all(low <= number <= high for number in values):
            raise UserError(f"{flag(name)} {value} is out of range: at least {low}, at most {high:,}")


def check_together(settings, at_odds):
    """Raises UserError for two flags that do not go together: {mode: the flags at odds with it}.

    A flag is given if it is neither None nor 0 or False.
    """
    given = {name for name, value in vars(settings).items() if value not in (None, False)}
    for mode, others in at_odds.items():
        for other in others.split():
            if {mode, other} <= given:
                raise UserError(f"{flag(mode)} and {flag(other)} do not go together: leave one of them out")


def check(config):
    """Raises UserError for settings that do not go together."""
    check_options(config)
    twosdm.check_y(config.y)
    stage, y, shapes = config.stage, config.y, config.dataset == "shapes"
    halved = 2 ** (len(config.mults) - 1) * (8 if config.vae else 1)
    heads = 64 if config.arch == "adm" else 4
    prior = math.lcm(4, config.prior_heads)
    for refused, sentence in (
        (config.resolution % halved,
         f"--resolution {config.resolution} must be divisible by {halved}, to be halved at each level"),
        (config.width % heads,
         f"--width {config.width} must be divisible by {heads}, the size of a group or head"),
        (config.prior_width % prior,
         f"--prior-width {config.prior_width} must be divisible by {prior}, for sinusoids and --prior-heads"),
        (shapes and config.data,
         f"--data {config.data} needs a --dataset, such as folder: shapes draws its own"),
        (not re.fullmatch(r"[\w.]*", config.tag),
         f"--tag {config.tag}: give letters, digits, dots and underscores alone"),
        (config.vae and config.augment,
         "--vae has latents of images as they are: --augment 0"),
        (not shapes and (stage == "embedder" or config.embedder == "shapes"),
         "only shapes has an embedder of its own: leave --stage embedder and --embedder shapes out"),
        (config.init_from and stage in ("embedder", "prior"),
         "--init-from is for --stage image, baseline or joint: others have no U-Net"),
        (stage == "prior" and not has_prior(y),
         f"--y {y} leaves the prior nothing to learn: clusters are drawn by frequency"),
        (config.a == "text" and (stage, config.embedder) != ("prior", "shapes"),
         "--a text is for --stage prior of shapes and its own embedder: captions are nowhere else, and the "
         "image model learns of them through y"),
        (config.a == "class" and y.startswith("kmeans"),
         "--y kmeans draws clusters regardless of a: --a none"),
        (config.y_dropout and y == "none",
         f"--y {y} leaves --y-dropout nothing to drop: leave one of them out"),
        (stage == "joint" and (y != "clip" or config.y_dropout or config.embedder == "pixels" or config.vae),
         "--stage joint trains an embedder of images with the rest: leave --y, --y-dropout, --vae and "
         "--embedder pixels out")
    ):
        if refused:
            raise UserError(sentence)


def whole_number(text):
    """'25M' -> 25000000: a whole number with an optional suffix k or M."""
    number = float(text.lower().replace("k", "e3").replace("m", "e6"))
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def whole_numbers(text):
    return tuple(map(int, text.split(",")))


def new_parser(description, settings, epilog=None):
    """An argparse parser of one flag per setting; --help shows their values here as the defaults.

    What it parses has no more than what was given.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, epilog=epilog)
    types = {int: whole_number, tuple: whole_numbers, list: str}
    for setting in fields(settings):
        default, known = getattr(settings, setting.name), setting.metadata
        if known["group"]:
            group = parser.add_argument_group(known["group"])
        help = known["help"]
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        if default is not None:
            help += f" (default: {'no' if default is False else default if default != '' else 'none'})"
        parsing = dict(dest=setting.name, help=help.replace("%", "%%"))
        if setting.type is bool:
            parsing["action"] = argparse.BooleanOptionalAction
        else:
            parsing["type"] = types.get(setting.type, setting.type)
        if known["choices"]:
            parsing["metavar"] = "|".join(known["choices"])
        group.add_argument(flag(setting.name), **parsing | known["parsing"])
    return parser


# ============================================================================================================
# 2 What each stage trains
# ============================================================================================================
ADAM = dict(betas=(0.9, 0.999), eps=1e-8)             # no weight decay


def build(config, dim, classes, shape):
    """What a stage trains -> its networks as plain numbers, for checkpoints, and the module made of them.

    dim: of the whole embedding; classes: their number, 0 for none; shape (C, H, W) of images or latents.
    """
    if config.stage == "embedder":
        return dict(net="small-clip"), SmallClip()
    if config.stage == "joint":
        shapes = config.embedder == "shapes"
        embedder = SmallClip() if shapes else ClipEmbedder(None)
        embedder.requires_grad_(False)                # the text side stays as it is
        tower = embedder.image if shapes else embedder.model.visual
        tower.requires_grad_(True)
        model, parts = dict(net="joint"), {}
        for stage in ("prior", "image"):
            part = replace(config, stage=stage)
            model[stage], parts[stage] = build(part, embedder.dim, classes, shape)
        return model, nn.ModuleDict(dict(parts, embedder=embedder))
    a_dim = SmallClip.dim if config.a == "text" else classes
    y_dim = int(config.y.split(":")[1]) if ":" in config.y else dim
    if config.stage == "baseline" or config.y == "none":
        y_dim = 0
    if config.stage == "prior":
        net, predict, names = "prior", config.prior_predicts, PRIOR
        dims = dict(dim=y_dim, cond_dim=a_dim)
    else:
        net, predict, names = "unet", "edm", UNET
        dims = dict(resolution=shape[1], channels=shape[0], cond_dim=y_dim + a_dim)
    settings = {name.removeprefix("prior_"): getattr(config, name) for name in names.split()}
    settings |= dict(dims, augment_dim=LABEL_DIM if config.augment else 0)
    model = dict(net=net, predict=predict, sigma_data=0.5, settings=settings)
    return model, twosdm.build_denoiser(model).to(memory_format=torch.channels_last)


class Stage:
    """One stage's training: all that the loop needs of it.

    What is trained: `module`, `ema`, `optimizer`; how far it is: `seen`, `seconds`, `log`. A kind of stage
    gives a `loss`, and if there is more to it, `random`, `finish`, `preview` and further entries of its
    checkpoints, `extra`. `start` comes before the first step and `write` after every one.
    """
    extra = {}

    def __init__(self, config, images, device, embedder=None, autoencoder=None):
        if config.a == "class" and images.labels is None:
            raise UserError("--a class needs images in one folder per class, or a dataset.json with labels")
        self.config, self.images, self.device = config, images, device
        self.embedder, self.autoencoder = embedder, autoencoder
        self.packed = embedder and twosdm.pack_embedder(embedder)
        self.fingerprints = dict(images=images.fingerprint,
                                 embedder=self.packed and self.packed["fingerprint"])
        # What of the embedder is before the reduction, and the reduction.
        self.whole, self.reduce = embedder, nn.Identity()
        if embedder and config.y != "clip":
            self.whole, self.reduce = embedder.inner, embedder.reduction.transform
        self.classes = len(images.classes) if config.a == "class" else 0
        dim = self.whole.dim if embedder else 0
        self.model, self.module = build(config, dim, self.classes, images.shape)
        self.folder = run_folder(config)
        self.seen, self.seconds, self.log = 0, 0.0, []

    def random(self, rows):
        """All random numbers of a batch but dropout's, so its loss is the same in one part or several."""
        return {}

    def loss(self, rows, numbers):
        """Rows (B,) of the images and their random numbers -> (B,)."""

    def finish(self):
        """After the last step -> what the log says of the averaged weights."""
        return {}

    def preview(self):
        """Writes samples-*.png, of the averaged weights, where there are images to draw."""

    def start(self, checkpoint):
        """Makes all that the training changes: as the checkpoint has it, or anew. Raises UserError."""
        config, path = self.config, self.folder / "checkpoint.pt"
        if config.init_from and not checkpoint:
            settings = self.model.get("image", self.model)["settings"]
            image_model = self.parts(self.module)["image"]
            twosdm.init_from_edm(image_model, settings, config.init_from, self.classes)
        self.module.to(self.device).train()
        self.ema = twosdm.EMA(self.module, config.ema_half_life, config.ema_ramp)
        self.optimizer = torch.optim.Adam(self.module.parameters(), config.lr, **ADAM,
                                          fused=self.device.type != "mps")
        if not checkpoint:
            return
        if checkpoint["fingerprints"] != self.fingerprints:
            raise UserError(f"{path} was trained with another embedder: give the same one, or another --runs "
                            f"folder")
        with twosdm.reading(path, "move it away and train again"):
            self.module.load_state_dict(checkpoint["net"])
            self.ema.net.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.seen = checkpoint["seen"]
            self.seconds = checkpoint["seconds"]
            self.log = checkpoint["log"]

    def reached(self, every):
        """Whether the last batch reached a multiple of `every` images, or the end; never if that is 0."""
        before = self.seen - self.config.batch
        return every > 0 and (self.seen >= self.config.images or self.seen // every > before // every)

    def write(self, stopped):
        """What it is time for. What a checkpoint counts is there before it."""
        config = self.config
        if self.reached(config.log):
            # Whole: what a killed run had written after its checkpoint is gone from it.
            with twosdm.written(self.folder / "log.jsonl") as file:
                file.writelines(json.dumps(line).encode() + b"\n" for line in self.log)
        if self.reached(config.snapshots):
            self.save(f"snapshot-{self.seen:010d}.pt")
        if self.reached(config.preview):
            self.preview()
        if self.reached(config.save) or stopped:
            self.save("checkpoint.pt", net=self.module.state_dict(), optimizer=self.optimizer.state_dict())

    def save(self, name, **more):
        """All that samples need, and `more`: what training goes on from."""
        config, images, counts = self.config, self.images, None
        if images.labels is not None:
            counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        twosdm.save_checkpoint(
            self.folder / name,
            stage=config.stage,
            config=asdict(config),
            model=self.model,
            embedder=self.packed,
            fingerprints=self.fingerprints,
            data=dict(count=len(images), classes=images.classes, class_counts=counts),
            seen=self.seen,
            seconds=self.seconds,
            log=self.log,
            ema=self.ema.net.state_dict(),
            **self.extra,
            **more
        )


# Of the small CLIP's 64 numbers y keeps so many principal components, which hold almost all that there is to
# read: a short training of prior and image model learns few better than many.
COMPONENTS = 16


class Embedding(Stage):
    """The embedder's stage: the symmetric contrastive loss of images and captions (shapes only)."""

    def loss(self, rows, numbers):
        captions = shapes_captions(torch.from_numpy(rows), self.config.seed)
        return self.module.loss(self.images.batch(rows, self.device), captions)

    @torch.no_grad()
    def finish(self):
        """Finds the components to keep, scaled to rms 0.5; -> how well a linear probe reads them."""
        module, size, seed = self.ema.net, len(self.images), self.config.seed
        index = torch.arange(size + 2000)             # the last of which are not among the training images
        images = twosdm.shapes_world(index, self.images.resolution, seed)
        truth = twosdm.shapes_attributes(index, seed)
        y = torch.cat([module(images.batch(rows, self.device)).cpu() for rows in index.split(500)])
        pca = twosdm.PCA.fit(y[:size], COMPONENTS).of_rms(y[:size])
        y, accuracy = F.pad(pca.transform(y), (0, 1), value=1), {}                       # (N + 2000, 17)
        self.packed = twosdm.pack_embedder(Reduced(module, pca))
        for name, kinds in twosdm.ATTRIBUTES.items():  # least squares from [y, 1] to the one-hot attribute
            wanted = F.one_hot(truth[name], kinds).float()
            probe = torch.linalg.lstsq(y[:size], wanted[:size]).solution
            right = (y[size:] @ probe).argmax(1) == truth[name][size:]
            accuracy[name] = round(right.float().mean().item(), 4)
        tqdm.write(f"share of held-out images that a linear probe reads right: {accuracy}")
        return dict(linear_probe=accuracy)


class Diffusion(Stage):
    """Prior (Eq. 4), image model (Eq. 5), baseline (Eq. 5 without y) and joint (both): one loss for all.

    Joint is Overfit-2SDM (Appendix B): its embedder starts from random weights and learns from both losses
    through y. Their sum has the gradient that the paper accumulates in two passes before its one step.
    """

    def __init__(self, *args):
        super().__init__(*args)
        config, folder, images = self.config, self.folder.parent, self.images
        self.augment = twosdm.Augment(config.augment) if config.augment else None
        self.bank = None                              # of e_i(x), whose rows `reduce` turns into y
        if self.embedder and (config.stage == "prior" or not self.augment):
            self.bank = embedding_bank(images, self.whole, folder, self.augment, config.views,
                                              config.seed, self.device)
        if config.stage == "prior":                   # the mean y, about which --temperature contracts
            plain = embedding_bank(images, self.whole, folder, device=self.device)[0]
            mean = plain[:, :-LABEL_DIM].mean(0, keepdims=True, dtype=np.float64)
            self.extra = dict(y_mean=self.reduce(torch.from_numpy(mean).float().to(self.device))[0])

    def parts(self, module):
        """The denoisers among what is trained, {"prior", "image": Denoiser} or one of them."""
        if self.config.stage == "joint":
            return module
        return {"prior" if self.config.stage == "prior" else "image": module}

    def random(self, rows):
        config, parts = self.config, self.parts(self.module)
        numbers = dict(view=torch.randint(config.views, (len(rows),)))
        if self.augment:
            numbers["augment"] = self.augment.random(len(rows))
        like = torch.empty(len(rows), *self.images.shape, device=self.device)
        if "image" in parts:
            numbers["image"] = parts["image"].training_noise(like)
        if self.images.latents is not None:
            numbers["latent"] = torch.randn_like(like)
        if "prior" in parts:
            y = torch.empty(len(rows), parts["prior"].net.dim, device=self.device)
            numbers["prior"] = parts["prior"].training_noise(y)
        if config.y_dropout and config.stage == "image":
            chance = torch.rand(len(rows), 1, device=self.device)
            numbers["told"] = (chance >= config.y_dropout).float()
        return numbers

    def loss(self, rows, numbers):
        parts, loss = self.parts(self.module), 0
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):     # only networks round
            a = self.condition(rows)
            x, y, label = self.example(rows, numbers)
        if self.config.stage == "joint":
            y = parts["embedder"](x).float()          # not bf16, as it is what the prior is to predict
        if "prior" in parts:
            loss += parts["prior"].loss(y, a, label, numbers["prior"])                       # Eq. 4
        if "image" in parts:
            loss += parts["image"].loss(x, twosdm.join(y, a), label, numbers["image"])       # Eq. 5
        return loss

    def example(self, rows, numbers):
        """Images or latents x (B, C, H, W), y (B, D), augmentation labels (B, 9); or None."""
        x, y, label, images = None, None, None, self.images
        if images.latents is not None and self.config.stage != "prior":
            moments = send(images.latents[rows], self.device)
            x = self.autoencoder.sample(moments, numbers["latent"])
        elif self.config.stage != "prior":
            x = images.batch(rows, self.device)
            if self.augment:
                x, label = self.augment(x, numbers["augment"])
        if self.bank is not None:
            view = numbers["view"].numpy() % len(self.bank)
            found = send(self.bank[view, rows], self.device)                          # (B, D' + 9)
            y = self.reduce(found[:, :-LABEL_DIM])
            if self.augment:
                label = found[:, -LABEL_DIM:]
        elif self.embedder:
            y = self.embedder(x)                      # of the augmented image
        if "told" in numbers:
            y = y * numbers["told"]
        return x, y, label

    def condition(self, rows):
        """a of these images: (B, A), classes as one-hots or the captions' embeddings; None for neither."""
        if self.config.a == "text":
            return self.whole.text_condition(shapes_captions(torch.from_numpy(rows), self.config.seed))
        if self.classes:
            labels = send(self.images.labels[rows], self.device)
            return F.one_hot(labels, self.classes).float()

    @torch.no_grad()
    def preview(self):
        """A grid of samples: 18 steps, no churn; the image model draws after training images' embeddings."""
        parts, y, device = self.parts(self.ema.net), None, self.device
        if "image" not in parts:
            return
        side = 8 if self.config.resolution < 64 else 4
        seeds, sampler = range(side * side), Sampler(steps=18, s_churn=0)
        rows = np.array(seeds) * 7919 % len(self.images)                  # a prime: from all over the set
        a = self.condition(rows)
        if "prior" in parts:
            y = twosdm.sample_embeddings(parts["prior"], twosdm.SampleNoise(seeds, device), a, sampler)
        elif self.embedder:
            y = self.embedder(self.images.batch(rows, device))
        x = twosdm.sample_images(parts["image"], twosdm.image_noise(seeds, device), y, a, sampler)
        if self.autoencoder:
            x = self.autoencoder.decode(x)
        picture = twosdm.image_grid(twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy(), side)
        twosdm.save_picture(self.folder / f"samples-{self.seen:09d}.png", picture, least=512)


# ============================================================================================================
# 3 The loop
# ============================================================================================================
@functools.lru_cache(2)
def permutation(size, seed, epoch):
    """(size,) int64: in which order an epoch shows its examples."""
    generator = torch.Generator().manual_seed(mix_seed("order", seed, epoch))
    return torch.randperm(size, generator=generator).numpy()


def shuffled(size, seed, start, stop):
    """Positions start to stop of an endless shuffling -> rows (stop - start,), of these numbers alone."""
    return np.array([permutation(size, seed, i // size)[i % size] for i in range(start, stop)])


def loop(stage):
    """Trains a stage to config.images images seen. Returns False if it was asked to stop."""
    config, module, device = stage.config, stage.module, stage.device
    precision = twosdm.set_precision(config.precision, device, auto="bf16")
    # The processes of torchrun share each batch; all but the first are silent and write nothing. The
    # contrastive loss compares all examples of a batch: it cannot be split, and each process trains it alone.
    team, me, size = processes(), rank(), config.batch_gpu or config.batch
    if config.stage == "embedder":
        team, me, size = 1, 0, config.batch
    start, stop = config.batch * me // team, config.batch * (me + 1) // team
    parts = [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
    losses, norms = [], []
    bar = tqdm(total=config.images, initial=stage.seen, desc=f"{config.stage:>8}", unit=" images",
               unit_scale=True)
    with bar, stop_signals() as asked:
        while stage.seen < config.images:
            # All randomness follows from (seed, images seen): a resumed run repeats what the first would do.
            torch.manual_seed(mix_seed("step", config.seed, stage.seen))
            began = time.perf_counter()
            rows = shuffled(len(stage.images), config.seed, stage.seen, stage.seen + config.batch)
            numbers = stage.random(rows)
            # A linear ramp, then constant; it counts this batch, so that the first step is not one of size 0.
            ramp = min((stage.seen + config.batch) / max(config.lr_ramp, 1), 1)
            stage.optimizer.param_groups[0]["lr"] = config.lr * ramp
            stage.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                if config.dropout:                    # the masks differ with the way a batch is split
                    torch.manual_seed(mix_seed("dropout", config.seed, stage.seen, part.start))
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = stage.loss(rows[part], tree_map(lambda tensor: tensor[part], numbers))
                (loss.sum() / config.batch).backward()
                losses.append(loss.detach())
            norms.append(finish_gradients(module, team))
            stage.optimizer.step()
            stage.ema.update(module, stage.seen, config.batch)
            stage.seen += config.batch
            stage.seconds += time.perf_counter() - began
            bar.update(config.batch)
            if stage.reached(config.log):
                stage.log.append(log_line(stage, losses, norms))
                bar.set_postfix(loss=stage.log[-1]["loss"])
                losses, norms = [], []
            # Processes agree on that now and then, as it makes them wait for each other.
            meeting = team == 1 or stage.seen // config.batch % 16 == 0
            stopped = meeting and any(gather(bool(asked)))
            if not rank():
                stage.write(stopped)
            if stopped:
                return False
    return True


def finish_gradients(module, team):
    """Adds up the processes' gradients and replaces NaN and infinity, as EDM does -> the norm before that."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if team > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    # Without a look at them first, which would wait for the GPU.
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
    return norm


def log_line(stage, losses, norms):
    """A line of log.jsonl, of all measured since the last. Raises UserError if nothing of it is finite."""
    loss, norm = torch.cat(gather(torch.cat(losses).float().cpu())), torch.stack(norms).cpu()
    finite = norm.isfinite()
    if not finite.any():
        raise UserError("the loss is not finite any more: give a lower --lr or --precision fp32; the last "
                        "checkpoint is from before, and the same command goes on from it")
    more = stage.finish() if stage.seen >= stage.config.images else {}
    return dict(images=stage.seen, loss=loss[loss.isfinite()].mean().item(), seconds=stage.seconds,
                images_per_second=round(stage.seen / stage.seconds, 1),
                gradient_norm=norm[finite].mean().item(), nonfinite=int((~finite).sum()), **more)


@contextlib.contextmanager
def stop_signals():
    """While it lasts, SIGTERM or Ctrl-C only ask: finish the step, save, leave. The second leaves at once."""
    asked, restore = [], contextlib.ExitStack()

    def ask(number, frame):
        asked.append(number)
        restore.close()

    with restore:
        for number in (signal.SIGTERM, signal.SIGINT):
            restore.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


# ============================================================================================================
# 4 What a run starts from
# ============================================================================================================
def run_folder(config):
    name = twosdm.run_name(config.stage, config.y, config.a, config.tag)
    return Path(config.runs, config.dataset, name)


def newest_picture(config):
    """The newest picture of samples in a run's folder; None if there is none."""
    return max(run_folder(config).glob("samples-*.png"), default=None)


def train(config, device, data):
    """One stage, from its checkpoint if any; data() -> images, autoencoder. False if it was asked to stop."""
    path = run_folder(config) / "checkpoint.pt"
    checkpoint = twosdm.load_checkpoint(path, stage=config.stage) if path.exists() else None
    gather(None)                                      # no process writes before all have read
    if checkpoint:
        same_settings(checkpoint, config, path)
    if config.batch < processes():
        raise UserError(f"--batch {config.batch} cannot be shared by {processes()} processes")
    images, autoencoder = data()
    if checkpoint and checkpoint["fingerprints"].get("images") != images.fingerprint:
        raise UserError(f"{path} was trained with other images: give the same ones, or another --runs folder")
    if checkpoint and checkpoint["seen"] >= config.images:
        print(f"{config.stage}: done, {checkpoint['seen']:,} images seen ({path})")
        return True
    torch.manual_seed(config.seed)
    embedder = find_embedder(config, images, device)
    kind = Embedding if config.stage == "embedder" else Diffusion
    stage = kind(config, images, device, embedder, autoencoder)
    stage.start(checkpoint)
    checkpoint = None                                 # gigabytes, for the largest networks
    for part in stage.module.modules():
        if isinstance(part, Denoiser):
            twosdm.compile_network(part.net, config.compile, device)
    finished = loop(stage)
    gather(None)                                      # what the first process saved is there for all
    if not finished:
        print(f"stopped at {stage.seen:,} images and saved {path}: the same command goes on from there",
              file=sys.stderr)
        return False
    print(f"{config.stage}: {stage.seen:,} images in {stage.seconds:.0f} s -> "
          f"{newest_picture(config) or stage.folder}")
    if stage.log[-1]["loss"] > 2 * stage.log[0]["loss"]:
        print("Warning: the loss has grown since the start: give a lower --lr", file=sys.stderr)
    return True


def same_settings(checkpoint, config, path):
    """Refuses to go on with a run under other settings than it began with."""
    for name in IDENTITY[config.stage].split():
        old, new = checkpoint["config"].get(name), getattr(config, name)
        if old != new:
            raise UserError(f"{path} was trained with {flag(name)} {old or 'none'}, not "
                            f"{new or 'none'}: use its settings (--short makes some of --images), or keep "
                            f"both by --tag NAME or another --runs folder")


def find_embedder(config, images, device):
    """e_i, frozen, as the image model knows it: whole, or reduced by PCA or K-means. None without y."""
    if config.stage not in ("prior", "image") or config.y == "none":
        return None
    folder = run_folder(config).parent
    if config.embedder == "clip":
        embedder = ClipEmbedder(config.clip_weights)
    elif config.embedder == "pixels":
        embedder = Pixels()
    else:
        embedder = twosdm.trained_clip(folder / "embedder/checkpoint.pt")
    embedder.to(device)
    if config.y == "clip":
        return embedder

    def fit():
        bank = embedding_bank(images, embedder, folder, device=device)
        rows = send(bank[0, :, :-LABEL_DIM], "cpu")
        return twosdm.fit_reduction(config.y, rows, config.seed).state_dict()

    name = f"{config.y.replace(':', '')}-{twosdm.fingerprint(embedder)}-{images.fingerprint}-{config.seed}"
    tensors = twosdm.cached(folder / f"reductions/{name}.pt", fit)
    return Reduced(embedder, twosdm.restore_reduction(tensors)).to(device)


# ============================================================================================================
# 5 The command line
# ============================================================================================================
def main():
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--dataset", default="shapes")
    early.add_argument("--stage", default="all")
    known, _ = early.parse_known_args()
    epilog = (f"These are the defaults of --dataset {known.dataset} --stage {known.stage} (all: of the image "
              f"model); --dry-run shows each stage's. Data sets: {', '.join(PRESETS)}.")
    parser = new_parser(__doc__, configure(known.dataset, known.stage), epilog)
    parser.add_argument("--dry-run", action="store_true",
                        help="print every setting with its source, and parameter counts, as JSON")
    given = vars(parser.parse_args())
    changes = {name: value for name, value in given.items() if name not in ("dataset", "stage", "dry_run")}
    if changes.get("data"):
        changes["data"] = os.path.abspath(changes["data"])    # for sample.py, wherever it is called
    stages = [known.stage]
    if known.stage == "all":
        stages = list(STAGES)
        if known.dataset != "shapes":
            stages.remove("embedder")
        if not has_prior(changes.get("y", "clip")):
            stages.remove("prior")
    configs = [configure(known.dataset, stage, **changes) for stage in stages]
    if "dry_run" in given:
        described = json.dumps([describe(config, changes) for config in configs])
        print(described.replace("}, ", "},\n"))       # a line for each setting
        return 0
    device = twosdm.pick_device(configs[0].device)
    twosdm.join_processes(device)
    print(f"{known.dataset}: {', '.join(stages)} on {device} (processes: {processes()})")

    @functools.cache
    def data():
        """The training images, the same for all stages, and the autoencoder of their latents if any."""
        config = configs[0]
        autoencoder = twosdm.Autoencoder(config.vae).to(device) if config.vae else None
        return twosdm.load_images(config, autoencoder), autoencoder

    for config in configs:
        folder = run_folder(config)
        busy = f"another process is training {folder}: wait for it, or give another --runs folder"
        with twosdm.locked(folder / f"lock{rank()}", busy):
            if not rank():                     # the lock of the first is the folder's
                twosdm.clear_unfinished(folder)
            if not train(config, device, data):
                return 130
    if known.stage == "all":
        where = "".join(f" --{name} {given[name]}" for name in ("runs", "dataset", "y") if name in given)
        print("Samples to look at:", *filter(None, map(newest_picture, configs)))
        print(f"Next: python sample.py{where}, then python evaluate.py{where}")
    return 0


FIXED = "sigma_data p_mean p_std sigma_min sigma_max rho s_noise".split()     # EDM's, which no flag changes


def describe(config, changes):
    """What --dry-run prints of a stage: each setting with its source, the number of parameters."""
    side, classes, (_, sources) = config.resolution, 0, settle(config.dataset, config.stage, changes)
    values = asdict(config)
    for function in (Denoiser, twosdm.sigma_schedule, Sampler):
        parameters = inspect.signature(function).parameters
        values |= {name: parameters[name].default for name in FIXED if name in parameters}
    values |= {"adam_" + name: value for name, value in ADAM.items()}
    if config.a == "class":
        classes = CLASSES.get(config.dataset) or len(twosdm.ImageFiles(config.data or "--data").classes)
    with torch.device("meta"):                        # shapes without contents: instant at any size
        dims = dict(clip=ClipEmbedder.dim, pixels=Pixels.dim, shapes=COMPONENTS)
        shape = (4, side // 8, side // 8) if config.vae else (3, side, side)
        _, module = build(config, dims[config.embedder], classes, shape)
    values["parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
    sources["parameters"] = "counted"
    return {name: dict(value=value, source=sources.get(name, "EDM")) for name, value in values.items()}


if __name__ == "__main__":
    twosdm.run(main)
