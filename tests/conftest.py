"""What several test files use: the scripts, called as a user calls them."""
import sys

import pytest

import twosdm


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
