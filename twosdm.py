"""Two-stage diffusion models (2SDM): sample what the image is about, then sample the image.

A diffusion model of images spends much of its effort on deciding *what* to draw. 2SDM splits that decision
off: a small diffusion model (the prior) samples a CLIP image embedding y, an EDM diffusion model samples the
image x given y, and y is thrown away. In the paper's equations (Harvey and Wood, *Visual Chain-of-Thought
Diffusion Models*, arXiv 2303.16187, and its full version, *Two-stage diffusion models*):

    p(x|a) = E_{p(y|a)} p(x|y,a)                                                                     (Eq. 2)
           ≈ E_{p_φ(y|a)} p_θ(x|y,a)           y from the prior, x from the image model, forget y    (Eq. 3)

The law of the training data is p(x,y,a) = p(x,a) δ(y - e_i(x)): y is computed from x, nobody labels anything.

Glossary
    B, C, H, W   batch, channels, height, width          D       dimension of an embedding
    x            an image, (B, C, H, W) in [-1, 1]       y       its embedding e_i(x), (B, D), rms about 0.5
    a            what the user conditions on, (B, A):    sigma   standard deviation of the noise, (B,)
                 nothing, or the class as a one-hot      D(x; σ) the denoiser: E[clean | noisy]
    EDM          Karras et al. 2022, *Elucidating the Design Space of Diffusion-Based Generative Models*

Reading order: 1 configuration, 2 diffusion, 3 sampling, 4 two stages, 5 shared layers, 6 prior transformer,
7 U-Net, 8 embeddings, 9 data, 10 plumbing, 11 preparing images, 12 EDM's files. Sections 2 to 4 are the
method; 5 to 9 are what it stands on; 10 to 12 can be left unread.
"""
import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import posixpath
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm


class UserError(Exception):
    """A mistake that only the user can mend: one sentence with the remedy, printed without a traceback."""


# ============================================================================================================
# 1 Configuration
# ============================================================================================================
# The vocabulary of the embedded world: what its images show and its captions say.
SHAPES = ("circle", "ring", "square", "triangle", "cross", "star")
COLOURS = dict(red=0, orange=30, yellow=55, green=120, cyan=180, blue=225, purple=275, pink=325)   # hue in °
COUNTS = ("one", "two", "three", "four")
ATTRIBUTES = dict(shape=len(SHAPES), colour=len(COLOURS), background=len(COLOURS), count=len(COUNTS))


def option(default, help, low=None, high=None, choices=None, fixed=True, source="ours"):
    """A setting: meaning, bounds, whether a run keeps it for life (fixed), and where its default is from."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, fixed=fixed,
                                                source=source))


PRECISIONS = ("fp32", "tf32", "bf16")
STAGES = ("embedder", "prior", "image", "baseline")     # what --stage all trains


@dataclass
class TrainConfig:
    """All that determines a training run. Each field is a flag of train.py; presets change some defaults."""
    stage: str = option("all", "what to train; all = whatever is missing, in this order",
                        choices=("all", *STAGES, "joint"))
    dataset: str = option("shapes", "the preset: the data set and the settings that go with it")
    recipe: str = option("paper", "whose hyperparameters, where the paper and its authors' code differ",
                         choices=("paper", "authors"), fixed=False)
    data: str = option("", "folder or zip with the images (shapes draws its own, cifar10 is downloaded)",
                       fixed=False)
    resolution: int = option(16, "height and width of the images, in pixels", low=4)
    size: int = option(20_000, "number of training images of shapes", low=1)
    limit: int = option(0, "train on so many of the images, drawn at random; 0 = all", low=0)
    skip_bad: bool = option(False, "leave out images that cannot be read instead of stopping", fixed=False)
    embedder: str = option("clip", "what y is: OpenAI's CLIP ViT-B/32, a PCA of the pixels, or a small CLIP "
                           "of the shapes", choices=("clip", "pixels", "shapes"), source="paper")
    clip_weights: str = option("openai", "'openai', which open_clip downloads, or a file", fixed=False)
    y: str = option("clip", "what of the embedding is used: all of it (clip), its first D principal "
                    "components (pca:D), which of K clusters it is in (kmeans:K), nothing (none)")
    y_dropout: float = option(0.0, "how often the image model is not told y, for guidance in sampling",
                              low=0, high=1)
    a: str = option("none", "what the user conditions on: nothing, the class, or (the prior of shapes alone) "
                    "the caption's text embedding", choices=("none", "class", "text"))
    vae: str = option("", "diffuse in the latent space of this Stable Diffusion VAE, a hub's name or a "
                      "folder", fixed=False)
    # The prior
    prior_width: int = option(512, "width of the prior's tokens", low=1, source="authors")
    prior_depth: int = option(6, "number of transformer blocks of the prior", low=1, source="authors")
    prior_heads: int = option(8, "number of attention heads of the prior", low=1, source="authors")
    prior_predicts: str = option("data", "the prior's output: y itself, or as EDM's networks (Departure)",
                                 choices=("data", "edm"), source="paper")
    # The image network
    arch: str = option("ddpm++", "U-Net of the image model and the baseline", choices=("ddpm++", "adm"),
                       source="paper")
    width: int = option(128, "channels of the U-Net at its finest level, divisible by 4", low=4, source="EDM")
    mults: tuple = option((1, 2, 2, 2), "channel multiplier of each level", source="EDM")
    blocks: int = option(4, "residual blocks per level", low=1, source="EDM")
    attention: tuple = option((16,), "resolutions with self-attention", source="EDM")
    dropout: float = option(0.0, "dropout in the U-Net", low=0, high=0.99)
    init_from: str = option("", "EDM's .pkl whose weights the image model or baseline starts from")
    # Training
    images: int = option(25_000_000, "length of each stage's training, in images seen", low=1, fixed=False)
    batch: int = option(256, "images per optimiser step", low=1)
    batch_gpu: int = option(0, "images per forward pass, to save memory; 0 = the whole batch",
                            low=0, fixed=False)
    lr: float = option(2e-4, "Adam's step size after the ramp", low=0, high=1)
    lr_ramp: int = option(10_000_000, "images over which the step size rises from 0", low=0, source="EDM")
    ema_half_life: int = option(500_000, "half-life of the weights' moving average, in images", low=0,
                                source="EDM")
    ema_ramp: float = option(0.05, "half-life at most this share of the images seen", low=0, source="EDM")
    short: bool = option(False, "a run shorter than the preset's: scale with --images the ramp of the step "
                         "size, the EMA's half-life and the intervals of logs, pictures and checkpoints",
                         fixed=False)
    augment: float = option(0.0, "probability of each geometric augmentation", low=0, high=1)
    views: int = option(32, "augmented views per image that the prior is trained on", low=1)
    seed: int = option(0, "seed of everything random", low=0, high=2**31)
    # Defaults of sampling, kept in the checkpoint
    steps: int = option(40, "sampling steps (2·steps - 1 network evaluations)", low=2, fixed=False,
                        source="paper")
    churn: float = option(50.0, "S_churn of the sampler; 0 = deterministic", low=0, high=1e9, fixed=False,
                          source="paper")
    # The machine
    device: str = option("auto", "auto = cuda, else mps, else cpu", fixed=False)
    precision: str = option("auto", "of the networks' arithmetic, weights stay fp32; auto = bf16 on cuda, "
                            "else fp32", choices=("auto", *PRECISIONS), fixed=False)
    compile: bool | None = option(None, "torch.compile the network; unset = on cuda", fixed=False)
    runs: str = option("runs", "folder of all runs", fixed=False)
    tag: str = option("", "suffix for the run's folder, to keep a variant beside others", fixed=False)
    log: int = option(50_000, "images between lines of log.jsonl", low=1, fixed=False)
    preview: int = option(1_000_000, "images between pictures of samples, which the image model draws after "
                          "embeddings of training images; 0 = none", low=0, fixed=False)
    save: int = option(500_000, "images between checkpoints", low=1, fixed=False)
    snapshots: int = option(0, "images between snapshots of the averaged weights, which are kept for "
                            "evaluate.py --history; 0 = none", low=0, fixed=False)


K, M = 1_000, 1_000_000
ARCHITECTURES = {                                     # EDM's networks for 64×64 images
    "ddpm++": dict(width=128, mults=(1, 2, 2, 2), blocks=4, attention=(16,)),
    "adm": dict(width=192, mults=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8)),
}
# Settings by data set, in layers (source, stages, settings), of which later ones win. Sources: the paper, its
# authors' code where the paper is silent, EDM, or ours. Layers of "image" hold for the baseline as well.
EVERY, IMAGE = (*STAGES, "joint"), ("image", "baseline", "joint")
SMALL_PRIOR = dict(lr=1e-3, prior_width=128, prior_depth=3, prior_heads=4)
PAPER_PRIOR = [("authors", ("prior",), dict(batch=256, lr=1e-4)),
               ("ours", ("prior",), dict(images=100 * M))]                     # the paper: a day on a V100
IMAGENET = [("paper", EVERY, dict(augment=0.0)), ("EDM", IMAGE, dict(dropout=0.10, **ARCHITECTURES["adm"])),
            ("paper", IMAGE, dict(arch="adm", batch=128, lr=1e-4)),
            ("ours", IMAGE, dict(ema_half_life=500 * K)),      # EDM's 50 M belong to its 2,500 M images
            *PAPER_PRIOR]
PRESETS = {
    "shapes": [
        ("ours", EVERY, dict(embedder="shapes", lr_ramp=4 * K, log=2 * K, preview=12 * K, save=6 * K,
                             steps=18, churn=0.0, views=1)),
        ("ours", ("embedder",), dict(images=40 * K, lr=2e-3)),
        ("ours", ("prior", "joint"), dict(images=250 * K, **SMALL_PRIOR)),
        ("ours", IMAGE, dict(images=44 * K, batch=32, lr=4e-3, width=24, mults=(1, 2, 2), blocks=1,
                             attention=(4,), snapshots=11 * K))],
    "folder": [                                       # minutes on a CPU; on a GPU, give the U-Net more width
        ("EDM", EVERY, dict(augment=0.15)),
        ("ours", EVERY, dict(resolution=32, lr_ramp=4 * K, log=2 * K, preview=6 * K, save=6 * K)),
        ("ours", ("prior", "joint"), dict(images=400 * K, **SMALL_PRIOR)),
        ("ours", IMAGE, dict(images=50 * K, batch=32, lr=2e-3, width=24, mults=(1, 2, 2), blocks=1,
                             attention=(8,), dropout=0.05))],
    "cifar10": [
        ("EDM", EVERY, dict(resolution=32, a="class", augment=0.12)), *PAPER_PRIOR,
        ("EDM", IMAGE, dict(images=200 * M, batch=512, lr=1e-3, dropout=0.13, mults=(2, 2, 2)))],
    "afhq": [
        ("paper", EVERY, dict(resolution=64, augment=0.15)), *PAPER_PRIOR,
        ("paper", IMAGE, dict(images=25 * M, batch=256, lr=2e-4, dropout=0.25))],
    "ffhq": [
        ("paper", EVERY, dict(resolution=64, augment=0.15)), *PAPER_PRIOR,
        ("paper", IMAGE, dict(images=25 * M, batch=256, lr=2e-4, dropout=0.05))],
    "imagenet": [("paper", EVERY, dict(resolution=64)), *IMAGENET],
    "imagenet-class": [("paper", EVERY, dict(resolution=64, a="class")), *IMAGENET],
    "imagenet-latent": [("paper", EVERY, dict(resolution=256, a="class", vae="stabilityai/sd-vae-ft-mse")),
                        *IMAGENET],
}
AUTHORS = dict.fromkeys(("afhq", "ffhq"), ("authors", IMAGE, dict(batch=128, lr=1e-4, dropout=0.05)))


SCALED = ("lr_ramp", "ema_half_life", "log", "preview", "save", "snapshots")             # by --short


def layers(dataset, stage, changes):
    """The layers of settings that make a configuration, [(source, settings)]; later ones win."""
    if dataset not in PRESETS:
        raise UserError(f"--dataset {dataset} is unknown: choose one of {', '.join(PRESETS)}")
    preset = list(PRESETS[dataset])
    if changes.get("recipe") == "authors":
        if dataset not in AUTHORS:
            raise UserError(f"--recipe authors: for {dataset} the authors' hyperparameters are not known or "
                            f"not others than the paper's: leave the flag away")
        preset.append(AUTHORS[dataset])
    stages = "image" if stage == "all" else stage
    found = [(source, settings) for source, where, settings in preset if stages in where]
    arch = next((settings["arch"] for _, settings in reversed(found) if "arch" in settings), "ddpm++")
    if changes.get("arch", arch) != arch:             # another net has other sizes
        found.append(("EDM", ARCHITECTURES.get(changes["arch"], {})))
    return [*found, ("you", dict(dataset=dataset, stage=stage) | changes)]


def sources(dataset, stage, **changes):
    """{setting: where its value is from}, for `configure` with the same arguments."""
    defaults = {f.name: f.metadata["source"] for f in dataclasses.fields(TrainConfig)}
    return defaults | {name: source for source, settings in layers(dataset, stage, changes)
                       for name in settings}


def configure(dataset="shapes", stage="image", **changes):
    """The settings of one stage: the defaults, then the preset's, then `changes`. Raises UserError."""
    chosen, length = {}, TrainConfig.images
    for source, settings in layers(dataset, stage, changes):
        chosen |= settings
        length = length if source == "you" else chosen.get("images", length)
    config = TrainConfig(**chosen)
    if config.short:
        for name in SCALED:
            if name not in changes:
                scaled = -(-getattr(config, name) * config.images // length)
                setattr(config, name, min(scaled, getattr(config, name)))
    if dataset == "shapes" and config.data:
        raise UserError(f"--data {config.data} needs a --dataset, such as folder: shapes draws its own")
    for f in dataclasses.fields(config):
        value, (low, high, choices) = getattr(config, f.name), (
            f.metadata[k] for k in ("low", "high", "choices"))
        numbers = value if isinstance(value, tuple) else (value,)
        flag = "--" + f.name.replace("_", "-")
        if choices and value not in choices:
            raise UserError(f"{flag} {value} is unknown: choose one of {', '.join(choices)}")
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            raise UserError(f"{flag} {value} is out of range: it must be at least {low}"
                            + (f" and at most {high}" if high is not None else ""))
        if f.type is tuple and (not numbers or any(n < 1 for n in numbers)):
            raise UserError(f"{flag} {value}: give whole numbers of at least 1, as in 1,2,2")
    for flag, value, divisor, why in (
            ("--resolution", config.resolution, 2 ** (len(config.mults) - 1) * (8 if config.vae else 1),
             "to be halved at each level" + " below the VAE's 8 pixels" * bool(config.vae)),
            ("--width", config.width, 64 if config.arch == "adm" else 4, "the size of a group or head"),
            ("--prior-width", config.prior_width, config.prior_heads, "the number of --prior-heads"),
            ("--prior-width", config.prior_width, 4, "for its sinusoids")):
        if value % divisor:
            raise UserError(f"{flag} {value} must be divisible by {divisor}, {why}")
    if not re.fullmatch(r"[\w.]*", config.tag):
        raise UserError(f"--tag {config.tag}: give letters, digits, dots and underscores alone")
    if config.vae and config.augment:
        raise UserError("--vae has latents of images as they are: --augment 0")
    check_y(config.y)
    if config.a == "text" and (dataset != "shapes" or stage != "prior"):
        raise UserError("--a text is for --stage prior of shapes: captions are nowhere else, and the image "
                        "model learns of them through y")
    if config.y_dropout and told_nothing(config.y):
        raise UserError(f"--y {config.y} leaves --y-dropout nothing to drop: leave one of them away")
    if stage == "joint" and (config.y != "clip" or config.y_dropout):
        raise UserError("--stage joint learns y with the rest: leave --y and --y-dropout away")
    if stage == "joint" and (config.embedder == "pixels" or config.vae):
        raise UserError("--stage joint trains an embedder of images: --embedder clip or shapes, no --vae")
    if config.y.startswith("kmeans") and config.a != "none":
        raise UserError("--y kmeans draws clusters regardless of a: --a none")
    return config


def check_y(y):
    """Raises UserError if --y is not one of the reductions."""
    if not re.fullmatch(r"clip|none|pca:(0|[1-9]\d*)|kmeans:[1-9]\d*", y):
        raise UserError(f"--y {y} is unknown: choose clip, pca:D, kmeans:K (such as pca:32) or none")


def told_nothing(y):
    """Whether y is a constant, with which the image model is the baseline."""
    return re.fullmatch("none|pca:0+|kmeans:0*1", y) is not None


def has_prior(y):
    """Whether stage 1 is a diffusion model; clusters are drawn by their frequency."""
    return not (told_nothing(y) or y.startswith("kmeans"))


def run_name(stage, y="clip", a="none", tag=""):
    """The folder of a stage's run below runs/<dataset>: image, image-pca32, prior-text, image-TAG, ..."""
    parts = [stage]
    if stage in ("prior", "image") and y != "clip":
        parts.append(y.replace(":", ""))
    if stage == "prior" and a == "text":
        parts.append("text")
    if stage != "embedder" and tag:                   # variants share what y is
        parts.append(tag)
    return "-".join(parts)


def count(text):
    """'25M' -> 25000000: a whole number with an optional suffix k, M or G."""
    factor = {"k": K, "m": M, "g": K * M}.get(text[-1:].lower())
    number = float(text[:-1] if factor else text) * (factor or 1)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(text)
    return int(number)


def add_flags(parser, config):
    """One flag per field of a dataclass instance, whose values --help shows as the defaults."""
    def numbers(text):
        return tuple(int(n) for n in text.split(","))

    convert = {int: count, tuple: numbers}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        shown = ",".join(map(str, value)) if f.type is tuple else value if value not in ("", None) else "none"
        options = dict(default=None, help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%"))
        if f.type in (bool, bool | None):
            options |= dict(action="store_true" if f.type is bool else argparse.BooleanOptionalAction)
        else:
            options |= dict(type=convert.get(f.type, f.type),
                            metavar="|".join(f.metadata["choices"] or ()) or f.type.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), **options)


# ============================================================================================================
# 2 Diffusion: preconditioning, loss, noise levels
# ============================================================================================================
def like(sigma, x):
    """(B,) -> (B, 1, ..., 1): per-example numbers that broadcast over the examples x."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """A network made into the denoiser D(x; sigma): EDM Eq. 7, for vectors (B, D) and images (B, C, H, W).

    predict="edm" is EDM's preconditioning (Table 1), for the image model. predict="data" is the paper's
    prior: the network predicts the clean y itself, c_out = 1. Both weigh the loss by 1 / c_out², which is
    EDM's lambda for the image model and 1 for the prior: this choice is all that tells them apart. `net` is
    any net(x, c_noise, cond, augment) that returns the shape of x.
    """

    def __init__(self, net, sigma_data=0.5, predict="edm", p_mean=-1.2, p_std=1.2):
        super().__init__()
        assert predict in ("edm", "data"), predict
        self.net, self.sigma_data, self.predict = net, sigma_data, predict
        self.p_mean, self.p_std = p_mean, p_std

    def scalings(self, sigma):
        """(B,) -> c_skip, c_out, c_in, c_noise, each (B,): EDM Table 1; predict="data": D = net(c_in x)."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / total**2, sigma * self.sigma_data / total
        if self.predict == "data":
            c_skip, c_out = torch.zeros_like(sigma), torch.ones_like(sigma)
        return c_skip, c_out, 1 / total, sigma.log() / 4

    def forward(self, x, sigma, cond=None, augment=None):
        """D(x; sigma): x (B, ...), sigma (B,), optional cond (B, K), augment (B, 9) -> (B, ...), float32."""
        x, sigma = x.float(), sigma.float()
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        raw = self.net(like(c_in, x) * x, c_noise, cond, augment).float()
        return like(c_skip, x) * x + like(c_out, x) * raw

    def draw(self, x):
        """The random numbers of one loss: sigma (B,) with ln sigma ~ N(p_mean, p_std²), and noise like x."""
        sigma = (torch.randn(len(x), device=x.device) * self.p_std + self.p_mean).exp()
        return sigma, torch.randn_like(x)

    def loss(self, x, cond=None, augment=None, draws=None):
        """(B, ...) -> (B,): lambda(sigma) |D(x + sigma eps; sigma) - x|², summed over x (Eq. 1; EDM Eq. 8).

        `draws` = (sigma, noise) as `draw` returns them, for a caller that splits one batch into several.
        """
        sigma, noise = draws if draws is not None else self.draw(x)
        weight = 1 / self.scalings(sigma)[1] ** 2
        denoised = self(x + like(sigma, x) * noise, sigma, cond, augment)
        return weight * (denoised - x).square().flatten(1).sum(1)


# ============================================================================================================
# 3 Sampling
# ============================================================================================================
def sigma_schedule(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels t_0 = sigma_max > ... > t_{N-1} = sigma_min, t_N = 0: (steps + 1,) float64 (EDM Eq. 5)."""
    assert steps >= 2, "a schedule needs at least its two ends"
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def heun_sample(denoise, noise, sigmas, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0,
                randn_like=torch.randn_like):
    """EDM's stochastic sampler, Algorithm 2: 2N - 1 evaluations for N = len(sigmas) - 1 steps.

    denoise(x, sigma) with x (B, ...) and sigma (B,); `noise` (B, ...) is unit Gaussian, not yet scaled;
    returns (B, ...). The state is float64 (float32 on Apple's GPU, which has no float64); the denoiser
    computes as it likes.
    """
    state = torch.float32 if noise.device.type == "mps" else torch.float64
    levels, steps = [float(s) for s in sigmas], len(sigmas) - 1

    def slope(x, sigma):
        return (x - denoise(x, x.new_full((len(x),), sigma)).to(state)) / sigma

    x = noise.to(state) * levels[0]
    for sigma, sigma_next in zip(levels[:-1], levels[1:]):
        # Churn: add noise to go up to sigma_hat first, so that errors of earlier steps are forgotten.
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * randn_like(x)
        d = slope(x, sigma_hat)
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma_hat) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x


class SampleNoise:
    """Gaussian noise whose row i comes from seeds[i] alone: a sample never depends on its batch."""

    def __init__(self, seeds, device="cpu"):
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32, where B is the number of seeds."""
        assert shape[0] == len(self.generators), (shape, len(self.generators))
        return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in self.generators])

    def randn_like(self, x):
        return self.randn(*x.shape).to(x.dtype)


def slerp(start, end, way):
    """From start (...) to end (...) by way (T,) in [0, 1] -> (T, ...): way 0 and 1 give the ends, to the bit.

    Directions move along the great circle, lengths in proportion. Gaussian noise of many dimensions lies on a
    sphere; halfway along a straight line it would be shorter by 30 %, which no denoiser has ever seen.
    """
    a, b = (v.cpu().double().flatten() for v in (start, end))           # Apple's GPU has no float64
    way = torch.as_tensor(way, dtype=torch.float64)[:, None]             # (T, 1)
    lengths = [v.norm().clip(min=1e-30) for v in (a, b)]
    angle = (a @ b / (lengths[0] * lengths[1])).clip(-1, 1).acos()
    parts = [1 - way, way]
    if angle.sin() > 1e-7:                            # else they are parallel, and there is no one circle
        parts = [(angle * part).sin() / angle.sin() for part in parts]
    length = (1 - way) * lengths[0] + way * lengths[1]
    between = length / lengths[0] * parts[0] * a + length / lengths[1] * parts[1] * b
    return between.unflatten(1, start.shape).to(start.dtype).to(start.device)


def mix_seed(*parts):
    """The name of a random stream and numbers -> a seed. 32 bits: torch's CPU generator takes no more."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


# ============================================================================================================
# 4 Two stages: a -> y -> x
# ============================================================================================================
@dataclass
class Sampler:
    """The numbers of Algorithm 2. The defaults are those of every FID the paper reports."""
    steps: int = 40
    s_churn: float = 50.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.007

    guidance: float = 1.0

    def __call__(self, denoiser, shape, seeds, cond=None, null=None, way=None):
        """Samples p(. | cond), one per seed: shape without B, cond (B, K) or None -> (B, *shape) float32.

        With `way` (B,) there are two seeds; sample i starts from `slerp` of their noise, at way[i] (App. C).
        With guidance W other than 1, the denoiser is D(null) + W (D(cond) - D(null)), where `null` (B, K)
        tells it less: classifier-free guidance (Ho and Salimans 2022).
        """
        def denoise(x, sigma):
            full = denoiser(x, sigma, cond)
            if self.guidance == 1 or null is None:
                return full
            free = denoiser(x, sigma, null)
            return free + self.guidance * (full - free)

        noise = SampleNoise(seeds, next(denoiser.parameters()).device)
        start = noise.randn(len(seeds), *shape)
        if way is not None:
            assert self.s_churn == 0, "between two seeds there is no noise to churn with"
            start = slerp(*start, way)
        return heun_sample(denoise, start, sigma_schedule(self.steps), self.s_churn,
                           self.s_min, self.s_max, self.s_noise, noise.randn_like).float()


def join(*parts):
    """y ⊕ a, the condition of Eq. 5: concatenates what is there (embedding first); None if nothing is."""
    parts = [p.float() for p in parts if p is not None]
    return torch.cat(parts, dim=1) if parts else None


def sample_embeddings(prior, seeds, a, sampler, way=None):
    """Stage 1: y ~ p_prior(y | a). a (B, A) or None -> (B, D)."""
    return sampler(prior, (prior.net.dim,), seeds, a, way=way)


def sample_images(image_model, seeds, y, a, sampler, way=None):
    """Stage 2: x ~ p_image(x | y, a). y (B, D), or None for plain EDM -> (B, C, H, W), about [-1, 1]."""
    shape = (image_model.net.channels, image_model.net.resolution, image_model.net.resolution)
    # Departure: the authors give the image model the prior's seed plus one, so sample i's image and sample
    # i+1's embedding start from the same random numbers. Seeds of their own stream never meet the prior's.
    null = None if y is None else join(torch.zeros_like(y), a)
    return sampler(image_model, shape, [mix_seed("image", seed) for seed in seeds], join(y, a), null, way)


def sample_two_stage(prior, image_model, seeds, a=None, sampler=Sampler(), image_sampler=None):
    """2SDM, Eq. 3: sample y, then x given y; forget y. (The oracle gives `sample_images` true embeddings.)"""
    y = sample_embeddings(prior, seeds, a, sampler)
    return sample_images(image_model, seeds, y, a, image_sampler or sampler)


def to_uint8(images):
    """[-1, 1] -> 0..255, to the nearest as in EDM (truncating instead moves FID); uint8 passes through."""
    if images.dtype == torch.uint8:
        return images
    assert images.is_floating_point(), f"images are uint8 or floats in [-1, 1], not {images.dtype}"
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_float(pixels):
    """0..255 -> [-1, 1] float32."""
    return pixels.float() / 127.5 - 1


# ============================================================================================================
# 5 Shared layers
# ============================================================================================================
def noise_features(c_noise, dim, adm=False):
    """(B,) -> (B, dim): sinusoids of c_noise. DDPM++: (sin, cos), period up to 2π·10000; ADM: (cos, sin)."""
    half = dim // 2
    steps = torch.arange(half, device=c_noise.device, dtype=torch.float32)
    angles = c_noise[:, None] * 10000 ** (-steps / (half if adm else half - 1))           # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()], dim=1)


attend = F.scaled_dot_product_attention                # softmax(q kᵀ / √d) v over (B, heads, tokens, d)


def group_norm(channels, eps):
    """GroupNorm with 32 groups, or of four channels each if there are less than 128 channels."""
    return nn.GroupNorm(math.gcd(min(32, channels // 4), channels), channels, eps)


@torch.no_grad()
def zero(layer, scale=0.0):
    """Scales a layer's initial weights, to 0 by default, so that its branch starts out (almost) silent."""
    layer.weight.mul_(scale)
    nn.init.zeros_(layer.bias)
    return layer


# ============================================================================================================
# 6 Prior transformer
# ============================================================================================================
class PriorBlock(nn.Module):
    """Pre-norm attention and MLP over (B, tokens, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t):
        B, T, width = t.shape
        q, k, v = self.qkv(self.norm1(t)).reshape(
            B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)                               # (B, heads, T, d)
        t = t + self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, width))
        return t + self.mlp(self.norm2(t))


class PriorTransformer(nn.Module):
    """The auxiliary model of §3: a transformer over the tokens [augmentation] [a] [sigma] [y_sigma] [query].

    forward: y_sigma (B, D) scaled by c_in, c_noise (B,), a (B, A), augmentation label (B, 9) -> (B, D), read
    off the query's token. Tokens of an absent input are not built (A = 0, no augmentation in training).
    Departure: a plain pre-norm transformer; the authors' block adds a causal mask, shared keys and values,
    cosine attention, rotary and relative positions and SwiGLU. Width, depth, heads and tokens are theirs.
    """

    def __init__(self, dim, cond_dim=0, augment_dim=0, width=512, depth=6, heads=8):
        super().__init__()
        assert width % heads == 0, f"width {width} is not divisible into {heads} heads"
        self.dim, self.cond_dim, self.augment_dim, self.width = dim, cond_dim, augment_dim, width
        self.map_augment = nn.Linear(augment_dim, width) if augment_dim else None
        self.map_cond = nn.Linear(cond_dim, width) if cond_dim else None
        self.map_noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.map_y = nn.Linear(dim, width)
        tokens = 3 + bool(augment_dim) + bool(cond_dim)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList([PriorBlock(width, heads) for _ in range(depth)])
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)
        self.initialise()

    def initialise(self):
        for layer in self.modules():                  # GPT-2's rule: small normal weights, no bias
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        for block in self.blocks:                     # the sum of 2·depth branches keeps the variance of one
            for layer in (block.proj, block.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
        for layer in filter(None, (self.map_y, self.map_augment, self.map_cond)):  # inputs keep their scale
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for parameter in (self.query, self.position):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, y, c_noise, cond=None, augment=None):
        assert (cond is not None) == bool(self.cond_dim), f"the prior was built for cond_dim {self.cond_dim}"
        tokens = []
        if self.augment_dim:
            augment = y.new_zeros(len(y), self.augment_dim) if augment is None else augment
            tokens.append(self.map_augment(augment))
        if self.cond_dim:
            tokens.append(self.map_cond(cond))
        tokens += [self.map_noise(noise_features(c_noise, self.width)), self.map_y(y)]
        t = torch.stack([*tokens, self.query[:, 0].expand(len(y), -1)],
                        dim=1) + self.position                                            # (B, tokens, width)
        for block in self.blocks:
            t = block(t)
        return self.out(self.norm(t[:, -1]))                                              # (B, D)


# ============================================================================================================
# 7 U-Net
# ============================================================================================================
class UNetBlock(nn.Module):
    """One residual block of either architecture, then self-attention if heads > 0 (EDM, Appendix F).

    forward: x (B, C, H, W), embedding of noise level and condition (B, E) -> (B, C', H', W'), where H' is H,
    2H ("up") or H/2 ("down").
    """

    def __init__(self, cin, cout, emb_dim, adm, heads=0, resample=None, dropout=0.0):
        super().__init__()
        eps, self.adm, self.heads = 1e-5 if adm else 1e-6, adm, heads
        self.cin, self.cout, self.resample, self.dropout = cin, cout, resample, dropout
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.norm0 = group_norm(cin, eps)
        self.conv0 = nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(emb_dim, 2 * cout if adm else cout)
        self.norm1 = group_norm(cout, eps)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout or (resample and not adm) else None
        if heads:
            self.norm2 = group_norm(cout, eps)
            self.qkv, self.proj = nn.Conv2d(cout, 3 * cout, 1), nn.Conv2d(cout, cout, 1)

    def resized(self, x):
        """The filter [1, 1]: average of 2×2 pixels down, nearest neighbour up."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x, emb):
        h = self.conv0(self.resized(F.silu(self.norm0(x))))                               # (B, C', H', W')
        shift = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + shift)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = self.resized(x)
        x = ((x if self.skip is None else self.skip(x)) + h) * self.skip_scale
        if self.heads:
            B, C, H, W = x.shape
            q, k, v = self.qkv(self.norm2(x)).reshape(
                B, 3, self.heads, C // self.heads, H * W).transpose(3, 4).unbind(1)
            x = (x + self.proj(attend(q, k, v).transpose(2, 3).reshape(B, C, H, W))) * self.skip_scale
        return x


class UNet(nn.Module):
    """EDM's image networks: DDPM++ (Song et al. 2021) and ADM (Dhariwal and Nichol 2021), from one block.

    forward: x (B, C, H, W) scaled by c_in, c_noise (B,), cond (B, K) = y ⊕ a, augmentation label (B, 9) ->
    (B, C, H, W). The condition enters through one learned linear map, added to the embedding of the noise
    level. The defaults of width, mults, blocks, attention are those of the 64×64 models of each architecture.
    """

    def __init__(self, resolution, channels=3, cond_dim=0, augment_dim=0, arch="ddpm++", width=None,
                 mults=None, blocks=None, attention=None, head_dim=64, dropout=0.0):
        super().__init__()
        assert arch in ("ddpm++", "adm"), arch
        self.adm = adm = arch == "adm"
        given = dict(width=width, mults=mults, blocks=blocks, attention=attention)
        width, mults, blocks, attention = (
            ARCHITECTURES[arch][name] if value is None else value for name, value in given.items())
        assert resolution % 2 ** (len(mults) - 1) == 0, (
            f"resolution {resolution} cannot be halved {len(mults) - 1} times")
        self.resolution, self.channels, self.width = resolution, channels, width
        self.cond_dim, self.augment_dim = cond_dim, augment_dim
        emb_dim = 4 * width

        # Embedding of noise level, augmentation and condition, which DDPM++ adds before the MLP, ADM after.
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb_dim), nn.Linear(emb_dim, emb_dim)
        self.map_cond = nn.Linear(cond_dim, emb_dim if adm else width, bias=not adm) if cond_dim else None

        def block(cin, cout, attended, resample=None):
            heads = (cout // head_dim if adm else 1) if attended else 0
            return UNetBlock(cin, cout, emb_dim, adm, heads, resample, dropout)

        # Encoder: every block's output is kept as a skip. DDPM++ attends in every encoder block ...
        self.enc, c = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)]), width
        skips = [c]
        for level, mult in enumerate(mults):
            if level:
                self.enc.append(block(c, c, False, "down"))
                skips.append(c)
            for _ in range(blocks):
                self.enc.append(block(c, width * mult, resolution >> level in attention))
                c = width * mult
                skips.append(c)
        # ... and in the level's last decoder block, ADM in all. `takes_skip`: which decoder blocks take one.
        self.dec, self.takes_skip = nn.ModuleList([block(c, c, True), block(c, c, False)]), [False, False]
        for level, mult in reversed(list(enumerate(mults))):
            if level < len(mults) - 1:
                self.dec.append(block(c, c, False, "up"))
                self.takes_skip.append(False)
            for i in range(blocks + 1):
                attended = resolution >> level in attention and (adm or i == blocks)
                self.dec.append(block(c + skips.pop(), width * mult, attended))
                self.takes_skip.append(True)
                c = width * mult
        assert not skips
        self.out_norm = group_norm(c, 1e-5 if adm else 1e-6)
        self.out_conv = nn.Conv2d(c, channels, 3, padding=1)
        self.initialise()

    def initialise(self):
        """EDM's `init` rules. ADM starts from PyTorch's own default: U(±1/√fan_in) for weights and biases."""
        if not self.adm:                              # DDPM++: Xavier-uniform weights, no bias
            for layer in self.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        silent = 0.0 if self.adm else 1e-5            # the last layer of each branch, and of the net
        for layer in [self.out_conv, *(m.conv1 for m in self.modules() if isinstance(m, UNetBlock))]:
            zero(layer, silent)
        for m in self.modules():
            if isinstance(m, UNetBlock) and m.heads:
                zero(m.proj, silent)
                if not self.adm:
                    zero(m.qkv, math.sqrt(0.2))
        if self.adm and self.augment_dim:
            nn.init.zeros_(self.map_augment.weight)
        if self.adm and self.cond_dim:                # Kaiming-normal times √cond_dim
            nn.init.normal_(self.map_cond.weight)

    def embedding(self, c_noise, cond, augment):
        """(B,), (B, K), (B, 9) -> (B, 4·width)."""
        assert (cond is not None) == bool(self.cond_dim), f"the U-Net was built for cond_dim {self.cond_dim}"
        emb = noise_features(c_noise, self.width, self.adm)                               # (B, width)
        if augment is not None:                       # absent means zeros, which a map without bias ignores
            emb = emb + self.map_augment(augment)
        if self.cond_dim and not self.adm:
            emb = emb + self.map_cond(cond * math.sqrt(self.cond_dim))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))                               # (B, 4·width)
        if self.cond_dim and self.adm:
            emb = emb + self.map_cond(cond)
        return F.silu(emb)

    def forward(self, x, c_noise, cond=None, augment=None):
        emb = self.embedding(c_noise, cond, augment)
        skips = [x := self.enc[0](x)]                                                     # (B, width, H, W)
        for block in self.enc[1:]:
            skips.append(x := block(x, emb))
        for block, takes_skip in zip(self.dec, self.takes_skip):
            x = block(torch.cat([x, skips.pop()], dim=1) if takes_skip else x, emb)
        assert not skips
        return self.out_conv(F.silu(self.out_norm(x)))                                    # (B, C, H, W)


# ============================================================================================================
# 8 Embeddings: e_i(x) -> y
# ============================================================================================================
# An embedder is a module with `.name`, `.dim` and forward: (B, 3, H, W) in [-1, 1] -> (B, dim), raw: not
# normalised. sigma_data = 0.5 stays right as long as its elements have an rms of about 0.5.


class ClipEmbedder(nn.Module):
    """The paper's e_i: OpenAI's CLIP ViT-B/32 by open_clip, frozen.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 512), rms about 0.44. Not L2-normalised: the elements of a unit
    vector, 0.044 in size, would drown in the noise of the prior. `weights`: "openai" (open_clip downloads
    them once, or has them in its cache), the path of a weights file, or None for random ones.
    """
    name = "clip"

    def __init__(self, weights="openai"):
        super().__init__()
        import open_clip                              # seconds to import: only those who use it pay
        if weights not in ("openai", None) and not Path(weights).is_file():
            raise UserError(f"--clip-weights {weights}: there is no such file")
        logging.disable(logging.CRITICAL)             # a hub's many lines on a lost connection
        try:                                          # plain ViT-B-32 lacks these weights' activation
            self.model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=weights,
                                                require_pretrained=weights is not None)
        except Exception as error:                    # whatever a hub, a network or a damaged file raises
            wanted = "open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai on Hugging Face"
            remedy = (f"it should be {wanted}" if weights != "openai" else
                      f"connect once so that open_clip can download them, or fetch {wanted} elsewhere and "
                      f"give --clip-weights FILE; --embedder pixels needs none")
            raise UserError(f"CLIP's weights '{weights}' cannot be loaded ({type(error).__name__}): "
                            f"{remedy}") from None
        finally:
            logging.disable(logging.NOTSET)
        self.model.eval().requires_grad_(False)
        self.dim = 512
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None], False)
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None], False)

    def forward(self, x):
        x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
        return self.model.encode_image(((x + 1) / 2 - self.mean) / self.std).float()

    def encode_text(self, texts):
        """Captions -> (B, 512), raw."""
        import open_clip
        tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts)
        return self.model.encode_text(tokens.to(self.mean.device)).float()


class SmallClip(nn.Module):
    """The embedded world's CLIP: convolutional image tower, word-by-word text tower, contrastive training.

    forward: (B, 3, H, W) in [-1, 1] -> (B, dim), raw, then divided by twice the rms measured after training.
    """
    name = "shapes"
    words = ["", "on", "a", "an", "background", *COUNTS, *COLOURS, *SHAPES, *(s + "s" for s in SHAPES),
             "crosses"]

    def __init__(self, dim=64, width=32):
        super().__init__()
        self.dim, w = dim, width
        self.image = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), nn.SiLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.GroupNorm(8, 2 * w), nn.SiLU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1), nn.GroupNorm(8, 4 * w), nn.SiLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * w, 4 * w), nn.SiLU(), nn.Linear(4 * w, dim))
        self.embed = nn.Embedding(len(self.words), 16)
        self.text = nn.Sequential(nn.Flatten(), nn.Linear(7 * 16, 4 * w), nn.SiLU(), nn.Linear(4 * w, dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        if x.shape[-1] > 32:                          # the world needs no more to be read
            x = F.interpolate(x, (32, 32), mode="area")
        return self.image(x) * self.scale

    def encode_text(self, texts):
        """Captions of at most seven of the world's words -> (B, dim), raw."""
        rows = []
        for text in texts:
            words = text.lower().split()
            unknown = [w for w in words if w not in self.words]
            if unknown or not 1 <= len(words) <= 7:
                raise UserError(f"the caption {text!r} is not of this world"
                                + (f" (unknown: {', '.join(unknown)})" if unknown else "")
                                + ': write one like "three red stars on a blue background", with '
                                + ", ".join((*COUNTS, *COLOURS, *SHAPES)))
            rows.append([self.words.index(w) for w in words] + [0] * (7 - len(words)))
        return self.text(self.embed(torch.tensor(rows, device=self.scale.device)))

    def text_condition(self, texts):
        """Captions -> (B, dim) of rms 0.5, as the prior is told them (--a text)."""
        return F.normalize(self.encode_text(texts), dim=1) * math.sqrt(self.dim) / 2

    def loss(self, images, texts):
        """CLIP's symmetric loss (Radford et al. 2021, Fig. 3): (B, 3, H, W), B captions -> (B,)."""
        y, t = F.normalize(self(images), dim=1), F.normalize(self.encode_text(texts), dim=1)
        logits, target = (y @ t.T * self.log_temperature.exp().clip(max=100),
                          torch.arange(len(y), device=y.device))
        pairs = [F.cross_entropy(table, target, reduction="none") for table in (logits, logits.T)]
        return (pairs[0] + pairs[1]) / 2


class PCA(nn.Module):
    """Principal components of y (N, D). transform: (B, D) -> (B, dims), dims <= D; centred, not whitened."""

    def __init__(self, y, dims):
        super().__init__()
        y = torch.as_tensor(y)
        assert 0 < dims <= y.shape[1], (dims, y.shape)
        mean = y.mean(0, dtype=torch.float64)
        if len(y) < y.shape[1]:                       # few examples: the covariance is large and singular
            _, scales, basis = torch.linalg.svd(y - mean, full_matrices=False)
            basis, scales = (F.pad(t, (0, y.shape[1] - len(y))) for t in (basis.T, scales.square()))
        else:                                         # in parts: a million rows are gigabytes
            scales, basis = torch.linalg.eigh(sum((part - mean).T @ (part - mean) for part in y.split(8192)))
            scales, basis = scales.clip(min=0).flip(0), basis.flip(1)
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis[:, :dims].float().contiguous())       # (D, dims), largest first
        self.variance = (scales[:dims] / len(y)).float()

    def transform(self, y):
        return (y.float() - self.mean) @ self.basis


# Not by a product of matrices, which a GPU may round to TF32; for the many distances of a fit it is faster.
EXACT = "donot_use_mm_for_euclid_dist"


class KMeans(nn.Module):
    """Clusters of y (N, D), for the baseline Class-cond. transform: (B, D) -> one-hot (B, clusters).

    Lloyd's iteration from a k-means++ start (Arthur and Vassilvitskii 2007), until no row moves, at most 100
    rounds. A cluster that loses all its rows gets the row farthest from its centre. `counts` (clusters,): the
    rows of each.
    """

    def __init__(self, y, clusters, seed=0):
        super().__init__()
        y, generator = torch.as_tensor(y).float(), torch.Generator().manual_seed(seed)
        assert 0 < clusters <= len(y), (clusters, y.shape)
        rows = [int(torch.randint(len(y), (), generator=generator))]
        nearest = torch.full((len(y),), math.inf)
        while len(rows) < clusters:                   # each next one with probability ~ squared distance
            nearest = torch.minimum(nearest, torch.cdist(y, y[rows[-1:]], compute_mode=EXACT)[:, 0].square())
            edges = nearest.double().cumsum(0)
            drawn = torch.rand((), generator=generator, dtype=torch.float64) * edges[-1]
            rows.append(min(int(torch.searchsorted(edges, drawn, right=True)), len(y) - 1))
        self.register_buffer("centres", y[rows].clone())                                  # (clusters, D)
        labels = None
        for _ in range(100):
            distances, found = self.assign(y)
            if labels is not None and torch.equal(found, labels):
                break
            labels, sums = found, torch.zeros(clusters, y.shape[1], dtype=torch.float64)
            counts = torch.bincount(labels, minlength=clusters)
            for part, where in zip(y.split(8192), labels.split(8192)):
                sums.index_add_(0, where, part.double())
            self.centres.copy_(sums / counts.clip(min=1)[:, None])
            for empty, row in zip((counts == 0).nonzero().flatten(), distances.argsort(descending=True)):
                self.centres[empty] = y[row]
        self.register_buffer("counts", torch.bincount(labels, minlength=clusters))

    def assign(self, y, chunk=8192):
        """(N, D) -> distance to the nearest centre (N,), its number (N,)."""
        parts = [torch.cdist(part, self.centres).min(1) for part in y.float().split(chunk)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def transform(self, y):
        nearest = torch.cdist(y.float(), self.centres, compute_mode=EXACT).argmin(1)
        return F.one_hot(nearest, len(self.centres)).float()


class Reduced(nn.Module):
    """An embedder and a PCA or KMeans of its embeddings: (B, 3, H, W) -> (B, D or K)."""

    def __init__(self, embedder, reduction):
        super().__init__()
        self.name, self.inner, self.reduction = embedder.name, embedder, reduction
        self.dim = len(reduction.centres) if isinstance(reduction, KMeans) else reduction.basis.shape[1]

    def forward(self, x):
        return self.reduction.transform(self.inner(x))

    @classmethod
    def fit(cls, embedder, y, rows, seed=0):
        """y: "pca:D" or "kmeans:K"; rows (N, D'): embeddings of the training images, not augmented."""
        kind, size = y.split(":")[0], int(y.split(":")[1])
        if size > (rows.shape[1] if kind == "pca" else len(rows)):
            raise UserError(f"--y {y}: there are only {rows.shape[1]} dimensions and {len(rows)} images")
        return cls(embedder, PCA(rows, size) if kind == "pca" else KMeans(rows, size, seed))

    @classmethod
    def restore(cls, embedder, state):
        """From an embedder and the `state_dict` of its reduction."""
        reduction = (PCA if "basis" in state else KMeans).__new__(PCA if "basis" in state else KMeans)
        nn.Module.__init__(reduction)
        for name, tensor in state.items():
            reduction.register_buffer(name, tensor)
        return cls(embedder, reduction)


class PixelEmbedder(nn.Module):
    """An embedder for any data, without weights: the first principal components of the pixels.

    It knows layout and colour, nothing of meaning. Scaled as a whole to rms 0.5; sees at most 32×32 pixels.
    """
    name = "pixels"

    def __init__(self, resolution, dim=64):
        super().__init__()
        self.side = min(resolution, 32)
        self.dim = min(dim, 3 * self.side**2)
        self.register_buffer("mean", torch.zeros(3 * self.side**2))
        self.register_buffer("basis", torch.zeros(3 * self.side**2, self.dim))

    def pixels(self, x):
        return F.interpolate(x, (self.side, self.side), mode="area").flatten(1)

    def fit(self, images, limit=20_000):
        """Fits the components to a data set (at most `limit` of its images, evenly spread)."""
        rows = np.linspace(0, len(images) - 1, min(len(images), limit)).astype(int)
        pixels = torch.cat([self.pixels(images.batch(part))
                            for part in np.array_split(rows, -(-len(rows) // 500))])
        if len(pixels) < 2:
            raise UserError("a data set of one image has no components: add images")
        pca = PCA(pixels, self.dim)
        self.mean.copy_(pca.mean)
        self.basis.copy_(pca.basis * 0.5 / pca.variance.mean().sqrt().clip(min=1e-8))
        return self

    def forward(self, x):
        return (self.pixels(x) - self.mean) @ self.basis


def fingerprint(module):
    """12 hexadecimal digits of the sha256 of a module's weights: tells one embedder from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def pack_embedder(embedder):
    """What a checkpoint keeps of its embedder: name, dim, fingerprint, weights (not the public CLIP's)."""
    if isinstance(embedder, Reduced):
        return dict(name=embedder.name, dim=embedder.dim, fingerprint=fingerprint(embedder),
                    inner=pack_embedder(embedder.inner), reduction={
                        k: v.cpu() for k, v in embedder.reduction.state_dict().items()})
    state = {} if embedder.name == "clip" else {k: v.cpu() for k, v in embedder.state_dict().items()}
    return dict(name=embedder.name, dim=embedder.dim, fingerprint=fingerprint(embedder), state=state)


def unpack_embedder(packed, resolution, clip_weights="openai"):
    """A checkpoint's embedder, in eval mode. Raises UserError if CLIP's weights are not those of its run."""
    if "reduction" in packed:
        inner = unpack_embedder(packed["inner"], resolution, clip_weights)
        return Reduced.restore(inner, packed["reduction"])
    if packed["name"] == "clip":
        embedder = ClipEmbedder(clip_weights)
        if fingerprint(embedder) != packed["fingerprint"]:
            raise UserError("CLIP's weights are not those of this run: give its own with --clip-weights FILE")
        return embedder
    embedder = (SmallClip(packed["dim"]) if packed["name"] == "shapes" else
                PixelEmbedder(resolution, packed["dim"]))
    embedder.load_state_dict(packed["state"])
    return embedder.eval().requires_grad_(False)


@torch.no_grad()
def embedding_bank(images, embedder, folder, augment=None, views=1, seed=0, device="cpu", batch=256):
    """A data set's embeddings: a memory map (views, N, D + 9) float32 of [y, augmentation label].

    Computed once: the prior is tiny and CLIP is not, and trained from this bank it never waits for CLIP.
    View v of image i is an augmentation of its own; without augmentation there is one view. An interrupted
    computation goes on where it was. Departure: the paper augments anew each time, here there are `views`.
    """
    views, width = views if augment else 1, embedder.dim + 9
    key = f"{fingerprint(embedder)}-{images.fingerprint}" + (
        f"-p{augment.p:g}-s{seed}-v{views}" if augment else "")
    path, N = Path(folder) / f"bank-{key}.f32", len(images)
    part = path.with_suffix(".part")
    total, row = views * N, 4 * width
    with user_errors(f"the embeddings cannot be written to {folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")), contextlib.ExitStack() as open_files:
            if not path.exists():
                done = part.stat().st_size // (row * batch) * batch if part.exists() else 0
                file = open_files.enter_context(open(part, "ab"))
                bar = open_files.enter_context(tqdm(total=total, initial=done, desc="embeddings",
                                                    unit=" images"))
                file.truncate(done * row)
                for start in range(done, total, batch):
                    rows = np.arange(start, min(start + batch, total))
                    x, labels = images.batch(rows % N, device), torch.zeros(len(rows), 9)
                    if augment:
                        generator = torch.Generator().manual_seed(mix_seed("views", seed, start))
                        x, labels = augment(x, augment.draw(len(rows), generator))
                    file.write(torch.cat([embedder(x).float(), labels.to(device)], 1).cpu().numpy().tobytes())
                    bar.update(len(rows))
                open_files.close()
                os.replace(part, path)
    return np.memmap(path, np.float32, "r", shape=(views, N, width))


# ============================================================================================================
# 9 Data: the embedded world, any images, augmentation, latents
# ============================================================================================================
def uniform(seed, index, slots):
    """(N,) int64 -> (N, slots) float32 in [0, 1), a function of (seed, index, slot) alone.

    A counter-based generator: SplitMix64's finaliser (Steele, Lea and Flood 2014) over the three numbers.
    """
    def mix(z):
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):      # signed 64-bit
            z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
        return z ^ (z >> 31 & (1 << 33) - 1)

    z = mix(mix(torch.tensor([seed], dtype=torch.int64)) + index)[:, None] + torch.arange(slots)
    return (mix(mix(z) + torch.arange(slots)) >> 40 & (1 << 24) - 1).float() / 2**24      # (N, slots)


def hsv_to_rgb(hue, saturation, value):
    """Hue in degrees, saturation and value in [0, 1], each (...) -> (..., 3) in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clip(0, 1))


def signed_distance(shape, x, y):
    """Signed distance (negative inside) of points (x, y), each (...), to a shape of circumradius 1 at 0."""
    r = (x**2 + y**2).sqrt()
    if shape == "circle":
        return r - 0.9
    if shape == "ring":
        return (r - 0.72).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.75
    if shape == "triangle":
        return torch.maximum(y - 0.5, math.sqrt(0.75) * x.abs() - 0.5 * y - 0.5)
    if shape == "cross":
        long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - 0.95, short - 0.3)
    # A star: fold the plane into one half of one of its five rays, then the distance to that half's edge.
    fold = (torch.atan2(x, -y) % (2 * math.pi / 5) - math.pi / 5).abs()
    px, py = r * (math.pi / 5 - fold).cos(), r * (math.pi / 5 - fold).sin()
    inner_x, inner_y = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    return ((px - 1) * inner_y - py * (inner_x - 1)) / math.hypot(inner_x - 1, inner_y)


def shapes_attributes(index, seed=0):
    """(N,) -> dict of (N,) int64: what image i shows. Background and objects always differ in colour."""
    u = uniform(seed, index, 4)
    shape, colour, other, count = ((u[:, i] * n).long() for i, n in enumerate((6, 8, 7, 4)))
    return dict(shape=shape, colour=colour, background=(colour + 1 + other) % 8, count=count)


def shapes_images(index, resolution, seed=0):
    """(N,) int64 -> (N, H, W, 3) uint8: image i is a function of (seed, i) and the resolution alone.

    One to four objects of one shape and one colour on a background of another: which shape, which colours and
    how many are decided once for the whole image; each object's place, size, rotation and shade vary freely.
    """
    a, u = shapes_attributes(index, seed), uniform(seed + 1, index, 40)
    hues = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1                          # pixel centres
    y, x = torch.meshgrid(axis, axis, indexing="ij")                                      # (H, W)
    tilt = 2 * math.pi * u[:, 0, None, None]
    light = 0.42 + 0.1 * u[:, 1, None, None] + 0.14 * (x * tilt.cos() + y * tilt.sin())   # (N, H, W)
    saturation = (0.5 + 0.15 * u[:, 2, None, None]).expand_as(light)
    image = hsv_to_rgb(
        hues[a["background"]][:, None, None].expand_as(light), saturation, light)         # (N, H, W, 3)

    # To be countable, objects sit in different quadrants, in a random cyclic or anti-cyclic order.
    start, turn = (u[:, 3] * 4).long(), 2 * (u[:, 4] < 0.5).long() - 1
    for j in range(4):
        v = u[:, 8 + 8 * j:16 + 8 * j, None, None]
        quadrant = ((start + turn * j) % 4)[:, None, None]
        cx = torch.where(quadrant % 3 == 0, -0.48, 0.48) + 0.12 * (v[:, 0] - 0.5)
        cy = torch.where(quadrant < 2, -0.48, 0.48) + 0.12 * (v[:, 1] - 0.5)
        size, angle = 0.4 + 0.08 * v[:, 2], (v[:, 3] - 0.5) * math.pi / 4
        px, py = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / size, \
                 ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / size
        distance = torch.empty_like(px)
        for s, name in enumerate(SHAPES):
            rows = a["shape"] == s
            distance[rows] = signed_distance(name, px[rows], py[rows])
        cover = (0.5 - distance * size * resolution / 2).clip(0, 1) * (j <= a["count"])[:, None, None]
        paint = hsv_to_rgb(hues[a["colour"]], 0.8 + 0.2 * u[:, 12 + 8 * j], 0.85 + 0.15 * u[:, 13 + 8 * j])
        image = image + cover[..., None] * (paint[:, None, None] - image)
    return (image * 255).round().clip(0, 255).to(torch.uint8)


def shapes_captions(index, seed=0):
    """(N,) -> captions such as "three red stars on a blue background"."""
    a, colours, captions = shapes_attributes(index, seed), list(COLOURS), []
    for shape, colour, background, count in zip(*(a[name].tolist() for name in ATTRIBUTES)):
        noun = SHAPES[shape] + ("" if count == 0 else "es" if SHAPES[shape] == "cross" else "s")
        article = "an" if colours[background] == "orange" else "a"
        captions.append(f"{COUNTS[count]} {colours[colour]} {noun} "
                        f"on {article} {colours[background]} background")
    return captions


def send(array, device):
    """An array or CPU tensor -> tensor on the device; to a GPU without waiting for what it is doing."""
    tensor = torch.as_tensor(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def take(array, rows, device):
    """array[rows] on the device, from a (memory-mapped) array or a tensor that is there already."""
    return array[send(rows, device)] if torch.is_tensor(array) else send(array[np.asarray(rows)], device)


def hold(array, device):
    """The array as a tensor on the GPU if that takes at most a quarter of its free memory, else as it is."""
    if torch.device(device).type != "cuda" or array.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return array
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    held = torch.empty(array.shape, dtype=kind, device=device)
    for start in range(0, len(array), 4096):
        held[start:start + 4096] = torch.from_numpy(np.array(array[start:start + 4096]))
    return held


@dataclass
class Images:
    """A data set: pixels (N, H, W, 3) uint8, in memory or mapped; labels (N,) int64 or None; class names.

    With latents, the moments (N, 2C, r, r) float32 that an `Autoencoder` made of the pixels, these are
    `LazyPixels`.
    """
    pixels: "np.ndarray | LazyPixels"
    labels: np.ndarray | None = None
    classes: list = field(default_factory=list)
    info: dict = field(default_factory=dict)
    latents: np.ndarray | None = None

    def __len__(self):
        return len(self.pixels)

    @property
    def shape(self):
        """(C, H, W) of what the image network models: the images, or their latents where there are any."""
        if self.latents is not None:
            return self.latents.shape[1] // 2, *self.latents.shape[2:]
        return 3, *self.pixels.shape[1:3]

    @property
    def fingerprint(self):
        """The first 12 digits of the sha256 of pixels (or latents, if there are any) and labels."""
        return self.info["sha256"][:12]

    def batch(self, rows, device="cpu"):
        """(B,) -> (B, 3, H, W) float32 in [-1, 1], channels last in memory, which convolutions prefer."""
        return to_float(take(self.pixels, rows, device)).permute(0, 3, 1, 2)


def shapes_world(index, resolution, seed=0):
    """Images (N,) of the embedded world as a data set; the class is the shape."""
    bar = tqdm(total=len(index), desc="drawing shapes", unit=" images",
               disable=len(index) * resolution**2 < 1e7)
    pixels = np.empty((len(index), resolution, resolution, 3), np.uint8)
    for start in range(0, len(index), 500):
        pixels[start:start + 500] = shapes_images(index[start:start + 500], resolution, seed).numpy()
        bar.update(500)
    bar.close()
    labels = shapes_attributes(index, seed)["shape"].numpy()
    return Images(pixels, labels, list(SHAPES),
                  dict(sha256=hashlib.sha256(pixels).hexdigest(), source="shapes"))


def cifar10(folder):
    """CIFAR-10's 50,000 training images, which torchvision downloads into the folder once."""
    import torchvision
    with user_errors(f"CIFAR-10 cannot be kept in {folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with locked(Path(folder) / "lock"):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    data = torchvision.datasets.CIFAR10(folder, train=True, download=True)
            except Exception as error:                # whatever a network or a damaged file raises
                url = torchvision.datasets.CIFAR10.url
                raise UserError(f"CIFAR-10 cannot be had ({type(error).__name__}): fetch {url} elsewhere, "
                                f"put it into a folder and give --data FOLDER") from None
    pixels, labels = np.ascontiguousarray(data.data), np.array(data.targets, np.int64)
    return Images(pixels, labels, data.classes, dict(
        sha256=hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest(), source="cifar10"))


def load_images(config, autoencoder=None):
    """The training images that a configuration names, with latents if there is an autoencoder. UserError."""
    images = load_all_images(config, autoencoder)
    if not 0 < config.limit < len(images):
        return images
    rows = np.sort(np.random.RandomState(config.seed).permutation(len(images))[:config.limit])
    digest = hashlib.sha256(images.fingerprint.encode() + rows.tobytes()).hexdigest()
    pixels = images.pixels.subset(rows) if isinstance(images.pixels, LazyPixels) else images.pixels[rows]
    labels, latents = (None if part is None else part[rows] for part in (images.labels, images.latents))
    return Images(pixels, labels, images.classes, dict(sha256=digest), latents)


def load_all_images(config, autoencoder=None):
    if config.dataset == "shapes":
        size = min(config.size, config.limit or config.size)           # each is random: the first are, too
        return shapes_world(torch.arange(size), config.resolution, config.seed)
    if config.dataset == "cifar10" and (not config.data or list(Path(config.data).glob("cifar-10-*py*"))):
        if config.resolution != 32:
            raise UserError(f"--resolution {config.resolution}: the images of cifar10 have 32")
        return cifar10(config.data or Path(config.runs) / "cifar10" / "data")
    if not config.data:
        raise UserError(f"--dataset {config.dataset} needs its images: add --data FOLDER_OR_ZIP")
    return prepare_images(config.data, config.resolution, Path(config.runs) / config.dataset / "data",
                          config.skip_bad, autoencoder=autoencoder)


class Order:
    """An endless shuffling of N examples: position p shows permutation (p div N) of the seed at (p mod N)."""

    def __init__(self, size, seed):
        self.size, self.seed, self.epoch, self.rows = size, seed, -1, None

    def __getitem__(self, span):
        """order[start:stop] -> (stop - start,) int64 rows, a function of seed and positions alone."""
        rows = []
        for position in range(span.start, span.stop):
            if position // self.size != self.epoch:
                self.epoch = position // self.size
                self.rows = torch.randperm(self.size, generator=torch.Generator().manual_seed(
                    mix_seed("order", self.seed, self.epoch))).numpy()
            rows.append(self.rows[position % self.size])
        return np.array(rows, np.int64)


# The low-pass filter of the orthogonal wavelet sym6, here with sum 1 (Daubechies, Ten Lectures, table 6.3).
SYM6 = np.array([0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
                 0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
                 -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148])
SYM6 /= SYM6.sum()


class Augment:
    """Augments images as EDM does (Appendix F), each transform with probability p.

    `augment(images) -> (images, labels)`: (B, C, H, W) in [-1, 1] on any device -> the same, (B, 9). A label
    is [x-flip, y-flip, n of the scale, cos t - 1, sin t, n cos r, n sin r, n of x, n of y], 0 for what is not
    applied: flips are 0 or 1, t is the angle of the rotation, r the direction of the stretch, n is standard
    normal. Positive angles turn counter-clockwise as one looks at the image, positive shifts go right and
    down. A row whose label is zero comes back bit for bit.
    """

    def __init__(self, p):
        assert 0 <= p <= 1
        self.p = p

    def draw(self, batch, generator=None):
        """All random numbers of a batch: (batch, 13) on the generator's device, 9 uniform and 4 normal ones.

        Row i belongs to image i alone: augment(images[a:b], draws[a:b]) is augment(images, draws)[a:b].
        """
        options = dict(generator=generator, device=generator.device if generator else "cpu")
        return torch.cat([torch.rand(batch, 9, **options), torch.randn(batch, 4, **options)], 1)

    def __call__(self, images, draws=None):
        # Planned on the CPU, which then knows without waiting for the device what needs resampling.
        draws = (self.draw(len(images)) if draws is None else draws).cpu()
        coin, flip, zoom, turn, angle, stretch, frame, direction, shift = draws[:, :9].T           # (B,) each
        n_zoom, n_stretch, n_x, n_y = draws[:, 9:].T
        x_flip = (coin < 0.5).float()                                   # always active, whatever p is
        y_flip = (flip < self.p / 2).float()                              # a fair coin, with probability p
        n_zoom = n_zoom * (zoom < self.p)
        theta = (2 * angle - 1) * math.pi * (turn < self.p)
        n_stretch = n_stretch * (stretch < self.p)
        r = (2 * direction - 1) * math.pi * (frame < 0.5)               # half of the time along the axes
        n_x, n_y = n_x * (shift < self.p), n_y * (shift < self.p)
        labels = torch.stack([x_flip, y_flip, n_zoom, theta.cos() - 1, theta.sin(),
                              n_stretch * r.cos(), n_stretch * r.sin(), n_x, n_y], 1)              # (B, 9)

        # Forward: flip, zoom, turn, stretch, shift. Resampling needs the inverse: output -> input position.
        squeeze = torch.stack([-n_stretch, n_stretch], 1).mul(0.2).exp2()
        inverse = rotation(theta) @ rotation(-r) @ squeeze.diag_embed() @ rotation(r)              # (B, 2, 2)
        inverse = inverse * n_zoom.mul(-0.2).exp2()[:, None, None]
        offset = 0.125 * torch.stack([n_x, n_y], 1)                     # (B, 2) in units of width and height
        rows = labels[:, 2:].any(1).nonzero().flatten()                 # (R,)

        device = images.device
        for bit, dim in ((x_flip, 3), (y_flip, 2)):
            images = torch.where(send(bit, device)[:, None, None, None] > 0, images.flip(dim), images)
        if len(rows):
            inverse, offset, rows_there = (send(t, device) for t in (inverse[rows], offset[rows], rows))
            images = images.index_copy(0, rows_there, resample(images[rows_there], inverse, offset))
        return images, send(labels, device)


def rotation(angle):
    """(B,) -> (B, 2, 2): with y pointing down, the inverse of a counter-clockwise turn by the angle."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2))


def resample(images, inverse, offset):
    """The images seen through affine maps about their centres, with reflected surroundings.

    images (R, C, H, W), inverse (R, 2, 2), offset (R, 2) in image sizes: output position v shows the input at
    inverse (v - offset). Doubles the resolution, interpolates linearly there, and halves it again.
    """
    height, width = images.shape[2:]
    with torch.autocast(images.device.type, enabled=False):
        up_y, down_y, at_y = filters(height, images.device)         # (2H + 10, H), (H, 2H + 10), (2H + 10,)
        up_x, down_x, at_x = filters(width, images.device)
        fine = up_y @ images.float() @ up_x.T                           # (R, C, 2H + 10, 2W + 10)
        x = at_x - (width - 1) / 2 - offset[:, 0, None, None] * width                     # (R, 1, 2W + 10)
        y = at_y[:, None] - (height - 1) / 2 - offset[:, 1, None, None] * height          # (R, 2H + 10, 1)
        grid = []
        for (a, b), at, size in ((inverse[:, 0].T, at_x, width), (inverse[:, 1].T, at_y, height)):
            position = a[:, None, None] * x + b[:, None, None] * y + (size - 1) / 2
            position = size - 1 - (position % (2 * size - 2) - (size - 1)).abs()          # reflect
            grid.append((position - at[0]) * (2 / (at[-1] - at[0])) - 1)
        fine = F.grid_sample(fine, torch.stack(grid, -1), align_corners=True)
        return (down_y @ fine @ down_x.T).to(images.dtype)              # (R, C, H, W)


@functools.lru_cache(maxsize=16)
def filters(size, device):
    """Matrices that double, with reflection, and halve a signal, and the positions of the fine samples.

    Shapes (2 size + 10, size), (size, 2 size + 10), (2 size + 10,), the last in units of coarse samples.
    Inside, halving is half the transpose of doubling, and the filter is orthogonal to its even shifts: one
    after the other they are the identity.
    """
    assert size > 1
    fine = np.arange(-5, 2 * size + 5)
    up, down = np.zeros((len(fine), size)), np.zeros((size, len(fine)))
    for tap, weight in enumerate(SYM6):
        coarse, odd = np.divmod(fine + 5 - tap, 2)
        reflected = size - 1 - np.abs(coarse % (2 * size - 2) - (size - 1))
        up[np.arange(len(fine))[odd == 0], reflected[odd == 0]] += 2 * weight
        inside = (odd == 0) & (0 <= coarse) & (coarse < size)
        down[coarse[inside], np.arange(len(fine))[inside]] += weight
    at = (fine + 5 - SYM6 @ np.arange(12)) / 2                      # the filter's delay is its centre of mass
    return tuple(torch.from_numpy(a).float().to(device) for a in (up, down, at))


# Mean and deviation of each channel of Stable Diffusion's latents on ImageNet, from the public code of EDM2
# (Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models*). They hold for
# images given to the VAE in [0, 1], as EDM2 gives them; in [-1, 1], its own range, the means are other ones.
LATENT_MEAN, LATENT_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


@functools.lru_cache(maxsize=16)
def latent_scale(device):
    """LATENT_MEAN and LATENT_STD, each (C, 1, 1); kept, because a GPU is waited for to copy them there."""
    return tuple(torch.tensor(n, device=device)[:, None, None] for n in (LATENT_MEAN, LATENT_STD))


def normalise_latent(moments, noise):
    """Moments (B, 2C, r, r) as `Autoencoder.encode` gives them, unit Gaussian noise (B, C, r, r) -> a latent.

    A sample mean + std·noise, brought to mean 0 and deviation 0.5 per channel, as sigma_data = 0.5 expects.
    """
    mean, std = moments.float().chunk(2, dim=1)                                           # (B, C, r, r)
    centre, spread = latent_scale(mean.device)
    return (mean + std * noise - centre) / spread * 0.5


def denormalise_latent(z):
    """(B, C, r, r) -> the sample in the autoencoder's own units that `normalise_latent` brought to z."""
    centre, spread = latent_scale(z.device)
    return z.float() / 0.5 * spread + centre


class Autoencoder(nn.Module):
    """Stable Diffusion's VAE by diffusers, frozen: images (B, 3, R, R) to latents (B, C, R/f, R/f) and back.

    `weights`: a name on Hugging Face, which diffusers downloads once, or a folder. `.name` is that,
    `.channels` C = 4, `.factor` f = 8. Both directions work in float32, on `chunk` images at a time to bound
    the memory. Raises UserError if diffusers or the weights are missing, or C is not 4.
    """

    def __init__(self, weights="stabilityai/sd-vae-ft-mse"):
        super().__init__()
        logging.disable(logging.CRITICAL)             # a hub's many lines on a lost connection
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from diffusers import AutoencoderKL   # optional, and seconds to import
                self.model, report = AutoencoderKL.from_pretrained(
                    weights, output_loading_info=True, low_cpu_mem_usage=False)
            if report["missing_keys"]:                # which diffusers would leave random
                raise ValueError
        except ImportError:
            raise UserError("latents need the package diffusers, which is not installed: "
                            "pip install diffusers") from None
        except Exception as error:                    # whatever a hub, a network or a damaged file raises
            raise UserError(f"the autoencoder '{weights}' cannot be loaded ({type(error).__name__}): connect "
                            f"once so that diffusers can download it, or give a folder with config.json and "
                            f"diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse") from None
        finally:
            logging.disable(logging.NOTSET)
        self.name, self.channels = str(weights), self.model.config.latent_channels
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        if self.channels != len(LATENT_MEAN):
            raise UserError(f"the autoencoder '{weights}' has {self.channels} latent channels of unknown "
                            f"scale: give one with Stable Diffusion's 4, such as stabilityai/sd-vae-ft-mse")
        self.model.float().eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, x, chunk=8):
        """(B, 3, R, R) in [-1, 1] -> moments (B, 2C, R/f, R/f): means, then standard deviations, unscaled."""
        # The network sees [0, 1], as in the code of EDM's successor: the constants above are of such latents.
        with torch.autocast(x.device.type, enabled=False):
            posteriors = [self.model.encode(part).latent_dist for part in ((x.float() + 1) / 2).split(chunk)]
            return torch.cat([torch.cat([q.mean, q.std], 1) for q in posteriors])

    @torch.no_grad()
    def decode(self, z, chunk=8):
        """(B, C, R/f, R/f) as `normalise_latent` gives it -> (B, 3, R, R) in [-1, 1]."""
        with torch.autocast(z.device.type, enabled=False):
            x = torch.cat([self.model.decode(part).sample for part in denormalise_latent(z).split(chunk)])
            return (x * 2 - 1).clip(-1, 1)


# ============================================================================================================
# 10 Plumbing
# ============================================================================================================
@contextlib.contextmanager
def user_errors(what):
    """Turns what the system says of files, disks and permissions into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or error}): "
                        f"choose another place or free some space") from None


@contextlib.contextmanager
def written(path):
    """Gives a path to write to, which then becomes `path`: whole or not at all, whatever happens."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:          # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0][:100]
        raise UserError(f"{path} cannot be written ({reason}): free some space or choose another place; what "
                        f"was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def pick_device(name):
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except Exception:                                 # torch's errors for devices have no common class
        raise UserError(f"--device {name} is not available here: leave the flag away, or use cpu") from None


def set_precision(name, device, auto):
    """Resolves --precision (`auto`: what it is on a GPU) and sets how the device multiplies float32.

    fp32: exactly; tf32: as NVIDIA's TF32, ten bits of mantissa; bf16: TF32 outside of autocast.
    """
    name = name if name != "auto" else auto if device.type == "cuda" else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return name


def compile_network(net, wanted, device):
    """Compiles a network in place with torch.compile: if wanted, or by default (None) on CUDA."""
    if wanted is None and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        print("torch.compile needs Triton, which is not installed: going on without, slower", file=sys.stderr)
    elif wanted or (wanted is None and device.type == "cuda"):
        net.compile()


def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0))


def join_processes(device):
    """Meets the other processes of torchrun, if any. From here on only the first one prints."""
    if processes() == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                         timeout=datetime.timedelta(hours=4))
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def share(items):
    """Of a sequence, this process's part: every so-manieth item."""
    return items[rank()::processes()]


def gather(value):
    """[value of process 0, of process 1, ...] in every process; waits for all of them."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    torch.distributed.all_gather_object(values, value)
    return values


class EMA:
    """Moving average of a network's weights, from which all samples come (EDM, Appendix F).

    beta = 0.5^(batch / max(min(half_life, ramp · images seen), 1e-8)): the half-life grows with the run, so
    that early weights are forgotten early.
    """

    def __init__(self, net, half_life, ramp=0.05):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.half_life, self.ramp = half_life, ramp

    @torch.no_grad()
    def update(self, net, seen, batch):
        """After the optimiser step that brought the images seen from `seen` to seen + batch."""
        beta = 0.5 ** (batch / max(min(self.half_life, self.ramp * seen), 1e-8))
        ours, theirs = list(self.net.parameters()), list(net.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - beta)
        for mine, other in zip(self.net.buffers(), net.buffers()):
            mine.copy_(other)


FORMAT = "twosdm 1"


def save_checkpoint(path, **content):
    """Writes tensors, numbers, strings and dicts, whole or not at all: an older file survives any failure."""
    with written(path) as fresh:
        torch.save(dict(format=FORMAT, **content), fresh)


def load_checkpoint(path, **expected):
    """Reads a checkpoint without running anything in it. `expected`: top entries, such as stage="prior"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: train it first (python train.py --help)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                        # zip, pickle, storage: damaged files fail in many ways
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}): "
                        f"delete it and train again, or give another file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program: give one that train.py wrote")
    for key, value in expected.items():
        if content[key] != value:
            raise UserError(f"{path} is a checkpoint of {key} '{content[key]}', not '{value}': "
                            f"give another file")
    return content


NETWORKS = dict(prior=PriorTransformer, unet=UNet)


def build_denoiser(recipe):
    """A checkpoint's `model`: dict(net="prior" | "unet", settings, predict, sigma_data) -> new Denoiser."""
    net = NETWORKS[recipe["net"]](**recipe["settings"])
    return Denoiser(net, recipe["sigma_data"], recipe["predict"])


def load_denoiser(checkpoint, device="cpu"):
    """The trained denoiser of a checkpoint: its averaged weights, in eval mode."""
    denoiser = build_denoiser(checkpoint["model"])
    denoiser.load_state_dict(checkpoint["ema"])
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    return (denoiser.to(memory_format=torch.channels_last) if checkpoint["model"]["net"] == "unet" else
            denoiser)


def image_grid(pixels, columns):
    """(N, H, W, 3) uint8 -> one picture (rows·(H+1)+1, columns·(W+1)+1, 3) on white, one pixel apart."""
    N, H, W, _ = pixels.shape
    rows = -(-N // columns)
    sheet = np.full((rows * (H + 1) + 1, columns * (W + 1) + 1, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = i // columns * (H + 1) + 1, i % columns * (W + 1) + 1
        sheet[y:y + H, x:x + W] = image
    return sheet


def save_picture(path, pixels, least=0):
    """(H, W, 3) uint8 -> a PNG, whole or not at all; magnified by a whole factor to `least` pixels' width."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    factor = max(1, -(-least // picture.width))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    with written(path) as fresh:
        picture.save(fresh, "PNG")


def run(main):
    """Runs a script's main; a mistake of the user's ends in one sentence and exit code 1, no traceback."""
    code, stderr = 1, sys.stderr                      # before join_processes has silenced all but one
    try:
        code = main()
    except UserError as error:
        if rank():                                    # where all fail alike, torchrun stops the others first
            time.sleep(5)
        print(f"error: {error}", file=stderr)
    except torch.OutOfMemoryError:
        print("error: out of the device's memory: give a smaller --batch (when training, --batch-gpu)",
              file=stderr)
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.stderr = stderr                       # of a silenced process, too, it must be seen
            raise
        print(f"error: torch.compile fails here ({type(error).__name__}): add --no-compile", file=stderr)
    except KeyboardInterrupt:
        code = 130
        print("\nstopped: the same command goes on from what is finished", file=sys.stderr)
    except BrokenPipeError:                           # as in `python evaluate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        sys.stderr = stderr
        raise
    if processes() > 1 and torch.distributed.is_initialized() and code == 0:
        torch.distributed.destroy_process_group()
    sys.exit(code)


# ============================================================================================================
# 11 Preparing images: any folder or zip -> one memory map, of pixels or of latents
# ============================================================================================================
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")    # no EPS: Pillow would start Ghostscript
RECIPE = dict(format=1, crop="centre square of the short side", filter="lanczos", transparency="on white")


class Entry(NamedTuple):
    """Where an image is; in a zip by its offset, so that no worker holds the directory of a million names."""
    name: str           # relative to the source, with "/"
    size: int
    stamp: int          # time of modification in ns (folder) or CRC-32 (zip)
    offset: int = 0     # of the local header in the zip
    packed: int = 0     # bytes in the zip
    method: int = -1    # 0 stored, 8 deflated, -1 a file of its own


def list_images(source):
    """The images of a folder or zip: (entries sorted by name, labels (N,) int64 or None, class names).

    Labels come from EDM's dataset.json where there is one. Otherwise the folders right below the deepest
    folder that holds everything are the classes, in sorted order, if every image lies in one of them.
    """
    source, entries, found = Path(source), [], {}         # found: name of each dataset.json -> its bytes
    try:
        if source.is_dir():
            seen = set()                                  # follow links, but not in circles
            for folder, inner, files in os.walk(source, onerror=raise_error, followlinks=True):
                seen.add(os.path.realpath(folder))
                inner[:] = [name for name in inner if os.path.realpath(Path(folder, name)) not in seen]
                for file in (Path(folder, name) for name in files):
                    name = file.relative_to(source).as_posix()
                    if is_image(name):
                        entries.append(Entry(name, file.stat().st_size, file.stat().st_mtime_ns))
                    elif file.name == "dataset.json":
                        found[name] = file.read_bytes()
        elif source.is_file():
            with zipfile.ZipFile(source) as archive:
                for item in archive.infolist():
                    name = item.filename.replace("\\", "/")
                    if name.startswith("/") or ":" in name.split("/")[0] or ".." in name.split("/"):
                        raise UserError(f"{source} holds the entry {item.filename!r}, which points outside: "
                                        f"do not trust it, or pack it again without such names")
                    name = posixpath.normpath(name)
                    if is_image(name) and not item.is_dir():
                        if item.flag_bits & 1 or item.compress_type not in (0, 8):
                            raise UserError(f"{source}: {name} is encrypted or packed by a rare method: pack "
                                            f"the zip again, without a password, by store or deflate")
                        entries.append(Entry(name, item.file_size, item.CRC, item.header_offset,
                                             item.compress_size, item.compress_type))
                    elif posixpath.basename(name) == "dataset.json":
                        found[name] = archive.read(item)
        else:
            raise UserError(f"{source} is neither a folder nor a zip: give the path of the images")
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, RuntimeError) as error:
        raise UserError(f"{source} cannot be read ({error}): copy or download it again") from error
    if not entries:
        raise UserError(f"{source} holds no images ({' '.join(SUFFIXES)}, at any depth): give another path")
    entries.sort()
    root = posixpath.commonpath({posixpath.dirname(entry.name) for entry in entries})
    inside = [entry.name[len(root):].lstrip("/") for entry in entries]
    if posixpath.join(root, "dataset.json") in found:
        return entries, *json_labels(found[posixpath.join(root, "dataset.json")], source, inside)
    if "dataset.json" in found:
        return entries, *json_labels(found["dataset.json"], source, [entry.name for entry in entries])
    if not all("/" in name for name in inside):
        return entries, None, []
    folders = [name.split("/")[0] for name in inside]
    classes, labels = np.unique(folders, return_inverse=True)
    return entries, labels.astype(np.int64), classes.tolist()


def is_image(name):
    """Whether a name ends like an image's and no part is hidden; a Mac leaves __MACOSX in its zips."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def raise_error(error):
    raise error


def json_labels(content, source, names):
    """(labels (N,), class names) of EDM's {"labels": [[name, int], ...]}, or (None, []) if that is null."""
    try:
        pairs = json.loads(content).get("labels")
        if pairs is None:
            return None, []
        labels = {name.replace("\\", "/"): label for name, label in pairs}
        if not all(type(label) is int and label >= 0 for label in labels.values()):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise UserError(f'dataset.json in {source} is not {{"labels": [[name, number], ...]}} or '
                        f'{{"labels": null}}: repair or remove it') from None
    missing = [name for name in names if name not in labels]
    if missing:
        raise UserError(f"dataset.json in {source} lacks the labels of {len(missing)} images, the first of "
                        f"them {missing[0]}: add them, or remove the file to go without labels")
    labels = np.array([labels[name] for name in names], np.int64)
    return labels, [str(i) for i in range(labels.max() + 1)]


def read_square(content, resolution):
    """The bytes of an image file -> ((R, R, 3) uint8, side of its centre square before resizing).

    Every mode becomes RGB: transparency is laid on white, 16-bit grey is rounded to 8 bits, EXIF orientation
    is applied, colour profiles are ignored, an animation gives its first frame. Raises what Pillow raises.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    image.load()                                     # first: a GIF or TIFF settles its mode only here
    ImageOps.exif_transpose(image, in_place=True)
    side = min(image.size)
    if side < 2:
        raise ValueError(f"only {image.width}x{image.height} pixels")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:
        image = image.crop((left, top, left + side, top + side))
    if image.mode.startswith("I"):                   # Pillow's convert would clip 16 bits to 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose white is not defined")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image), side


def read_entry(source, entry):
    """The bytes of one image; of a zip without unpacking anything to disk."""
    if entry.method < 0:
        return Path(source, entry.name).read_bytes()
    with open(source, "rb") as file:
        file.seek(entry.offset)
        header = file.read(30)                       # ends in the lengths of the two fields that follow
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little"), 1)
        content = file.read(entry.packed)
    if entry.method == 8:
        content = zlib.decompressobj(-15).decompress(content, entry.size + 1)
    if zlib.crc32(content) != entry.stamp:
        raise ValueError("damaged inside the zip")
    return content


def reason(error):
    """Why an image cannot be used, in a few words."""
    text = str(error).split("\n")[0][:100] or type(error).__name__
    return "not a readable image" if "BytesIO" in text else text


def read_chunk(source, entries, resolution):
    """A worker's task -> (pixels of the good (n, R, R, 3), [(position, name, reason)], number enlarged)."""
    pixels, bad, enlarged = [np.empty((0, resolution, resolution, 3), np.uint8)], [], 0
    for position, entry in enumerate(entries):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # Pillow on odd EXIF, palettes and large (not huge) sizes
                square, side = read_square(read_entry(source, entry), resolution)
            pixels.append(square[None])
            enlarged += side < resolution
        except Exception as error:                   # on bad bytes Pillow's readers raise anything
            bad.append((position, entry.name, reason(error)))
    return np.concatenate(pixels), bad, enlarged


def start_worker():
    """Leaves Ctrl-C and SIGTERM to the parent, and ends the worker when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_chunks(source, chunks, resolution, workers):
    """`read_chunk` of all chunks in order, by `workers` processes, with few results waiting in memory."""
    if workers == 1:
        yield from (read_chunk(source, chunk, resolution) for chunk in chunks)
        return
    method = "fork" if sys.platform == "linux" else "spawn"      # forked, a worker need not import torch
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context(method), start_worker)
    waiting = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(read_chunk, source, chunk, resolution))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.BrokenExecutor as error:
        raise UserError("a process that reads images died, probably for lack of memory: start again with "
                        "fewer workers; what is done is kept") from error
    finally:
        pool.shutdown(cancel_futures=True)


def cores():
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LazyPixels:
    """The pixels (N, R, R, 3) of a source, as an array that reads its rows anew whenever they are asked for.

    pixels[rows] -> (*, R, R, 3) uint8, rows as numpy takes them. Raises UserError if a file is gone.
    """

    def __init__(self, source, entries, bad, resolution, workers=None):
        self.source, self.entries, self.workers = str(source), entries, workers or cores()
        self.rows = drop(np.arange(len(entries)), bad)
        self.shape = (len(self.rows), resolution, resolution, 3)

    def __len__(self):
        return len(self.rows)

    def subset(self, rows):
        """pixels[rows], still unread."""
        some = copy.copy(self)
        some.rows, some.shape = self.rows[rows], (len(rows), *self.shape[1:])
        return some

    def __getitem__(self, rows):
        rows = self.rows[rows]
        pixels = np.empty((rows.size, *self.shape[1:]), np.uint8)
        with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            warnings.simplefilter("ignore")          # as in read_chunk; here, as threads share the filters
            for i, square in enumerate(pool.map(self.read, np.ravel(rows))):
                pixels[i] = square
        return pixels.reshape(*rows.shape, *self.shape[1:])

    def read(self, row):
        entry = self.entries[row]
        try:
            return read_square(read_entry(self.source, entry), self.shape[1])[0]
        except Exception as error:                   # on bad bytes Pillow's readers raise anything
            raise UserError(f"{self.source}: {entry.name} cannot be read any more ({reason(error)}): put it "
                            f"back, or start again to prepare the images as they are now") from error


def prepare_images(source, resolution, cache, skip_bad=False, workers=None, autoencoder=None):
    """All images of a folder or zip as `Images` at R x R, prepared once in the folder `cache`, then mapped.

    With an `Autoencoder`, on whatever device it is, the cache holds the images' latents instead of pixels.

    What was prepared is used again only if names, sizes and times of the files (in a zip: checksums), labels
    and recipe are the same; otherwise it is prepared anew beside the old. An interrupted preparation goes on
    where it stopped. Bad images are named at the end, by a UserError unless `skip_bad`.
    """
    if resolution < 1 or (workers is not None and workers < 1):
        raise UserError("the resolution and the number of workers must be at least 1")
    if autoencoder is not None and resolution % autoencoder.factor:
        raise UserError(f"the autoencoder needs a resolution divisible by {autoencoder.factor}, "
                        f"not {resolution}")
    entries, labels, classes = list_images(source)
    digest = hashlib.sha256(b"" if labels is None else labels.tobytes())
    for entry in entries:
        digest.update(f"{entry.name}\0{entry.size}\0{entry.stamp}\n".encode(errors="surrogateescape"))
    recipe = dict(RECIPE, resolution=resolution, classes=classes, source=digest.hexdigest())
    if autoencoder is not None:
        side = resolution // autoencoder.factor
        recipe |= dict(autoencoder=fingerprint(autoencoder), moments=[2 * autoencoder.channels, side, side])
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    cache = Path(cache)
    info = read_cache(cache, key)
    if info is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / "lock"):              # another process may have prepared it while we waited
                info = read_cache(cache, key) or write_cache(
                    source, entries, labels, recipe, key, cache, workers, autoencoder)
        except OSError as error:
            raise UserError(f"cannot write to {cache} ({error.strerror or error}): free some space or choose "
                            f"another folder; what is done is kept") from error
    if info["bad"] and not skip_bad:
        raise UserError(describe(info["bad"], len(entries)))
    labels = None if labels is None else drop(labels, info["bad"])
    kind, shape, dtype = stored(recipe)
    mapped = np.memmap(cache / info[kind], dtype, "r", shape=(info["count"], *shape))
    if autoencoder is None:
        return Images(mapped, labels, classes, info)
    pixels = LazyPixels(source, entries, info["bad"], resolution, workers)
    return Images(pixels, labels, classes, info, mapped)


def stored(recipe):
    """What a cache made by the recipe holds: (kind, shape of a row, its type)."""
    if "autoencoder" in recipe:
        return "latents", tuple(recipe["moments"]), np.float32
    return "pixels", (recipe["resolution"], recipe["resolution"], 3), np.uint8


def drop(values, bad):
    """The values, one for each entry, without those of [(index, name, reason), ...]."""
    return np.delete(values, [index for index, _, _ in bad])


def describe(bad, total):
    """One sentence on [(index, name, reason), ...]."""
    named = ", ".join(f"{name} ({reason})" for _, name, reason in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (f"{len(bad)} of {total} images cannot be used: {named}{more}: repair or remove them, or go on "
            f"without them (--skip-bad); what is done is kept")


@contextlib.contextmanager
def locked(path, busy=""):
    """Holds a lock that ends with the process. Another's is waited for, or a UserError that says `busy`."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError):       # Windows has no fcntl
            import fcntl
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
        yield


def read_cache(cache, key):
    """The JSON of a complete cache that fits the key, or None."""
    try:
        info = json.loads((cache / f"images-{key}.json").read_text())
        kind, shape, dtype = stored(info)
        size = info["count"] * math.prod(shape) * dtype().itemsize
        return info if info["key"] == key and (cache / info[kind]).stat().st_size == size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(source, entries, labels, recipe, key, cache, workers, autoencoder):
    """Appends every image to `pixels-KEY.u8`, then writes and returns the JSON that declares it complete.

    With an autoencoder, the moments of its latent go to `latents-KEY.f32` instead. After each chunk a line
    goes to the file that ends in `.progress`; on resuming, what the first holds beyond the last line is cut
    off, and the JSON arrives by an atomic rename: being killed costs the chunks in flight.
    """
    resolution, (kind, shape, dtype) = recipe["resolution"], stored(recipe)
    row = math.prod(shape) * dtype().itemsize        # bytes
    target = cache / (f"pixels-{key}.u8" if autoencoder is None else f"latents-{key}.f32")
    progress = target.with_suffix(".progress")
    done, rows, enlarged, bad, lines = 0, 0, 0, [], []
    size_before = target.stat().st_size if target.exists() else 0
    for line in progress.read_text().splitlines(keepends=True) if progress.exists() else []:
        if not line.endswith("\n") or json.loads(line)[1] * row > size_before:
            break                                    # a line cut short, or rows that were lost
        done, rows, enlarged, faults = json.loads(line)
        bad, lines = bad + faults, lines + [line]
    need, free = (len(entries) - done) * row - (size_before - rows * row), shutil.disk_usage(cache).free
    if need > free:
        raise UserError(f"{cache} has {free / 1e9:.2f} GB free, but the {kind} need {need / 1e9:.2f} GB "
                        f"more: free some space or choose another folder")
    progress.write_text("".join(lines))
    size = max(1, min(64, 4_000_000 // (3 * resolution**2)))     # images per chunk: at most about 4 MB
    chunks = [entries[i:i + size] for i in range(done, len(entries), size)]
    results = read_chunks(str(source), chunks, resolution, max(1, min(workers or cores(), len(chunks))))
    with (open(target, "ab") as file, open(progress, "a") as log, contextlib.closing(results),
          tqdm(total=len(entries), initial=done, desc="preparing", unit=" images", file=sys.stderr) as bar):
        file.truncate(rows * row)
        for chunk, (pixels, faults, small) in zip(chunks, results):
            values = pixels                          # (n, R, R, 3)
            if autoencoder is not None and len(pixels):
                x = to_float(torch.from_numpy(pixels).to(next(autoencoder.parameters()).device))
                values = autoencoder.encode(x.permute(0, 3, 1, 2)).cpu().contiguous().numpy()
            file.write(values)
            file.flush()                             # rows before their line
            faults = [[done + position, name, reason] for position, name, reason in faults]
            done, rows, enlarged, bad = done + len(chunk), rows + len(pixels), enlarged + small, bad + faults
            log.write(json.dumps([done, rows, enlarged, faults]) + "\n")
            log.flush()
            bar.update(len(chunk))
        os.fsync(file.fileno())
    if not rows:
        raise UserError(describe(bad, len(entries)))
    if enlarged:
        print(f"Warning: {enlarged} of {rows} images are smaller than {resolution}x{resolution} and were "
              f"enlarged.", file=sys.stderr)
    content = hashlib.sha256(b"" if labels is None else drop(labels, bad).tobytes())
    with open(target, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            content.update(block)
    info = dict(recipe, name=str(source), count=rows, enlarged=enlarged, bad=bad, sha256=content.hexdigest(),
                key=key) | {kind: target.name}
    described = cache / f"images-{key}.json"
    with written(described) as fresh:
        fresh.write_text(json.dumps(info, indent=1))
    progress.unlink()
    return info


# ============================================================================================================
# 12 EDM's published networks, read without running what is inside them
# ============================================================================================================
def load_edm_pickle(path):
    """A published `.pkl` of EDM -> a state dict for the `UNet` of its architecture. Raises UserError."""
    return from_edm_names(read_edm_pickle(path)[0])


def from_edm_names(state):
    """EDM's state dict -> one of `UNet`, whose condition is EDM's class label.

    EDM names its blocks by resolution, in the order in which they run; here they are numbered. EDM
    interleaves q, k and v: output channel (head, channel, {q,k,v}); here it is ({q,k,v}, head, channel).
    """
    blocks, result = {"enc": {}, "dec": {}}, {}
    for name, tensor in state.items():
        part, *rest = name.removeprefix("model.").split(".")
        if "resample_filter" in name:                 # a constant
            continue
        if part in blocks and "_aux_" not in rest[0]:
            number = blocks[part].setdefault(rest[0], len(blocks[part]))
            rest = [str(number), *rest[1:]]
        elif part in blocks:                          # dec.64x64_aux_norm -> out_norm
            part, rest = "out_" + rest[0].split("_aux_")[1], rest[1:]
        part = "map_cond" if part == "map_label" else part
        if "qkv" in rest:
            heads_and_channels = tensor.unflatten(0, (-1, 3))
            tensor = heads_and_channels.transpose(0, 1).flatten(0, 1)
        result[".".join([part, *rest])] = tensor.clone()
    return result


def edm_settings(state, path="the file"):
    """EDM's state dict -> keyword arguments of its `UNet`, from the names and shapes of the tensors alone.

    Raises UserError, which names `path`, for any network that this UNet does not load strictly.
    """
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in state.items()}
    levels = {}                                       # resolution -> channels of each encoder block
    try:
        for name, shape in shapes.items():
            if block := re.fullmatch(r"enc\.(\d+)x\1_block\d+\.conv0\.weight", name):
                levels.setdefault(int(block[1]), []).append(shape[0])
            if "resample_filter" in name and shape != (1, 1, 2, 2):
                raise ValueError(shape)               # NCSN++ has four taps
        resolution = max(levels)
        width, channels, *_ = shapes[f"enc.{resolution}x{resolution}_conv.weight"]
        settings = dict(
            resolution=resolution, channels=channels, cond_dim=shapes.get("map_label.weight", (0, 0))[1],
            augment_dim=shapes.get("map_augment.weight", (0, 0))[1],
            arch="adm" if "out_conv.weight" in shapes else "ddpm++", width=width,
            mults=tuple(level[0] // width for level in levels.values()), blocks=len(levels[resolution]),
            attention=tuple(r for r in levels if f"enc.{r}x{r}_block0.qkv.weight" in shapes))
        with torch.device("meta"):                    # shapes without contents: instant at any size
            UNet(**settings).load_state_dict(from_edm_names({k: v.to("meta") for k, v in state.items()}))
    except Exception as error:                       # there are many ways to be another network
        raise UserError(EDM_FILES.format(path)) from error
    return settings


EDM_FILES = ("{} is neither DDPM++ nor ADM with EDM's preconditioning: give one of EDM's edm-*-vp.pkl or "
             "edm-imagenet-64x64-cond-adm.pkl")


def edm_checkpoint(path):
    """A published `.pkl` of EDM -> the checkpoint of a baseline, as far as sampling reads it.

    What the file does not tell is None: images seen, count and fingerprint of the training images. Classes
    have numbers for names and equal counts, because EDM draws them uniformly. Raises UserError.
    """
    state, described = read_edm_pickle(path)
    settings, sigma_data = edm_settings(state, path), described.get("sigma_data")
    # Not so EDM's reruns of other papers (baseline-*.pkl), whose networks have the same shapes.
    if described["class_name"] != "EDMPrecond" or type(sigma_data) is not float or not 0 < sigma_data < 1e3:
        raise UserError(EDM_FILES.format(path))
    name, classes = Path(path).stem, [str(i) for i in range(settings["cond_dim"])]
    return dict(
        stage="baseline", dataset=name, seen=None, embedder=None,
        fingerprints=dict(images=None, embedder=None),
        config=dict(stage="baseline", dataset=name, data="", resolution=settings["resolution"],
                    a="class" if classes else "none", steps=TrainConfig.steps, churn=TrainConfig.churn),
        data=dict(name=name, path="", count=None, fingerprint=None, classes=classes,
                  class_counts=[1] * len(classes) or None),
        model=dict(net="unet", predict="edm", sigma_data=sigma_data, settings=settings),
        ema={f"net.{key}": tensor.float() for key, tensor in from_edm_names(state).items()})


def init_from_edm(denoiser, path, classes=0):
    """For finetuning: makes a new denoiser equal to a published `.pkl` of EDM, whatever y is.

    The condition is y ⊕ a, with a one-hot a of `classes` entries. Its map becomes zero for y, and for a too
    if the file has no classes; a map of augmentation labels becomes zero if the file has none, and the file's
    is dropped if the denoiser has none. Raises UserError, with nothing changed, if anything else differs.
    """
    net, checkpoint = denoiser.net, edm_checkpoint(path)
    assert denoiser.predict == "edm" and classes <= net.cond_dim, (denoiser.predict, classes, net.cond_dim)
    theirs, weights = checkpoint["model"] | checkpoint["model"]["settings"], checkpoint["ema"]
    blocks = [block for block in net.enc[1:] if not block.resample]
    per_level = len(blocks) // (len(net.enc) - len(blocks))
    ours = dict(
        resolution=net.resolution, arch="adm" if net.adm else "ddpm++", width=net.width,
        mults=tuple(block.cout // net.width for block in blocks[::per_level]), blocks=per_level,
        attention=tuple(net.resolution >> i for i, block in enumerate(blocks[::per_level]) if block.heads),
        channels=net.channels, sigma_data=denoiser.sigma_data)
    if net.augment_dim and theirs["augment_dim"]:
        ours["augment_dim"] = net.augment_dim
    for name, value in ours.items():
        if value != theirs[name]:
            setting = f"--{name}" if hasattr(TrainConfig, name) else name
            here, there = (",".join(map(str, v)) or "none" if isinstance(v, tuple) else v
                           for v in (value, theirs[name]))
            raise UserError(f"{setting} {here} does not fit {path}, which is for {there}: change one of them")
    labels = theirs["cond_dim"]
    if labels and labels != classes:
        raise UserError(f"{path} is for {labels} classes and the new network for {classes or 'none'}: give "
                        f"--a class and images of {labels} classes, or another file")
    if net.cond_dim:
        known = weights.get("net.map_cond.weight")
        weights["net.map_cond.weight"] = torch.zeros(net.map_cond.weight.shape)
        if labels:                                    # DDPM++ multiplies a condition by √(its length)
            scale = 1.0 if net.adm else math.sqrt(labels / net.cond_dim)
            weights["net.map_cond.weight"][:, -labels:] = scale * known
        if not net.adm:
            weights.setdefault("net.map_cond.bias", torch.zeros(net.width))
    if net.augment_dim:
        weights.setdefault("net.map_augment.weight", torch.zeros(net.map_augment.weight.shape))
    else:
        weights.pop("net.map_augment.weight", None)
    denoiser.load_state_dict(weights)


def read_edm_pickle(path):
    """EDM's .pkl -> (state, settings) of its `ema` network.

    state: EDM's tensor names ("model.enc.64x64_conv.weight", ...) -> tensors on the CPU. settings: class_name
    and every plain entry (numbers, strings, lists and dicts of them) of the top object; settings["modules"]:
    the same for each module, by name ("model", "model.enc.64x64_block0", ...). Raises UserError.
    """
    try:
        with open(path, "rb") as file:
            network = restricted_unpickler(file, path).load()["ema"]
        state, modules = {}, {}
        collect(network, "", state, modules)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check the path") from error
    except Exception as error:                       # foreign, hostile or cut bytes fail in any way they like
        raise UserError(f"{path} is not one of EDM's network pickles, or not a whole one "
                        f"({type(error).__name__}): download it again") from error
    if not state:
        raise UserError(f"{path} holds no weights: give one of EDM's network pickles")
    return state, dict(modules.pop(""), modules=modules)


def restricted_unpickler(file, path):
    """An unpickler that knows EDM's globals only, each replaced by something inert.

    A pickle can call what it names with any arguments, set any attribute of what it holds, and call its
    __setstate__. So it never holds a real tensor, storage, dtype or module, but `Inert` boxes; and classes
    and functions are made anew for each file, so that nothing it sets on them outlives the reading.
    """
    class Inert:
        """A module, whose value is its __dict__, or a tensor, or the storage of one."""
        __slots__ = ("value", "class_name")

        def __init__(self, value=None, class_name=None):
            self.value, self.class_name = value, class_name

        def __setstate__(self, value):
            self.value = value

    class Dtype(Inert):
        """numpy's: its name is the first argument, its byte order the second entry of its state."""
        __slots__ = ()

        def __init__(self, name, *flags):
            self.value = name

        def __setstate__(self, fields):
            self.value = fields[1].replace("|", "") + self.value

    class EasyDict(dict):
        __slots__ = ()

        def __setstate__(self, ignored):
            pass

    def persistent(meta):                            # meta["module_src"], EDM's source code, is left unread
        return Inert(meta["state"], meta["class_name"])

    def storage(content):
        try:
            return Inert(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL (\S+)", str(error))         # in torch's words, without "builtins."
            raise UserError(refusal(path, name[1] if name else "unknown code")) from error

    def tensor(box, offset, size, stride, *ignored):
        flat = torch.empty(0, dtype=box.value.dtype).set_(box.value)
        return Inert(flat.as_strided(size, stride, offset).clone())       # raises if it leaves the storage

    def parameter(box, *ignored):
        return box

    def scalar(dtype, content):                      # numbers only: object scalars would be pointers
        if not re.fullmatch(r"[<>=]?[biuf][1248]", dtype.value):
            raise ValueError(dtype.value)
        return np.frombuffer(content, dtype.value, 1)[0].item()

    known = {"torch_utils.persistence._reconstruct_persistent_obj": persistent,
             "torch.nn.modules.container.ModuleDict": Inert, "dnnlib.util.EasyDict": EasyDict,
             "collections.OrderedDict": EasyDict, "builtins.set": set,
             "torch.storage._load_from_bytes": storage, "torch._utils._rebuild_tensor_v2": tensor,
             "torch._utils._rebuild_parameter": parameter, "numpy.dtype": Dtype,
             "numpy.core.multiarray.scalar": scalar, "numpy._core.multiarray.scalar": scalar}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" not in known:
                raise UserError(refusal(path, f"{module}.{name}"))
            return known[f"{module}.{name}"]

    return Unpickler(file)


def refusal(path, name):
    return f"{path} asks for {name}, which no pickle of EDM needs: nothing was run, do not trust this file"


def collect(module, name, state, modules):
    """Adds the tensors of a boxed module and those inside it to `state`, the plain entries to `modules`."""
    fields = module.value
    entries = {key: plain(value) for key, value in fields.items() if key[0] != "_" or key == "_init_kwargs"}
    entries = {key: value for key, value in entries.items() if value is not None}
    modules[name] = dict(entries, class_name=getattr(module, "class_name", None) or "ModuleDict")
    prefix = f"{name}." if name else ""
    for key, box in [*fields["_parameters"].items(), *fields["_buffers"].items()]:
        if box is not None:
            assert isinstance(box.value, torch.Tensor)
            state[prefix + key] = box.value
    for key, inner in fields["_modules"].items():
        if inner is not None:
            collect(inner, prefix + key, state, modules)


def plain(value):
    """What of the value is made of numbers, strings, lists and dicts; None if nothing is."""
    if isinstance(value, dict):
        kept = {key: plain(inner) for key, inner in value.items() if isinstance(key, str)}
        return {key: inner for key, inner in kept.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (bool, int, float, str)) else None
