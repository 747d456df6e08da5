"""Training as a user does it, on tiny settings: what it learns from, resuming, kills, mistakes."""
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, TINY, picture, quick_clip, refused, same, start

import train
import twosdm

SHORT = [*TINY, "--preview-every", 0, "--snapshot-every", 0, "--embedder", "pixels"]


@pytest.fixture
def fit(call, tmp_path):
    """fit(*flags) -> the checkpoint of a stage that is trained without an error."""
    def fitted(*flags, runs="runs"):
        code, _, err = call(train, *SHORT, *flags, "--runs", runs, cwd=tmp_path)
        assert code == 0, err
        path, = tmp_path.glob(f"{runs}/shapes/*/checkpoint.pt")
        return twosdm.load_checkpoint(path)

    return fitted


def same_training(a, b):
    """Whether the training that two checkpoints hold is the same to the bit."""
    return all(same(a[part], b[part]) for part in ("seen", "net", "ema", "optimizer"))


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.001)


# Stages

def test_stages_side_by_side_are_those_one_after_the_other(trained, call, tmp_path):
    """To the bit; each has its log, pictures and snapshots."""
    quick_clip(tmp_path)
    for stage in ("baseline", "image", "prior"):
        assert call(train, *TINY, "--stage", stage, cwd=tmp_path)[0] == 0
        run = tmp_path / "runs/shapes" / stage
        other = trained / "runs/shapes" / stage
        checkpoint = twosdm.load_checkpoint(run / "checkpoint.pt")
        assert checkpoint["seen"] == 48
        assert same_training(checkpoint, twosdm.load_checkpoint(other / "checkpoint.pt"))
        lines = (run / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["images"] for line in lines] == [16, 32, 48]
        if stage != "prior":
            assert (run / "samples-000000048.png").exists()
            assert len(list(run.glob("snapshot-*.pt"))) == 3


@pytest.fixture
def forks(monkeypatch):
    """Stages side by side are forks, which need not load all for seconds. (`trained` has real ones.)"""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def test_if_a_stage_fails_the_other_is_trained_and_the_exit_code_tells(forks, call, tmp_path):
    runs = tmp_path / "runs/shapes"
    (runs / "image-kmeans2").mkdir(parents=True)
    (runs / "image-kmeans2/checkpoint.pt").write_text("foreign")
    code, _, _ = call(train, *SHORT, "--y", "kmeans:2", cwd=tmp_path)
    assert code == 1
    assert (runs / "image-kmeans2/checkpoint.pt").read_text() == "foreign"
    assert twosdm.load_checkpoint(runs / "baseline/checkpoint.pt")["seen"] == 48


def ended(folder):
    """Whether no process lives of those that `start` has started there."""
    with open(folder / "output") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_killed_parent_leaves_no_child(forks, tmp_path):
    process = start(train, *SHORT, "--y", "kmeans:2", "--images", 10**5, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("runs/shapes/*/log.jsonl"))) == 2)
    assert not ended(tmp_path)
    process.kill()
    process.join()
    wait_for(lambda: ended(tmp_path))


# Resuming

@pytest.mark.parametrize("flags", [
    "--stage prior --y pca:3 --augment 0.5 --views 2 --size 3000 --prior-images 800",
    "--stage joint --embedder shapes --dropout 0.1 --augment 0.5 --images 200"])
def test_killed_at_any_moment_a_run_goes_on_to_the_bit(flags, fit, tmp_path):
    flags = [*flags.split(), "--save-minutes", 0]
    whole = fit(*flags, runs="whole")
    for _ in range(4):
        process = start(train, *SHORT, *flags, cwd=tmp_path)
        time.sleep(random.uniform(0, 0.7))
        process.kill()
        process.join()
    assert same_training(fit(*flags), whole)
    for path in tmp_path.glob("whole/shapes/*/*.rows"):
        assert (tmp_path / "runs" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_ctrl_c_ends_in_one_sentence(tmp_path):
    process = start(train, *SHORT, "--stage", "baseline", "--images", 10**5, cwd=tmp_path)
    wait_for((tmp_path / "runs/shapes/baseline/log.jsonl").exists)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    said = (tmp_path / "output").read_text()
    refused((process.exitcode, "", said), "the same command goes on")


# What a stage learns from

@pytest.fixture
def shown(monkeypatch):
    """The x and conditions of all losses that are computed."""
    calls = []
    loss = twosdm.Denoiser.loss

    def recorded(self, x, cond=None, augment=None):
        calls.append((x, cond))
        return loss(self, x, cond, augment)

    monkeypatch.setattr(twosdm.Denoiser, "loss", recorded)
    return calls


@pytest.mark.parametrize("stage", ["prior", "image"])
def test_every_epoch_shows_every_image_once_with_its_own_y_and_class(stage, fit, shown):
    """In an order that depends on the seed and the epoch alone."""
    flags = ["--stage", stage, "--a", "class", "--size", 12]
    embedder = twosdm.unpack_embedder(fit(*flags)["embedder"])
    fit(*flags, "--batch", 6, "--prior-batch", 6, runs="other")
    fit(*flags, "--seed", 1, runs="another")
    index = torch.arange(12)
    x = twosdm.to_float(twosdm.shapes_images(index, 8)).permute(0, 3, 1, 2)
    a = F.one_hot(twosdm.shapes_attributes(index)["shape"])
    known = torch.cat([embedder(x), a], 1)
    if stage == "image":
        known = torch.cat([x.flatten(1), known], 1)
    found = torch.cat([torch.cat([x.flatten(1), cond], 1) for x, cond in shown])
    rows = torch.cdist(found, known).argmin(1)
    assert (found - known[rows]).abs().max() < 1e-5
    assert (rows.reshape(12, 12).sort().values == index).all()
    first, second, third = rows.reshape(3, 4, 12)                         # runs, epochs, images
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert len(first.unique(dim=0)) == 4


def test_bf16_has_the_losses_of_float32_and_keeps_its_weights(fit):
    flags = ["--stage", "image", "--images", 160, "--precision"]
    fp32 = fit(*flags, "fp32")
    bf16 = fit(*flags, "bf16", runs="rough")
    for exact, rough in zip(fp32["log"], bf16["log"], strict=True):
        assert abs(rough["loss"] / exact["loss"] - 1) < 0.01
    assert not same(fp32["net"], bf16["net"])
    assert {tensor.dtype for tensor in bf16["net"].values()} == {torch.float32}


def test_overfit_2sdm_learns_its_y_from_both_losses_in_float32(fit, shown):
    fit("--stage", "joint", "--embedder", "shapes", "--images", 8, "--precision", "bf16")
    (y, _), (_, cond) = shown
    assert torch.equal(y, cond)
    assert y.requires_grad
    assert y.dtype == torch.float32


def test_the_seed_changes_the_training_and_not_the_data(fit):
    flags = ["--stage", "image", "--limit", 20, "--y", "kmeans:4"]
    one = fit(*flags)
    other = fit(*flags, "--seed", 1, runs="other")
    for data in ("embedder", "class_counts"):
        assert same(one[data], other[data])
    assert one["identity"]["images"] == other["identity"]["images"]
    assert not same(one["net"], other["net"])


class MeanColor(nn.Module):
    """(B, 3, H, W) -> (B, 3)."""
    dim = 3

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, x):
        return x.mean((2, 3))


def test_an_embedder_is_added_by_one_class_and_one_line(fit, shown, monkeypatch):
    monkeypatch.setitem(twosdm.EMBEDDERS, "color", MeanColor)
    fit("--stage", "image", "--embedder", "color")
    for x, y in shown:
        assert torch.allclose(y, x.mean((2, 3)))


def test_the_python_lines_of_the_readme_draw_a_picture(trained, monkeypatch):
    lines, = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(trained)
    exec(lines, {})
    assert len(np.unique(picture("samples.png"))) > 100


# Settings

M = 1_000_000
EDM = dict(
    resolution=64, augment=0.15, embedder="clip", y="all", a="none", prior_images=100 * M, prior_batch=256,
    prior_lr=1e-4, prior_width=512, prior_depth=6, prior_heads=8, images=25 * M, batch=256,
    lr=2e-4, dropout=0.05, lr_ramp=10 * M, ema_half_life=M // 2, ema_ramp=0.05, steps=40, churn=50.0, vae="")
IMAGENET = EDM | dict(augment=0.0, batch=128, lr=1e-4, dropout=0.10)
CLASSES = IMAGENET | dict(a="class")
CIFAR10 = dict(resolution=32, augment=0.12, a="class", images=200 * M, batch=512, lr=1e-3, dropout=0.13)
LATENT = dict(resolution=256, vae="stabilityai/sd-vae-ft-mse")


@pytest.mark.parametrize("dataset, settings, cond_dim, parameters", [
    ("ffhq", EDM, 512, 61_871_235),                   # y of CLIP
    ("afhq", EDM | dict(dropout=0.25), 0, 61_805_571),
    ("cifar10", EDM | CIFAR10, 512 + 10, 55_800_835),
    ("imagenet", IMAGENET, 512, 295_524_483),
    ("imagenet-class", CLASSES, 512 + 1000, 296_292_483),
    ("imagenet-class", CLASSES, 1000, 295_899_267),
    ("imagenet-latent", CLASSES | LATENT, 512 + 1000, 296_292_483),
])
def test_presets_have_the_numbers_and_the_networks_of_the_paper_and_edm(dataset, settings, cond_dim, parameters):
    config = train.configure(dataset)
    assert vars(config).items() >= settings.items()
    with torch.device("meta"):
        net = twosdm.UNet(min(config.resolution, 64), 3, cond_dim, 9 if config.augment else 0, config.arch, 0.0,
                          config.width, config.mults, config.blocks, config.attention)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("flags, words", [line.split(" -> ") for line in """
--dataset nothing -> shapes
--dataset folder -> --data FOLDER
--dataset afhq -> AFHQv2 data/afhq --data
--stage nothing -> --stage
--images many -> --images
--lr nan -> --lr
--resolution 9 -> --resolution 9
--arch adm -> --width
--device abacus -> --device abacus
--y banana -> pca:D kmeans:K
--y pca:99 -> 48 dimensions
--y kmeans:65 -> 64 images
--y kmeans:4 --stage prior -> --y kmeans:4
--y kmeans:4 --a class -> --a none
--stage joint -> --embedder pixels
""".strip().split("\n")])
def test_settings_without_sense_get_one_sentence(flags, words, call, tmp_path):
    refused(call(train, *SHORT, "--stage", "image", *flags.split(), cwd=tmp_path), *words.split())


def test_a_run_keeps_the_settings_that_shape_it(fit, call, tmp_path):
    flags = ["--stage", "image"]
    fit(*flags)
    for other in ("--batch 16", "--width 16", "--seed 1", "--limit 9"):
        refused(call(train, *SHORT, *flags, *other.split(), cwd=tmp_path), "--tag")
    fit(*flags, "--images", 56, "--precision", "bf16", "--views", 7)
