"""evaluate.py as a user runs it: images and references, processes, neighbours, histories, bad input."""
import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT, refused

import evaluate
import sample
import twosdm
from test_metrics import lpips_files, public_layout, weights_file          # noqa: F401 (fixtures)
from twosdm import UserError


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr(evaluate.WorldFeatures.fit.__func__, "__defaults__", (256, 1, 64))


class SmallInception(evaluate.WorldFeatures):
    """In Inception's place where only the plumbing is tested: its metrics take milliseconds."""
    label = evaluate.InceptionFeatures.label

    def __init__(self, weights=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__()
        self.sha256 = "small"
        self.eval()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(evaluate, "InceptionFeatures", SmallInception)


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """A copy of the runs, as evaluations leave their rows there."""
    return shutil.copytree(trained / "runs", tmp_path_factory.mktemp("evaluated") / "runs")


@pytest.fixture
def rows(call, tmp_path):
    """rows(flags) -> what an evaluation writes as --json, after it has ended well."""
    def evaluated(*flags):
        code, out, err = call(evaluate, *flags, "--json", tmp_path / "rows.json", cwd=tmp_path)
        assert code == 0, err
        return json.loads((tmp_path / "rows.json").read_text())

    return evaluated


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two sets of 14 pictures of 20 x 20 as folders a and b and as a.npz and b.npz."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate("ab"):
        pixels = twosdm.shapes_images(torch.arange(14) + 100 * seed, 20).numpy()
        np.savez(folder / f"{name}.npz", arr_0=pixels)
        (folder / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{i:06d}.png")
    return folder


def values(row):
    return {name: row[name] for name in (*evaluate.METRICS, "is_std") if name in row}


# ------------------------------------------------------------------------------------- images and references


def test_a_folder_and_an_array_of_the_same_images_give_the_same_values_also_from_the_cache(
        pictures, weights_file, rows, monkeypatch):
    flags = ["--inception-weights", weights_file, "--batch", 4]
    folder, = rows(*flags, "--images", pictures / "a", "--reference", pictures / "b")
    array, = rows(*flags, "--images", pictures / "a.npz", "--reference", pictures / "b.npz", "--metrics",
                  "fid,is,precision")
    assert len(values(folder)) == 6 and values(folder).items() >= values(array).items()
    assert all(np.isfinite(x) and x >= 0 for x in values(folder).values())
    protocol = folder["protocol"]
    assert [protocol[k] for k in ("n_generated", "n_real", "k", "resolution")] == [14, 14, 3, 20]
    assert protocol["features"] == "Inception 2015-12-05" and len(protocol["weights"]) == 8

    def unwanted(*_):
        raise AssertionError("a cached set was looked at again")

    monkeypatch.setattr(evaluate.InceptionFeatures, "forward", unwanted)
    some, = rows(*flags, "--images", pictures / "a", "--reference", pictures / "b", "--metrics", "is,recall",
                 "--batch", 7)
    assert values(some) == {name: folder[name] for name in ("is", "is_std", "recall")}


def test_a_saved_reference_is_as_good_as_its_images(pictures, small, rows, call, tmp_path):
    direct, = rows("--images", pictures / "a", "--reference", pictures / "b")
    code, out, err = call(evaluate, "--reference", pictures / "b", "--save-reference", "b-ref.npz",
                          cwd=tmp_path)
    assert code == 0 and not out, err
    with np.load(tmp_path / "b-ref.npz") as saved:
        assert set(saved.files) == {"mu", "sigma", "mu_s", "sigma_s", "pool", "n", "weights"}
    by_file, = rows("--images", pictures / "a", "--reference", "b-ref.npz")
    assert values(by_file) == values(direct) and by_file["protocol"]["n_real"] == 14


def test_the_formats_of_edm_and_openai_load(pictures, small, rows, call, tmp_path):
    flags = ["--images", pictures / "a"]
    direct, = rows(*flags, "--reference", pictures / "b")
    call(evaluate, "--reference", pictures / "b", "--save-reference", "ref.npz", cwd=tmp_path)
    ours = np.load(tmp_path / "ref.npz")
    statistics = {name: ours[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "VIRTUAL.npz", **statistics, arr_0=np.load(pictures / "b.npz")["arr_0"])
    openai, = rows(*flags, "--reference", "VIRTUAL.npz")
    assert values(openai) == values(direct)
    np.savez(tmp_path / "edm.npz", mu=ours["mu"], sigma=ours["sigma"])
    code, out, err = call(evaluate, *flags, "--reference", "edm.npz", cwd=tmp_path)
    assert code == 0 and "Left out: sFID, precision, recall" in err
    assert out.splitlines()[1].split() == ["method", "FID", "IS"]
    both, = rows(*flags, "--reference", "edm.npz", "--data", pictures / "b")
    assert values(both) == values(direct)


def test_a_folder_of_samples_is_evaluated_as_the_run_that_drew_it(runs, rows, call, tmp_path):
    own = rows("--runs", runs, "--method", "baseline", "--n", 20)[-1]
    assert call(sample, "--runs", runs, "--method", "baseline", "--n", 20, "--out", "drawn", "--npz",
                cwd=tmp_path)[0] == 0
    drawn, = rows("--runs", runs, "--images", "drawn")        # beside a grid, which is no sample
    assert values(drawn) == pytest.approx(values(own), rel=1e-6)
    assert "world's own classifier" in drawn["protocol"]["features"]
    array, = rows("--runs", runs, "--images", "drawn/samples.npz", "--dataset", "shapes")
    assert values(array) == values(drawn)


def test_mixed_and_broken_pictures_are_as_in_training(pictures, small, rows, call, tmp_path):
    shutil.copytree(pictures / "a", tmp_path / "odd")
    Image.new("LA", (30, 24), (90, 200)).save(tmp_path / "odd" / "grey.png")
    flags = ["--images", "odd", "--reference", pictures / "b"]
    refused(call(evaluate, *flags, cwd=tmp_path), "odd holds images of several sizes", "--resolution")
    assert rows(*flags, "--resolution", 20)[0]["protocol"]["n_generated"] == 15
    (tmp_path / "odd" / "grey.png").write_bytes(b"\x89PNG")
    for _ in range(2):                                        # also when all else is in the cache
        refused(call(evaluate, *flags, cwd=tmp_path), "grey.png", "--skip-bad")
        row, = rows(*flags, "--skip-bad")
        assert row["protocol"]["n_generated"] == 14
    direct, = rows("--images", pictures / "a", "--reference", pictures / "b")
    assert values(row) == pytest.approx(values(direct), rel=1e-5)
    assert not list((tmp_path / "runs").rglob("*.u8"))        # no cache of pixels


def test_what_cannot_be_evaluated_is_refused_in_one_sentence(pictures, small, call, tmp_path):
    pixels = np.load(pictures / "a.npz")["arr_0"]
    mixed = np.empty(2, object)
    mixed[:] = [pixels[0], pixels[1, :9, :9]]
    mu, sigma = np.zeros(64), np.eye(64)
    hole = sigma.copy()
    hole[3, 5] = np.nan
    for name, content, words in (
            ("mixed", dict(arr_0=mixed), ["several sizes"]), ("dtype", dict(arr_0=pixels / 255), ["float64"]),
            ("layout", dict(arr_0=pixels.transpose(0, 3, 1, 2)), ["(14, 3, 20, 20)"]),
            ("nothing", dict(other=mu), ["lacks mu", "other"]), ("half", dict(mu=mu), ["lacks sigma"]),
            ("hole", dict(mu=mu, sigma=hole), ["sigma", "NaN"]),
            ("dims", dict(mu=mu[:9], sigma=sigma[:9, :9]), ["(9,)", "another network"]),
            ("weights", dict(mu=mu, sigma=sigma, weights="01234567"), ["01234567"]),
            ("size", dict(arr_0=pixels[:, :9, :9]), ["9x9, not 20x20"])):
        np.savez(tmp_path / f"{name}.npz", **content)
        refused(call(evaluate, "--images", pictures / "a", "--reference", f"{name}.npz", cwd=tmp_path),
                f"{name}.npz", *words)
    (tmp_path / "cut.npz").write_bytes((pictures / "a.npz").read_bytes()[:500])
    for name, words in ("cut", ["cut.npz"]), ("hole", ["arr_0"]), ("absent", ["absent.npz"]):
        refused(call(evaluate, "--images", f"{name}.npz", "--reference", pictures / "b", cwd=tmp_path),
                *words)
    refused(call(evaluate, "--images", pictures / "a", cwd=tmp_path), "--reference")
    np.savez(tmp_path / "few.npz", arr_0=pixels[:3])
    refused(call(evaluate, "--images", "few.npz", "--reference", pictures / "b", cwd=tmp_path),
            "k = 3 generated images, got 3")
    refused(call(evaluate, "--images", pictures / "a", "--history", cwd=tmp_path), "--history")
    refused(call(evaluate, "--images", pictures / "a", "--reference", "dims.npz", "--nearest", "pixel",
                 cwd=tmp_path), "dims.npz has no arr_0")


# ------------------------------------------------------------------------------- interruptions and processes


def test_an_interrupted_extraction_goes_on_with_what_is_missing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    network, read = evaluate.WorldFeatures().eval(), []
    network.sha256 = "none"

    def interrupted(spans):
        for span in spans:
            if len(read) == 3:
                read.append("stopped")
                raise KeyboardInterrupt
            read.append(span.start)
            yield pixels[span], []

    source = evaluate.Source("set", 40, 8, ["test"], interrupted)
    flags = network, tmp_path, 10_000, list(evaluate.METRICS["fid"])
    with pytest.raises(KeyboardInterrupt):
        evaluate.features(source, *flags, batch=8)
    continued = evaluate.features(source, *flags, batch=8)
    assert read == [0, 8, 16, "stopped", 24, 32]
    whole = evaluate.features(evaluate.from_pixels("set", pixels, "0"), *flags, batch=8)
    assert all(np.array_equal(continued[name], whole[name]) for name in whole)
    pool = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))["pool"].double().numpy()
    assert abs(whole["mu"] - pool.mean(0)).max() < 1e-6 and abs(whole["sigma"] - np.cov(pool.T)).max() < 1e-6


def test_two_processes_give_the_numbers_of_one(runs, rows, tmp_path):
    flags = ["--runs", "copy", "--n", "20", "--batch", "4", "--method", "2sdm", "baseline"]
    nearest = ["--runs", "copy", "--n", "6", "--batch", "4", "--method", "baseline", "--nearest", "clip"]
    shutil.copytree(runs, tmp_path / "copy")
    evaluate.WorldFeatures.trained(tmp_path / "copy" / "shapes", 8)
    for number, some in enumerate((flags, nearest)):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
             ROOT / "evaluate.py", *some, "--json", f"two-{number}.json"], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0 and done.stdout.count("method") == 1, done.stderr
    shutil.rmtree(tmp_path / "copy" / "shapes" / "features", ignore_errors=True)
    one, two = rows(*flags), json.loads((tmp_path / "two-0.json").read_text())
    assert [row["method"] for row in two] == ["real", "2sdm", "baseline"]
    for one, two in zip(one, two):                            # float32 networks differ in the last bit
        assert values(one) == pytest.approx(values(two), rel=1e-6, abs=1e-9)
    for one, two in zip(rows(*nearest), json.loads((tmp_path / "two-1.json").read_text())):
        assert [one[k] for k in ("copies", "median", "smallest")] == pytest.approx(
            [two[k] for k in ("copies", "median", "smallest")], rel=1e-4)


# ------------------------------------------------------------------------------------ neighbours and history


ARGS = SimpleNamespace(n=None, batch=64, seed=0, skip_bad=False)


@pytest.mark.parametrize("kind", ["pixel", "clip"])
def test_copies_are_all_recognised_and_fresh_images_look_like_chance(kind, runs):
    world = twosdm.shapes_images(torch.arange(2500), 16).numpy()
    training = evaluate.from_pixels("training set", world[:2000], "0")
    fresh = evaluate.from_pixels("fresh", world[2000:], "1")
    copies = evaluate.from_pixels("copies", world[500:1000], "2")
    flags = SimpleNamespace(dataset="shapes", runs=runs, y="clip", prompt=None)
    how = evaluate.embedding(flags, kind, "shapes", {}, torch.device("cpu"))
    (black, *results), edge, _ = evaluate.compare_neighbours(
        SimpleNamespace(**dict(vars(ARGS), n=500)), [(dict(method=s.name), s) for s in (fresh, copies)],
        training, how)
    assert results[1]["copies"] == 1 and (results[1]["distances"] == 0).all()
    assert (results[1]["neighbours"] == np.arange(500, 1000)).all()
    assert 0.01 < results[0]["copies"] < 0.10 and (results[0]["distances"] > 0).all()
    assert abs(black["copies"] - 0.05) < 0.005 and (black["distances"] > 0).all()
    assert (black["neighbours"] != black["items"]).all()


def test_neighbours_are_written_as_pictures_distances_and_a_verdict(runs, call, tmp_path):
    code, out, err = call(evaluate, "--runs", runs, "--nearest", "clip", "--n", 9, "--out", tmp_path / "out",
                          cwd=tmp_path)
    assert code == 0, err
    names = [f"nearest-clip-{method}.png" for method in ("real", "2sdm", "oracle", "baseline")]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"nearest-clip.csv", *names}
    assert Image.open(tmp_path / "out" / names[0]).width >= 800
    table = list(csv.DictReader((tmp_path / "out" / "nearest-clip.csv").open()))
    assert len(table) == 5 * 9 and {row["method"] for row in table} >= {"training", "2sdm"}
    assert re.search(r"^2sdm +[\d.]+ +[\d.]+ +[\d.]+$", out, re.M)
    last = json.loads((runs / "shapes" / "results.jsonl").read_text().splitlines()[-1])
    assert last["nearest"] == "clip" and 0 <= last["copies"] <= 1 and last["protocol"]["n_generated"] == 9
    refused(call(evaluate, "--runs", runs, "--nearest", "lpips", cwd=tmp_path), "31x31", "--nearest clip")


def test_embeddings_at_temperature_0_are_the_mean_alone(runs, call, tmp_path):
    flags = ["--runs", runs, "--embeddings", "--n", 12, "--json", "-"]
    before = (runs / "shapes/results.jsonl").read_text() if (runs / "shapes/results.jsonl").exists() else ""
    for temperature in (1, 0):
        code, out, err = call(evaluate, *flags, "--temperature", temperature, cwd=tmp_path)
        assert code == 0, err
        others, gaussian, ours = json.loads(out)
        assert (others["method"], gaussian["method"], ours["method"]) == ("training", "Gaussian", "2sdm")
        assert 0 < others["frechet"] and 0 < gaussian["frechet"]
    saved = twosdm.load_checkpoint(runs / "shapes/image/checkpoint.pt")
    config = dataclasses.replace(twosdm.TrainConfig(**saved["config"]), runs=str(runs))
    images = twosdm.load_images(config)
    rows = np.random.default_rng(0).permutation(len(images))[12:]
    with torch.no_grad():
        y = twosdm.unpack_embedder(saved["embedder"], 16)(images.batch(np.sort(rows))).double()
    mean = twosdm.load_checkpoint(runs / "shapes/prior/checkpoint.pt")["y_mean"].cpu().double()
    assert ours["protocol"]["n_real"] == len(rows) and ours["protocol"]["n_generated"] == 12
    expected = (y.mean(0) - mean).square().sum() + torch.cov(y.T).trace()              # of a point: C = 0
    assert ours["frechet"] == pytest.approx(float(expected), rel=1e-5)
    assert ours["median_distance"] == pytest.approx(float((y - mean).norm(dim=1).min()), rel=1e-5)
    assert ours["rms"] == pytest.approx(float(mean.square().mean().sqrt()), rel=1e-5)
    assert len((runs / "shapes/results.jsonl").read_text()[len(before):].splitlines()) == 6
    refused(call(evaluate, *flags, "--method", "oracle", cwd=tmp_path), "--embeddings", "--method")
    refused(call(evaluate, *flags, "--n", 3, cwd=tmp_path), "--embeddings", "--n")


def test_history_has_a_value_for_each_snapshot_of_each_method(runs, call, tmp_path, monkeypatch):
    flags = ["--runs", runs, "--history", "--n", 20, "--metrics", "fid,is", "--out", tmp_path / "out"]
    code, out, err = call(evaluate, *flags, cwd=tmp_path)
    assert code == 0, err
    table = list(csv.DictReader((tmp_path / "out" / "history.csv").open()))
    assert [(row["method"], int(row["images"])) for row in table] == [
        (method, n) for method in ("2sdm", "baseline") for n in (16, 32, 48)]
    shown = out[out.index("FID at"):].splitlines()
    assert shown[1].split() == ["images", "seen", "2sdm", "baseline"]
    assert [line.split()[0] for line in shown[2:5]] == ["16", "32", "48"]
    assert float(shown[4].split()[1]) == pytest.approx(float(table[2]["fid"]), abs=1e-3)
    plain = json.loads(call(evaluate, *flags[:2], "--method", "2sdm", "--n", 20, "--json", "-",
                            cwd=tmp_path)[1])[1]
    assert plain["fid"] == pytest.approx(float(table[2]["fid"]), rel=1e-12)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    shutil.rmtree(tmp_path / "out")
    code, out, err = call(evaluate, *flags, cwd=tmp_path)
    assert code == 0 and "pip install matplotlib" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["history.csv"]
    refused(call(evaluate, *flags, "--checkpoint", "x.pt", cwd=tmp_path), "--checkpoint")


def result(method, fid, seed, **changes):
    """A row of results.jsonl as evaluate.py writes it."""
    return dict(dict(
        method=method, fid=fid, sfid=10.0, precision=0.5, recall=0.25, y="clip", y_dim=64, steps=18,
        image_steps=18, train_seed=seed, tags=[], guidance=1.0, temperature=1.0, machine="cpu",
        images_seen={"prior": 9, "image": 44}, timing=dict(ms_per_image=20.0, prior_share=0.03),
        protocol=dict(dataset="shapes", n_generated=100)), **{"is": 3.0}, **changes)


def write_results(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_papers_table_3_follows_from_its_fids():
    """As far as they are rounded."""
    published = {"afhq": (48.2, 55.6, 86.6), "ffhq": (26.0, 31.9, 81.3), "imagenet-class": (31.5, 25.6, 123)}
    for dataset, expected in published.items():
        (name, *fids, gain, best, ratio), = evaluate.improvements(dataset, {})
        shown = [float(x.removesuffix(" %")) for x in (gain, best, ratio)]
        assert shown == pytest.approx(expected, abs=0.25, rel=0.005)


def test_tables_average_training_seeds_and_keep_variants_apart(call, tmp_path):
    rows = [result(method, fid + seed, seed) for seed in (0, 1, 2) for method, fid in (
        ("baseline", 8.0), ("2sdm", 2.0), ("oracle", 1.0))]
    rows.insert(0, result("2sdm", 99.0, 0))                            # repeated: the last one counts
    rows.append(result("2sdm", 50.0, 0, images_seen={"prior": 9, "image": 11}))        # of a history
    rows.append(result("2sdm", 5.0, 0, y="kmeans:64"))
    rows.append(result("2sdm", 2.5, 0, image_steps=17))
    rows.append(result("2sdm", 70.0, 0, steps=9, image_steps=9))       # another table
    again = result("2sdm", 2.0, 0, timing=None)                        # from the cache, of one metric
    rows.append({k: x for k, x in again.items() if k not in ("is", "sfid", "precision", "recall")})
    rows.append(result("baseline", 30.0, None, dataset="edm-ffhq"))    # a published network
    rows.append(result("2sdm", 1.5, 1, guidance=2.0))
    rows.append(result("2sdm", 0, 0))
    rows[-1]["protocol"] = dict(rows[-1]["protocol"], metric="pixels in [0, 1]")       # of --nearest
    write_results(tmp_path / "runs/shapes/results.jsonl", rows)
    with open(tmp_path / "runs/shapes/results.jsonl", "a") as file:
        file.write('null\n{"method": "2sd')                            # cut short by a kill
    evaluate.append(tmp_path / "runs/shapes", result("2sdm", 7.0, 0, tags=["after"]))
    code, out, err = call(evaluate, "--tables", cwd=tmp_path)
    assert code == 0 and "training seeds 0, 1, 2" in out
    assert "| 2SDM | 3.0 ± 0.0 | 0.500 ± 0.000 | 0.250 ± 0.000 | 3.00 ± 1.00 | 10.00 ± 0.00 | 3 |" in out
    for name in ("Class-cond (K = 64)", "2SDM (17 steps)", "2SDM (W = 2)", "2SDM (after)"):
        assert f"| {name} | 3.0 | 0.500 | 0.250 |" in out
    gains = [100 * (1 - (2 + s) / (8 + s)) for s in range(3)]
    assert f"{np.mean(gains):.1f} ± {np.std(gains, ddof=1):.1f} %" in out
    assert "| 2SDM + oracle | 20.0 ± 0.0 | 3.0 ± 0.0 % | 2.00 ± 1.00 |" in out              # Table 5


def test_unlike_evaluations_are_neither_averaged_nor_compared(call, tmp_path):
    def other(row, **protocol):
        return dict(row, protocol=dict(row["protocol"], **protocol))

    a = [result("baseline", 8.0, 0), result("2sdm", 2.0, 0, networks="a"),
         other(result("2sdm", 4.0, 0), weights="others"), other(result("real", 1.0, None), weights="others"),
         other(result("2sdm", 5.0, 0), n_real=500), other(result("baseline", 7.0, 0), seed=5000)]
    b = [result("2sdm", 6.0, 0), result("baseline", 10.0, 1, images_seen={"baseline": 11})]
    again = {"method": "2sdm", "fid": 3.0, "networks": "b", "train_seed": 0, "steps": 18, "image_steps": 18,
             "images_seen": {"prior": 9, "image": 44}, "protocol": result("2sdm", 0, 0)["protocol"]}
    files = [write_results(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", [*a, again]), ("b", b))]
    code, out, err = call(evaluate, "--tables", *files, cwd=tmp_path)
    assert code == 0 and out.count("Tables 1 and 4") == 4
    assert "| 2SDM | 3.0 | 0.500 | 0.250 | 4.50 ± 2.12 | 10.00 | 2 |" in out   # retrained: nothing of before
    assert re.search(r"\| EDM \| .* \| 8.00 \| 10.00 \| 1 \|", out) and "| EDM after 11 images |" in out
    assert "| here | 8.00 | 3.00 | – | 62.5 % |" in out                       # of one file and one length
    assert out.index("| 4.00 |") < out.index("| other real images |")
    assert out.count("other real images | 3.0 | 0") == 1
    rows = [result("oracle", 50.0, 0), result("oracle", 90.0, 0, steps=5, image_steps=5)]
    write_results(tmp_path / "runs/shapes/results.jsonl", rows)
    code, out, err = call(evaluate, "--figure", 4, cwd=tmp_path)
    assert code == 0
    table = list(csv.DictReader(open(tmp_path / "runs/figure-4.csv")))
    assert sorted(float(row["fid"]) for row in table) == [50, 90] and len({row["y"] for row in table}) == 2


def test_figure_4_has_a_curve_for_each_reduction_and_budget(call, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [result("oracle", 9 - d + 5 * (seen == 11), 0, y=f"pca:{d}", images_seen={"image": seen})
            for d in (1, 2, 4) for seen in (11, 44)]
    rows += [result("oracle", 3.0, 0), result("baseline", 9.5, 0, images_seen={"baseline": 44}),
             result("oracle", 4.0, 0, y="kmeans:16")]
    write_results(tmp_path / "runs/shapes/results.jsonl", rows)
    code, out, err = call(evaluate, "--figure", 4, cwd=tmp_path)
    assert code == 0 and Image.open(tmp_path / "runs/figure-4.png").width > 500
    table = list(csv.DictReader(open(tmp_path / "runs/figure-4.csv")))
    points = {(row["y"].removeprefix("shapes, "), int(row["images"]), int(row["dims"])): float(row["fid"])
              for row in table}
    assert [points["pca", 44, d] for d in (0, 1, 2, 4, 64)] == [9.5, 8, 7, 5, 3]
    assert [points["pca", 11, d] for d in (1, 2, 4)] == [13, 12, 10]
    assert points["kmeans", 44, 16] == 4 and points["kmeans", 44, 1] == 9.5    # EDM: of one cluster


@pytest.mark.parametrize("lpips_files", ["alex"], indirect=True)
def test_lpips_finds_copies_among_the_training_images(lpips_files, call, tmp_path):
    _, (linear, trunk), *_ = lpips_files
    for name in ("training", "samples"):
        (tmp_path / name).mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "training" / f"{i}.png")
        Image.fromarray(pixels if i < 3 else 255 - pixels).save(tmp_path / "samples" / f"{i}.png")
    code, out, err = call(
        evaluate, "--images", "samples", "--reference", "training", "--nearest", "lpips", "--lpips-weights",
        linear, trunk, "--out", "out", "--json", "rows.json", cwd=tmp_path)
    assert code == 0, err
    row = json.loads((tmp_path / "rows.json").read_text())[-1]
    assert row["copies"] == 3 / 12 and "LPIPS 0.1" in row["protocol"]["metric"]
    table = list(csv.DictReader((tmp_path / "out/nearest-lpips.csv").open()))
    assert [float(r["distance"]) < 1e-9 for r in table if r["method"] == "samples"].count(True) == 3


def test_a_published_network_is_compared_with_own_ones_and_odd_runs_are_left_out(capsys):
    def pipeline(method, fingerprint, side=8):
        return SimpleNamespace(method=method, data=dict(fingerprint=fingerprint), shape=(side, side, 3))

    published, own, oracle = pipeline("baseline", None), pipeline("2sdm", "a"), pipeline("oracle", "a")
    chosen, asked = SimpleNamespace(method=None, checkpoint=None), SimpleNamespace(method=["joint"])
    assert evaluate.of_one_kind([published, own, oracle], asked) == [published, own, oracle]
    for odd in (pipeline("joint", "b"), pipeline("joint", "a", 16), pipeline("joint", None, 16)):
        assert evaluate.of_one_kind([published, own, odd, oracle], chosen) == [published, own, oracle]
        assert "Left out: joint" in capsys.readouterr().err
        with pytest.raises(UserError, match="one --method at a time"):
            evaluate.of_one_kind([published, own, odd], asked)
