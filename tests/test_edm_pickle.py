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
from test_twosdm import SIZES, loud

import train
import twosdm
from twosdm import Denoiser, UNet, UserError, load_edm_pickle

HERE = Path(__file__).parent
FLAGS = "--dataset folder --arch ddpm++ --resolution 16 --width 32 --mults 1,2 --blocks 1 --attention 8".split()


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


class Persistent(nn.Module):
    """Pickles as EDM's modules do: as a call with the source code of its class, which must not be run."""
    kind = "EDMPrecond"

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src="import os; os.abort()", class_name=self.kind)
        return rebuild, (dict(meta, state=vars(self)),)


def publish(path, weights, insert=b"", **state):
    """A file of EDM's layout. These opcodes are inserted where the string 'insert' stands in its state."""
    network = Persistent()
    vars(network).update(state)
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        module = network
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Persistent())
            module = module._modules[parent]
        if "filter" in leaf:
            module.register_buffer(leaf, tensor)
        else:
            module._parameters[leaf] = nn.Parameter(tensor)
    content = pickle.dumps(dict(ema=network, augment_pipe=Persistent()), 3)
    path.write_bytes(content.replace(b"X\6\0\0\0insert", insert))
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


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def hidden(attack):
    """The attack in the bytes of a tensor's storage, which are a file of torch."""
    file = io.BytesIO()
    torch.save(Call(pickle.loads, b"\x80\2" + attack + b"."), file, _use_new_zipfile_serialization=False)
    return pickle.dumps(Call(torch.storage._load_from_bytes, file.getvalue()), 2)[2:-1]


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("attack", [
    b"cposix\nsystem\n(S'touch MARK'\ntR",
    b"(S'touch MARK'\niposix\nsystem\n",
    b"cbuiltins\neval\n(S\"open('MARK', 'w')\"\ntR",
])
def test_nothing_of_a_file_is_run(tmp_path, attack, as_bytes):
    mark = tmp_path / "mark"
    attack = attack.replace(b"MARK", str(mark).encode())
    if as_bytes:
        attack = hidden(attack)
    path = publish(tmp_path / "net.pkl", edm_weights("ddpmpp"), attack, _parameters=dict(w="insert"))
    with pytest.raises(UserError, match="net.pkl cannot be read"):
        load_edm_pickle(path)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\2" + attack + b".")
    assert mark.exists()                              # the attack is real


def test_files_that_are_not_edms_get_one_sentence(tmp_path):
    whole = publish(tmp_path / "whole.pkl", edm_weights("ddpmpp")).read_bytes()
    foreign = dict(
        half=whole[:len(whole) // 2],
        text=b"<html>404</html>",
        other=pickle.dumps(dict(ema=1)),
        rerun=publish(tmp_path / "rerun.pkl", edm_weights("ddpmpp"), kind="VPPrecond").read_bytes()
    )
    for name, content in foreign.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    for name in [*foreign, "missing"]:
        with pytest.raises(UserError, match=f"{name}.pkl cannot be read"):
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
    x = torch.randn(2, 3, 16, 16).double()
    c_noise = torch.tensor([-1.0, 0.7]).double()
    y = 10 * torch.randn(2, 16).double()
    a = torch.eye(5)[:2].double()
    label = torch.randn(2, 9).double()
    expected = published(x, c_noise, a if classes else None, label)
    found = net.double()(x, c_noise, torch.cat([y, a], dim=1), label)
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-6


@pytest.fixture
def file(tmp_path):
    photographs(tmp_path / "five", 10, classes=5)
    return publish(tmp_path / "net.pkl", edm_weights("ddpmpp"))


def test_after_one_step_of_finetuning_the_average_is_still_the_files(file, call, tmp_path):
    flags = "--data five --a class --embedder pixels --augment 0.5 --batch 4 --images 4 --lr 0.01 --lr-ramp 0"
    stage = ["--stage", "image", "--init-from", file]
    code, _, err = call(train, *FLAGS, *flags.split(), *stage, "--preview-every", 0, cwd=tmp_path)
    assert code == 0, err
    checkpoint = twosdm.load_checkpoint(tmp_path / "runs/folder/image/checkpoint.pt")
    theirs = load_edm_pickle(file)
    moved = {"net": 0.0, "ema": 0.0}
    for part in moved:
        for name, tensor in checkpoint[part].items():
            name = name.removeprefix("image.net.")
            if "map_cond" not in name:
                moved[part] = max(moved[part], (tensor - theirs[name]).abs().max().item())
    assert moved["net"] > 5e-3
    assert moved["ema"] < 1e-3
    refused(call(train, *FLAGS, *flags.split(), *stage, "--tag", "x", "--width", 64, cwd=tmp_path), "net.pkl", "--dataset")


def test_a_file_becomes_an_ordinary_checkpoint_from_which_sample_draws(file, call, tmp_path):
    import sample
    stage = ["--stage", "baseline", "--init-from", file, "--images", 0, "--a", "class"]
    code, _, err = call(train, *FLAGS, *stage, cwd=tmp_path)
    assert code == 0, err
    checkpoint = twosdm.load_checkpoint(tmp_path / "runs/folder/baseline/checkpoint.pt")
    net = twosdm.load_denoiser(checkpoint).net
    for name, tensor in load_edm_pickle(file).items():
        assert torch.allclose(net.state_dict()[name], tensor)
    flags = "--dataset folder --method baseline --n 3 --steps 2".split()
    code, _, err = call(sample, *flags, cwd=tmp_path)
    assert code == 0, err
    assert len(list(tmp_path.glob("samples/folder/baseline*/0*.png"))) == 3
