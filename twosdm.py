"""Two-stage diffusion models (2SDM): sample what the image is about, then sample the image.

A diffusion model of images spends much of its effort on deciding *what* to draw. 2SDM splits that decision
off: a small diffusion model (the prior) samples a CLIP image embedding y, an EDM diffusion model samples the
image x given y, and y is thrown away. In the paper's equations (Harvey and Wood, *Visual Chain-of-Thought
Diffusion Models*, arXiv 2303.16187, and its full version, *Two-stage diffusion models*):

    p(x|a) = E_{p(y|a)} p(x|y,a)                                                                     (Eq. 2)
           ≈ E_{p_φ(y|a)} p_θ(x|y,a)           y from the prior, x from the image model, forget y    (Eq. 3)

The law of the training data is p(x,y,a) = p(x,a) δ(y - e_i(x)): y is computed from x, nobody labels.

Glossary
    B, C, H, W   batch, channels, height, width          D       dimension of an embedding
    x            an image, (B, C, H, W) in [-1, 1]       y       its embedding e_i(x), (B, D), rms about 0.5
    a            what the user conditions on, (B, A):    sigma   standard deviation of the noise, (B,)
                 nothing, or a class as a one-hot        D(x; σ) the denoiser: E[clean | noisy]
    EDM          Karras et al. 2022, *Elucidating the Design Space of Diffusion-Based Generative Models*

Reading order: 1 denoiser, 2 sampling, 3 two stages, 4 prior transformer, 5 U-Net, 6 embeddings. These are
the method. What it stands on: 7 augmentation, 8 the embedded world, 9 sets of images, 10 latents, 11 runs,
12 EDM's files. The settings of each experiment are at the top of train.py.
"""
import argparse
import collections
import copy
import errno
import functools
import glob
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import posixpath
import re
import sys
import time
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from scipy.cluster.vq import kmeans2
from torch.backends import cudnn
from torch.nn import init
from tqdm import tqdm


# ============================================================================================================
# 1 Denoiser: preconditioning, loss, noise levels, moving average
# ============================================================================================================
def per_example(numbers, x):
    """(B,) -> (B, 1, ..., 1), to multiply the examples x (B, ...)."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """A network made into the denoiser D(x; sigma): EDM Eq. 7, for vectors (B, D) and images (B, C, H, W).

    predict="edm" is EDM's preconditioning (Table 1), for the image model. predict="data" is the paper's
    prior: the network predicts the clean y itself. Both weigh the loss by 1 / c_out², which is EDM's lambda
    for the image model and 1 for the prior (the authors' code; the paper leaves it open): this choice is all
    that tells them apart. `net` is any
    net(x, c_noise, cond, augment) that returns the shape of x.
    """

    def __init__(self, net, sigma_data=0.5, predict="edm"):
        super().__init__()
        assert predict in ("edm", "data"), predict
        self.net = net
        self.sigma_data = sigma_data
        self.predict = predict

    def scalings(self, sigma):
        """(B,) -> c_skip, c_out, c_in, c_noise, each (B,): EDM Table 1; predict="data": D = net(c_in x)."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / total
        c_noise = sigma.log() / 4
        if self.predict == "data":
            return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise
        c_skip = self.sigma_data**2 / total**2
        c_out = sigma * self.sigma_data / total
        return c_skip, c_out, c_in, c_noise

    def forward(self, x, sigma, cond=None, augment=None):
        """D(x; sigma): x (B, ...), sigma (B,), cond (B, A) or None, augment (B, 9) -> (B, ...) float32."""
        x = x.float()
        sigma = sigma.float()
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        output = self.net(per_example(c_in, x) * x, c_noise, cond, augment).float()
        return per_example(c_skip, x) * x + per_example(c_out, x) * output

    def loss(self, x, cond=None, augment=None):
        """(B, ...) -> (B,): lambda(sigma) |D(x + sigma eps; sigma) - x|², summed over x (Eq. 1; EDM Eq. 8).

        One noise level per example, ln sigma ~ N(-1.2, 1.2²) (EDM Table 1, P_mean and P_std).
        """
        sigma = (torch.randn(len(x), device=x.device) * 1.2 - 1.2).exp()
        noisy = x + per_example(sigma, x) * torch.randn_like(x)
        denoised = self(noisy, sigma, cond, augment)
        _, c_out, _, _ = self.scalings(sigma)
        return 1 / c_out**2 * (denoised - x).square().flatten(1).sum(1)


class EMA:
    """Moving average of a network's weights, from which all samples come (EDM, Appendix F).

    beta = 0.5^(batch / half-life), where the half-life grows with the run, to at most `ramp` times the images
    seen, so that the first, bad weights are soon forgotten. `ramp` None: it is constant, for a network that
    starts from good weights. (No network here has buffers that change.)
    """

    def __init__(self, net, half_life, ramp=0.05):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.half_life = half_life
        self.ramp = ramp

    @torch.no_grad()
    def update(self, net, seen, batch):
        """After the optimizer step that brought the images seen from `seen` to seen + batch."""
        half_life = self.half_life
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * seen)
        beta = 0.5 ** (batch / max(half_life, 1e-8))                      # 1e-8: for the first step
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - beta)


# ============================================================================================================
# 2 Sampling
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
    returns (B, ...) float64. The denoiser computes as it likes.
    """
    levels = [float(sigma) for sigma in sigmas]
    steps = len(levels) - 1

    def slope(x, sigma):
        denoised = denoise(x, x.new_full((len(x),), sigma))
        return (x - denoised.double()) / sigma

    x = noise.double() * levels[0]
    for sigma, sigma_next in zip(levels, levels[1:]):
        # Churn: add noise to go up to sigma_hat first, so that errors of earlier steps are forgotten.
        gamma = 0.0
        if s_min <= sigma <= s_max:
            gamma = min(s_churn / steps, math.sqrt(2) - 1)
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * randn_like(x)
        # An Euler step from sigma_hat to sigma_next, then Heun's correction, but for the last.
        d = slope(x, sigma_hat)
        x_next = x + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            d_next = slope(x_next, sigma_next)
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2
        x = x_next
    return x


# Each purpose has a stream of random numbers of its own: further images of one y are 5, 6, ..., 255.
PRIOR, IMAGE, CLASS, CLUSTER, ORACLE, FURTHER = range(6)


def generator_of(seed, stream=PRIOR, device="cpu"):
    """The random numbers of one sample for one purpose. A seed of 32 bits is all that PyTorch's CPU takes."""
    if not (0 <= seed < 2**24 and 0 <= stream < 2**8):
        raise UserError(f"seed {seed}, image {stream - FURTHER + 2} of its y: seeds are below {2**24:,}, and "
                        f"at most 251 images share a y")
    return torch.Generator(device).manual_seed(stream * 2**24 + int(seed))


class SampleNoise:
    """Gaussian noise whose row i comes from seeds[i] alone, so that a sample does not depend on its batch.

    (Networks round differently for other batches: samples then agree to rounding, not to the bit.)
    """

    def __init__(self, seeds, device="cpu", stream=PRIOR):
        self.generators = [generator_of(seed, stream, device) for seed in seeds]

    def __len__(self):
        return len(self.generators)

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32, where B is the number of seeds."""
        rows = [torch.randn(shape[1:], generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)

    def randn_like(self, x):
        return self.randn(*x.shape).to(x.dtype)


def pick_numbers(seeds, counts, stream):
    """For each seed a number i with probability counts[i] / sum(counts): (B,) int64."""
    ends = np.cumsum(counts)
    places = [torch.randint(int(ends[-1]), (), generator=generator_of(seed, stream)).item() for seed in seeds]
    return np.searchsorted(ends, places, side="right")


# ============================================================================================================
# 3 Two stages: a -> y -> x
# ============================================================================================================
@dataclass
class Sampler:
    """The numbers of Algorithm 2. The defaults are those of every FID the paper reports."""
    steps: int = 40
    s_churn: float = 50.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.007
    guidance: float = 1.0               # of the image model on y; 1 = none


def sample(denoise, shape, noise, sampler):
    """Algorithm 2: denoise(x, sigma), shape without B, a SampleNoise, a Sampler -> (B, *shape) float32."""
    start = noise.randn(len(noise), *shape)
    sigmas = sigma_schedule(sampler.steps)
    x = heun_sample(denoise, start, sigmas, sampler.s_churn, sampler.s_min, sampler.s_max, sampler.s_noise,
                    noise.randn_like)
    return x.float()


def join(y, a):
    """y ⊕ a, the condition of Eq. 5: concatenates what is there, embedding first; None if nothing is."""
    parts = [part.float() for part in (y, a) if part is not None]
    if not parts:
        return None
    return torch.cat(parts, dim=1)


def sample_embeddings(prior, noise, a, sampler):
    """Stage 1: y ~ p_prior(y | a). a (B, A) or None -> (B, D)."""
    def denoise(y, sigma):
        return prior(y, sigma, a)

    return sample(denoise, (prior.net.dim,), noise, sampler)


def sample_images(image_model, noise, y, a, sampler):
    """Stage 2: x ~ p_image(x | y, a). y (B, D), or None for plain EDM -> (B, C, H, W), about [-1, 1].

    With guidance w the denoiser is D(a) + w (D(y,a) - D(a)): classifier-free guidance, Ho and Salimans 2022.
    """
    net = image_model.net

    def denoise(x, sigma):
        told = image_model(x, sigma, join(y, a))
        if y is None or sampler.guidance == 1:
            return told
        untold = image_model(x, sigma, join(torch.zeros_like(y), a))
        return untold + sampler.guidance * (told - untold)

    return sample(denoise, (net.channels, net.resolution, net.resolution), noise, sampler)


def sample_two_stage(prior, image_model, seeds, a=None, sampler=Sampler(), image_sampler=None):
    """2SDM, Eq. 3: sample y, then x given y; forget y. (The oracle gives `sample_images` true embeddings.)

    seeds (B,) whole numbers below 2^24, a (B, A) or None -> (B, C, H, W) float32, about [-1, 1].
    """
    device = next(prior.parameters()).device
    y = sample_embeddings(prior, SampleNoise(seeds, device), a, sampler)
    # Departure: the authors give the image model the prior's seed plus one, so sample i's image and sample
    # i+1's embedding start from the same random numbers. Here the two are different streams.
    noise = SampleNoise(seeds, device, IMAGE)
    return sample_images(image_model, noise, y, a, image_sampler or sampler)


def to_uint8(images):
    """[-1, 1] -> 0..255, to the nearest as in EDM (truncating instead moves FID); uint8 passes through."""
    if images.dtype == torch.uint8:
        return images
    # 127.5 (x + 1), and 0.5 more, as the conversion rounds down.
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_float(pixels):
    """0..255 -> [-1, 1] float32."""
    return pixels.float() / 127.5 - 1


# ============================================================================================================
# 4 Prior transformer
# ============================================================================================================
def noise_features(c_noise, dim, adm=False):
    """(B,) -> (B, dim): sinusoids of c_noise. DDPM++: (sin, cos), period up to 2π·10000; ADM: (cos, sin)."""
    half = dim // 2
    steps = torch.arange(half, device=c_noise.device, dtype=torch.float32)
    if adm:
        angles = c_noise[:, None] * 10000 ** (-steps / half)                              # (B, dim / 2)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
    angles = c_noise[:, None] * 10000 ** (-steps / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class PriorBlock(nn.Module):
    """Pre-norm attention and MLP: (B, tokens, width) -> (B, tokens, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, t):
        B, T, width = t.shape
        qkv = self.qkv(self.norm1(t)).reshape(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                              # (B, heads, T, d)
        attended = F.scaled_dot_product_attention(q, k, v)            # softmax(q kᵀ / √d) v
        t = t + self.proj(attended.transpose(1, 2).reshape(B, T, width))
        return t + self.mlp(self.norm2(t))


class PriorTransformer(nn.Module):
    """The auxiliary model of §3: a transformer over the tokens [augmentation] [a] [sigma] [y_sigma] [query].

    forward: y_sigma (B, D) scaled by c_in, c_noise (B,), a (B, A), augmentation label (B, 9) -> (B, D), read
    off the query's token. Tokens of an absent input are not built (A = 0, no augmentation in training).
    Width, depth, heads, the MLP of sigma and the order of the tokens are those of the authors' code.
    Departure: the paper's order is [sigma] [a] [y_sigma] [query].
    Departure: a plain pre-norm transformer of 20 M parameters; the authors' block of 25 M adds a causal mask,
    shared keys and values, cosine attention, rotary and relative positions and SwiGLU.
    Departure: y_sigma passes a linear map whatever D is; in the authors' code only if D is not the width.
    """

    def __init__(self, dim, cond_dim=0, augment_dim=0, width=512, depth=6, heads=8):
        super().__init__()
        assert width % heads == 0, f"width {width} is not divisible into {heads} heads"
        self.dim = dim
        self.cond_dim = cond_dim
        self.augment_dim = augment_dim
        self.width = width
        self.map_augment = nn.Linear(augment_dim, width) if augment_dim else None
        self.map_cond = nn.Linear(cond_dim, width) if cond_dim else None
        self.map_noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.map_y = nn.Linear(dim, width)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        tokens = 3 + bool(augment_dim) + bool(cond_dim)
        self.position = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList([PriorBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, dim)
        self.initialize()

    def initialize(self):
        # GPT-2's rule: small normal weights, no bias.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                init.normal_(layer.weight, std=0.02)
                init.zeros_(layer.bias)
        init.normal_(self.query, std=0.02)
        init.normal_(self.position, std=0.02)
        # The sum of 2·depth branches keeps the variance of one.
        for block in self.blocks:
            for layer in (block.proj, block.mlp[2]):
                init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))
        # Inputs keep their scale.
        for layer in (self.map_y, self.map_augment, self.map_cond):
            if layer is not None:
                init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, y, c_noise, cond=None, augment=None):
        assert (cond is not None) == bool(self.cond_dim), f"the prior was built for cond_dim {self.cond_dim}"
        tokens = []                                                                       # (B, width) each
        if self.augment_dim:
            if augment is None:
                augment = y.new_zeros(len(y), self.augment_dim)
            tokens.append(self.map_augment(augment))
        if self.cond_dim:
            tokens.append(self.map_cond(cond))
        tokens.append(self.map_noise(noise_features(c_noise, self.width)))
        tokens.append(self.map_y(y))
        tokens.append(self.query[:, 0].expand(len(y), -1))
        t = torch.stack(tokens, dim=1) + self.position                                    # (B, tokens, width)
        for block in self.blocks:
            t = block(t)
        return self.out(self.norm(t[:, -1]))                                              # (B, D)


# ============================================================================================================
# 5 U-Net
# ============================================================================================================
ARCHITECTURES = {                                     # EDM's networks for 64×64 images
    "ddpm++": dict(width=128, mults=(1, 2, 2, 2), blocks=4, attention=(16,)),
    "adm": dict(width=192, mults=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8))
}


def group_norm(channels, adm):
    """GroupNorm: 32 groups, or one for each four of fewer than 128 channels; fewer if these do not divide."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-5 if adm else 1e-6)


class UNetBlock(nn.Module):
    """One residual block of either architecture, then self-attention if heads > 0 (EDM, Appendix F).

    forward: x (B, C, H, W), embedding of noise level and condition (B, E) -> (B, C', H', W'), where H' is H,
    2H ("up") or H/2 ("down").
    """

    def __init__(self, cin, cout, emb_dim, adm, heads=0, resample=None, dropout=0.0):
        super().__init__()
        self.adm = adm
        self.heads = heads
        self.resample = resample
        self.dropout = dropout
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        self.norm0 = group_norm(cin, adm)
        self.conv0 = nn.Conv2d(cin, cout, 3, padding=1)
        self.affine = nn.Linear(emb_dim, 2 * cout if adm else cout)
        self.norm1 = group_norm(cout, adm)
        self.conv1 = nn.Conv2d(cout, cout, 3, padding=1)
        projected = cin != cout or (resample and not adm)
        self.skip = nn.Conv2d(cin, cout, 1) if projected else None
        if heads:
            self.norm2 = group_norm(cout, adm)
            self.qkv = nn.Conv2d(cout, 3 * cout, 1)
            self.proj = nn.Conv2d(cout, cout, 1)

    def resized(self, x):
        """The filter [1, 1]: average of 2×2 pixels down, nearest neighbor up."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

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
        if self.skip is not None:
            x = self.skip(x)
        x = (x + h) * self.skip_scale
        if self.heads:
            x = (x + self.attention(x)) * self.skip_scale
        return x

    def attention(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(1)                                           # (B, heads, HW, d)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """EDM's image networks: DDPM++ (Song et al. 2021) and ADM (Dhariwal and Nichol 2021), from one block.

    forward: x (B, C, H, W) scaled by c_in, c_noise (B,), cond (B, K) = y ⊕ a, augmentation label (B, 9) ->
    (B, C, H, W). The condition enters through one learned linear map, added to the embedding of the noise
    level. Sizes that are not given are those of `ARCHITECTURES`.
    """

    def __init__(self, resolution, channels=3, cond_dim=0, augment_dim=0, arch="ddpm++", dropout=0.0,
                 width=None, mults=None, blocks=None, attention=None):
        super().__init__()
        usual = ARCHITECTURES[arch]
        width = width or usual["width"]
        mults = mults or usual["mults"]
        blocks = blocks or usual["blocks"]
        if attention is None:
            attention = usual["attention"]
        adm = arch == "adm"
        halved = len(mults) - 1
        assert resolution % 2**halved == 0, f"resolution {resolution} cannot be halved {halved} times"
        self.adm = adm
        self.resolution = resolution
        self.channels = channels
        self.width = width
        self.cond_dim = cond_dim
        self.augment_dim = augment_dim
        emb_dim = 4 * width

        # Embedding of noise level, augmentation and condition, which DDPM++ adds before the MLP, ADM after.
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(width, emb_dim)
        self.map_layer1 = nn.Linear(emb_dim, emb_dim)
        self.map_cond = nn.Linear(cond_dim, emb_dim if adm else width, bias=not adm) if cond_dim else None

        def block(cin, cout, attended, resample=None):
            heads = 0
            if attended:
                heads = cout // 64 if adm else 1
            return UNetBlock(cin, cout, emb_dim, adm, heads, resample, dropout)

        # Encoder: every block's output is kept as a skip. DDPM++ attends in every encoder block ...
        c = width
        self.enc = nn.ModuleList([nn.Conv2d(channels, c, 3, padding=1)])
        skips = [c]
        for level, mult in enumerate(mults):
            attended = resolution >> level in attention
            if level:
                self.enc.append(block(c, c, False, "down"))
                skips.append(c)
            for _ in range(blocks):
                self.enc.append(block(c, width * mult, attended))
                c = width * mult
                skips.append(c)
        # ... and in the level's last decoder block, ADM in all. All but the first two and "up" take a skip.
        self.dec = nn.ModuleList([block(c, c, True), block(c, c, False)])
        self.takes_skip = [False, False]
        for level, mult in reversed(list(enumerate(mults))):
            attended = resolution >> level in attention
            if level < halved:
                self.dec.append(block(c, c, False, "up"))
                self.takes_skip.append(False)
            for i in range(blocks + 1):
                self.dec.append(block(c + skips.pop(), width * mult, attended and (adm or i == blocks)))
                self.takes_skip.append(True)
                c = width * mult
        assert not skips
        self.out_norm = group_norm(c, adm)
        self.out_conv = nn.Conv2d(c, channels, 3, padding=1)
        self.initialize()

    def initialize(self):
        """EDM's `init` rules. ADM starts from PyTorch's own default: U(±1/√fan_in) for weights and biases."""
        # DDPM++: Xavier-uniform weights, no bias.
        if not self.adm:
            for layer in self.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        init.zeros_(layer.bias)
        # The last layer of the net and of each branch starts (almost) silent.
        silent = 0.0 if self.adm else 1e-5
        scale_weights(self.out_conv, silent)
        for block in self.modules():
            if isinstance(block, UNetBlock):
                scale_weights(block.conv1, silent)
                if block.heads:
                    scale_weights(block.proj, silent)
                    if not self.adm:
                        scale_weights(block.qkv, math.sqrt(0.2))
        # ADM: no augmentation at first, and a condition of Kaiming-normal weights times √cond_dim.
        if self.adm and self.augment_dim:
            init.zeros_(self.map_augment.weight)
        if self.adm and self.cond_dim:
            init.normal_(self.map_cond.weight)

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
        x = self.enc[0](x)                                                                # (B, width, H, W)
        skips = [x]
        for block in self.enc[1:]:
            x = block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.dec, self.takes_skip):
            if takes_skip:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))                                    # (B, C, H, W)


@torch.no_grad()
def scale_weights(layer, factor):
    """Multiplies a layer's initial weights; no bias."""
    layer.weight.mul_(factor)
    init.zeros_(layer.bias)


# ============================================================================================================
# 6 Embeddings: e_i(x) -> y
# ============================================================================================================
# A backbone is a module with `dim` and forward: (B, 3, H, W) in [-1, 1] -> (B, dim), raw: not normalized.
# Its elements should have an rms of about 0.5, which sigma_data = 0.5 expects. To add one, write its class
# and enter it in EMBEDDERS. The one argument is what --embedder-weights names; None means random weights.


class ClipEmbedder(nn.Module):
    """The paper's e_i: the image side of OpenAI's CLIP ViT-B/32, by open_clip.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 512), rms about 0.44. Not L2-normalized: the elements of a unit
    vector, 0.044 in size, would drown in the noise of the prior. `weights`: "openai" or another name, which
    open_clip downloads once, the path of a weights file, or None for random ones. Raises UserError.
    """
    dim = 512

    def __init__(self, weights=None):
        super().__init__()
        import open_clip                              # seconds to import: only those who use it pay
        try:
            # Plain ViT-B-32 lacks the activation of these weights.
            model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=weights,
                                           require_pretrained=weights is not None)
        except Exception as error:                    # a hub, a network and a foreign file fail as they like
            raise UserError(f"CLIP's weights '{weights}' cannot be loaded ({error!r:.200}): connect once, "
                            f"or fetch open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai "
                            f"on Hugging Face and give --embedder-weights FILE; --embedder pixels needs none"
                            ) from error
        self.visual = model.visual
        colors = torch.tensor([open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD])
        self.register_buffer("colors", colors[:, :, None, None], persistent=False)        # (2, 3, 1, 1)

    def forward(self, x):
        # Departure: bilinear, as the authors' code has it; CLIP's own resize is bicubic.
        x = F.interpolate(x, 224, mode="bilinear")
        mean, std = self.colors
        return self.visual(((x + 1) / 2 - mean) / std)


class Pixels(nn.Module):
    """An embedder for any data, without weights: the image, shrunk to 4×4 pixels.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 48). It knows layout and color, nothing of meaning.
    """
    dim = 48

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


def convolution(cin, cout, stride=1):
    """(B, cin, H, W) -> (B, cout, H / stride, W / stride)."""
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, stride, padding=1),
        nn.GroupNorm(8, cout),
        nn.SiLU()
    )


class ConvNet(nn.Module):
    """A small network that reads the embedded world: (B, 3, H, W) in [-1, 1] -> (B, outputs)."""

    def __init__(self, outputs, width=32):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(3, width),
            convolution(width, 2 * width, stride=2),
            convolution(2 * width, 2 * width),
            convolution(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(4)
        )
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(4 * width * 4 * 4, 4 * width),
            nn.SiLU()
        )
        self.out = nn.Linear(4 * width, outputs)

    def features(self, x):
        """(B, 3, H, W) -> (B, 4·width, 4, 4)."""
        return self.layers(F.adaptive_avg_pool2d(x, min(x.shape[-1], 32)))            # 32 pixels show all

    def forward(self, x):
        return self.out(self.hidden(self.features(x)))


class SmallClip(ConvNet):
    """The image side of the embedded world's own CLIP, which `train_small_clip` trains.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 16). `weights`: the file of the trained ones, or None.
    """
    dim = 16

    def __init__(self, weights=None):
        super().__init__(self.dim)
        if weights is not None:
            self.load_state_dict(load_checkpoint(weights)["content"])


EMBEDDERS = {"clip": ClipEmbedder, "pixels": Pixels, "shapes": SmallClip}


class PCA(nn.Module):
    """Principal components of y: mean (D,), basis (D, dims), largest first; centered, not whitened.

    transform: (B, D) -> (B, dims).
    """
    kind = "pca"

    def __init__(self, mean, basis):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float().contiguous())
        self.dim = basis.shape[1]

    @classmethod
    def fit(cls, y, dims):
        """To the rows of y (N, D), 0 < dims <= D."""
        with warnings.catch_warnings(action="ignore"):                    # that a mapped array is read-only
            y = torch.as_tensor(y)
        mean = y.mean(0, dtype=torch.float64)
        scatter = 0
        for part in y.split(8192):                    # a million rows in float64 would take gigabytes
            centered = part - mean
            scatter += centered.T @ centered
        _, basis = torch.linalg.eigh(scatter)                                             # ascending
        return cls(mean, basis.flip(1)[:, :dims])

    def transform(self, y):
        return (y.float() - self.mean) @ self.basis


class KMeans(nn.Module):
    """Clusters of y, for the baseline Class-cond: their centers (K, D) and numbers of images, counts (K,).

    transform: (B, D) -> one-hot (B, K), of the nearest center.
    """
    kind = "kmeans"

    def __init__(self, centers, counts):
        super().__init__()
        self.register_buffer("centers", centers)
        self.register_buffer("counts", counts)
        self.dim = len(centers)

    @classmethod
    def fit(cls, y, clusters):
        """To all rows of y (N, D), by Lloyd's iteration. It starts from k-means++ on some of the rows."""
        y = np.asarray(y, np.float32)
        rng = np.random.default_rng(0)
        some = rng.permutation(len(y))[:max(20_000, 20 * clusters)]
        with warnings.catch_warnings(action="ignore"):                    # that some clusters stay empty
            start, _ = kmeans2(y[some], clusters, minit="++", rng=rng)
            centers, labels = kmeans2(y, start, iter=50, minit="matrix")
        counts = np.bincount(labels, minlength=clusters)
        return cls(torch.from_numpy(centers), torch.from_numpy(counts))

    def transform(self, y):
        nearest = torch.cdist(y.float(), self.centers).argmin(1)
        return F.one_hot(nearest, self.dim).float()


REDUCTIONS = {"pca": PCA, "kmeans": KMeans}


def parse_y(y):
    """--y -> (kind, size): ("all", 0), ("pca", D) or ("kmeans", K). Raises UserError."""
    if y == "all":
        return y, 0
    kind, _, size = y.partition(":")
    if kind not in REDUCTIONS or not re.fullmatch(r"[1-9]\d*", size):
        raise UserError(f"--y {y} is unknown: choose all, pca:D or kmeans:K, such as pca:32")
    return kind, int(size)


def has_prior(y):
    """Whether stage 1 is a diffusion model; clusters are drawn by their frequency."""
    kind, _ = parse_y(y)
    return kind != "kmeans"


class Embedder(nn.Module):
    """e_i: a backbone, named as in EMBEDDERS, and a PCA or KMeans of its embeddings, or None.

    forward: (B, 3, H, W) in [-1, 1] -> y (B, D). `weights`: the file or name that the backbone loads its
    weights from. Raises UserError.
    """

    def __init__(self, name, weights=None):
        super().__init__()
        self.name = name
        self.weights = weights
        self.backbone = EMBEDDERS[name](weights).eval().requires_grad_(False)
        self.reduction = None

    @property
    def dim(self):
        """D, the dimension of y."""
        return (self.reduction or self.backbone).dim

    def forward(self, x):
        return self.reduce(self.embed(x))

    def embed(self, x):
        """The backbone alone: (B, 3, H, W) -> (B, dim). Every stage and every GPU computes the same."""
        with full_float32(x.device):
            return self.backbone(x).float()

    def reduce(self, embeddings):
        """The reduction alone: (B, dim) of the backbone -> y (B, D)."""
        if self.reduction is None:
            return embeddings
        with full_float32(embeddings.device):
            return self.reduction.transform(embeddings)


def pack_embedder(embedder):
    """What a checkpoint keeps of an `Embedder`, as a dict: all but the weights of the public CLIP."""
    packed = dict(name=embedder.name, weights=embedder.weights, fingerprint=fingerprint(embedder.backbone))
    if embedder.name != "clip":
        packed["state"] = embedder.backbone.state_dict()
    if embedder.reduction is not None:
        packed["kind"] = embedder.reduction.kind
        packed["reduction"] = embedder.reduction.state_dict()
    return packed


def unpack_embedder(packed, weights=None):
    """The `Embedder` of a checkpoint. `weights`: CLIP's, if they have moved. Raises UserError."""
    if packed["name"] == "clip":
        embedder = Embedder("clip", weights or packed["weights"])
        if fingerprint(embedder.backbone) != packed["fingerprint"]:
            raise UserError("CLIP's weights are not those of the training: add --embedder-weights FILE")
    else:
        embedder = Embedder(packed["name"])
        embedder.backbone.load_state_dict(packed["state"])
    if "reduction" in packed:
        embedder.reduction = REDUCTIONS[packed["kind"]](**packed["reduction"])
    return embedder


@torch.no_grad()
def embedding_bank(images, embedder, folder, augment=None, views=1, device="cpu"):
    """The backbone's embeddings of all images: (views, N, dim + 9) float32, mapped; 9: augmentation label.

    They are computed once: the prior is tiny and CLIP is not, so that the prior never waits for CLIP. Each
    view of an image is another augmentation. Without augmentation there is one view, and its labels are 0.
    Departure: the paper augments anew each time; here there are `views` of each image.
    """
    name = f"bank-{images.name}-{embedder.name}-{fingerprint(embedder.backbone)}"
    if augment is None:
        views = 1
    else:
        name += f"-augment{augment.p:g}-views{views}"
    N = len(images)

    def embed(rows):
        x = images.batch(rows % N, device)
        label = x.new_zeros(len(x), LABEL_DIM)
        if augment is not None:
            torch.manual_seed(mix_seed(rows[0]))      # a bank does not depend on the seed of a training
            x, label = augment(x)
        return torch.cat([embedder.embed(x), label], dim=1).cpu().numpy()

    shape = (views * N, embedder.backbone.dim + LABEL_DIM)
    bank = made_once(folder, name, shape, np.float32, embed, "embedding")
    return bank.reshape(views, N, -1)


# ============================================================================================================
# 7 Augmentation
# ============================================================================================================
# The low-pass filter of the orthogonal wavelet sym6, here with sum 1 (Daubechies, Ten Lectures, table 6.3).
SYM6 = np.array([0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
                 0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
                 -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148])
SYM6 /= SYM6.sum()
PAD = 5                                               # pixels beyond the edge that the filter reaches
LABEL_DIM = 9


def coins(batch, p):
    """(batch,): 1 with probability p, else 0."""
    return (torch.rand(batch) < p).float()


def directions(batch):
    """(batch,) angles, from the full circle."""
    return (2 * torch.rand(batch) - 1) * math.pi


class Augment:
    """Augments images as EDM does (Appendix F), each transform with probability p.

    Departure: for the prior the paper names color jitter, too; the authors' code has none, nor has EDM's.

    `augment(images) -> (images, labels)`: (B, C, H, W) in [-1, 1] on any device -> the same, (B, 9). A label
    is [x-flip, y-flip, n of the scale, cos t - 1, sin t, n cos r, n sin r, n of x, n of y], 0 for what is not
    applied: flips are 0 or 1, t is the angle of the rotation, r the direction of the stretch, n is standard
    normal. Positive angles turn counter-clockwise as one looks at the image, positive shifts go right and
    down. A row whose label is zero comes back bit for bit.
    """

    def __init__(self, p):
        self.p = p

    def __call__(self, images):
        # Drawn on the CPU, which then knows without waiting for the device what needs resampling.
        B = len(images)
        x_flip = coins(B, 0.5)                                          # always active, whatever p is
        y_flip = coins(B, self.p) * coins(B, 0.5)
        zoom = torch.randn(B) * coins(B, self.p)
        turn = directions(B) * coins(B, self.p)
        stretch = torch.randn(B) * coins(B, self.p)
        frame = directions(B) * coins(B, 0.5)                           # half of the time along the axes
        shift = torch.randn(B, 2) * coins(B, self.p)[:, None]           # right and down
        labels = torch.stack([
            x_flip,
            y_flip,
            zoom,
            turn.cos() - 1,
            turn.sin(),
            stretch * frame.cos(),
            stretch * frame.sin(),
            shift[:, 0],
            shift[:, 1]
        ], dim=1)                                                                                  # (B, 9)

        # Forward: flip, zoom, turn, stretch, shift. Resampling needs the inverse: output -> input position.
        squeeze = torch.stack([-0.2 * stretch, 0.2 * stretch], dim=1).exp2().diag_embed()
        inverse = rotation(turn) @ rotation(-frame) @ squeeze @ rotation(frame)                    # (B, 2, 2)
        inverse *= (-0.2 * zoom).exp2()[:, None, None]
        rows = labels[:, 2:].any(1).nonzero().flatten()                 # (R,), those that are resampled

        device = images.device
        labels = send(labels, device)
        for column, dim in ((0, 3), (1, 2)):                            # x-flip, y-flip
            flipped = per_example(labels[:, column], images) > 0
            images = torch.where(flipped, images.flip(dim), images)
        if len(rows):
            inverse = send(inverse[rows], device)
            offset = send(0.125 * shift[rows], device)                  # in units of width and height
            rows = send(rows, device)
            with full_float32(device):
                resampled = resample(images[rows], inverse, offset)
            images = images.index_copy(0, rows, resampled)
        return images, labels


def rotation(angle):
    """(B,) -> (B, 2, 2): with y pointing down, the inverse of a counter-clockwise turn by the angle."""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def resample(images, inverse, offset):
    """The images seen through affine maps about their centers, with reflected surroundings.

    images (R, C, H, W), inverse (R, 2, 2), offset (R, 2) in image sizes: output position v shows the input at
    inverse (v - offset). Doubles the resolution, interpolates linearly there, and halves it again.
    Departure: the filter is placed by its center of mass, 0.05 pixels from where EDM places it.
    """
    height, width = images.shape[2:]
    # (2H + 10, H), (H, 2H + 10), (2H + 10,)
    up_y, down_y, at_y = filters(height, images.device)
    up_x, down_x, at_x = filters(width, images.device)
    fine = up_y @ images @ up_x.T                                       # (R, C, 2H + 10, 2W + 10)
    x = at_x - (width - 1) / 2 - offset[:, 0, None, None] * width       # (R, 1, 2W + 10)
    y = at_y[:, None] - (height - 1) / 2 - offset[:, 1, None, None] * height              # (R, 2H + 10, 1)
    m = inverse[:, :, :, None, None]                                    # (R, 2, 2, 1, 1)
    grid = []
    for row, at, size in ((0, at_x, width), (1, at_y, height)):
        last = size - 1                                                 # beyond it and 0 is the reflection
        position = m[:, row, 0] * x + m[:, row, 1] * y + last / 2       # (R, 2H + 10, 2W + 10), in pixels
        inside = last - (position % (2 * last) - last).abs()
        grid.append(2 * (inside - at[0]) / (at[-1] - at[0]) - 1)        # from -1 at at[0] to 1 at at[-1]
    fine = F.grid_sample(fine, torch.stack(grid, dim=-1), align_corners=True)
    return down_y @ fine @ down_x.T                                     # (R, C, H, W)


def halving(size):
    """(size, 2 size + 10): the matrix that weighs the fine samples 2 i, ..., 2 i + 11 to the coarse i."""
    return np.array([np.pad(SYM6, (2 * i, 2 * (size - 1 - i))) for i in range(size)])


@functools.cache
def filters(size, device):
    """Matrices that double, with reflection, and halve a signal, and the positions of the fine samples.

    Shapes (2 size + 10, size), (size, 2 size + 10), (2 size + 10,), the last in units of coarse samples.
    Inside, halving is half the transpose of doubling, and the filter is orthogonal to its even shifts: one
    after the other they are the identity.
    """
    # (size + 10, size): of which pixel each one is a copy
    mirror = np.pad(np.eye(size), ((PAD, PAD), (0, 0)), "reflect")
    up = 2 * halving(size + 2 * PAD).T[2 * PAD:-2 * PAD] @ mirror
    down = halving(size)
    delay = SYM6 @ np.arange(12)                                        # of the filter: its center of mass
    at = (np.arange(2 * size + 2 * PAD) - delay) / 2
    return [torch.tensor(array, dtype=torch.float32, device=device) for array in (up, down, at)]


# ============================================================================================================
# 8 The embedded world
# ============================================================================================================
# A procedural data set of colored shapes, and its own CLIP.
SHAPES = ["circle", "ring", "square", "triangle", "cross", "star"]
COLORS = {                                            # hue in degrees
    "red": 0,
    "orange": 30,
    "yellow": 55,
    "green": 120,
    "cyan": 180,
    "blue": 225,
    "purple": 275,
    "pink": 325
}
ATTRIBUTES = {                                        # how many values each has
    "shape": len(SHAPES),
    "color": len(COLORS),
    "background": len(COLORS),
    "count": 4                                        # one to four objects
}
QUADRANTS = torch.tensor([                            # to be countable, objects sit in different ones
    [-0.48, -0.48],
    [0.48, -0.48],
    [0.48, 0.48],
    [-0.48, 0.48]
])


def uniform(seed, index, slots):
    """(N,) int64 -> (N, slots) float32 in [0, 1), row i a function of the seed and index[i] alone."""
    rows = []
    for i in index.tolist():                          # a counter-based generator can start anywhere
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, i, 0, 0]))
        rows.append(generator.random(slots, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


def hsv_to_rgb(hue, saturation, value):
    """Hue in degrees, saturation and value in [0, 1], which broadcast to (...) -> (..., 3) in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    missing = torch.minimum(k, 4 - k).clip(0, 1)
    return value[..., None] * (1 - saturation[..., None] * missing)


def signed_distance(shape, x, y):
    """Signed distance (negative inside) of points (x, y), each (...), to a shape of circumradius 1 at 0."""
    r = (x**2 + y**2).sqrt()
    long = torch.maximum(x.abs(), y.abs())
    short = torch.minimum(x.abs(), y.abs())
    if shape == "circle":
        return r - 0.9
    if shape == "ring":
        return (r - 0.72).abs() - 0.24
    if shape == "square":
        return long - 0.75
    if shape == "triangle":
        return torch.maximum(y - 0.5, math.sqrt(0.75) * x.abs() - 0.5 * y - 0.5)
    if shape == "cross":
        return torch.maximum(long - 0.95, short - 0.3)
    # A star: fold the plane into one half of one of its five rays, then the distance to that half's edge.
    half = math.pi / 5
    angle = half - (torch.atan2(x, -y) % (2 * half) - half).abs()
    px = r * angle.cos()
    py = r * angle.sin()
    edge_x = 0.42 * math.cos(half) - 1                # from the tip (1, 0) to the inner corner
    edge_y = 0.42 * math.sin(half)
    return ((px - 1) * edge_y - py * edge_x) / math.hypot(edge_x, edge_y)


def shapes_attributes(index, seed=0):
    """(N,) int64 -> {each of ATTRIBUTES: (N,) int64}: what image i shows.

    Background and objects always differ in color.
    """
    choices = torch.tensor([len(SHAPES), len(COLORS), len(COLORS) - 1, 4])
    shape, color, other, count = (uniform(seed, index, 4) * choices).long().unbind(1)
    background = (color + other + 1) % len(COLORS)
    return dict(shape=shape, color=color, background=background, count=count)             # count: less one


def shapes_images(index, resolution, seed=0):
    """(N,) int64 -> (N, H, W, 3) uint8: image i is a function of (seed, i) and the resolution alone.

    One to four objects of one shape and one color on a background of another: which shape, which colors and
    how many are decided once for the whole image; each object's place, size and shade vary freely.
    """
    shown = shapes_attributes(index, seed)
    u = uniform(seed + 1, index, 25)[:, :, None, None]                                    # (N, 25, 1, 1)
    hues = torch.tensor(list(COLORS.values()))[:, None, None]                             # (8, 1, 1)
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1                          # pixel centers
    y, x = torch.meshgrid(axis, axis, indexing="ij")                                      # (H, W)
    tilt = 2 * math.pi * u[:, 0]
    light = 0.42 + 0.1 * u[:, 1] + 0.14 * (x * tilt.cos() + y * tilt.sin())               # (N, H, W)
    background = hues[shown["background"]]                                                # (N, 1, 1)
    color = hues[shown["color"]]
    image = hsv_to_rgb(background, 0.5 + 0.15 * u[:, 2], light)                           # (N, H, W, 3)

    # The quadrants are filled from a random one, in one direction or the other.
    start = (u[:, 3] * 4).long()
    turn = 2 * (u[:, 4] < 0.5).long() - 1
    for j in range(4):
        v = u[:, 5 + 5 * j:10 + 5 * j]                                                    # (N, 5, 1, 1)
        center = QUADRANTS[(start + turn * j) % 4]                                        # (N, 1, 1, 2)
        size = 0.42 + 0.06 * v[:, 2]
        cx = center[..., 0] + 0.08 * (v[:, 0] - 0.5)
        cy = center[..., 1] + 0.08 * (v[:, 1] - 0.5)
        px = (x - cx) / size                                                              # (N, H, W)
        py = (y - cy) / size
        distance = torch.empty_like(px)
        for s, name in enumerate(SHAPES):
            rows = shown["shape"] == s
            distance[rows] = signed_distance(name, px[rows], py[rows])
        there = (j <= shown["count"])[:, None, None]
        cover = (0.5 - distance * size * resolution / 2).clip(0, 1) * there               # (N, H, W)
        paint = hsv_to_rgb(color, 0.8 + 0.2 * v[:, 3], 0.85 + 0.15 * v[:, 4])
        image = image + cover[..., None] * (paint - image)
    return (image * 255).round().to(torch.uint8)


def train_small_clip(images, steps=700, batch=64, dim=64):
    """Trains the world's `SmallClip` by CLIP's symmetric loss (Radford et al. 2021, Fig. 3) -> state dict.

    `images` are the first of the world. A caption is four words, one of each of ATTRIBUTES.
    """
    torch.manual_seed(0)                              # y is part of the data: the same for every --seed
    captions = []
    for name, values in shapes_attributes(torch.arange(len(images))).items():
        captions.append(F.one_hot(values, ATTRIBUTES[name]).float())
    captions = torch.cat(captions, dim=1)                                                 # (N, 26)
    vision = ConvNet(dim)
    text = nn.Sequential(
        nn.Linear(captions.shape[1], 128),
        nn.SiLU(),
        nn.Linear(128, dim)
    )
    log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.Adam([*vision.parameters(), *text.parameters(), log_temperature])
    target = torch.arange(batch)
    for step in progress(range(steps), "small CLIP", unit=" steps"):
        rows = np.random.RandomState(step).choice(len(images), batch)
        y = F.normalize(vision(images.batch(rows)), dim=1)                                # (B, dim)
        t = F.normalize(text(captions[rows]), dim=1)
        logits = y @ t.T * log_temperature.exp()                                          # (B, B)
        of_images = F.cross_entropy(logits, target)
        of_captions = F.cross_entropy(logits.T, target)
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        (of_images + of_captions).backward()
        optimizer.step()

    # A short training of prior and image model learns few numbers better than many. So the last layer is
    # changed to give the first principal components of the 64 numbers, at an rms of 0.5, about CLIP's.
    with torch.no_grad():
        y = vision(images.batch(np.arange(min(len(images), 5000))))
        pca = PCA.fit(y, SmallClip.dim)
        scale = 0.5 / pca.transform(y).square().mean().sqrt()
        weight = scale * pca.basis.T @ vision.out.weight
        bias = scale * pca.transform(vision.out.bias)
    return vision.state_dict() | {"out.weight": weight, "out.bias": bias}


def embedder_weights(config):
    """What --embedder loads its weights from. The world's own CLIP is trained here, once, on all images."""
    if config.embedder != "shapes":
        return config.embedder_weights
    cache = cache_of(config)
    images = shapes_world(config.size, config.resolution, cache)
    path = cache / f"clip-{config.resolution}-{config.size}.pt"
    cached(path, lambda: train_small_clip(images))
    return str(path)


# ============================================================================================================
# 9 Sets of images
# ============================================================================================================
@dataclass
class Images:
    """A set of images: pixels (N, R, R, 3) uint8, in memory, mapped, or an `ImageFiles`.

    `name` tells it from all others; caches are named after it. labels: (N,) int64, or () if there are no
    classes. latents: the moments (N, 2C, r, r) float16 that `Autoencoder.encode` returns, or None.
    """
    name: str
    pixels: "np.ndarray | ImageFiles"
    labels: np.ndarray | tuple = ()
    classes: list | tuple = ()          # their names
    why_no_classes: str = ""            # for the error, where there are none
    latents: np.ndarray | None = None

    def __len__(self):
        return self.pixels.shape[0]

    @property
    def resolution(self):
        return self.pixels.shape[1]

    def batch(self, rows, device="cpu"):
        """(B,) -> (B, 3, R, R) float32 in [-1, 1], channels last in memory, which convolutions prefer."""
        pixels = send(self.pixels[rows], device)
        return to_float(pixels).permute(0, 3, 1, 2)


def send(array, device):
    """An array or CPU tensor -> tensor on the device. A GPU is not waited for."""
    array = np.require(array, requirements="W")       # copies a mapped array, which is read-only
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def made_once(folder, name, shape, dtype, make, what, batch=256):
    """The array of folder/name.rows, mapped: `shape` (N, ...). make(rows) makes those of these numbers, once.

    They are appended to a .part file, so that a killed process goes on where it was, to the bit. The finished
    file arrives by a rename. Another process that wants it waits. `what` names the progress bar.
    """
    path = Path(folder, f"{name}.rows")
    total = shape[0]
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    batch_bytes = batch * row_bytes
    with locked(path.with_suffix(".lock")) as alone:
        # Where there are no locks, several processes may make the same.
        part = path.with_suffix(".part" if alone else f".{os.getpid()}.part")
        if not path.exists() or path.stat().st_size != total * row_bytes:         # a copy may be cut off
            with open(part, "ab") as file:
                batches = file.tell() // batch_bytes                      # whole ones, which are kept
                file.truncate(batches * batch_bytes)
                for start in progress(range(batches * batch, total, batch), what, " batches"):
                    rows = np.arange(start, min(start + batch, total))
                    file.write(np.ascontiguousarray(make(rows), dtype).data)
            os.replace(part, path)
    try:
        return np.memmap(path, dtype, "r", shape=shape)
    except OSError:                                   # some file systems can only read all of it
        return np.fromfile(path, dtype).reshape(shape)


SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
            ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".tga")
# Those of them that the installed Pillow can read.
FORMATS = [kind for suffix, kind in Image.registered_extensions().items() if suffix in SUFFIXES]
# Long texts beside a picture are not used here, but Pillow would refuse the picture.
PngImagePlugin.MAX_TEXT_CHUNK = 2**30
warnings.filterwarnings("ignore", module="PIL")       # on odd EXIF, palettes and large sizes


class ImageFiles:
    """The images of a folder or zip, at any depth, read when they are looked at.

    `names` (N,) have / between folders; `files[rows]` -> (B, R, R, 3) uint8, center squares. Without a
    resolution, all must be squares of one size. Unless names are given, the source is listed: `listed` is
    {name of any file: its size}, `folders` has all folders. skip_bad leaves out what cannot be read, which
    needs a resolution. Raises UserError.
    """

    def __init__(self, source, resolution=None, names=None, skip_bad=False):
        self.source = Path(source)
        if names is None:
            self.listed, self.folders = list_files(self)
            if "settings.json" in self.listed:
                self.listed.pop("grid.png", None)     # sample.py's picture of all
            names = [name for name in sorted(self.listed) if name.lower().endswith(SUFFIXES)]
        self.names = np.array(names)
        self.resolution = resolution
        self.exact = resolution is None               # all must be as large as the first
        if skip_bad:
            good = list(progress(self.each(self.is_good, names), "checking"))
            self.names = self.names[good]
        if len(self.names) == 0:
            raise UserError(f"{source} holds no images to be read ({' '.join(SUFFIXES)}): give another path")
        if self.exact:
            with self.reading(names[0]) as file:
                self.resolution = open_cut_image(file).width
        self.shape = (len(self.names), self.resolution, self.resolution, 3)

    def __getitem__(self, rows):
        return np.stack(list(self.each(self.load, self.names[rows])))

    def each(self, function, names):
        """Yields function(name) of each name, by threads: Pillow decodes without Python's global lock."""
        with ThreadPoolExecutor() as pool:
            yield from pool.map(function, names)

    @property
    def key(self):
        """12 hexadecimal digits of names and sizes, and of the bytes of at most a hundred images."""
        parts = [repr([(name, self.listed[name]) for name in self.names.tolist()])]
        for name in self.names[::len(self.names) // 100 + 1]:
            with self.reading(name) as file:
                parts.append(file)
        return hash_of(*parts)

    @functools.cached_property
    def archive(self):
        """An open zip, and {name of a file when unpacked: its entry}. Raises UserError.

        It is opened when it is first needed: a prepared set may have lost its source.
        """
        try:
            archive = zipfile.ZipFile(self.source)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.source} is neither a folder nor a whole zip ({error!r:.200}): give "
                            f"the path of the images") from error
        return archive, {plain_name(entry.filename): entry for entry in archive.infolist()}

    def content(self, name):
        """The bytes of any file of the folder or zip."""
        if self.source.is_dir():
            return Path(self.source, name).read_bytes()
        archive, entries = self.archive
        return archive.read(entries[name])

    @contextmanager
    def reading(self, name):
        """Gives the bytes of an image; whatever is wrong with them becomes a sentence that names it."""
        try:
            yield self.content(name)
        except MemoryError:
            raise
        except Exception as error:                    # on damaged files Pillow and zipfile raise anything
            raise UserError(f"{name} in {self.source} cannot be read ({error!r:.200}): repair, remove or "
                            f"replace it (train.py --skip-bad leaves all such images out)") from error

    def load(self, name):
        """The name of an image -> (R, R, 3) uint8."""
        with self.reading(name) as file:
            return read_square(file, self.resolution, self.exact)

    def is_good(self, name):
        """Whether an image can be read."""
        try:
            self.load(name)
        except UserError:
            return False
        return True


def plain_name(name):
    """A path in a zip or dataset.json, with / and without ./: Windows and archivers write others.

    Each accented letter becomes one character; file systems and archivers may have two.
    """
    return unicodedata.normalize("NFC", posixpath.normpath("./" + name.replace("\\", "/")))


def list_files(images):
    """`ImageFiles` -> {name of each file of the folder or zip: its size}, and the set of its folders' Paths.

    Hidden files and folders are left out. Raises OSError for what cannot be read, and UserError.
    """
    source = images.source
    files = {}
    folders = set()
    if source.is_dir():
        for name in glob.iglob("./**", root_dir=source, recursive=True):  # which follows links
            path = source / name
            if path.is_dir():
                os.listdir(path)                      # raises if there are no rights: glob passes it over
                folders.add(Path(name))
            else:
                files[Path(name).as_posix()] = path.stat().st_size
    else:
        _, entries = images.archive
        for name, entry in entries.items():
            if "/." in f"/{name}":
                continue
            folders.update(Path(name).parents)        # of which a zip may have no entries
            if entry.filename[-1] in "/\\":
                folders.add(Path(name))
            else:
                files[name] = entry.file_size
    return files, folders


def find_labels(files):
    """The classes of listed `ImageFiles` -> labels, a list of N numbers or of none; their names; why none.

    They are those of EDM's dataset.json, if there is one, or the innermost folders: train/cat and test/cat
    are one class. Raises UserError.
    """
    tables = [name for name in files.listed if posixpath.basename(name) == "dataset.json"]
    if tables:
        return read_labels(files, min(tables, key=len))                   # the one nearest to the top
    folders = [Path(name).parent for name in files.names]                 # of each image
    if Path() in folders:
        return [], [], f"{files.names[folders.index(Path())]} does not lie in a folder"
    # What a Mac adds to a zip is hidden, but for the folders that it lies in.
    empty = {folder for folder in files.folders if "__MACOSX" not in folder.parts}
    for name in files.names:
        empty.difference_update(Path(name).parents)
    if empty:
        raise UserError(f"the folder {min(empty)} of {files.source} holds no images: fill or remove it")
    classes, labels = np.unique([folder.name for folder in folders], return_inverse=True)
    return labels.tolist(), classes.tolist(), ""


def read_labels(files, table):
    """EDM's {"labels": [[name, number], ...] or null} in the file `table` -> as `find_labels`. UserError."""
    where = f"{table} in {files.source}"
    folder = posixpath.dirname(table)
    try:
        pairs = json.loads(files.content(table))["labels"]
        if pairs is None:
            return [], [], f"{where} has no labels"
        numbers = {plain_name(posixpath.join(folder, name)): number for name, number in pairs}
    except Exception as error:                        # a foreign file fails as it likes
        raise UserError(f'{where} should be {{"labels": [[name, number], ...]}} with every image, or '
                        f'{{"labels": null}}: repair or remove it') from error
    labels = []
    for name in files.names:
        number = numbers.get(plain_name(name))
        if number not in range(100_000):              # 1.0 is in it
            raise UserError(f"{where} has for {name} the label {number}, not a whole number from 0: mend it")
        labels.append(int(number))
    return labels, [str(i) for i in range(max(labels) + 1)], ""


def open_image(file):
    """The bytes of an image file -> Pillow image, decoded. Raises what Pillow raises."""
    image = Image.open(io.BytesIO(file), formats=FORMATS)
    image.load()                                      # a GIF's or TIFF's mode is known only after this
    return image


def open_cut_image(file):
    """As `open_image`, but a JPEG may lack its end mark. If it lacks pixels, it is refused."""
    try:
        return open_image(file)
    except OSError:
        file = file.removesuffix(b"\xff")             # the first half of the mark
        image = open_image(file + b"\xff\xd9")
        # If pixels are missing, libjpeg takes zeros for them; other bytes then give another image.
        other = open_image(file + b"\xaa" * 999 + b"\xff\xd9")
        if image.tobytes() != other.tobytes():
            raise
        return image


def read_square(file, resolution, exact=False):
    """The bytes of an image file -> (R, R, 3) uint8, its center square. Raises what Pillow raises.

    exact: a ValueError unless the image is of this size.

    Every mode becomes RGB: transparency is laid on white, 16-bit gray is rounded to 8 bits, EXIF orientation
    is applied, color profiles are ignored, an animation gives its first frame.
    """
    image = open_cut_image(file)
    if exact and image.size != (resolution, resolution):
        raise ValueError(f"{image.width}x{image.height} pixels, where all must be squares of {resolution}")
    with suppress(Exception):                         # it turns, and then may stumble over odd EXIF
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):             # Pillow's convert would clip 16 bits to 255
        # A TIFF's may be of 12 bits, signed, or from white to black.
        if image.format not in ("PNG", "PPM") or image.mode == "F" or "transparency" in image.info:
            raise ValueError("neither of 8 bits nor a gray PNG of 16: save it as such")
        gray = (np.asarray(image, np.int64) + 128) // 257
        image = Image.fromarray(gray.astype(np.uint8))
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(resized(image, resolution))


def resized(image, resolution):
    """Pillow image -> Pillow image, R x R, RGB."""
    return image.convert("RGB").resize((resolution, resolution), Image.LANCZOS)


def prepare_images(source, resolution, cache, skip_bad=False, keep_pixels=True):
    """All images of a folder or zip as `Images` at R x R, prepared once in the folder `cache`, then mapped.

    From then on the source may be gone, unless keep_pixels is False, and only the times of its folders are
    looked at. Raises UserError if an image cannot be read, unless `skip_bad`.
    """
    source = Path(source).absolute()
    path = Path(cache, f"{source.stem}-{hash_of(str(source), str(skip_bad))[:6]}-{resolution}.set")
    # JSON: a million names are read in a second.
    known = json.loads(cached(path, lambda: json.dumps(survey(source, resolution, skip_bad))))
    if source.exists() and times_of(known["times"]) != known["times"]:
        say(f"{source} has changed since it was prepared; the images are used as they were then. To prepare "
            f"them anew, delete {path}")
    labels = np.array(known["labels"], np.int64)
    files = ImageFiles(source, resolution, known["names"])
    images = Images(known["name"], files, labels, known["classes"], known["why_no_classes"])
    if keep_pixels:
        try:
            images.pixels = made_once(
                cache, images.name, files.shape, np.uint8, files.__getitem__, "preparing")
        except UserError:
            path.unlink(missing_ok=True)              # the source is listed anew when the user has mended it
            raise
    return images


def times_of(places):
    """Paths -> {path: time of the last change}, without missing ones. A folder's: a file came or went."""
    return {str(place): os.path.getmtime(place) for place in places if os.path.exists(place)}


def survey(source, resolution, skip_bad):
    """Lists a folder or zip and prints what is there -> dict of all that later starts need. UserError."""
    files = ImageFiles(source, resolution, skip_bad=skip_bad)
    names = files.names.tolist()
    labels, classes, why_no_classes = find_labels(files)
    counts = collections.Counter(classes[label] for label in labels)
    left_out = collections.Counter(Path(name).suffix.lower() for name in set(files.listed) - set(names))
    say(f"{source}: {len(names):,} images, classes: {counts.most_common(20) or 'none: ' + why_no_classes}; "
        f"files left out: {left_out.most_common()}")
    return dict(
        name=f"images-{resolution}-{hash_of(files.key, repr(labels))}",
        source=str(source),
        times=times_of(source / folder for folder in files.folders),
        names=names,
        labels=labels,
        classes=classes,
        why_no_classes=why_no_classes
    )


def shapes_world(total, resolution, cache, first=0):
    """`total` images of the embedded world, from number `first`; the class is the shape."""
    def draw(rows):
        return shapes_images(first + rows, resolution).numpy()

    name = f"shapes-{resolution}-{first}-{first + total}"
    shape = (total, resolution, resolution, 3)
    pixels = made_once(cache, name, shape, np.uint8, draw, "drawing")
    labels = shapes_attributes(torch.arange(first, first + total))["shape"].numpy()
    return Images(name, pixels, labels, SHAPES)


TORCHVISION = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}
HOMES = {                                             # where to get the data sets
    "afhq": "AFHQv2 is at github.com/clovaai/stargan-v2",
    "ffhq": "FFHQ is at github.com/NVlabs/ffhq-dataset",
    "imagenet": "ImageNet's training images are at image-net.org",
    "cifar10": "cifar-10-python.tar.gz is at www.cs.toronto.edu/~kriz/cifar.html",
    "fashion-mnist": "its four .gz files are at github.com/zalandoresearch/fashion-mnist"
}


def torchvision_images(config, cache, train):
    """A data set of torchvision, its training or test set, at R x R, in RGB; downloaded once. UserError."""
    import torchvision                                # a second to import
    kind = getattr(torchvision.datasets, TORCHVISION[config.dataset])
    folder = Path(config.data or cache)
    with locked(Path(cache, "download.lock")):
        try:
            for packed in folder.glob("*-ubyte.gz"):                      # Fashion-MNIST, as it is published
                folder = cache
                with written(Path(cache, "FashionMNIST/raw", packed.stem)) as file:
                    file.write(gzip.decompress(packed.read_bytes()))
            data = kind(folder, train=train, download=True)
        except Exception as error:                    # no connection, or damaged files
            raise UserError(f"{config.dataset} cannot be loaded ({error!r:.200}): "
                            f"{HOMES[config.dataset]}; put what is there into a folder and give --data FOLDER"
                            ) from error
    arrays = np.ascontiguousarray(data.data)          # (N, H, W, 3), or (N, H, W) if gray

    def resize(rows):
        return np.stack([resized(Image.fromarray(array), config.resolution) for array in arrays[rows]])

    name = f"{config.dataset}-{config.resolution}-{hash_of(arrays)}"
    shape = (len(arrays), config.resolution, config.resolution, 3)
    pixels = made_once(cache, name, shape, np.uint8, resize, "preparing")
    return Images(name, pixels, np.asarray(data.targets), data.classes)


def find_source(config, cache):
    """Where a data set is: at --data, where the prepared set came from, or in data/. Raises UserError."""
    if config.data:
        return Path(config.data)
    prepared = list(cache.glob(f"*-{config.resolution}.set"))
    if len(prepared) == 1:
        return Path(json.loads(load_checkpoint(prepared[0])["content"])["source"])
    name = config.dataset.split("-")[0]               # the ImageNet presets share one
    for place in (Path("data", name), Path("data", f"{name}.zip")):
        if place.exists():
            return place
    raise UserError(f"--dataset {config.dataset} needs its images: {HOMES[name]}; put them into data/{name} "
                    f"or data/{name}.zip, or give --data FOLDER_OR_ZIP")


def cache_of(config):
    """The folder of all that is prepared for a data set."""
    return Path(config.runs, config.dataset, "data")


def load_images(config, autoencoder=None):
    """The training images of a configuration of train.py, with latents if there is an autoencoder.

    `config` has runs, dataset, data, resolution, size, limit, skip_bad and vae. Raises UserError.
    """
    cache = cache_of(config)
    if config.dataset == "shapes":
        images = shapes_world(config.size, config.resolution, cache)
    elif config.dataset in TORCHVISION:
        images = torchvision_images(config, cache, train=True)
    else:
        source = find_source(config, cache)
        images = prepare_images(source, config.resolution, cache, config.skip_bad, not config.vae)
    if 0 < config.limit < len(images):                # chosen at random, but once and for all
        rows = np.random.RandomState(0).permutation(len(images))[:config.limit]
        images.name += f"-limit{config.limit}"
        images.pixels = images.pixels[rows]
        if images.classes:
            images.labels = images.labels[rows]
    if autoencoder is not None:
        images.latents = latents_of(images, autoencoder, cache)
    return images


def test_images(config, total):
    """Images that no model was trained on, at most `total`, or None if the data set has none. UserError."""
    cache = cache_of(config)
    if config.dataset == "shapes":
        return shapes_world(total, config.resolution, cache, first=config.size)
    if config.dataset not in TORCHVISION:
        return None
    images = torchvision_images(config, cache, train=False)
    images.pixels = images.pixels[:total]
    return images


# ============================================================================================================
# 10 Latents
# ============================================================================================================
# Departure: the paper has latents of 64x64x4, "released by Rombach et al. (2022)"; Stable Diffusion's VAE
# shrinks by 8, to 32x32x4, and sd-vae-ft-mse has the same encoder and a decoder that was trained further.
# Departure: images are given to it in [0, 1], as the public code of EDM2 does (Karras et al. 2024, *Analyzing
# and Improving the Training Dynamics of Diffusion Models*), whose mean and deviation of each channel on
# ImageNet are these. In [-1, 1], its own range, they would be others. The paper does not say.
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
LATENT_STD = (4.17, 4.62, 3.71, 3.28)


class Autoencoder(nn.Module):
    """Stable Diffusion's VAE by diffusers, frozen: images (B, 3, R, R) to latents (B, 4, R/8, R/8) and back.

    `weights`: a name on Hugging Face, such as stabilityai/sd-vae-ft-mse, which diffusers downloads once, or a
    folder.
    """

    def __init__(self, weights):
        super().__init__()
        from diffusers import AutoencoderKL           # optional, and seconds to import
        self.model = AutoencoderKL.from_pretrained(weights)
        self.model.float().eval().requires_grad_(False)
        self.name = f"{Path(weights).name}-{fingerprint(self.model)}"
        self.register_buffer("mean", torch.tensor(LATENT_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(LATENT_STD)[:, None, None])

    def encode(self, x):
        """(B, 3, R, R) in [-1, 1] -> moments (B, 8, R/8, R/8): means, then standard deviations, unscaled."""
        posterior = self.model.encode((x + 1) / 2).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def sample(self, moments):
        """Moments (B, 8, r, r) -> a latent (B, 4, r, r), drawn at random, as the image model learns it.

        It is brought to mean 0 and deviation 0.5 per channel, as sigma_data = 0.5 expects.
        """
        mean, std = moments.float().chunk(2, dim=1)                                       # (B, 4, r, r)
        latent = mean + std * torch.randn_like(mean)
        return (latent - self.mean) / self.std * 0.5

    def decode(self, z, chunk=8):
        """(B, 4, R/8, R/8) as `sample` gives it -> (B, 3, R, R) in [-1, 1], `chunk` at a time."""
        latent = z / 0.5 * self.std + self.mean
        images = torch.cat([self.model.decode(part).sample for part in latent.split(chunk)])
        return (images * 2 - 1).clip(-1, 1)


@torch.no_grad()
def latents_of(images, autoencoder, cache):
    """The moments (N, 8, R/8, R/8) of all images, made once.

    In float16, which rounds a scaled latent by about 0.0002, a tenth of the least noise that is ever added.
    """
    device = autoencoder.mean.device

    def encode(rows):
        x = images.batch(rows, device)
        with full_float32(device):
            return autoencoder.encode(x).cpu().numpy()

    side = images.resolution // 8
    name = f"latents-{images.name}-{autoencoder.name}"
    shape = (len(images), 8, side, side)
    batch = 64 if device.type == "cuda" else 8
    return made_once(cache, name, shape, np.float16, encode, "encoding", batch)


# ============================================================================================================
# 11 Runs: errors, files, devices, processes, checkpoints, pictures
# ============================================================================================================
class UserError(Exception):
    """A mistake that only the user can mend: one sentence with the remedy, printed without a traceback."""


def run(main):
    """Runs a script's main. A user's mistake ends in one sentence and exit code 1, without a traceback.

    What nobody foresaw keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")          # for consoles that lack a letter
    try:
        main()
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped: the same command goes on from what is finished")
    except (torch.OutOfMemoryError, MemoryError):
        fail("out of memory: give a smaller --batch, or in training a smaller --batch-gpu")
    except ModuleNotFoundError as error:
        fail(f"the package {error.name} is missing: pip install -r requirements.txt diffusers")
    except OSError as error:
        # Only errors of paths and of full disks are the user's.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'writing'}: {error.strerror}: mend that, or choose another place; no file "
             f"is lost, and the same command goes on")
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        fail(f"torch.compile fails here ({error!r:.200}): leave out --compile")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fail(sentence):
    """Prints the sentence and ends the process. Of several that fail alike, the first one prints."""
    if rank() > 0:
        time.sleep(5)                                 # until torchrun stops this one
    sys.exit(f"error: {sentence}")


def number(text):
    """'0.25' -> 0.25, '25M' -> 25000000, '500k' -> 500000. ValueError if negative, or no number."""
    value = float(text.lower().replace("k", "e3").replace("m", "e6"))
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def whole_number(text):
    """'25M' -> 25000000."""
    return round(number(text))


def whole_numbers(text):
    """'1,2' -> (1, 2)."""
    return tuple(int(part) for part in text.split(","))


def parse_flags(settings, description, choices):
    """The command line, with a flag for each field of the dataclass `settings` -> {field: value}, if given.

    choices: {field: its allowed values}. --help shows the dataclass, with its defaults and comments.
    """
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--FLAG VALUE ...]",
        description=description,
        epilog=inspect.getsource(settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False
    )
    types = {int: whole_number, float: number, tuple: whole_numbers}
    for field in fields(settings):
        how = dict(type=types.get(field.type), choices=choices.get(field.name))
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif field.type is list:
            how["nargs"] = "*"
        flag = "--" + field.name.strip("_").replace("_", "-")
        parser.add_argument(flag, dest=field.name, help=argparse.SUPPRESS, **how)
    return vars(parser.parse_args())


bar_row = 0                                           # the terminal's row of this process's bars


def progress(iterable=None, what="", unit=" images", **more):
    """The one progress bar; of several processes only the first shows it. `more`: tqdm's total, initial."""
    return tqdm(iterable, what, unit=unit, unit_scale=True, dynamic_ncols=True, position=bar_row,
                leave=False, disable=rank() > 0, **more)


def say(text):
    """Prints a line above the bars; of several processes only the first does."""
    if rank() == 0:
        tqdm.write(text)


def mix_seed(*numbers):
    """Whole numbers -> a seed unrelated to others'. 32 bits: torch's CPU generator takes no more."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def hash_of(*parts):
    """12 hexadecimal digits: the sha256 of strings, bytes and arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = part.encode(errors="surrogateescape")
        digest.update(part)
    return digest.hexdigest()[:12]


def fingerprint(module):
    """12 hexadecimal digits that tell the weights of a module from others."""
    return hash_of(*[tensor.cpu().contiguous().numpy() for tensor in module.state_dict().values()])


@contextmanager
def written(path):
    """Gives a binary file to write to, which then becomes `path`: whole or not at all, even if killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "wb") as file:
        yield file
    os.replace(fresh, path)


@contextmanager
def locked(path):
    """Waits for the lock `path` and holds it; it ends with the process. Gives whether there are locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl                              # Windows lacks it
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except (ImportError, OSError):                # some file systems have no locks
            alone = False
        yield alone


def pick_device(name):
    """--device -> torch.device. "auto": cuda, else cpu. Process i has GPU i. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes() > 1:            # LOCAL_RANK is also set by others than torchrun
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except Exception as error:                        # torch's errors for devices have no common class
        raise UserError(f"--device {name} is not available here ({error!r:.200}): leave it out, or give "
                        f"cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)                 # else pinned memory is made for the first GPU
    return device


def set_precision(name, device, auto="bf16"):
    """--precision -> fp32, tf32 or bf16; sets whether float32 is multiplied exactly or as TF32 (10 bits).

    "auto" becomes `auto` on GPUs of compute capability 8.0 or more, which are fast in it, and fp32 elsewhere.
    Departure: EDM trains these networks in float32 and does not compile them. In bf16 their layers multiply
    numbers of 8 bits.
    """
    if name == "auto":
        name = "fp32"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            name = auto
    torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    cudnn.allow_tf32 = name != "fp32"
    cudnn.benchmark = True                            # shapes do not change: the fastest algorithm, once
    return name


@contextmanager
def full_float32(device):
    """Inside, float32 is multiplied as such, not as TF32 or bf16, whatever --precision allows elsewhere."""
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = False
    cudnn.allow_tf32 = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def start_processes(device):
    """Connects the processes, if torchrun has started several. Raises UserError."""
    if processes() == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is set and {name} is not: start several processes by torchrun")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def rank():
    """The number of this process among those of torchrun, from 0."""
    return int(os.environ.get("RANK", 0)) if processes() > 1 else 0


def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def wait_for_all():
    """Waits until every process has come here."""
    if processes() > 1:
        torch.distributed.barrier()


FORMAT = "twosdm 5"


def save_checkpoint(path, **content):
    """Writes tensors, numbers, strings, lists and dicts. If it fails, an older file stays as it was."""
    with written(path) as file:
        torch.save(dict(format=FORMAT, **content), file)


def load_checkpoint(path):
    """Reads a checkpoint without running anything in it. UserError if it is missing or another file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: train it first, by train.py with the same --runs, "
                        f"--dataset, --y and --tag, or give another file")
    open(path, "rb").close()                          # raises if there are no rights: it is not damaged then
    # A mapped file is read where it is used: sampling needs no optimizer. Not all file systems can map.
    for mmap in (True, False):
        with suppress(Exception):                     # damaged and foreign files fail in any way they like
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if content["format"] == FORMAT:
                return content
    raise UserError(f"{path} is damaged, or not of this version of train.py: give another file, or move it "
                    f"away and train again")


def cached(path, make):
    """What make() returns, from the file of an earlier call or written there. Other processes wait for it."""
    with locked(path.with_suffix(".wait")):
        if not path.exists():
            save_checkpoint(path, content=make())
    return load_checkpoint(path)["content"]


def build_denoiser(model):
    """A checkpoint's dict(net="prior" | "unet", settings) -> a `Denoiser` with new weights."""
    if model["net"] == "prior":
        return Denoiser(PriorTransformer(**model["settings"]), predict="data")
    return Denoiser(UNet(**model["settings"]))


def load_denoiser(checkpoint, part=None, device="cpu"):
    """A trained denoiser of a loaded checkpoint, with the averaged weights, in eval mode.

    part: "prior" or "image". Only a checkpoint of stage joint has both; for others it may be None.
    """
    if part is None:
        part, = checkpoint["models"]
    with torch.device("meta"):                        # saves the seconds that new random weights take
        denoiser = build_denoiser(checkpoint["models"][part])
    # Not strict: the weights of stage joint's other networks are left over. A missing one fails in .to().
    nn.ModuleDict({part: denoiser}).load_state_dict(checkpoint["ema"], strict=False, assign=True)
    return denoiser.eval().requires_grad_(False).to(device)


def run_folder(runs, dataset, stage, y="all", tag=""):
    """The folder of a stage's run: runs/DATASET/image, .../image-pca32, .../image-TAG."""
    name = stage
    if stage in ("prior", "image") and y != "all":
        name += "-" + y.replace(":", "")
    if tag:
        name += "-" + tag
    return Path(runs, dataset, name)


def picture(grids, columns):
    """{title: (N, R, R, 3) uint8} -> (H, W, 3) uint8: grids below their titles, side by side, magnified.

    Several grids need the same number of images each; `columns` of them stand in a row.
    """
    import torchvision                                # a second to import
    sheets = []
    for title, pixels in grids.items():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        grid = torchvision.utils.make_grid(images, columns, padding=1, pad_value=255)
        sheet = torchvision.transforms.functional.to_pil_image(grid)
        sheet = ImageOps.scale(sheet, math.ceil(320 / sheet.width), Image.NEAREST)
        sheet = ImageOps.expand(sheet, (4, 24, 4, 4), "white")
        ImageDraw.Draw(sheet).text((6, 4), title, "black", ImageFont.load_default(14))
        sheets.append(sheet)
    return np.hstack(sheets)


def save_picture(path, pixels):
    """(H, W, 3) uint8 -> a PNG, whole or not at all."""
    with written(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


# ============================================================================================================
# 12 EDM's published networks, read without running what is inside them
# ============================================================================================================
class Inert(dict):
    """Stands for any other class or function that a pickle names. It keeps its arguments and does nothing."""
    args = ()                                         # if the pickle makes it without __init__
    state = None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def load_storage(content):
    """The numbers of a tensor, which a pickle of PyTorch keeps as a file of its own."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


TENSORS = {                                           # all that a pickle may call
    "_rebuild_parameter": torch._utils._rebuild_parameter,
    "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "_load_from_bytes": load_storage,
    "OrderedDict": collections.OrderedDict
}


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle and runs nothing of it but `TENSORS`: all else that it names becomes an `Inert`."""

    def find_class(self, module, name):
        return TENSORS.get(name, Inert)


def collect_tensors(module, prefix=""):
    """An inert module -> {name: tensor} of it and its parts, by EDM's names."""
    state = module.state                              # the attributes of an nn.Module of PyTorch
    if module.args:                                   # EDM's own come with the source code of their class
        state = module.args[0]["state"]
    tensors = {}
    for name, tensor in (state["_parameters"] | state["_buffers"]).items():
        if tensor is not None:
            tensors[prefix + name] = tensor.detach().float()
    for name, part in state["_modules"].items():
        tensors |= collect_tensors(part, f"{prefix}{name}.")
    return tensors


def from_edm_names(state):
    """A state dict of EDM -> one of a `UNet`, whose condition is EDM's class label.

    EDM names its blocks by resolution, in the order in which they run; here they are numbered. EDM
    interleaves q, k and v: output channel (head, channel, {q,k,v}); here it is ({q,k,v}, head, channel).
    """
    numbers = {"enc": {}, "dec": {}}
    result = {}
    for name, tensor in state.items():
        if "resample_filter" in name:                 # a constant
            continue
        name = name.removeprefix("model.").replace("map_label", "map_cond")
        name = re.sub(r"dec\.\w+_aux_", "out_", name)                     # dec.64x64_aux_norm -> out_norm
        block = re.match(r"(enc|dec)\.(\w+)", name)
        if block is not None:
            side, old = block.groups()
            number = numbers[side].setdefault(old, len(numbers[side]))
            name = name.replace(old, str(number), 1)
        if "qkv" in name:
            tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        result[name] = tensor
    return result


def load_edm_pickle(path):
    """A published `.pkl` of EDM -> a state dict for the `UNet` of its architecture. Raises UserError."""
    try:
        with open(path, "rb") as file:
            network = InertUnpickler(file).load()["ema"]
        # EDM's reruns of other papers (baseline-*.pkl) have the same shapes, but other scalings.
        if network.args[0]["class_name"] != "EDMPrecond":
            raise ValueError("not preconditioned as EDM's")
        return from_edm_names(collect_tensors(network))
    except Exception as error:                        # other pickles fail in any way they like
        raise UserError(f"{path} cannot be read ({error!r:.200}): give one of EDM's networks DDPM++ and "
                        f"ADM, such as edm-ffhq-64x64-uncond-vp.pkl, whole") from error


def init_from_edm(net, path, classes):
    """For finetuning: makes a new `UNet` equal to a published `.pkl` of EDM, whatever y is. Raises UserError.

    The condition is y ⊕ a, with a one-hot a of `classes` entries. The weights for y become zero, and so do
    those for a if the file has no classes.
    """
    theirs = load_edm_pickle(path)
    ours = net.state_dict()
    for name, tensor in ours.items():
        if name.startswith(("map_cond", "map_augment")):
            tensor.zero_()
    labels = theirs.get("map_cond.weight")
    if labels is not None:
        if labels.shape[1] != classes:
            raise UserError(f"{path} is for {labels.shape[1]} classes, not {classes}: give images of as many "
                            f"and --a class, or another file")
        # DDPM++ multiplies a condition by √cond_dim, which was √classes in the file.
        scale = 1.0 if net.adm else math.sqrt(classes / net.cond_dim)
        theirs["map_cond.weight"] = F.pad(scale * labels, (net.cond_dim - classes, 0))
    if not net.augment_dim:
        theirs.pop("map_augment.weight", None)
    try:
        net.load_state_dict(ours | theirs)            # strict: every name and shape must fit
    except RuntimeError as error:
        raise UserError(f"{path} holds another network than --dataset and the settings describe "
                        f"({error!r:.200}): give the data set and the settings of the file") from error
