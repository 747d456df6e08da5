"""Theorems about the variants: what y is, guidance, captions, temperature, the joint stage, subsets."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import TINY, close, execute, pipeline, refused, same, table

import sample
import train
import twosdm
from twosdm import PCA, KMeans, Sampler, UserError

VARIANTS = ("--stage prior --y pca:3", "--stage image --y pca:3", "--stage image --y kmeans:4",
            "--stage image --y-dropout 0.5 --tag guided", "--stage prior --a text",
            "--stage prior --y pca:3 --a text", "--stage joint")


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """The runs of the embedded world with variants beside them."""
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(trained / "runs", folder / "runs")
    for flags in VARIANTS:
        assert execute(train, *TINY, "--preview", 0, *flags.split(), cwd=folder) == 0
    return folder / "runs"


@pytest.fixture
def fit(runs, call, tmp_path):
    """fit(flags, folder) -> the checkpoint's path: trains a stage beside a copy of the embedder."""
    def fitted(flags, folder="new"):
        new = tmp_path / folder
        if not new.exists():
            shutil.copytree(runs / "shapes/embedder", new / "shapes/embedder")
        code, out, err = call(train, *TINY, "--preview", 0, "--runs", new, *flags.split(), cwd=tmp_path)
        assert code == 0, err
        return max(new.rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns)

    return fitted


@pytest.fixture
def losses(monkeypatch):
    """What Denoiser.loss is given and gives, call by call."""
    calls, loss = [], twosdm.Denoiser.loss

    def recorded(self, x, cond=None, *more):
        found = loss(self, x, cond, *more)
        calls.append(SimpleNamespace(x=x, cond=cond, loss=found.detach()))
        return found

    monkeypatch.setattr(twosdm.Denoiser, "loss", recorded)
    return calls


def world(count=64):
    """The training images: x (N, 3, 8, 8)."""
    return twosdm.shapes_world(torch.arange(count), 8).batch(np.arange(count))


def embedder_of(path):
    return twosdm.unpack_embedder(twosdm.load_checkpoint(path)["embedder"])


def same_weights(*paths):
    return same(*(twosdm.load_checkpoint(path)["net"] for path in paths))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# K-means and PCA

@pytest.mark.parametrize("seed", range(4))
def test_separated_clusters_are_found_exactly(seed):
    truth = torch.randperm(200, generator=torch.Generator().manual_seed(seed)) % 5
    y = 10 * torch.eye(5, 6)[truth] + 0.3 * gaussian(200, 6, seed=seed)
    found = KMeans.fit(y, 5, seed)
    pairs = found.transform(y).T @ F.one_hot(truth).float()            # (found, true)
    assert (pairs.max(0).values == 40).all()
    assert found.counts.tolist() == [40] * 5


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


@pytest.mark.parametrize("distinct, copies, clusters", [
    (9, 1, 9), (3, 5, 3), (12, 3, 12), (1, 7, 5), (3, 4, 5)])
def test_distinct_rows_have_clusters_of_their_own_and_further_clusters_none(distinct, copies, clusters):
    y = gaussian(distinct, 3).repeat(copies, 1)
    for seed in range(5):
        found = KMeans.fit(y, clusters, seed)
        assert (found.counts > 0).sum() == distinct
        assert found.counts.sum() == len(y)
        assert close(found.centers[found.transform(y).argmax(1)], y, 1e-6)


@pytest.mark.parametrize("rows", [20_000, 200, 9])     # more and fewer than dimensions
def test_pca_is_numpys_svd(rows):
    y = gaussian(rows, 12) * torch.linspace(3, 0.5, 12) + 2
    z, centered = PCA.fit(y, 5).transform(y).double(), (y - y.mean(0)).double()
    _, scales, axes = np.linalg.svd(centered.numpy(), full_matrices=False)
    expected = centered @ torch.from_numpy(axes[:5]).T
    signs = (expected * z).sum(0).sign()
    assert close(z, expected * signs, 1e-5 if rows < 1000 else 5e-5)
    covariance = z.T @ z / rows                       # uncorrelated, not whitened, largest first
    variance = torch.from_numpy(scales[:5]**2 / rows)
    assert close(covariance, variance.diag(), 1e-4)
    assert close(z.mean(0), 0)


# What y is

@pytest.mark.parametrize("y", ["none", "pca:0", "kmeans:1"])
def test_a_y_that_tells_nothing_is_the_baseline_bit_for_bit(runs, fit, tmp_path, y):
    (tmp_path / "alone").mkdir()                      # not even the embedder is needed
    path = fit(f"--stage image --y {y}", "alone")
    assert same_weights(path, runs / "shapes/baseline/checkpoint.pt")
    pixels = pipeline(tmp_path / "alone", "2sdm", "--y", y)([0, 1])
    assert np.array_equal(pixels, pipeline(runs, "baseline")([0, 1]))


def test_prior_and_image_model_of_a_pca_agree_and_others_are_refused(runs):
    pipe = pipeline(runs, "2sdm", "--y", "pca:3")
    y, a = pipe.conditions([0, 1])
    assert y.shape == (2, 3)
    assert a is None
    assert pipe([0, 1]).shape == (2, 8, 8, 3)
    for *pair, words in (("prior", "image-pca3", "different images or embeddings"),
                         ("prior-pca3", "image", "different images or embeddings"),
                         ("prior", "image-kmeans4", "without a prior")):
        with pytest.raises(UserError, match=words):
            pipeline(runs, "2sdm", "--checkpoint", *(runs / f"shapes/{name}/checkpoint.pt" for name in pair))


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
    assert y.shape == (4000, 4)
    assert torch.equal(y.sum(1), torch.ones(4000))
    assert y.max() == 1
    assert close(y.mean(0), counts / 48, 4 * 0.5 / 4000**0.5)
    assert y[:, 1].max() == 0
    assert torch.equal(pipe.conditions([7])[0], y[7:8])
    assert pipe([0, 1]).shape == (2, 8, 8, 3)


def test_clusters_are_no_embeddings(runs, call, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for flags in (["--same-y", 2], ["--interpolate"], ["--like", "x.png"]):
        result = call(sample, "--runs", runs, "--y", "kmeans:4", *flags, cwd=tmp_path)
        refused(result, flags[0], "--y clip or pca:D")


# Guidance and temperature

def test_guidance_1_is_none_bit_for_bit_and_0_is_the_model_without_y(runs):
    path = runs / "shapes/image-guided/checkpoint.pt"
    model = twosdm.load_denoiser(twosdm.load_checkpoint(path))
    for p in model.parameters():                      # 48 images teach little of y
        p.data += 0.05 * gaussian(*p.shape)
    y = gaussian(3, 64)

    def drawn(y, **guidance):
        return twosdm.sample_images(model, twosdm.image_noise(range(3)), y, None, Sampler(3, **guidance))

    assert torch.equal(drawn(y, guidance=1.0), drawn(y))
    assert torch.equal(drawn(y, guidance=0.0), drawn(torch.zeros_like(y)))
    assert not close(drawn(y, guidance=2.0), drawn(y), 1e-3)
    assert not close(drawn(y), drawn(y, guidance=0.0), 1e-3)
    given = ["--checkpoint", runs / "shapes/prior/checkpoint.pt", path]
    assert pipeline(runs, "2sdm", *given, "--guidance", 3)([0]).shape == (1, 8, 8, 3)


def test_an_image_model_that_is_never_told_y_does_not_depend_on_it(fit):
    fit("--stage embedder --images 96", "other")
    one, other, sometimes = (fit(f"--stage image --y-dropout {share}", folder) for share, folder in
                             ((1, "one"), (1, "other"), (0.5, "sometimes")))
    assert twosdm.fingerprint(embedder_of(one)) != twosdm.fingerprint(embedder_of(other))
    assert same_weights(one, other)
    assert not same_weights(one, sometimes)


@pytest.mark.parametrize("y, name", [("clip", "image"), ("pca:3", "image-pca3")])
def test_temperature_0_is_the_mean_embedding_and_1_the_plain_sample(runs, y, name):
    pipes = [pipeline(runs, "2sdm", "--y", y, *more) for more in
             ((), ("--temperature", 1), ("--temperature", 0), ("--temperature", 0.5))]
    plain, one, cold, half = (pipe.conditions([0, 1, 5])[0] for pipe in pipes)
    assert torch.equal(plain, one)
    assert np.array_equal(pipes[0]([0, 1]), pipes[1]([0, 1]))
    expected = embedder_of(runs / f"shapes/{name}/checkpoint.pt")(world()).mean(0)
    assert close(cold, expected)
    assert torch.allclose(half, (plain + cold) / 2, atol=1e-6)


def test_the_mean_embedding_is_that_of_images_as_they_are(fit):
    path = fit("--stage prior --augment 0.9 --views 2")
    expected = embedder_of(path)(world()).mean(0)
    assert close(twosdm.load_checkpoint(path)["y_mean"], expected)


# Captions and classes

def test_every_example_has_its_own_embedding_caption_and_class(runs, fit, losses):
    plain, reduced = (runs / f"shapes/{name}/checkpoint.pt" for name in ("image", "image-pca3"))
    embedder = embedder_of(plain)
    images = twosdm.shapes_world(torch.arange(64), 8)
    x, classes = world(), F.one_hot(torch.from_numpy(images.labels), len(images.classes))
    y, captions = embedder(x), embedder.text_condition(twosdm.shapes_captions(torch.arange(64)))
    assert close(captions.square().mean(1).sqrt(), 0.5)
    for flags, known, told in (("--stage prior --a text", y, captions),
                               ("--stage image --y pca:3", x, embedder_of(reduced)(x)),
                               ("--stage image --a class --tag a", x, torch.cat([y, classes], dim=1))):
        losses.clear()
        fit(flags)
        assert len(losses) == 6
        for batch in losses:
            rows = torch.cdist(batch.x.flatten(1), known.flatten(1)).argmin(1)
            assert close(batch.x, known[rows])
            assert close(batch.cond, told[rows])


def test_a_prior_of_captions_draws_what_the_prompt_says(runs, fit):
    red, blue, again = (pipeline(runs, "2sdm", "--prompt", f"three {color} stars on a pink background")
                        for color in ("red", "blue", "red"))
    y = [pipe.conditions([0, 1])[0] for pipe in (red, blue, again)]
    assert torch.equal(y[0], y[2])
    assert not torch.equal(y[0], y[1])
    assert red([0]).shape == (1, 8, 8, 3)
    prompt = ("--prompt", "one red star on a blue background")
    assert pipeline(runs, "2sdm", "--y", "pca:3", *prompt).conditions([0])[0].shape == (1, 3)
    with pytest.raises(UserError, match="purpl"):
        pipeline(runs, "2sdm", "--prompt", "two purpl rings on a red background")
    prior, captions, image = (runs / f"shapes/{name}/checkpoint.pt"
                              for name in ("prior", "prior-text", "image"))
    classes = fit("--stage image --a class")
    for flags, words in (((prior, image, *prompt), "--prompt needs a prior that knows captions"),
                         ((captions, image), "--prompt needs a prior that knows captions"),
                         ((captions, classes, *prompt), "--a none")):
        with pytest.raises(UserError, match=words):
            pipeline(runs, "2sdm", "--checkpoint", *flags)


# The joint stage and half precision

def test_the_joint_loss_is_the_sum_of_both_and_both_teach_the_embedder(fit, losses):
    first = fit("--stage joint --images 8 --log 8", "short")
    prior, image = losses
    line = json.loads((first.parent / "log.jsonl").read_text())
    assert abs(line["loss"] - (prior.loss + image.loss).mean()) < 1e-5 * line["loss"]
    assert torch.equal(prior.x, image.cond)
    assert prior.x.requires_grad
    assert prior.cond is None
    first, last = (twosdm.load_checkpoint(path)["net"] for path in (first, fit("--stage joint", "long")))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert {name.split(".")[0] for name in moved} == {"prior", "image", "embedder"}


def test_the_joint_method_samples_its_two_stages(runs):
    checkpoint, parts = twosdm.load_checkpoint(runs / "shapes/joint/checkpoint.pt"), []
    for stage in ("prior", "image"):
        weights = {name.removeprefix(stage + "."): tensor for name, tensor in checkpoint["ema"].items()
                   if stage in name.split(".")[0]}
        parts.append(twosdm.load_denoiser(dict(model=checkpoint["model"][stage], ema=weights)))
    expected = twosdm.sample_two_stage(*parts, [0, 1], sampler=Sampler(2, 0))
    expected = twosdm.to_uint8(expected).permute(0, 2, 3, 1).numpy()
    assert close(expected.astype(int), pipeline(runs, "joint", "--churn", 0)([0, 1]), 2)


@pytest.mark.parametrize("flags", ["--stage image --y pca:3 --augment 0.5", "--stage image --y kmeans:4",
                                   "--stage prior --y pca:3", "--stage joint"])
def test_half_precision_reaches_the_networks_and_neither_y_nor_the_loss(fit, losses, flags):
    for precision in ("fp32", "bf16"):
        fit(f"{flags} --precision {precision}", precision)
    half = len(losses) // 2
    exact, rough = losses[half - 1], losses[-1]       # of the last step
    assert exact.loss.dtype == rough.loss.dtype == torch.float32
    assert not torch.equal(exact.loss, rough.loss)
    assert torch.allclose(exact.loss, rough.loss, rtol=0.05)
    for one, two in ((exact.x, rough.x), (exact.cond, rough.cond)):
        assert one is two is None or two.dtype == torch.float32
        assert "joint" in flags or one is None or torch.equal(one, two)


# Subsets, names, counts

def test_a_limit_takes_that_many_rows_the_same_each_time(tmp_path):
    for i in range(12):
        folder = tmp_path / f"pictures/class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")

    def load(**changes):
        changes |= dict(resolution=8, mults=(1, 2), data=str(tmp_path / "pictures"), runs=str(tmp_path))
        return twosdm.load_images(train.configure("folder", **changes))

    whole, five, again, other, six = (load(**changes) for changes in (
        {}, dict(limit=5), dict(limit=5), dict(limit=5, seed=1), dict(limit=6)))
    rows, more = (images.pixels[:len(images)][:, 0, 0, 0] // 20 for images in (five, six))     # their numbers
    assert len(set(rows)) == 5
    assert set(rows) < set(more)
    assert np.array_equal(five.labels, rows % 3)
    assert five.fingerprint == again.fingerprint
    assert len({images.fingerprint for images in (whole, five, other, six)}) == 4
    assert load(limit=12).fingerprint == load(limit=99).fingerprint == whole.fingerprint
    assert five.classes == whole.classes == ["class0", "class1", "class2"]
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
    folders = [*twosdm.STAGES, "prior-pca3", "image-pca3", "image-kmeans4", "image-guided", "prior-text",
               "prior-pca3-text", "joint"]
    stages = [f"--stage {stage}" for stage in twosdm.STAGES]
    for folder, flags in zip(folders, [*stages, *VARIANTS]):
        code, out, err = call(train, *TINY, *flags.split(), "--dry-run", cwd=tmp_path)
        optimizer = twosdm.load_checkpoint(runs / "shapes" / folder / "checkpoint.pt")["optimizer"]
        moved = sum(state["exp_avg"].numel() for state in optimizer["state"].values())
        assert json.loads(out)[0]["parameters"]["value"] == moved, folder
