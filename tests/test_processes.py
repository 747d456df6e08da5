"""Several processes, as torchrun starts them, here two on a CPU: what they train and draw."""
import functools
import multiprocessing
import os
import signal
import socket
import sys

import pytest
import torch

import evaluate
import sample
import train
import twosdm

CPU = torch.device("cpu")
# One step of Overfit-2SDM, which has all networks: 8 images.
ONE_STEP = dict(size=40, resolution=8, batch=8, images=8, prior_width=16, prior_depth=1, prior_heads=2, width=8,
                mults=(1, 2), blocks=1, attention=(4,), preview_every=0, snapshot_every=0, save_minutes=0, steps=2)


def member(work, environment):
    """What one of the processes does."""
    os.environ.update(environment)
    twosdm.run(work)


def together(work, count=2):
    """Runs work() in `count` forks of this process, with torchrun's variables -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = []
    for number in map(str, range(count)):
        environment = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port))
        process = multiprocessing.get_context("fork").Process(target=member, args=(work, environment))
        process.start()
        team.append(process)
    for process in team:
        process.join(60)
        process.kill()
    return [process.exitcode for process in team]


def learn(folder, name, changes, same_noise=False, die_at=None):
    """Trains stage joint, and keeps its weights and the mean gradient that Adam has seen, for each rank."""
    if same_noise:
        twosdm.Denoiser.loss = loss_of_given_noise
    config = train.configure("shapes", runs=str(folder / name), **(ONE_STEP | changes))
    twosdm.start_processes(CPU)
    ends = []

    class Recorded(train.Run):
        def save_all(self):
            super().save_all()
            ends.append(self)
            if die_at is not None and self.seen >= die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    train.Run = Recorded
    train.train(config, "joint", CPU)
    run = ends[-1]
    moments = run.optimizer.state_dict()["state"]
    gradient = torch.cat([moment["exp_avg"].flatten() for moment in moments.values()])
    torch.save([run.models.state_dict(), gradient], folder / f"{name}-{twosdm.rank()}.pt")


def loss_of_given_noise(denoiser, x, cond=None, augment=None):
    """As `Denoiser.loss`, with sigma and eps that follow from x: whoever computes it, they are the same."""
    sigma = 0.1 + x.detach().flatten(1).mean(1).abs()
    eps = x.detach().flatten(1).roll(1, 1).reshape(x.shape)
    denoised = denoiser(x + twosdm.per_example(sigma, x) * eps, sigma, cond, augment)
    _, c_out, _, _ = denoiser.scalings(sigma)
    return 1 / c_out**2 * (denoised - x).square().flatten(1).sum(1)


def test_two_processes_have_the_gradient_of_one_and_equal_weights(tmp_path):
    """Also if each takes its half of the batch in two parts."""
    for name, count, batch_gpu in (("one", 1, 8), ("two", 2, 2)):
        work = functools.partial(learn, tmp_path, name, dict(batch_gpu=batch_gpu), same_noise=True)
        assert together(work, count) == [0] * count
    _, whole = torch.load(tmp_path / "one-0.pt")
    weights, shared = torch.load(tmp_path / "two-0.pt")
    others, _ = torch.load(tmp_path / "two-1.pt")
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert whole.norm() > 0 and (shared - whole).norm() <= 1e-5 * whole.norm()


def test_two_processes_go_on_after_one_was_killed(tmp_path):
    longer = dict(images=48)
    assert together(functools.partial(learn, tmp_path, "whole", longer)) == [0, 0]
    assert together(functools.partial(learn, tmp_path, "killed", longer, die_at=24)) != [0, 0]
    assert together(functools.partial(learn, tmp_path, "killed", longer)) == [0, 0]
    for number in (0, 1):
        weights, _ = torch.load(tmp_path / f"whole-{number}.pt")
        resumed, _ = torch.load(tmp_path / f"killed-{number}.pt")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


def test_two_processes_draw_the_images_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(train.configure("shapes", **ONE_STEP), "joint", CPU)
    drawn = []
    for count in (1, 2):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--method", "joint", "--n", "10", "--batch", "2",
                                          "--samples", str(count)])
        assert together(sample.main, count) == [0] * count
        files = sorted(tmp_path.glob(f"{count}/shapes/joint/0*.png"))
        drawn.append([file.read_bytes() for file in files])
    assert len(drawn[0]) == 10 and drawn[0] == drawn[1]


def test_a_process_alone_is_the_first(tmp_path, monkeypatch):
    """RANK is also set by others than torchrun."""
    monkeypatch.setenv("RANK", "1")
    assert twosdm.rank() == 0 and twosdm.processes() == 1
    train.train(train.configure("shapes", runs=str(tmp_path), **ONE_STEP), "joint", CPU)
    assert twosdm.load_checkpoint(tmp_path / "shapes/joint/checkpoint.pt")["seen"] == 8


def test_half_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(twosdm.UserError, match="torchrun"):
        twosdm.start_processes(CPU)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(twosdm.UserError, match="torchrun"):
        evaluate.main()
