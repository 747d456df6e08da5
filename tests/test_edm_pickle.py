"""EDM's published networks: the weights come out, nothing in a file is run, finetuning starts there."""
import contextlib
import io
import math
import multiprocessing
import os
import pickle
import resource
import struct
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

import sample
import train
import twosdm
from conftest import photographs, refused
from test_twosdm import ADM, SIZES, TINY, Persistent, edm_weights, publish
from twosdm import UNet, UserError, edm_checkpoint, load_edm_pickle

FLAGS = ("--dataset folder --data five --embedder pixels --resolution 16 --mults 1,2 --blocks 1 "
         "--attention 8 --stage image --batch 4 --images 4 --preview 0 --ema-half-life 0 --lr-ramp 0 "
         "--lr 0").split()
LIMIT = 200                                            # MB that reading a hostile file may take


def edm_names(net, settings):
    """A U-Net's state dict under EDM's names, in which blocks have resolutions, and q, k, v alternate."""
    resolution, blocks = settings["resolution"], settings["blocks"]
    places = [f"{resolution >> level}x{resolution >> level}" for level in range(len(settings["mults"]))]
    finest, coarsest = places[0], places[-1]
    enc, dec = [], [f"{coarsest}_in0", f"{coarsest}_in1"]
    for place in places:
        enc.append(f"{place}_conv" if place == finest else f"{place}_down")
        enc += [f"{place}_block{i}" for i in range(blocks)]
    for place in reversed(places):
        if place != coarsest:
            dec.append(f"{place}_up")
        dec += [f"{place}_block{i}" for i in range(blocks + 1)]
    names = {f"enc.{i}.": f"enc.{name}." for i, name in enumerate(enc)}
    names |= {f"dec.{i}.": f"dec.{name}." for i, name in enumerate(dec)}
    names["map_cond."] = "map_label."
    if settings["arch"] == "ddpm++":
        names |= {f"out_{part}.": f"dec.{finest}_aux_{part}." for part in ("norm", "conv")}
    state = {}
    for name, tensor in net.state_dict().items():
        for mine, theirs in names.items():
            if name.startswith(mine):
                name = name.replace(mine, theirs)
                break
        if ".qkv." in name:
            tensor = tensor.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
        state[f"model.{name}"] = tensor
    return state


def random_net(**settings):
    """None of its weights is zero, so that whatever is misplaced shows."""
    torch.manual_seed(0)
    net = UNet(**settings)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def random_file(path, sigma_data=0.5, **settings):
    return publish(path, edm_names(random_net(**settings), settings), sigma_data=sigma_data)


@pytest.mark.parametrize("protocol, settings", [
    (3, TINY), (5, ADM),
    (4, dict(TINY, cond_dim=0, augment_dim=0, attention=(), mults=(1,), blocks=2)),
    (4, dict(ADM, mults=(1, 2, 3), attention=(16, 4), channels=4)),
    (4, dict(TINY, resolution=64, width=8, mults=(1, 2, 2, 2), blocks=4, attention=(16,)))])
def test_every_weight_finds_its_place_and_names_and_shapes_tell_the_settings(tmp_path, settings, protocol):
    net = random_net(**settings)
    weights = edm_names(net, settings)
    path = publish(tmp_path / "edm.pkl", weights, protocol, sigma_data=0.25)
    for name, tensor in load_edm_pickle(path).items():
        assert torch.equal(tensor, net.state_dict()[name])
    checkpoint = edm_checkpoint(path)
    assert checkpoint["model"]["settings"] == settings
    assert checkpoint["model"]["sigma_data"] == twosdm.load_denoiser(checkpoint).sigma_data == 0.25
    assert len(checkpoint["ema"]) == len(net.state_dict())
    # EDM's classes have no names, and it draws them uniformly.
    classes = settings["cond_dim"]
    assert checkpoint["data"]["classes"] == [str(i) for i in range(classes)]
    assert checkpoint["data"]["class_counts"] == ([1] * classes or None)
    assert checkpoint["config"]["a"] == ("class" if classes else "none")


@pytest.mark.parametrize("arch", SIZES)
def test_edms_own_names_are_those_that_these_tests_make(arch):
    theirs = {name: tensor.shape for name, tensor in edm_weights(arch).items() if "filter" not in name}
    mine = edm_names(random_net(**SIZES[arch]), SIZES[arch])
    assert {name: tensor.shape for name, tensor in mine.items()} == theirs


NCSNPP = [
    {"model.map_noise.freqs": torch.ones(16)},
    {"model.enc.8x8_aux_residual.weight": torch.ones(32, 3, 3, 3)},
    {"model.enc.8x8_down.conv0.resample_filter": torch.ones(1, 1, 4, 4)}]
ODD = [
    {"extra": torch.zeros(3)},
    {"model.out_conv.weight": torch.tensor(math.nan)},
    {f"model.enc.{'9' * 5000}x{'9' * 5000}_block0.conv0.weight": torch.zeros(3)}]
# EDM also published reruns of other papers: the same tensors, another denoiser.
RERUNS = [dict(kind="VPPrecond"), dict(sigma_data=0.0), dict(sigma_data="a"), dict(sigma_data=math.nan)]


@pytest.mark.parametrize("change, state", [
    *[(change, {}) for change in NCSNPP + ODD], *[({}, state) for state in RERUNS]])
def test_networks_and_preconditionings_that_are_not_edms_are_refused(tmp_path, change, state):
    path = publish(tmp_path / "ve.pkl", edm_weights("ddpmpp") | change, **state)
    with pytest.raises(UserError, match=r"^[^\n]*ve\.pkl [^\n]*DDPM[^\n]*-vp\.pkl[^\n]*-adm\.pkl[^\n]*$"):
        edm_checkpoint(path)


def test_files_that_are_cut_foreign_or_no_files_get_one_sentence(tmp_path):
    whole = publish(tmp_path / "whole.pkl", edm_weights("ddpmpp")).read_bytes()
    torch.save(dict(ema=torch.zeros(3)), tmp_path / "torch.pkl")
    (tmp_path / "folder.pkl").mkdir()
    os.mkfifo(tmp_path / "pipe.pkl")
    foreign = dict(half=whole[:len(whole) // 2], end=whole[:-1], empty=b"", text=b"<html>404</html>",
                   list=pickle.dumps([1]), number=pickle.dumps(dict(ema=1)), none=pickle.dumps({}))
    for name, content in foreign.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    for name in "half end empty text list number none torch folder pipe missing".split():
        with pytest.raises(UserError, match=f"^[^\n]*{name}.pkl [^\n]*$"):
            load_edm_pickle(tmp_path / f"{name}.pkl")


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def legacy(content):
    """A call of what reads a tensor's storage, from a torch file of the old format with this content."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    size = struct.pack("<I", len(file.getvalue()))
    return b"ctorch.storage\n_load_from_bytes\n(B" + size + file.getvalue() + b"tR"


@pytest.mark.parametrize("place", ["beside the network", "as a weight"])
@pytest.mark.parametrize("attack", [
    b"cposix\nsystem\n(S'touch MARK'\ntR", b"(S'touch MARK'\niposix\nsystem\n",
    b"(cposix\nsystem\nS'touch MARK'\no", b"cbuiltins\neval\n(S\"open('MARK', 'w')\"\ntR",
    b"cbuiltins\nsetattr\n(ctwosdm\nEMA\nS'taken'\nI1\ntR", b"ctwosdm\nEMA\n(N}S'taken'\nI1\nstb",
    "a storage"],
    ids=["reduce", "inst", "obj", "eval", "setattr", "build", "a storage's bytes"])
def test_no_file_runs_or_changes_anything(tmp_path, attack, place):
    mark = tmp_path / "mark"
    if attack == "a storage":
        attack = legacy(Call(os.system, f"touch {mark}"))
    attack = attack.replace(b"MARK", str(mark).encode())
    path, weights = tmp_path / "net.pkl", edm_weights("ddpmpp")
    if place == "beside the network":                 # which may be read
        publish(path, weights, insert=attack, beside="insert")
        error = contextlib.suppress(UserError)
    else:
        publish(path, weights | {"model.weight": "insert"}, insert=attack)
        error = pytest.raises(UserError, match="^[^\n]*net.pkl[^\n]*$")
    for read in (load_edm_pickle, edm_checkpoint):
        with error:
            read(path)
    assert not mark.exists() and not hasattr(twosdm.EMA, "taken")
    assert list(tmp_path.iterdir()) == [path]
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\2" + attack + b".")        # the attack is real
    assert mark.exists() or hasattr(twosdm.EMA, "taken")
    with contextlib.suppress(AttributeError):
        del twosdm.EMA.taken


def parameters(**tensors):
    network = Persistent()
    network._parameters = tensors
    return network


def tensor_of(storage, size, stride):
    return parameters(w=Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, OrderedDict()))


def expanded():
    """The bytes of a tensor whose shape claims 2 GB."""
    file = io.BytesIO()
    torch.save(torch.zeros(1).expand(2**29), file, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, file.getvalue())
    return tensor_of(storage, (2**29,), (0,))


def nested(name, depth, *more):
    """Modules in modules: all share this one name."""
    network = Persistent()
    for _ in range(depth):
        outer = Persistent()
        outer._modules = dict.fromkeys((name, *more), network)
        network = outer
    return network


def itself():
    network = nn.Module()
    network._modules["itself"] = network
    return network


def shared():
    weight = nn.Parameter(torch.zeros(2**18))
    return parameters(**{f"w{i}": weight for i in range(500)})


FOUR = torch.zeros(4)._typed_storage()
BOMBS = {
    "a memo of 2^26": b"\x80\2Nr" + struct.pack("<I", 2**26) + b".",
    "a string of 2^40": b"\x80\4\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a frame of 2^40": b"\x80\4\x95" + struct.pack("<Q", 2**40) + b"x.",
    "a bytearray of 2^32": b"\x80\5\x96" + struct.pack("<Q", 2**32) + b"x.",
    "a million lists": b"\x80\2" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "a stride of 0": lambda: tensor_of(FOUR, (2**40,), (0,)),
    "a tensor past its storage": lambda: tensor_of(FOUR, (4,), (2,)),
    "a negative stride": lambda: tensor_of(FOUR, (4,), (-1,)),
    "a storage that is a stride of 0": expanded,
    "one tensor of 500 names": shared,
    "2^40 shared modules": lambda: nested("a", 40, "b"),
    "a module in itself": itself,
    "long names": lambda: nested("n" * 2**21, 40),
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def read_aside(path, answers):
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    before = peak()
    try:
        load_edm_pickle(path)
        answers.send("no error")
    except Exception as error:
        answers.send(f"{type(error).__name__}: {error}")
    answers.send(peak() - before)


@pytest.mark.parametrize("bomb", BOMBS)
def test_absurd_files_end_in_one_sentence_in_bounded_memory(tmp_path, bomb):
    content = BOMBS[bomb]
    if callable(content):
        content = pickle.dumps(dict(ema=content()), 3)
    (tmp_path / "net.pkl").write_bytes(content)
    answers, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=read_aside, args=(tmp_path / "net.pkl", sender))
    process.start()
    process.join(30)
    process.kill()
    process.join()
    assert process.exitcode == 0, "it crashed, or went on for ever"
    answer, megabytes = answers.recv(), answers.recv()
    assert answer.startswith("UserError: ") and "net.pkl" in answer and "\n" not in answer
    assert megabytes < LIMIT


@pytest.fixture
def finetune(tmp_path, call):
    """finetune(file, *flags): one step of an image model for pictures of five classes, from a file."""
    photographs(tmp_path / "five", 10, classes=5)
    photographs(tmp_path / "four", 10, classes=4)

    def finetuned(file, *flags, settings=TINY):
        sizes = [f"--arch={settings['arch']}", f"--width={settings['width']}"]
        return call(train, *FLAGS, *sizes, "--init-from", file, *flags, cwd=tmp_path)

    def trained():
        checkpoint = twosdm.load_checkpoint(tmp_path / "runs/folder/image/checkpoint.pt")
        return twosdm.load_denoiser(checkpoint).net.double()

    finetuned.trained = trained
    return finetuned


@pytest.mark.parametrize("labels, a, theirs, ours", [
    (0, "none", 0, 9), (0, "none", 9, 9), (0, "class", 0, 0), (0, "class", 9, 9),
    (5, "class", 0, 9), (5, "class", 9, 0), (5, "class", 9, 9)])
@pytest.mark.parametrize("arch", SIZES)
def test_at_step_0_a_finetuned_net_equals_the_published_one_whatever_y_is(
        tmp_path, finetune, arch, labels, a, theirs, ours):
    """And whatever the class is, if the published one knows none; in float64, for float32 rounds."""
    settings = dict(SIZES[arch], cond_dim=labels, augment_dim=theirs)
    path = random_file(tmp_path / "net.pkl", **settings)
    code, _, err = finetune(path, "--a", a, f"--augment={ours / 90}", settings=settings)
    assert code == 0, err
    net = finetune.trained()
    published = twosdm.load_denoiser(edm_checkpoint(path)).net.double()
    x, c_noise = torch.randn(2, 3, 16, 16).double(), torch.tensor([-1.0, 0.7]).double()
    label = torch.randn(2, 9).double()
    for scale in (0.0, 0.5, 10.0):
        cond = scale * torch.randn(2, net.cond_dim).double()
        told = cond[:, -5:] if labels else None
        expected = published(x, c_noise, told, label if theirs and ours else None)
        difference = net(x, c_noise, cond, label if ours else None) - expected
        assert expected.abs().max() > 0.1
        assert difference.abs().max() <= (1e-6 if labels else 0)


@pytest.mark.parametrize("arch", SIZES)
def test_after_one_step_y_and_the_augmentation_matter(tmp_path, finetune, arch):
    settings = dict(SIZES[arch], augment_dim=0)
    path = random_file(tmp_path / "net.pkl", **settings)
    assert finetune(path, "--a", "class", "--augment=0.5", "--lr=1e-3", settings=settings)[0] == 0
    net = finetune.trained()
    x, c_noise = torch.randn(2, 3, 16, 16).double(), torch.zeros(2).double()
    cond, label = torch.randn(2, net.cond_dim).double(), torch.randn(2, 9).double()
    y_alone = (torch.arange(net.cond_dim) < net.cond_dim - 5).double()
    out = net(x, c_noise, cond, label)
    for changed in (net(x, c_noise, cond + y_alone, label), net(x, c_noise, cond, label + 1)):
        assert (changed - out).abs().max() > 1e-5


@pytest.mark.parametrize("file, flags, words", [
    ({}, "--resolution 32", "--resolution 32 ... 16"), ({}, "--arch adm --width 64", "--arch adm ... ddpm++"),
    ({}, "--width 64", "--width 64 ... 32"), ({}, "--mults 1,2,2", "--mults ... (1, 2)"),
    ({}, "--blocks 2", "--blocks 2 ... 1"),
    ({}, "--attention 16,8", "--attention ... (8,)"), ({}, "--a none", "5 classes ... none"),
    ({}, "--data four", "5 classes ... 4"), ({}, "--stage prior", "--init-from"),
    (dict(channels=4), "", "net.pkl ... channels"), (dict(sigma_data=1.0), "", "net.pkl ... sigma_data")])
def test_a_file_for_another_network_is_refused(tmp_path, finetune, file, flags, words):
    path = random_file(tmp_path / "net.pkl", **TINY | file)
    refused(finetune(path, "--a", "class", *flags.split()), *words.split(" ... "))
    assert not (tmp_path / "runs/folder/image/checkpoint.pt").exists()


def test_the_scripts_sample_from_a_published_file_and_a_run_keeps_to_the_file_it_began_with(
        tmp_path, finetune, call):
    path = publish(tmp_path / "edm-tiny-cond-vp.pkl", edm_weights("ddpmpp"))
    flags = ["--method", "baseline", "--checkpoint", path, "--n", 3, "--steps", 2]
    assert call(sample, *flags, cwd=tmp_path)[0] == 0
    assert len(list(tmp_path.glob("samples/edm-tiny-cond-vp-baseline/0*.png"))) == 3
    assert finetune(path, "--a", "class")[0] == 0
    refused(finetune("", "--a", "class", "--images", 8), "--init-from")
    assert finetune(path, "--a", "class", "--images", 8)[0] == 0
