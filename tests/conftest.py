"""What several test files use: the scripts, called as a user calls them, and a folder of tiny runs."""
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import sample
import train
import twosdm

ROOT = Path(twosdm.__file__).parent
TINY = ("--size 64 --resolution 8 --batch 8 --images 48 --lr-ramp 16 --log 16 --save 16 --preview 48 "
        "--snapshots 16 --steps 2 --prior-width 16 --prior-depth 1 --prior-heads 2 --width 8 --mults 1,2 "
        "--blocks 1 --attention 4").split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the scripts' processes: only on as many threads are sums split alike, to the last bit."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                  # tqdm's own is shared by forks, and a killed one keeps it


def script(name, *args, cwd, **environment):
    """Runs a script in a process of its own -> (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1", **environment))
    return done.returncode, done.stdout, done.stderr


def start(module, *args, cwd, before=lambda: None, **environment):
    """Starts a script in a fork of this process, which has loaded all it needs; it prints to cwd/output."""
    def work():
        os.chdir(cwd)
        os.environ.update(environment)
        sys.argv = [module.__name__ + ".py", *map(str, args)]
        sys.stdout = sys.stderr = open("output", "a", buffering=1)
        before()
        twosdm.run(module.main)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def execute(module, *args, cwd):
    """Runs a script in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        twosdm.run(module.main)
    return stopped.value.code


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *args, cwd=folder) -> (code, out, err): a script, run in this process."""
    def called(module, *args, cwd):
        monkeypatch.chdir(cwd)
        return execute(module, *args, cwd=cwd), *capsys.readouterr()

    return called


def refused(result, *words):
    """Whether a call ended in one sentence with these words, without a traceback."""
    code, out, err = result
    last = err.strip().splitlines()[-1]
    assert code in (1, 2) and "error: " in last and "Traceback" not in err, result
    for word in words:
        assert word in last, (word, last)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which everything was trained on the embedded world, in a process, as the README says."""
    folder = tmp_path_factory.mktemp("trained")
    code, out, err = script("train", *TINY, cwd=folder)
    assert code == 0, err
    assert "Next: python sample.py" in out
    return folder


@pytest.fixture
def losses(monkeypatch):
    """What Denoiser.loss is given and gives, call by call."""
    calls, loss = [], twosdm.Denoiser.loss

    def recorded(self, x, cond=None, *more):
        found = loss(self, x, cond, *more)
        calls.append(SimpleNamespace(x=x, cond=cond, loss=found.detach()))
        return found

    monkeypatch.setattr(twosdm.Denoiser, "loss", recorded)
    return calls


def same(a, b):
    """Whether two nested dicts of tensors and numbers are equal to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def close(a, b, tolerance=1e-5):
    return abs(a - b).max() < tolerance


def table(text):
    """A table of command lines and of words that their refusal has -> [(flags, words)]."""
    return [line.split(" -> ") for line in text.strip().split("\n")]


def pipeline(runs, method="2sdm", *flags):
    """A method with the networks of a folder of runs, as sample.py makes it."""
    given = train.new_parser("", sample.Flags()).parse_args(["--runs", str(runs), *map(str, flags)])
    args = sample.Flags(**vars(given), method=[method])
    return sample.Pipeline(args, method, torch.device("cpu"))


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def photographs(folder, count=12, classes=0):
    """JPEGs and PNGs of gradients, in folders class0, class1, ... if there are classes."""
    rng = np.random.RandomState(0)
    for i in range(count):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        ramp = np.linspace(0, 255, 20)[:, None, None] * rng.rand(3) + np.zeros((20, 24, 3))
        suffix = "png" if i % 2 else "jpg"
        Image.fromarray(ramp.astype(np.uint8)).save(place / f"{i}.{suffix}")
