"""Theorems about the variants: what y is, guidance, captions, temperature, the joint stage, subsets."""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
import twosdm
from conftest import refused
from test_scripts import same_bits, tensors
from twosdm import KMeans, PCA, PixelEmbedder, Reduced, Sampler, SmallClip, UserError

TINY = dict(size=48, resolution=8, batch=8, images=32, lr_ramp=16, log=16, save=16, preview=0,
            snapshots=0, steps=2, prior_width=16, prior_depth=1, prior_heads=2, width=8, mults=(1, 2),
            blocks=1, attention=(4,))
FLAGS = [part for name, value in TINY.items() for part in (
    "--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else str(value))]
CPU = torch.device("cpu")


def fit(runs, stage, dataset="shapes", **changes):
    """Trains a stage as train.py does -> its checkpoint's path."""
    config = twosdm.configure(dataset, stage, **TINY | dict(runs=str(runs)) | changes)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train.train(config, CPU)
    return train.run_folder(config) / "checkpoint.pt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The stages without variants, and the images' PCA and clusters with their models."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in twosdm.STAGES:
        fit(runs, stage)
    fit(runs, "prior", y="pca:3")
    fit(runs, "image", y="pca:3")
    fit(runs, "image", y="kmeans:4")
    fit(runs, "image", y_dropout=0.5, tag="guided")
    fit(runs, "prior", a="text")
    fit(runs, "joint")
    return runs


@pytest.fixture
def mine(runs, tmp_path):
    """A copy of the folder to go on in."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def pipeline(runs, method="2sdm", *flags):
    parser = argparse.ArgumentParser()
    sample.add_sampling_flags(parser)
    return sample.Pipeline(parser.parse_args(["--runs", str(runs), *map(str, flags)]), method, CPU)


def job_of(runs, stage, **changes):
    """A stage's job and rows of a batch with their draws, as `train` makes them."""
    config = twosdm.configure("shapes", stage, **TINY | dict(runs=str(runs)) | changes)
    images, joint = twosdm.load_images(config), stage == "joint"
    torch.manual_seed(config.seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        embedder = None if joint or stage == "baseline" else train.get_y(config, images, CPU)
        job = (train.Joint if joint else train.Diffusion)(config, images, CPU, embedder)
    rows = np.array([5, 0, 31, 7, 7, 40])
    return job, rows, job.draw(rows)


def weights(path):
    return tensors(twosdm.load_checkpoint(path))


def clouds(seed=0, clusters=5, size=40, dim=6):
    """Points (clusters·size, dim) around centres far apart, shuffled, and which centre each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(clusters, dim)
    truth = torch.randperm(clusters * size, generator=generator) % clusters
    return centres[truth] + 0.3 * torch.randn(len(truth), dim, generator=generator), truth


# K-means

@pytest.mark.parametrize("seed", range(4))
def test_separated_clusters_are_found_exactly(seed):
    y, truth = clouds(seed)
    found = KMeans(y, 5, seed)
    assigned = found.transform(y)
    pairs = assigned.T @ torch.nn.functional.one_hot(truth).float()                       # (found, true)
    assert torch.equal(pairs.bool().sum(0), torch.ones(5).long()) and pairs.max() == 40
    for k in range(5):
        rows = y[assigned[:, k] > 0]
        assert (found.centres[k] - rows.mean(0)).abs().max() < 1e-5 and len(rows) == found.counts[k] == 40


def test_clusters_follow_from_the_seed_alone_and_rows_from_themselves():
    y = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    one, again, other = (KMeans(y, 12, seed) for seed in (3, 3, 4))
    assert torch.equal(one.centres, again.centres) and torch.equal(one.counts, again.counts)
    assert not torch.equal(one.centres, other.centres)
    whole = one.transform(y)
    assert whole.shape == (300, 12) and torch.equal(whole.sum(1), torch.ones(300)) and whole.max() == 1
    assert torch.equal(whole[7:8], one.transform(y[7:8]))
    assert torch.equal(whole.sum(0).long(), one.counts) and one.counts.sum() == 300


def test_inertia_never_rises_and_each_row_is_with_the_nearest_mean(monkeypatch):
    inertia, assign = [], KMeans.assign

    def watched(self, y):
        distances, labels = assign(self, y)
        inertia.append(distances.double().square().sum().item())
        return distances, labels

    monkeypatch.setattr(KMeans, "assign", watched)
    y = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    found = KMeans(y, 20, 0)
    assert 5 < len(inertia) < 100 and all(b <= a * (1 + 1e-6) for a, b in zip(inertia, inertia[1:]))
    nearest = torch.cdist(y.double(), found.centres.double()).argmin(1)
    assert torch.equal(nearest, found.transform(y).argmax(1))
    means = torch.stack([y[nearest == k].mean(0) for k in range(20)])
    assert (means - found.centres).abs().max() < 1e-5


@pytest.mark.parametrize("distinct, copies, clusters", [(9, 1, 9), (3, 5, 3), (6, 4, 5), (12, 3, 12)])
def test_no_cluster_is_empty_if_there_are_as_many_distinct_rows(distinct, copies, clusters):
    y = torch.randn(distinct, 3, generator=torch.Generator().manual_seed(2)).repeat(copies, 1)
    for seed in range(5):
        found = KMeans(y, clusters, seed)
        assert found.counts.min() > 0 and found.counts.sum() == len(y)
        if clusters == distinct:                      # each on its own point
            assert (found.centres[found.transform(y).argmax(1)] - y).abs().max() < 1e-6


def test_more_clusters_than_distinct_rows_are_left_empty_and_never_drawn():
    for y, distinct in ((torch.ones(7, 2), 1), (torch.arange(3.0).repeat(4)[:, None], 3)):
        found = KMeans(y, 5, 0)
        assert found.counts.sum() == len(y) and (found.counts > 0).sum() == distinct
        assert found.centres.isfinite().all() and torch.equal(found.transform(y).sum(0).long(), found.counts)
        drawn = sample.Pipeline.drawn("cluster", range(200), found.counts.double())
        assert (found.counts[drawn] > 0).all()


def test_an_emptied_cluster_gets_the_farthest_row(monkeypatch):
    """Both centres begin on duplicates of one point; the far one must still get its own."""
    monkeypatch.setattr(torch, "searchsorted", lambda edges, drawn, right: torch.tensor(0))
    y = torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    found = KMeans(y, 2, 0)
    assert sorted(found.counts.tolist()) == [1, 3] and sorted(found.centres.flatten().tolist()) == [0, 9]


# PCA

@pytest.mark.parametrize("rows", [200, 9])             # more and fewer than dimensions
def test_pca_is_numpys_svd(rows):
    y = torch.randn(rows, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.5, 12) + 2
    pca = PCA(y, 5)
    z, centred = pca.transform(y).double(), (y - y.mean(0)).double()
    _, scales, axes = np.linalg.svd(centred.numpy(), full_matrices=False)
    expected = centred @ torch.from_numpy(axes[:5]).T
    signs = (expected * z).sum(0).sign()
    assert (z - expected * signs).abs().max() < 1e-5
    assert z.mean(0).abs().max() < 1e-5               # centred
    covariance = z.T @ z / rows                       # uncorrelated, not whitened, largest first
    variance = torch.from_numpy(scales[:5]**2 / rows)
    assert (covariance - variance.diag()).abs().max() < 1e-4 and variance[0] > 2 * variance[4]
    assert (pca.variance - variance).abs().max() < 1e-4
    assert z.dtype == torch.float64 and pca.transform(y).dtype == torch.float32


@pytest.mark.parametrize("rows", [100, 7])
def test_all_components_keep_all_distances(rows):
    y = torch.randn(rows, 10, generator=torch.Generator().manual_seed(0)) + 5
    z = PCA(y, 10).transform(y)
    assert (torch.cdist(y.double(), y.double()) - torch.cdist(z.double(), z.double())).abs().max() < 1e-5


def test_a_fit_does_not_depend_on_how_a_million_rows_are_read():
    """Sums of parts: more rows than one part holds give what the rows at once give."""
    y = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 3, 2, 1]) + 3
    pca, expected = PCA(y, 2), torch.linalg.eigh(torch.cov(y.double().T, correction=0))
    assert (pca.variance - expected.eigenvalues.flip(0)[:2]).abs().max() < 1e-5
    found = KMeans(y, 3, 0)
    labels = found.transform(y).argmax(1)
    for k in range(3):
        assert (found.centres[k] - y[labels == k].mean(0)).abs().max() < 0.02


# The reduced embedder

@pytest.mark.parametrize("y", ["pca:4", "kmeans:3"])
@pytest.mark.parametrize("name", ["shapes", "pixels"])
def test_a_reduced_embedder_survives_a_checkpoint(tmp_path, name, y):
    images = twosdm.shapes_world(torch.arange(30), 8)
    torch.manual_seed(0)
    embedder = SmallClip() if name == "shapes" else PixelEmbedder(8).fit(images)
    embedder.eval().requires_grad_(False)
    x = images.batch(np.arange(30))
    whole = Reduced.fit(embedder, y, embedder(x))
    twosdm.save_checkpoint(tmp_path / "file.pt", embedder=twosdm.pack_embedder(whole))
    packed = twosdm.load_checkpoint(tmp_path / "file.pt")["embedder"]
    again = twosdm.unpack_embedder(packed, 8)
    assert packed["fingerprint"] == twosdm.fingerprint(whole) == twosdm.fingerprint(again)
    assert torch.equal(whole(x), again(x)) and again.dim == packed["dim"] == whole(x).shape[1]
    assert again.name == name and not list(p for p in again.parameters() if p.requires_grad)
    other = Reduced.fit(embedder, y.replace("4", "2").replace("3", "2"), embedder(x))
    assert twosdm.fingerprint(other) != packed["fingerprint"]


@pytest.mark.parametrize("y", ["none", "pca:0", "kmeans:1"])
def test_a_y_that_tells_nothing_is_the_baseline_bit_for_bit(runs, tmp_path, y):
    path = fit(tmp_path, "image", y=y)
    one, two = weights(path), weights(runs / "shapes/baseline/checkpoint.pt")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    checkpoint = twosdm.load_checkpoint(path)
    assert checkpoint["embedder"] is None and not (tmp_path / "shapes/embedder").exists()
    pixels = pipeline(tmp_path, "2sdm", "--y", y)([0, 1])
    assert np.array_equal(pixels, pipeline(runs, "baseline")([0, 1]))


def test_prior_and_image_model_of_a_pca_agree_and_others_are_refused(runs):
    files = {name: runs / "shapes" / name / "checkpoint.pt" for name in
             ("prior", "image", "prior-pca3", "image-pca3", "image-kmeans4")}
    prior, image = (twosdm.load_checkpoint(files[name]) for name in ("prior-pca3", "image-pca3"))
    assert prior["fingerprints"] == image["fingerprints"] and prior["embedder"]["dim"] == 3
    assert prior["model"]["settings"]["dim"] == 3 == image["model"]["settings"]["cond_dim"]
    pipe = pipeline(runs, "2sdm", "--y", "pca:3")
    y, a = pipe.conditions([0, 1])
    assert y.shape == (2, 3) and a is None and pipe.draw([0, 1], y, a).shape == (2, 8, 8, 3)
    assert len(list((runs / "shapes/reductions").glob("pca3-*.pt"))) == 1
    for *pair, words in (("prior", "image-pca3", "different images or embeddings"),
                         ("prior-pca3", "image", "different images or embeddings"),
                         ("prior", "image-kmeans4", "without a prior")):
        with pytest.raises(UserError, match=words):
            pipeline(runs, "2sdm", "--checkpoint", *(files[name] for name in pair))


def test_the_oracles_y_is_the_training_images_own(runs):
    for y in ("pca:3", "kmeans:4"):
        pipe = pipeline(runs, "oracle", "--y", y)
        images = twosdm.shapes_world(torch.arange(48), 8)
        expected = pipe.embedder(images.batch(pipe.items([0, 1, 2])))
        assert torch.equal(pipe.conditions([0, 1, 2])[0], expected)


def test_class_cond_draws_clusters_by_their_frequency_without_a_prior(runs, tmp_path):
    (tmp_path / "shapes").mkdir()
    shutil.copytree(runs / "shapes/image-kmeans4", tmp_path / "shapes/image-kmeans4")
    pipe = pipeline(tmp_path, "2sdm", "--y", "kmeans:4")
    y, a = pipe.conditions(range(4000))
    assert a is None and y.shape == (4000, 4) and torch.equal(y.sum(1), torch.ones(4000)) and y.max() == 1
    assert pipe.clusters.sum() == 48
    assert (y.mean(0) - pipe.clusters / 48).abs().max() < 4 * 0.5 / 4000**0.5
    assert torch.equal(pipe.conditions([7])[0], y[7:8])
    assert pipe([0, 1]).shape == (2, 8, 8, 3)


# Guidance and temperature

def test_guidance_1_is_none_bit_for_bit_and_0_is_the_model_without_y(runs):
    path = runs / "shapes/image-guided/checkpoint.pt"
    model = twosdm.load_denoiser(twosdm.load_checkpoint(path))
    for p in model.parameters():                      # 32 images teach little of y
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def drawn(y, guidance):
        return twosdm.sample_images(model, [0, 1, 2], y, None, Sampler(3, guidance=guidance))

    shape, seeds = (3, 8, 8), [twosdm.mix_seed("image", i) for i in range(3)]
    assert torch.equal(drawn(y, 1.0), Sampler(3)(model, shape, seeds, y))
    assert torch.equal(drawn(y, 0.0), drawn(torch.zeros_like(y), 1.0))
    assert (drawn(y, 2.0) - drawn(y, 1.0)).abs().max() > 1e-3 < (drawn(y, 1.0) - drawn(y, 0.0)).abs().max()
    given = ["--checkpoint", runs / "shapes/prior/checkpoint.pt", path]
    plain, one, three = (pipeline(runs, "2sdm", *given, *more)([0]) for more in
                         ((), ("--guidance", 1), ("--guidance", 3)))
    assert np.array_equal(plain, one) and one.shape == three.shape


def test_a_model_that_was_always_told_y_is_not_guided(runs, tmp_path):
    with pytest.raises(UserError, match="--y-dropout"):
        pipeline(runs, "2sdm", "--guidance", 2)
    fit(tmp_path, "baseline", y_dropout=0.5)          # as --stage all gives it
    with pytest.raises(UserError, match="--y-dropout"):
        pipeline(tmp_path, "baseline", "--guidance", 2)


def test_dropped_rows_are_not_told_y_and_the_others_are(runs):
    job, rows, draws = job_of(runs, "image", y_dropout=0.5)
    torch.manual_seed(0)
    keep = job.draw(np.zeros(4000, int))["keep"]
    assert abs(keep.mean() - 0.5) < 0.05 and set(keep.unique().tolist()) == {0, 1}
    told = []
    job.denoiser.loss = lambda x, cond, label, draws: told.append(cond) or x.flatten(1).sum(1)
    draws["keep"] = torch.tensor([1.0, 0, 0, 1, 1, 0])[:, None]
    job.loss(rows, draws)
    job.loss(rows[2:4], {k: v[2:4] for k, v in draws.items()})
    truth = job.embedder(job.images.batch(rows))
    assert torch.allclose(told[0], truth * draws["keep"], atol=1e-6) and torch.equal(told[1], told[0][2:4])
    drawn = []
    for each in (job, job_of(runs, "image")[0]):      # all other random numbers are the same ones
        torch.manual_seed(1)
        drawn.append(each.draw(rows))
    assert drawn[0].keys() - drawn[1].keys() == {"keep"}
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[1])


def test_temperature_0_is_the_mean_embedding_and_1_the_plain_sample(runs):
    for y in ("clip", "pca:3"):
        plain, cold, one, half = (pipeline(runs, "2sdm", "--y", y, *more) for more in
                                  ((), ("--temperature", 0), ("--temperature", 1), ("--temperature", 0.5)))
        seeds = [0, 1, 5]
        sampled, mean = plain.conditions(seeds)[0], cold.conditions(seeds)[0]
        assert torch.equal(sampled, one.conditions(seeds)[0]) and np.array_equal(plain(seeds), one(seeds))
        oracle = pipeline(runs, "oracle", "--y", y)
        expected = oracle.embedder(oracle.images.batch(np.arange(48))).mean(0)
        assert (mean - expected).abs().max() < 1e-5
        assert torch.allclose(half.conditions(seeds)[0], (sampled + mean) / 2, atol=1e-6)
    for method in ("oracle", "baseline", "joint"):
        with pytest.raises(UserError, match="--temperature"):
            pipeline(runs, method, "--temperature", 0.5)


def test_the_mean_embedding_is_that_of_images_as_they_are(mine):
    job, *_ = job_of(mine, "prior", augment=0.9, views=2)
    with torch.no_grad():
        expected = job.embedder(job.images.batch(np.arange(48))).mean(0)
        augmented = torch.from_numpy(np.array(job.bank[:48, :-9])).mean(0)
    assert (job.more["y_mean"] - expected).abs().max() < 1e-5 < (augmented - expected).abs().max()


# Captions

def test_the_prior_is_told_the_caption_of_the_same_image(runs):
    job, rows, _ = job_of(runs, "prior", a="text")
    texts = twosdm.shapes_captions(torch.from_numpy(rows), 0)
    expected = job.embedder.text_condition(texts)
    assert (job.condition(rows) - expected).abs().max() < 1e-6
    assert abs(expected.square().mean(1).sqrt() - 0.5).max() < 1e-5
    assert torch.equal(job.condition(rows[2:3]), job.condition(rows)[2:3])
    told = []
    job.denoiser.loss = lambda y, cond, label, draws: told.append((y, cond)) or y.sum(1)
    job.loss(rows, job.draw(rows))
    assert (told[0][0] - job.embedder(job.images.batch(rows))).abs().max() < 1e-5
    assert torch.equal(told[0][1], job.condition(rows))


def test_a_prior_of_captions_resumes_bit_for_bit_and_draws_what_the_prompt_says(runs, tmp_path):
    shutil.copytree(runs / "shapes/embedder", tmp_path / "shapes/embedder")
    for images in (16, 32):
        path = fit(tmp_path, "prior", a="text", images=images)
    assert path.parent.name == "prior-text" and same_bits(path, runs / "shapes/prior-text/checkpoint.pt")
    red, blue = (pipeline(runs, "2sdm", "--prompt", f"three {colour} stars on a pink background")
                 for colour in ("red", "blue"))
    ys = [p.conditions([0, 1])[0] for p in (red, blue, red)]
    assert torch.equal(ys[0], ys[2]) and not torch.equal(ys[0], ys[1]) and red([0]).shape == (1, 8, 8, 3)
    with pytest.raises(UserError, match="unknown: purpl"):
        pipeline(runs, "2sdm", "--prompt", "two purpl rings on a red background")([0])
    for flags in (("--y", "clip", "--prompt", "one red star", "--checkpoint", *(
            runs / "shapes" / s / "checkpoint.pt" for s in ("prior", "image"))), ("--checkpoint", *(
            runs / "shapes" / s / "checkpoint.pt" for s in ("prior-text", "image")))):
        with pytest.raises(UserError, match="--prompt needs a prior that knows captions"):
            pipeline(runs, "2sdm", *flags)


def test_captions_go_with_a_pca_but_not_with_an_image_model_of_classes(mine):
    fit(mine, "prior", y="pca:3", a="text", images=8)
    prompt = ("--prompt", "one red star on a blue background")
    pipe = pipeline(mine, "2sdm", "--y", "pca:3", *prompt)
    assert pipe.conditions([0])[0].shape == (1, 3) and pipe([0, 1]).shape == (2, 8, 8, 3)
    path = fit(mine, "image", a="class", tag="classes", images=8)
    with pytest.raises(UserError, match="--a none"):
        pipeline(mine, "2sdm", *prompt, "--checkpoint", path, mine / "shapes/prior-text/checkpoint.pt")


# The joint stage

def stirred(module):
    """New networks end in (almost) zeros, through which no gradient comes back."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_the_joint_gradient_is_the_sum_of_both_losses_and_both_reach_the_embedder(tmp_path, augment):
    job, rows, draws = job_of(tmp_path, "joint", augment=augment)
    module = job.module.train()
    stirred(module)
    job.loss(rows, draws)[0].sum().backward()
    joint, parts, (x, label) = gradients(module), [], job.pictures(rows, draws)
    for stage in ("prior", "image"):
        y = module["embedder"](x)
        noise = [draws[("prior_" if stage == "prior" else "") + name] for name in ("sigma", "noise")]
        module[stage].loss(*((y, None) if stage == "prior" else (x, y)), label, noise).sum().backward()
        parts.append(gradients(module))
    assert all(any(part[name].norm() > 1e-3 for name in part if name.startswith("embedder.image"))
               for part in parts)
    assert {name.split(".")[0] for name in joint} == {"prior", "image", "embedder"}
    assert not any(name.startswith(("embedder.text", "embedder.embed")) for name in joint)
    for name, grad in joint.items():
        expected = sum(part[name] for part in parts if name in part)
        assert (grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-6, name


def test_the_joint_stage_resumes_bit_for_bit_and_samples(runs, tmp_path):
    for images in (16, 32):
        path = fit(tmp_path, "joint", images=images)
    assert same_bits(path, runs / "shapes/joint/checkpoint.pt")
    first, last = weights(fit(tmp_path / "short", "joint", images=8)), weights(path)
    for part in ("prior.net.out.weight", "image.net.enc.0.weight", "embedder.image.0.weight"):
        assert not torch.equal(first[f"/net/{part}"], last[f"/net/{part}"])
    assert torch.equal(first["/net/embedder.text.1.weight"], last["/net/embedder.text.1.weight"])
    pipe = pipeline(tmp_path, "joint")
    y, a = pipe.conditions([0, 1])
    assert y.shape == (2, 64) and a is None
    assert np.array_equal(pipe([0, 1])[1:], pipe([1]))
    checkpoint = twosdm.load_checkpoint(path)
    module = job_of(tmp_path, "joint")[0].module
    module.load_state_dict(checkpoint["ema"])
    prior, image = module["prior"].eval(), module["image"].eval()
    expected = twosdm.sample_two_stage(prior, image, [0, 1], None, pipe.sampler)
    assert np.abs(twosdm.to_uint8(expected).permute(0, 2, 3, 1).numpy().astype(int) - pipe([0, 1])).max() <= 1


def test_the_joint_stage_can_start_from_edms_file(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(twosdm, "init_from_edm", lambda denoiser, path, classes: given.append(denoiser.net))
    fit(tmp_path, "joint", init_from="edm.pkl", images=8)
    assert isinstance(given[0], twosdm.UNet)


@pytest.mark.parametrize("stage, changes", [("image", dict(y="pca:3")), ("image", dict(y="kmeans:4")),
                                            ("image", dict(augment=0.5)), ("prior", dict(y="pca:3")),
                                            ("joint", {})])
def test_half_precision_reaches_the_networks_and_neither_y_nor_the_loss(runs, stage, changes):
    job, rows, draws = job_of(runs, stage, **changes)
    stirred(job.module)
    told, denoiser = [], job.module["prior"] if stage == "joint" else job.denoiser
    loss = denoiser.loss
    denoiser.loss = lambda *given: told.append(given) or loss(*given)
    with torch.no_grad():
        exact = job.loss(rows, draws)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = job.loss(rows, draws)[0]
    assert exact.dtype == rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, rtol=0.05)
    for one, two in zip(told[0][:2], told[1][:2]):
        assert one is two is None or two.dtype == torch.float32
        assert stage == "joint" or one is None or torch.equal(one, two)


# Subsets

def test_a_limit_takes_that_many_rows_the_same_each_time(tmp_path):
    for i in range(12):
        folder = tmp_path / "pictures" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")

    def load(**changes):
        changes |= dict(resolution=8, mults=(1, 2), data=str(tmp_path / "pictures"), runs=str(tmp_path))
        with contextlib.redirect_stderr(io.StringIO()):
            return twosdm.load_images(twosdm.configure("folder", **changes))

    whole, some, again, other, more = (load(**c) for c in (
        {}, dict(limit=5), dict(limit=5), dict(limit=5, seed=1), dict(limit=6)))
    rows = some.pixels[:, 0, 0, 0] // 20              # the number of the picture
    assert len(some) == len(set(rows)) == 5 and np.array_equal(some.labels, rows % 3)
    assert np.array_equal(some.pixels, again.pixels) and some.fingerprint == again.fingerprint
    assert len({images.fingerprint for images in (whole, some, other, more)}) == 4
    assert set(rows) < set(more.pixels[:, 0, 0, 0] // 20)              # a larger subset holds the smaller
    assert load(limit=12).fingerprint == load(limit=99).fingerprint == whole.fingerprint
    assert some.classes == whole.classes == ["class0", "class1", "class2"]


def test_a_limit_of_images_beside_latents_leaves_them_unread(tmp_path, monkeypatch):
    for i in range(6):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    pixels = twosdm.LazyPixels(tmp_path, twosdm.list_images(tmp_path)[0], [], 8)
    latents = np.arange(6, dtype=np.float32)[:, None, None, None]
    whole = twosdm.Images(pixels, None, [], dict(sha256="0"), latents)
    monkeypatch.setattr(twosdm, "load_all_images", lambda config, autoencoder: whole)
    some = twosdm.load_images(twosdm.TrainConfig(limit=4))
    assert isinstance(some.pixels, twosdm.LazyPixels) and len(some) == 4 and len(whole) == 6
    assert np.array_equal(some.pixels[np.arange(4)][:, 0, 0, 0], 20 * some.latents.ravel())


def test_a_limit_of_shapes_is_the_first_of_them(runs, mine):
    few = twosdm.load_images(twosdm.configure("shapes", **TINY, limit=10))
    assert len(few) == 10 and np.array_equal(few.pixels, twosdm.shapes_world(torch.arange(48), 8).pixels[:10])
    with pytest.raises(UserError, match="--limit 0, not 10"):
        fit(mine, "image", limit=10)


# Names, identity, refusals

def test_each_variant_has_a_folder_of_its_own():
    name = twosdm.run_name
    assert name("image") == "image" and name("image", "pca:32") == "image-pca32"
    assert name("prior", "pca:32", "text", "big") == "prior-pca32-text-big"
    assert name("image", "kmeans:64", "class") == "image-kmeans64" and name("image", a="text") == "image"
    for stage in ("baseline", "joint", "embedder"):   # the same, whatever y is
        assert name(stage, "pca:32") == stage
    assert name("baseline", tag="x") == "baseline-x" and name("image", "none", tag="x") == "image-none-x"
    assert name("embedder", tag="x") == "embedder"    # variants share it: `get_embedder` knows no tags


def test_a_run_keeps_the_settings_that_shape_it_and_no_others():
    def kept(stage, **changes):
        return train.identify(twosdm.configure("shapes", stage, **changes))

    for stage, settings in dict(prior="y a views prior_predicts augment limit seed",
                                image="y y_dropout width augment",
                                joint="width prior_width prior_predicts embedder init_from a",
                                embedder="size seed lr batch").items():
        assert set(settings.split()) <= kept(stage).keys()
    for stage, settings in dict(prior="width dropout y_dropout init_from", image="prior_width views",
                                baseline="embedder y y_dropout views prior_width", joint="y y_dropout views",
                                embedder="a y augment views width prior_width").items():
        assert not set(settings.split()) & kept(stage).keys()
    assert not {"precision", "compile", "images", "short", "tag", "runs", "device"} & kept("image").keys()


@pytest.mark.parametrize("flags, words", [
    ("--y pca:9999 --stage image", "--y pca:9999 64 dimensions"),
    ("--y pca:-1", "--y"), ("--y pca:", "--y"), ("--y pca:00", "--y"), ("--y kmeans:0", "--y kmeans:K"),
    ("--y kmeans:49 --stage image", "48 images"), ("--y kmeans:2.5", "--y"), ("--y banana", "pca:D"),
    ("--y kmeans:4 --stage prior", "prior"), ("--y none --stage prior", "prior"),
    ("--y pca:0 --stage prior", "prior"), ("--y kmeans:4 --a class", "--a none"),
    ("--a text --stage image", "--a text"), ("--a text --stage baseline --tag x", "--a text"),
    ("--a text --stage joint --tag x", "--a text"), ("--a text", "--stage prior"),
    ("--a text --stage prior --dataset folder", "--a text"),
    ("--a text --stage prior --tag x --embedder pixels --runs other", "text"),
    ("--stage joint --y pca:3", "--y"), ("--stage joint --y-dropout 0.1", "--y-dropout"),
    ("--stage joint --embedder pixels", "--embedder"),
    ("--stage image --y none --y-dropout 0.1", "--y-dropout"),
    ("--y-dropout 1.5", "--y-dropout"), ("--tag a/b", "--tag"), ("--limit -1", "--limit"),
    ("--recipe nobody", "--recipe"), ("--prior-predicts noise", "--prior-predicts")])
def test_nonsense_gets_one_sentence(runs, call, tmp_path, flags, words):
    result = call(train, *FLAGS, "--images", 8, "--runs", runs, *flags.split(), cwd=tmp_path)
    refused(result, *words.split())


def test_sampling_refuses_what_does_not_fit(runs, call, tmp_path):
    at = ["--runs", runs, "--n", 1]
    for flags, words in (("--guidance 2", "--y-dropout"), ("--guidance -1", "--guidance"),
                         ("--prompt star --method baseline", "--a text"),
                         ("--y pca:5", "--stage prior --y pca:5)"),
                         ("--y pca:5 --prompt star", "--stage prior --y pca:5 --a text)"),
                         ("--temperature -1", "--temperature"),
                         ("--temperature 0.5 --method joint", "--temperature")):
        refused(call(sample, *at, *flags.split(), cwd=tmp_path), words)


def test_dry_run_counts_the_networks_that_training_makes(runs, call, tmp_path):
    for stage, folder, flags in (("image", "image-pca3", "--y pca:3"),
                                 ("image", "image-kmeans4", "--y kmeans:4"),
                                 ("prior", "prior-text", "--a text"), ("prior", "prior-pca3", "--y pca:3"),
                                 ("image", "baseline", "--y none"), ("image", "baseline", "--y kmeans:1"),
                                 ("joint", "joint", ""), ("embedder", "embedder", "")):
        code, out, err = call(train, *FLAGS, "--stage", stage, *flags.split(), "--dry-run", cwd=tmp_path)
        net = twosdm.load_checkpoint(runs / "shapes" / folder / "checkpoint.pt")["net"]
        unused = ("embedder.text", "embedder.embed", "embedder.log", "embedder.scale", "scale")
        expected = sum(t.numel() for name, t in net.items() if not name.startswith(unused))
        assert code == 0 and json.loads(out)[0]["parameters"]["value"] == expected, stage


# Processes

def in_two(main, *argv, cwd, delay=0.0):
    """A script's main in two processes that torchrun might have started -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        os.chdir(cwd)
        sys.argv = ["train.py", *map(str, argv)]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if rank and delay:
            before = train.run_folder
            train.run_folder = lambda config: (time.sleep(delay), before(config))[1]
        twosdm.run(main)

    context = multiprocessing.get_context("fork")
    team = [context.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in team:
        process.start()
    for process in team:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in team]


def test_the_joint_stage_in_two_processes_is_that_in_one(runs, tmp_path):
    assert in_two(train.main, *FLAGS, "--stage", "joint", cwd=tmp_path) == [0, 0]
    logs = [[json.loads(line) for line in (folder / "shapes/joint/log.jsonl").open()]
            for folder in (runs, tmp_path / "runs")]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*logs):
        assert abs(one["loss"] - two["loss"]) <= 1e-6 * one["loss"]
        assert abs(one["gradient_norm"] - two["gradient_norm"]) <= 1e-5 * one["gradient_norm"]


def test_a_process_that_comes_late_does_not_take_the_others_work_for_done(tmp_path):
    assert in_two(train.main, *FLAGS, "--stage", "embedder", "--images", 8, cwd=tmp_path, delay=1.0) == [0, 0]


def test_processes_that_would_have_no_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(twosdm, "processes", lambda: 9)
    monkeypatch.setattr(twosdm, "gather", lambda value: [value] * 9)
    with pytest.raises(UserError, match="--batch 8"):
        fit(tmp_path, "joint")


def test_a_wish_to_stop_is_heard_in_the_last_step_too(monkeypatch):
    monkeypatch.setattr(twosdm, "gather", lambda value: [False, value])
    with train.Stop(2) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop(step, last) for step, last in ((3, False), (8, False), (9, True))] == [False, True, True]
