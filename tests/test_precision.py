"""Theorems about bf16, which is what CUDA trains in: it has the losses of float32, and not its bits."""
import json

import pytest
import torch
from conftest import same

import train
from twosdm import load_checkpoint

SMALL = ("--size 500 --embedder pixels --resolution 8 --width 16 --mults 1 --prior-width 64 --prior-depth 1 "
         "--preview 0 --snapshots 0").split()


@pytest.mark.parametrize("stage, batch, augment", [("prior", 32, 0), ("image", 8, 0.5)])
def test_120_steps_in_bf16_have_the_losses_of_float32(stage, batch, augment, tmp_path, call, losses):
    """Small networks, 8x8 pixels, in three windows of forty steps. Weights, x and y stay as they are."""
    length = ("--batch", batch, "--images", 120 * batch, "--log", 40 * batch, "--save", 120 * batch)
    logs = {}
    for precision in ("fp32", "bf16"):
        flags = ("--stage", stage, "--augment", augment, "--runs", precision, "--precision", precision)
        code, out, err = call(train, *SMALL, *length, *flags, cwd=tmp_path)
        assert code == 0, err
        run = tmp_path / precision / "shapes" / stage
        lines = (run / "log.jsonl").read_text().splitlines()
        logs[precision] = torch.tensor([json.loads(line)["loss"] for line in lines])
        weights = load_checkpoint(run / "checkpoint.pt")["net"].values()
        assert {tensor.dtype for tensor in weights} == {torch.float32}
    fp32, bf16 = logs["fp32"], logs["bf16"]
    assert len(fp32) == 3
    assert fp32[-1] < 0.9 * fp32[0]                   # it has learned
    assert (bf16 / fp32 - 1).abs().max() < 0.005
    assert not torch.equal(fp32, bf16)
    for exact, rough in zip(losses[:120], losses[120:], strict=True):
        assert same(exact.x, rough.x)
        assert same(exact.cond, rough.cond)
        assert rough.loss.dtype == torch.float32
