"""Trains the stages of 2SDM: the prior, the image model, and EDM's baseline to compare with.

    python train.py                                                   everything, on the embedded world
    python train.py --dataset afhq --data afhq_v2/ --stage prior      one stage of one of the paper's settings

A run lives in runs/<dataset>/<stage>/: checkpoint.pt, log.jsonl, samples-*.png, snapshot-*.pt.
Started again it goes on where it stopped.
"""
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import twosdm
from twosdm import LABEL_DIM, UserError, cache_of, full_float32, mix_seed, processes, rank, say, send


# ============================================================================================================
# 1 Settings
# ============================================================================================================
K = 1_000
M = 1_000_000
STAGES = ["prior", "image", "baseline", "joint"]


@dataclass
class Config:
    """All settings of an experiment, each of which is a flag. The defaults are the paper's for FFHQ.

    Where a number is from stands behind it: paper, authors (their code, where the paper is silent), EDM,
    inferred, ours. K = 1,000, M = 1,000,000. Flags have - for _: --prior-lr 1e-3 --images 500k --mults 1,2,2
    """
    stage: str = "all"                  # prior, image, baseline or joint; all: the first three

    # Data
    dataset: str = "shapes"             # fashion-mnist, cifar10, folder (your images), afhq, ffhq, imagenet,
                                        # imagenet-class or imagenet-latent; each changes some defaults:
                                        # PRESETS, in this file, says which
    data: str = ""                      # folder or zip with the images
    resolution: int = 64                # height and width of the images, in pixels (paper)
    size: int = 20 * K                  # number of images of the embedded world
    limit: int = 0                      # train on so many of the images; 0 = all
    skip_bad: bool = False              # leave out images that cannot be read instead of stopping
    augment: float = 0.15               # probability of each geometric augmentation (paper, EDM)
    views: int = 32                     # augmented views of each image that the prior is trained on (ours)
    vae: str = ""                       # diffuse in the latents of this Stable Diffusion VAE

    # What the models are told
    embedder: str = "clip"              # clip, pixels (the image at 4x4) or shapes (the world's own) (paper)
    embedder_weights: str = "openai"    # of CLIP: a name that open_clip downloads, or a file (paper)
    y: str = "all"                      # what of the embedding is kept: all, pca:D or kmeans:K of it
    y_dropout: float = 0.0              # how often the image model is not told y, for guidance (ours)
    a: str = "none"                     # what the user conditions on: none or class

    # The prior
    prior_images: int = 100 * M         # length of its training, in images seen (ours; paper: a V100-day)
    prior_batch: int = 256              # (authors)
    prior_lr: float = 1e-4              # (authors)
    prior_width: int = 512              # (authors)
    prior_depth: int = 6                # (authors)
    prior_heads: int = 8                # (authors)

    # The image model and the baseline
    images: int = 25 * M                # length, in images seen (inferred: EDM's 200 M are 32 GPU-days)
    batch: int = 256                    # (paper: as EDM)
    lr: float = 2e-4                    # (paper: as EDM)
    arch: str = "ddpm++"                # ddpm++ or adm (paper)
    width: int = 128                    # channels at the finest level (EDM)
    mults: tuple = (1, 2, 2, 2)         # of the channels, for each level (EDM)
    blocks: int = 4                     # per level (EDM)
    attention: tuple = (16,)            # the resolutions that have it (EDM)
    dropout: float = 0.05               # (paper: as EDM)
    init_from: str = ""                 # EDM's .pkl whose weights to start from; --images 0: as it is

    # All of them
    lr_ramp: int = 10 * M               # images over which the step size rises from 0 (EDM)
    ema_half_life: int = 500 * K        # of the weights' moving average, in images (EDM)
    ema_ramp: float = 0.05              # half-life at most this share of the images seen (EDM)
    steps: int = 40                     # of the sampler: 2 steps - 1 network evaluations (paper)
    churn: float = 50.0                 # S_churn of the sampler; 0 = deterministic (paper)

    # Machine and files
    seed: int = 0                       # of the training; the data stay the same
    runs: str = "runs"                  # folder of all runs
    tag: str = ""                       # suffix of the run's folder, to keep a variant beside others
    device: str = "auto"                # cuda, cuda:1, cpu; auto: cuda, else cpu
    precision: str = "auto"             # fp32, tf32 or bf16; auto: bf16 where a GPU is fast in it, else fp32
    compile: bool = False               # torch.compile the networks
    batch_gpu: int = 32                 # images of the U-Net per forward pass, to fit 16 GB
    threads: int = 0                    # of the CPU for each stage; stages then run side by side; 0 = all
    log_every: int = 50 * K             # images between lines of log.jsonl
    preview_every: int = 1 * M          # images between pictures of samples; 0 = none
    snapshot_every: int = 0             # images between snapshots of the averaged weights; 0 = none
    save_minutes: float = 10.0          # between checkpoints


ADM = dict(twosdm.ARCHITECTURES["adm"], arch="adm", batch_gpu=8)          # EDM
# Paper: batch, lr, no augmentation. EDM: dropout; its EMA of 50 M images belongs to its 2,500 M.
IMAGENET = dict(ADM, augment=0.0, dropout=0.10, batch=128, lr=1e-4)
# Ours: minutes on a CPU, where many small steps learn more than few large ones.
SMALL = dict(resolution=16, augment=0.0, prior_images=400 * K, prior_batch=64, prior_lr=1e-3, prior_width=128,
             prior_depth=3, prior_heads=4, batch=16, width=24, mults=(1, 2, 2), blocks=1, attention=(4,),
             dropout=0.0, lr_ramp=4 * K, steps=18, churn=0.0, threads=1, log_every=2 * K, save_minutes=0.2)

PRESETS = {
    "afhq": dict(dropout=0.25),                       # paper: as EDM
    "ffhq": {},
    "imagenet": IMAGENET,
    "imagenet-class": dict(IMAGENET, a="class"),
    "imagenet-latent": dict(IMAGENET, a="class", resolution=256, vae="stabilityai/sd-vae-ft-mse",
                            batch_gpu=32),            # latents are smaller
    "cifar10": dict(resolution=32, a="class", augment=0.12, dropout=0.13, mults=(2, 2, 2), images=200 * M,
                    batch=512, lr=1e-3, batch_gpu=64),                    # EDM
    # Ours: your own images, and two data sets for a laptop.
    "folder": dict(SMALL, images=90 * K, lr=3e-3, preview_every=20 * K),
    "fashion-mnist": dict(SMALL, embedder="pixels", images=80 * K, lr=3e-3, preview_every=20 * K),
    "shapes": dict(SMALL, embedder="shapes", images=32 * K, lr=4e-3, preview_every=16 * K,
                   snapshot_every=10 * K),
}


CHOICES = {
    "stage": ["all", *STAGES],
    "dataset": PRESETS,
    "embedder": twosdm.EMBEDDERS,
    "a": ["none", "class"],
    "arch": twosdm.ARCHITECTURES,
    "precision": ["auto", "fp32", "tf32", "bf16"]
}


def configure(dataset="shapes", **changes):
    """The settings of an experiment: the defaults, then the preset, then the changes. Raises UserError."""
    config = Config(dataset=dataset, **PRESETS[dataset] | changes)
    if config.data:
        config.data = str(Path(config.data).absolute())                   # sample.py may be run elsewhere
    if config.dataset == "folder" and not config.data:
        raise UserError("--dataset folder needs your images: add --data FOLDER_OR_ZIP")
    kind, _ = twosdm.parse_y(config.y)
    halved = 2 ** (len(config.mults) - 1) * (8 if config.vae else 1)
    if config.resolution % halved:
        raise UserError(f"--resolution {config.resolution} is halved at each level: {halved} must divide it")
    if config.arch == "adm" and config.width % 64:
        raise UserError("--arch adm has heads of 64 channels: give a --width that 64 divides")
    if config.embedder == "shapes" and config.dataset != "shapes":
        raise UserError("--embedder shapes knows the embedded world alone: give clip or pixels")
    if config.vae and config.augment:
        raise UserError("--vae keeps the latents of images as they are: give --augment 0")
    if config.a == "class" and kind == "kmeans":
        raise UserError("--y kmeans draws clusters regardless of the class: give --a none")
    return config


def lengths(config, stage):
    """(images seen, batch, step size) of a stage's training."""
    if stage == "prior":
        return config.prior_images, config.prior_batch, config.prior_lr
    return config.images, config.batch, config.lr


# ============================================================================================================
# 2 Data, models, loss
# ============================================================================================================
class TrainingData:
    """What a stage learns from: batch(rows) -> x, y, a and augmentation labels of these training images.

    Raises UserError for images that are missing, and for --a class without classes.
    """

    def __init__(self, config, stage, device):
        self.config = config
        self.stage = stage
        self.device = device
        self.autoencoder = twosdm.Autoencoder(config.vae).to(device) if config.vae else None
        self.images = twosdm.load_images(config, self.autoencoder)
        self.augment = twosdm.Augment(config.augment) if config.augment else None
        self.classes = 0
        if config.a == "class":
            self.classes = len(self.images.classes)
            if not self.classes:
                raise UserError(f"--a class needs images in one folder per class, or a dataset.json, but "
                                f"{self.images.why_no_classes}")
        self.embedder = None
        self.bank = None
        if stage in ("prior", "image"):
            self.embedder = find_embedder(config, self.images, device)
            # The prior is tiny and CLIP is not: it trains from embeddings that are computed once.
            if stage == "prior" or self.augment is None:
                self.bank = twosdm.embedding_bank(self.images, self.embedder, cache_of(config), self.augment,
                                                  config.views, device)

    def batch(self, rows):
        """(B,) -> x (B, C, H, W), y (B, D), a (B, A), label (B, 9); None for what this stage does not use."""
        x = None
        y = None
        a = None
        label = None
        if self.classes:
            a = F.one_hot(send(self.images.labels[rows], self.device), self.classes).float()
        if self.stage != "prior":
            if self.autoencoder is not None:
                x = self.autoencoder.sample(send(self.images.latents[rows], self.device))
            else:
                x = self.images.batch(rows, self.device)
            if self.augment is not None:              # `configure` refuses it for latents
                x, label = self.augment(x)
        if self.bank is not None:
            view = torch.randint(len(self.bank), (len(rows),)).numpy()
            stored = send(self.bank[view, rows], self.device)                 # (B, embedder's dim + 9)
            y = self.embedder.reduce(stored[:, :-LABEL_DIM])
            if self.augment is not None:
                label = stored[:, -LABEL_DIM:]
        elif self.embedder is not None:
            y = self.embedder(x)                      # of the augmented image
        if self.config.y_dropout and self.stage == "image":
            y = y * (torch.rand(len(y), 1, device=self.device) >= self.config.y_dropout)
        return x, y, a, label


def find_embedder(config, images, device):
    """e_i. What is decided by all training images, such as clusters, is decided once."""
    embedder = twosdm.Embedder(config.embedder, twosdm.embedder_weights(config)).to(device)
    kind, size = twosdm.parse_y(config.y)
    if kind == "all":
        return embedder

    def fit():
        bank = twosdm.embedding_bank(images, embedder, cache_of(config), device=device)
        most = embedder.dim if kind == "pca" else len(images)
        if size > most:
            raise UserError(f"--y {config.y}: there are {embedder.dim} dimensions and {len(images)} images: "
                            f"give at most {most}")
        return twosdm.REDUCTIONS[kind].fit(bank[0, :, :-LABEL_DIM], size).state_dict()

    weights = twosdm.fingerprint(embedder.backbone)
    path = cache_of(config) / f"{kind}{size}-{images.name}-{config.embedder}-{weights}.pt"
    embedder.reduction = twosdm.REDUCTIONS[kind](**twosdm.cached(path, fit))
    return embedder.to(device)


class Models(nn.Module):
    """What a stage trains: a prior, an image model (the baseline: without y), an embedder, or all of these.

    forward: a batch of `TrainingData` -> the loss (B,). Overfit-2SDM (Appendix B) trains all three: its
    embedder starts from random weights and learns from both losses through y.
    Departure: one backward pass of the sum, where the paper accumulates the gradients of two: they are equal.
    """

    def __init__(self):
        super().__init__()
        self.prior = None
        self.image = None
        self.embedder = None

    def forward(self, x, y, a, label):
        if self.embedder is not None:
            with full_float32(x.device):              # the prior predicts y, so y is not to be rounded
                y = self.embedder(x).float()
        prior_loss = 0.0 if self.prior is None else self.prior.loss(y, a, label)                   # Eq. 4
        image_loss = 0.0 if self.image is None else self.image.loss(x, twosdm.join(y, a), label)   # Eq. 5
        return prior_loss + image_loss


def describe(config, stage, data):
    """What a stage's denoisers are, {"prior" or "image": ...}, in plain numbers for `build_denoiser`."""
    dim = 0
    if stage == "joint":
        dim = twosdm.EMBEDDERS[config.embedder].dim
    if data.embedder is not None:
        dim = data.embedder.dim
    augment_dim = LABEL_DIM if config.augment else 0
    channels = 3
    resolution = config.resolution
    if config.vae:                                    # of the latents
        channels = 4
        resolution //= 8
    prior = dict(dim=dim, cond_dim=data.classes, augment_dim=augment_dim, width=config.prior_width,
                 depth=config.prior_depth, heads=config.prior_heads)
    image = dict(resolution=resolution, channels=channels, cond_dim=dim + data.classes,
                 augment_dim=augment_dim, arch=config.arch, dropout=config.dropout, width=config.width,
                 mults=config.mults, blocks=config.blocks, attention=config.attention)
    models = {}
    if stage in ("prior", "joint"):
        models["prior"] = dict(net="prior", settings=prior)
    if stage != "prior":
        models["image"] = dict(net="unet", settings=image)
    return models


def build(config, stage, described, data):
    """New models with random weights."""
    torch.manual_seed(config.seed)
    models = Models()
    for part, model in described.items():
        denoiser = twosdm.build_denoiser(model)
        if config.compile:
            denoiser.net.compile()                    # when it is first used; copies of it are not compiled
        setattr(models, part, denoiser)
    if stage == "joint":
        models.embedder = twosdm.EMBEDDERS[config.embedder]()
    # On a GPU, GroupNorm undoes it unless it is compiled.
    if data.device.type == "cpu" or config.compile:
        models.to(memory_format=torch.channels_last)
    return models.to(data.device)


# ============================================================================================================
# 3 The loop
# ============================================================================================================
def train(config, stage, device):
    """Trains one stage to its length, from its checkpoint if there is one. Raises UserError."""
    length, batch, lr = lengths(config, stage)
    team = processes()
    if batch % team:
        raise UserError(f"a batch of {batch} cannot be shared equally by {team} processes")
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = twosdm.set_precision(config.precision, device)
    # The prior predicts y itself, of which bf16 would leave 8 bits.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and stage != "prior")
    data = TrainingData(config, stage, device)
    run = Run(config, stage, data)
    model = DistributedDataParallel(run.models) if team > 1 else run.models
    share = batch // team                             # of each batch, for this process
    parts = 1 if stage == "prior" else math.ceil(share / config.batch_gpu)
    losses = []                                       # of the parts since the last line of the log
    start = run.seen                                  # images seen, and the time, at that line
    began = time.time()
    saved = time.time()
    bar = twosdm.progress(what=f"{stage:>8}", total=length, initial=run.seen)
    while run.seen < length:
        # All randomness follows from these numbers: a resumed run goes on as it would have.
        torch.manual_seed(mix_seed(config.seed, run.seen, rank()))
        first = run.seen + rank() * share
        rows = shuffled(first, first + share, len(data.images), config.seed)
        # A linear ramp, then constant. Departure: it counts this batch, so that no step has size 0.
        run.optimizer.param_groups[0]["lr"] = lr * min((run.seen + batch) / max(config.lr_ramp, 1), 1)
        run.optimizer.zero_grad()
        for i, part in enumerate(np.array_split(rows, parts)):
            x, y, a, label = data.batch(part)
            # DistributedDataParallel adds up gradients once per step, with the last part; others ignore it.
            model.require_backward_grad_sync = i == parts - 1
            with autocast:
                loss = model(x, y, a, label)
            (loss.sum() / share).backward()
            losses.append(loss.detach().mean())
        for parameter in run.models.parameters():     # as EDM does
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        run.optimizer.step()
        run.ema.update(run.models, run.seen, batch)
        run.seen += batch
        bar.update(batch)

        if due(run.seen, batch, length, config.log_every):
            mean_loss = run.write_log(losses, run.seen - start, began)
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            losses = []
            start = run.seen
            began = time.time()
        if stage != "prior":                          # which draws no images
            if due(run.seen, batch, length, config.snapshot_every):
                run.save(f"snapshot-{run.seen:010d}.pt")
            if due(run.seen, batch, length, config.preview_every):
                run.preview()
        if time.time() - saved > 60 * config.save_minutes or run.seen >= length:
            run.save_all()
            saved = time.time()
    bar.close()
    say(f"{stage}: {run.seen:,} images seen; it is in {run.folder}")


@functools.lru_cache(2)
def order(total, seed, epoch):
    """The order of all images in an epoch: (total,)."""
    return np.random.RandomState(mix_seed(seed, epoch)).permutation(total)


def shuffled(start, stop, total, seed):
    """-> (stop - start,) rows: the images that training sees as number start, ..., stop - 1.

    Departure: each epoch is a permutation of all images, which follows from (seed, epoch) alone; EDM shuffles
    within a window that moves over the data, which has a memory.
    """
    return np.array([order(total, seed, n // total)[n % total] for n in range(start, stop)])


def due(seen, batch, length, every):
    """Whether this batch has reached a multiple of `every` images, or the end; never if that is 0."""
    return every > 0 and (seen >= length or seen % every < batch)


# ============================================================================================================
# 4 A run: what its training changes, and its files
# ============================================================================================================
class Run:
    """A stage's models, their moving average and optimizer, the images seen; new, or from its checkpoint.

    Of several processes only the first one writes.
    """

    def __init__(self, config, stage, data):
        self.config = config
        self.stage = stage
        self.data = data
        self.folder = twosdm.run_folder(config.runs, config.dataset, stage, config.y, config.tag)
        self.described = describe(config, stage, data)
        self.models = build(config, stage, self.described, data)
        ramp = config.ema_ramp
        if config.init_from and stage != "prior":
            # As EDM and the authors: pretrained weights stay in the average, which has no ramp then.
            twosdm.init_from_edm(self.models.image.net, config.init_from, data.classes)
            ramp = None
        self.ema = twosdm.EMA(self.models, config.ema_half_life, ramp)
        # PyTorch's betas and epsilon are EDM's, and there is no weight decay.
        self.optimizer = torch.optim.Adam(self.models.parameters(), fused=True)
        self.seen = 0
        self.log = []
        path = self.folder / "checkpoint.pt"
        if path.exists():
            self.restore(path)
        else:
            self.save_all()

    def restore(self, path):
        """Goes on from a checkpoint. Raises UserError if it was trained with other settings."""
        checkpoint = twosdm.load_checkpoint(path)
        for name, value in self.identity().items():
            old = checkpoint["identity"][name]
            if old != value:
                raise UserError(f"{path} was trained with {name} {old}, not {value}: use its settings, or "
                                f"keep both by --tag NAME or another --runs folder")
        self.models.load_state_dict(checkpoint["net"])
        self.ema.net.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.seen = checkpoint["seen"]
        self.log = checkpoint["log"]

    def identity(self):
        """What a run may not change on its way."""
        config = self.config
        _, batch, lr = lengths(config, self.stage)
        return dict(images=self.data.images.name, embedder=config.embedder, y=config.y,
                    y_dropout=config.y_dropout, augment=config.augment, vae=config.vae, batch=batch, lr=lr,
                    init_from=config.init_from, seed=config.seed, models=self.described)

    def save(self, name, **more):
        """All that samples need, and `more`: what training goes on from."""
        if rank() > 0:
            return
        images = self.data.images
        embedder = self.data.embedder
        counts = []
        if images.classes:
            counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
        twosdm.save_checkpoint(
            self.folder / name,
            stage=self.stage,
            config=asdict(self.config),
            identity=self.identity(),
            models=self.described,
            embedder=None if embedder is None else twosdm.pack_embedder(embedder),
            class_counts=counts,
            seen=self.seen,
            log=self.log,
            ema=self.ema.net.state_dict(),
            **more
        )

    def save_all(self):
        """Writes checkpoint.pt, from which training goes on."""
        self.save("checkpoint.pt", net=self.models.state_dict(), optimizer=self.optimizer.state_dict())

    def write_log(self, losses, images, began):
        """A line of log.jsonl: mean loss per number of x and y (of several processes the first's), and speed.

        losses: of the images since `began`.
        """
        numbers = 0
        for model in self.described.values():
            settings = model["settings"]
            # A prior has dim numbers of y, an image model C x R x R of x.
            numbers += settings.get("dim") or settings["channels"] * settings["resolution"] ** 2
        # `item` waits for the GPU, before the clock is read.
        loss = torch.stack(losses).mean().item() / numbers
        if not math.isfinite(loss):
            raise UserError("the loss is not finite: give a lower --lr or --precision fp32, and a new --tag")
        speed = images / (time.time() - began)
        self.log.append(dict(images=self.seen, loss=loss, images_per_second=round(speed, 1)))
        if rank() == 0:
            # Written anew: what a killed run had written after its last checkpoint is not in it any more.
            with twosdm.written(self.folder / "log.jsonl") as file:
                for line in self.log:
                    file.write(json.dumps(line).encode() + b"\n")
        return loss

    @torch.no_grad()
    def preview(self):
        """A grid of samples: 18 steps, no churn, y as in training."""
        data = self.data
        models = self.ema.net
        if rank() > 0:
            return
        rows = np.random.RandomState(0).permutation(len(data.images))[:64]
        x, y, a, _ = data.batch(rows)
        if models.embedder is not None:
            y = models.embedder(x)
        noise = twosdm.SampleNoise(range(len(rows)), data.device, twosdm.IMAGE)
        x = twosdm.sample_images(models.image, noise, y, a, twosdm.Sampler(steps=18, s_churn=0.0))
        if data.autoencoder is not None:
            x = data.autoencoder.decode(x)
        pixels = twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
        picture = twosdm.picture({f"{self.stage}, {self.seen:,} images seen": pixels}, columns=8)
        twosdm.save_picture(self.folder / f"samples-{self.seen:09d}.png", picture)


# ============================================================================================================
# 5 The command line
# ============================================================================================================
def main():
    config = configure(**twosdm.parse_flags(Config, __doc__, CHOICES))
    stage = config.stage
    stages = [stage]
    if stage == "all":
        stages = ["prior", "image", "baseline"] if twosdm.has_prior(config.y) else ["image", "baseline"]
    elif stage == "prior" and not twosdm.has_prior(config.y):
        raise UserError(f"--y {config.y} leaves the prior nothing to learn: leave out --stage prior")
    elif stage == "joint" and (config.y != "all" or config.vae or config.embedder == "pixels"):
        raise UserError("--stage joint trains an embedder of images: leave out --y, --vae, --embedder pixels")
    device = twosdm.pick_device(config.device)
    twosdm.start_processes(device)
    say(f"Training {', '.join(stages)} of {config.dataset} on {device}; an interrupted command goes on when "
        f"it is given again.")
    if len(stages) > 1 and config.threads and device.type == "cpu" and processes() == 1:
        side_by_side(config, stages)
    else:
        for stage in stages:
            train(config, stage, device)
    say(f"Next: python sample.py --dataset {config.dataset}; with --runs, --y and --tag as here, if given")


def side_by_side(config, stages):
    """Trains stages that do not need each other at once on the CPU, each in a process of its own.

    Small networks do not keep many threads busy: with one each, two processes do twice as much as one. What
    several of them need, such as the embedder, the first one makes, while the others wait for it.
    """
    context = multiprocessing.get_context("spawn")
    children = []
    for row, stage in enumerate(stages):
        child = context.Process(target=run_child, args=(config, stage, row), daemon=True)
        child.start()
        children.append(child)
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        sys.exit(1)


def run_child(config, stage, row):
    """Trains one of the stages that are side by side. `row` of the terminal has its progress bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C is for the parent, with which this one ends
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())                  # the usual one warns when a process is ended
    twosdm.bar_row = row
    twosdm.run(functools.partial(train, config, stage, torch.device("cpu")))


def end_with_parent():
    """Waits for the end of the parent, even by kill -9, and ends this process."""
    multiprocessing.parent_process().join()
    os._exit(1)


if __name__ == "__main__":
    twosdm.run(main)
