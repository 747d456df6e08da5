"""sample.py: what is drawn, into which files, and what is refused."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import photographs, picture, refused
from PIL import Image

import sample
import train
import twosdm

QUICK = ("--size 64 --resolution 8 --images 16 --batch 8 --prior-images 64 --prior-batch 16 --width 8 "
         "--mults 1,2 --blocks 1 --attention 4 --prior-width 16 --prior-depth 1 --prior-heads 2 --steps 2 "
         "--churn 0 --embedder pixels --augment 0 --preview-every 0").split()


@pytest.fixture
def drawn(monkeypatch):
    """Of each image that is drawn: its first noise, y and a."""
    images = []
    sample_images = twosdm.sample_images

    def recorded(model, noise, y, a, sampler):
        noises = []
        randn = noise.randn
        noise.randn = lambda *shape: noises.append(randn(*shape)) or noises[-1]
        x = sample_images(model, noise, y, a, sampler)
        for i in range(len(x)):
            told = [None if numbers is None else numbers[i] for numbers in (y, a)]
            images.append(SimpleNamespace(noise=noises[0][i], y=told[0], a=told[1]))
        return x

    monkeypatch.setattr(twosdm, "sample_images", recorded)
    monkeypatch.setattr("os.cpu_count", lambda: 1)    # batch after batch
    return images


def all_of(drawn, name):
    return torch.stack([getattr(image, name) for image in drawn])


@pytest.fixture
def draw(call, trained, tmp_path):
    """draw(*flags) -> the folder of the picture that is named last: sample.py with the trained runs."""
    if not (tmp_path / "runs").exists():
        shutil.copytree(trained / "runs", tmp_path / "runs")

    def drawn(*flags):
        code, out, err = call(sample, *flags, cwd=tmp_path)
        assert code in (0, None), err
        picture = tmp_path / out.split()[-1]
        assert picture.name == "grid.png"
        return picture.parent

    return drawn


@pytest.fixture
def fit(call, tmp_path):
    """fit(*flags): trains a small model in tmp_path/new, of pixels at 4x4."""
    def fitted(*flags):
        code, _, err = call(train, *QUICK, "--runs", "new", *flags, cwd=tmp_path)
        assert code in (0, None), err

    return fitted


def names(folder):
    return sorted(path.name for path in folder.glob("0*.png"))


def settings(folder):
    return json.loads((folder / "settings.json").read_text())


def checkpoint(folder, name):
    return twosdm.load_checkpoint(folder / f"runs/shapes/{name}/checkpoint.pt")


def change(path, changes):
    """A checkpoint or settings.json, changed: {"config.y_dropout": 0.5}."""
    content = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)
    for name, value in changes.items():
        *outer, last = name.split(".")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        torch.save(content, path)


# Independent images

def test_without_a_method_all_that_is_trained_is_drawn_and_shown_side_by_side(draw, tmp_path):
    together = draw("--n", 3)
    assert together == tmp_path / "samples/shapes"
    for method in ("2sdm", "oracle", "baseline"):
        folder = together / method
        assert names(folder) == ["000000.png", "000001.png", "000002.png"]
        assert (folder / "grid.png").exists()
        told = settings(folder)
        assert (told["name"], told["method"], told["columns"], told["n"]) == (method, method, 1, 3)
        assert (told["y_dim"] == 0) == (method == "baseline")
    assert picture(together / "grid.png").shape[1] > 3 * picture(together / "grid.png").shape[0] / 2


def test_2sdm_is_the_modules_two_stages_and_edm_its_image_model_alone(draw, tmp_path):
    flags = ("--n", 4, "--steps", 3, "--image-steps", 2, "--churn", 9)
    folders = {method: draw("--method", method, *flags) for method in ("2sdm", "baseline")}
    assert folders["2sdm"].name == "2sdm-steps=3-image_steps=2-churn=9.0"
    stages = ("prior", "image", "baseline")
    parts = {stage: twosdm.load_denoiser(checkpoint(tmp_path, stage)) for stage in stages}
    sampler = twosdm.Sampler(3, 9)
    image_sampler = twosdm.Sampler(2, 9)
    with torch.no_grad():
        ours = twosdm.sample_two_stage(parts["prior"], parts["image"], range(4), None, sampler, image_sampler)
        noise = twosdm.SampleNoise(range(4), "cpu", twosdm.IMAGE)
        edm = twosdm.sample_images(parts["baseline"], noise, None, None, image_sampler)
    for folder, x in ((folders["2sdm"], ours), (folders["baseline"], edm)):
        for pixels, name in zip(twosdm.to_uint8(x).permute(0, 2, 3, 1).numpy(), names(folder)):
            assert abs(picture(folder / name) - pixels).max() <= 1


@pytest.mark.parametrize("method", ["2sdm", "oracle"])
def test_an_image_follows_from_its_seed_alone(draw, method):
    many = draw("--method", method, "--n", 5)
    few = draw("--method", method, "--n", 3, "--seed", 2, "--batch", 1)
    assert few.name == f"{method}-seed=2"
    assert names(few) == names(many)[2:]
    for name in names(few):
        assert abs(picture(few / name) - picture(many / name)).max() <= 1


def test_the_oracles_y_are_the_embeddings_of_training_images(draw, drawn, tmp_path):
    draw("--method", "oracle", "--n", 12)
    run = checkpoint(tmp_path, "image")
    images = twosdm.load_images(SimpleNamespace(**run["config"]))
    known = twosdm.unpack_embedder(run["embedder"])(images.batch(np.arange(len(images))))
    distances, nearest = torch.cdist(all_of(drawn, "y"), known).min(1)
    assert distances.max() < 1e-2
    assert len(nearest.unique()) > 2


def test_each_snapshot_has_a_folder_that_says_which_it_is(draw, tmp_path):
    draw("--method", "baseline", "--snapshots", "--n", 1)
    files = sorted((tmp_path / "runs/shapes/baseline").glob("snapshot-*.pt"))
    assert files
    for file in files:
        told = settings(tmp_path / f"samples/shapes/baseline-{file.stem}")
        assert told["snapshot"] == file.stem
        assert told["images_seen"] == int(file.stem.split("-")[1])


# The same command again

def test_the_same_command_draws_what_is_missing_and_more_images_keep_those_that_are_there(draw, drawn):
    folder = draw("--method", "2sdm", "--n", 6, "--batch", 2)
    time = settings(folder)["timing"]
    assert time["batch"] == 2
    kept = (folder / "000002.png").read_bytes()
    lost = (folder / "000004.png").read_bytes()
    (folder / "000004.png").unlink()
    (folder / "000002.png").write_bytes(kept + b"untouched")
    drawn.clear()
    draw("--method", "2sdm", "--n", 8, "--batch", 4)
    assert len(drawn) == 3
    assert (folder / "000004.png").read_bytes() == lost
    assert (folder / "000002.png").read_bytes() == kept + b"untouched"
    assert settings(folder)["n"] == 8
    assert settings(folder)["timing"] == time         # of one batch there is no time


@pytest.mark.parametrize("changes", [{"weights.image": "0"}, {"images_seen": 1}, {"config.y_dropout": 0.5}])
def test_a_folder_of_another_training_is_refused_and_stays(draw, call, tmp_path, changes):
    folder = draw("--method", "2sdm", "--n", 1)
    change(folder / "settings.json", changes)
    before = (folder / "settings.json").read_bytes()
    refused(call(sample, "--method", "2sdm", "--n", 2, cwd=tmp_path), "2sdm", "--samples")
    refused(call(sample, "--method", "2sdm", "--precision", "bf16", cwd=tmp_path), "precision")
    assert (folder / "settings.json").read_bytes() == before
    assert names(folder) == ["000000.png"]


# Rows that share y

def test_images_of_one_y_differ_in_noise_that_does_not_depend_on_their_number(draw, drawn):
    draw("--method", "2sdm", "--seed", 3, "--n", 2)
    alone = all_of(drawn, "noise")
    drawn.clear()
    rows = draw("--seed", 3, "--same-y", 3, "--n", 5)
    assert rows.name == "2sdm-seed=3-same_y=3"
    assert names(rows) == [f"{seed:06d}-{column:02d}.png" for seed in (3, 4) for column in range(3)]
    assert settings(rows)["columns"] == 3
    y = all_of(drawn, "y").reshape(3, 2, -1)          # column by column
    assert torch.allclose(y, y[:1], atol=1e-5)
    assert not torch.allclose(y[0, 0], y[0, 1], atol=1e-3)
    noise = all_of(drawn, "noise").flatten(1)         # in any order, as columns are drawn side by side
    assert len(noise.unique(dim=0)) == 6
    drawn.clear()
    draw("--seed", 3, "--same-y", 2, "--n", 4)
    for fewer in (alone, all_of(drawn, "noise")):
        assert len(torch.cat([noise, fewer.flatten(1)]).unique(dim=0)) == 6


def test_an_interpolations_rows_share_y_and_its_columns_the_noise(draw, drawn):
    grid = draw("--seed", 5, "--interpolate", 3)
    y = all_of(drawn, "y").reshape(3, 3, -1)          # column by column
    noise = all_of(drawn, "noise").reshape(3, 3, -1)
    assert torch.allclose(y, y[:1], atol=1e-5)
    assert torch.equal(noise, noise[:, :1].expand_as(noise))              # of a column
    assert len(noise[:, 0].unique(dim=0)) == 3
    assert not torch.allclose(y[0, 0], y[0, 1], atol=1e-3)
    plain = draw("--method", "2sdm", "--seed", 5, "--churn", 0, "--n", 2)
    for corner, alone in (("000000-00.png", "000005.png"), ("000002-02.png", "000006.png")):
        assert abs(picture(grid / corner) - picture(plain / alone)).max() <= 2


def test_between_two_noises_there_is_gaussian_noise():
    way = torch.tensor([0.0, 0.3, 0.5, 1.0])
    between = sample.NoiseBetween(7, twosdm.IMAGE, way).randn(4, 40_000)
    ends = twosdm.SampleNoise([7, 8], "cpu", twosdm.IMAGE).randn(2, 40_000)
    assert torch.allclose(between[[0, 3]], ends, atol=1e-5)
    assert torch.allclose(between.std(1), torch.ones(4), atol=0.02)


def test_variations_have_the_y_of_the_given_image_which_the_grid_shows_first(draw, drawn, tmp_path):
    run = checkpoint(tmp_path, "image")
    images = twosdm.load_images(SimpleNamespace(**run["config"]))
    for row in (9, 4):
        Image.fromarray(images.pixels[row]).save(tmp_path / f"{row}.png")
    folder = draw("--like", "9.png", "4.png", "--same-y", 2)
    y = twosdm.unpack_embedder(run["embedder"])(images.batch(np.array([9, 4])))
    assert torch.allclose(all_of(drawn, "y"), y[[0, 1, 0, 1]], atol=1e-5)
    grid = picture(folder / "grid.png")
    side = images.resolution
    scale = (grid.shape[1] - 8) // (3 * side + 4)     # three columns, a pixel apart, on a frame
    small = grid[24::scale, 4::scale]
    assert np.array_equal(small[1:side + 1, 1:side + 1], images.pixels[9])
    assert np.array_equal(small[side + 2:2 * side + 2, 1:side + 1], images.pixels[4])


# Which runs

def test_a_tag_takes_the_tagged_run_of_a_stage_and_the_plain_one_of_the_other(draw, tmp_path):
    for stage, other in (("image", "prior"), ("prior", "image")):
        tagged = tmp_path / f"runs/shapes/{stage}-{stage}"
        shutil.copytree(tmp_path / f"runs/shapes/{stage}", tagged)
        change(tagged / "checkpoint.pt", {"seen": 77})
        draw("--tag", stage, "--n", 1)
        made = sorted(path.name for path in (tmp_path / "samples/shapes").glob(f"*tag={stage}"))
        assert made == [f"2sdm-tag={stage}"] + [f"oracle-tag={stage}"] * (stage == "image")
        told = settings(tmp_path / f"samples/shapes/2sdm-tag={stage}")
        assert (told["images_seen"] == 77) == (stage == "image")


def test_class_cond_draws_clusters_by_their_frequency(fit, drawn, call, tmp_path):
    fit("--stage", "image", "--y", "kmeans:3")
    path = tmp_path / "new/shapes/image-kmeans3/checkpoint.pt"
    change(path, {"embedder.reduction.counts": torch.tensor([30, 0, 10])})
    code, _, err = call(sample, "--runs", "new", "--y", "kmeans:3", "--n", 400, "--steps", 2, cwd=tmp_path)
    assert code in (0, None), err
    y = all_of(drawn, "y")
    assert torch.equal(y.sum(1), torch.ones(400))
    assert torch.allclose(y.mean(0), torch.tensor([0.75, 0, 0.25]), atol=0.09)
    assert (tmp_path / "samples/shapes/2sdm-y=kmeans3-steps=2/000399.png").exists()


def test_classes_come_as_often_as_in_training_or_one_alone(fit, drawn, call, tmp_path):
    photographs(tmp_path / "in", 12, 3)
    for stage in ("prior", "image"):
        fit("--dataset", "folder", "--data", "in", "--a", "class", "--stage", stage)
    flags = ["--dataset", "folder", "--runs", "new", "--n", 60]
    for method in ("2sdm", "oracle"):
        drawn.clear()
        call(sample, *flags, "--method", method, cwd=tmp_path)
        assert torch.allclose(all_of(drawn, "a").mean(0), torch.tensor(1 / 3), atol=0.25)
        drawn.clear()
        call(sample, *flags, "--method", method, "--class", 2, cwd=tmp_path)
        assert torch.equal(all_of(drawn, "a"), torch.tensor([0.0, 0, 1]).expand(60, 3))
        assert settings(tmp_path / f"samples/folder/{method}-class=2")["class"] == 2
    assert len(all_of(drawn, "y").unique(dim=0)) <= 4                         # as many images has the class
    refused(call(sample, *flags, "--class", 3, cwd=tmp_path), "--class 3")


def test_guidance_is_for_models_that_were_trained_for_it(draw, call, tmp_path):
    refused(call(sample, "--guidance", 2, cwd=tmp_path), "--y-dropout")
    change(tmp_path / "runs/shapes/image/checkpoint.pt", {"config.y_dropout": 0.5})
    assert draw("--guidance", 2, "--n", 1).name == "2sdm-guidance=2.0"


# What is refused

def test_where_nothing_is_trained_one_reads_what_is(trained, call, tmp_path):
    refused(call(sample, cwd=tmp_path), "python train.py")
    elsewhere = ["--runs", trained / "runs", "--dataset", "afhq"]
    refused(call(sample, *elsewhere, cwd=tmp_path), "afhq", "shapes/image")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage, changes, words", [
    ("prior", {"identity.images": "other"}, ["other images", "--y"]),
    ("image", {"identity.images": "other"}, ["--data"]),
])
def test_checkpoints_that_do_not_fit_are_refused(draw, call, tmp_path, stage, changes, words):
    change(tmp_path / f"runs/shapes/{stage}/checkpoint.pt", changes)
    method = "2sdm" if stage == "prior" else "oracle"
    refused(call(sample, "--method", method, cwd=tmp_path), *words)


def test_samples_that_are_not_finite_are_refused_and_not_written(draw, call, tmp_path):
    path = tmp_path / "runs/shapes/baseline/checkpoint.pt"
    weights = twosdm.load_checkpoint(path)["ema"]
    change(path, {"ema": {name: tensor * torch.nan for name, tensor in weights.items()}})
    refused(call(sample, "--method", "baseline", cwd=tmp_path), "not finite")
    assert not names(tmp_path / "samples/shapes/baseline")


@pytest.mark.parametrize("flags, word", [
    ("--n 0", "--n"),
    ("--batch 0", "--batch"),
    ("--steps 1", "--steps"),
    ("--churn nan", "--churn"),
    ("--seed -1", "--seed"),
    ("--class -1", "--class"),
    ("--y cat", "--y"),
    ("--method edm", "--method"),
    ("--precision fp8", "--precision"),
    ("--like missing.png", "missing.png"),
    ("--checkpoint missing.pt", "missing.pt"),
    ("--method oracle --checkpoint runs/shapes/prior/checkpoint.pt", "prior")
])
def test_flags_without_sense_get_one_sentence_and_no_folder(draw, call, tmp_path, flags, word):
    refused(call(sample, *flags.split(), cwd=tmp_path), word)
    assert not (tmp_path / "samples").exists()
