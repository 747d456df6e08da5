"""evaluate.py as a user runs it: folders and references, neighbors, tables, figures, wrong files."""
import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import twosdm
from conftest import refused
from test_metrics import gaussian, inception_file, reference   # noqa: F401 (fixtures)

METRICS = ["fid", "sfid", "is", "precision", "recall"]
CONFIG = dict(
    dataset="shapes", data="", size=300, resolution=8, limit=0, skip_bad=False, vae="", embedder="pixels")


def world(first, count, noise=0, resolution=8):
    """(count, R, R, 3) uint8 images of the embedded world, from number `first`."""
    pixels = twosdm.shapes_images(torch.arange(first, first + count), resolution).numpy()
    noisy = pixels + np.random.default_rng(0).normal(0, noise, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def draw(folder, pixels, **settings):
    """Leaves a folder as sample.py does."""
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    known = dict(
        name=folder.name, method=folder.name, dataset="shapes", columns=1, n=len(pixels), y_dim=48,
        snapshot="", images_seen=44, images="shapes-8-0-300", config=CONFIG)
    (folder / "settings.json").write_text(json.dumps(known | settings))


@pytest.fixture
def rows(call, tmp_path):
    """rows(flags) -> what an evaluation that ends well adds to results.jsonl, and what it prints."""
    def evaluated(*flags, dataset="shapes"):
        path = tmp_path / f"samples/{dataset}/results.jsonl"
        before = len(read(path))
        code, out, err = call(evaluate, *flags, cwd=tmp_path)
        assert code in (0, None), err
        return read(path)[before:], out

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return evaluated


def values(row):
    return {name: row[name] for name in METRICS if name in row}


def table(out):
    """Printed tables -> a dict for each row, whose "evaluation" is the line above its table."""
    rows = []
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| method"):
            head = cells
        elif line.startswith("| "):
            rows.append(dict(zip(head, cells), evaluation=title))
        elif line and not line.startswith("|"):
            title = line
    return rows


# ------------------------------------------------------------------------------------- images and references


def test_each_folder_of_independent_images_has_a_row_beside_other_images_of_the_world(rows, call, tmp_path):
    folder = tmp_path / "samples/shapes"
    draw(folder / "2sdm", world(9000, 90))
    draw(folder / "baseline", world(9500, 90, noise=60))
    draw(folder / "2sdm-interpolate", world(9000, 9), columns=3)
    found, out = rows()
    again, _ = rows()
    assert found == again and [row["name"] for row in found] == ["2sdm", "baseline", "real"]
    lines = table(out)
    assert [line["method"] for line in lines] == ["2sdm", "baseline", "real"] and "is_std" not in lines[0]
    ours, edm, real = found
    draw(folder / "oracle", world(9000, 9), images="others")
    refused(call(evaluate, cwd=tmp_path), "oracle is of a model that has seen other training images")
    assert real["fid"] < edm["fid"] and ours["fid"] < edm["fid"] and ours["is"] > edm["is"]
    for row in found:
        assert list(values(row)) == METRICS and row["n"] == 90
        assert row["features"] == "world" and row["protocol"]["n_real"] == 300
    assert ours["settings"]["config"] == CONFIG and real["settings"] == {}



def test_pixel_features_are_the_pixels_and_the_same_from_folders_zips_and_arrays(rows, tmp_path):
    a = world(0, 60)
    b = world(100, 70, noise=30)
    draw(tmp_path / "a", a)
    draw(tmp_path / "b", b)
    shutil.make_archive(tmp_path / "b", "zip", tmp_path / "b")
    np.savez(tmp_path / "a.npz", arr_0=a)
    flags = "--features", "pixels", "--dataset", "shapes", "--images"
    x, y = [np.moveaxis(pixels, 3, 1).reshape(len(pixels), -1) / 255 for pixels in (a, b)]
    precision, recall = evaluate.precision_recall(y, x)
    fid = evaluate.frechet_distance(*gaussian(x), *gaussian(y))
    exact = pytest.approx(dict(fid=fid, precision=precision, recall=recall), rel=1e-4)
    for images, real in ("a", "b"), ("a.npz", "b.zip"):
        (row,), _ = rows(*flags, images, "--reference", real)
        assert values(row) == exact and row["features"] == "pixels"
    mu, sigma = gaussian(y)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "both.npz", mu=mu, sigma=sigma, arr_0=b)
    for real, names in ("edm.npz", ["fid"]), ("both.npz", ["fid", "precision", "recall"]):
        (row,), _ = rows(*flags, "a", "--reference", real)
        assert list(values(row)) == names and row["fid"] == pytest.approx(fid, rel=1e-4)


def test_openais_file_of_the_same_images_is_at_distance_zero_by_inception(rows, inception_file, tmp_path):
    pixels = world(0, 6)
    found = evaluate.InceptionFeatures(inception_file)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    mu, sigma = gaussian(found["pool"])
    mu_s, sigma_s = gaussian(found["spatial"])
    np.savez(tmp_path / "openai.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, arr_0=pixels)
    flags = "--images", "openai.npz", "--reference", "openai.npz", "--inception-weights", inception_file
    (row,), _ = rows(*flags, dataset="images")
    score, _ = evaluate.inception_score(found["logits"], splits=1)
    exact = {"fid": 0, "sfid": 0, "is": score, "precision": 1, "recall": 1}
    assert values(row) == pytest.approx(exact, rel=1e-4, abs=1e-3)
    assert row["features"] == "inception" and len(row["weights"]) == 8


REFUSED = """
--images a.npz -> --reference
--images a.npz --reference mixed.npz -> mixed.npz -> damaged
--images a.npz --reference floats.npz -> floats.npz -> uint8
--images stats.npz --reference a.npz -> stats.npz -> arr_0
--images a.npz --reference x.npy -> x.npy -> neither a folder nor
--images cut.npz --reference a.npz -> cut.npz -> damaged
--images a.npz --reference other.npz -> statistics -> --features
--images a.npz big.npz --reference a.npz -> big.npz -> nothing is resized
--images a.npz --reference stats.npz --nearest pixels -> stats.npz -> arr_0
--dataset afhq -> sample.py --dataset afhq
--tables absent.jsonl -> absent.jsonl
--figure 5 --tables empty.jsonl -> Fig. 5
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_wrong_files_are_refused_in_one_sentence_that_fits_the_flag(case, call, tmp_path):
    flags, *words = case.split(" -> ")
    a = world(0, 6)
    mu = np.zeros(192)
    sigma = np.eye(192)
    files = dict(
        a=dict(arr_0=a), mixed=dict(arr_0=np.array([a[0], None], object)), floats=dict(arr_0=a / 255),
        big=dict(arr_0=world(0, 6, resolution=16)), stats=dict(mu=mu, sigma=sigma),
        other=dict(mu=mu[:9], sigma=sigma))
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.save(tmp_path / "x.npy", mu)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    (tmp_path / "empty.jsonl").touch()
    if "--dataset" not in flags:
        flags += " --features pixels"
    refused(call(evaluate, *flags.split(), cwd=tmp_path), *words)


# ------------------------------------------------------------------------------------------------- neighbors


def test_copies_are_all_recognized_and_fresh_images_look_like_chance(rows, tmp_path, monkeypatch):
    training = np.concatenate([world(0, 800), world(0, 200)])             # the first 200 are there twice
    np.savez(tmp_path / "training.npz", arr_0=training)
    np.savez(tmp_path / "fresh.npz", arr_0=world(9000, 400))
    np.savez(tmp_path / "copies.npz", arr_0=training[300:400])
    flags = "--reference", "training.npz", "--nearest", "pixels", "--n", 1000, "--images"
    (fresh, copies), out = rows(*flags, "fresh.npz", "copies.npz", dataset="images")
    assert copies["copies"] == 1 and 0.01 < fresh["copies"] < 0.12
    path = tmp_path / "samples/images/nearest-pixels.csv"
    shares = {}
    with open(path) as file:
        for line in csv.DictReader(file):
            shares.setdefault(line["curve"], []).append(float(line["share"]))
    assert sum(shares["fresh.npz"]) == pytest.approx(1)
    assert shares["training images"][0] == 0 and shares["copies.npz"][0] == 1     # at distance zero
    assert Image.open(path.with_name("nearest-pixels-fresh.npz.png")).height > 8 * 8
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path.unlink()
    _, out = rows(*flags, "fresh.npz", dataset="images")
    assert "pip install matplotlib" in out and path.exists()


# ---------------------------------------------------------------------------------------- tables and figures


def result(name, fid, seed=0, n=100, features="pixels", batch=64, **settings):
    """A line of results.jsonl as evaluate.py writes it."""
    timing = dict(ms_per_image=20.0 + seed, batch=batch, device="cpu", images=n)
    known = dict(name=name, y_dim=48, images_seen=44, config=dict(seed=seed), snapshot="", timing=timing)
    protocol = dict(reference="training images", n_real=300)
    row = dict(name=name, method=name.split("-")[0], dataset="shapes", n=n, fid=fid, precision=0.5)
    return row | dict(features=features, weights="none", protocol=protocol, settings=known | settings)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tables_average_training_seeds_and_compare_like_with_like(call, tmp_path):
    rows = [result("2sdm", 99.0)]                             # repeated: the last one counts
    for seed in (0, 1, 2):
        rows += [result("baseline", 8.0 + seed, seed), result("oracle", 1.0, seed)]
        rows.append(result("2sdm", 2.0 + seed, seed))
    rows += [result("2sdm", 512.346, n=50), result("2sdm", 7.0, features="inception")]
    rows += [result("2sdm-y=kmeans64", 4.0), result("2sdm-image_steps=9", 2.5, batch=256)]
    rows += [result("2sdm-snapshot-0000000016", 3.0, snapshot="snapshot-0000000016")]
    write(tmp_path / "samples/shapes/results.jsonl", rows)
    _, out, _ = call(evaluate, "--tables", cwd=tmp_path)
    lines = table(out)
    found = {line["method"]: line for line in lines if "pixels none, 100 images" in line["evaluation"]}
    assert list(found) == ["2sdm", "2sdm-image_steps=9", "2sdm-y=kmeans64", "baseline", "oracle"]
    ours = found["2sdm"]
    gains = [100 * (1 - (2 + s) / (8 + s)) for s in range(3)]
    ratios = [100 * 6 / (7 + s) for s in range(3)]
    assert ours["runs"] == "3" and ours["fid"] == "3 ± 1" and ours["precision"] == "0.5 ± 0"
    for name, exact in ("gain", gains), ("ratio", ratios):
        assert ours[name] == f"{np.mean(exact):.4g} ± {np.std(exact, ddof=1):.2g}"
    assert ours["ms per image, batch 64, cpu"] == "21 ± 1"
    assert ours["ms per image, batch 256, cpu"] == "–"
    assert found["2sdm-y=kmeans64"]["gain"] == "50"
    assert {line["fid"] for line in lines if line["gain"] == "–"} == {"9 ± 1", "512.3", "7"}
    other = write(tmp_path / "other.jsonl", [result("2sdm", 6.0, seed=3)])
    _, out, _ = call(evaluate, "--tables", "samples/shapes/results.jsonl", other, cwd=tmp_path)
    assert any((line["method"], line["runs"]) == ("2sdm", "4") for line in table(out))


def test_figures_have_a_curve_for_each_reduction_budget_and_run_and_never_mix_unlike_values(call, tmp_path):
    rows = [result("baseline", 9.5, y_dim=0), result("oracle", 3.0), result("2sdm", 3.5)]
    rows += [result(f"oracle-y=pca{d}", 9.0 - d, y_dim=d) for d in (1, 2)]
    rows += [result("oracle-y=kmeans16", 4.0, y_dim=16), result("2sdm", 77.0, n=50)]
    early = dict(images_seen=16, snapshot="snapshot-0000000016")
    rows.append(result("oracle-snapshot-0000000016", 5.0, **early))
    rows.append(result("2sdm-snapshot-0000000016", 6.0, **early))
    rows.append(result("2sdm", 88.0, features="world"))
    write(tmp_path / "samples/shapes/results.jsonl", rows)
    figures = {}
    for number in 4, 5:
        assert call(evaluate, "--figure", number, cwd=tmp_path)[0] in (0, None)
        path = tmp_path / f"samples/shapes/figure-{number}"
        if importlib.util.find_spec("matplotlib"):            # which is optional
            assert Image.open(f"{path}.png").width > 500
        with open(f"{path}.csv") as file:
            lines = [line for line in csv.reader(file) if "pixels none, 100 images" in line[0]]
        figures[number] = {(curve.split(",")[0], int(x)): float(fid) for curve, x, fid in lines}
    assert figures[4] == {("oracle", 0): 9.5, ("oracle", 1): 8.0, ("oracle", 2): 7.0, ("oracle", 48): 3.0,
                          ("oracle-snapshot-0000000016", 48): 5.0, ("oracle-y=kmeans", 16): 4.0}
    assert figures[5]["2sdm", 16] == 6.0 and figures[5]["2sdm", 44] == 3.5
