"""Speed on this device: python tests/benchmark.py [--device cuda] [--precision fp32] [--only NAME].

Prints, asserts nothing. Per network: images (embeddings) per second of train.py's step, all of it, and of
sampling; the arithmetic rate of training and its share of what large matrix products reach here; the peak
memory (on a CPU the process's so far: --only gives a row its own). Then the prior's share of two-stage
sampling, and what CLIP would cost in each step of the prior if there were no bank of embeddings.

Goals on one H200 or H100: DDPM++-64 trains on 1,000 images/s and samples 40 (40 steps), the prior trains on
100,000 embeddings/s and takes at most 1 % of sampling, training from the bank is 10 times faster than with
CLIP.
"""
import argparse
import contextlib
import functools
import resource
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
import twosdm

ROWS = {                                               # data set, stage, batch on a GPU and on a CPU
    "shapes prior": ("shapes", "prior", 256, 256), "shapes U-Net": ("shapes", "image", 32, 32),
    "prior": ("afhq", "prior", 256, 256), "DDPM++-64": ("afhq", "image", 256, 4),
    "ADM-64": ("imagenet", "image", 128, 2)}
IMAGES = 4096


def seconds(work, device, least=1.0, warm=True):
    """The shortest of as many runs of work() as fit into `least` seconds, at least one; one warms up."""
    times = []
    while len(times) <= warm or sum(times[warm:]) < least:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[warm:])


def matmul_peak(device, precision):
    """FLOP/s of a large matrix product in this precision."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / seconds(lambda: a @ a, device, least=3)


def flops(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class NoEmbedder(nn.Module):
    """Stands for an embedder whose bank is computed."""
    name = "none"

    def __init__(self, dim):
        super().__init__()
        self.dim = dim


class Row:
    """One network in train.py's own job, on noise in place of images and embeddings."""

    def __init__(self, name, device, args):
        dataset, stage, on_gpu, on_cpu = ROWS[name]
        self.name, self.device, self.precision = name, device, args.precision
        self.warm = device.type == "cuda" or bool(args.compile)   # else the counting of FLOPs was enough
        self.batch = on_gpu if device.type == "cuda" else on_cpu
        # The image model without augmentation, or CLIP would run in its step.
        config = twosdm.configure(dataset, stage, **(dict(augment=0.0) if stage == "image" else {}))
        side, dim, rng = config.resolution, 64 if dataset == "shapes" else 512, np.random.default_rng(0)
        images = twosdm.Images(rng.integers(0, 256, (IMAGES, side, side, 3), np.uint8))
        bank = rng.standard_normal((1, IMAGES, dim + 9), np.float32) / 2
        with mock.patch.object(twosdm, "embedding_bank", lambda *_: bank), contextlib.redirect_stdout(None):
            self.job = train.Diffusion(config, images, device, NoEmbedder(dim))
        self.module, self.config = self.job.module.train(), config
        self.sampled = twosdm.EMA(self.module, config.ema_half_life, config.ema_ramp)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=config.lr,
                                          fused=device.type != "mps", **train.ADAM)
        self.order, self.meter, self.seen = twosdm.Order(IMAGES, 0), train.Meter(), 0
        self.shape = ((self.module.net.dim,) if stage == "prior" else self.job.images.shape)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.flops = flops(self.step)                 # the counter does not see into compiled code
        twosdm.compile_network(self.module.net, args.compile, device)
        twosdm.compile_network(self.sampled.net.net, args.compile, device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def step(self):
        """What train.train does per batch."""
        rows = self.order[self.seen:self.seen + self.batch]
        draws = self.job.draw(rows)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, sigma = self.job.loss(rows, draws)
        (loss.sum() / self.batch).backward()
        self.meter.losses(loss.detach(), sigma)
        self.meter.gradients(self.module)
        self.optimizer.step()
        self.sampled.update(self.module, self.seen, self.batch)
        self.seen += self.batch

    @torch.no_grad()
    def sample(self, steps):
        net = self.sampled.net
        cond = torch.randn(self.batch, net.net.cond_dim, device=self.device) if net.net.cond_dim else None
        with self.autocast():
            twosdm.Sampler(steps)(net, self.shape, range(self.batch), cond)

    def sampling(self, batch=None, steps=40):
        """Seconds that a batch takes, 40 steps = 79 evaluations; and whether all of them were measured."""
        batch, self.batch = self.batch, batch or self.batch
        brief = seconds(lambda: self.sample(2), self.device, 0, self.warm)             # 3 evaluations
        scaled = brief / 3 * (2 * steps - 1)
        full = self.device.type == "cuda" or scaled < 15
        result = seconds(lambda: self.sample(steps), self.device, 0, False) if full else scaled
        self.batch = batch
        return result, full

    def measure(self, peak):
        training = seconds(self.step, self.device, warm=self.warm)
        self.sampled_in = sampling, full = self.sampling()
        memory = (torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else
                  resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        rate = self.flops / training
        print(f"{self.name:<14}{sum(p.numel() for p in self.module.parameters()):>13,}{self.batch:>7}"
              f"{self.batch / training:>11,.2f}{rate / 1e12:>10.3f}{rate / peak:>9.0%}"
              f"{self.batch / sampling:>11,.3f}{'' if full else '*':<2}{memory:>8,.0f}", flush=True)
        self.trained_in = training


def random_clip(device):
    """CLIP's network with random weights, which cost what others do."""
    import open_clip
    create = functools.partial(open_clip.create_model, "ViT-B-32-quickgelu", pretrained=None)
    with mock.patch("open_clip.create_model", lambda *_, **__: create()):
        return twosdm.ClipEmbedder().to(device)


def clip_in_the_loop(prior):
    """Against the bank: each step of the prior first decodes, augments and embeds its images."""
    device, clip, augment = prior.device, random_clip(prior.device), twosdm.Augment(prior.config.augment)
    batch, training = prior.batch if device.type == "cuda" else 8, prior.trained_in

    @torch.no_grad()
    def embed():
        clip(augment(prior.job.images.batch(np.arange(batch), device))[0])

    embedding = seconds(embed, device) / batch * prior.batch
    print(f"prior from the bank: {prior.batch / training:,.1f}/s, with CLIP in each step: "
          f"{prior.batch / (training + embedding):,.1f}/s, {1 + embedding / training:.1f} times slower "
          f"(CLIP at batch {batch}: {embedding / prior.batch * 1e3:.2f} ms per image)", flush=True)


def share_of_prior(prior, image):
    """Of the time of two-stage sampling, both stages at the image model's batch."""
    (y, _), (x, full) = prior.sampling(image.batch), image.sampled_in
    print(f"two-stage sampling, batch {image.batch}, 40 steps each: prior {y:.3f} s, {image.name} {x:.3f} s"
          f"{'' if full else '*'}, share of the prior {y / (x + y):.2%}", flush=True)


def edm_figures(row):
    """Per image, forward and forward with backward alone, as EDM's are quoted above."""
    def forward():
        with torch.no_grad(), row.autocast():
            row.module(x, sigma, cond)

    def backward():
        with row.autocast():
            loss = row.module(x, sigma, cond).sum()
        loss.backward()

    x, sigma = torch.randn(row.batch, *row.shape, device=row.device), torch.ones(row.batch, device=row.device)
    x, cond = x.contiguous(memory_format=torch.channels_last), torch.randn(
        row.batch, row.module.net.cond_dim, device=row.device)
    there, back = (seconds(work, row.device, warm=row.warm) / row.batch for work in (forward, backward))
    print(f"{row.name}, batch {row.batch}, per image: forward {there:.3g} s, with backward {back:.3g} s, "
          f"training {row.flops / row.batch / 1e9:.0f} GFLOP per image", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--precision", choices=("auto", *twosdm.PRECISIONS), default="auto",
                        help="as train.py's (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as train.py's")
    parser.add_argument("--only", default="", help="only the networks whose name contains this")
    args = parser.parse_args()
    device = twosdm.pick_device(args.device)
    args.precision = twosdm.set_precision(args.precision, device, auto="bf16")
    torch.manual_seed(0)
    peak = matmul_peak(device, args.precision)
    print(f"{device}, {args.precision}, {torch.get_num_threads()} threads: matrix product "
          f"{peak / 1e12:.3f} TFLOP/s\n{'network':<14}{'parameters':>13}{'batch':>7}{'training/s':>11}"
          f"{'TFLOP/s':>10}{'of peak':>9}{'sampling/s':>11}{'':<2}{'MB':>8}", flush=True)
    prior = None
    for name in ROWS:
        if args.only not in name:
            continue
        row = Row(name, device, args)
        row.measure(peak)
        if name == "prior":
            prior = row
            clip_in_the_loop(prior)
        if name == "DDPM++-64":
            edm_figures(row)
            share_of_prior(prior or Row("prior", device, args), row)
        row = None                                    # its memory is not the next one's
    print("* scaled from 3 of 79 evaluations")


if __name__ == "__main__":
    main()
