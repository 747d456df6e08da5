"""What several test files use: the scripts, called as a user calls them, tiny runs, and pictures."""
import fcntl
import functools
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import train
import twosdm

ROOT = Path(twosdm.__file__).parent
TINY = ("--size 64 --resolution 8 --batch 8 --images 48 --prior-batch 8 --prior-images 48 --lr-ramp 16 "
        "--log-every 16 --preview-every 48 --snapshot-every 16 --steps 2 --width 8 --mults 1,2 --blocks 1 "
        "--attention 4 --prior-width 16 --prior-depth 1 --prior-heads 2").split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the processes of small networks: only on as many threads are sums split alike, to the last bit."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                  # tqdm's own is shared by forks, and a killed one keeps it


def script(name, *args, cwd, **environment):
    """Runs a script in a process of its own -> (exit code, standard output, standard error)."""
    command = [sys.executable, ROOT / f"{name}.py", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def start(module, *args, cwd):
    """Starts a script in a fork of this process, which has loaded all it needs, in order to kill it.

    It prints to cwd/output, which is locked as long as it or a child of it lives.
    """
    def work():
        os.chdir(cwd)
        sys.argv = [module.__name__ + ".py", *map(str, args)]
        sys.stdout = sys.stderr = open("output", "a", buffering=1)
        fcntl.flock(sys.stdout, fcntl.LOCK_EX)
        for number in (1, 2):                         # those of its children
            os.dup2(sys.stdout.fileno(), number)
        twosdm.run(module.main)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *args, cwd=folder) -> (code, out, err): a script, run in this process."""
    def called(module, *args, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            twosdm.run(module.main)
        except SystemExit as stopped:
            code = stopped.code
        if isinstance(code, str):                     # Python prints it and exits with 1
            print(code, file=sys.stderr)
            code = 1
        return code, *capsys.readouterr()

    return called


def refused(result, *words):
    """Whether a call ended in one sentence with these words, without a traceback."""
    code, _, err = result
    last = err.strip().splitlines()[-1]
    assert code in (1, 2), result
    assert "error: " in last, result
    assert "Traceback" not in err, result
    for word in words:
        assert word in last, (word, last)


def quick_clip(folder):
    """Leaves the world's CLIP where training looks for it, after two steps: all of them take 14 s."""
    config = train.configure("shapes", size=64, resolution=8, runs=str(folder / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twosdm, "train_small_clip", functools.partial(twosdm.train_small_clip, steps=2))
        twosdm.embedder_weights(config)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which prior, image model and baseline were trained on the world, as the README says."""
    folder = tmp_path_factory.mktemp("trained")
    quick_clip(folder)
    code, out, err = script("train", *TINY, cwd=folder)
    assert code == 0, err
    assert "Next: python sample.py" in out
    return folder


def same(a, b):
    """Whether two nested dicts and lists of tensors and numbers are equal to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def picture(path):
    """(H, W, 3) int64: the pixels of a file."""
    return np.asarray(Image.open(path)).astype(int)


def photographs(folder, count=12, classes=0):
    """JPEGs and PNGs of gradients, in folders class0, class1, ... if there are classes."""
    rng = np.random.RandomState(0)
    for i in range(count):
        place = folder
        if classes:
            place = folder / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 1, 24)[:, None] * rng.randint(256, size=3)
        pixels = np.tile(ramp, (20, 1, 1)).astype(np.uint8)
        suffix = "png" if i % 2 else "jpg"
        Image.fromarray(pixels).save(place / f"{i}.{suffix}")
