"""Theorems about bf16: any CPU can compute what tensor cores do, and training has the losses of fp32."""
import contextlib
import json
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
import twosdm
from twosdm import Denoiser, PriorTransformer, UNet


@contextlib.contextmanager
def tensor_cores():
    """Under autocast, convolutions and matrix products as a GPU computes them in bf16, forward and backward.

    Exact products of bf16, their sum in fp32, only the result rounded: the gradient of a cast is the cast of
    the gradient. A CPU without bf16 units takes a hundred times longer for it. All else, attention among it,
    runs as it is. The CPU's autocast rounds what group norms return, too, which CUDA's leaves in fp32.
    """
    used = []

    def emulated(product):
        def call(x, weight, bias=None, *options, **more):
            if not torch.is_autocast_enabled("cpu"):
                return product(x, weight, bias, *options, **more)
            used.append(product)
            x, weight, bias = (t if t is None else t.bfloat16().float() for t in (x, weight, bias))
            with torch.autocast("cpu", enabled=False):
                return product(x, weight, bias, *options, **more).bfloat16()
        return call

    with mock.patch.multiple(F, conv2d=emulated(F.conv2d), linear=emulated(F.linear)):
        yield used


def distance(ours, theirs):
    """Of each pair of tensors, relative."""
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, theirs)]


def convolution(mode, taps, dtype=torch.bfloat16):
    """Output and gradients of input, weight and bias, all of which bf16 can hold."""
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 16, 8, 8), torch.randn(24, 16, taps, taps) / 4 / taps, torch.randn(24)
    leaves = [t.bfloat16().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in (x, w, b)]
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = F.conv2d(*leaves, padding=taps // 2)
        out.backward(torch.randn(4, 24, 8, 8).bfloat16().to(dtype))
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("taps", [1, 3])
def test_emulated_convolutions_are_the_exact_ones_rounded_once(taps):
    """The CPU's own backward also rounds what it sums over taps and examples; its forward does not."""
    ours, real = convolution(tensor_cores, taps), convolution(contextlib.nullcontext, taps)
    for mine, theirs, exact in zip(ours, real, convolution(contextlib.nullcontext, taps, torch.float64)):
        once = exact.bfloat16()
        assert (mine.bfloat16() != once).float().mean() < 2e-3                 # ties, for a sum in fp32
        assert (mine.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        assert distance([mine], [exact])[0] < 1.001 * distance([theirs], [exact])[0]
    assert (ours[0] != real[0]).float().mean() < 2e-3


def step(make, mode, bf16, *inputs):
    """Estimate and all gradients of one training step; how many products were emulated."""
    torch.manual_seed(0)
    denoiser = make()
    for parameter in denoiser.parameters():           # so that no branch is silent
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    with mode() as used, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = denoiser(*inputs)
        out.square().sum().backward()
    return (out.detach(), torch.cat([p.grad.flatten() for p in denoiser.parameters()])), len(used or ())


def steps(make, *inputs):
    """One step emulated, in real bf16 and in fp32."""
    ours, used = step(make, tensor_cores, True, *inputs)
    assert used == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in make().modules())
    return ours, *(step(make, contextlib.nullcontext, bf16, *inputs)[0] for bf16 in (True, False))


def test_an_emulated_step_of_the_prior_is_the_real_one():
    def make():
        return Denoiser(PriorTransformer(16, 3, width=32, depth=2, heads=4), predict="data")

    torch.manual_seed(1)
    ours, real, fp32 = steps(make, torch.randn(4, 16), torch.tensor([0.1, 0.5, 1, 5]), torch.randn(4, 3))
    # To the bit where a CPU sums in the same order; another kind of CPU may not.
    assert all(near < 0.2 * far for near, far in zip(distance(ours, real), distance(fp32, real)))


@pytest.mark.parametrize("arch", ["ddpm++", "adm"])
def test_an_emulated_step_of_the_unet_is_nearer_to_the_real_one_than_fp32_is(arch):
    """Not equal: where a sum in another order is rounded otherwise, all later layers are."""
    def make():
        return Denoiser(UNet(8, cond_dim=5, arch=arch, width=64 if arch == "adm" else 16, mults=(1, 2),
                             blocks=1, attention=(4,)))

    torch.manual_seed(1)
    ours, real, fp32 = steps(make, torch.randn(4, 3, 8, 8), torch.tensor([0.1, 0.5, 1, 5]), torch.randn(4, 5))
    for near, far in zip(distance(ours, real), distance(fp32, real)):
        assert near < 0.75 * far < 0.03


def losses(mode, runs, stage, **changes):
    """The lines of log.jsonl of a run of train.py on shapes: the mean loss of each window."""
    config = twosdm.configure("shapes", stage, runs=str(runs), preview=0, snapshots=0, **changes)
    folder = runs / "shapes" / stage
    folder.mkdir(parents=True)
    with mode() as used:
        train.train(config, torch.device("cpu"))
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()], used


def compare(folder, stage, steps, windows, **changes):
    """A stage of shapes in fp32 and in bf16 -> the losses of both by window, and what bf16 adds to each."""
    batch = twosdm.configure("shapes", stage, **changes).batch
    length = dict(images=steps * batch, log=steps // windows * batch, save=steps * batch)
    fp32, _ = losses(contextlib.nullcontext, folder / "fp32", stage, precision="fp32", **length, **changes)
    bf16, used = losses(tensor_cores, folder / "bf16", stage, precision="bf16", **length, **changes)
    assert len(fp32) == len(bf16) == windows and len(used) >= 8 * steps
    return fp32, bf16, [b / a - 1 for a, b in zip(fp32, bf16)]


@pytest.mark.parametrize("stage", ["prior", "image"])
def test_300_steps_in_bf16_have_the_losses_of_fp32(stage, tmp_path):
    """Small networks, 8x8 pixels. The preset as it is, compare(folder, stage, 300, 6): within 1.1 %."""
    small = dict(size=500, embedder="pixels", resolution=8, width=16, mults=(1,), prior_width=64,
                 prior_depth=1, batch=8 if stage == "image" else 32)
    fp32, bf16, change = compare(tmp_path, stage, 300, 3, **small)
    assert fp32[-1] < 0.9 * fp32[0]                   # it has learned
    assert all(abs(c) < 0.02 for c in change), (fp32, bf16)
    assert fp32 != bf16
