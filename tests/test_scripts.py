"""The scripts as a user runs them, on tiny settings: training, resuming, sampling, evaluating, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT, TINY, refused

import evaluate
import sample
import train
import twosdm

def tensors(checkpoint):
    """Every tensor of a checkpoint with its place: weights, averages and optimiser."""
    found = {}

    def walk(value, place):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{place}/{key}")
        elif torch.is_tensor(value):
            found[place] = value

    walk({k: checkpoint[k] for k in ("net", "ema", "optimizer")}, "")
    return found


def same_bits(a, b):
    a, b = (twosdm.load_checkpoint(path) for path in (a, b))
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys() and len(one) > 20 and a["seen"] == b["seen"]
    return all(torch.equal(one[k], two[k]) for k in one)


def test_training_leaves_checkpoints_logs_and_pictures_and_says_when_all_is_done(trained, call):
    for stage in twosdm.STAGES:
        folder = trained / "runs" / "shapes" / stage
        checkpoint = twosdm.load_checkpoint(folder / "checkpoint.pt", stage=stage)
        assert checkpoint["seen"] == 48
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines] == [16, 32, 48]
        assert all(line["nonfinite"] == 0 and line["loss"] > 0 and line["gradient_norm"] > 0
                   for line in lines)
        if stage == "embedder":
            assert set(lines[-1]["linear_probe"]) == set(twosdm.ATTRIBUTES)
    for stage in ("image", "baseline"):
        assert (trained / "runs" / "shapes" / stage / "samples-000000048.png").exists()
    code, out, err = call(train, *TINY, cwd=trained)
    assert code == 0 and out.count("done, 48 images seen") == 4


@pytest.mark.parametrize("stage", ["embedder", "prior", "image"])
def test_stopping_and_resuming_changes_no_bit(trained, call, tmp_path, stage):
    """N + resume + N steps equal 2N steps; the run's length is the only difference."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "shapes" / stage)
    for images in (24, 48):
        assert call(train, *TINY, "--stage", stage, "--images", images, cwd=tmp_path)[0] == 0
    parts = [folder / "runs" / "shapes" / stage / "checkpoint.pt" for folder in (trained, tmp_path)]
    if stage == "embedder":                           # its scale is measured at the end of each part
        assert twosdm.load_checkpoint(parts[1])["seen"] == 48
    assert same_bits(*parts)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_continues_as_if_nothing_had_happened(trained, call, tmp_path, kind):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "shapes" / "baseline")
    command = [sys.executable, ROOT / "train.py", *TINY, "--stage", "baseline", "--images", "4000"]
    log = tmp_path / "runs" / "shapes" / "baseline" / "log.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(kind)
    err = process.communicate()[1]
    path = log.parent / "checkpoint.pt"
    seen = twosdm.load_checkpoint(path)["seen"]
    assert 0 < seen < 4000
    if kind != signal.SIGKILL:
        assert (process.returncode == 130 and "the same command goes on from there" in err
                and "Traceback" not in err)
    total = seen + 16
    assert call(train, *TINY, "--stage", "baseline", "--images", total, cwd=tmp_path)[0] == 0
    images = [json.loads(line)["images"] for line in log.read_text().splitlines()]
    assert images == sorted(set(images)) and images[-1] == total
    whole = tmp_path / "whole"
    assert call(train, *TINY, "--stage", "baseline", "--images", total, "--runs", whole, cwd=tmp_path)[0] == 0
    assert same_bits(path, whole / "shapes" / "baseline" / "checkpoint.pt")


def test_two_processes_train_and_sample_what_one_does(trained, call, tmp_path):
    def in_two(name, *args):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
             ROOT / f"{name}.py", *map(str, args)], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | dict(OMP_NUM_THREADS="1"))

    result = in_two("train", *TINY)
    assert result.returncode == 0 and result.stdout.count("Next:") == 1, result.stderr
    for stage in twosdm.STAGES:
        logs = [[json.loads(line) for line in (folder / "runs/shapes" / stage / "log.jsonl").open()]
                for folder in (trained, tmp_path)]
        assert len(logs[0]) == len(logs[1]) == 3
        for one, two in zip(*logs):
            assert abs(one["loss"] - two["loss"]) <= 1e-6 * one["loss"]
            assert abs(one["gradient_norm"] - two["gradient_norm"]) <= 1e-5 * one["gradient_norm"]
    flags = ["--runs", trained / "runs", "--n", 5, "--batch", 2, "--npz"]
    assert in_two("sample", *flags, "--out", "two").returncode == 0
    assert call(sample, *flags, "--out", "one", cwd=tmp_path)[0] == 0
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_one_folder_is_trained_by_one_process_at_a_time(trained, call, tmp_path):
    folder = tmp_path / "runs" / "shapes" / "embedder"
    folder.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
                               "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
                               folder / "lock"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        refused(call(train, *TINY, cwd=tmp_path), "another process", "--runs")
    finally:
        holder.kill()


def test_accumulation_has_the_loss_of_the_whole_batch(trained, call, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "shapes" / "image")
    assert call(train, *TINY, "--stage", "image", "--batch-gpu", 3, cwd=tmp_path)[0] == 0
    logs = [[json.loads(line)["loss"]
             for line in (folder / "runs/shapes/image/log.jsonl").read_text().splitlines()]
            for folder in (trained, tmp_path)]
    assert np.allclose(*logs, rtol=1e-4)


# Of latents: a channel more at both ends, 9·192 weights each and a bias; and the seven blocks with attention
# of each level, 4c² + 6c weights, are those of 32, 16 and 8 pixels, here of 192, 384 and 576 channels.
LATENT = 2 * 9 * 192 + 1 - 7 * (4 * (768**2 - 192**2) + 6 * (768 - 192))
# Spec: (batch, lr, dropout, augment, EMA half-life, images, arch, parameters of image model and of baseline).
PAPER = {
    "afhq": (256, 2e-4, 0.25, 0.15, 500_000, 25_000_000, "ddpm++", 61_871_235, 61_805_571),
    "ffhq": (256, 2e-4, 0.05, 0.15, 500_000, 25_000_000, "ddpm++", 61_871_235, 61_805_571),
    "cifar10": (512, 1e-3, 0.13, 0.12, 500_000, 200_000_000, "ddpm++", 55_733_891 + (1 + 10 + 512) * 128,
                55_733_891 + (1 + 10) * 128),
    "imagenet": (128, 1e-4, 0.10, 0.0, 500_000, 25_000_000, "adm", 295_524_483, 295_131_267),
    "imagenet-class": (128, 1e-4, 0.10, 0.0, 500_000, 25_000_000, "adm", 296_292_483, 295_899_267),
    "imagenet-latent": (128, 1e-4, 0.10, 0.0, 500_000, 25_000_000, "adm", 296_292_483 + LATENT,
                        295_899_267 + LATENT)}


@pytest.mark.parametrize("dataset", PAPER)
def test_dry_run_prints_the_papers_settings_with_their_sources_and_counts(dataset, tmp_path, call):
    batch, lr, dropout, augment, half_life, images, arch, image, baseline = PAPER[dataset]
    for stage, parameters in (("image", image), ("baseline", baseline)):
        code, out, err = call(train, "--dataset", dataset, "--stage", stage, "--dry-run", cwd=tmp_path)
        assert code == 0 and not any(tmp_path.iterdir())
        settings, = json.loads(out)
        value = {name: entry["value"] for name, entry in settings.items()}
        assert all(entry["source"] for entry in settings.values())
        assert value["parameters"] == parameters
        shown = (value["batch"], value["lr"], value["dropout"], value["augment"])
        assert shown == (batch, lr, dropout, augment)
        assert (value["ema_half_life"], value["images"], value["arch"]) == (half_life, images, arch)
        assert (value["lr_ramp"], value["ema_ramp"], value["steps"], value["churn"]) == (10**7, 0.05, 40, 50)
        assert value["resolution"] == {"cifar10": 32, "imagenet-latent": 256}.get(dataset, 64)
        assert value["a"] == ("none" if dataset in ("afhq", "ffhq", "imagenet") else "class")
        assert (value["sigma_data"], value["p_mean"], value["p_std"]) == (0.5, -1.2, 1.2)
        assert (value["sigma_min"], value["sigma_max"], value["rho"]) == (0.002, 80, 7)
        assert value["s_noise"] == 1.007
        assert (value["adam_betas"], value["adam_eps"]) == ([0.9, 0.999], 1e-8)
        sizes = (value["width"], tuple(value["mults"]), value["blocks"], tuple(value["attention"]))
        assert sizes == ((192, (1, 2, 3, 4), 3, (32, 16, 8)) if arch == "adm" else
                         (128, (2, 2, 2) if dataset == "cifar10" else (1, 2, 2, 2), 4, (16,)))
    code, out, err = call(train, "--dataset", dataset, "--stage", "prior", "--dry-run", cwd=tmp_path)
    settings, = json.loads(out)
    prior = [settings[name]["value"] for name in ("batch", "lr", "prior_width", "prior_depth", "prior_heads")]
    assert prior == [256, 1e-4, 512, 6, 8] and settings["lr"]["source"] == "authors"
    assert settings["augment"]["value"] == augment


def test_the_authors_recipe_is_theirs_where_it_is_known(tmp_path, call):
    for dataset in ("afhq", "ffhq"):
        config = twosdm.configure(dataset, "image", recipe="authors")
        assert (config.batch, config.lr, config.dropout, config.augment) == (128, 1e-4, 0.05, 0.15)
        assert twosdm.sources(dataset, "image", recipe="authors")["dropout"] == "authors"
        assert twosdm.configure(dataset, "prior", recipe="authors").lr == 1e-4
        chosen = twosdm.sources(dataset, "image", recipe="authors", dropout=0.3)
        assert chosen["dropout"] == "you" and chosen["batch"] == "authors"
    refused(call(train, "--dataset", "imagenet", "--recipe", "authors", cwd=tmp_path), "--recipe authors")


def test_short_runs_scale_what_grows_with_the_length():
    short = twosdm.configure("afhq", "image", short=True, images=250_000)
    assert (short.lr_ramp, short.ema_half_life, short.preview, short.save) == (100_000, 5_000, 10_000, 5_000)
    kept = twosdm.configure("afhq", "image", short=True, images=250_000, lr_ramp=7)
    assert kept.lr_ramp == 7 and kept.ema_half_life == 5_000
    longer = twosdm.configure("afhq", "image", short=True, images=500_000_000)
    assert (longer.lr_ramp, longer.ema_half_life) == (10_000_000, 500_000)


def test_help_shows_the_defaults_of_the_chosen_stage(tmp_path, call):
    code, out, err = call(train, "--dataset", "afhq", "--stage", "prior", "--help", cwd=tmp_path)
    assert code == 0 and "(default: 0.0001)" in out and "(default: afhq)" in out
    for module in (sample, evaluate):
        assert call(module, "--help", cwd=tmp_path)[0] == 0


def test_samples_are_images_a_grid_and_an_array_and_the_same_for_every_batch(trained, call, tmp_path):
    common = ["--n", 5, "--runs", trained / "runs", "--npz"]
    for method in ("2sdm", "oracle", "baseline"):
        out = tmp_path / method
        code, printed, err = call(sample, *common, "--method", method, "--out", out, cwd=tmp_path)
        assert code == 0 and Image.open(printed.strip()).width >= 512
        array = np.load(out / "samples.npz")["arr_0"]
        assert array.shape == (5, 8, 8, 3) and array.dtype == np.uint8
        for i in range(5):
            assert np.array_equal(np.asarray(Image.open(out / f"{i:06d}.png")), array[i])
    again = tmp_path / "again"
    assert call(sample, "--n", 3, "--seed", 2, "--batch", 1, "--runs", trained / "runs", "--out", again,
                "--npz", cwd=tmp_path)[0] == 0
    difference = (np.load(again / "samples.npz")["arr_0"].astype(int)
                  - np.load(tmp_path / "2sdm/samples.npz")["arr_0"][2:])
    assert np.abs(difference).max() <= 1


def test_sampling_continues_and_never_overwrites(trained, call, tmp_path):
    common = ["--runs", trained / "runs", "--out", tmp_path / "out"]
    assert call(sample, *common, "--n", 2, cwd=tmp_path)[0] == 0
    stamp = (tmp_path / "out" / "000000.png").stat().st_mtime_ns
    assert call(sample, *common, "--n", 4, cwd=tmp_path)[0] == 0
    assert (tmp_path / "out" / "000000.png").stat().st_mtime_ns == stamp
    assert (tmp_path / "out" / "000003.png").exists()
    refused(call(sample, *common, "--steps", 3, cwd=tmp_path), "holds something else", "--out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(call(sample, *common[:3], tmp_path / "mine", cwd=tmp_path), "--out")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["thesis.txt"]


def test_evaluation_prints_a_table_and_writes_its_protocol(trained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.WorldFeatures.fit.__func__, "__defaults__", (256, 1, 64))
    code, out, err = call(evaluate, "--n", 20, "--runs", trained / "runs", cwd=tmp_path)
    assert code == 0, err
    lines = out.splitlines()
    assert "not comparable with Inception" in lines[0] and "20 samples against 64" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["real", "2sdm", "oracle", "baseline"]
    assert "Warning: 20 samples for the 64 dimensions of FID" in err
    rows = [json.loads(line) for line in (trained / "runs/shapes/results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["real", "2sdm", "oracle", "baseline"]
    for row in rows:
        assert row["protocol"]["n_generated"] == 20 and row["protocol"]["n_real"] == 64
        assert row["fid"] >= 0 and 0 <= row["precision"] <= 1 <= row["is"]
    again = call(evaluate, "--n", 20, "--runs", trained / "runs", "--json", "-", cwd=tmp_path)
    assert [r["fid"] for r in json.loads(again[1])] == [r["fid"] for r in rows]
    assert "2sdm:" not in again[2]                    # from the cache: nothing was sampled
    assert len((trained / "runs/shapes/results.jsonl").read_text().splitlines()) == 8


def test_the_worlds_classifier_tells_the_attributes(tmp_path):
    """After a fraction of its training it is far better than chance, and its logits are log-probabilities."""
    net = evaluate.WorldFeatures.fit(16, "cpu", size=3000, epochs=2)
    index = torch.arange(500)
    out = net(twosdm.shapes_images(index, 16).permute(0, 3, 1, 2))
    assert (out["pool"].shape == (500, 64) and out["spatial"].shape == (500, 448)
            and out["logits"].shape == (500, 1536))
    assert (out["logits"].exp().sum(1) - 1).abs().max() < 1e-4
    with torch.no_grad():
        for logits, (name, kinds) in zip(net.heads(out["pool"]), twosdm.ATTRIBUTES.items()):
            right = (logits.argmax(1) == twosdm.shapes_attributes(index)[name]).double().mean()
            assert right > 2 / kinds, (name, right)


def photographs(folder, count=12, classes=0):
    """Small JPEGs and PNGs of gradients, in class folders if there are classes."""
    rng = np.random.RandomState(0)
    for i in range(count):
        place = folder / (f"class{i % classes}" if classes else ".")
        place.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 255, 20)[:, None, None] * rng.rand(3) + np.zeros((20, 24, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(place / (f"{i}.png" if i % 2 else f"{i}.jpg"))


def test_any_folder_trains_and_samples_with_classes_and_augmentation(call, tmp_path):
    photographs(tmp_path / "pictures", classes=2)
    tiny = [*TINY, "--dataset", "folder", "--data", tmp_path / "pictures", "--embedder", "pixels",
            "--a", "class", "--views", 2]
    for stage in ("prior", "image", "baseline"):
        code, out, err = call(train, *tiny, "--stage", stage, cwd=tmp_path)
        assert code == 0, err
    for method in ("2sdm", "oracle", "baseline"):
        code, out, err = call(sample, "--n", 3, "--method", method, "--class", 1, cwd=tmp_path)
        assert code == 0 and Image.open(out.strip()), err
    refused(call(sample, "--n", 3, "--class", 2, cwd=tmp_path), "the classes are 0 class0, 1 class1")
    refused(call(train, *tiny, "--stage", "prior", "--images", 96, "--data", tmp_path / "none",
                 cwd=tmp_path), "none")
    photographs(tmp_path / "others", count=7, classes=2)
    refused(call(train, *tiny, "--stage", "image", "--images", 96, "--data", tmp_path / "others",
                 cwd=tmp_path), "trained with other images")


def test_another_embedder_is_refused(trained, call, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/shapes/embedder")
    assert call(train, *TINY, "--stage", "embedder", "--images", 56, cwd=tmp_path)[0] == 0
    refused(call(train, *TINY, "--stage", "image", "--images", 96, cwd=tmp_path),
            "trained with another embedder")
    shutil.rmtree(tmp_path / "runs/shapes/image")
    assert call(train, *TINY, "--stage", "image", cwd=tmp_path)[0] == 0
    refused(call(sample, "--n", 1, cwd=tmp_path), "different images or embeddings")


def test_bad_input_gets_one_sentence(trained, call, tmp_path):
    refused(call(sample, cwd=tmp_path), "python train.py")
    refused(call(evaluate, cwd=tmp_path), "python train.py")
    refused(call(train, "--dataset", "afhq", cwd=tmp_path), "--data")
    refused(call(train, "--data", "pictures", cwd=tmp_path), "--dataset")
    refused(call(train, "--dataset", "nothing", cwd=tmp_path), "shapes")
    refused(call(train, "--stage", "nothing", cwd=tmp_path), "embedder")
    refused(call(train, "--stage", "image", *TINY, cwd=tmp_path), "--stage embedder")
    refused(call(train, "--batch", "0", cwd=tmp_path), "--batch 0")
    refused(call(train, "--images", "-5", cwd=tmp_path), "--images -5")
    refused(call(train, "--lr", "nan", cwd=tmp_path), "--lr")
    refused(call(train, "--images", "many", cwd=tmp_path), "--images")
    refused(call(train, "--device", "abacus", *TINY, cwd=tmp_path), "--device abacus")
    runs = ["--runs", trained / "runs"]
    for flag, value in (("--steps", 1), ("--steps", 0), ("--n", 0), ("--n", -3), ("--batch", 0),
                        ("--churn", -1), ("--churn", "nan"), ("--seed", -1), ("--s-noise", "inf")):
        refused(call(sample, *runs, flag, value, cwd=tmp_path), flag)
    refused(call(sample, *runs, "--class", 0, cwd=tmp_path), "without classes")
    refused(call(evaluate, *runs, "--metrics", "fdi", cwd=tmp_path), "fdi")
    refused(call(sample, *runs, "--method", "oracle", "--checkpoint",
                 trained / "runs/shapes/prior/checkpoint.pt", cwd=tmp_path), "prior", "oracle")
    refused(call(train, *TINY, *runs, "--stage", "image", "--width", 16, cwd=tmp_path), "--width 8, not 16")
    broken = tmp_path / "broken.pt"
    broken.write_bytes((trained / "runs/shapes/image/checkpoint.pt").read_bytes()[:5000])
    refused(call(sample, *runs, "--checkpoint", broken, cwd=tmp_path), "damaged")
    (tmp_path / "file").write_text("")
    refused(call(sample, *runs, "--out", tmp_path / "file", cwd=tmp_path), "file")
    refused(call(sample, *runs, "--out", tmp_path / "file" / "below", cwd=tmp_path), "file")
    refused(call(train, *TINY, "--runs", tmp_path / "file", cwd=tmp_path), "file")


def test_bad_pictures_are_named(call, tmp_path):
    flags = [*TINY, "--dataset", "folder", "--embedder", "pixels", "--stage", "prior", "--views", 1]
    folder = tmp_path / "pictures"
    folder.mkdir()
    refused(call(train, *flags, "--data", folder, cwd=tmp_path), "no images")
    photographs(folder)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    refused(call(train, *flags, "--data", folder, cwd=tmp_path), "7.png", "--skip-bad")
    assert call(train, *flags, "--data", folder, "--skip-bad", cwd=tmp_path)[0] == 0
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(folder / "1.png", "../1.png")
    refused(call(train, *flags, "--data", tmp_path / "evil.zip", "--runs", "other", cwd=tmp_path), "../1.png")


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(trained, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    path = tmp_path / "runs/shapes/image/checkpoint.pt"
    before = path.read_bytes()
    limited = (f"ulimit -f 20; exec '{sys.executable}' '{ROOT / 'train.py'}' "
               f"{' '.join(TINY)} --stage image --images 96")
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert path.read_bytes() == before
