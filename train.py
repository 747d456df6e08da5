"""Trains the stages of 2SDM: embedder (where it is not the public CLIP), prior, image model, EDM baseline.

    python train.py                                                   everything, on the embedded world
    python train.py --dataset afhq --data afhq_v2/ --stage prior      one stage of one of the paper's settings

A run lives in runs/<dataset>/<stage>/: checkpoint.pt, log.jsonl, samples-*.png.
Started again it goes on where it stopped.
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import twosdm
from twosdm import UserError

ADAM = dict(betas=(0.9, 0.999), eps=1e-8)              # no weight decay
LOSS_BINS = (0.05, 0.15, 0.4, 1.2)                    # edges of sigma between which log.jsonl splits the loss


def network(config, y_dim, a_dim, shape):
    """The network of a stage as plain numbers, for `twosdm.build_denoiser` and for checkpoints.

    y_dim, a_dim: of the embedding and the classes, 0 for none; shape (C, H, W) of images or latents.
    """
    c, augment_dim = config, 9 if config.augment else 0
    if c.stage == "prior":
        return dict(net="prior", predict=c.prior_predicts, sigma_data=0.5, settings=dict(
            dim=y_dim, cond_dim=a_dim, augment_dim=augment_dim, width=c.prior_width, depth=c.prior_depth,
            heads=c.prior_heads))
    return dict(net="unet", predict="edm", sigma_data=0.5, settings=dict(
        resolution=shape[1], channels=shape[0], cond_dim=y_dim + a_dim, augment_dim=augment_dim, arch=c.arch,
        width=c.width, mults=c.mults, blocks=c.blocks, attention=c.attention, dropout=c.dropout))


class Embedding:
    """The embedder's stage: the symmetric contrastive loss of images and captions (shapes only)."""
    recipe, more, networks = dict(net="small-clip"), {}, ()

    def __init__(self, config, images, device):
        if config.dataset != "shapes" or config.embedder != "shapes":
            raise UserError("only the embedder of shapes is trained: leave --stage embedder away")
        self.config, self.images = config, images
        self.captions = twosdm.shapes_captions(torch.arange(len(images)), config.seed)
        self.module, self.device = twosdm.SmallClip(), device

    def draw(self, rows):
        return dict(sigma=torch.ones(len(rows)))

    def loss(self, rows, draws):
        loss = self.module.loss(self.images.batch(rows, self.device), [self.captions[i] for i in rows])
        return loss, draws["sigma"]

    def embed(self, module, images):
        with torch.no_grad():
            parts = np.array_split(np.arange(len(images)), -(-len(images) // 500))
            return torch.cat([module(images.batch(rows, self.device)).cpu() for rows in parts])

    def finish(self, module):
        """Scales the embedding to rms 0.5 over the training set; -> how well a linear probe reads it."""
        y, size = self.embed(module, self.images), len(self.images)
        factor = 0.5 / y.square().mean().sqrt()
        module.scale.mul_(factor.to(self.device))
        fresh, seed = torch.arange(size, size + 2000), self.config.seed
        held_out = self.embed(module, twosdm.shapes_world(fresh, self.config.resolution, seed))
        y, truth = y * factor, twosdm.shapes_attributes(torch.arange(size), seed)
        accuracy = {}
        for name, kinds in twosdm.ATTRIBUTES.items():  # least squares from [y, 1] to the one-hot attribute
            probe = torch.linalg.lstsq(F.pad(y, (0, 1), value=1),
                                       F.one_hot(truth[name], kinds).float()).solution
            guess = (F.pad(held_out, (0, 1), value=1) @ probe).argmax(1)
            right = (guess == twosdm.shapes_attributes(fresh, seed)[name]).float().mean().item()
            accuracy[name] = round(right, 4)
        print("\na linear probe on held-out images reads "
              + ", ".join(f"{k} {v:.1%}" for k, v in accuracy.items()))
        return dict(linear_probe=accuracy)

    def preview(self, module, path):
        pass


class Diffusion:
    """The stages of prior (Eq. 4), image model (Eq. 5) and baseline (Eq. 5 without y): one loss for all."""

    def __init__(self, config, images, device, embedder=None, autoencoder=None):
        self.config, self.images, self.device, self.more = config, images, device, {}
        self.embedder, self.autoencoder = embedder, autoencoder
        self.augment = twosdm.Augment(config.augment) if config.augment else None
        folder, self.bank = Path(config.runs) / config.dataset, None
        if config.a == "class" and images.labels is None:
            raise UserError("--a class needs images in one folder per class, or a dataset.json with labels")
        self.classes = len(images.classes) if config.a == "class" else 0
        inner, self.reduce = ((embedder.inner, embedder.reduction.transform)
                              if isinstance(embedder, twosdm.Reduced) else (embedder, lambda y: y))
        if embedder is not None and (config.stage == "prior" or not self.augment):
            bank = twosdm.embedding_bank(images, inner, folder, self.augment, config.views, config.seed,
                                         device)
            some = torch.from_numpy(bank[0, :1000, :-9].copy()).to(device)
            rms = self.reduce(some).square().mean().sqrt().item()
            note = "" if 0.2 < rms < 1.2 or config.stage != "prior" else (
                ": far from sigma_data = 0.5, expect poor samples")
            print(f"the embedding's elements have rms {rms:.2f}{note}")
            self.views, self.bank = len(bank), twosdm.hold(bank.reshape(-1, bank.shape[-1]), device)
        self.captions = None
        if config.a == "text":                        # unCLIP: the prior learns p(y | caption)
            self.captions = caption_embeddings(inner, config, len(images))
        if config.stage == "prior":                   # about which sample.py --temperature contracts
            plain = twosdm.embedding_bank(images, inner, folder, device=device) if self.augment else bank
            mean = plain[0, :, :-9].mean(0, keepdims=True, dtype=np.float64).astype(np.float32)
            self.more["y_mean"] = self.reduce(torch.from_numpy(mean).to(device))[0]
        if config.stage != "prior":
            kind = "pixels" if images.latents is None else "latents"
            self.images = dataclasses.replace(images, **{kind: twosdm.hold(getattr(images, kind), device)})
        self.recipe, self.module = self.build(
            self.captions.shape[1] if self.captions is not None else self.classes)

    def build(self, a_dim):
        """(the network as plain numbers, the module to train); sets `denoiser` and `networks`."""
        y_dim = self.embedder.dim if self.embedder is not None else 0
        recipe = network(self.config, y_dim, a_dim, self.images.shape)
        self.denoiser = twosdm.build_denoiser(recipe).to(self.device)
        if self.config.stage != "prior":
            self.denoiser.to(memory_format=torch.channels_last)
        self.networks = [self.denoiser.net]
        return recipe, self.denoiser

    def draw(self, rows):
        """All random numbers of a batch but dropout's, so its loss is the same in one part or several."""
        draws = dict(view=torch.randint(self.config.views, (len(rows),)))
        if self.augment:
            draws["augment"] = self.augment.draw(len(rows))
        shape = (self.denoiser.net.dim,) if self.config.stage == "prior" else self.images.shape
        like = torch.empty(len(rows), *shape, device=self.device)
        draws["sigma"], draws["noise"] = self.denoiser.draw(like)
        if self.images.latents is not None:
            draws["latent"] = torch.randn_like(draws["noise"])
        if self.config.y_dropout:
            keep = torch.rand(len(rows), 1) >= self.config.y_dropout
            draws["keep"] = twosdm.send(keep.float(), self.device)
        return draws

    def condition(self, rows):
        """a of these images: (B, A), classes as one-hots or the captions' embeddings; None for neither."""
        if self.captions is not None:
            return twosdm.take(self.captions, rows, self.device)
        if not self.classes:
            return None
        return F.one_hot(twosdm.send(self.images.labels[rows], self.device), self.classes).float()

    def pictures(self, rows, draws):
        """What the image model learns: images or latents (B, C, H, W), augmentation labels (B, 9) or None."""
        if self.images.latents is not None:
            moments = twosdm.take(self.images.latents, rows, self.device)
            return twosdm.normalise_latent(moments, draws["latent"]), None
        x = self.images.batch(rows, self.device)
        return self.augment(x, draws["augment"]) if self.augment else (x, None)

    def loss(self, rows, draws):
        """(B,) rows -> loss (B,) and sigma (B,)."""
        cond = self.condition(rows)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):     # only networks round
            x, y, label = self.example(rows, draws)
        if self.config.stage == "prior":
            x = y
        else:
            cond = twosdm.join(y * draws["keep"] if "keep" in draws and y is not None else y, cond)
        loss = self.denoiser.loss(x, cond, label if self.augment else None, (draws["sigma"], draws["noise"]))
        return loss, draws["sigma"]

    def example(self, rows, draws):
        """x, for the prior None; y, or None for no embedder; the labels of augmentation."""
        if self.config.stage == "prior":
            entry = draws["view"].numpy() % self.views * len(self.images) + rows
            y, label = twosdm.take(self.bank, entry, self.device).tensor_split([-9], 1)
            return None, self.reduce(y), label
        x, label = self.pictures(rows, draws)
        if self.bank is not None:
            return x, self.reduce(twosdm.take(self.bank, rows, self.device)[:, :-9]), label
        return x, self.embedder(x) if self.embedder is not None else None, label

    def finish(self, module):
        return {}

    def preview(self, module, path):
        """A grid of samples: 18 steps, no churn; the image model draws after training images' embeddings."""
        if self.config.stage == "prior":
            return
        side = 8 if self.config.resolution < 64 else 4
        rows = np.arange(side * side) * 7919 % len(self.images)
        with torch.no_grad():
            x = self.samples(module, rows, list(range(side * side)), twosdm.Sampler(steps=18, s_churn=0))
            x = x if self.autoencoder is None else self.autoencoder.decode(x)
        pixels = twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
        twosdm.save_picture(path, twosdm.image_grid(pixels, side), least=512)

    def samples(self, module, rows, seeds, sampler):
        y = self.embedder(self.images.batch(rows, self.device)) if self.embedder is not None else None
        return twosdm.sample_images(module, seeds, y, self.condition(rows), sampler)


class Joint(Diffusion):
    """Overfit-2SDM (Appendix B): embedder, prior and image model are trained together, on Eq. 4 + Eq. 5.

    The embedder starts from random weights and learns from both losses through y. A sum of losses has the
    gradient that the paper accumulates in two passes before its one step.
    """

    def build(self, a_dim):
        c = self.config
        embedder = untrained(c)
        embedder.requires_grad_(False)                # the text side stays as it is
        image_tower(embedder).requires_grad_(True)
        recipe = {stage: network(dataclasses.replace(c, stage=stage), embedder.dim, a_dim, self.images.shape)
                  for stage in ("prior", "image")}
        module = nn.ModuleDict({stage: twosdm.build_denoiser(part) for stage, part in recipe.items()})
        module["embedder"] = embedder
        module.to(self.device)
        self.denoiser = module["image"].to(memory_format=torch.channels_last)
        self.networks = [module["prior"].net, module["image"].net]
        return dict(recipe, net="joint"), module

    def draw(self, rows):
        draws, prior = super().draw(rows), self.module["prior"]
        draws["prior_sigma"], draws["prior_noise"] = prior.draw(
            torch.empty(len(rows), prior.net.dim, device=self.device))
        return draws

    def loss(self, rows, draws):
        a, (x, label) = self.condition(rows), self.pictures(rows, draws)
        y = self.module["embedder"](x).float()        # not bf16, as it is what the prior is to predict
        prior = self.module["prior"].loss(y, a, label, (draws["prior_sigma"], draws["prior_noise"]))
        image = self.denoiser.loss(x, twosdm.join(y, a), label, (draws["sigma"], draws["noise"]))
        return prior + image, draws["sigma"]

    def samples(self, module, rows, seeds, sampler):
        return twosdm.sample_two_stage(module["prior"], module["image"], seeds, self.condition(rows), sampler)


def untrained(config):
    """The embedder that the joint stage starts from: CLIP, or the shapes' small CLIP, with random weights."""
    return twosdm.SmallClip() if config.embedder == "shapes" else twosdm.ClipEmbedder(None)


def image_tower(embedder):
    return embedder.image if embedder.name == "shapes" else embedder.model.visual


class Loss(nn.Module):
    """A job's loss as the forward of a module, the only thing that DistributedDataParallel wraps."""

    def __init__(self, job):
        super().__init__()
        self.module, self.job = job.module, job

    def forward(self, rows, draws):
        return self.job.loss(rows, draws)


def train(config, device):
    """One stage, from its checkpoint if any, to config.images images seen. Returns False if stopped."""
    folder = run_folder(config)
    path, identity = folder / "checkpoint.pt", identify(config)
    checkpoint = twosdm.load_checkpoint(path, stage=config.stage) if path.exists() else None
    twosdm.gather(None)                               # no process writes before all have read
    if checkpoint:
        same_run(checkpoint, identity, path)
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
    precision = twosdm.set_precision(config.precision, device, auto="bf16")
    if config.stage == "embedder":
        job, embedder = Embedding(config, images, device), None
    else:
        embedder = None if config.stage in ("baseline", "joint") else get_y(config, images, device)
        job = (Joint if config.stage == "joint" else Diffusion)(config, images, device, embedder, autoencoder)
    packed = twosdm.pack_embedder(embedder) if embedder else None
    described = dict(name=config.dataset, path=config.data, count=len(images), fingerprint=images.fingerprint,
                     classes=images.classes, class_counts=None if images.labels is None else
                     np.bincount(images.labels, minlength=len(images.classes)).tolist())
    module = job.module.to(device).train()
    if config.init_from and not checkpoint and config.stage in twosdm.IMAGE:
        twosdm.init_from_edm(job.denoiser, config.init_from, job.classes)
    ema = twosdm.EMA(module, config.ema_half_life, config.ema_ramp)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.lr, fused=device.type != "mps", **ADAM)
    seen, seconds = 0, 0.0
    if checkpoint:
        if checkpoint["fingerprints"]["embedder"] != (packed and packed["fingerprint"]):
            raise UserError(f"{path} was trained with another embedder: give the same one, or another "
                            f"--runs folder")
        module.load_state_dict(checkpoint["net"])
        ema.net.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        seen, seconds = checkpoint["seen"], checkpoint["seconds"]
        checkpoint = None                             # gigabytes, for the largest networks

    # The processes of torchrun share each batch; all but the first are silent and write nothing. The
    # contrastive loss compares all examples of a batch: it cannot be split, and each process trains it alone.
    whole = config.stage == "embedder"
    team, me, first = 1 if whole else twosdm.processes(), 0 if whole else twosdm.rank(), not twosdm.rank()
    part = config.batch if whole else config.batch_gpu or config.batch
    step = Loss(job) if team == 1 else nn.parallel.DistributedDataParallel(Loss(job))
    for net in job.networks:
        twosdm.compile_network(net, config.compile, device)

    def save(path, **more):
        """Writes all that samples need, and `more` to go on with the training."""
        twosdm.save_checkpoint(
            path, stage=config.stage, dataset=config.dataset, config=dataclasses.asdict(config),
            identity=identity, model=job.recipe, data=described, embedder=packed, seen=seen, seconds=seconds,
            ema=ema.net.state_dict(), **job.more,
            fingerprints=dict(images=described["fingerprint"], embedder=packed and packed["fingerprint"]),
            **more)

    if first:
        start_log(folder / "log.jsonl", seen)
    order, meter = twosdm.Order(len(images), config.seed), Meter()
    bar = tqdm(total=config.images, initial=seen, desc=f"{config.stage:>8}", unit=" images", unit_scale=True,
               smoothing=0.02)
    with bar, Stop(team) as stop:
        while seen < config.images:
            # All randomness follows from (seed, images seen): a resumed run repeats what the first would do.
            torch.manual_seed(twosdm.mix_seed("step", config.seed, seen))
            began, rows = time.perf_counter(), order[seen:seen + config.batch]
            draws = job.draw(rows)
            # A linear ramp, then constant; it counts this batch, so that the first step is not one of size 0.
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min((seen + config.batch) / max(config.lr_ramp, 1), 1)
            optimizer.zero_grad(set_to_none=True)
            start, end = (len(rows) * k // team for k in (me, me + 1))
            for i in range(start, end, part):
                now = slice(i, min(i + part, end))
                if config.dropout:                    # the masks differ with the way a batch is split
                    torch.manual_seed(twosdm.mix_seed("dropout", config.seed, seen, i))
                with contextlib.nullcontext() if team == 1 or now.stop == end else step.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                        loss, sigma = step(rows[now], {k: v[now] for k, v in draws.items()})
                    (loss.sum() * team / config.batch).backward()      # the processes' gradients are averaged
                meter.losses(loss.detach(), sigma)
            meter.gradients(module)                   # also replaces NaN and infinity, as EDM does
            optimizer.step()
            ema.update(module, seen, config.batch)
            seen, seconds = seen + config.batch, seconds + time.perf_counter() - began
            bar.update(config.batch)
            last, stopped = seen >= config.images, stop(seen // config.batch, seen >= config.images)
            extra = job.finish(ema.net) if last else {}
            if due(seen, config.batch, config.log) or last:
                meter.write(first and folder / "log.jsonl", team, seen, seconds, bar, extra)
            if first and (due(seen, config.batch, config.save) or last or stopped):
                save(path, net=module.state_dict(), optimizer=optimizer.state_dict())
            if first and config.snapshots and due(seen, config.batch, config.snapshots):
                save(folder / f"snapshot-{seen:010d}.pt")
            shown = config.preview and config.stage in twosdm.IMAGE
            if first and shown and (due(seen, config.batch, config.preview) or last):
                bar.set_postfix_str("drawing samples")
                began = time.perf_counter()
                job.preview(ema.net, folder / f"samples-{seen:09d}.png")
                meter.began += time.perf_counter() - began
            if stopped:
                break
    twosdm.gather(None)                               # what the first process saved is there for all
    if stopped:
        print(f"stopped at {seen:,} images and saved {path}: the same command goes on from there",
              file=sys.stderr)
        return False
    print(f"{config.stage}: {seen:,} images in {seconds:.0f} s -> {folder}")
    return True


def run_folder(config):
    return Path(config.runs) / config.dataset / twosdm.run_name(config.stage, config.y, config.a, config.tag)


def due(seen, batch, every):
    """Whether a multiple of `every` was reached by the last `batch` images."""
    return seen // every > (seen - batch) // every


def identify(config):
    """The settings that make a run what it is: those that it may not change on its way."""
    fixed = [f.name for f in dataclasses.fields(config) if f.metadata["fixed"]]
    unet = ("arch", "width", "mults", "blocks", "attention", "dropout", "init_from")
    foreign = [name for name in fixed if (name in unet and config.stage in ("prior", "embedder"))
               or (name.startswith("prior_") and config.stage not in ("prior", "joint"))
               or (name == "y_dropout" and config.stage != "image")
               or (name == "embedder" and config.stage == "baseline")
               or (name == "views" and config.stage != "prior")
               or (name in ("a", "augment") and config.stage == "embedder")
               or (name == "y" and config.stage not in ("prior", "image"))]
    return {name: getattr(config, name) for name in fixed if name not in foreign}


def same_run(checkpoint, identity, path):
    """Refuses to go on with a run under other settings than it began with."""
    if "identity" not in checkpoint:                  # fitted, not trained: that of `--embedder pixels`
        raise UserError(f"{path} is another embedder: give another --runs folder")
    other = {k: (checkpoint["identity"].get(k), v) for k, v in identity.items()
             if checkpoint["identity"].get(k, v) != v}
    if other:
        name, (old, new) = next(iter(other.items()))
        old, new = ("none" if value == "" else value for value in (old, new))
        raise UserError(f"{path} was trained with --{name.replace('_', '-')} {old}, not {new}: use its "
                        f"settings (--short makes some of --images), or keep both by --tag NAME or another "
                        f"--runs folder")


def get_y(config, images, device):
    """The embedder as the image model knows it: whole, reduced by PCA or K-means (fitted once), or None."""
    if twosdm.told_nothing(config.y):
        return None
    embedder = get_embedder(config, images, device)
    if config.y == "clip":
        return embedder
    folder = Path(config.runs) / config.dataset
    bank = twosdm.embedding_bank(images, embedder, folder, seed=config.seed, device=device)
    name = f"{config.y.replace(':', '')}-{twosdm.fingerprint(embedder)}-{images.fingerprint}-{config.seed}.pt"
    path = folder / "reductions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with twosdm.locked(path.with_suffix(".lock")):    # processes of one run must not fit two
        if not path.exists():
            rows = torch.from_numpy(bank[0, :, :-9].copy())
            fitted = twosdm.Reduced.fit(embedder, config.y, rows, config.seed)
            twosdm.save_checkpoint(path, stage="reduction", state=fitted.reduction.state_dict())
    state = twosdm.load_checkpoint(path, stage="reduction")["state"]
    return twosdm.Reduced.restore(embedder, state).to(device)


def caption_embeddings(embedder, config, count):
    """The text side's embedding of every training image's caption, brought to rms 0.5: (N, D) float32."""
    if embedder.name != "shapes":
        raise UserError("--a text needs the small CLIP of shapes: leave --embedder away")
    with torch.no_grad():
        captions = twosdm.shapes_captions(torch.arange(count), config.seed)
        return torch.cat([embedder.text_condition(captions[i:i + 1000]).cpu()
                          for i in range(0, count, 1000)]).numpy()


def get_embedder(config, images, device):
    """e_i, frozen: public CLIP, the shapes' small CLIP (trained before) or a PCA of pixels (fitted here)."""
    if config.embedder == "clip":
        return twosdm.ClipEmbedder(config.clip_weights).to(device)
    path = Path(config.runs) / config.dataset / "embedder" / "checkpoint.pt"
    if config.embedder == "pixels":
        if not path.exists() and not twosdm.rank():
            embedder = twosdm.PixelEmbedder(config.resolution).fit(images)
            twosdm.save_checkpoint(path, stage="embedder", embedder=twosdm.pack_embedder(embedder),
                                   fingerprints=dict(images=images.fingerprint))
        twosdm.gather(None)
        checkpoint = twosdm.load_checkpoint(path, stage="embedder")
        if not checkpoint["embedder"] or checkpoint["fingerprints"]["images"] != images.fingerprint:
            raise UserError(f"{path} belongs to other images, another resolution or another embedder: "
                            f"give another --runs folder")
        return twosdm.unpack_embedder(checkpoint["embedder"], config.resolution).to(device)
    if config.dataset != "shapes":
        raise UserError("--embedder shapes knows only the embedded world: choose clip or pixels")
    if not path.exists():
        raise UserError("the embedder of shapes is not trained yet: python train.py --stage embedder")
    checkpoint = twosdm.load_checkpoint(path, stage="embedder")
    same_run(checkpoint, {}, path)
    if checkpoint["seen"] < checkpoint["config"]["images"]:
        raise UserError("the embedder of shapes is half trained: "
                        "python train.py --stage embedder goes on with it")
    embedder = twosdm.SmallClip()
    embedder.load_state_dict(checkpoint["ema"])
    return embedder.eval().requires_grad_(False).to(device)


class Meter:
    """What log.jsonl holds, one line per config.log images."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.parts, self.norms, self.began = [], [], time.perf_counter()

    def losses(self, loss, sigma):
        self.parts.append((loss, sigma))

    def gradients(self, module):
        """Replaces NaN and infinite gradients by finite ones, and keeps the norm that all had before."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.norms.append(torch.stack(torch._foreach_norm(gradients)).square().sum().sqrt())
        for g in gradients:                           # unseen: to look would be to wait for the GPU
            torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g)

    def write(self, path, team, seen, seconds, bar, extra):
        """One line, of what all processes of the team have measured, if there is a path to write to."""
        loss, sigma = (torch.cat(part).float().cpu() for part in zip(*self.parts))
        if team > 1:
            loss, sigma = (torch.cat(part) for part in zip(*twosdm.gather((loss, sigma))))
        bins = torch.bucketize(sigma, torch.tensor(LOSS_BINS))
        edges, norms = (0, *LOSS_BINS, "inf"), torch.stack(self.norms).cpu()

        def mean(values):                             # JSON knows no NaN
            return values.mean().item() if values.isfinite().all() else None

        line = dict(images=seen, loss=mean(loss), seconds=round(seconds, 2),
                    images_per_second=round(len(loss) / (time.perf_counter() - self.began), 1),
                    gradient_norm=mean(norms), nonfinite=int((~norms.isfinite()).sum()),
                    loss_by_sigma={f"{edges[i]}-{edges[i + 1]}": mean(loss[bins == i])
                                   for i in range(len(edges) - 1) if (bins == i).any()}, **extra)
        if path:
            with twosdm.user_errors(f"{path} cannot be written"), open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        bar.set_postfix_str("loss not finite" if line["loss"] is None else f"loss {line['loss']:.4g}")
        self.clear()


def start_log(path, seen):
    """Cuts off the lines a killed run wrote after its last checkpoint, so that none stands there twice."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            if not line.endswith("\n") or json.loads(line)["images"] > seen:
                break
        except (ValueError, KeyError, TypeError):     # no line of ours
            continue
        kept.append(line)
    with twosdm.written(path) as fresh:
        fresh.write_text("".join(kept))


class Stop:
    """While it lasts, SIGTERM or Ctrl-C only ask: finish the step, save, leave. The second leaves at once."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, team):
        self.team = team

    def __call__(self, step, last):
        """Whether to stop after this step; several processes agree on that in every eighth and the last."""
        if self.team == 1:
            return self.asked
        return (step % 8 == 0 or last) and any(twosdm.gather(self.asked))

    def __enter__(self):
        self.asked, self.before = False, [signal.signal(number, self.ask) for number in self.signals]
        return self

    def __exit__(self, *error):
        for number, handler in zip(self.signals, self.before):
            signal.signal(number, handler)

    def ask(self, number, frame):
        self.asked = True
        self.__exit__()


def main():
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--dataset", default="shapes")
    early.add_argument("--stage", default="all")
    known, _ = early.parse_known_args()
    defaults = twosdm.configure(known.dataset, known.stage)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"The defaults above are those of --dataset {known.dataset} --stage "
               + ("image; other stages have others: add --stage prior. " if known.stage == "all" else
                  f"{known.stage}. ") +
               f"Data sets: {', '.join(twosdm.PRESETS)}.")
    twosdm.add_flags(parser, defaults)
    parser.add_argument("--dry-run", action="store_true",
                        help="print every setting with its source, and parameter counts, as JSON")
    args = vars(parser.parse_args())
    dry, _, _ = args.pop("dry_run"), args.pop("dataset"), args.pop("stage")
    changes = {name: value for name, value in args.items() if value is not None}
    if "init_from" in changes and known.stage in ("embedder", "prior"):
        raise UserError(f"--init-from is for the image model and the baseline, not for --stage {known.stage}")
    configs = [twosdm.configure(known.dataset, stage, **changes)
               for stage in (twosdm.STAGES if known.stage == "all" else (known.stage,))]
    if known.stage == "all" and configs[0].embedder != "shapes":
        configs = configs[1:]                         # nothing to train
    if not twosdm.has_prior(configs[0].y):
        if known.stage == "prior":
            raise UserError(f"--y {configs[0].y} leaves the prior nothing to learn: clusters are drawn by "
                            f"their frequency")
        configs = [config for config in configs if config.stage != "prior"]
    if dry:
        print("[\n" + ",\n".join(describe(config, changes) for config in configs) + "\n]")
        return 0
    device = twosdm.pick_device(configs[0].device)
    twosdm.join_processes(device)
    print(f"{known.dataset}: {', '.join(c.stage for c in configs)} on {device}"
          + f", {twosdm.processes()} processes" * (twosdm.processes() > 1))
    for config in configs:
        if config.short:
            print(f"{config.stage}, --short: step size rises over {config.lr_ramp:,} images, EMA half-life "
                  f"{config.ema_half_life:,} images")
        folder = run_folder(config)
        with contextlib.ExitStack() as held:
            if not twosdm.rank():
                with twosdm.user_errors(f"{folder} cannot be written"):
                    folder.mkdir(parents=True, exist_ok=True)
                    held.enter_context(twosdm.locked(folder / "lock", busy=f"another process is training "
                                                     f"{folder}: wait for it, or give another --runs folder"))
            if not train(config, device):
                return 130
    if known.stage == "all":
        where = f" --runs {configs[0].runs} --dataset {known.dataset}" if len(sys.argv) > 1 else ""
        print(f"Next: python sample.py{where}, then python evaluate.py{where}")
    return 0


def describe(config, changes):
    """What --dry-run prints of a stage, as JSON: each setting with its source, the number of parameters."""
    side, joint = config.resolution, config.stage == "joint"
    y_dim = dict(clip=512, pixels=min(64, 3 * min(side, 32)**2), shapes=64)[config.embedder]
    a_dim = y_dim if config.a == "text" else count_classes(config)
    if config.stage == "baseline" or twosdm.told_nothing(config.y):
        y_dim = 0
    elif ":" in config.y:
        y_dim = int(config.y.split(":")[1])
    shape = (4, side // 8, side // 8) if config.vae else (3, side, side)
    modules = [image_tower(untrained(config))] if joint else []
    with torch.device("meta"):
        for stage in ("prior", "image") if joint else (config.stage,):
            modules.append(twosdm.SmallClip() if stage == "embedder" else twosdm.build_denoiser(
                network(dataclasses.replace(config, stage=stage), y_dim, a_dim, shape)))
    whence = twosdm.sources(config.dataset, config.stage, **changes)
    if config.short:
        for name in set(twosdm.SCALED) - changes.keys():
            whence[name] += ", scaled by --short"
    values = dataclasses.asdict(config)
    for function in (twosdm.Denoiser, twosdm.sigma_schedule, twosdm.Sampler):   # what no flag changes
        for name, parameter in inspect.signature(function).parameters.items():
            if name in ("sigma_data", "p_mean", "p_std", "sigma_min", "sigma_max", "rho", "s_noise"):
                values[name], whence[name] = parameter.default, "EDM"
    for name, value in ADAM.items():
        values["adam_" + name], whence["adam_" + name] = value, "EDM"
    values["parameters"] = sum(p.numel() for module in modules for p in module.parameters())
    whence["parameters"] = "counted"
    lines = [f'    "{name}": {json.dumps(dict(value=value, source=whence[name]))}'
             for name, value in values.items()]
    return "  {\n" + ",\n".join(lines) + "\n  }"


def count_classes(config):
    """The number of classes that a configuration uses, without preparing its data."""
    if config.a != "class":
        return 0
    known = {"shapes": len(twosdm.SHAPES), "cifar10": 10, "imagenet-class": 1000, "imagenet-latent": 1000}
    if config.dataset not in known and not config.data:
        raise UserError("--a class: to count the classes add --data FOLDER_OR_ZIP")
    return known.get(config.dataset) or len(twosdm.list_images(config.data)[2])


if __name__ == "__main__":
    twosdm.run(main)
