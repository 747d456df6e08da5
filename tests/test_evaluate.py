"""evaluate.py as a user runs it: images and references, neighbors, histories, tables, bad input."""
import csv
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
import twosdm
from conftest import refused, start, table
from test_metrics import lpips_files, public_layout, reference, weights_file   # noqa: F401 (fixtures)

METRICS = "fid", "sfid", "is", "precision", "recall"


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """A copy of the runs, as evaluations leave their rows there, with a classifier of the world in haste."""
    folder = shutil.copytree(trained / "runs", tmp_path_factory.mktemp("evaluated") / "runs")
    evaluate.WorldFeatures.trained(folder / "shapes", 8, steps=30)
    return folder


@pytest.fixture
def rows(call, runs, tmp_path):
    """rows(flags) -> what an evaluation writes as --json, after it has ended well."""
    def evaluated(*flags):
        flags = "--runs", runs, *flags, "--json", "rows.json"
        code, out, err = call(evaluate, *flags, cwd=tmp_path)
        assert code == 0, err
        return json.loads((tmp_path / "rows.json").read_text())

    return evaluated


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two sets of 7 pictures of 8 x 8, as folders a and b and as a.npz and b.npz."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate("ab"):
        pixels = twosdm.shapes_images(torch.arange(7) + 100 * seed, 8).numpy()
        np.savez(folder / f"{name}.npz", arr_0=pixels)
        (folder / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{i:06d}.png")
    return folder


@pytest.fixture
def flags(pictures):
    """Set a, to be compared with something, by the features of the world's classifier."""
    return "--dataset", "shapes", "--images", pictures / "a"


def values(row):
    return {name: row[name] for name in METRICS if name in row}


# ------------------------------------------------------------------------------------- images and references


def test_a_folder_and_an_array_of_the_same_images_have_the_same_inception_metrics(
        pictures, weights_file, rows):
    flags = "--inception-weights", weights_file, "--batch", 4, "--reference", pictures / "b"
    folder, = rows("--images", pictures / "a", *flags)
    array, = rows("--images", pictures / "a.npz", *flags, "--metrics", "IS,precision")
    assert len(values(folder)) == 5 and all(np.isfinite(x) and x >= 0 for x in values(folder).values())
    assert list(values(array)) == ["is", "precision", "recall"]
    assert values(array).items() <= values(folder).items()
    protocol = folder["protocol"]
    assert [protocol[name] for name in ("n_generated", "n_real", "k", "resolution")] == [7, 7, 3, 8]
    assert protocol["features"] == "Inception 2015-12-05" and len(protocol["weights"]) == 8


def test_a_saved_reference_and_openais_format_are_as_good_as_the_images(
        pictures, flags, rows, call, runs, tmp_path):
    direct, = rows(*flags, "--reference", pictures / "b")
    saved = "--runs", runs, "--dataset", "shapes", "--reference", pictures / "b", "--save-reference", "b.npz"
    assert call(evaluate, *saved, cwd=tmp_path)[0] == 0
    by_file, = rows(*flags, "--reference", "b.npz")
    assert values(by_file) == values(direct) and by_file["protocol"]["n_real"] == 7
    ours = np.load(tmp_path / "b.npz")
    statistics = {name: ours[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "openai.npz", **statistics, arr_0=np.load(pictures / "b.npz")["arr_0"])
    openai, = rows(*flags, "--reference", "openai.npz")
    assert values(openai) == values(direct)
    # EDM's has nothing but this, and nothing is taken from other images in its place.
    np.savez(tmp_path / "edm.npz", mu=ours["mu"], sigma=ours["sigma"])
    edm, = rows(*flags, "--reference", "edm.npz", "--data", pictures / "b")
    assert values(edm) == {name: direct[name] for name in ("fid", "is")}


def test_a_folder_of_samples_is_evaluated_as_the_run_that_drew_it_which_is_drawn_once(
        runs, rows, call, tmp_path):
    flags = "--method", "baseline", "--n", 20
    own, again = rows(*flags)[-1], rows(*flags)[-1]
    assert own["timing"]["images"] == 20 and again["timing"] is None and values(own) == values(again)
    sampled = call(sample, "--runs", runs, *flags, "--out", "drawn", "--npz", cwd=tmp_path)
    assert sampled[0] == 0
    drawn, = rows("--images", "drawn")                        # beside a grid, which is no sample
    assert values(drawn) == pytest.approx(values(own), rel=1e-5)
    assert "world's own classifier" in drawn["protocol"]["features"]
    array, = rows("--images", "drawn/samples.npz", "--dataset", "shapes")
    assert values(array) == values(drawn)


def test_mixed_and_broken_pictures_are_as_in_training(pictures, rows, runs, call, tmp_path):
    shutil.copytree(pictures / "a", tmp_path / "odd")
    gray = tmp_path / "odd/gray.png"
    Image.new("LA", (30, 24), (90, 200)).save(gray)
    flags = "--dataset", "shapes", "--images", "odd", "--reference", pictures / "b"
    command = evaluate, "--runs", runs, *flags
    refused(call(*command, cwd=tmp_path), "odd holds images of several sizes", "--resolution")
    assert rows(*flags, "--resolution", 8)[0]["protocol"]["n_generated"] == 8
    gray.write_bytes(b"\x89PNG")
    refused(call(*command, cwd=tmp_path), "gray.png", "--skip-bad")
    row, = rows(*flags, "--skip-bad")
    direct, = rows("--dataset", "shapes", "--images", pictures / "a", "--reference", pictures / "b")
    assert row["protocol"]["n_generated"] == 7
    assert values(row) == pytest.approx(values(direct), rel=1e-5)


def test_an_npz_that_is_no_reference_is_refused_in_one_sentence(pictures, flags, runs, call, tmp_path):
    pixels = np.load(pictures / "a.npz")["arr_0"]
    mixed = np.array([pixels[0], None], object)
    mu, sigma = np.zeros(64), np.eye(64)
    hole, skew = sigma.copy(), sigma.copy()
    hole[3, 5] = hole[5, 3] = np.nan
    skew[3, 5] = 0.5
    for content, word in (
            (dict(arr_0=mixed), "several sizes"), (dict(arr_0=pixels / 255), "be uint8"),
            (dict(arr_0=pixels.transpose(0, 3, 1, 2)), "(N, R, R, 3)"), (dict(other=mu), "arr_0"),
            (dict(arr_0=pixels[:, :7, :7]), "7x7, not 8x8"), (dict(mu=mu), "sigma"),
            (dict(mu=mu, sigma=hole), "NaN"), (dict(mu=mu, sigma=skew), "not symmetric"),
            (dict(mu=mu[:9], sigma=sigma[:9, :9]), "D = 64"), (dict(mu=mixed, sigma=sigma), "D = 64"),
            (dict(mu=mu, sigma=sigma, weights="01234567"), "01234567")):
        np.savez(tmp_path / "odd.npz", **content)
        result = call(evaluate, "--runs", runs, *flags, "--reference", "odd.npz", cwd=tmp_path)
        refused(result, "odd.npz", word)


@pytest.mark.parametrize("kind", ["cut", "lzma", "header", "absent"])
def test_a_damaged_npz_of_images_is_refused_in_one_sentence(kind, pictures, runs, call, tmp_path):
    content = (pictures / "a.npz").read_bytes()
    if kind == "cut":
        (tmp_path / "cut.npz").write_bytes(content[:500])
    if kind == "header":
        (tmp_path / "header.npz").write_bytes(content.replace(b"'fortran_order'", b"'fortran_0rder'"))
    if kind == "lzma":
        with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\x09\x00")
    flags = "--dataset", "shapes", "--images", f"{kind}.npz", "--reference", pictures / "b"
    refused(call(evaluate, "--runs", runs, *flags, cwd=tmp_path), f"{kind}.npz")


REFUSED = """
--images {a} --nearest pixel -> --reference
--images {a} --history -> --history
--images {a} --y pca:8 -> --y
--images {a} --reference {b} --n 5 -> leave out --n
--resolution 16 -> --resolution is for --images
--method baseline --y pca:8 -> --y pca:8
--metrics fid,kid -> kid
--tables --resolution 16 -> --tables and --resolution
--figure 4 --y pca:8 -> --figure and --y
--embeddings --method oracle -> --embeddings and --method
--history --checkpoint x.pt -> --checkpoint
--nearest lpips -> use --nearest clip
--temperature 0.5 --method baseline -> --temperature
"""


@pytest.mark.parametrize("flags, words", table(REFUSED))
def test_flags_without_a_meaning_are_refused(flags, words, pictures, runs, call, tmp_path):
    flags = flags.format(a=pictures / "a", b=pictures / "b").split()
    refused(call(evaluate, "--runs", runs, *flags, cwd=tmp_path), words)


def test_methods_that_have_no_use_for_a_flag_are_left_out_and_it_is_said(runs, call, tmp_path):
    flags = "--runs", runs, "--temperature", 0.5, "--n", 8, "--json", "-"
    code, out, err = call(evaluate, *flags, cwd=tmp_path)
    assert code == 0 and [row["method"] for row in json.loads(out)] == ["real", "2sdm"]
    assert "left out: oracle (--temperature" in err and "left out: baseline (--temperature" in err


def test_two_equal_commands_at_once_both_end_well(runs, tmp_path):
    flags = "--runs", runs, "--n", 24, "--seed", 7, "--json"
    both = [start(evaluate, *flags, f"{i}.json", cwd=tmp_path) for i in range(2)]
    for process in both:
        process.join()
    one, two = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert [row["method"] for row in one] == ["real", "2sdm", "oracle", "baseline"]
    assert [values(row) for row in one] == [values(row) for row in two]


# ------------------------------------------------------------------------------------- neighbors and history


@pytest.mark.parametrize("kind", ["pixel", "clip"])
def test_copies_are_all_recognized_and_fresh_images_look_like_chance(kind, rows, tmp_path):
    world = twosdm.shapes_images(torch.arange(2500), 8).numpy()
    sets = dict(training=world[:2000], fresh=world[2000:], copies=world[500:1000])
    found = {}
    for name, pixels in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels)
    flags = "--dataset", "shapes", "--reference", "training.npz", "--nearest", kind, "--n", 2000
    for name in ("fresh", "copies"):
        training, found[name] = rows(*flags, "--images", f"{name}.npz", "--out", name)
        assert abs(training["copies"] - 0.05) < 0.005 and training["smallest"] > 0
    assert found["copies"]["copies"] == 1 and found["copies"]["median"] == 0
    assert 0.01 < found["fresh"]["copies"] < 0.10
    with open(tmp_path / f"copies/nearest-{kind}.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == "copies.npz"]
    assert len(lines) == 500 and all(int(x["neighbour"]) == int(x["item"]) + 500 for x in lines)


@pytest.mark.parametrize("lpips_files", ["alex"], indirect=True)
def test_lpips_finds_copies_among_the_training_images(lpips_files, rows, tmp_path):
    *_, (linear, trunk) = lpips_files
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "training.npz", arr_0=pixels)
    pixels[3:] = 255 - pixels[3:]
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    flags = "--images", "samples.npz", "--reference", "training.npz", "--nearest", "lpips", "--lpips-weights"
    row = rows(*flags, linear, trunk, "--out", "out")[-1]
    assert row["copies"] == 3 / 12 and row["smallest"] < 1e-9 and "LPIPS 0.1" in row["protocol"]["metric"]
    assert Image.open(tmp_path / "out/nearest-lpips-samples.npz.png").width >= 256


def test_embeddings_at_temperature_0_are_the_mean_alone(runs, rows):
    others, gaussian, ours = rows("--embeddings", "--n", 12, "--temperature", 0)
    methods = [row["method"] for row in (others, gaussian, ours)]
    assert methods == ["training", "Gaussian", "2sdm"] and 0 < others["frechet"] and 0 < gaussian["frechet"]
    saved = twosdm.load_checkpoint(runs / "shapes/image/checkpoint.pt")
    images = twosdm.load_images(train.TrainConfig(**saved["config"]))
    kept = np.random.default_rng(0).permutation(len(images))[12:]
    with torch.no_grad():
        y = twosdm.unpack_embedder(saved["embedder"])(images.batch(kept)).double()
    mean = twosdm.load_checkpoint(runs / "shapes/prior/checkpoint.pt")["y_mean"].double()
    expected = (y.mean(0) - mean).square().sum() + torch.cov(y.T).trace()              # of a point: C = 0
    assert ours["frechet"] == pytest.approx(float(expected), rel=1e-5)
    assert ours["median_distance"] == pytest.approx(float((y - mean).norm(dim=1).min()), rel=1e-5)


def test_history_has_a_value_for_each_snapshot_and_for_the_end_of_the_run(runs, rows, tmp_path):
    found = rows("--history", "--n", 20, "--out", "out")
    expected = [(method, n) for method in ("2sdm", "baseline") for n in (16, 32, 48)]
    assert [(row["method"], row["images"]) for row in found] == expected
    plain = rows("--method", "2sdm", "--n", 20)[-1]
    assert plain["fid"] == pytest.approx(found[2]["fid"], rel=1e-12)
    with open(tmp_path / "out/history.csv") as file:
        assert [float(line["fid"]) for line in csv.DictReader(file)] == [row["fid"] for row in found]
    (runs / "shapes/image/snapshot-0000000048.pt").unlink()   # as if the run had been stopped between two
    again = rows("--history", "--method", "2sdm", "--n", 20, "--out", "out")
    assert [row["images"] for row in again] == [16, 32, 48] and again[2]["fid"] == plain["fid"]


# ---------------------------------------------------------------------------------------- tables and figures


def result(method, fid, seed, protocol=(), **changes):
    """A row of results.jsonl as evaluate.py writes it."""
    row = dict(
        method=method, fid=fid, sfid=10.0, precision=0.5, recall=0.25, y="clip", y_dim=64, steps=18,
        image_steps=18, train_seed=seed, tags=[], guidance=1.0, temperature=1.0, images=44,
        timing=dict(ms_per_image=20.0, prior_share=0.03),
        protocol=dict(dataset="shapes", n_generated=100) | dict(protocol))
    return row | {"is": 3.0} | changes


def write_results(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def lines(call, tmp_path):
    """lines(*files) -> the lines of evaluate.py --tables, each a list of its cells."""
    def made(*files):
        code, out, err = call(evaluate, "--tables", *files, cwd=tmp_path)
        assert code == 0, err
        return [line.strip("|").replace(" ", "").split("|") for line in out.splitlines()]

    return made


def test_tables_average_training_seeds_and_keep_variants_apart(lines, tmp_path):
    fids = dict(baseline=8.0, oracle=1.0)
    fids["2sdm"] = 2.0
    rows = [result("2sdm", 99.0, 0)]                          # repeated: the last one counts
    rows += [result(method, fid + seed, seed) for seed in (0, 1, 2) for method, fid in fids.items()]
    rows.append(result("2sdm", 5.0, 0, y="kmeans:64"))
    again = result("2sdm", 2.0, 0, timing=None)               # from the cache, of one metric
    rows.append({name: x for name, x in again.items() if name not in ("is", "sfid", "precision", "recall")})
    rows.append(result("2sdm", 0, 0, dict(metric="pixels")))  # of --nearest
    path = write_results(tmp_path / "runs/shapes/results.jsonl", rows)
    with open(path, "a") as file:
        file.write('null\n{"method": "2sd')                   # cut short by a kill
    gains = [100 * (1 - (2 + s) / (8 + s)) for s in range(3)]
    gain = f"{np.mean(gains):.1f}±{np.std(gains, ddof=1):.1f}"
    mean = ["3.0±0.0", "0.500±0.000", "0.250±0.000", "3.00±1.00", "10.00±0.00", "20.0±0.0",
            "0.030±0.000"]
    one = ["3.0", "0.500", "0.250", "5.00", "10.00", "20.0", "0.030"]
    found = lines()
    assert ["2SDM", "clip", *mean, gain, "3"] in found
    assert ["2SDM", "kmeans:64", *one, "37.5", "1"] in found


def test_unlike_evaluations_are_neither_averaged_nor_compared(lines, tmp_path):
    a = [result("2sdm", 2.0, 0, networks="a"), result("2sdm", 4.0, 0, dict(weights="others")),
         result("baseline", 8.0, 0), result("baseline", 7.0, 0, images=11)]
    retrained = result("2sdm", 3.0, 0, networks="b")
    del retrained["is"]
    a = write_results(tmp_path / "a.jsonl", [*a, retrained])
    b = write_results(tmp_path / "b.jsonl", [result("2sdm", 6.0, 0)])
    found = {tuple(line[:3]): line for line in lines(a, b) if line[0] in ("2SDM", "EDM")}
    assert len(found) == 4
    assert found["2SDM", "44", "–"][3:7] == ["3.0", "0.500±0.000", "0.250±0.000", "4.50±2.12"]
    assert found["2SDM", "44", "–"][-2:] == ["62.5", "2"]
    assert found["2SDM", "44", "others"][6] == "4.00"


def test_figure_4_has_a_curve_for_each_reduction_and_budget(call, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [result("oracle", 9 - d + 5 * (seen == 11), 0, y=f"pca:{d}", images=seen)
            for d in (1, 2, 4) for seen in (11, 44)]
    rows += [result("oracle", 3.0, 0), result("oracle", 4.0, 0, y="kmeans:16"), result("2sdm", 1.0, 0)]
    rows += [result("baseline", 9.5, 0, y_dim=0)]
    write_results(tmp_path / "runs/shapes/results.jsonl", rows)
    assert call(evaluate, "--figure", 4, cwd=tmp_path)[0] == 0
    assert Image.open(tmp_path / "runs/figure-4.png").width > 500
    with open(tmp_path / "runs/figure-4.csv") as file:
        points = {(line["method"], int(line["dims"])): float(line["fid"]) for line in csv.DictReader(file)}
    large, small = "shapes, pca, images 44", "shapes, pca, images 11"
    assert [points[large, d] for d in (0, 1, 2, 4, 64)] == [9.5, 8, 7, 5, 3]
    assert [points[small, d] for d in (1, 2, 4)] == [13, 12, 10]
    assert points["shapes, kmeans, images 44", 16] == 4 and len(points) == 9
