"""EDM's published networks: the weights come out, nothing in a file is run, finetuning starts there."""
import contextlib
import io
import json
import math
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import photographs, refused
from test_twosdm import SIZES, gaussian, loud

import train
import twosdm
from twosdm import Denoiser, UNet, UserError, load_edm_pickle

HERE = Path(__file__).parent
FLAGS = ("--dataset folder --augment 0.15 --arch ddpm++ --resolution 16 --width 32 --mults 1,2 --blocks 1 "
         "--attention 8").split()


def edm_weights(arch):
    """EDM's state dict, each tensor drawn from its name alone (the recipe of the fixture)."""
    state = {}
    shapes = json.loads((HERE / f"edm_tiny_{arch}_shapes.json").read_text())
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        r = torch.randn(shape, generator=generator)
        if name.endswith("resample_filter"):
            r = torch.full(shape, 0.25)
        elif r.ndim > 1:
            r = r / math.sqrt(r[0].numel())
        elif "norm" in name and name.endswith("weight"):
            r = 1 + 0.1 * r
        else:
            r = 0.1 * r
        state[name] = r
    return state


def rebuild(meta):
    """EDM's function of this kind would run the source code that is in its file."""
    raise AssertionError


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class Persistent(nn.Module):
    """Pickles as EDM's modules do: as a call with the source code of its class, which must not be run."""
    kind = "EDMPrecond"

    def __reduce__(self):
        meta = dict(module_src="import os; os.abort()", class_name=self.kind, state=vars(self))
        return rebuild, (meta,)


def publish(path, weights, **state):
    """A file of EDM's layout."""
    network = Persistent()
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        module = network
        for parent in parents:
            module = module._modules.setdefault(parent, Persistent())
        module._buffers[leaf] = tensor
    vars(network).update(state)
    path.write_bytes(pickle.dumps(dict(ema=network, augment_pipe=Persistent()), 3))
    return path


@pytest.mark.parametrize("arch", SIZES)
def test_the_unet_computes_what_edms_does_with_edms_file(arch, tmp_path):
    arrays = np.load(HERE / f"edm_tiny_{arch}.npz")
    reference = {name: torch.from_numpy(array) for name, array in arrays.items()}
    net = UNet(**SIZES[arch]).eval()
    net.load_state_dict(load_edm_pickle(publish(tmp_path / "edm.pkl", edm_weights(arch))))
    for name, augment in (("denoised", reference["augment"]), ("denoised_no_augment", None)):
        out = Denoiser(net)(reference["x"], reference["sigma"], reference["label"], augment)
        assert (out - reference[name]).abs().max() < 1e-5


@pytest.mark.parametrize("as_bytes", [False, True])
def test_nothing_of_a_file_is_run(tmp_path, as_bytes):
    """Neither of the pickle nor of the bytes of a tensor in it, which are a file of torch."""
    mark = tmp_path / "mark"
    attack = Call(os.system, f"touch {mark}")
    if as_bytes:
        inner = io.BytesIO()
        torch.save(attack, inner, _use_new_zipfile_serialization=False)
        storage = Call(torch.storage._load_from_bytes, inner.getvalue())
        attack = Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})
    path = publish(tmp_path / "net.pkl", {"w": attack})
    with pytest.raises(UserError, match="net.pkl cannot be read"):
        load_edm_pickle(path)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(attack))
    assert mark.exists()                              # the attack is real


def test_files_that_are_not_edms_get_one_sentence(tmp_path):
    whole = publish(tmp_path / "whole.pkl", edm_weights("ddpmpp")).read_bytes()
    publish(tmp_path / "rerun.pkl", edm_weights("ddpmpp"), kind="VPPrecond")
    (tmp_path / "half.pkl").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pkl").write_text("<html>404</html>")
    for name in ("rerun", "half", "text", "missing"):
        with pytest.raises(UserError, match=f"^[^\n]*{name}.pkl cannot be read[^\n]*$"):
            load_edm_pickle(tmp_path / f"{name}.pkl")


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("arch", SIZES)
def test_at_step_0_a_finetuned_net_equals_the_published_one_whatever_y_is(arch, classes, tmp_path):
    """With its classes, or, where the file knows none, whatever the class is; in float64, for float32 rounds."""
    weights = edm_weights(arch)
    if not classes:
        weights = {name: tensor for name, tensor in weights.items() if "map_label" not in name}
    path = publish(tmp_path / "net.pkl", weights)
    published = UNet(**SIZES[arch] | dict(cond_dim=classes)).double().eval()
    published.load_state_dict(load_edm_pickle(path))
    net = loud(UNet(**SIZES[arch] | dict(cond_dim=16 + 5)))
    twosdm.init_from_edm(net, path, 5)
    x = gaussian(2, 3, 16, 16).double()
    cond = gaussian(2, 16 + 5).double()
    told = cond[:, 16:] if classes else None
    expected = published(x, x[:, 0, 0, 0], told, x[:, 0, 0, :9])
    found = net.double()(x, x[:, 0, 0, 0], cond, x[:, 0, 0, :9])
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-6


@pytest.fixture
def file(tmp_path):
    photographs(tmp_path / "five", 10, classes=5)
    return publish(tmp_path / "net.pkl", edm_weights("ddpmpp"))


def test_after_one_step_of_finetuning_the_average_is_still_the_files(file, call, tmp_path):
    given = "--data five --embedder pixels --a class --stage image --init-from".split()
    flags = [*FLAGS, *given, file]
    step = "--batch 4 --images 4 --lr 0.01 --lr-ramp 0 --preview-every 0".split()
    code, _, err = call(train, *flags, *step, cwd=tmp_path)
    assert code == 0, err
    checkpoint = twosdm.load_checkpoint(tmp_path / "runs/folder/image/checkpoint.pt")
    theirs = load_edm_pickle(file)["enc.0.weight"]
    assert (checkpoint["net"]["image.net.enc.0.weight"] - theirs).abs().max() > 5e-3
    assert (checkpoint["ema"]["image.net.enc.0.weight"] - theirs).abs().max() < 1e-3
    refused(call(train, *flags, "--tag", "wide", "--width", 64, cwd=tmp_path), "net.pkl", "another network")


def test_a_file_becomes_an_ordinary_checkpoint_from_which_sample_draws(file, call, tmp_path):
    import sample
    flags = [*FLAGS, "--stage", "baseline", "--init-from", file, "--images", 0, "--a", "class", "--data", "five"]
    assert call(train, *flags, cwd=tmp_path)[0] == 0
    checkpoint = twosdm.load_checkpoint(tmp_path / "runs/folder/baseline/checkpoint.pt")
    weights = twosdm.load_denoiser(checkpoint).net.state_dict()
    for name, tensor in load_edm_pickle(file).items():
        assert torch.allclose(weights[name], tensor)
    flags = "--dataset folder --method baseline --n 3 --steps 2".split()
    assert call(sample, *flags, cwd=tmp_path)[0] == 0
    assert len(list(tmp_path.glob("samples/folder/baseline*/0*.png"))) == 3
