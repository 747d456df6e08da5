"""Trains the stages of 2SDM: embedder (where it is not the public CLIP), prior, image model, EDM baseline.

    python train.py                                                   everything, on the embedded world
    python train.py --dataset afhq --data afhq_v2/ --stage prior      one stage of one of the paper's settings

A run lives in runs/<dataset>/<stage>/: checkpoint.pt, log.jsonl, samples-*.png.
Started again it goes on where it stopped.
"""
import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import twosdm
from twosdm import ARCHITECTURES, STAGES, UserError


# ============================================================================================================
# 1 Settings: each field is a flag
# ============================================================================================================
def option(default, help, low=None, high=2**50, choices=None):
    """A setting: its meaning, its bounds."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


PRECISIONS = ("fp32", "tf32", "bf16")
K, M = 1_000, 1_000_000


@dataclass
class TrainConfig:
    """All that determines a training run. Presets change some of the defaults."""
    stage: str = option("all", "what to train; all = whatever is missing, in this order",
                        choices=("all", *STAGES, "joint"))
    dataset: str = option("shapes", "the preset: the data set and the settings that go with it")
    data: str = option("", "folder or zip with the images (shapes draws its own, cifar10 is downloaded)")
    images: int = option(25 * M, "length of each stage's training, in images seen", 1)
    batch: int = option(256, "images per optimizer step", 1, 2**20)
    lr: float = option(2e-4, "Adam's step size after the ramp", 0, 1)
    seed: int = option(0, "seed of everything random", 0, 2**31)
    tag: str = option("", "suffix for the run's folder, to keep a variant beside others")
    runs: str = option("runs", "folder of all runs")
    device: str = option("auto", "auto = cuda, else mps, else cpu")

    resolution: int = option(16, "height and width of the images, in pixels", 4, 4096)
    size: int = option(20_000, "number of training images of shapes", 1, 10 * M)
    limit: int = option(0, "train on so many of the images, chosen at random; 0 = all", 0)
    skip_bad: bool = option(False, "leave out images that cannot be read instead of stopping")
    vae: str = option("", "diffuse in the latents of this Stable Diffusion VAE, a hub's name or a folder")
    augment: float = option(0.0, "probability of each geometric augmentation", 0, 1)
    views: int = option(32, "augmented views per image that the prior is trained on", 1, K)

    embedder: str = option("clip", "what y is: OpenAI's CLIP ViT-B/32, a PCA of the pixels, or a small CLIP "
                           "of the shapes", choices=("clip", "pixels", "shapes"))
    clip_weights: str = option("openai", "'openai', which open_clip downloads, or a file")
    y: str = option("clip", "what of the embedding is used: all of it (clip), its first D principal "
                    "components (pca:D), which of K clusters it is in (kmeans:K), nothing (none)")
    y_dropout: float = option(0.0, "how often the image model is not told y, for guidance in sampling", 0, 1)
    a: str = option("none", "what the user conditions on: nothing, the class, or (the prior of shapes alone) "
                    "the caption's text embedding", choices=("none", "class", "text"))

    prior_width: int = option(512, "width of the prior's tokens", 4, 2**14)
    prior_depth: int = option(6, "number of transformer blocks of the prior", 1, K)
    prior_heads: int = option(8, "number of attention heads of the prior", 1, K)
    prior_predicts: str = option("data", "the prior's output: y itself, or as EDM's networks (Departure)",
                                 choices=("data", "edm"))

    arch: str = option("ddpm++", "U-Net of the image model and the baseline", choices=tuple(ARCHITECTURES))
    width: int = option(128, "channels of the U-Net at its finest level, divisible by 4", 4, 2**12)
    mults: tuple = option((1, 2, 2, 2), "channel multiplier of each level", 1, 64)
    blocks: int = option(4, "residual blocks per level", 1, 100)
    attention: tuple = option((16,), "resolutions with self-attention", 1, 4096)
    dropout: float = option(0.0, "dropout in the U-Net", 0, 0.99)
    init_from: str = option("", "EDM's .pkl whose weights the image model or baseline starts from")

    lr_ramp: int = option(10 * M, "images over which the step size rises from 0", 0)
    ema_half_life: int = option(500 * K, "half-life of the weights' moving average, in images", 0)
    ema_ramp: float = option(0.05, "half-life at most this share of the images seen", 0, 1e9)
    short: bool = option(False, "a run shorter than the preset's: scale with --images the ramp of the step "
                         "size and the EMA's half-life")

    steps: int = option(40, "sampling steps (2·steps - 1 network evaluations)", 2, M)
    churn: float = option(50.0, "S_churn of the sampler; 0 = deterministic", 0, 1e9)

    precision: str = option("auto", "of the networks' arithmetic, weights stay fp32; auto = bf16 on cuda, "
                            "else fp32", choices=("auto", *PRECISIONS))
    compile: bool | None = option(None, "torch.compile the network; unset = on cuda")
    batch_gpu: int = option(0, "images per forward pass, to save memory; 0 = the whole batch", 0)
    log: int = option(50 * K, "images between lines of log.jsonl", 1)
    preview: int = option(M, "images between pictures of samples, which the image model draws after "
                          "embeddings of training images; 0 = none", 0)
    save: int = option(500 * K, "images between checkpoints", 1)
    snapshots: int = option(0, "images between snapshots of the averaged weights, which are kept for "
                            "evaluate.py --history; 0 = none", 0)


GROUPS = {                                            # of --help, each by its first setting
    "stage": "what matters first", "resolution": "data", "embedder": "embedding", "prior_width": "prior",
    "arch": "image network", "lr_ramp": "training", "steps": "sampling, kept in the checkpoint",
    "precision": "machine and files",
}
SOURCES = dict(                                       # of the defaults above; all others are ours
    paper="embedder prior_predicts arch steps churn",
    authors="prior_width prior_depth prior_heads",
    EDM="width mults blocks attention lr_ramp ema_half_life ema_ramp",
)
# The settings that make a run what it is: it may not change them on its way.
ALWAYS = "dataset resolution size limit seed batch lr lr_ramp ema_half_life ema_ramp"
PRIOR = " prior_width prior_depth prior_heads prior_predicts"
UNET = " arch width mults blocks attention dropout init_from"
IDENTITY = dict(
    embedder=ALWAYS,
    prior=ALWAYS + " embedder y a augment views" + PRIOR,
    image=ALWAYS + " embedder y y_dropout a augment" + UNET,
    baseline=ALWAYS + " a augment" + UNET,
    joint=ALWAYS + " embedder a augment" + PRIOR + UNET,
)

# Settings by data set, in layers (source, stages, settings), of which later ones win. Sources: the paper, its
# authors' code where the paper is silent, EDM, or ours. Layers of "image" hold for the baseline as well.
IMAGE = ("image", "baseline", "joint")
EVERY = ("embedder", "prior", *IMAGE)
SMALL_PRIOR = dict(lr=1e-3, prior_width=128, prior_depth=3, prior_heads=4)
SMALL_UNET = dict(batch=32, width=24, mults=(1, 2, 2), blocks=1)
PAPER_PRIOR = [
    ("authors", ("prior",), dict(batch=256, lr=1e-4)),
    ("ours", ("prior",), dict(images=100 * M)),       # the paper: a day on a V100
]
IMAGENET = [
    ("paper", EVERY, dict(augment=0.0)),
    ("EDM", IMAGE, dict(dropout=0.10, **ARCHITECTURES["adm"])),
    ("paper", IMAGE, dict(arch="adm", batch=128, lr=1e-4)),
    ("ours", IMAGE, dict(ema_half_life=500 * K)),     # EDM's 50 M belong to its 2,500 M images
    *PAPER_PRIOR,
]
CLASSES = {"shapes": 6, "cifar10": 10, "imagenet-class": 1000, "imagenet-latent": 1000}
PRESETS = {
    "shapes": [
        ("ours", EVERY, dict(embedder="shapes", lr_ramp=4 * K, views=1, steps=18, churn=0.0)),
        ("ours", EVERY, dict(log=2 * K, preview=12 * K, save=6 * K)),
        ("ours", ("embedder",), dict(images=40 * K, lr=2e-3)),
        ("ours", ("prior", "joint"), dict(images=250 * K, **SMALL_PRIOR)),
        ("ours", IMAGE, dict(images=44 * K, lr=4e-3, attention=(4,), snapshots=11 * K, **SMALL_UNET)),
    ],
    "folder": [                                       # minutes on a CPU; on a GPU, give the U-Net more width
        ("EDM", EVERY, dict(augment=0.15)),
        ("ours", EVERY, dict(resolution=32, lr_ramp=4 * K, log=2 * K, preview=6 * K, save=6 * K)),
        ("ours", ("prior", "joint"), dict(images=400 * K, **SMALL_PRIOR)),
        ("ours", IMAGE, dict(images=50 * K, lr=2e-3, attention=(8,), dropout=0.05, **SMALL_UNET)),
    ],
    "cifar10": [
        ("EDM", EVERY, dict(resolution=32, a="class", augment=0.12)),
        *PAPER_PRIOR,
        ("EDM", IMAGE, dict(images=200 * M, batch=512, lr=1e-3, dropout=0.13, mults=(2, 2, 2))),
    ],
    "afhq": [
        ("paper", EVERY, dict(resolution=64, augment=0.15)),
        *PAPER_PRIOR,
        ("paper", IMAGE, dict(images=25 * M, batch=256, lr=2e-4, dropout=0.25)),
    ],
    "ffhq": [
        ("paper", EVERY, dict(resolution=64, augment=0.15)),
        *PAPER_PRIOR,
        ("paper", IMAGE, dict(images=25 * M, batch=256, lr=2e-4, dropout=0.05)),
    ],
    "imagenet": [("paper", EVERY, dict(resolution=64)), *IMAGENET],
    "imagenet-class": [("paper", EVERY, dict(resolution=64, a="class")), *IMAGENET],
    "imagenet-latent": [
        ("paper", EVERY, dict(resolution=256, a="class", vae="stabilityai/sd-vae-ft-mse")),
        *IMAGENET,
    ],
}


def layers(dataset, stage, changes):
    """The layers of settings that make a configuration, [(source, settings)]; later ones win."""
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset} is unknown: choose one of {', '.join(PRESETS)}")
    if stage == "all":
        stage = "image"                               # the defaults that --help shows
    found = [(source, settings) for source, stages, settings in PRESETS[dataset] if stage in stages]
    preset = {name: value for _, settings in found for name, value in settings.items()}
    arch = changes.get("arch")
    if arch in ARCHITECTURES and arch != preset.get("arch", TrainConfig.arch):
        found.append(("EDM", ARCHITECTURES[arch]))    # another network has other sizes
    return [*found, ("you", changes)]


def sources(dataset, stage, changes):
    """{setting: where its value is from}, for `configure` with the same arguments."""
    found = {name: source for source, names in SOURCES.items() for name in names.split()}
    for source, settings in layers(dataset, stage, changes):
        found |= dict.fromkeys(settings, source)
    return found


def configure(dataset="shapes", stage="image", **changes):
    """The settings of one stage: the defaults, then the preset's, then `changes`. Raises UserError."""
    values, length = dict(dataset=dataset, stage=stage), TrainConfig.images
    for source, settings in layers(dataset, stage, changes):
        values |= settings
        if source != "you":
            length = values.get("images", length)
    config = TrainConfig(**values)
    if config.short and config.images < length:
        for name in ("lr_ramp", "ema_half_life"):
            if name not in changes:
                setattr(config, name, -(-getattr(config, name) * config.images // length))
    check(config)
    return config


def restore_config(saved):
    """A checkpoint's settings -> TrainConfig. Raises UserError for settings of another version."""
    try:
        config = TrainConfig(**saved)
        check(config)
        return config
    except TypeError:
        raise UserError("the checkpoint has settings that this version does not know: train again") from None


def check(config):
    """Raises UserError for settings that are out of range or do not go together."""
    for setting in dataclasses.fields(config):
        value, known = getattr(config, setting.name), setting.metadata
        flag = "--" + setting.name.replace("_", "-")
        if known["choices"] and value not in known["choices"]:
            raise UserError(f"{flag} {value} is unknown: choose one of {', '.join(known['choices'])}")
        low, high = known["low"], known["high"]
        numbers = value if isinstance(value, tuple) else (value,)
        if low is not None and not all(low <= number <= high for number in numbers):
            raise UserError(f"{flag} {value} is out of range: it must be at least {low} and at most {high}")
    twosdm.check_y(config.y)
    halved = 2 ** (len(config.mults) - 1) * (8 if config.vae else 1)
    heads = 64 if config.arch == "adm" else 4
    prior = math.lcm(4, config.prior_heads)
    shapes, joint = config.dataset == "shapes", config.stage == "joint"
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
        (config.a == "text" and not (shapes and config.stage == "prior"),
         "--a text is for --stage prior of shapes: captions are nowhere else, and the image model learns of "
         "them through y"),
        (config.a == "class" and config.y.startswith("kmeans"),
         "--y kmeans draws clusters regardless of a: --a none"),
        (config.y_dropout and twosdm.told_nothing(config.y),
         f"--y {config.y} leaves --y-dropout nothing to drop: leave one of them out"),
        (joint and (config.y != "clip" or config.y_dropout),
         "--stage joint learns y with the rest: leave --y and --y-dropout out"),
        (joint and (config.embedder == "pixels" or config.vae),
         "--stage joint trains an embedder of images: --embedder clip or shapes, no --vae"),
    ):
        if refused:
            raise UserError(sentence)


def whole_number(text):
    """'25M' -> 25000000: a whole number with an optional suffix k, M or G."""
    number = float(text.lower().replace("k", "e3").replace("m", "e6").replace("g", "e9"))
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def whole_numbers(text):
    return tuple(int(number) for number in text.split(","))


def add_flags(parser, config):
    """One flag per setting of a configuration, whose values --help shows as the defaults."""
    group, types = parser, {int: whole_number, tuple: whole_numbers}
    for setting in dataclasses.fields(config):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        default, choices = getattr(config, setting.name), setting.metadata["choices"]
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        options = dict(help=f"{setting.metadata['help']} (default: {default})".replace("%", "%%"))
        if setting.type is bool or setting.default is None:
            options["action"] = argparse.BooleanOptionalAction
            options["default"] = None
        else:
            options["type"] = types.get(setting.type, setting.type)
            options["metavar"] = "|".join(choices or ()) or setting.type.__name__.upper()
        group.add_argument("--" + setting.name.replace("_", "-"), **options)


# ============================================================================================================
# 2 What each stage trains
# ============================================================================================================
ADAM = dict(betas=(0.9, 0.999), eps=1e-8)              # no weight decay


def network(config, y_dim, a_dim, shape):
    """The network of a stage as plain numbers, for `twosdm.build_denoiser` and for checkpoints.

    y_dim, a_dim: of the embedding and the classes, 0 for none; shape (C, H, W) of images or latents.
    """
    augment_dim = twosdm.LABEL_DIM if config.augment else 0
    if config.stage == "prior":
        settings = dict(dim=y_dim, cond_dim=a_dim, augment_dim=augment_dim, width=config.prior_width,
                        depth=config.prior_depth, heads=config.prior_heads)
        return dict(net="prior", predict=config.prior_predicts, sigma_data=0.5, settings=settings)
    names = ("arch", "width", "mults", "blocks", "attention", "dropout")
    settings = {name: getattr(config, name) for name in names}
    settings |= dict(resolution=shape[1], channels=shape[0], cond_dim=y_dim + a_dim, augment_dim=augment_dim)
    return dict(net="unet", predict="edm", sigma_data=0.5, settings=settings)


class Stage:
    """What a stage offers to the loop: the `module` it trains and these methods.

    `model`: its networks as plain numbers; `compiled`: its networks; `extra`: further entries of checkpoints.
    """
    model, compiled, extra = dict(net="small-clip"), (), {}

    def random(self, rows):
        """All random numbers of a batch but dropout's, so its loss is the same in one part or several."""
        return {}

    def loss(self, rows, numbers):
        """Rows (B,) of the images and their random numbers -> (B,)."""
        raise AssertionError

    def finish(self, module):
        """After the last step, with the averaged weights -> what the log says of them."""
        return {}

    def preview(self, module):
        """With the averaged weights -> a picture (H, W, 3) uint8, or None."""


class Embedding(Stage):
    """The embedder's stage: the symmetric contrastive loss of images and captions (shapes only)."""

    def __init__(self, config, images, device):
        self.config, self.images, self.device = config, images, device
        self.captions = twosdm.shapes_captions(torch.arange(len(images)), config.seed)
        self.module = twosdm.SmallClip()

    def loss(self, rows, numbers):
        captions = [self.captions[row] for row in rows]
        return self.module.loss(self.images.batch(rows, self.device), captions)

    @torch.no_grad()
    def finish(self, module):
        """Scales the embedding to rms 0.5 over the training set; -> how well a linear probe reads it."""
        def embed(images):
            parts = np.array_split(np.arange(len(images)), -(-len(images) // 500))
            return torch.cat([module(images.batch(rows, self.device)).cpu() for rows in parts])

        seed, size = self.config.seed, len(self.images)
        known, fresh = torch.arange(size), torch.arange(size, size + 2000)
        y = embed(self.images)
        module.scale.mul_(0.5 / y.square().mean().sqrt())
        held_out = embed(twosdm.shapes_world(fresh, self.config.resolution, seed))
        y = F.pad(y * module.scale.cpu(), (0, 1), value=1)
        truth, wanted = twosdm.shapes_attributes(known, seed), twosdm.shapes_attributes(fresh, seed)
        accuracy = {}
        for name, kinds in twosdm.ATTRIBUTES.items():  # least squares from [y, 1] to the one-hot attribute
            probe = torch.linalg.lstsq(y, F.one_hot(truth[name], kinds).float()).solution
            guess = (F.pad(held_out, (0, 1), value=1) @ probe).argmax(1)
            accuracy[name] = round((guess == wanted[name]).float().mean().item(), 4)
        shown = ", ".join(f"{name} {share:.1%}" for name, share in accuracy.items())
        tqdm.write(f"a linear probe on held-out images reads {shown}")
        return dict(linear_probe=accuracy)


class Diffusion(Stage):
    """The stages of prior (Eq. 4), image model (Eq. 5) and baseline (Eq. 5 without y): one loss for all."""

    def __init__(self, config, images, device, embedder=None, autoencoder=None):
        self.config, self.images, self.device = config, images, device
        self.embedder, self.autoencoder = embedder, autoencoder
        self.augment = twosdm.Augment(config.augment) if config.augment else None
        if config.a == "class" and images.labels is None:
            raise UserError("--a class needs images in one folder per class, or a dataset.json with labels")
        self.classes = a_dim = len(images.classes) if config.a == "class" else 0
        self.bank = self.captions = None
        if embedder is not None and (config.stage == "prior" or not self.augment):
            self.prepare_embeddings(embedder)
        if config.a == "text":
            self.captions = caption_embeddings(embedder, config, len(images))
            a_dim = self.captions.shape[1]
        self.build(embedder.dim if embedder is not None else 0, a_dim)

    def prepare_embeddings(self, embedder):
        """The bank of e_i(x), and what turns its rows into y; of a prior also the mean of y."""
        config, self.reduce = self.config, nn.Identity()
        if config.y != "clip":
            embedder, self.reduce = embedder.inner, embedder.reduction.transform
        folder = Path(config.runs) / config.dataset
        bank = twosdm.embedding_bank(self.images, embedder, folder, self.augment, config.views, config.seed,
                                     self.device)
        self.views, self.bank = len(bank), bank.reshape(-1, bank.shape[-1])
        rms = self.embeddings(np.arange(min(1000, len(bank[0])))).square().mean().sqrt().item()
        print(f"the embedding's elements have rms {rms:.2f}"
              + (": far from sigma_data = 0.5, expect poor samples" if not 0.2 < rms < 1.2 else ""))
        if config.stage == "prior":                   # about which sample.py --temperature contracts
            plain = twosdm.embedding_bank(self.images, embedder, folder, device=self.device)[0]
            mean = plain[:, :-twosdm.LABEL_DIM].mean(0, keepdims=True, dtype=np.float64)
            self.extra = dict(y_mean=self.reduce(torch.from_numpy(mean).float().to(self.device))[0])

    def embeddings(self, rows):
        """Rows (B,) of the bank -> y (B, D)."""
        return self.reduce(twosdm.send(self.bank[rows, :-twosdm.LABEL_DIM], self.device))

    def build(self, y_dim, a_dim):
        """Makes the module to train."""
        self.model = network(self.config, y_dim, a_dim, self.images.shape)
        self.module = self.denoiser = twosdm.build_denoiser(self.model)
        if self.config.stage != "prior":
            self.denoiser.to(memory_format=torch.channels_last)
        self.compiled = [self.denoiser.net]

    def random(self, rows):
        numbers = dict(view=torch.randint(self.config.views, (len(rows),)))
        if self.augment:
            numbers["augment"] = self.augment.random(len(rows))
        shape = (self.denoiser.net.dim,) if self.config.stage == "prior" else self.images.shape
        like = torch.empty(len(rows), *shape, device=self.device)
        numbers["sigma"], numbers["eps"] = self.denoiser.training_noise(like)
        if self.images.latents is not None:
            numbers["latent"] = torch.randn_like(like)
        if self.config.y_dropout:
            told = torch.rand(len(rows), 1) >= self.config.y_dropout
            numbers["told"] = twosdm.send(told.float(), self.device)
        return numbers

    def loss(self, rows, numbers):
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):     # only networks round
            x, y, label = self.example(rows, numbers)
        a, noise = self.condition(rows), (numbers["sigma"], numbers["eps"])
        if self.config.stage == "prior":
            return self.denoiser.loss(y, a, label, noise)                         # Eq. 4
        return self.denoiser.loss(x, twosdm.join(y, a), label, noise)             # Eq. 5

    def example(self, rows, numbers):
        """x (B, C, H, W), which the prior does without; y (B, D), of no embedder None; the labels (B, 9)."""
        if self.config.stage == "prior":
            rows = numbers["view"].numpy() % self.views * len(self.images) + rows
            label = twosdm.send(self.bank[rows, -twosdm.LABEL_DIM:], self.device)
            return None, self.embeddings(rows), label if self.augment else None
        x, label = self.pictures(rows, numbers)
        y = None
        if self.bank is not None:
            y = self.embeddings(rows)
        elif self.embedder is not None:
            y = self.embedder(x)                      # of the augmented image
        if y is not None and "told" in numbers:
            y = y * numbers["told"]
        return x, y, label

    def pictures(self, rows, numbers):
        """What the image model learns: images or latents (B, C, H, W), augmentation labels (B, 9) or None."""
        if self.images.latents is not None:
            moments = twosdm.send(self.images.latents[rows], self.device)
            return self.autoencoder.sample(moments, numbers["latent"]), None
        x = self.images.batch(rows, self.device)
        return self.augment(x, numbers["augment"]) if self.augment else (x, None)

    def condition(self, rows):
        """a of these images: (B, A), classes as one-hots or the captions' embeddings; None for neither."""
        if self.captions is not None:
            return twosdm.send(self.captions[rows], self.device)
        if self.classes:
            labels = twosdm.send(self.images.labels[rows], self.device)
            return F.one_hot(labels, self.classes).float()

    @torch.no_grad()
    def preview(self, module):
        """A grid of samples: 18 steps, no churn; the image model draws after training images' embeddings."""
        if self.config.stage == "prior":
            return None
        side = 8 if self.config.resolution < 64 else 4
        rows = np.arange(side * side) * 7919 % len(self.images)           # a prime: from all over the set
        x = self.samples(module, rows, twosdm.Sampler(steps=18, s_churn=0))
        if self.autoencoder is not None:
            x = self.autoencoder.decode(x)
        return twosdm.image_grid(twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy(), side)

    def samples(self, module, rows, sampler):
        y = None if self.embedder is None else self.embedder(self.images.batch(rows, self.device))
        noise = twosdm.image_noise(range(len(rows)), self.device)
        return twosdm.sample_images(module, noise, y, self.condition(rows), sampler)


class Joint(Diffusion):
    """Overfit-2SDM (Appendix B): embedder, prior and image model are trained together, on Eq. 4 + Eq. 5.

    The embedder starts from random weights and learns from both losses through y. A sum of losses has the
    gradient that the paper accumulates in two passes before its one step.
    """

    def build(self, y_dim, a_dim):
        embedder = untrained(self.config)
        embedder.requires_grad_(False)                # the text side stays as it is
        image_tower(embedder).requires_grad_(True)
        self.model = dict(net="joint")
        for stage in ("prior", "image"):
            config = dataclasses.replace(self.config, stage=stage)
            self.model[stage] = network(config, embedder.dim, a_dim, self.images.shape)
        self.prior = twosdm.build_denoiser(self.model["prior"])
        self.denoiser = twosdm.build_denoiser(self.model["image"]).to(memory_format=torch.channels_last)
        self.module = nn.ModuleDict(dict(prior=self.prior, image=self.denoiser, embedder=embedder))
        self.compiled = [self.prior.net, self.denoiser.net]

    def random(self, rows):
        numbers = super().random(rows)
        like = torch.empty(len(rows), self.prior.net.dim, device=self.device)
        numbers["prior_sigma"], numbers["prior_eps"] = self.prior.training_noise(like)
        return numbers

    def loss(self, rows, numbers):
        a = self.condition(rows)
        x, label = self.pictures(rows, numbers)
        y = self.module["embedder"](x).float()        # not bf16, as it is what the prior is to predict
        prior = self.prior.loss(y, a, label, (numbers["prior_sigma"], numbers["prior_eps"]))
        image = self.denoiser.loss(x, twosdm.join(y, a), label, (numbers["sigma"], numbers["eps"]))
        return prior + image

    def samples(self, module, rows, sampler):
        seeds = range(len(rows))
        return twosdm.sample_two_stage(module["prior"], module["image"], seeds, self.condition(rows), sampler)


def untrained(config):
    """The embedder that the joint stage starts from: CLIP, or the shapes' small CLIP, with random weights."""
    return twosdm.SmallClip() if config.embedder == "shapes" else twosdm.ClipEmbedder(None)


def image_tower(embedder):
    return embedder.image if embedder.name == "shapes" else embedder.model.visual


# ============================================================================================================
# 3 The loop
# ============================================================================================================
@functools.lru_cache(maxsize=2)
def permutation(size, seed, epoch):
    """(size,) int64: in which order an epoch shows its examples."""
    generator = torch.Generator().manual_seed(twosdm.mix_seed("order", seed, epoch))
    return torch.randperm(size, generator=generator).numpy()


def shuffled(size, seed, start, stop):
    """Positions start to stop of an endless shuffling -> rows (stop - start,), of these numbers alone."""
    return np.array([permutation(size, seed, i // size)[i % size] for i in range(start, stop)])


class Run:
    """One stage's training: its networks, how far it is, its log; all that its checkpoint keeps."""

    def __init__(self, config, stage, packed, device):
        self.config, self.stage, self.packed = config, stage, packed
        self.folder = run_folder(config)
        self.module = stage.module.to(device).train()
        self.ema = twosdm.EMA(self.module, config.ema_half_life, config.ema_ramp)
        self.optimizer = torch.optim.Adam(self.module.parameters(), config.lr, fused=device.type != "mps",
                                          **ADAM)
        self.seen, self.seconds, self.log = 0, 0.0, []

    def restore(self, checkpoint):
        self.module.load_state_dict(checkpoint["net"])
        self.ema.net.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.seen, self.seconds, self.log = (checkpoint[name] for name in ("seen", "seconds", "log"))

    def save(self, name="checkpoint.pt"):
        """All that samples need; of a checkpoint, not of a snapshot, also what training goes on from."""
        config, images, counts, more = self.config, self.stage.images, None, {}
        if images.labels is not None:
            counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        if name == "checkpoint.pt":
            more = dict(net=self.module.state_dict(), optimizer=self.optimizer.state_dict())
        twosdm.save_checkpoint(
            self.folder / name,
            stage=config.stage,
            dataset=config.dataset,
            config=dataclasses.asdict(config),
            model=self.stage.model,
            embedder=self.packed,
            fingerprints=fingerprints(images, self.packed),
            data=dict(name=config.dataset, path=config.data, count=len(images), classes=images.classes,
                      class_counts=counts, fingerprint=images.fingerprint),
            seen=self.seen,
            seconds=self.seconds,
            log=self.log,
            ema=self.ema.net.state_dict(),
            **self.stage.extra,
            **more,
        )

    def write_log(self):
        """log.jsonl, whole: what a killed run had written after its checkpoint is gone from it."""
        with twosdm.written(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in self.log)

    def preview(self):
        picture = self.stage.preview(self.ema.net)
        if picture is not None:
            twosdm.save_picture(self.folder / f"samples-{self.seen:09d}.png", picture, least=512)

    def reached(self, every):
        """Whether the last batch reached a multiple of `every` images, or the end; never if that is 0."""
        last = self.seen >= self.config.images
        return every > 0 and (last or self.seen // every > (self.seen - self.config.batch) // every)


def loop(run, device):
    """Trains a run to config.images images seen. Returns False if it was asked to stop."""
    config, stage, module = run.config, run.stage, run.module
    precision = twosdm.set_precision(config.precision, device, auto="bf16")
    # The processes of torchrun share each batch; all but the first are silent and write nothing. The
    # contrastive loss compares all examples of a batch: it cannot be split, and each process trains it alone.
    whole, first = config.stage == "embedder", twosdm.rank() == 0
    team, me = (1, 0) if whole else (twosdm.processes(), twosdm.rank())
    start, stop = config.batch * me // team, config.batch * (me + 1) // team
    size = stop - start if whole else config.batch_gpu or stop - start
    parts = [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
    losses, norms = [], []
    bar = tqdm(total=config.images, initial=run.seen, desc=f"{config.stage:>8}", unit=" images",
               unit_scale=True, smoothing=0.02)
    with bar, stop_signals() as asked:
        while run.seen < config.images:
            # All randomness follows from (seed, images seen): a resumed run repeats what the first would do.
            torch.manual_seed(twosdm.mix_seed("step", config.seed, run.seen))
            began = time.perf_counter()
            rows = shuffled(len(stage.images), config.seed, run.seen, run.seen + config.batch)
            numbers = stage.random(rows)
            # A linear ramp, then constant; it counts this batch, so that the first step is not one of size 0.
            ramp = min((run.seen + config.batch) / max(config.lr_ramp, 1), 1)
            run.optimizer.param_groups[0]["lr"] = config.lr * ramp
            run.optimizer.zero_grad(set_to_none=True)
            for part in parts:
                if config.dropout:                    # the masks differ with the way a batch is split
                    torch.manual_seed(twosdm.mix_seed("dropout", config.seed, run.seen, part.start))
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = stage.loss(rows[part], {name: n[part] for name, n in numbers.items()})
                (loss.sum() / config.batch).backward()
                losses.append(loss.detach())
            norms.append(finish_gradients(module, team))
            run.optimizer.step()
            run.ema.update(module, run.seen, config.batch)
            run.seen += config.batch
            run.seconds += time.perf_counter() - began
            bar.update(config.batch)
            last = run.seen >= config.images
            stopped = agreed(asked, team, run.seen // config.batch % 8 == 0 or last)
            if run.reached(config.log):
                line = log_line(losses, norms, team, run)
                losses, norms = [], []
                bar.set_postfix_str(f"loss {line['loss']:.4g}")
                if last:
                    line |= stage.finish(run.ema.net)
                run.log.append(line)
                if first:
                    run.write_log()
            # What a checkpoint counts is there before it.
            if first and run.reached(config.snapshots):
                run.save(f"snapshot-{run.seen:010d}.pt")
            if first and run.reached(config.preview):
                run.preview()
            if first and (run.reached(config.save) or stopped):
                run.save()
            if stopped:
                return False
    return True


def finish_gradients(module, team):
    """Adds up the processes' gradients and replaces NaN and infinity, as EDM does -> the norm before that."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if team > 1:
        torch.distributed.all_reduce(flat)
    norm = flat.norm()
    # Without a look at it first, which would wait for the GPU.
    torch.nan_to_num(flat, nan=0.0, posinf=1e5, neginf=-1e5, out=flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))
    return norm


def log_line(losses, norms, team, run):
    """A line of log.jsonl, of all measured by the team since the last. UserError if nothing is finite."""
    loss, norm = torch.cat(losses).float().cpu(), torch.stack(norms).cpu()
    if team > 1:
        loss = torch.cat(twosdm.gather(loss))
    finite = norm.isfinite()
    if not finite.any() or not loss.isfinite().any():
        raise UserError("the loss is not finite any more: give a lower --lr or --precision fp32; the last "
                        "checkpoint is from before, and the same command goes on from it")
    before = run.log[-1] if run.log else dict(images=0, seconds=0.0)
    rate = (run.seen - before["images"]) / (run.seconds - before["seconds"])
    return dict(images=run.seen, loss=loss[loss.isfinite()].mean().item(), seconds=run.seconds,
                images_per_second=round(rate, 1), gradient_norm=norm[finite].mean().item(),
                nonfinite=int((~finite).sum()))


@contextlib.contextmanager
def stop_signals():
    """While it lasts, SIGTERM or Ctrl-C only ask: finish the step, save, leave. The second leaves at once."""
    asked, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number, frame):
        asked.append(number)
        restore()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


def agreed(asked, team, meeting):
    """Whether to stop after this step; several processes agree on that where they meet."""
    if team == 1:
        return bool(asked)
    return meeting and any(twosdm.gather(bool(asked)))


# ============================================================================================================
# 4 What a run starts from
# ============================================================================================================
def run_folder(config):
    return Path(config.runs) / config.dataset / twosdm.run_name(config.stage, config.y, config.a, config.tag)


def train(config, device):
    """One stage, from its checkpoint if any. Returns False if it was asked to stop."""
    path = run_folder(config) / "checkpoint.pt"
    checkpoint = twosdm.load_checkpoint(path, stage=config.stage) if path.exists() else None
    twosdm.gather(None)                               # no process writes before all have read
    if checkpoint:
        same_settings(checkpoint, config, path)
    if config.batch < twosdm.processes():
        raise UserError(f"--batch {config.batch} cannot be shared by {twosdm.processes()} processes")
    autoencoder = twosdm.Autoencoder(config.vae).to(device) if config.vae else None
    images = twosdm.load_images(config, autoencoder)
    if checkpoint and checkpoint["fingerprints"]["images"] != images.fingerprint:
        raise UserError(f"{path} was trained with other images: give the same ones, or another --runs folder")
    if checkpoint and checkpoint["seen"] >= config.images:
        print(f"{config.stage}: done, {checkpoint['seen']:,} images seen ({path})")
        return True
    torch.manual_seed(config.seed)
    packed = embedder = None
    if config.stage == "embedder":
        stage = Embedding(config, images, device)
    else:
        if config.stage in ("prior", "image"):
            embedder = get_embedder(config, images, device)
        packed = twosdm.pack_embedder(embedder) if embedder is not None else None
        kind = Joint if config.stage == "joint" else Diffusion
        stage = kind(config, images, device, embedder, autoencoder)
    if config.init_from and not checkpoint:
        model = stage.model.get("image", stage.model)
        twosdm.init_from_edm(stage.denoiser, model["settings"], config.init_from, stage.classes)
    run = Run(config, stage, packed, device)
    if checkpoint:
        if checkpoint["fingerprints"] != fingerprints(images, packed):
            raise UserError(f"{path} was trained with another embedder: give the same one, or another --runs "
                            f"folder")
        with twosdm.reading(path, "move it away and train again"):
            run.restore(checkpoint)
    checkpoint = None                                 # gigabytes, for the largest networks
    for net in stage.compiled:
        twosdm.compile_network(net, config.compile, device)
    finished = loop(run, device)
    twosdm.gather(None)                               # what the first process saved is there for all
    if not finished:
        print(f"stopped at {run.seen:,} images and saved {path}: the same command goes on from there",
              file=sys.stderr)
        return False
    print(f"{config.stage}: {run.seen:,} images in {run.seconds:.0f} s -> {run.folder}")
    if run.log[-1]["loss"] > 2 * run.log[0]["loss"]:
        print("Warning: the loss has grown since the start: give a lower --lr", file=sys.stderr)
    return True


def fingerprints(images, packed):
    """What tells the images and the embedder of a run from others."""
    return dict(images=images.fingerprint, embedder=packed and packed["fingerprint"])


def same_settings(checkpoint, config, path):
    """Refuses to go on with a run under other settings than it began with."""
    for name in IDENTITY[config.stage].split():
        old, new = checkpoint["config"].get(name), getattr(config, name)
        if old != new:
            raise UserError(f"{path} was trained with --{name.replace('_', '-')} {old or 'none'}, not "
                            f"{new or 'none'}: use its settings (--short makes some of --images), or keep "
                            f"both by --tag NAME or another --runs folder")


def get_embedder(config, images, device):
    """The embedder as the image model knows it: whole, reduced by PCA or K-means (fitted once), or None."""
    if twosdm.told_nothing(config.y):
        return None
    embedder, folder = whole_embedder(config, images).to(device), Path(config.runs) / config.dataset
    if config.y == "clip":
        return embedder

    def fit():
        bank = twosdm.embedding_bank(images, embedder, folder, device=device)
        rows = torch.from_numpy(bank[0, :, :-twosdm.LABEL_DIM].copy())
        return twosdm.fit_reduction(config.y, rows, config.seed)

    name = f"{config.y.replace(':', '')}-{twosdm.fingerprint(embedder)}-{images.fingerprint}-{config.seed}.pt"
    return twosdm.Reduced(embedder, fitted(folder / "reductions" / name, images, fit)).to(device)


def whole_embedder(config, images):
    """e_i, frozen: public CLIP, the shapes' small CLIP (trained before) or a PCA of pixels (fitted here)."""
    path = Path(config.runs) / config.dataset / "embedder" / "checkpoint.pt"
    if config.embedder == "clip":
        return twosdm.ClipEmbedder(config.clip_weights)
    if config.embedder == "pixels":
        return twosdm.Reduced(twosdm.Pixels(config.resolution),
                              fitted(path, images, lambda: twosdm.fit_pixels(images)))
    if config.dataset != "shapes":
        raise UserError("--embedder shapes knows only the embedded world: choose clip or pixels")
    if not path.exists():
        raise UserError("the embedder of shapes is not trained yet: python train.py --stage embedder")
    checkpoint = twosdm.load_checkpoint(path, stage="embedder")
    if checkpoint["seen"] < checkpoint["config"]["images"]:
        raise UserError("the embedder of shapes is half trained: python train.py --stage embedder goes on")
    return twosdm.trained_clip(checkpoint)


def fitted(path, images, fit):
    """The reduction that fit() gives, fitted by one process once and kept in a file. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with twosdm.locked(path.with_suffix(".lock")):
        if not path.exists():
            state = fit().state_dict()
            twosdm.save_checkpoint(path, stage="reduction", images=images.fingerprint, state=state)
    checkpoint = twosdm.load_checkpoint(path, stage="reduction")
    if checkpoint["images"] != images.fingerprint:
        raise UserError(f"{path} belongs to other images or another resolution: give another --runs folder")
    return twosdm.restore_reduction(checkpoint["state"])


def caption_embeddings(embedder, config, count):
    """The text side's embedding of every training image's caption, brought to rms 0.5: (N, D) float32."""
    clip = embedder.inner if config.y != "clip" else embedder
    if clip.name != "shapes":
        raise UserError("--a text needs the small CLIP of shapes: leave --embedder out")
    captions = twosdm.shapes_captions(torch.arange(count), config.seed)
    with torch.no_grad():
        return clip.text_condition(captions).cpu().numpy()


# ============================================================================================================
# 5 The command line
# ============================================================================================================
def main():
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--dataset", default="shapes")
    early.add_argument("--stage", default="all")
    known, _ = early.parse_known_args()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"The defaults are those of --dataset {known.dataset} --stage {known.stage} (all: image); "
               f"others have others. Data sets: {', '.join(PRESETS)}.")
    add_flags(parser, configure(known.dataset, known.stage))
    parser.add_argument("--dry-run", action="store_true",
                        help="print every setting with its source, and parameter counts, as JSON")
    args = vars(parser.parse_args())
    dry_run = args.pop("dry_run")
    changes = {name: value for name, value in args.items()
               if value is not None and name not in ("dataset", "stage")}
    stages = [known.stage]
    if known.stage == "all":
        stages = [stage for stage in STAGES if not (stage == "embedder" and known.dataset != "shapes")]
    elif known.stage == "embedder" and known.dataset != "shapes":
        raise UserError("only the embedder of shapes is trained: leave --stage embedder out")
    y = changes.get("y", "clip")
    twosdm.check_y(y)
    if not twosdm.has_prior(y):
        if known.stage == "prior":
            raise UserError(f"--y {y} leaves the prior nothing to learn: clusters are drawn by frequency")
        stages = [stage for stage in stages if stage != "prior"]
    configs = [configure(known.dataset, stage, **changes) for stage in stages]
    if dry_run:
        for i, config in enumerate(configs):          # a list of objects, one line for each setting
            lines = [f'"{name}": {json.dumps(entry)}' for name, entry in describe(config, changes).items()]
            print("[{" if i == 0 else ",{", ",\n  ".join(lines), "}")
        print("]")
        return 0
    device = twosdm.pick_device(configs[0].device)
    twosdm.join_processes(device)
    together = f", {twosdm.processes()} processes" if twosdm.processes() > 1 else ""
    print(f"{known.dataset}: {', '.join(stages)} on {device}{together}")
    for config in configs:
        if config.short:
            print(f"{config.stage}, --short: step size rises over {config.lr_ramp:,} images, EMA half-life "
                  f"{config.ema_half_life:,} images")
        folder = run_folder(config)
        with contextlib.ExitStack() as held:
            if twosdm.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                busy = f"another process is training {folder}: wait for it, or give another --runs folder"
                held.enter_context(twosdm.locked(folder / "lock", busy))
                twosdm.clear_unfinished(folder)
            if not train(config, device):
                return 130
    if known.stage == "all":
        where = f" --runs {configs[0].runs} --dataset {known.dataset}" if len(sys.argv) > 1 else ""
        print(f"Next: python sample.py{where}, then python evaluate.py{where}")
    return 0


def describe(config, changes):
    """What --dry-run prints of a stage: each setting with its source, the number of parameters."""
    side, stages = config.resolution, [config.stage]
    y_dim = dict(clip=512, pixels=min(64, 3 * min(side, 32)**2), shapes=64)[config.embedder]
    a_dim = y_dim if config.a == "text" else count_classes(config)
    if config.stage == "baseline" or twosdm.told_nothing(config.y):
        y_dim = 0
    elif ":" in config.y:
        y_dim = int(config.y.split(":")[1])
    shape = (4, side // 8, side // 8) if config.vae else (3, side, side)
    with torch.device("meta"):                        # shapes without contents: instant at any size
        modules = []
        if config.stage == "joint":
            modules, stages = [image_tower(untrained(config))], ["prior", "image"]
        if config.stage == "embedder":
            modules, stages = [twosdm.SmallClip()], []
        for stage in stages:
            model = network(dataclasses.replace(config, stage=stage), y_dim, a_dim, shape)
            modules.append(twosdm.build_denoiser(model))
    values, whence = dataclasses.asdict(config), sources(config.dataset, config.stage, changes)
    for function in (twosdm.Denoiser, twosdm.sigma_schedule, twosdm.Sampler):   # what no flag changes
        for name, parameter in inspect.signature(function).parameters.items():
            if name in ("sigma_data", "p_mean", "p_std", "sigma_min", "sigma_max", "rho", "s_noise"):
                values[name], whence[name] = parameter.default, "EDM"
    for name, value in ADAM.items():
        values["adam_" + name], whence["adam_" + name] = value, "EDM"
    values["parameters"] = sum(p.numel() for module in modules for p in module.parameters())
    whence["parameters"] = "counted"
    if config.short:
        for name in {"lr_ramp", "ema_half_life"} - changes.keys():
            whence[name] = f"{whence[name]}, scaled by --short"
    return {name: dict(value=value, source=whence.get(name, "ours")) for name, value in values.items()}


def count_classes(config):
    """The number of classes that a configuration uses, without preparing its data."""
    if config.a != "class":
        return 0
    if config.dataset in CLASSES:
        return CLASSES[config.dataset]
    if not config.data:
        raise UserError("--a class: to count the classes add --data FOLDER_OR_ZIP")
    return len(twosdm.ImageFiles(config.data).classes)


if __name__ == "__main__":
    twosdm.run(main)
