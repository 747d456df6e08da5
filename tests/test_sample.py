"""Interpolations, several images per embedding, variations of given images, and what their folders hold."""
import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import TINY, refused
from test_latent import save_vae
from test_scripts import photographs

import sample
import train
import twosdm
from twosdm import Denoiser, PriorTransformer, Sampler, slerp


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def pipeline(folder, method, *flags, **options):
    """The pipeline of a trained folder, as main makes it."""
    parser = argparse.ArgumentParser()
    sample.add_sampling_flags(parser)
    args = parser.parse_args(["--runs", str(folder / "runs"), *map(str, flags)])
    return sample.Pipeline(args, method, torch.device("cpu"), **options)


@pytest.fixture
def drawn(monkeypatch):
    """What Pipeline.draw was called with: a list of (seeds, y, a, way), one per image."""
    calls, draw = [], sample.Pipeline.draw

    def recorded(self, seeds, y, a, way=None):
        for i in range(len(seeds if way is None else way)):
            calls.append((seeds if way is not None else seeds[i], y[i], None if a is None else a[i],
                          None if way is None else float(way[i])))
        return draw(self, seeds, y, a, way)

    monkeypatch.setattr(sample.Pipeline, "draw", recorded)
    return calls


def gaussian(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


def test_slerp_has_the_ends_bits_and_turns_and_stretches_evenly():
    a, b = gaussian(3, 32, 32)
    way = torch.linspace(0, 1, 5, dtype=torch.float64)
    points = slerp(a, 2 * b, way)
    assert points.shape == (5, 3, 32, 32) and points.dtype == torch.float32
    assert torch.equal(points[0], a) and torch.equal(points[-1], 2 * b)
    lengths = points.flatten(1).double().norm(dim=1)
    assert (lengths - torch.lerp(lengths[0], lengths[-1], way)).abs().max() < 1e-4
    unit = points.flatten(1).double() / lengths[:, None]
    angles = (unit[1:] * unit[:-1]).sum(1).acos()
    assert (angles - angles.mean()).abs().max() < 1e-6 and 4 * angles.mean() > 1.4


def test_between_unit_gaussians_slerp_keeps_their_law():
    points = slerp(*gaussian(50_000), [0.0, 0.3, 0.5, 0.9, 1.0]).double()
    assert points.mean(1).abs().max() < 0.02 and (points.std(1) - 1).abs().max() < 0.01
    assert ((points**4).mean(1) - 3).abs().max() < 0.15


def test_slerp_between_parallel_ends_is_a_straight_line():
    a = gaussian(6)[0]
    assert torch.equal(slerp(a, a, [0.0, 0.2, 0.7, 1.0]), a.expand(4, -1))
    assert (slerp(a, 3 * a, [0.5]) - 2 * a).abs().max() < 1e-6
    for ends in ((a, -a), (a[:1], -2 * a[:1]), (a, 0 * a)):                     # no one circle, but no NaN
        points = slerp(*ends, [0.0, 0.5, 1.0])
        assert points.isfinite().all()
        assert torch.equal(points[0], ends[0]) and torch.equal(points[-1], ends[1])


def test_a_sampler_between_two_seeds_gives_at_the_ends_what_the_seeds_give():
    torch.manual_seed(0)
    denoiser = Denoiser(PriorTransformer(5, width=16, depth=1, heads=2), predict="data")
    for parameter in denoiser.parameters():
        parameter.data.normal_(std=0.3)
    sampler = Sampler(steps=4, s_churn=0)
    ends = sampler(denoiser, (5,), [7, 8])
    assert torch.equal(sampler(denoiser, (5,), [7, 8], way=[0.0, 1.0]), ends)
    assert (sampler(denoiser, (5,), [7, 8], way=[0.0, 0.4, 1.0])[[0, 2]] - ends).abs().max() < 1e-5
    same = sampler(denoiser, (5,), [7, 7], way=[0.0, 0.4, 1.0])
    assert (same - ends[0]).abs().max() < 1e-5 and (ends[0] - ends[1]).abs().max() > 1e-2
    with pytest.raises(AssertionError):
        Sampler(steps=4)(denoiser, (5,), [7, 8], way=[0.5])


@pytest.mark.parametrize("way", ["noise", "y"])
def test_an_interpolations_rows_share_y_and_its_columns_the_image_noise(trained, call, tmp_path, drawn, way):
    flags = ["--runs", trained / "runs", "--seed", 5]
    code, out, err = call(sample, *flags, "--interpolate", 3, "--slerp", way, "--out", "grid", cwd=tmp_path)
    assert code == 0, err
    assert len(drawn) == 9 and all(seeds == [5, 6] for seeds, *_ in drawn)
    y = torch.stack([y for _, y, _, _ in drawn]).reshape(3, 3, -1)
    assert (y == y[:, :1]).all() and not torch.equal(y[0, 0], y[1, 0]) and not torch.equal(y[1, 0], y[2, 0])
    assert [w for *_, w in drawn] == [0.0, 0.5, 1.0] * 3
    model = pipeline(trained, "2sdm", "--churn", 0)
    ends = model.conditions([5, 6])[0]
    assert (y[[0, 2], 0] - ends).abs().max() < 1e-5
    turned = slerp(*ends, [0.5])[0]
    assert ((y[1, 0] - turned).abs().max() < 1e-5) == (way == "y")
    names = [f"row{r:02d}-column{c:02d}.png" for r in range(3) for c in range(3)]
    assert sorted(path.name for path in (tmp_path / "grid").glob("row*")) == names
    assert call(sample, *flags, "--churn", 0, "--n", 2, "--out", "plain", cwd=tmp_path)[0] == 0
    for corner, plain in ((names[0], "000005.png"), (names[-1], "000006.png")):
        assert np.abs(picture(tmp_path / "grid" / corner) - picture(tmp_path / "plain" / plain)).max() <= 1
    record = json.loads((tmp_path / "grid" / "settings.json").read_text())
    assert (record["interpolate"], record["slerp"], record["seed"], record["churn"]) == (3, way, 5, 0)
    assert Image.open(tmp_path / out.strip()).width % (3 * 9 + 1) == 0
    refused(call(sample, *flags, "--interpolate", 4, "--out", "grid", cwd=tmp_path), "--out")


def test_the_images_of_one_embedding_share_it_and_differ_in_noise_that_does_not_depend_on_their_number(
        trained, call, tmp_path, drawn):
    flags = ["--runs", trained / "runs", "--seed", 3]
    assert call(sample, *flags, "--same-y", 3, "--n", 5, "--batch", 4, "--out", "y", cwd=tmp_path)[0] == 0
    assert len(drawn) == 6                                             # whole rows
    y = torch.stack([y for _, y, _, _ in drawn]).reshape(2, 3, -1)
    assert (y == y[:, :1]).all() and not torch.equal(y[0, 0], y[1, 0])
    seeds = [seed for seed, *_ in drawn]
    assert len(set(seeds)) == 6 and (seeds[0], seeds[3]) == (3, 4)
    pictures = {path.name: picture(path) for path in (tmp_path / "y").glob("0*.png")}
    assert sorted(pictures) == [f"{seed:06d}-{k:02d}.png" for seed in (3, 4) for k in range(3)]
    assert all(np.abs(pictures["000003-00.png"] - pictures[f"000003-{k:02d}.png"]).max() > 1 for k in (1, 2))
    assert call(sample, *flags, "--n", 2, "--out", "plain", cwd=tmp_path)[0] == 0
    assert np.abs(picture(tmp_path / "plain" / "000004.png") - pictures["000004-00.png"]).max() <= 1
    more = [*flags[:2], "--seed", 4, "--same-y", 4, "--n", 4]
    for out, new in (("y", 1), ("fresh", 4)):         # the first folder is continued
        drawn.clear()
        assert call(sample, *more, "--out", out, cwd=tmp_path)[0] == 0
        assert len(drawn) == new and drawn[-1][0] not in seeds
    assert [seed for seed, *_ in drawn[:3]] == seeds[3:]
    assert {"grid-000003.png", "grid-000004.png"} < {path.name for path in (tmp_path / "y").iterdir()}
    assert np.array_equal(picture(tmp_path / "y" / "000004-01.png"), pictures["000004-01.png"])
    for method in ("oracle", "2sdm"):
        assert call(sample, *flags, "--same-y", 2, "--n", 2, "--method", method, cwd=tmp_path)[0] == 0
        assert (tmp_path / f"samples/shapes-{method}-same-y/000003-01.png").exists()


def test_variations_of_a_training_image_are_the_oracles_draws_for_it(trained, call, tmp_path, drawn):
    pixels = twosdm.shapes_world(torch.arange(64), 8).pixels
    for row in (9, 4):
        Image.fromarray(pixels[row]).save(tmp_path / f"{row}.png")
    flags = ["--runs", trained / "runs", "--like", "9.png", "4.png", "--same-y", 2, "--seed", 6]
    code, out, err = call(sample, *flags, cwd=tmp_path)
    assert code == 0, err
    folder = tmp_path / "samples/shapes-oracle-like"
    oracle = pipeline(trained, "oracle")
    y = oracle.embed(oracle.images, np.array([9, 4]))
    for i in range(4):
        assert torch.equal(drawn[i][1], y[i // 2])
    expected = oracle.draw([6, 7], y, None).astype(int)
    for i, name in enumerate(("000006-00.png", "000007-00.png")):
        assert np.abs(picture(folder / name) - expected[i]).max() <= 1
    grid = picture(tmp_path / out.strip())
    scale = grid.shape[1] // (3 * 9 + 1)
    first_column = grid[::scale, ::scale][:, 1:9]
    assert np.array_equal(first_column[1:9], pixels[9]) and np.array_equal(first_column[10:18], pixels[4])
    record = json.loads((folder / "settings.json").read_text())
    assert len(set(record["like"])) == 2 and record["seed"] == 6


def test_given_images_are_read_as_training_images_are(trained, call, tmp_path):
    """Cut to the square, on white, at the run's resolution; of K variations each, by default eight."""
    image = Image.new("RGBA", (20, 12), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    Image.new("L", (30, 30), 255).save(tmp_path / "white.png")
    for name in ("clear", "white"):
        code, out, err = call(sample, "--runs", trained / "runs", "--like", f"{name}.png", "--out", name,
                              cwd=tmp_path)
        assert code == 0 and len(list((tmp_path / name).glob("000000-*.png"))) == 8, err
    clear, white = ((tmp_path / name / "settings.json").read_text() for name in ("clear", "white"))
    assert clear == white
    (tmp_path / "not.png").write_text("an image")
    for name in ("not.png", "missing.png"):
        refused(call(sample, "--runs", trained / "runs", "--like", "white.png", name, cwd=tmp_path), name)


def test_the_array_holds_the_folder_and_no_grid_another_seeds_images(trained, call, tmp_path):
    common = ["--runs", trained / "runs", "--out", "out", "--npz"]
    for seed, n in ((4, 2), (0, 3), (1, 1)):
        code, out, err = call(sample, *common, "--seed", seed, "--n", n, cwd=tmp_path)
        assert code == 0, err
    assert "all 5 images" in err
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["seeds"].tolist() == [0, 1, 2, 4, 5]
        for seed, pixels in zip(arrays["seeds"], arrays["arr_0"]):
            assert np.array_equal(pixels, picture(tmp_path / "out" / f"{seed:06d}.png"))
    grids = sorted(path.name for path in (tmp_path / "out").glob("grid*"))
    assert grids == ["grid-000001.png", "grid-000004.png", "grid.png"]
    refused(call(sample, *common[:4], "--same-y", 2, cwd=tmp_path), "holds something else")


def test_modes_without_sense_are_refused(trained, call, tmp_path):
    runs = ["--runs", trained / "runs"]
    grid, like = ["--interpolate", "3"], ["--like", "x.png"]
    for flags, words in (
            ([*grid, *like], ("--interpolate", "--like")), ([*grid, "--same-y", 2], ("--same-y",)),
            ([*grid, "--npz"], ("--npz",)), ([*grid, "--n", 4], ("--n",)),
            ([*grid, "--churn", 9], ("--churn",)),
            ([*like, "--npz"], ("--like", "--npz")), ([*like, "--n", 4], ("--n",)),
            (["--same-y", 2, "--npz"], ("--same-y", "--npz")), (["--slerp", "y"], ("--interpolate",)),
            ([*like, "--method", "baseline"], ("--method baseline",)),
            (["--interpolate", 1], ("--interpolate",)),
            (["--same-y", 0], ("--same-y",)), ([*grid, "--method", "oracle"], ("--method 2sdm",)),
            ([*grid, "--method", "baseline"], ("--method 2sdm",)),
            (["--same-y", 2, "--method", "baseline"], ("--method 2sdm", "--y clip"))):
        refused(call(sample, *runs, *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_clusters_are_no_embeddings(call, trained, tmp_path):
    runs = ["--runs", tmp_path / "runs"]
    (tmp_path / "runs/shapes").mkdir(parents=True)
    (tmp_path / "runs/shapes/embedder").symlink_to(trained / "runs/shapes/embedder")
    assert call(train, *TINY, *runs, "--stage", "image", "--y", "kmeans:4", cwd=tmp_path)[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for flags in (["--same-y", 2], ["--interpolate"], ["--like", "x.png"]):
        refused(call(sample, *runs, "--dataset", "shapes", "--y", "kmeans:4", *flags, cwd=tmp_path),
                flags[0], "--y clip or pca:D")


def test_latents_and_classes_have_the_modes_too(call, tmp_path, drawn):
    """An interpolation is of one class; a given image is embedded in pixels, whatever the networks model."""
    weights = save_vae(tmp_path / "vae")
    photographs(tmp_path / "in", classes=2)
    for stage in ("prior", "image"):
        code, out, err = call(train, *("--images 8 --batch 8 --resolution 16 --embedder pixels --arch ddpm++ "
                              "--width 8 --mults 1,2 --blocks 1 --attention 4 --prior-width 16 "
                              "--prior-depth 1 --prior-heads 2 --steps 2 --dataset imagenet-latent "
                              "--preview 0 --data in --stage").split(), stage, "--vae", weights, cwd=tmp_path)
        assert code == 0, err
    for flags, classes in ((["--interpolate", 2], 1), (["--interpolate", 2, "--class", 1], 1),
                           (["--same-y", 2, "--n", 8], 2), (["--like", "in/class0/0.jpg", "--same-y", 3], 1)):
        drawn.clear()
        code, out, err = call(sample, *flags, "--seed", 1, cwd=tmp_path)
        assert code == 0 and Image.open(out.strip()), err
        a = torch.stack([a for _, _, a, _ in drawn])
        assert len(a.unique(dim=0)) == classes and (a.sum(1) == 1).all()
        assert "--class" not in flags or (a[:, 1] == 1).all()
    model = pipeline(tmp_path, "2sdm", "--churn", 0)
    seed = next(s for s in range(99) if not torch.equal(*model.labels([s, s + 1])))
    for ends in ([seed, seed + 1], [seed + 1, seed]):
        assert torch.equal(model.conditions(ends, [0.0, 0.5, 1.0])[1], model.labels(ends[:1] * 3))
    drawn.clear()
    assert call(sample, "--interpolate", 2, "--seed", seed, "--slerp", "y", cwd=tmp_path)[0] == 0
    assert all(torch.equal(a, model.labels([seed])[0]) for _, _, a, _ in drawn)
    assert Image.open("samples/imagenet-latent-oracle-like/000001-02.png").size == (16, 16)


def test_times_are_those_of_all_batches_but_the_first():
    pipeline = object.__new__(sample.Pipeline)
    pipeline.args, pipeline.device, pipeline.batches = SimpleNamespace(batch=4), torch.device("cpu"), []
    assert pipeline.timing() is None
    for batch, found in (((9.0, 1.0, 4), (2500.0, 0.9, 4)), ((1.0, 3.0, 4), (1000.0, 0.25, 4)),
                         ((0.5, 1.5, 2), (1000.0, 0.25, 6))):
        pipeline.batches.append(batch)
        timing = pipeline.timing()
        assert (timing["ms_per_image"], timing["prior_share"], timing["images"]) == found
