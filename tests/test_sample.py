"""What sample.py draws: samples, interpolations, several images per embedding, variations of given images."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, close, photographs, picture, pipeline, refused, table
from PIL import Image

import sample
import train
import twosdm
from sample import slerp


@pytest.fixture
def drawn(monkeypatch):
    """Of each image that is drawn: what the image model is given, its first noise, y and a."""
    images, sample_images = [], twosdm.sample_images

    def recorded(model, noise, y, a, sampler):
        first, randn = [], noise.randn
        noise.randn = lambda *shape: first.append(randn(*shape)) or first[-1]
        x = sample_images(model, noise, y, a, sampler)
        for i in range(len(x)):
            one_y, one_a = (None if c is None else c[i] for c in (y, a))
            images.append(SimpleNamespace(noise=first[0][i], y=one_y, a=one_a))
        return x

    monkeypatch.setattr(twosdm, "sample_images", recorded)
    return images


def all_of(drawn, name):
    return torch.stack([getattr(image, name) for image in drawn])


@pytest.fixture
def draw(call, trained, tmp_path):
    """draw(*flags) -> (the path of the grid, what was said): sample.py of the trained runs."""
    def drawn(*flags):
        code, out, err = call(sample, "--runs", trained / "runs", *flags, cwd=tmp_path)
        assert code == 0, err
        return tmp_path / out.strip(), err

    return drawn


def noise_of(*seeds):
    return twosdm.image_noise(seeds).randn(len(seeds), 3, 8, 8)


def gaussian(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


# The way between two points

def test_slerp_has_the_ends_bits_and_turns_and_stretches_evenly():
    a, b = gaussian(3, 32, 32)
    way = torch.linspace(0, 1, 5, dtype=torch.float64)
    points = slerp(a, 2 * b, way)
    assert points.shape == (5, 3, 32, 32)
    assert points.dtype == torch.float32
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], 2 * b)
    lengths = points.flatten(1).double().norm(dim=1)
    assert close(lengths, torch.lerp(lengths[0], lengths[-1], way), 1e-4)
    unit = points.flatten(1).double() / lengths[:, None]
    angles = (unit[1:] * unit[:-1]).sum(1).acos()
    assert close(angles, angles.mean(), 1e-6)
    assert 4 * angles.mean() > 1.4


def test_between_unit_gaussians_slerp_keeps_their_law():
    points = slerp(*gaussian(50_000), [0.0, 0.3, 0.5, 0.9, 1.0]).double()
    assert close(points.mean(1), 0, 0.02)
    assert close(points.std(1), 1, 0.01)
    assert close((points**4).mean(1), 3, 0.15)


def test_slerp_between_parallel_ends_is_a_straight_line():
    a = gaussian(6)[0]
    assert torch.equal(slerp(a, a, [0.0, 0.2, 0.7, 1.0]), a.expand(4, -1))
    assert close(slerp(a, 3 * a, [0.5]), 2 * a, 1e-6)
    for ends in ((a, -a), (a[:1], -2 * a[:1]), (a, 0 * a)):            # no one circle, but no NaN
        points = slerp(*ends, [0.0, 0.5, 1.0])
        assert points.norm(dim=1).max() <= 2 * a.norm()
        assert torch.equal(points[0], ends[0])
        assert torch.equal(points[-1], ends[1])


# Independent samples

def test_samples_are_images_a_grid_and_an_array_and_the_same_for_every_batch(draw, tmp_path):
    for method in ("2sdm", "oracle", "baseline"):
        grid, _ = draw("--n", 5, "--npz", "--method", method, "--out", method)
        assert picture(grid).shape[1] >= 512
        array = np.load(tmp_path / method / "samples.npz")["arr_0"]
        assert array.shape == (5, 8, 8, 3)
        assert array.dtype == np.uint8
        for i in range(5):
            assert np.array_equal(picture(tmp_path / method / f"{i:06d}.png"), array[i])
    draw("--n", 3, "--seed", 2, "--batch", 1, "--out", "again")
    for i in (2, 3, 4):
        one, two = (picture(tmp_path / name / f"{i:06d}.png") for name in ("2sdm", "again"))
        assert close(one, two, 2)


def test_sampling_continues_and_never_overwrites(trained, draw, drawn, call, tmp_path):
    draw("--n", 2, "--out", "out")
    unfinished = tmp_path / "out/.000003.png.123.new"
    unfinished.write_text("of a killed process")
    draw("--n", 4, "--out", "out")
    assert len(drawn) == 4
    assert not unfinished.exists()
    assert (tmp_path / "out/000003.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    runs = ["--runs", trained / "runs"]
    for flags, words in (("--out out --steps 3", "holds something else"), ("--out out --same-y 2", "--out"),
                         ("--out out --interpolate 2", "--out"), ("--out mine", "--out"),
                         ("--out file", "file"), ("--out file/below", "file")):
        refused(call(sample, *runs, *flags.split(), cwd=tmp_path), words)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_array_holds_the_folder_and_no_grid_another_seeds_images(draw, tmp_path):
    for seed, n in ((4, 2), (0, 3), (1, 1)):
        _, said = draw("--out", "out", "--npz", "--seed", seed, "--n", n)
    assert "samples.npz: 100%" in said and "5/5" in said
    with np.load(tmp_path / "out/samples.npz") as arrays:
        assert arrays["seeds"].tolist() == [0, 1, 2, 4, 5]
        for seed, pixels in zip(arrays["seeds"], arrays["arr_0"]):
            assert np.array_equal(pixels, picture(tmp_path / f"out/{seed:06d}.png"))
    grids = sorted(path.name for path in (tmp_path / "out").glob("grid*"))
    assert grids == ["grid-000001.png", "grid-000004.png", "grid.png"]


# Interpolations and variations

@pytest.mark.parametrize("way", ["noise", "y"])
def test_an_interpolations_rows_share_y_and_its_columns_the_image_noise(draw, drawn, trained, tmp_path, way):
    grid, _ = draw("--seed", 5, "--interpolate", 3, "--slerp", way, "--out", "grid")
    assert picture(grid).shape[1] % (3 * 9 + 1) == 0
    assert len(drawn) == 9
    ends = pipeline(trained / "runs", "2sdm", "--churn", 0).conditions([5, 6])[0]
    y = all_of(drawn, "y").reshape(3, 3, -1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])
    assert close(y[[0, 2], 0], ends)
    assert close(y[1, 0], slerp(*ends, [0.5])[0]) == (way == "y")
    columns = slerp(*noise_of(5, 6), [0.0, 0.5, 1.0])
    assert torch.equal(all_of(drawn, "noise"), columns.repeat(3, 1, 1, 1))
    names = [f"row{row:02d}-column{column:02d}.png" for row in range(3) for column in range(3)]
    assert sorted(path.name for path in (tmp_path / "grid").glob("row*")) == names
    draw("--seed", 5, "--churn", 0, "--n", 2, "--out", "plain")
    for corner, plain in ((names[0], "000005.png"), (names[-1], "000006.png")):
        assert close(picture(tmp_path / "grid" / corner), picture(tmp_path / "plain" / plain), 2)
    record = json.loads((tmp_path / "grid/settings.json").read_text())
    assert [record[name] for name in ("interpolate", "slerp", "seed", "churn")] == [3, way, 5, 0]


def test_images_of_one_embedding_differ_in_noise_that_does_not_depend_on_their_number(draw, drawn, tmp_path):
    draw("--seed", 3, "--same-y", 3, "--n", 5, "--batch", 4, "--out", "out")
    assert len(drawn) == 6                            # whole rows
    y, noise = all_of(drawn, "y").reshape(2, 3, -1), all_of(drawn, "noise")
    assert close(y, y[:, :1])
    assert not close(y[0], y[1], 1e-3)
    assert len(noise.flatten(1).unique(dim=0)) == 6
    assert torch.equal(noise[[0, 3]], noise_of(3, 4))                  # the first is its seed's
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert names == [f"{seed:06d}-{k:02d}.png" for seed in (3, 4) for k in range(3)]
    draw("--seed", 3, "--n", 2, "--out", "plain")
    for seed in (3, 4):
        first = picture(tmp_path / f"out/{seed:06d}-00.png")
        assert close(picture(tmp_path / f"plain/{seed:06d}.png"), first, 2)
    for out, new in (("out", 1), ("fresh", 4)):       # the first folder is continued
        drawn.clear()
        draw("--seed", 4, "--same-y", 4, "--n", 4, "--out", out)
        assert len(drawn) == new
        assert not any(torch.equal(drawn[-1].noise, other) for other in noise)
    assert torch.equal(all_of(drawn, "noise")[:3], noise[3:])
    draw("--seed", 3, "--same-y", 2, "--n", 2, "--method", "oracle")
    assert (tmp_path / "samples/shapes-oracle-same-y/000003-01.png").exists()


def test_variations_of_a_training_image_have_its_embedding(draw, drawn, trained, tmp_path):
    images = twosdm.shapes_world(torch.arange(64), 8)
    for row in (9, 4):
        Image.fromarray(images.pixels[row]).save(tmp_path / f"{row}.png")
    grid, _ = draw("--like", tmp_path / "9.png", tmp_path / "4.png", "--same-y", 2, "--seed", 6)
    checkpoint = twosdm.load_checkpoint(trained / "runs/shapes/image/checkpoint.pt")
    y = twosdm.unpack_embedder(checkpoint["embedder"])(images.batch(np.array([9, 4])))
    assert close(all_of(drawn, "y"), y[[0, 0, 1, 1]])
    assert torch.equal(drawn[0].noise, noise_of(6)[0])
    assert not torch.equal(drawn[1].noise, drawn[0].noise)
    scale = picture(grid).shape[1] // (3 * 9 + 1)
    first_column = picture(grid)[::scale, ::scale][:, 1:9]
    assert np.array_equal(first_column[1:9], images.pixels[9])
    assert np.array_equal(first_column[10:18], images.pixels[4])
    record = json.loads((tmp_path / "samples/shapes-oracle-like/settings.json").read_text())
    assert record["like"]
    assert record["seed"] == 6


def test_given_images_are_read_as_training_images_are(draw, trained, call, tmp_path):
    """Cut to the square, on white, at the run's resolution; of K variations each, by default eight."""
    Image.new("RGBA", (20, 12), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (30, 30), 255).save(tmp_path / "white.png")
    for name in ("clear", "white"):
        draw("--like", tmp_path / f"{name}.png", "--out", name)
        assert len(list((tmp_path / name).glob("000000-*.png"))) == 8
    clear, white = ((tmp_path / name / "settings.json").read_text() for name in ("clear", "white"))
    assert clear == white
    (tmp_path / "not.png").write_text("an image")
    for name in ("not.png", "missing.png"):
        refused(call(sample, "--runs", trained / "runs", "--like", "white.png", name, cwd=tmp_path), name)


def test_classes_have_the_modes_too(call, drawn, tmp_path):
    """An interpolation is of one class, the first seed's; a row of variations is of its seed's."""
    photographs(tmp_path / "in", classes=2)
    flags = [*TINY, *"--dataset folder --data in --embedder pixels --a class --preview 0 --stage".split()]
    for stage in ("prior", "image"):
        code, out, err = call(train, *flags, stage, cwd=tmp_path)
        assert code == 0, err

    def classes(*flags):
        drawn.clear()
        code, out, err = call(sample, *flags, cwd=tmp_path)
        assert code == 0, err
        a = all_of(drawn, "a")
        assert (a.sum(1) == 1).all()
        return a.argmax(1).tolist()

    plain = classes("--n", 20)
    seed = next(i for i in range(20) if plain[i] != plain[i + 1])
    first, second = plain[seed:seed + 2]
    for more in ([], ["--slerp", "y"]):
        assert classes("--seed", seed, "--interpolate", 3, *more) == [first] * 9
        assert classes("--seed", seed, "--interpolate", 3, *more, "--class", second) == [second] * 9
    assert classes("--seed", seed, "--same-y", 2, "--n", 4) == [first, first, second, second]
    assert classes("--seed", seed, "--like", "in/class0/0.jpg", "--same-y", 3) == [first] * 3


# Mistakes

@pytest.mark.parametrize("flags, words", table("""
--interpolate 3 --like x.png -> --interpolate --like
--interpolate 3 --same-y 2 -> --same-y
--interpolate 3 --npz -> --npz
--interpolate 3 --n 4 -> --n
--interpolate 1 -> --interpolate
--interpolate 3 --churn 9 -> --churn
--slerp y -> --interpolate
--same-y 0 -> --same-y
--like x.png --npz -> --like --npz
--like x.png --n 4 -> --n
--same-y 2 --npz -> --same-y --npz
--like x.png --method baseline -> --method baseline
--interpolate 3 --method oracle -> --method 2sdm
--interpolate 3 --method baseline -> --method 2sdm
--same-y 2 --method baseline -> --method 2sdm --y clip
--steps 1 -> --steps
--n -3 -> --n
--n 0 -> --n
--batch 0 -> --batch
--churn -1 -> --churn
--churn nan -> --churn
--seed -1 -> --seed
--s-noise inf -> --s-noise
--class 0 -> without classes
--guidance 2 -> --y-dropout
--guidance -1 -> --guidance
--temperature -1 -> --temperature
--temperature 0.5 --method oracle -> --temperature --method 2sdm
--temperature 0.5 --method baseline -> --temperature --method 2sdm
--prompt star -> --stage prior --a text
--prompt star --method baseline -> --a text
--y pca:5 -> --stage prior --y pca:5
--y pca:5 --prompt star -> --stage prior --y pca:5 --a text
--runs none -> python train.py
--method oracle --checkpoint PRIOR -> prior oracle
--method joint -> joint
--checkpoint missing.pt -> missing.pt
"""))
def test_samplings_without_sense_get_one_sentence_and_leave_no_file(trained, call, tmp_path, flags, words):
    flags = flags.replace("PRIOR", str(trained / "runs/shapes/prior/checkpoint.pt"))
    result = call(sample, "--runs", trained / "runs", *flags.split(), cwd=tmp_path)
    refused(result, *words.split())
    assert not list(tmp_path.iterdir())
