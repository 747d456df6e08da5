"""Training as a user does it, on tiny settings: runs, resuming, kills, two processes, mistakes, bad disks."""
import json
import os
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
from conftest import ROOT, TINY, photographs, refused, same, start, table

import evaluate
import sample
import train
import twosdm
from twosdm import UserError


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_training(one, two):
    """Whether all the checkpoints below two folders hold the same training, and there are some."""
    paths = sorted(path.relative_to(one) for path in one.rglob("checkpoint.pt"))
    assert paths
    for path in paths:
        a, b = (twosdm.load_checkpoint(folder / path) for folder in (one, two))
        for part in ("seen", "net", "ema", "optimizer"):
            assert same(a[part], b[part]), (path, part)
    return True


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
        for line in log:
            assert line["nonfinite"] == 0
            assert line["loss"] > 0
            assert line["gradient_norm"] > 0
        if stage == "embedder":
            assert set(log[-1]["linear_probe"]) == set(twosdm.ATTRIBUTES)
        counted = [folder / f"snapshot-{images:010d}.pt" for images in (16, 32, 48)]
        if stage in ("image", "baseline"):
            counted.append(folder / "samples-000000048.png")
        for path in counted:                          # there before the checkpoint that counts it
            assert path.stat().st_mtime_ns <= checkpoint.stat().st_mtime_ns
    code, out, err = call(train, *TINY, cwd=trained)
    assert code == 0
    assert out.count("done, 48 images seen") == 4


@pytest.mark.parametrize("flags", [
    "--stage embedder", "--stage prior --augment 0.5 --views 2", "--stage prior --a text",
    "--stage image --augment 0.5 --dropout 0.1 --y-dropout 0.5", "--stage image --y pca:3", "--stage joint"])
def test_stopping_and_resuming_changes_no_bit(trained, call, tmp_path, flags):
    """N + resume + N steps equal 2N steps; the run's length is the only difference."""
    for name, lengths in dict(whole=[48], parts=[24, 48]).items():
        if "embedder" not in flags:
            with_embedder(trained, tmp_path / name)
        for images in lengths:
            more = [*flags.split(), "--preview", 0, "--images", images, "--runs", name]
            code, out, err = call(train, *TINY, *more, cwd=tmp_path)
            assert code == 0, err
    assert same_training(tmp_path / "whole", tmp_path / "parts")


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_continues_as_if_nothing_had_happened(call, tmp_path, kind):
    folder = tmp_path / "runs/shapes/baseline"
    baseline = [*TINY, "--stage", "baseline", "--images"]
    process = start(train, *baseline, 4000, cwd=tmp_path)
    wait_for(lambda: len(list(folder.glob("snapshot-*.pt"))) > 3)
    if kind == signal.SIGKILL:                        # in the midst of writing something
        wait_for(lambda: list(folder.glob("*.new")))
    os.kill(process.pid, kind)
    process.join()
    seen = twosdm.load_checkpoint(folder / "checkpoint.pt")["seen"]
    assert 0 < seen < 4000
    if kind != signal.SIGKILL:
        said = (tmp_path / "output").read_text()
        assert process.exitcode == 130
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    for images in range(16, seen + 1, 16):
        assert (folder / f"snapshot-{images:010d}.pt").exists()
    for images in range(48, seen + 1, 48):
        assert (folder / f"samples-{images:09d}.png").exists()
    total = seen + 16
    assert call(train, *baseline, total, cwd=tmp_path)[0] == 0
    assert not list(folder.glob("*.new"))
    images = [line["images"] for line in log_of(folder)]
    assert images == sorted(set(images))
    assert images[-1] == total
    assert call(train, *baseline, total, "--runs", "whole", cwd=tmp_path)[0] == 0
    assert same_training(tmp_path / "runs", tmp_path / "whole")


def test_one_folder_is_trained_by_one_process_at_a_time(call, tmp_path):
    flags = [*TINY, "--stage", "baseline", "--preview", 0]
    process = start(train, *flags, "--images", 10**6, cwd=tmp_path)
    wait_for((tmp_path / "runs/shapes/baseline/log.jsonl").exists)
    refused(call(train, *flags, cwd=tmp_path), "another process", "--runs")
    process.kill()
    process.join()


def test_accumulation_has_the_loss_of_the_whole_batch(trained, call, tmp_path):
    runs = with_embedder(trained, tmp_path / "runs")
    assert call(train, *TINY, "--stage", "image", "--batch-gpu", 3, cwd=tmp_path)[0] == 0
    logs = [log_of(folder / "shapes/image") for folder in (trained / "runs", runs)]
    losses = [[line["loss"] for line in log] for log in logs]
    assert np.allclose(*losses, rtol=1e-4)


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
    joint = [*TINY, "--preview", 0, "--stage", "joint"]
    assert call(train, *joint, "--runs", "one", cwd=tmp_path)[0] == 0
    for flags in (joint, joint[:-2]):
        assert exit_codes(start_two(train, *flags, cwd=tmp_path)) == [0, 0]
    assert (tmp_path / "output").read_text().count("Next:") == 1
    for stage in (*twosdm.STAGES, "joint"):
        one = tmp_path / "one" if stage == "joint" else trained / "runs"
        logs = [log_of(runs / "shapes" / stage) for runs in (one, tmp_path / "runs")]
        assert len(logs[0]) == len(logs[1]) == 3
        for one, two in zip(*logs):
            for name, tolerance in dict(loss=1e-6, gradient_norm=1e-5).items():
                assert abs(one[name] - two[name]) <= tolerance * one[name]
    flags = ["--runs", str(trained / "runs"), "--n", "5", "--batch", "2", "--npz", "--out"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
         ROOT / "sample.py", *flags, "two"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and done.stdout == "two/grid.png\n", done.stderr
    assert call(sample, *flags, "alone", cwd=tmp_path)[0] == 0
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("alone", "two"))
    assert np.array_equal(one, two)


def test_a_wish_to_stop_one_process_stops_both_and_saves(call, tmp_path):
    folder = tmp_path / "runs/shapes/baseline"
    flags = [*TINY, "--stage", "baseline", "--preview", 0]
    processes = start_two(train, *flags, "--images", 10**6, cwd=tmp_path)
    wait_for((folder / "log.jsonl").exists)
    processes[1].terminate()
    assert exit_codes(processes) == [130, 130]
    assert "the same command goes on from there" in (tmp_path / "output").read_text()
    assert 0 < twosdm.load_checkpoint(folder / "checkpoint.pt")["seen"] < 10**6


def test_processes_that_would_have_no_images_are_refused(tmp_path):
    flags = [*TINY, "--stage", "baseline", "--batch", 1]
    first, second = start_two(train, *flags, cwd=tmp_path)
    assert exit_codes([first]) == [1]
    second.kill()                                     # it would wait for torchrun to do so
    assert "error: --batch 1 cannot be shared by 2 processes" in (tmp_path / "output").read_text()


# Settings

# Of latents: a channel more at both ends, 9·192 weights each and a bias; and the seven blocks with attention
# of each level, 4c² + 6c weights, are those of 32, 16 and 8 pixels, here of 192, 384 and 576 channels.
LATENT = 2 * 9 * 192 + 1 - 7 * (4 * (768**2 - 192**2) + 6 * (768 - 192))
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
                55_733_891 + (1 + 10 + 512) * 128, 55_733_891 + (1 + 10) * 128),
    "imagenet": (ADM, 295_524_483, 295_131_267),
    "imagenet-class": (dict(ADM, a="class"), 296_292_483, 295_899_267),
    "imagenet-latent": (dict(ADM, a="class", resolution=256), 296_292_483 + LATENT, 295_899_267 + LATENT),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_a_dry_run_prints_the_papers_settings_with_their_sources_and_counts(dataset, tmp_path, call):
    settings, image, baseline = PAPER[dataset]
    prior = dict(batch=256, lr=1e-4, prior_width=512, prior_depth=6, prior_heads=8,
                 augment=settings["augment"])
    for stage, expected in dict(image=dict(settings, parameters=image), prior=prior,
                                baseline=dict(settings, parameters=baseline)).items():
        code, out, err = call(train, "--dataset", dataset, "--stage", stage, "--dry-run", cwd=tmp_path)
        assert code == 0
        assert not any(tmp_path.iterdir())
        printed, = json.loads(out)
        assert all(entry["source"] for entry in printed.values())
        assert {name: printed[name]["value"] for name in expected} == expected
        assert stage != "prior" or printed["lr"]["source"] == "authors"


def test_a_short_run_scales_the_ramp_and_the_average_alone():
    """Not the intervals of logs, pictures and checkpoints, and nothing that the user has chosen."""
    whole, short, longer = (train.configure("afhq", "image", short=True, images=images)
                            for images in (25_000_000, 250_000, 500_000_000))
    assert (whole.lr_ramp, whole.ema_half_life) == (10_000_000, 500_000)
    assert (short.lr_ramp, short.ema_half_life) == (100_000, 5_000)
    assert (longer.lr_ramp, longer.ema_half_life) == (10_000_000, 500_000)
    for name in ("log", "save", "preview", "snapshots"):
        assert getattr(short, name) == getattr(whole, name)
    kept = train.configure("afhq", "image", short=True, images=250_000, lr_ramp=7)
    assert kept.lr_ramp == 7
    assert kept.ema_half_life == 5_000


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
    flags = [*TINY, *"--dataset folder --embedder pixels --a class --views 2 --data".split()]
    for stage in ("prior", "image", "baseline"):
        code, out, err = call(train, *flags, "pictures", "--stage", stage, cwd=tmp_path)
        assert code == 0, err
    for method in ("2sdm", "oracle", "baseline"):
        code, out, err = call(sample, "--n", 3, "--method", method, "--class", 1, cwd=tmp_path)
        assert code == 0 and (tmp_path / out.strip()).exists(), err
    refused(call(sample, "--n", 3, "--class", 2, cwd=tmp_path), "the classes are 0 class0, 1 class1")
    photographs(tmp_path / "others", count=7, classes=2)
    for data, words in dict(none="none", others="trained with other images").items():
        refused(call(train, *flags, data, "--stage", "image", "--images", 96, cwd=tmp_path), words)


def test_another_embedder_is_refused(trained, call, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/shapes/embedder")
    assert call(train, *TINY, "--stage", "embedder", "--images", 56, cwd=tmp_path)[0] == 0
    image = [*TINY, "--stage", "image", "--images"]
    refused(call(train, *image, 96, cwd=tmp_path), "trained with another embedder")
    shutil.rmtree(tmp_path / "runs/shapes/image")
    assert call(train, *image, 8, cwd=tmp_path)[0] == 0
    refused(call(sample, "--n", 1, cwd=tmp_path), "different images or embeddings")


def test_bad_pictures_are_named(call, tmp_path):
    flags = [*TINY, *"--dataset folder --embedder pixels --stage prior --views 1 --data".split()]
    folder = tmp_path / "pictures"
    folder.mkdir()
    refused(call(train, *flags, folder, cwd=tmp_path), "no images")
    photographs(folder)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    refused(call(train, *flags, folder, cwd=tmp_path), "7.png", "--skip-bad")
    assert call(train, *flags, folder, "--skip-bad", cwd=tmp_path)[0] == 0


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
--y pca:00 -> --y
--y kmeans:0 -> --y kmeans:0
--y kmeans:65 --stage image -> 64 images
--y kmeans:2.5 -> --y
--y banana -> pca:D
--y kmeans:4 --stage prior -> prior
--y none --stage prior -> prior
--y pca:0 --stage prior -> prior
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


def test_a_run_keeps_the_settings_that_shape_it_and_may_change_the_others(trained, call):
    shape = dict(embedder="--seed 1, --batch 16, --lr 0.5", prior="--augment 0.5, --prior-predicts edm",
                 image="--y-dropout 0.1, --width 16, --limit 9", baseline="--mults 1, --ema-half-life 7")
    free = dict(embedder="--augment 0.5 --width 16", prior="--y-dropout 0.1 --dropout 0.5 --width 16",
                image="--prior-width 32 --views 7 --save 99", baseline="--embedder pixels --prior-width 8")
    for stage in twosdm.STAGES:
        flags = [*TINY, "--stage", stage]
        for other in shape[stage].split(", "):
            refused(call(train, *flags, *other.split(), cwd=trained), other.split()[0], "--tag")
        code, out, err = call(train, *flags, *free[stage].split(), "--precision", "bf16", cwd=trained)
        assert code == 0 and "done, 48 images seen" in out, err


# Bad numbers, files and disks

@pytest.fixture
def baseline(trained, tmp_path):
    """The checkpoint of a baseline that may go on to 96 images."""
    shutil.copytree(trained / "runs/shapes/baseline", tmp_path / "runs/shapes/baseline")
    return tmp_path / "runs/shapes/baseline/checkpoint.pt"


LONGER = [*TINY, "--stage", "baseline", "--images", 96]


def rewrite(path, change):
    """Changes the weights of a checkpoint, those of training and their averages."""
    content = twosdm.load_checkpoint(path)
    for part in ("net", "ema"):
        for tensor in content[part].values():
            change(tensor)
    torch.save(content, path)
    return path.read_bytes()


def test_a_training_whose_loss_is_nan_stops_before_it_saves(baseline, call, tmp_path):
    before = rewrite(baseline, lambda tensor: tensor.mul_(1e20))
    refused(call(train, *LONGER, cwd=tmp_path), "the loss is not finite", "--lr")
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
        except UserError as error:
            assert str(baseline) in str(error)
            found.append(place)
    assert len(found) > 30


def test_a_part_of_a_checkpoint_and_weights_that_are_not_finite_are_refused(baseline, call, tmp_path):
    nan = rewrite(baseline, lambda tensor: tensor[:1].fill_(torch.nan))
    for content, word in ((nan, "not finite"), (nan[:5000], "damaged")):
        baseline.write_bytes(content)
        refused(call(train, *LONGER, cwd=tmp_path), "checkpoint.pt", word)
        refused(call(sample, "--method", "baseline", cwd=tmp_path), "checkpoint.pt", word)
        assert baseline.read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "link to nowhere"])
def test_what_cannot_be_read_is_not_called_damaged(call, tmp_path, kind):
    if kind == "folder":
        (tmp_path / "mine.pt").mkdir()
    else:
        (tmp_path / "mine.pt").symlink_to("nowhere")
    result = call(sample, "--method", "baseline", "--checkpoint", "mine.pt", cwd=tmp_path)
    refused(result, "mine.pt")
    assert "damaged" not in result[2]


def test_a_full_disk_ends_in_the_systems_words_and_loses_nothing(baseline, tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    before = baseline.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    process = start(train, *LONGER, cwd=tmp_path, before=limit)
    process.join()
    said = (tmp_path / "output").read_text()
    assert process.exitcode == 1
    assert "Traceback" not in said
    assert "cannot be written (File too large)" in said.splitlines()[-1]
    assert baseline.read_bytes() == before
