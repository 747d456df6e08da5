"""Training as a user does it, on tiny settings: runs, resuming, kills, two processes, mistakes, bad disks."""
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, photographs, picture, refused, same, start, table

import evaluate
import sample
import train
import twosdm

BASELINE = [*TINY, "--stage", "baseline", "--preview", 0, "--images"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    """(lines of the log, 2): losses and norms of their gradients."""
    return np.array([[line["loss"], line["gradient_norm"]] for line in log_of(folder)])


def assert_same_training(one, two):
    """All the checkpoints below two folders hold the same training, and there are some."""
    paths = [path.relative_to(one) for path in one.rglob("checkpoint.pt")]
    assert paths
    for path in paths:
        a, b = (twosdm.load_checkpoint(folder / path) for folder in (one, two))
        for part in ("seen", "net", "ema", "optimizer"):
            assert same(a[part], b[part]), (path, part)


def with_embedder(trained, runs):
    """A folder of runs in which only the embedder is trained."""
    shutil.copytree(trained / "runs/shapes/embedder", runs / "shapes/embedder")
    return runs


# What a run leaves

def test_training_leaves_checkpoints_logs_and_pictures_and_says_when_all_is_done(trained, call):
    for stage in twosdm.STAGES:
        folder = trained / "runs/shapes" / stage
        checkpoint = folder / "checkpoint.pt"
        assert twosdm.load_checkpoint(checkpoint, stage=stage)["seen"] == 48
        log = log_of(folder)
        assert [line["images"] for line in log] == [16, 32, 48]
        assert not any(line["nonfinite"] for line in log)
        assert (losses_of(folder) > 0).all()
        if stage == "embedder":
            assert set(log[-1]["linear_probe"]) == set(twosdm.ATTRIBUTES)
        counted = [*folder.glob("snapshot-*.pt"), *folder.glob("samples-*.png")]
        assert len(counted) == (4 if stage in ("image", "baseline") else 3)
        for path in counted:                          # there before the checkpoint that counts it
            assert path.stat().st_mtime_ns <= checkpoint.stat().st_mtime_ns
    code, out, err = call(train, *TINY, cwd=trained)
    assert out.count("done, 48 images seen") == 4


@pytest.mark.parametrize("flags", [
    "--stage embedder", "--stage prior --a text --augment 0.5 --views 2", "--stage joint",
    "--stage image --y pca:3 --augment 0.5 --dropout 0.1 --y-dropout 0.5"])
def test_stopping_and_resuming_changes_no_bit(trained, call, tmp_path, flags):
    """N + resume + N steps equal 2N steps; the run's length is the only difference."""
    for name, lengths in dict(whole=[48], parts=[24, 48]).items():
        if "embedder" not in flags:
            with_embedder(trained, tmp_path / name)
        for images in lengths:
            more = [*flags.split(), "--preview", 0, "--images", images, "--runs", name]
            code, out, err = call(train, *TINY, *more, cwd=tmp_path)
            assert code == 0, err
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.0005)


def test_a_run_that_is_stopped_and_killed_continues_as_if_nothing_had_happened(call, tmp_path):
    folder = tmp_path / "runs/shapes/baseline"
    often = ["--log", 8, "--preview", 48]
    for kind, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        before = {*folder.glob("snapshot-*.pt")}
        process = start(train, *BASELINE, 4000, *often, cwd=tmp_path)
        wait_for(lambda: len({*folder.glob("snapshot-*.pt")} - before) > 1)
        if kind == signal.SIGKILL:                    # in the midst of writing something
            wait_for(lambda: list(folder.glob("*.new")))
        os.kill(process.pid, kind)
        process.join()
        assert process.exitcode == code
    said = (tmp_path / "output").read_text()
    assert said.count("the same command goes on from there") == 2
    assert "Traceback" not in said
    seen = twosdm.load_checkpoint(folder / "checkpoint.pt")["seen"]
    assert seen > 64
    for images in range(16, seen + 1, 16):
        assert (folder / f"snapshot-{images:010d}.pt").exists()
    for images in range(48, seen + 1, 48):
        assert (folder / f"samples-{images:09d}.png").exists()
    for runs in ("runs", "whole"):
        assert call(train, *BASELINE, seen + 16, *often, "--runs", runs, cwd=tmp_path)[0] == 0
    assert not list(folder.glob("*.new"))
    assert np.array_equal(losses_of(folder), losses_of(tmp_path / "whole/shapes/baseline"))
    assert_same_training(tmp_path / "runs", tmp_path / "whole")


def test_accumulation_has_the_loss_of_the_whole_batch(trained, call, tmp_path):
    runs = with_embedder(trained, tmp_path / "runs")
    flags = [*TINY, "--stage", "image", "--preview", 0, "--batch-gpu", 3]
    assert call(train, *flags, cwd=tmp_path)[0] == 0
    whole, parts = (losses_of(folder / "shapes/image") for folder in (trained / "runs", runs))
    assert np.allclose(whole, parts, rtol=1e-4)


# Several processes

def start_two(module, *args, cwd):
    """A script in two processes that torchrun might have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(module, *args, cwd=cwd, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                  MASTER_ADDR="127.0.0.1") for rank in "01"]


def exit_codes(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_train_and_sample_what_one_does(trained, call, tmp_path):
    for stage in ("all", "joint"):
        flags = [*TINY, "--images", 24, "--log", 8, "--preview", 0, "--stage", stage, "--runs"]
        assert call(train, *flags, "runs1", cwd=tmp_path)[0] == 0
        assert exit_codes(start_two(train, *flags, "runs2", cwd=tmp_path)) == [0, 0]
    assert (tmp_path / "output").read_text().count("Next:") == 1
    for stage in (*twosdm.STAGES, "joint"):
        one, two = (losses_of(tmp_path / runs / "shapes" / stage) for runs in ("runs1", "runs2"))
        assert len(one) == 3
        assert (abs(two - one) <= np.array([1e-6, 1e-5]) * one).all()
    flags = ["--runs", str(trained / "runs"), "--n", "5", "--batch", "2", "--npz", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         ROOT / "sample.py", *flags, "two"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "two/grid.png\n", done.stderr
    assert call(sample, *flags, "alone", cwd=tmp_path)[0] == 0
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("alone", "two"))
    assert np.array_equal(one, two)


def test_processes_keep_others_off_their_folder_and_stop_together(call, tmp_path):
    folder = tmp_path / "runs/shapes/baseline"
    processes = start_two(train, *BASELINE, 10**6, "--mults", 1, "--save", 10**6, cwd=tmp_path)
    wait_for((folder / "log.jsonl").exists)
    refused(call(train, *BASELINE, 8, cwd=tmp_path), "another process", "--runs")
    processes[1].terminate()
    assert exit_codes(processes) == [130, 130]
    assert "the same command goes on from there" in (tmp_path / "output").read_text()
    assert 0 < twosdm.load_checkpoint(folder / "checkpoint.pt")["seen"] < 10**6


def test_processes_that_would_have_no_images_are_refused(tmp_path):
    first, second = start_two(train, *BASELINE, 8, "--batch", 1, cwd=tmp_path)
    assert exit_codes([first]) == [1]
    second.kill()                                     # it would wait for torchrun to do so
    assert "error: --batch 1 cannot be shared by 2 processes" in (tmp_path / "output").read_text()


# Settings

EDM = dict(lr_ramp=10**7, ema_ramp=0.05, steps=40, churn=50, sigma_data=0.5, p_mean=-1.2, p_std=1.2,
           sigma_min=0.002, sigma_max=80, rho=7, s_noise=1.007, adam_betas=[0.9, 0.999], adam_eps=1e-8,
           ema_half_life=500_000, images=25_000_000, resolution=64, a="none")
DDPMPP = dict(EDM, arch="ddpm++", width=128, mults=[1, 2, 2, 2], blocks=4, attention=[16], batch=256, lr=2e-4,
              augment=0.15)
ADM = dict(EDM, arch="adm", width=192, mults=[1, 2, 3, 4], blocks=3, attention=[32, 16, 8], batch=128,
           lr=1e-4, augment=0, dropout=0.10)
PAPER = {                                             # settings; parameters of image model and of baseline
    "afhq": (dict(DDPMPP, dropout=0.25), 61_871_235, 61_805_571),
    "ffhq": (dict(DDPMPP, dropout=0.05), 61_871_235, 61_805_571),
    "cifar10": (dict(DDPMPP, batch=512, lr=1e-3, dropout=0.13, augment=0.12, images=200_000_000,
                     mults=[2, 2, 2], resolution=32, a="class"),
                55_800_835, 55_735_299),
    "imagenet": (ADM, 295_524_483, 295_131_267),
    "imagenet-class": (dict(ADM, a="class"), 296_292_483, 295_899_267),
    "imagenet-latent": (dict(ADM, a="class", resolution=256), 280_788_868, 280_395_652),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_a_dry_run_prints_the_papers_settings_with_their_sources_and_counts(dataset, tmp_path, call):
    settings, image, baseline = PAPER[dataset]
    prior = dict(batch=256, lr=1e-4, prior_width=512, prior_depth=6, prior_heads=8,
                 augment=settings["augment"])
    for stage, expected in dict(image=dict(settings, parameters=image), prior=prior,
                                baseline=dict(settings, parameters=baseline)).items():
        code, out, err = call(train, "--dataset", dataset, "--stage", stage, "--dry-run", cwd=tmp_path)
        assert not any(tmp_path.iterdir())
        printed, = json.loads(out)
        assert all(entry["source"] for entry in printed.values())
        assert {name: printed[name]["value"] for name in expected} == expected
        assert stage != "prior" or printed["lr"]["source"] == "authors"


@pytest.mark.parametrize("images, share", [(250_000, 100), (500_000_000, 1)])
def test_a_short_run_scales_the_ramp_and_the_average_alone(images, share):
    """Not the intervals of logs, pictures and checkpoints, and nothing that the user has chosen."""
    length = dict(short=True, images=images)
    whole = train.configure("afhq", **length | dict(short=False))
    for chosen in ({}, dict(lr_ramp=7)):
        scaled = dict(lr_ramp=10_000_000 // share, ema_half_life=500_000 // share, short=True) | chosen
        assert train.configure("afhq", **length, **chosen) == dataclasses.replace(whole, **scaled)


def test_help_shows_the_defaults_of_the_chosen_stage(tmp_path, call):
    code, out, err = call(train, "--dataset", "afhq", "--stage", "prior", "--help", cwd=tmp_path)
    assert code == 0
    assert "(default: 0.0001)" in out
    assert "(default: afhq)" in out
    for module in (sample, evaluate):
        assert call(module, "--help", cwd=tmp_path)[0] == 0


# Other images, other embedders

def test_any_folder_trains_and_samples_with_classes_and_augmentation(call, tmp_path):
    photographs(tmp_path / "pictures", classes=2)
    cut = tmp_path / "pictures/class1/7.png"
    cut.write_bytes(cut.read_bytes()[:60])
    flags = [*TINY, *"--dataset folder --embedder pixels --a class --views 2 --preview 0 --data".split()]
    refused(call(train, *flags, "pictures", cwd=tmp_path), "7.png", "--skip-bad")
    code, out, err = call(train, *flags, "pictures", "--skip-bad", cwd=tmp_path)
    assert code == 0, err
    for method in ("2sdm", "oracle", "baseline"):
        code, out, err = call(sample, "--n", 3, "--method", method, "--class", 1, cwd=tmp_path)
        assert code == 0 and (tmp_path / out.strip()).exists(), err
    refused(call(sample, "--n", 3, "--class", 2, cwd=tmp_path), "the classes are 0 class0, 1 class1")
    photographs(tmp_path / "others", count=7, classes=2)
    refused(call(train, *flags, "others", "--stage", "image", cwd=tmp_path), "trained with other images")


def test_the_python_lines_of_the_readme_draw_a_picture(trained, tmp_path, monkeypatch):
    lines, = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "runs").symlink_to(trained / "runs")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    drawn = picture("samples.png")
    assert min(drawn.shape[:2]) >= 512
    assert len(np.unique(drawn)) > 100


# Mistakes

@pytest.mark.parametrize("flags, words", table("""
--dataset afhq -> --data
--data pictures -> --dataset
--dataset nothing -> shapes
--stage nothing -> embedder
--batch 0 -> --batch 0
--images -5 -> --images -5
--lr nan -> --lr
--images many -> --images
--device abacus -> --device abacus
--runs empty --stage image -> --stage embedder
--runs file -> file
--stage image --width 16 -> --width not 16
--stage image --limit 10 -> --limit not 10
--y pca:9999 --stage image -> --y pca:9999
--y pca:-1 -> --y
--y pca: -> --y
--y pca:0 -> --y
--y kmeans:0 -> --y kmeans:0
--y kmeans:65 --stage image -> 64 images
--y kmeans:2.5 -> --y
--y banana -> pca:D
--y kmeans:4 --stage prior -> prior
--y none --stage prior -> prior
--y kmeans:4 --a class -> --a none
--a text -> --stage prior
--a text --stage image -> --a text
--a text --stage baseline --tag x -> --a text
--a text --stage joint --tag x -> --a text
--a text --stage prior --dataset folder -> --a text
--a text --stage prior --tag x --embedder pixels --runs other -> text
--stage joint --y pca:3 -> --y
--stage joint --y-dropout 0.1 -> --y-dropout
--stage joint --embedder pixels -> --embedder
--stage image --y none --y-dropout 0.1 -> --y-dropout
--y-dropout 1.5 -> --y-dropout
--tag a/b -> --tag
--limit -1 -> --limit
--prior-predicts noise -> --prior-predicts
"""))
def test_a_training_without_sense_gets_one_sentence(trained, call, tmp_path, flags, words):
    (tmp_path / "file").write_text("")
    runs = ["--runs", trained / "runs"]
    refused(call(train, *TINY, *runs, *flags.split(), cwd=tmp_path), *words.split())


@pytest.mark.parametrize("stage, fixed, free", table("""
embedder -> --seed 1, --batch 16, --lr 0.5 -> --augment 0.5 --width 16
prior -> --augment 0.5, --prior-predicts edm -> --y-dropout 0.1 --dropout 0.5 --width 16
image -> --y-dropout 0.1, --width 16, --limit 9 -> --prior-width 32 --views 7 --save 99
baseline -> --mults 1, --ema-half-life 7 -> --embedder pixels --prior-width 8
"""))
def test_a_run_keeps_the_settings_that_shape_it_and_may_change_the_others(trained, call, stage, fixed, free):
    flags = [*TINY, "--stage", stage]
    for other in fixed.split(", "):
        refused(call(train, *flags, *other.split(), cwd=trained), other.split()[0], "--tag")
    code, out, err = call(train, *flags, *free.split(), "--precision", "bf16", cwd=trained)
    assert code == 0 and "done, 48 images seen" in out, err


# Bad numbers, files and disks

@pytest.fixture
def baseline(trained, tmp_path):
    """The checkpoint of a baseline that may go on to 96 images."""
    shutil.copytree(trained / "runs/shapes/baseline", tmp_path / "runs/shapes/baseline")
    return tmp_path / "runs/shapes/baseline/checkpoint.pt"


def test_a_training_whose_loss_is_nan_stops_before_it_saves(baseline, call, tmp_path):
    content = twosdm.load_checkpoint(baseline)
    for tensor in content["net"].values():
        tensor.mul_(1e20)
    torch.save(content, baseline)
    before = baseline.read_bytes()
    refused(call(train, *BASELINE, 96, cwd=tmp_path), "the loss is not finite", "--lr")
    assert baseline.read_bytes() == before


def test_flipped_bits_in_a_checkpoint_are_refused_or_change_nothing(baseline):
    whole, content = baseline.read_bytes(), twosdm.load_checkpoint(baseline)
    found = []
    for place in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        baseline.write_bytes(damaged)
        try:
            assert same(twosdm.load_checkpoint(baseline), content), place
        except twosdm.UserError as error:
            assert str(baseline) in str(error)
            found.append(place)
    assert len(found) > 30


def test_a_part_of_a_checkpoint_is_called_damaged_and_stays_and_a_folder_is_not(baseline, call, tmp_path):
    part = baseline.read_bytes()[:5000]
    baseline.write_bytes(part)
    for module, flags in ((train, (*BASELINE, 96)), (sample, ("--method", "baseline"))):
        refused(call(module, *flags, cwd=tmp_path), "checkpoint.pt", "damaged")
    assert baseline.read_bytes() == part
    baseline.unlink()
    baseline.mkdir()
    code, out, err = call(sample, "--method", "baseline", cwd=tmp_path)
    refused((code, out, err), "checkpoint.pt")
    assert "damaged" not in err


def test_a_full_disk_ends_in_the_systems_words_and_loses_nothing(baseline, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    before = baseline.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    process = start(train, *BASELINE, 96, cwd=tmp_path, before=limit)
    process.join()
    said = (tmp_path / "output").read_text()
    assert process.exitcode == 1
    assert "Traceback" not in said
    assert "cannot be written (File too large)" in said.splitlines()[-1]
    assert baseline.read_bytes() == before
