"""Reading EDM's pickles: the weights come out, and nothing inside is ever run."""
import argparse
import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
import twosdm
from test_twosdm import HERE, edm_tiny, edm_weights
from twosdm import Denoiser, UNet, UserError, edm_checkpoint, edm_settings, init_from_edm, read_edm_pickle


class Call:
    """Pickles as a call of `function` with `args`, and as `state` to build onto the result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state) if state is not None else (function, args)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Only so that a call may itself be what is called."""


class Elsewhere:
    """Modules that exist only while a file is written: where EDM's classes and functions are said to live."""

    def __enter__(self):
        self.before = dict(sys.modules)
        names = ["torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"]
        fake = {name: types.ModuleType(name) for name in names}

        def _reconstruct_persistent_obj(meta):
            raise AssertionError

        class EasyDict(dict):
            pass

        for module, thing in (("torch_utils.persistence", _reconstruct_persistent_obj),
                              ("dnnlib.util", EasyDict)):
            thing.__module__, thing.__qualname__ = module, thing.__name__
            setattr(fake[module], thing.__name__, thing)
        sys.modules.update(fake)
        self.reconstruct, self.EasyDict = _reconstruct_persistent_obj, EasyDict
        return self

    def __exit__(self, *error):
        for name in set(sys.modules) - set(self.before):
            if name.startswith(("torch_utils", "dnnlib")):
                del sys.modules[name]

    def persistent(self, class_name, source="", **state):
        return Call(self.reconstruct, dict(type="class", version=6, module_src=source, class_name=class_name,
                                           state=state))

    def module(self, class_name, tensors=(), modules=(), buffers=(), source="", **state):
        return self.persistent(class_name, source, training=False, _parameters=OrderedDict(tensors),
                               _buffers=OrderedDict(buffers), _modules=OrderedDict(modules),
                               _backward_hooks=OrderedDict(), **state)


def weights(seed, *shape):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def network(there, source="", extra=()):
    """A small relative of EDM's: nested persistent modules, a ModuleDict, numpy scalars, a set."""
    conv = there.module("Conv2d", [("weight", weights(0, 4, 3, 3, 3)), ("bias", None)], in_channels=3,
                        out_channels=4, resample_filter_shape=(2, 2),
                        buffers=[("resample_filter", torch.ones(1, 1, 2, 2) / 4)])
    block = there.module("UNetBlock", [], [("conv0", conv)], num_heads=np.int64(1), skip_scale=np.sqrt(0.5))
    blocks = torch.nn.ModuleDict()
    blocks._modules = OrderedDict([("64x64_conv", conv), ("64x64_block0", block)])
    linear = there.module("Linear", [("weight", weights(1, 5, 4).half()), ("bias", weights(2, 8)[2:7])])
    model = there.module("SongUNet", [], [("map_layer0", linear), ("enc", blocks), ("none", None)],
                         source=source, label_dropout=0, flags={1, 2}, dtype=np.float32(0.5),
                         on=np.bool_(True))
    return there.module("EDMPrecond", [], [("model", model)], img_resolution=64, img_channels=3, label_dim=0,
                        sigma_data=0.5, use_fp16=False, _init_kwargs=there.EasyDict(model_type="SongUNet",
                        channel_mult=[1, 2, 2, 2]), extra=list(extra))


def write(path, protocol=4, source="", extra=(), **entries):
    with Elsewhere() as there:
        top = dict(ema=network(there, source, extra), loss_fn=there.persistent("EDMLoss", P_mean=-1.2),
                   augment_pipe=there.persistent("AugmentPipe", p=0.12),
                   dataset_kwargs=there.EasyDict(path="data.zip", use_labels=False), **entries)
        path.write_bytes(pickle.dumps(top, protocol))
    assert "torch_utils" not in sys.modules and "dnnlib" not in sys.modules
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_the_weights_come_out_under_edms_names(tmp_path, protocol):
    state, settings = read_edm_pickle(write(tmp_path / "net.pkl", protocol))
    assert set(state) == {"model.map_layer0.weight", "model.map_layer0.bias", "model.enc.64x64_conv.weight",
                          "model.enc.64x64_conv.resample_filter", "model.enc.64x64_block0.conv0.weight",
                          "model.enc.64x64_block0.conv0.resample_filter"}
    assert torch.equal(state["model.enc.64x64_conv.weight"], weights(0, 4, 3, 3, 3))
    assert torch.equal(state["model.map_layer0.weight"], weights(1, 5, 4).half())
    assert torch.equal(state["model.map_layer0.bias"], weights(2, 8)[2:7])             # part of a storage
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in state.values())


def test_the_settings_tell_the_architecture(tmp_path):
    settings = read_edm_pickle(write(tmp_path / "net.pkl"))[1]
    assert settings["class_name"] == "EDMPrecond" and settings["img_resolution"] == 64
    assert settings["sigma_data"] == 0.5 and settings["_init_kwargs"]["channel_mult"] == [1, 2, 2, 2]
    model, block = settings["modules"]["model"], settings["modules"]["model.enc.64x64_block0"]
    assert model["class_name"] == "SongUNet" and model["dtype"] == 0.5 and model["on"] is True
    assert block == dict(class_name="UNetBlock", num_heads=1, skip_scale=np.sqrt(0.5), training=False)
    assert settings["modules"]["model.enc"]["class_name"] == "ModuleDict"


def test_both_spellings_of_numpys_scalars_are_read(tmp_path):
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    content = write(tmp_path / "net.pkl", protocol=3).read_bytes()
    written = new if new in content else old
    for spelling in (old, new):
        (tmp_path / "net.pkl").write_bytes(content.replace(b"c" + written + b"\n", b"c" + spelling + b"\n"))
        assert read_edm_pickle(tmp_path / "net.pkl")[1]["modules"]["model"]["dtype"] == 0.5


def test_a_process_without_edms_modules_reads_it_without_a_word(tmp_path):
    code = ("import sys, twosdm\nstate, _ = twosdm.read_edm_pickle(sys.argv[1])\n"
            "assert len(state) == 6 and not {'torch_utils', 'dnnlib'} & set(sys.modules)")
    run = subprocess.run([sys.executable, "-c", code, write(tmp_path / "net.pkl")], capture_output=True,
                         text=True, cwd=os.path.dirname(twosdm.__file__))
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_files_that_are_cut_or_foreign_get_one_sentence(tmp_path):
    content = write(tmp_path / "net.pkl").read_bytes()
    torch.save(dict(ema=torch.zeros(3)), tmp_path / "torch.pt")
    foreign = {"half": content[:len(content) // 2], "end": content[:-1], "empty": b"",
               "text": b"<html>404</html>", "torch": (tmp_path / "torch.pt").read_bytes(),
               "list": pickle.dumps([1, 2]),
               "number": pickle.dumps(dict(ema=1)), "none": pickle.dumps(dict(G_ema=dict()))}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not one of EDM's network pickles") as error:
            read_edm_pickle(tmp_path / name)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "missing.pkl", tmp_path):
        with pytest.raises(UserError, match="cannot be opened"):
            read_edm_pickle(path)


def attempts(marker):
    """(what must be named, an object whose reading as a plain pickle would leave the marker behind)"""
    command = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w')"
    opened = Call(open, str(marker), "w")            # also hidden among the objects of an array
    yield f"{os.system.__module__}.system", Call(os.system, command)
    yield "builtins.eval", Call(eval, python)
    yield "builtins.exec", Call(exec, python)
    yield "subprocess.Popen", Call(subprocess.Popen, ["touch", str(marker)])
    yield "builtins.getattr", Call(Call(getattr, "", "join"), [command])
    yield f"{open.__module__}.open", opened
    yield "torch.hub.load", Call(torch.hub.load, str(marker.parent), "entry")
    yield "torch.serialization.load", Call(torch.load, str(marker))
    yield f"{np.array([None]).__reduce__()[0].__module__}._reconstruct", np.array([opened], dtype=object)


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("place", ["in the network", "beside it", "in the bytes of a storage"])
def test_a_malicious_pickle_runs_nothing_and_is_refused_by_name(tmp_path, number, place):
    marker = tmp_path / "marker"
    name, attempt = list(attempts(marker))[number]
    if place == "in the bytes of a storage":
        attempt = Call(torch.storage._load_from_bytes, legacy(attempt))
        name = name.split(".")[-1]                   # the old protocol has other names for modules
    if place == "beside it":
        path = write(tmp_path / "net.pkl", attack=attempt)
    else:
        path = write(tmp_path / "net.pkl", extra=[attempt])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read_edm_pickle(path)
    assert "nothing was run" in str(error.value) and "\n" not in str(error.value)
    assert not marker.exists()


def legacy(attempt):
    """A torch file of the old format whose pickle holds the attempt."""
    file = io.BytesIO()
    torch.save(attempt, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_the_source_code_inside_is_never_run(tmp_path):
    marker = tmp_path / "marker"
    state, settings = read_edm_pickle(write(tmp_path / "net.pkl", source=f"open({str(marker)!r}, 'w')"))
    assert len(state) == 6 and not marker.exists()


@pytest.mark.parametrize("name", ["builtins\nset.__class__", "collections\nOrderedDict.fromkeys",
                                  "torch.storage\n_load_from_bytes.__globals__", "torch\nstorage"])
def test_no_attribute_of_an_allowed_name_can_be_reached(tmp_path, name):
    module, attribute = (part.encode() for part in name.split("\n"))
    content = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(attribute)]) + attribute
    (tmp_path / "net.pkl").write_bytes(content + b"\x93.")
    with pytest.raises(UserError, match=name.replace("\n", r"\.")):
        read_edm_pickle(tmp_path / "net.pkl")


def test_allowed_names_with_odd_arguments_do_no_harm(tmp_path):
    """Each of these ends in one sentence, changes nothing of torch or numpy, and crashes nothing."""
    tensor = torch._utils._rebuild_tensor_v2
    scalar = np.float64(1).__reduce__()[0]
    before = tensor.__defaults__, torch.Tensor.__setstate__, dict(vars(torch._utils))
    four = torch.zeros(4).__reduce_ex__(4)[1][0]     # a storage
    odd = [Call(tensor, four, 0, (100,), (1,), False, {}), Call(tensor, four, -1, (1,), (1,), False, {}),
           Call(tensor, four, 0, (2,), (-1,), False, {}), Call(tensor, "text", 0, (), (), False, {}),
           Call(scalar, Call(np.dtype, "O", False, True), b"\1\2\3\4\5\6\7\x08"),
           Call(scalar, Call(np.dtype, "V8", False, True), b"\1" * 8),
           Call(scalar, Call(np.dtype, "f8"), b"1"),
           Call(np.dtype, "f8", False, True, state=(3, "<", None, ("a",), {"a": 1}, 9, 9, 9)),
           Call(set, 3), Call(torch.storage._load_from_bytes, b"\x80\x02."),
           Call(torch._utils._rebuild_parameter), Call(OrderedDict, 1)]
    for number, attempt in enumerate(odd):
        path = write(tmp_path / f"{number}.pkl", extra=[attempt])
        try:
            read_edm_pickle(path)
        except UserError as error:
            assert "\n" not in str(error)
    poison = b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93N}\x8c\x0c__defaults__)s\x86b."
    (tmp_path / "poison.pkl").write_bytes(poison)
    assert pickle.loads(poison) is tensor and tensor.__defaults__ == ()                # the attack is real
    tensor.__defaults__ = before[0]
    with pytest.raises(UserError):
        read_edm_pickle(tmp_path / "poison.pkl")
    assert before == (tensor.__defaults__, torch.Tensor.__setstate__, dict(vars(torch._utils)))


def publish(path, weights, class_name="EDMPrecond", sigma_data=0.5, source="", **extra):
    """A pickle of EDM's layout with these weights, named as EDM names them."""
    def boxed(here, tensors, name="Anything", **state):
        mine = [(key, torch.nn.Parameter(x)) for key, x in tensors.items() if "." not in key]
        inner = OrderedDict()
        for key, x in tensors.items():
            if "." in key:
                inner.setdefault(key.split(".")[0], {})[key.split(".", 1)[1]] = x
        return here.module(name, mine, [(key, boxed(here, part)) for key, part in inner.items()], **state)

    with Elsewhere() as here:
        net = boxed(here, weights, class_name, source=source, sigma_data=sigma_data, **extra)
        path.write_bytes(pickle.dumps(dict(ema=net)))
    return path


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_a_published_network_loads_into_the_unet(tmp_path, arch):
    """From a pickle of EDM's layout to a U-Net, strictly: every weight finds its place."""
    weights = edm_weights(arch)
    net = edm_tiny(arch)
    net.load_state_dict(twosdm.load_edm_pickle(publish(tmp_path / "net.pkl", weights)))
    assert torch.equal(net.out_conv.weight, weights[
        "model.dec.16x16_aux_conv.weight" if arch == "ddpmpp" else "model.out_conv.weight"])


def edm_names(net):
    """A U-Net's state dict under EDM's names: the inverse of `from_edm_names`."""
    R = size = net.resolution
    names, state = {"enc.0": f"enc.{R}x{R}_conv", "map_cond": "map_label"}, {}
    for part, first in ("enc", 1), ("dec", 2):
        number = 0
        for i, block in list(enumerate(getattr(net, part)))[first:]:
            if block.resample:
                size, number = size // 2 if block.resample == "down" else size * 2, 0
            names[f"{part}.{i}"] = f"{part}.{size}x{size}_{block.resample or f'block{number}'}"
            number += not block.resample
        if part == "enc":
            names |= {f"dec.{i}": f"dec.{size}x{size}_in{i}" for i in range(2)}
    if not net.adm:
        names |= {f"out_{part}": f"dec.{R}x{R}_aux_{part}" for part in ("norm", "conv")}
    for name, tensor in net.state_dict().items():
        if ".qkv." in name:
            tensor = tensor.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
        depth = 2 if name.startswith(("enc.", "dec.")) else 1
        head, rest = ".".join(name.split(".")[:depth]), name.split(".")[depth:]
        state[".".join(["model", names.get(head, head), *rest])] = tensor
    for key in [key for key in names.values() if key.endswith(("_up", "_down"))]:
        for layer in ("conv0", "skip"):
            state[f"model.{key}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return state


TINY = dict(resolution=16, channels=3, cond_dim=5, augment_dim=9, width=32, arch="ddpm++", mults=(1, 2),
            blocks=1, attention=(8,))
SIZES = {
    "ddpmpp": TINY, "adm": dict(TINY, arch="adm", width=64),
    "ffhq": dict(resolution=64, channels=3, cond_dim=0, augment_dim=9, arch="ddpm++", width=128,
                 mults=(1, 2, 2, 2), blocks=4, attention=(16,)),
    "imagenet": dict(resolution=64, channels=3, cond_dim=1000, augment_dim=0, arch="adm", width=192,
                     mults=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8)),
    "cifar10": dict(resolution=32, channels=3, cond_dim=10, augment_dim=9, arch="ddpm++", width=128,
                    mults=(2, 2, 2), blocks=4, attention=(16,)),
    "latent": dict(resolution=32, channels=4, cond_dim=1000, augment_dim=0, arch="adm", width=192,
                   mults=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8))}


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_the_names_invert(arch):
    """`edm_names`, on which the tests below rest, makes EDM's own names and shapes, and comes back."""
    net = edm_tiny(arch)
    state = edm_names(net)
    theirs = json.loads((HERE / f"edm_tiny_{arch}_shapes.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == theirs
    back = twosdm.from_edm_names(state)
    assert set(back) == set(net.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_tell_the_settings(size):
    with torch.device("meta"):
        state = edm_names(UNet(**SIZES[size]))
    assert edm_settings(state) == SIZES[size]


def test_settings_without_attention_or_augmentation():
    bare = dict(TINY, cond_dim=0, augment_dim=0, attention=(), mults=(1,), blocks=2)
    assert edm_settings(edm_names(UNet(**bare))) == bare
    assert edm_settings(edm_weights("ddpmpp")) == SIZES["ddpmpp"]
    assert edm_settings(edm_weights("adm")) == SIZES["adm"]


def ncsnpp(state, part):
    """What tells NCSN++ from DDPM++, one at a time."""
    other = dict(state)
    if part == "frequencies":
        other["model.map_noise.freqs"] = torch.ones(16)
    elif part == "encoder":
        other["model.enc.8x8_aux_residual.weight"] = torch.ones(32, 3, 3, 3)
    elif part == "filter":
        other |= {name: torch.ones(1, 1, 4, 4) for name in state if "resample_filter" in name}
    elif part == "noise":
        other["model.map_layer0.weight"] = torch.ones(128, 64)
    return other


@pytest.mark.parametrize("part", ["frequencies", "encoder", "filter", "noise"])
def test_ncsnpp_is_refused(tmp_path, part):
    path = publish(tmp_path / "ve.pkl", ncsnpp(edm_weights("ddpmpp"), part))
    for read in edm_checkpoint, entry:
        with pytest.raises(UserError, match=r"ve\.pkl is neither DDPM.*-vp\.pkl or .*-cond-adm\.pkl"):
            read(path)


@pytest.mark.parametrize("change", [
    dict(class_name="VPPrecond"), dict(class_name="EDMPrecond\n"), dict(sigma_data=0.0), dict(sigma_data="a"),
    dict(sigma_data=math.nan), dict(sigma_data=[0.5])])
def test_other_preconditionings_are_refused(tmp_path, change):
    """EDM also published reruns of other papers: the same tensors, another denoiser."""
    path = publish(tmp_path / "net.pkl", edm_weights("ddpmpp"), **change)
    with pytest.raises(UserError, match="with EDM's preconditioning") as error:
        edm_checkpoint(path)
    assert "\n" not in str(error.value)


def test_files_of_something_else_are_refused(tmp_path):
    weights = edm_weights("adm")
    last = list(weights)[-1]
    for state in ({}, dict(weights, extra=torch.zeros(3)), {k: v for k, v in weights.items() if k != last},
                  dict(weights, **{"model.enc.16x16_conv.weight": torch.zeros(0)}),
                  dict(weights, **{"model.enc.16x16_conv.weight": torch.zeros(0, 3, 3, 3)}),
                  {"model.enc.9999x9999_block0.conv0.weight": torch.zeros(3, 3)},
                  {"model.enc." + "9" * 5000 + "x" + "9" * 5000 + "_block0.conv0.weight": torch.zeros(3)},
                  {"model.dec": torch.zeros(3)}):
        with pytest.raises(UserError, match="neither DDPM") as error:
            edm_settings(state)
        assert "\n" not in str(error.value)


def golden(arch):
    return {k: torch.from_numpy(v) for k, v in np.load(HERE / f"edm_tiny_{arch}.npz").items()}


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_a_published_file_is_a_checkpoint_that_samples(tmp_path, arch):
    published = edm_checkpoint(publish(tmp_path / "net.pkl", edm_weights(arch)))
    twosdm.save_checkpoint(tmp_path / "checkpoint.pt", **published)
    checkpoint = twosdm.load_checkpoint(tmp_path / "checkpoint.pt", stage="baseline")
    reference, denoiser = golden(arch), twosdm.load_denoiser(checkpoint)
    with torch.no_grad():
        out = denoiser(reference["x"], reference["sigma"], reference["label"])
    assert (out - reference["denoised_no_augment"]).abs().max() < 1e-5
    parser = argparse.ArgumentParser()
    sample.add_sampling_flags(parser)
    args = parser.parse_args(["--checkpoint", str(tmp_path / "checkpoint.pt"), "--steps", "2"])
    pipeline = sample.Pipeline(args, "baseline", torch.device("cpu"))
    assert pipeline([0, 1]).shape == (2, 16, 16, 3)
    assert pipeline.describe()["images_seen"] == {"baseline": None}
    drawn = pipeline.labels(range(500)).sum(0)
    assert drawn.shape == (5,) and drawn.min() > 70                     # uniform, and all of them


def test_a_published_file_without_classes_is_a_checkpoint_without_classes(tmp_path):
    state = edm_names(UNet(**dict(TINY, cond_dim=0)))
    checkpoint = edm_checkpoint(publish(tmp_path / "edm-small-uncond-vp.pkl", state, sigma_data=0.25))
    assert checkpoint["dataset"] == "edm-small-uncond-vp" and checkpoint["config"]["a"] == "none"
    assert checkpoint["data"]["classes"] == [] and checkpoint["data"]["class_counts"] is None
    assert checkpoint["model"]["sigma_data"] == twosdm.load_denoiser(checkpoint).sigma_data == 0.25


def random_weights(state):
    """None of them zero, so that whatever is misplaced shows."""
    generator = torch.Generator().manual_seed(0)
    return {name: tensor if "filter" in name else torch.randn(tensor.shape, generator=generator)
            / math.sqrt(max(1, tensor[0].numel())) * (1 if tensor.ndim > 1 else 0.1) + ("norm" in name)
            for name, tensor in state.items()}


def entry(path, settings=TINY, classes=5, dims=7, **changes):
    """A new denoiser for y of `dims` and a of `classes`, finetuned from the file."""
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(**dict(settings, cond_dim=dims + classes, **changes))).eval()
    init_from_edm(denoiser, path, classes)
    return denoiser


def whole(path):
    """The pretrained denoiser, in the memory format of a new one: another one rounds otherwise."""
    checkpoint = edm_checkpoint(path)
    denoiser = twosdm.build_denoiser(checkpoint["model"])
    denoiser.load_state_dict(checkpoint["ema"])
    return denoiser.eval()


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
@pytest.mark.parametrize("augment_dim", [0, 9])
def test_at_step_0_a_finetuned_net_equals_the_class_conditional_one_whatever_y_is(
        tmp_path, arch, augment_dim):
    path, given = publish(tmp_path / "net.pkl", edm_weights(arch)), golden(arch)
    denoiser = entry(path, SIZES[arch], augment_dim=augment_dim)
    net, pretrained = (copy.deepcopy(d.net).double() for d in (denoiser, whole(path)))
    label = given["augment"] if augment_dim else None
    expected = given["denoised" if augment_dim else "denoised_no_augment"]
    with torch.no_grad():
        for scale in 0.0, 0.5, 10.0:
            cond = twosdm.join(scale * torch.randn(2, 7), given["label"])
            out = denoiser(given["x"], given["sigma"], cond, label)
            assert (out - expected).abs().max() < 1e-5
            x, c_noise, a, cond, augment = (                            # in float64, for float32 rounds
                v if v is None else v.double() for v in (
                    given["x"], given["sigma"].log() / 4, given["label"], cond, label))
            difference = net(x, c_noise, cond, augment) - pretrained(x, c_noise, a, augment)
            assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("theirs, ours", [(0, 0), (0, 9), (9, 0), (9, 9)])
def test_at_step_0_a_finetuned_net_equals_the_unconditional_one_whatever_y_and_a_are(
        tmp_path, arch, classes, theirs, ours):
    settings = dict(SIZES[arch], cond_dim=0, augment_dim=theirs)
    path = publish(tmp_path / "net.pkl", random_weights(edm_names(UNet(**settings))))
    denoiser = entry(path, settings, classes, augment_dim=ours)
    pretrained = whole(path)
    x, sigma = torch.randn(3, 3, 16, 16), torch.tensor([0.01, 1.0, 50.0])
    label = torch.randn(3, 9)
    with torch.no_grad():
        expected = pretrained(x, sigma, None, label if theirs and ours else None)
        assert torch.equal(denoiser(x, sigma, torch.randn(3, 7 + classes), label if ours else None), expected)


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
@pytest.mark.parametrize("labels", [0, 5])
def test_after_one_step_y_and_the_augmentation_matter(tmp_path, arch, labels):
    settings = dict(SIZES[arch], cond_dim=labels, augment_dim=0)
    path = publish(tmp_path / "net.pkl", random_weights(edm_names(UNet(**settings))))
    denoiser = entry(path, settings, labels, augment_dim=9)
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    y, label = torch.randn(2, 7 + labels), torch.randn(2, 9)

    def effects():
        with torch.no_grad():
            other = torch.cat([y[:, :7] + 1, y[:, 7:]], 1)
            out = denoiser(x, sigma, y, label)
            return [bool((denoiser(x, sigma, *conditions) - out).abs().max() > 1e-5)
                    for conditions in ((other, label), (y, label + 1))]

    assert effects() == [False, False]
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    denoiser.loss(x, y, label).mean().backward()
    optimizer.step()
    assert effects() == [True, True]


@pytest.mark.parametrize("changes, words", [
    (dict(resolution=32), ["--resolution 32", "for 16"]),
    (dict(arch="adm", width=64), ["--arch adm", "for ddpm++"]),
    (dict(width=64), ["--width 64", "for 32"]), (dict(mults=(1, 2, 2)), ["--mults 1,2,2", "for 1,2"]),
    (dict(mults=(2, 2)), ["--mults 2,2", "for 1,2"]), (dict(blocks=2), ["--blocks 2", "for 1"]),
    (dict(attention=(16, 8)), ["--attention 16,8", "for 8"]), (dict(attention=()), ["--attention none"]),
    (dict(channels=4), ["channels 4", "for 3"]), (dict(augment_dim=6), ["augment_dim 6", "for 9"]),
    (dict(classes=0), ["5 classes", "none"]), (dict(classes=4), ["5 classes", "for 4"])])
def test_a_file_for_another_network_is_refused(tmp_path, changes, words):
    path = publish(tmp_path / "net.pkl", edm_weights("ddpmpp"))
    with pytest.raises(UserError, match="net.pkl") as error:
        entry(path, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_another_sigma_data_is_refused_and_nothing_is_changed(tmp_path):
    path = publish(tmp_path / "net.pkl", edm_weights("ddpmpp"), sigma_data=1.0)
    denoiser = Denoiser(UNet(**TINY))
    before = twosdm.fingerprint(denoiser)
    with pytest.raises(UserError, match="sigma_data 0.5 does not fit"):
        init_from_edm(denoiser, path, 5)
    assert twosdm.fingerprint(denoiser) == before


@pytest.mark.parametrize("read", [edm_checkpoint, entry])
def test_neither_way_to_use_a_file_runs_what_is_inside(tmp_path, read):
    """A whole network that would load, with something beside it: the attempts and places tested above."""
    marker, weights = tmp_path / "marker", edm_weights("ddpmpp")
    commands = dict(attempts(marker))
    system = commands[f"{os.system.__module__}.system"]
    for attempt, name in ((system, "system"), (commands["builtins.eval"], "eval"),
                          (Call(torch.storage._load_from_bytes, legacy(system)), "system")):
        path = publish(tmp_path / "net.pkl", weights, extra=attempt)
        with pytest.raises(UserError, match=name):
            read(path)
        assert not marker.exists()
        pickle.loads(pickle.dumps(attempt))                             # the attack is real
        assert marker.exists()
        marker.unlink(missing_ok=True)
    read(publish(tmp_path / "net.pkl", weights, source=f"open({str(marker)!r}, 'w')"))
    assert not marker.exists()


def test_the_scripts_sample_from_a_published_file_and_finetune_it(tmp_path, call):
    net = UNet(16, width=8, mults=(1, 2), blocks=1, attention=(8,), augment_dim=9)
    file = publish(tmp_path / "edm-tiny-uncond-vp.pkl", edm_names(net))
    flags = ["--method", "baseline", "--checkpoint", file, "--n", 3, "--steps", 2]
    assert call(sample, *flags, cwd=tmp_path)[0] == 0
    assert len(list(tmp_path.glob("samples/edm-tiny-uncond-vp-baseline/0*.png"))) == 3
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")

    def finetune(images, width, *more):
        return call(train, *("--dataset folder --data pictures --embedder pixels --resolution 16 --mults 1,2 "
                             "--attention 8 --blocks 1 --batch 4 --preview 0 --stage image --lr 0").split(),
                    "--images", images, "--width", width, *more, cwd=tmp_path)

    code, out, err = finetune(4, 12, "--init-from", file)
    assert code == 1 and "--width 12 does not fit" in err
    assert finetune(4, 8, "--init-from", file)[0] == 0
    weights = twosdm.load_checkpoint(tmp_path / "runs/folder/image/checkpoint.pt")["ema"]
    assert torch.equal(weights["net.enc.1.conv0.weight"], net.enc[1].conv0.weight)     # with a step size of 0
    assert (weights["net.map_cond.weight"] == 0).all() and (weights["net.map_cond.bias"] == 0).all()
    code, out, err = finetune(8, 8)
    assert code == 1 and "--init-from" in err                          # another run than it was
    assert finetune(8, 8, "--init-from", file)[0] == 0
    assert call(train, "--stage", "prior", "--init-from", file, cwd=tmp_path)[0] == 1
