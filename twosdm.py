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
                 nothing, a class as a one-hot, ...      D(x; σ) the denoiser: E[clean | noisy]
    EDM          Karras et al. 2022, *Elucidating the Design Space of Diffusion-Based Generative Models*

Reading order: 1 denoiser, 2 sampling, 3 two stages, 4 prior transformer, 5 U-Net, 6 embeddings. These are
the method. What it stands on: 7 augmentation, 8 the embedded world, 9 sets of images, 10 latents, 11 runs,
12 EDM's files. The settings of each experiment are at the top of train.py.
"""
import copy
import datetime
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import mmap
import os
import pickle
import posixpath
import re
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.cluster.vq import kmeans2, vq
from torch.nn import init
from torch.utils._pytree import tree_leaves
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
    for the image model and 1 for the prior: this choice is all that tells them apart. `net` is any
    net(x, c_noise, cond, augment) that returns the shape of x.
    """

    def __init__(self, net, sigma_data=0.5, predict="edm", p_mean=-1.2, p_std=1.2):
        super().__init__()
        assert predict in ("edm", "data"), predict
        self.net = net
        self.sigma_data = sigma_data
        self.predict = predict
        self.p_mean, self.p_std = p_mean, p_std

    def scalings(self, sigma):
        """(B,) -> c_skip, c_out, c_in, c_noise, each (B,): EDM Table 1; predict="data": D = net(c_in x)."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_in, c_noise = 1 / total, sigma.log() / 4
        if self.predict == "data":
            return torch.zeros_like(sigma), torch.ones_like(sigma), c_in, c_noise
        return self.sigma_data**2 / total**2, sigma * self.sigma_data / total, c_in, c_noise

    def forward(self, x, sigma, cond=None, augment=None):
        """D(x; sigma): x (B, ...), sigma (B,), cond (B, A) or None, augment (B, 9) -> (B, ...) float32."""
        x, sigma = x.float(), sigma.float()
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        output = self.net(per_example(c_in, x) * x, c_noise, cond, augment).float()
        return per_example(c_skip, x) * x + per_example(c_out, x) * output

    def training_noise(self, x):
        """The random numbers of one loss: sigma (B,) with ln sigma ~ N(p_mean, p_std²), and noise like x."""
        sigma = (torch.randn(len(x), device=x.device) * self.p_std + self.p_mean).exp()
        return sigma, torch.randn_like(x)

    def loss(self, x, cond=None, augment=None, noise=None):
        """(B, ...) -> (B,): lambda(sigma) |D(x + sigma eps; sigma) - x|², summed over x (Eq. 1; EDM Eq. 8).

        `noise` = (sigma, eps) as `training_noise` returns them, for a caller that splits a batch into parts.
        """
        sigma, eps = self.training_noise(x) if noise is None else noise
        _, c_out, _, _ = self.scalings(sigma)
        denoised = self(x + per_example(sigma, x) * eps, sigma, cond, augment)
        return 1 / c_out**2 * (denoised - x).square().flatten(1).sum(1)


class EMA:
    """Moving average of a network's weights, from which all samples come (EDM, Appendix F).

    beta = 0.5^(batch / max(min(half_life, ramp · images seen), 1e-8)): the half-life grows with the run, so
    that the first, bad weights are soon forgotten; 1e-8 is for the first step. (No network here has buffers
    that change.)
    """

    def __init__(self, net, half_life, ramp=0.05):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.half_life, self.ramp = half_life, ramp

    @torch.no_grad()
    def update(self, net, seen, batch):
        """After the optimizer step that brought the images seen from `seen` to seen + batch."""
        beta = 0.5 ** (batch / max(min(self.half_life, self.ramp * seen), 1e-8))
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
    returns (B, ...). The state is float64 (float32 on Apple's GPU, which has no float64); the denoiser
    computes as it likes.
    """
    dtype = torch.float32 if noise.device.type == "mps" else torch.float64
    levels = [float(sigma) for sigma in sigmas]
    steps = len(levels) - 1

    def slope(x, sigma):
        denoised = denoise(x, x.new_full((len(x),), sigma))
        return (x - denoised.to(dtype)) / sigma

    x = noise.to(dtype) * levels[0]
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


class SampleNoise:
    """Gaussian noise whose row i comes from seeds[i] alone, so that a sample does not depend on its batch.

    (Networks round differently for other batches: samples then agree to rounding, not to the bit.)
    """

    def __init__(self, seeds, device="cpu"):
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def __len__(self):
        return len(self.generators)

    def randn(self, *shape):
        """randn(B, ...) -> (B, ...) float32, where B is the number of seeds."""
        assert shape[0] == len(self), (shape, len(self))
        rows = [torch.randn(shape[1:], generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows)

    def randn_like(self, x):
        return self.randn(*x.shape).to(x.dtype)


def mix_seed(*parts):
    """The name of a random stream and numbers -> a seed. 32 bits: torch's CPU generator takes no more."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


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
    guidance: float = 1.0

    def __call__(self, denoiser, shape, noise, cond=None, null=None):
        """Samples of p(. | cond): shape without B, noise a `SampleNoise`, cond (B, A) -> (B, *shape) float32.

        With guidance W other than 1 the denoiser is D(null) + W (D(cond) - D(null)), where `null` (B, A)
        tells it less: classifier-free guidance (Ho and Salimans 2022).
        """
        def denoise(x, sigma):
            told = denoiser(x, sigma, cond)
            if self.guidance == 1 or null is None:
                return told
            untold = denoiser(x, sigma, null)
            return untold + self.guidance * (told - untold)

        start = noise.randn(len(noise), *shape)
        sigmas = sigma_schedule(self.steps)
        return heun_sample(denoise, start, sigmas, self.s_churn, self.s_min, self.s_max, self.s_noise,
                           noise.randn_like).float()


def join(*parts):
    """y ⊕ a, the condition of Eq. 5: concatenates what is there (embedding first); None if nothing is."""
    parts = [part.float() for part in parts if part is not None]
    return torch.cat(parts, dim=1) if parts else None


def sample_embeddings(prior, noise, a, sampler):
    """Stage 1: y ~ p_prior(y | a). a (B, A) or None -> (B, D)."""
    return sampler(prior, (prior.net.dim,), noise, a)


def sample_images(image_model, noise, y, a, sampler):
    """Stage 2: x ~ p_image(x | y, a). y (B, D), or None for plain EDM -> (B, C, H, W), about [-1, 1]."""
    net = image_model.net
    null = None if y is None else join(torch.zeros_like(y), a)           # for guidance: a alone
    return sampler(image_model, (net.channels, net.resolution, net.resolution), noise, join(y, a), null)


def image_noise(seeds, device="cpu"):
    """The noise of the image model for these seeds."""
    # Departure: the authors give the image model the prior's seed plus one, so sample i's image and sample
    # i+1's embedding start from the same random numbers. Seeds of their own stream never meet the prior's.
    return SampleNoise([mix_seed("image", seed) for seed in seeds], device)


def sample_two_stage(prior, image_model, seeds, a=None, sampler=Sampler(), image_sampler=None):
    """2SDM, Eq. 3: sample y, then x given y; forget y. (The oracle gives `sample_images` true embeddings.)

    seeds (B,) whole numbers, a (B, A) or None -> (B, C, H, W) float32, about [-1, 1].
    """
    device = next(prior.parameters()).device
    y = sample_embeddings(prior, SampleNoise(seeds, device), a, sampler)
    return sample_images(image_model, image_noise(seeds, device), y, a, image_sampler or sampler)


def to_uint8(images):
    """[-1, 1] -> 0..255, to the nearest as in EDM (truncating instead moves FID); uint8 passes through."""
    if images.dtype == torch.uint8:
        return images
    assert images.is_floating_point(), f"images are uint8 or floats in [-1, 1], not {images.dtype}"
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
    frequencies = 10000 ** (-steps / (half if adm else half - 1))
    angles = c_noise[:, None] * frequencies                                               # (B, dim / 2)
    waves = [angles.cos(), angles.sin()] if adm else [angles.sin(), angles.cos()]
    return torch.cat(waves, dim=1)


attend = F.scaled_dot_product_attention                # softmax(q kᵀ / √d) v over (B, heads, tokens, d)


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
        for layer in filter(None, (self.map_y, self.map_augment, self.map_cond)):
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
    groups = math.gcd(min(32, channels // 4), channels)
    return nn.GroupNorm(groups, channels, eps=1e-5 if adm else 1e-6)


class UNetBlock(nn.Module):
    """One residual block of either architecture, then self-attention if heads > 0 (EDM, Appendix F).

    forward: x (B, C, H, W), embedding of noise level and condition (B, E) -> (B, C', H', W'), where H' is H,
    2H ("up") or H/2 ("down").
    """

    def __init__(self, cin, cout, emb_dim, adm, heads=0, resample=None, dropout=0.0):
        super().__init__()
        self.cin, self.adm, self.heads = cin, adm, heads
        self.resample, self.dropout = resample, dropout
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
        return self.proj(attend(q, k, v).transpose(2, 3).reshape(B, C, H, W))


class UNet(nn.Module):
    """EDM's image networks: DDPM++ (Song et al. 2021) and ADM (Dhariwal and Nichol 2021), from one block.

    forward: x (B, C, H, W) scaled by c_in, c_noise (B,), cond (B, K) = y ⊕ a, augmentation label (B, 9) ->
    (B, C, H, W). The condition enters through one learned linear map, added to the embedding of the noise
    level. The defaults of `sizes` (width, mults, blocks, attention) are those of `ARCHITECTURES`.
    """

    def __init__(self, resolution, channels=3, cond_dim=0, augment_dim=0, arch="ddpm++", dropout=0.0,
                 **sizes):
        super().__init__()
        self.adm = adm = arch == "adm"
        width, mults, blocks, attention = (ARCHITECTURES[arch] | sizes).values()
        halved = len(mults) - 1
        assert resolution % 2**halved == 0, f"resolution {resolution} cannot be halved {halved} times"
        self.resolution, self.channels, self.width = resolution, channels, width
        self.cond_dim, self.augment_dim = cond_dim, augment_dim
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
        for level, mult in reversed(list(enumerate(mults))):
            attended = resolution >> level in attention
            if level < halved:
                self.dec.append(block(c, c, False, "up"))
            for i in range(blocks + 1):
                self.dec.append(block(c + skips.pop(), width * mult, attended and (adm or i == blocks)))
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
        for block in self.dec:
            if x.shape[1] != block.cin:               # made for more channels: those of a skip
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
# An embedder is a module with `.name`, `.dim` and forward: (B, 3, H, W) in [-1, 1] -> (B, dim), raw: not
# normalized. sigma_data = 0.5 stays right as long as its elements have an rms of about 0.5.


class ClipEmbedder(nn.Module):
    """The paper's e_i: OpenAI's CLIP ViT-B/32 by open_clip, frozen.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 512), rms about 0.44. Not L2-normalized: the elements of a unit
    vector, 0.044 in size, would drown in the noise of the prior. `weights`: "openai" or another name, which
    open_clip downloads once, the path of a weights file, or None for random ones. UserError.
    """
    name, dim = "clip", 512

    def __init__(self, weights="openai"):
        super().__init__()
        import open_clip                              # seconds to import: only those who use it pay
        file = "open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai on Hugging Face"
        remedy = (f"connect once so that open_clip can download them, or fetch {file} elsewhere and give "
                  f"--clip-weights FILE; --embedder pixels needs none")
        with loading(f"CLIP's weights '{weights}'", remedy):
            # Plain ViT-B-32 lacks the activation of these weights.
            self.model = open_clip.create_model(
                "ViT-B-32-quickgelu", pretrained=weights, require_pretrained=weights is not None)
        self.model.eval().requires_grad_(False)
        colors = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
        for name, values in colors.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, x):
        # Departure: bilinear, as the authors' code has it; CLIP's own resize is bicubic.
        x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
        return self.model.encode_image(((x + 1) / 2 - self.mean) / self.std).float()

    def encode_text(self, texts):
        """Captions -> (B, 512), raw."""
        import open_clip
        tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts)
        return self.model.encode_text(tokens.to(self.mean.device)).float()


def convolution(cin, cout, stride=1):
    """3×3 convolution, norm, nonlinearity: (B, cin, H, W) -> (B, cout, H / stride, W / stride)."""
    return nn.Conv2d(cin, cout, 3, stride, padding=1), nn.GroupNorm(8, cout), nn.SiLU()


def at_most_32(x):
    """(B, C, R, R) -> the same, or 32 x 32 pixels: the world needs no more to be read."""
    return F.adaptive_avg_pool2d(x, min(x.shape[-1], 32))


class SmallClip(nn.Module):
    """The embedded world's CLIP: convolutional image tower, word-by-word text tower, contrastive training.

    forward: (B, 3, H, W) in [-1, 1] -> (B, dim), raw.
    """
    name, dim = "shapes", 64

    def __init__(self, dim=64, width=32):
        super().__init__()
        w = width
        self.dim = dim
        self.image = nn.Sequential(
            *convolution(3, w),
            *convolution(w, 2 * w, stride=2),
            *convolution(2 * w, 2 * w),
            *convolution(2 * w, 4 * w, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * w, 4 * w),
            nn.SiLU(),
            nn.Linear(4 * w, dim)
        )
        self.embed = nn.Embedding(len(WORDS), 16)
        self.text = nn.Sequential(
            nn.Flatten(),
            nn.Linear(LONGEST_CAPTION * 16, 4 * w),
            nn.SiLU(),
            nn.Linear(4 * w, dim)
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x):
        return self.image(at_most_32(x))

    def encode_text(self, texts):
        """Captions of at most seven of the world's words -> (B, dim), raw. Raises UserError."""
        rows = []
        for text in texts:
            words = text.lower().split()
            if not (words and set(words) <= set(WORDS) and len(words) <= LONGEST_CAPTION):
                vocabulary = ", ".join((*COUNTS, *COLORS, *SHAPES))
                raise UserError(f"the caption {text!r} is not of this world: write one like "
                                f'"three red stars on a blue background", with {vocabulary}')
            padded = words + [""] * (LONGEST_CAPTION - len(words))
            rows.append([WORDS.index(word) for word in padded])
        return self.text(self.embed(torch.tensor(rows, device=self.embed.weight.device)))

    def text_condition(self, texts):
        """Captions -> (B, dim) of rms 0.5, as the prior is told them (--a text)."""
        return F.normalize(self.encode_text(texts), dim=1) * math.sqrt(self.dim) / 2

    def loss(self, images, texts):
        """CLIP's symmetric loss (Radford et al. 2021, Fig. 3): (B, 3, H, W), B captions -> (B,)."""
        y = F.normalize(self(images), dim=1)
        t = F.normalize(self.encode_text(texts), dim=1)
        logits = y @ t.T * self.log_temperature.exp().clip(max=100)                       # (B, B)
        target = torch.arange(len(y), device=y.device)
        of_texts = F.cross_entropy(logits, target, reduction="none")
        of_images = F.cross_entropy(logits.T, target, reduction="none")
        return (of_texts + of_images) / 2


class Pixels(nn.Module):
    """An embedder for any data, without weights: the image, shrunk to 4×4 pixels.

    forward: (B, 3, H, W) in [-1, 1] -> (B, 48). It knows layout and color, nothing of meaning.
    """
    name, dim = "pixels", 48

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 4).flatten(1)


class PCA(nn.Module):
    """Principal components of y: mean (D,), basis (D, dims), largest first; centered, not whitened.

    transform: (B, D) -> (B, dims).
    """

    def __init__(self, mean, basis):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("basis", basis.float().contiguous())
        self.dim = basis.shape[1]

    @classmethod
    def fit(cls, y, dims):
        """To the rows of y (N, D), 0 < dims <= D."""
        y = torch.as_tensor(y)
        assert 0 < dims <= y.shape[1], (dims, y.shape)
        mean = y.mean(0, dtype=torch.float64)
        scatter = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64)
        for part in y.split(8192):                    # a million rows of float64 are gigabytes
            scatter += (part - mean).T @ (part - mean)
        _, basis = torch.linalg.eigh(scatter)                                             # ascending
        return cls(mean, basis.flip(1)[:, :dims])

    def transform(self, y):
        return (y.float() - self.mean) @ self.basis

    def of_rms(self, y, rms=0.5):
        """The same, scaled as a whole so that the transform of y (N, D) has this rms."""
        found = self.transform(y).square().mean().sqrt().clip(min=1e-8)
        return PCA(self.mean, self.basis * rms / found)


class KMeans(nn.Module):
    """Clusters of y, for the baseline Class-cond: centers (K, D), counts (K,) of the rows of each.

    transform: (B, D) -> one-hot (B, K), of the nearest center.
    """

    def __init__(self, centers, counts):
        super().__init__()
        self.register_buffer("centers", centers)
        self.register_buffer("counts", counts)
        self.dim = len(centers)

    @classmethod
    def fit(cls, y, clusters, seed=0):
        """To the rows of y (N, D), by Lloyd's iteration from a k-means++ start, on a sample of many rows."""
        y = np.asarray(y, np.float32)
        assert 0 < clusters <= len(y), (clusters, y.shape)
        rng = np.random.default_rng(seed)
        sample = rng.permutation(len(y))[:max(20_000, 100 * clusters)]
        with warnings.catch_warnings():               # of clusters that stay empty, which are never drawn
            warnings.simplefilter("ignore")
            centers, _ = kmeans2(y[sample], clusters, iter=100, minit="++", rng=rng)
        parts = np.array_split(y, len(y) // 8192 + 1)  # a distance to each center is much for a million rows
        counts = sum(np.bincount(vq(part, centers)[0], minlength=clusters) for part in parts)
        return cls(torch.from_numpy(centers), torch.from_numpy(counts))

    def transform(self, y):
        # Not by a product of matrices, which a GPU may round to TF32.
        distances = torch.cdist(y.float(), self.centers, compute_mode="donot_use_mm_for_euclid_dist")
        return F.one_hot(distances.argmin(1), self.dim).float()


class Reduced(nn.Module):
    """An embedder and a PCA or KMeans of its embeddings: (B, 3, H, W) -> (B, D or K)."""

    def __init__(self, inner, reduction):
        super().__init__()
        self.name, self.inner, self.reduction = inner.name, inner, reduction
        self.dim = reduction.dim

    def forward(self, x):
        return self.reduction.transform(self.inner(x))

    def text_condition(self, texts):
        return self.inner.text_condition(texts)


def fit_reduction(y, rows, seed=0):
    """y: "pca:D" or "kmeans:K"; rows (N, D'): the training images' embeddings -> PCA or KMeans. UserError."""
    kind, size = y.split(":")
    if int(size) > (rows.shape[1] if kind == "pca" else len(rows)):
        raise UserError(f"--y {y}: there are only {rows.shape[1]} dimensions and {len(rows)} images")
    return PCA.fit(rows, int(size)) if kind == "pca" else KMeans.fit(rows, int(size), seed)


def restore_reduction(tensors):
    """From the tensors of its state."""
    return PCA(**tensors) if "basis" in tensors else KMeans(**tensors)


def fingerprint(module):
    """12 hexadecimal digits of the sha256 of a module's weights: tells one embedder from another."""
    parts = []
    for name, tensor in sorted(module.state_dict().items()):
        parts += [name.encode(), tensor.detach().cpu().contiguous().numpy()]
    return hash_of(*parts)


def hash_of(*parts):
    """12 hexadecimal digits of the sha256 of bytes and arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def pack_embedder(embedder):
    """What a checkpoint keeps of its embedder: name, dim, fingerprint, weights (not the public CLIP's)."""
    packed = dict(name=embedder.name, dim=embedder.dim, fingerprint=fingerprint(embedder))
    if isinstance(embedder, Reduced):
        return packed | dict(inner=pack_embedder(embedder.inner), reduction=embedder.reduction.state_dict())
    return packed | dict(state={} if embedder.name == "clip" else embedder.state_dict())


def frozen(module, state):
    """The module with these tensors, in eval mode and not to be trained."""
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def trained_clip(path):
    """What the embedder's stage trained: its averaged `SmallClip`, reduced to few components. UserError."""
    packed = load_checkpoint(path, "embedder")["embedder"]
    if packed is None:
        raise UserError(f"{path} is not trained to its end: python train.py --stage embedder")
    return unpack_embedder(packed)


def unpack_embedder(packed, clip_weights="openai"):
    """A checkpoint's embedder, in eval mode. Raises UserError if CLIP's weights are not those of its run."""
    if "reduction" in packed:
        inner = unpack_embedder(packed["inner"], clip_weights)
        return Reduced(inner, restore_reduction(packed["reduction"]))
    if packed["name"] == "clip":
        embedder = ClipEmbedder(clip_weights)
        if fingerprint(embedder) != packed["fingerprint"]:
            raise UserError("CLIP's weights are not those of this run: give its own with --clip-weights FILE")
        return embedder
    if packed["name"] == "pixels":
        return Pixels()
    return frozen(SmallClip(packed["dim"]), packed["state"])


@torch.no_grad()
def embedding_bank(images, embedder, folder, augment=None, views=1, seed=0, device="cpu", batch=256):
    """A data set's embeddings: a memory map (views, N, D + 9) float32 of [y, augmentation label].

    Computed once: the prior is tiny and CLIP is not, and trained from this bank it never waits for CLIP.
    View v of image i is an augmentation of its own; without augmentation there is one view.
    Departure: the paper augments anew each time, here there are `views`.
    """
    N = len(images)
    name = f"bank-{fingerprint(embedder)}-{images.fingerprint}"
    if augment:
        name += f"-p{augment.p:g}-s{seed}-v{views}"
    else:
        views = 1

    def embed(start, stop):
        rows = np.arange(start, stop)
        x = images.batch(rows % N, device)
        labels = torch.zeros(len(rows), LABEL_DIM, device=device)
        if augment:
            generator = torch.Generator().manual_seed(mix_seed("views", seed, start))
            x, labels = augment(x, augment.random(len(rows), generator))
        return torch.cat([embedder(x).float(), labels], dim=1).cpu().numpy()

    row = np.dtype((np.float32, (embedder.dim + LABEL_DIM,)))
    bank = made_once(Path(folder) / f"{name}.f32", views * N, row, embed, "embeddings", batch)
    return bank.reshape(views, N, -1)


# ============================================================================================================
# 7 Augmentation
# ============================================================================================================
# The low-pass filter of the orthogonal wavelet sym6, here with sum 1 (Daubechies, Ten Lectures, table 6.3).
SYM6 = np.array([0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
                 0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
                 -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148])
SYM6 /= SYM6.sum()
LABEL_DIM = 9


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

    def random(self, batch, generator=None):
        """All random numbers of a batch: (batch, 13) on the CPU, 9 uniform and 4 normal ones.

        Row i belongs to image i alone: augment(images[a:b], numbers[a:b]) is augment(images, numbers)[a:b].
        """
        uniform = torch.rand(batch, 9, generator=generator)
        return torch.cat([uniform, torch.randn(batch, 4, generator=generator)], dim=1)

    def __call__(self, images, numbers=None):
        # Planned on the CPU, which then knows without waiting for the device what needs resampling.
        if numbers is None:
            numbers = self.random(len(images))
        coins, normal = numbers.T.split([9, 4])
        coin, flip, zoom, turn, angle, stretch, frame, direction, shift = coins                    # (B,) each
        (n_zoom, n_stretch), moves = normal[:2], normal[2:]
        x_flip = (coin < 0.5).float()                                   # always active, whatever p is
        y_flip = (flip < self.p / 2).float()                            # a fair coin, with probability p
        n_zoom = n_zoom * (zoom < self.p)
        theta = (2 * angle - 1) * math.pi * (turn < self.p)
        n_stretch = n_stretch * (stretch < self.p)
        r = (2 * direction - 1) * math.pi * (frame < 0.5)               # half of the time along the axes
        moves = moves * (shift < self.p)                                # (2, B): right and down
        labels = torch.stack([
            x_flip,
            y_flip,
            n_zoom,
            theta.cos() - 1,
            theta.sin(),
            n_stretch * r.cos(),
            n_stretch * r.sin(),
            *moves
        ], dim=1)                                                                                  # (B, 9)

        # Forward: flip, zoom, turn, stretch, shift. Resampling needs the inverse: output -> input position.
        squeeze = torch.stack([-n_stretch, n_stretch], dim=1).mul(0.2).exp2()
        inverse = rotation(theta) @ rotation(-r) @ squeeze.diag_embed() @ rotation(r)              # (B, 2, 2)
        inverse = inverse * n_zoom.mul(-0.2).exp2()[:, None, None]
        offset = 0.125 * moves.T                                        # (B, 2) in units of width and height
        rows = labels[:, 2:].any(1).nonzero().flatten()                 # (R,), those that are resampled

        planned = (labels, rows, inverse[rows], offset[rows])
        labels, rows, inverse, offset = (send(part, images.device) for part in planned)
        for column, dim in ((0, 3), (1, 2)):
            flipped = per_example(labels[:, column], images) > 0
            images = torch.where(flipped, images.flip(dim), images)
        if len(rows):
            images = images.index_copy(0, rows, resample(images[rows], inverse, offset))
        return images, labels


def rotation(angle):
    """(B,) -> (B, 2, 2): with y pointing down, the inverse of a counter-clockwise turn by the angle."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def resample(images, inverse, offset):
    """The images seen through affine maps about their centers, with reflected surroundings.

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
        for row, at, size in ((0, at_x, width), (1, at_y, height)):
            a, b = inverse[:, row, :, None, None].unbind(1)             # (R, 1, 1) each
            position = a * x + b * y + (size - 1) / 2
            position = size - 1 - (position % (2 * size - 2) - (size - 1)).abs()          # reflect
            grid.append((position - at[0]) * (2 / (at[-1] - at[0])) - 1)
        fine = F.grid_sample(fine, torch.stack(grid, dim=-1), align_corners=True)
        return (down_y @ fine @ down_x.T).to(images.dtype)              # (R, C, H, W)


@functools.lru_cache(maxsize=16)
def filters(size, device):
    """Matrices that double, with reflection, and halve a signal, and the positions of the fine samples.

    Shapes (2 size + 10, size), (size, 2 size + 10), (2 size + 10,), the last in units of coarse samples.
    Inside, halving is half the transpose of doubling, and the filter is orthogonal to its even shifts: one
    after the other they are the identity.
    """
    assert size > 1
    sym6 = torch.from_numpy(SYM6)[None, None]

    def doubled(signals):
        """(size, n) -> (size, 2 n + 10), each signal with zeros between its samples, filtered."""
        return F.conv_transpose1d(torch.from_numpy(signals)[:, None], sym6, stride=2)[:, 0]

    impulses = np.eye(size)
    up = 2 * doubled(np.pad(impulses, ((0, 0), (5, 5)), "reflect"))[:, 10:-10].T
    down = doubled(impulses)
    # The filter's delay is its center of mass.
    at = (torch.arange(2 * size + 10, dtype=torch.float64) - SYM6 @ np.arange(12)) / 2
    return tuple(matrix.float().to(device) for matrix in (up, down, at))


# ============================================================================================================
# 8 The embedded world
# ============================================================================================================
# A procedural data set, with the vocabulary of what its images show and its captions say.
SHAPES = "circle ring square triangle cross star".split()
COLORS = dict(red=0, orange=30, yellow=55, green=120, cyan=180, blue=225, purple=275, pink=325)    # hue in °
COUNTS = "one two three four".split()
ATTRIBUTES = dict(shape=len(SHAPES), color=len(COLORS), background=len(COLORS), count=len(COUNTS))
PLURALS = [shape + ("es" if shape == "cross" else "s") for shape in SHAPES]
WORDS = ["", "on", "a", "an", "background", *COUNTS, *COLORS, *SHAPES, *PLURALS]
LONGEST_CAPTION = 7


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
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clip(0, 1))


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
    inner_x = 0.42 * math.cos(half)
    inner_y = 0.42 * math.sin(half)
    return ((px - 1) * inner_y - py * (inner_x - 1)) / math.hypot(inner_x - 1, inner_y)


def shapes_attributes(index, seed=0):
    """(N,) -> dict of (N,) int64: what image i shows. Background and objects always differ in color."""
    u = uniform(seed, index, 4)
    shape, color, other, count = (u * torch.tensor([6, 8, 7, 4])).long().T
    return dict(shape=shape, color=color, background=(color + 1 + other) % 8, count=count)


def shapes_images(index, resolution, seed=0):
    """(N,) int64 -> (N, H, W, 3) uint8: image i is a function of (seed, i) and the resolution alone.

    One to four objects of one shape and one color on a background of another: which shape, which colors and
    how many are decided once for the whole image; each object's place, size and shade vary freely.
    """
    shown = shapes_attributes(index, seed)
    u = uniform(seed + 1, index, 25)[:, :, None, None]                                    # (N, 25, 1, 1)
    hues = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1                          # pixel centers
    y, x = torch.meshgrid(axis, axis, indexing="ij")                                      # (H, W)
    tilt = 2 * math.pi * u[:, 0]
    light = 0.42 + 0.1 * u[:, 1] + 0.14 * (x * tilt.cos() + y * tilt.sin())               # (N, H, W)
    hue = hues[shown["background"]][:, None, None]
    image = hsv_to_rgb(hue, 0.5 + 0.15 * u[:, 2], light)                                  # (N, H, W, 3)

    # To be countable, objects sit in different quadrants, in a random cyclic or anti-cyclic order.
    start = (u[:, 3] * 4).long()
    turn = 2 * (u[:, 4] < 0.5).long() - 1
    for j in range(4):
        v = u[:, 5 + 5 * j:10 + 5 * j]                                                    # (N, 5, 1, 1)
        quadrant = (start + turn * j) % 4
        cx = torch.where(quadrant % 3 == 0, -0.48, 0.48) + 0.08 * (v[:, 0] - 0.5)
        cy = torch.where(quadrant < 2, -0.48, 0.48) + 0.08 * (v[:, 1] - 0.5)
        size = 0.42 + 0.06 * v[:, 2]
        px = (x - cx) / size                                                              # (N, H, W)
        py = (y - cy) / size
        distance = torch.empty_like(px)
        for s, name in enumerate(SHAPES):
            rows = shown["shape"] == s
            distance[rows] = signed_distance(name, px[rows], py[rows])
        there = (j <= shown["count"])[:, None, None]
        cover = (0.5 - distance * size * resolution / 2).clip(0, 1) * there               # (N, H, W)
        paint = hsv_to_rgb(hues[shown["color"]][:, None, None], 0.8 + 0.2 * v[:, 3], 0.85 + 0.15 * v[:, 4])
        image = image + cover[..., None] * (paint - image)
    return (image * 255).round().clip(0, 255).to(torch.uint8)


def shapes_captions(index, seed=0):
    """(N,) -> captions such as "three red stars on a blue background"."""
    shown = shapes_attributes(index, seed)
    colors = list(COLORS)
    captions = []
    for shape, color, background, count in zip(*(shown[name].tolist() for name in ATTRIBUTES)):
        noun = PLURALS[shape] if count else SHAPES[shape]
        scene = colors[background]
        article = "an" if scene == "orange" else "a"
        captions.append(f"{COUNTS[count]} {colors[color]} {noun} on {article} {scene} background")
    return captions


# ============================================================================================================
# 9 Sets of images
# ============================================================================================================
def send(array, device):
    """An array or CPU tensor -> tensor on the device; to a GPU without waiting for what it is doing."""
    tensor = torch.from_numpy(np.require(array, requirements="W"))        # a copy of what is only mapped
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Rows:
    """An array (total, *shape) that is read anew wherever it is asked for: read(rows (B,)) -> (B, *shape)."""

    def __init__(self, read, total, shape):
        self.read, self.numbers = read, np.arange(total)
        self.shape = (total, *shape)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, rows):
        return self.read(self.numbers[rows])


@dataclass
class Images:
    """A set of images: pixels (N, R, R, 3) uint8, labels (N,) int64 or None, the names of the classes.

    The pixels are in memory, mapped, or `Rows`. `fingerprint` (12 digits) tells the set from others. Latents,
    if there are any, are the moments (N, 2C, r, r) float32 that an `Autoencoder` made of the pixels.
    """
    name: str
    pixels: "np.ndarray | Rows"
    fingerprint: str
    labels: np.ndarray | None = None
    classes: list | tuple = ()
    latents: "np.ndarray | Rows | None" = None

    def __len__(self):
        return len(self.pixels)

    @property
    def resolution(self):
        return self.pixels.shape[1]

    @property
    def shape(self):
        """(C, H, W) of what the image network models: the images, or their latents where there are any."""
        if self.latents is not None:
            return self.latents.shape[1] // 2, *self.latents.shape[2:]
        return 3, self.resolution, self.resolution

    def batch(self, rows, device="cpu"):
        """(B,) -> (B, 3, R, R) float32 in [-1, 1], channels last in memory, which convolutions prefer."""
        return to_float(send(self.pixels[rows], device)).permute(0, 3, 1, 2)

    def subset(self, rows):
        """The images of these rows (M,), still unread."""
        def some(array):
            return array if array is None else Rows(lambda i: array[rows[i]], len(rows), array.shape[1:])

        labels = None if self.labels is None else self.labels[rows]
        fingerprint = hash_of(self.fingerprint.encode(), rows)
        return Images(self.name, some(self.pixels), fingerprint, labels, self.classes, some(self.latents))


def made_once(path, total, row, make, what, batch=256):
    """A memory map of `total` rows of the dtype `row`, made once by make(start, stop), whatever happens.

    Rows are appended to a .part file, so that a killed process goes on where it was, to the bit; the finished
    file arrives by a rename. Another process that wants it waits. Raises UserError if the disk is full.
    """
    row = np.dtype(row)
    size = total * row.itemsize
    part = path.with_suffix(".part")
    with locked(path.with_suffix(".lock")):
        if not path.exists() or path.stat().st_size != size:
            with writing(part), open(part, "ab") as file:
                # Whole batches, as they are made as one.
                done = file.tell() // (row.itemsize * batch) * batch
                file.truncate(done * row.itemsize)
                with tqdm(total=total, initial=done, desc=what, unit=" images") as bar:
                    for start in range(done, total, batch):
                        stop = min(start + batch, total)
                        file.write(np.ascontiguousarray(make(start, stop), row.base))
                        bar.update(stop - start)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    return np.memmap(path, row, "r", shape=(total,))


SUFFIXES = ".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .ppm .pgm"
FORMATS = "PNG JPEG WEBP BMP GIF TIFF PPM".split()    # no EPS: Pillow would start Ghostscript
LARGEST_FILE = 2**28                                  # bytes; more is a mistake, or a bomb
MOST_CLASSES = 100_000
warnings.filterwarnings("ignore", module="PIL")       # on odd EXIF, palettes and large sizes


class ImageFiles:
    """The images of a folder or zip at any depth: names (N), sorted, labels (N,) int64 or None, classes.

    Labels come from EDM's dataset.json where there is one. Otherwise the folders right below the deepest
    folder that holds everything are the classes, in sorted order, if every image lies in one of them. `key`
    changes with names, sizes, times (in a zip: checksums) and labels. Raises UserError.
    """

    def __init__(self, source):
        self.source = Path(source)
        with reading(source, "give --data FOLDER_OR_ZIP of images, downloaded whole"):
            files = dict(list_files(self.source))
        self.names = sorted(filter(is_image, files))
        self.files = [files[name] for name in self.names]                 # (size, stamp, path) of each
        if not self.names:
            raise UserError(f"{source} holds no images ({SUFFIXES}, at any depth): give another path")
        self.labels, self.classes = None, []
        folders = [name.split("/")[:-1] for name in self.names]
        depth = len(posixpath.commonprefix(folders))  # of the deepest that holds everything
        kinds = [[*folder, ""][depth] for folder in folders]
        if all(kinds):
            classes, self.labels = np.unique(kinds, return_inverse=True)
            self.classes = classes.tolist()
        tables = [name for name in files if posixpath.basename(name) == "dataset.json"]
        if tables:
            table = min(tables, key=len)              # the one nearest to the top
            self.labels, self.classes = self.json_labels(table, files[table])
        self.label_bytes = b"" if self.labels is None else self.labels.tobytes()
        listed = [(name, size, stamp) for name, (size, stamp, _) in zip(self.names, self.files)]
        self.key = hash_of(self.label_bytes, repr(listed).encode())

    def json_labels(self, table, file):
        """(labels (N,), class names) of EDM's {"labels": [[name, int], ...]}; (None, []) if that is null."""
        folder = posixpath.dirname(table)
        with reading(self.source / table, 'it should be {"labels": [[name, number], ...]} with every image '
                     'or {"labels": null}: repair or remove it'):
            pairs = json.loads(content(file))["labels"]
            if pairs is None:
                return None, []
            numbers = dict(pairs)
            labels = [numbers[name.removeprefix(folder).lstrip("/")] for name in self.names]
            assert set(labels) <= set(range(MOST_CLASSES))
            return np.array(labels, np.int64), [str(i) for i in range(max(labels) + 1)]

    def load(self, rows, resolution):
        """Rows (B,) -> pixels (B, R, R, 3), black where there are none to be had, and {row: why} of these."""
        faults = {}

        def load_one(row):
            try:
                return read_square(content(self.files[row]), resolution)
            except Exception as error:                # on bad bytes Pillow's readers raise anything
                faults[row] = str(error).split(" <")[0][:100]             # no addresses of objects
                return np.zeros((resolution, resolution, 3), np.uint8)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = np.stack(list(pool.map(load_one, rows)))             # decoding needs no interpreter
        return pixels, faults


def list_files(source):
    """(name, (size, stamp, path)) of a folder's or zip's files; links are followed, but no folder twice."""
    if not source.is_dir():
        archive = zipfile.ZipFile(source)             # its paths keep it open
        for entry in archive.infolist():
            name = entry.filename
            yield name, (entry.file_size, entry.CRC, zipfile.Path(archive, name))
        return
    seen = set()
    for folder, inner, names in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder, name)
            info = path.stat(follow_symlinks=path.exists())
            yield path.relative_to(source).as_posix(), (info.st_size, info.st_mtime_ns, path)


def content(file):
    """The bytes of a listed file, of a zip without unpacking it. Raises what the system and zipfile do."""
    size, stamp, path = file
    if size > LARGEST_FILE or not path.is_file():     # a pipe or a device would be read forever
        raise ValueError("not a regular file of at most 256 MB")
    return path.read_bytes()


def is_image(name):
    """Whether a name ends like an image's and no part is hidden; a Mac leaves __MACOSX in its zips."""
    hidden = "/." in f"/{name}" or "__MACOSX" in name
    return Path(name).suffix.lower() in SUFFIXES.split() and not hidden


def read_square(file, resolution):
    """The bytes of an image file -> (R, R, 3) uint8, its center square.

    Every mode becomes RGB: transparency is laid on white, 16-bit gray is rounded to 8 bits, EXIF orientation
    is applied, color profiles are ignored, an animation gives its first frame. Raises what Pillow raises.
    """
    image = Image.open(io.BytesIO(file), formats=FORMATS)
    image.load()                                     # first: a GIF or TIFF settles its mode only here
    ImageOps.exif_transpose(image, in_place=True)
    side = min(image.size)
    if side < 2:
        raise ValueError(f"only {image.width}x{image.height} pixels")
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.mode.startswith(("I", "F")):            # Pillow's convert would clip 16 bits to 255
        gray = np.asarray(image).astype(np.int64)
        if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit pixels, whose white is not defined")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS))


def prepare_images(source, resolution, cache, skip_bad=False, autoencoder=None):
    """All images of a folder or zip as `Images` at R x R, prepared once in the folder `cache`, then mapped.

    With an `Autoencoder`, on whatever device it is, the cache holds the images' latents instead of pixels.
    What was prepared is used again only if the `key` of the files and the settings are the same, otherwise it
    is prepared anew beside the old. Bad images are named at the end, by a UserError unless `skip_bad`.
    """
    files = ImageFiles(source)
    total = len(files.names)
    square = resolution, resolution, 3
    name = f"pixels-{resolution}"
    kept = np.uint8, square
    if autoencoder is not None:
        name = f"latents-{resolution}-{fingerprint(autoencoder)}"
        black = torch.zeros(1, 3, resolution, resolution, device=autoencoder.mean.device)
        kept = np.float32, tuple(autoencoder.encode(black)[0].shape)
    row = np.dtype([("good", np.bool_), ("kept", *kept)])

    def make(start, stop):
        made = np.zeros(stop - start, row)
        pixels, faults = files.load(range(start, stop), resolution)
        made["good"] = [i not in faults for i in range(start, stop)]
        if autoencoder is not None:
            x = Images("", pixels, "").batch(slice(None), autoencoder.mean.device)
            pixels = autoencoder.encode(x).cpu()
        made["kept"] = pixels
        return made

    def read(rows):
        pixels, faults = files.load(rows, resolution)
        for i in faults:
            raise UserError(f"{source}: {files.names[i]} cannot be read any more: put it back, or start "
                            f"again to prepare the images as they are now")
        return pixels

    batch = min(max(2**25 // (3 * resolution**2), 16), 512)               # about 32 MB of pixels
    path = Path(cache) / f"{name}-{files.key}.rows"
    rows = made_once(path, total, row, make, "preparing", batch)

    def summarize():                                  # what only a look at all rows can tell
        return dict(bad=np.flatnonzero(~rows["good"]).tolist(), hash=hash_of(rows.view(np.uint8)))

    bad, pixels_hash = cached(path.with_suffix(".pt"), summarize).values()
    if bad and (not skip_bad or len(bad) == total):
        _, faults = files.load(bad[:5], resolution)
        among = ", ".join(f"{files.names[i]} ({faults.get(i)})" for i in bad[:5])
        raise UserError(f"{len(bad)} of {total} images cannot be used, among them {among}: repair or "
                        f"remove them, or go on without them (--skip-bad); what is done is kept")
    digest = hash_of(pixels_hash.encode(), files.label_bytes)
    images = Images(str(source), rows["kept"], digest, files.labels, files.classes)
    if autoencoder is not None:
        images.latents = images.pixels
        images.pixels = Rows(read, total, square)
    return images.subset(np.setdiff1d(np.arange(total), bad)) if bad else images


def shapes_world(index, resolution, seed=0):
    """Images (N,) of the embedded world; the class is the shape."""
    parts = tqdm(index.split(500), "drawing shapes", leave=False)
    pixels = torch.cat([shapes_images(part, resolution, seed) for part in parts]).numpy()
    labels = shapes_attributes(index, seed)["shape"].numpy()
    return Images("shapes", pixels, hash_of(pixels), labels, SHAPES)


def cifar10(folder):
    """CIFAR-10's 50,000 training images, which torchvision downloads into the folder once."""
    import torchvision
    url = torchvision.datasets.CIFAR10.url
    remedy = f"fetch {url} elsewhere, put it into a folder and give --data FOLDER"
    with locked(Path(folder) / "lock"), redirect_stdout(sys.stderr), loading("CIFAR-10", remedy):
        data = torchvision.datasets.CIFAR10(folder, train=True, download=True)
    pixels = np.ascontiguousarray(data.data)
    labels = np.array(data.targets, np.int64)
    return Images("cifar10", pixels, hash_of(pixels, labels), labels, data.classes)


def load_images(config, autoencoder=None):
    """The training images that a configuration names, with latents if there is an autoencoder. UserError."""
    cache = Path(config.runs) / config.dataset / "data"
    if config.dataset == "shapes":
        # Each of them is random: the first are a random choice, too.
        size = min(config.size, config.limit or config.size)
        return shapes_world(torch.arange(size), config.resolution, config.seed)
    if config.dataset == "cifar10" and (not config.data or list(Path(config.data).glob("cifar-10-*py*"))):
        if config.resolution != 32:
            raise UserError(f"--resolution {config.resolution}: the images of cifar10 have 32")
        images = cifar10(config.data or cache)
    elif not config.data:
        raise UserError(f"--dataset {config.dataset} needs its images: add --data FOLDER_OR_ZIP")
    else:
        images = prepare_images(config.data, config.resolution, cache, config.skip_bad, autoencoder)
    if not 0 < config.limit < len(images):
        return images
    rows = np.random.RandomState(config.seed).permutation(len(images))[:config.limit]
    return images.subset(np.sort(rows))


# ============================================================================================================
# 10 Latents
# ============================================================================================================
# Mean and deviation of each channel of Stable Diffusion's latents on ImageNet, from the public code of EDM2
# (Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion Models*). They hold for
# images given to the VAE in [0, 1], as EDM2 gives them; in [-1, 1], its own range, the means are other ones.
LATENT_MEAN, LATENT_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


class Autoencoder(nn.Module):
    """Stable Diffusion's VAE by diffusers, frozen: images (B, 3, R, R) to latents (B, C, R/f, R/f) and back.

    `weights`: a name on Hugging Face, which diffusers downloads once, or a folder. Theirs have C = 4, f = 8.
    Both directions work in float32, on `chunk` images at a time to bound the memory. Raises UserError if
    diffusers or the weights are missing, or C is not 4.
    """

    def __init__(self, weights="stabilityai/sd-vae-ft-mse"):
        super().__init__()
        with loading(f"the autoencoder '{weights}'", "pip install diffusers, and connect once so that it can "
                     "download Stable Diffusion's, or give a folder with config.json and "
                     "diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse"):
            from diffusers import AutoencoderKL       # optional, and seconds to import
            self.model, report = AutoencoderKL.from_pretrained(
                weights, output_loading_info=True, low_cpu_mem_usage=False)
            self.channels = self.model.config.latent_channels
            # Missing weights diffusers would leave random; other channels are of unknown scale.
            if report["missing_keys"] or self.channels != len(LATENT_MEAN):
                raise ValueError
        self.model.float().eval().requires_grad_(False)
        for name, values in dict(mean=LATENT_MEAN, std=LATENT_STD).items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def encode(self, x, chunk=8):
        """(B, 3, R, R) in [-1, 1] -> moments (B, 2C, R/f, R/f): means, then standard deviations, unscaled."""
        # The network sees [0, 1], as in the code of EDM's successor: the constants above are of such latents.
        parts = ((x.float() + 1) / 2).split(chunk)
        with torch.autocast(x.device.type, enabled=False):
            posteriors = [self.model.encode(part).latent_dist for part in parts]
        return torch.cat([torch.cat([p.mean, p.std], dim=1) for p in posteriors])

    def sample(self, moments, noise):
        """Moments (B, 2C, r, r), unit Gaussian noise (B, C, r, r) -> a latent, as the image model learns it.

        It is mean + std·noise, brought to mean 0 and deviation 0.5 per channel, as sigma_data = 0.5 expects.
        """
        mean, std = moments.float().chunk(2, dim=1)                                       # (B, C, r, r)
        return (mean + std * noise - self.mean) / self.std * 0.5

    def decode(self, z, chunk=8):
        """(B, C, R/f, R/f) as `sample` gives it -> (B, 3, R, R) in [-1, 1]."""
        parts = (z.float() / 0.5 * self.std + self.mean).split(chunk)
        with torch.autocast(z.device.type, enabled=False):
            x = torch.cat([self.model.decode(part).sample for part in parts])
        return (x * 2 - 1).clip(-1, 1)


# ============================================================================================================
# 11 Runs: errors, files, devices, processes, checkpoints, pictures
# ============================================================================================================
class UserError(Exception):
    """A mistake that only the user can mend: one sentence with the remedy, printed without a traceback."""


def run(main):
    """Runs a script's main; a mistake of the user's ends in one sentence and exit code 1, no traceback."""
    code, message, stderr = 1, None, sys.stderr       # before join_processes has silenced all but one
    try:
        code = main()
    except UserError as error:
        message = error
    except (torch.OutOfMemoryError, MemoryError):
        message = "out of memory: give a smaller --batch (when training, --batch-gpu)"
    except KeyboardInterrupt:
        code, message = 130, "stopped: the same command goes on from what is finished"
    except BrokenPipeError:                           # as in `python evaluate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        message = (f"{error.filename or 'a file'}: {error.strerror or error}: fix its path or rights, or "
                   f"free space")
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.stderr = stderr                       # of a silenced process, too, it must be seen
            raise
        message = f"torch.compile fails here ({type(error).__name__}): add --no-compile"
    if message:
        if rank():                                    # where all fail alike, torchrun stops the others first
            time.sleep(5)
        print(f"error: {message}", file=stderr)
    if processes() > 1 and torch.distributed.is_initialized() and code == 0:
        torch.distributed.destroy_process_group()
    sys.exit(code)


@contextmanager
def reading(path, remedy):
    """Whatever goes wrong in reading and interpreting one file becomes a sentence that names it."""
    try:
        known = Path(path)
        if known.exists() and not (known.is_file() or known.is_dir()):
            raise UserError(f"{path} is not a file: {remedy}")            # a pipe would be read forever
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:                        # damaged files fail in any way they like
        fault = f"{path} is damaged or not what is wanted ({type(error).__name__}): "
        if isinstance(error, OSError) and error.errno:
            fault = f"{error.filename or path} cannot be read ({error.strerror}): fix its path or rights; "
        raise UserError(fault + remedy) from None


@contextmanager
def loading(what, remedy):
    """For public weights and data: whatever a hub, a network or a damaged file raises becomes a sentence."""
    logging.disable(logging.CRITICAL)                 # a hub's many lines on a lost connection
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{what} cannot be loaded ({reason}): {remedy}") from None
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def writing(path):
    """What the system says of a failed write becomes a sentence that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        while error.__context__ and not isinstance(error, OSError):
            error = error.__context__                 # torch replaces the system's word by its own
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path} cannot be written ({error.strerror}): free some space or choose another "
                        f"place; what was there before is untouched") from None


@contextmanager
def written(path):
    """Gives a binary file to write to, which then becomes `path`: whole or not at all, whatever happens."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(fresh, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def clear_unfinished(folder):
    """Removes what killed writers left in a folder; the caller holds its lock."""
    for file in Path(folder).glob(".*.new"):
        file.unlink(missing_ok=True)


@contextmanager
def locked(path, busy=""):
    """Holds a lock that ends with the process. Another's is waited for, or a UserError that says `busy`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with suppress(ImportError):                   # Windows has no fcntl
            import fcntl
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
        yield


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    if name == "cuda" and processes() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except Exception:                                 # torch's errors for devices have no common class
        raise UserError(f"--device {name} is not available here: leave the flag out, or use cpu") from None


def set_precision(name, device, auto):
    """Resolves --precision (`auto`: what it is on a GPU) and sets how the device multiplies float32.

    fp32: exactly; tf32: as NVIDIA's TF32, ten bits of mantissa; bf16: TF32 outside of autocast.
    """
    if name == "auto":
        name = auto if device.type == "cuda" else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return name


def compile_network(net, wanted, device):
    """Compiles a network in place with torch.compile: if wanted, or by default (None) on CUDA."""
    if wanted or (wanted is None and device.type == "cuda" and importlib.util.find_spec("triton")):
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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # For one that never comes. While one prepares data, the others wait at its lock, as long as it takes.
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def gather(value):
    """[value of process 0, of process 1, ...] in every process; waits for all of them."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    torch.distributed.all_gather_object(values, value)
    return values


FORMAT = "twosdm 3"
STAGES = "embedder prior image baseline".split()         # what --stage all trains
TRAINED = dict(config=dict, model=dict, data=dict, fingerprints=dict, ema=dict, seen=int,
               embedder=(dict, type(None)))


def save_checkpoint(path, **content):
    """Writes tensors, numbers, strings and dicts, whole or not at all: an older file survives any failure."""
    with written(path) as file:
        torch.save(dict(format=FORMAT, **content), file)


def load_checkpoint(path, stage=None):
    """Reads a checkpoint without running anything in it.

    Raises UserError if it is missing, damaged, of another stage, program or version, or not finite.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist: give another, or train.py --stage {stage or 'all'} first")
    with reading(path, "it should be a checkpoint that this version of train.py wrote; give another file, or "
                 "move it away and train again"):
        with zipfile.ZipFile(path) as archive:        # torch.load does not look at the checksums
            assert not archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert content["format"] == FORMAT
        kind = content.get("stage")
        if kind:
            assert kind in (*STAGES, "joint")
            assert all(isinstance(content[name], types) for name, types in TRAINED.items())
        if not all_finite(content):
            raise UserError(f"{path} holds weights that are not finite: give an earlier snapshot, or train "
                            f"again")
    if stage not in (None, kind):
        raise UserError(f"{path} is a checkpoint of stage '{kind}', not '{stage}': give another file")
    return content


def cached(path, make):
    """What make() gave at the first call, tensors or numbers, from a file. A damaged file is made again.

    Another process that wants the same waits for it.
    """
    with locked(path.with_suffix(".lock")):
        with suppress(UserError, KeyError):
            return load_checkpoint(path)["content"]
        save_checkpoint(path, content=make())
        return load_checkpoint(path)["content"]


def all_finite(nested):
    """Whether all tensors in nested dicts and lists are free of NaN and infinity."""
    return all(leaf.isfinite().all() for leaf in tree_leaves(nested) if torch.is_tensor(leaf))


NETWORKS = dict(prior=PriorTransformer, unet=UNet)


def build_denoiser(model):
    """A checkpoint's `model`: dict(net="prior" | "unet", settings, predict, sigma_data) -> new Denoiser."""
    net = NETWORKS[model["net"]](**model["settings"])
    return Denoiser(net, float(model["sigma_data"]), model["predict"])


def load_denoiser(checkpoint, device="cpu"):
    """The trained denoiser of a checkpoint: its averaged weights, in eval mode."""
    denoiser = frozen(build_denoiser(checkpoint["model"]), checkpoint["ema"])
    return denoiser.to(device, memory_format=torch.channels_last)


def check_y(y):
    """Raises UserError if --y is not one of the reductions."""
    if not re.fullmatch(r"clip|none|(pca|kmeans):[1-9]\d*", y):
        raise UserError(f"--y {y} is unknown: choose clip, pca:D, kmeans:K (such as pca:32) or none")


def has_prior(y):
    """Whether stage 1 is a diffusion model; clusters are drawn by their frequency."""
    return not y.startswith(("none", "kmeans"))


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


def image_grid(pixels, columns):
    """(N, H, W, 3) uint8 -> one picture, `columns` images in a row, on white, one pixel apart."""
    import torchvision                                # a second to import
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    sheet = torchvision.utils.make_grid(images, columns, padding=1, pad_value=255)
    return sheet.permute(1, 2, 0).numpy()


def save_picture(path, pixels, least=0):
    """(H, W, 3) uint8 -> a PNG, whole or not at all; magnified by a whole factor to `least` pixels' width."""
    picture = Image.fromarray(pixels)
    factor = max(1, -(-least // picture.width))
    with written(path) as file:
        ImageOps.scale(picture, factor, Image.Resampling.NEAREST).save(file, "PNG")


# ============================================================================================================
# 12 EDM's published networks, read without running what is inside them
# ============================================================================================================
EDM_FILES = ("it should be one of EDM's networks DDPM++ and ADM: give edm-*-vp.pkl or "
             "edm-imagenet-64x64-cond-adm.pkl, whole")
MOST_LETTERS = 1_000_000                              # of the names of EDM's 600 modules: 20,000


class Inert(dict):
    """Whatever a pickle names: it keeps what it was made of and given, and does nothing."""
    args, state = (), None                            # of one that is made without __init__

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class InertUnpickler(pickle._Unpickler):
    """Reads any pickle and runs none of it, since each name it asks for is answered by an `Inert` class.

    (Python's own reader in Python: that in C can be made to take gigabytes by a large memo index. A bytearray
    would be made at its full length before it is read; the files have none.)
    """
    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]

    def find_class(self, module, name):
        return type(name, (Inert,), {})


def inert_tensor(box):
    """The tensor that torch's `_rebuild_parameter` or `_rebuild_tensor_v2` was to make."""
    if type(box).__name__ == "_rebuild_parameter":
        box = box.args[0]
    storage, offset, size, stride = box.args[:4]
    content = torch.load(io.BytesIO(storage.args[0]), map_location="cpu", weights_only=True)
    assert not torch.is_tensor(content)               # whose elements could be one alone
    flat = torch.empty(0, dtype=content.dtype).set_(content)
    assert math.prod(size) <= len(flat)               # else a stride of 0 makes terabytes of a byte
    return flat.as_strided(size, stride, offset).clone()                  # raises if it leaves the storage


def read_edm_pickle(file):
    """EDM's .pkl, mapped -> (tensors of its `ema` network by EDM's names, its class_name, its own settings).

    EDM's persistent objects reduce to one dict with their class_name and `state`, beside the source code of
    their class, which is left unread; other modules come with their state. Raises anything.
    """
    def fields(box):
        return box.args[0]["state"] if box.args else box.state

    network = InertUnpickler(file).load()["ema"]
    tensors, left = {}, len(file)
    modules = [("", network)]
    for prefix, module in modules:                    # which grows on the way
        inner = fields(module)
        for name, tensor in (inner["_parameters"] | inner["_buffers"]).items():
            if tensor is not None:
                tensors[prefix + name] = inert_tensor(tensor)
                left -= tensors[prefix + name].nbytes
                assert left > 0                       # a tensor of many names could be terabytes
        for name, part in inner["_modules"].items():
            if part is not None:
                modules.append((f"{prefix}{name}.", part))
        # Shared modules could be billions, and names grow with the depth.
        assert len(modules) * len(prefix) < MOST_LETTERS
    return tensors, network.args[0]["class_name"], fields(network)


def from_edm_names(state):
    """EDM's state dict -> that of a `Denoiser` of a `UNet`, whose condition is EDM's class label.

    EDM names its blocks by resolution, in the order in which they run; here they are numbered. EDM
    interleaves q, k and v: output channel (head, channel, {q,k,v}); here it is ({q,k,v}, head, channel).
    """
    blocks = dict(enc={}, dec={})
    result = {}
    for name, tensor in state.items():
        if "resample_filter" in name:                 # a constant, which tells NCSN++ from DDPM++
            assert tensor.shape == (1, 1, 2, 2)
            continue
        name = name.replace("model.", "net.").replace("map_label", "map_cond")
        name = re.sub(r"dec\.\w+_aux_", "out_", name)                     # dec.64x64_aux_norm -> out_norm
        if block := re.search(r"(enc|dec)\.(\w+)", name):
            numbers = blocks[block[1]]
            number = numbers.setdefault(block[2], len(numbers))
            name = name.replace(block[2], str(number), 1)
        if "qkv" in name:
            tensor = tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        result[name] = tensor.float()
    return result


def edm_settings(state):
    """EDM's state dict -> keyword arguments of its `UNet`, from the names and shapes of the tensors alone."""
    nothing = torch.empty(0, 0)
    levels = {}                                       # resolution -> channels of each encoder block
    for name, tensor in state.items():
        if block := re.fullmatch(r"model\.enc\.(\d+)x\1_block\d+\.conv0\.weight", name):
            levels.setdefault(int(block[1]), []).append(len(tensor))
    resolution = max(levels)
    width, channels, *_ = state[f"model.enc.{resolution}x{resolution}_conv.weight"].shape
    return dict(
        resolution=resolution, channels=channels, width=width,
        cond_dim=state.get("model.map_label.weight", nothing).shape[1],
        augment_dim=state.get("model.map_augment.weight", nothing).shape[1],
        arch="adm" if "model.out_conv.weight" in state else "ddpm++",
        mults=tuple(level[0] // width for level in levels.values()), blocks=len(levels[resolution]),
        attention=tuple(r for r in levels if f"model.enc.{r}x{r}_block0.qkv.weight" in state))


def edm_checkpoint(path):
    """A published `.pkl` of EDM -> the checkpoint of a baseline, as far as sampling reads it.

    What the file does not tell is None: images seen, count and fingerprint of the training images. Classes
    have numbers for names and equal counts, because EDM draws them uniformly. Raises UserError.
    """
    with reading(path, EDM_FILES), open(path, "rb") as file:
        # A map gives no more than there is, where a file makes room for all that is asked for.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors, class_name, described = read_edm_pickle(mapped)
        # Not so EDM's reruns of other papers (baseline-*.pkl), whose networks have the same shapes.
        sigma_data = float(described["sigma_data"])
        assert class_name == "EDMPrecond" and 0 < sigma_data < 1e3 and all_finite(tensors)
        settings = edm_settings(tensors)
        ema = from_edm_names(tensors)
        model = dict(net="unet", predict="edm", sigma_data=sigma_data, settings=settings)
        with torch.device("meta"):                    # shapes without contents: instant at any size
            build_denoiser(model).load_state_dict(ema, assign=True)
    classes = [str(i) for i in range(settings["cond_dim"])]
    return dict(
        stage="baseline", seen=None, embedder=None, model=model, ema=ema,
        fingerprints=dict(images=None, embedder=None),
        config=dict(stage="baseline", dataset=Path(path).stem, resolution=settings["resolution"],
                    a="class" if classes else "none"),
        data=dict(count=None, classes=classes, class_counts=[1] * len(classes) or None))


def load_edm_pickle(path):
    """A published `.pkl` of EDM -> a state dict for the `UNet` of its architecture. Raises UserError."""
    return {name.removeprefix("net."): tensor for name, tensor in edm_checkpoint(path)["ema"].items()}


def init_from_edm(denoiser, settings, path, classes=0):
    """For finetuning: makes a new denoiser equal to a published `.pkl` of EDM, whatever y is.

    `settings` made its UNet. The condition is y ⊕ a, with a one-hot a of `classes` entries. Its map becomes
    zero for y, and for a too if the file has no classes; a map of augmentation labels becomes zero if the
    file has none, and the file's is dropped if the denoiser has none. Raises UserError if anything differs.
    """
    net = denoiser.net
    checkpoint = edm_checkpoint(path)
    weights = checkpoint["ema"]
    theirs = checkpoint["model"] | checkpoint["model"]["settings"]
    settings = dict(settings, sigma_data=denoiser.sigma_data)
    for name in "resolution channels arch width mults blocks attention sigma_data".split():
        if settings[name] != theirs[name]:
            raise UserError(f"--{name} {settings[name]} does not fit {path}, which is for {name} "
                            f"{theirs[name]}: change one of them")
    labels = theirs["cond_dim"]
    if labels not in (0, classes):
        raise UserError(f"{path} is for {labels} classes and the new network for {classes or 'none'}: give "
                        f"--a class and images of {labels} classes, or another file")
    fresh = {name: torch.zeros_like(tensor) for name, tensor in denoiser.state_dict().items()
             if name.startswith("net.map_")}
    if net.cond_dim and labels:                       # DDPM++ multiplies a condition by √(its length)
        scale = 1.0 if net.adm else math.sqrt(labels / net.cond_dim)
        fresh["net.map_cond.weight"][:, -labels:] = scale * weights.pop("net.map_cond.weight")
    weights = fresh | weights
    if not net.augment_dim:
        weights.pop("net.map_augment.weight", None)
    denoiser.load_state_dict(weights)
