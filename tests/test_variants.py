"""Theorems about the variants: what y is, guidance, captions, temperature, the joint stage, subsets."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import TINY, close, execute, photographs, pipeline, refused, same, table

import sample
import train
import twosdm
from twosdm import PCA, KMeans, Sampler

VARIANTS = ("--stage prior --y pca:3 --augment 0.9 --views 2", "--stage image --y pca:3",
            "--stage image --y kmeans:4", "--stage image --y-dropout 0.5 --tag guided",
            "--stage image --a class --tag a", "--stage prior --a text",
            "--stage prior --y pca:3 --a text", "--stage joint")
QUICK = [*TINY, "--preview", 0, "--snapshots", 0, "--save", 48]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """The runs of the embedded world with variants beside them."""
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(trained / "runs", folder / "runs")
    for flags in VARIANTS:
        assert execute(train, *QUICK, *flags.split(), cwd=folder) == 0
    return folder / "runs"


@pytest.fixture
def fit(runs, call, tmp_path):
    """fit(flags, folder) -> the checkpoint's path: trains a stage beside a copy of the embedder."""
    def fitted(flags, folder="new"):
        new = tmp_path / folder
        if not new.exists():
            shutil.copytree(runs / "shapes/embedder", new / "shapes/embedder")
        code, out, err = call(train, *QUICK, "--runs", new, *flags.split(), cwd=tmp_path)
        assert code == 0, err
        return max(new.rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns)

    return fitted


@pytest.fixture(scope="module")
def other(runs, tmp_path_factory):
    """Runs of another embedder, beside which an image model is trained that is never told y."""
    folder = tmp_path_factory.mktemp("other")
    for flags in ("--stage embedder --images 56", "--stage image --y-dropout 1"):
        assert execute(train, *QUICK, *flags.split(), cwd=folder) == 0
    return folder / "runs"


def world(count=64):
    """The training images: x (N, 3, 8, 8)."""
    return twosdm.shapes_world(torch.arange(count), 8).batch(np.arange(count))


def embedder_of(path):
    return twosdm.unpack_embedder(twosdm.load_checkpoint(path)["embedder"])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# K-means and PCA

@pytest.mark.parametrize("rows, tolerance", [(500, 1e-5), (25_000, 0.02)])        # the latter by a sample
def test_each_row_is_with_the_nearest_center_and_centers_are_means(rows, tolerance):
    y = gaussian(rows, 3)
    found, again, other = (KMeans.fit(y, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(found.centers, again.centers)
    assert not torch.equal(found.centers, other.centers)
    told = found.transform(y)
    assert torch.equal(told, F.one_hot(torch.cdist(y.double(), found.centers.double()).argmin(1)).float())
    assert torch.equal(told.sum(0).long(), found.counts)
    means = told.T @ y / told.sum(0)[:, None]
    assert close(means, found.centers, tolerance)


@pytest.mark.parametrize("distinct, copies, clusters, noise", [
    (5, 40, 5, 0.3), (9, 1, 9, 0), (3, 5, 3, 0), (12, 3, 12, 0), (1, 7, 5, 0), (3, 4, 5, 0)])
def test_separated_groups_have_clusters_of_their_own_and_further_clusters_none(
        distinct, copies, clusters, noise):
    truth = torch.arange(distinct).repeat(copies)
    y = 10 * gaussian(distinct, 6)[truth] + noise * gaussian(len(truth), 6, seed=1)
    for seed in range(5):
        found = KMeans.fit(y, clusters, seed)
        told = found.transform(y).argmax(1)
        assert torch.equal(told == told[:, None], truth == truth[:, None])
        assert found.counts.sort(descending=True).values.tolist()[:distinct] == [copies] * distinct


@pytest.mark.parametrize("rows", [20_000, 200, 9])     # more and fewer than dimensions
def test_pca_is_numpys_svd(rows):
    y = gaussian(rows, 12) * torch.linspace(3, 0.5, 12) + 2
    z, centered = PCA.fit(y, 5).transform(y).double(), (y - y.mean(0)).double()
    _, _, axes = np.linalg.svd(centered.numpy(), full_matrices=False)
    expected = centered @ torch.from_numpy(axes[:5]).T
    signs = (expected * z).sum(0).sign()
    assert close(z, expected * signs, 1e-5 if rows < 1000 else 5e-5)


# What y is

def test_an_image_model_without_y_is_the_baseline_bit_for_bit(runs, fit, tmp_path):
    (tmp_path / "alone").mkdir()                      # not even the embedder is needed
    path = fit("--stage image --y none", "alone")
    told, baseline = map(twosdm.load_checkpoint, (path, runs / "shapes/baseline/checkpoint.pt"))
    assert same(told["net"], baseline["net"])
    pixels = pipeline(tmp_path / "alone", "2sdm", "--y", "none")([0, 1])
    assert np.array_equal(pixels, pipeline(runs, "baseline")([0, 1]))


def test_2sdm_with_a_pca_has_as_many_components(runs):
    pipe = pipeline(runs, "2sdm", "--y", "pca:3")
    y, a = pipe.conditions([0, 1])
    assert y.shape == (2, 3)
    assert a is None
    assert pipe([0, 1]).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("flags, words", table("""
--checkpoint runs/shapes/prior/checkpoint.pt runs/shapes/image-pca3/checkpoint.pt -> different embeddings
--checkpoint runs/shapes/prior-pca3/checkpoint.pt runs/shapes/image/checkpoint.pt -> different embeddings
--checkpoint runs/shapes/prior/checkpoint.pt other/shapes/image/checkpoint.pt -> different embeddings
--checkpoint runs/shapes/prior/checkpoint.pt runs/shapes/image-kmeans4/checkpoint.pt -> different embeddings
--checkpoint runs/shapes/prior-text/checkpoint.pt runs/shapes/image/checkpoint.pt -> --prompt captions
--checkpoint runs/shapes/prior/checkpoint.pt runs/shapes/image/checkpoint.pt --prompt star -> captions
--checkpoint runs/shapes/prior-text/checkpoint.pt runs/shapes/image-a/checkpoint.pt --prompt star -> --a none
--checkpoint runs/shapes/prior-text/checkpoint.pt runs/shapes/image/checkpoint.pt --prompt purpl -> purpl
--y kmeans:4 --same-y 2 -> --same-y --y clip or pca:D
--y kmeans:4 --interpolate -> --interpolate --y clip or pca:D
--y kmeans:4 --like x.png -> --like --y clip or pca:D
"""))
def test_networks_that_do_not_go_together_get_one_sentence(runs, other, call, tmp_path, flags, words):
    """Another y, another embedder, other captions or classes; and clusters, which are no embeddings."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "runs").symlink_to(runs)
    (tmp_path / "other").symlink_to(other)
    refused(call(sample, *flags.split(), cwd=tmp_path), *words.split())


def test_a_training_with_another_embedder_is_refused(runs, other, call, tmp_path):
    for source, stage in ((runs, "embedder"), (other, "image")):
        shutil.copytree(source / "shapes" / stage, tmp_path / "shapes" / stage)
    longer = ["--runs", tmp_path, "--stage", "image", "--y-dropout", 1, "--images", 96]
    refused(call(train, *QUICK, *longer, cwd=tmp_path), "trained with another embedder")


@pytest.mark.parametrize("y, name", [
    ("clip", "image"), ("pca:3", "image-pca3"), ("kmeans:4", "image-kmeans4")])
def test_the_oracles_y_is_that_of_a_training_image(runs, y, name):
    known = embedder_of(runs / f"shapes/{name}/checkpoint.pt")(world())
    drawn, _ = pipeline(runs, "oracle", "--y", y).conditions(range(20))
    nearest = torch.cdist(drawn, known).argmin(1)
    assert close(drawn, known[nearest])
    assert len(nearest.unique()) > 2


def test_class_cond_draws_clusters_by_their_frequency_without_a_prior(runs, tmp_path):
    content = twosdm.load_checkpoint(runs / "shapes/image-kmeans4/checkpoint.pt")
    content["embedder"]["reduction"]["counts"] = counts = torch.tensor([24, 0, 8, 16])
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    pipe = pipeline(tmp_path, "2sdm", "--checkpoint", path)
    y, a = pipe.conditions(range(4000))
    assert a is None
    assert torch.equal(y, F.one_hot(y.argmax(1), 4).float())
    assert close(y.mean(0), counts / 48, 4 * 0.5 / 4000**0.5)
    assert y[:, 1].max() == 0
    assert pipe([0, 1]).shape == (2, 8, 8, 3)


# Guidance and temperature

def test_guidance_1_is_none_bit_for_bit_and_0_is_the_model_without_y(runs):
    path = runs / "shapes/image-guided/checkpoint.pt"
    model = twosdm.load_denoiser(twosdm.load_checkpoint(path))
    for p in model.parameters():                      # 48 images teach little of y
        p.data += 0.05 * gaussian(*p.shape)
    y = gaussian(3, model.net.cond_dim)

    def drawn(y, **guidance):
        return twosdm.sample_images(model, twosdm.image_noise(range(3)), y, None, Sampler(3, **guidance))

    assert torch.equal(drawn(y, guidance=1.0), drawn(y))
    assert torch.equal(drawn(y, guidance=0.0), drawn(torch.zeros_like(y)))
    assert not close(drawn(y, guidance=2.0), drawn(y), 1e-3)
    assert not close(drawn(y), drawn(y, guidance=0.0), 1e-3)
    given = ["--checkpoint", runs / "shapes/prior/checkpoint.pt", path]
    pipe = pipeline(runs, "2sdm", *given, "--guidance", 3)
    assert pipe([0]).shape == (1, 8, 8, 3) and pipe.describe()["tags"] == ["image guided"]


def test_an_image_model_that_is_never_told_y_does_not_depend_on_it(runs, other, fit):
    paths = [other / "shapes/image/checkpoint.pt", fit("--stage image --y-dropout 1"),
             runs / "shapes/image-guided/checkpoint.pt"]
    one, never, sometimes = map(twosdm.load_checkpoint, paths)
    assert one["embedder"]["fingerprint"] != never["embedder"]["fingerprint"]
    assert same(one["net"], never["net"])
    assert not same(never["net"], sometimes["net"])


@pytest.mark.parametrize("y, name", [("clip", "image"), ("pca:3", "image-pca3")])
def test_temperature_0_is_the_mean_embedding_of_images_as_they_are_and_1_the_plain_sample(runs, y, name):
    pipes = [pipeline(runs, "2sdm", "--y", y, *more) for more in
             ((), ("--temperature", 1), ("--temperature", 0), ("--temperature", 0.5))]
    plain, one, cold, half = (pipe.conditions([0, 1, 5])[0] for pipe in pipes)
    assert torch.equal(plain, one)
    assert close(cold, embedder_of(runs / f"shapes/{name}/checkpoint.pt")(world()).mean(0))
    assert torch.allclose(half, (plain + cold) / 2, atol=1e-6)


# Captions and classes

@pytest.mark.parametrize("flags", ["--stage prior --a text", "--stage image --a class"])
def test_every_example_has_its_own_embedding_caption_and_class(runs, fit, losses, flags):
    embedder = embedder_of(runs / "shapes/image/checkpoint.pt")
    images, x = twosdm.shapes_world(torch.arange(64), 8), world()
    y, classes = embedder(x), F.one_hot(torch.from_numpy(images.labels), len(images.classes))
    told = embedder.text_condition(twosdm.shapes_captions(torch.arange(64)))
    assert close(told.square().mean(1).sqrt(), 0.5)
    if "class" in flags:
        told = torch.cat([y, classes], dim=1)
    known = y if "prior" in flags else x
    fit(flags)
    assert len(losses) == 6
    for batch in losses:
        rows = torch.cdist(batch.x.flatten(1), known.flatten(1)).argmin(1)
        assert close(batch.x, known[rows])
        assert close(batch.cond, told[rows])


def test_a_prior_of_captions_draws_what_the_prompt_says(runs):
    red, blue, again = (pipeline(runs, "2sdm", "--prompt", f"three {color} stars on a pink background")
                        for color in ("red", "blue", "red"))
    y = [pipe.conditions([0, 1])[0] for pipe in (red, blue, again)]
    assert torch.equal(y[0], y[2])
    assert not torch.equal(y[0], y[1])
    assert red([0]).shape == (1, 8, 8, 3)
    reduced = pipeline(runs, "2sdm", "--y", "pca:3", "--prompt", "one red star on a blue background")
    assert reduced.conditions([0])[0].shape == (1, 3)

# The joint stage

def test_the_joint_loss_is_the_sum_of_both_and_both_teach_the_embedder_in_float32(runs, fit, losses):
    path = fit("--stage joint --images 8 --log 8 --precision bf16")
    prior, image = losses
    line = json.loads((path.parent / "log.jsonl").read_text())
    assert abs(line["loss"] - (prior.loss + image.loss).mean()) < 1e-5 * line["loss"]
    assert torch.equal(prior.x, image.cond)
    assert prior.x.requires_grad
    assert prior.x.dtype == torch.float32
    assert prior.cond is None
    first, last = (twosdm.load_checkpoint(path)["net"] for path in
                   (path, runs / "shapes/joint/checkpoint.pt"))
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"prior", "image", "embedder"}


def test_the_joint_method_samples_its_two_stages(runs):
    checkpoint, parts = twosdm.load_checkpoint(runs / "shapes/joint/checkpoint.pt"), []
    for stage in ("prior", "image"):
        weights = {name.removeprefix(stage + "."): tensor for name, tensor in checkpoint["ema"].items()
                   if name.startswith(stage + ".")}
        parts.append(twosdm.load_denoiser(dict(model=checkpoint["model"][stage], ema=weights)))
    expected = twosdm.sample_two_stage(*parts, [0, 1], sampler=Sampler(2, 0))
    found = pipeline(runs, "joint", "--churn", 0)([0, 1])
    assert close(twosdm.to_uint8(expected).permute(0, 2, 3, 1).int(), torch.from_numpy(found), 2)


# Subsets, names, counts

def test_a_limit_takes_that_many_rows_the_same_each_time(tmp_path):
    photographs(tmp_path / "pictures", classes=3)

    def load(**changes):
        data = dict(data=str(tmp_path / "pictures"), runs=str(tmp_path), resolution=8, mults=(1, 2))
        return twosdm.load_images(train.configure("folder", **data, **changes))

    def labels(images):
        return {pixels.tobytes(): label for pixels, label in zip(images.pixels[:], images.labels)}

    whole, six, five = load(limit=99), load(limit=6), load(limit=5)
    again, other = load(limit=5), load(limit=5, seed=1)
    assert [len(labels(images)) for images in (five, six, whole)] == [5, 6, 12]
    assert labels(five).items() < labels(six).items() < labels(whole).items()
    assert five.classes == whole.classes
    assert five.fingerprint == again.fingerprint
    assert len({images.fingerprint for images in (whole, five, other, six)}) == 4
    few = twosdm.load_images(train.configure("shapes", limit=10, resolution=8))
    assert np.array_equal(few.pixels, twosdm.shapes_world(torch.arange(10), 8).pixels)


@pytest.mark.parametrize("run, folder", table("""
image -> image
image pca:32 -> image-pca32
image kmeans:64 class -> image-kmeans64
image none none x -> image-none-x
prior pca:32 text big -> prior-pca32-text-big
baseline pca:32 -> baseline
baseline clip none x -> baseline-x
joint pca:32 -> joint
embedder clip none x -> embedder
"""))
def test_each_variant_has_a_folder_of_its_own_and_all_share_the_embedder(run, folder):
    assert twosdm.run_name(*run.split()) == folder


def test_a_dry_run_counts_the_parameters_that_training_moves(runs, call, tmp_path):
    for path in runs.glob("shapes/*/checkpoint.pt"):
        checkpoint = twosdm.load_checkpoint(path)
        flags = [f"--{name}={checkpoint['config'][name]}" for name in ("stage", "y", "a", "augment")]
        code, out, err = call(train, *TINY, *flags, "--dry-run", cwd=tmp_path)
        moved = sum(state["exp_avg"].numel() for state in checkpoint["optimizer"]["state"].values())
        assert json.loads(out)[0]["parameters"]["value"] == moved, path
