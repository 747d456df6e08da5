"""What several test files use: the scripts, called as a user calls them, and a folder of tiny runs."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import twosdm

ROOT = Path(twosdm.__file__).parent
TINY = ("--size 64 --resolution 8 --batch 8 --images 48 --lr-ramp 16 --log 16 --save 16 --preview 48 "
        "--snapshots 16 --steps 2 --prior-width 16 --prior-depth 1 --prior-heads 2 --width 8 --mults 1,2 "
        "--blocks 1 --attention 4").split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the scripts' processes: only on as many threads are sums split alike, to the last bit."""
    torch.set_num_threads(1)


def script(name, *args, cwd, **environment):
    """Runs a script in a process of its own -> (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1", **environment))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *args, cwd=folder) -> (code, out, err): a script, run in this process."""
    def called(module, *args, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            twosdm.run(module.main)
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

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
