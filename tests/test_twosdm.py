"""Theorems about the method, the networks, the embedded world, checkpoints and settings."""
import json
import math
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import train
import twosdm
from conftest import refused
from twosdm import (Denoiser, PriorTransformer, SampleNoise, Sampler, UNet, UserError, heun_sample,
                    sample_two_stage, sigma_schedule)

HERE = Path(__file__).parent
TINY = dict(resolution=16, channels=3, cond_dim=5, augment_dim=9, width=32, arch="ddpm++", mults=(1, 2),
            blocks=1, attention=(8,))
ADM = dict(TINY, arch="adm", width=64)
SIZES = dict(ddpmpp=TINY, adm=ADM)


def loud(net, std=0.1):
    """The net with random weights everywhere: one that is silent at first would hide what it does."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net.eval()


# Diffusion

class Half(nn.Module):
    """A net that answers with half of its input, and keeps that."""

    def forward(self, x, c_noise, cond=None, augment=None):
        self.seen = x, c_noise
        return x / 2


@pytest.mark.parametrize("predict", ["edm", "data"])
def test_the_loss_is_the_squared_error_at_log_normal_noise_over_c_out_squared(predict):
    torch.manual_seed(0)
    denoiser = Denoiser(Half(), predict=predict)
    x = torch.randn(100_000, 2)
    loss = denoiser.loss(x)
    scaled, c_noise = denoiser.net.seen
    log_sigma = 4 * c_noise
    sigma = log_sigma.exp()
    c_skip, c_out, c_in, _ = denoiser.scalings(sigma)
    noisy = scaled / c_in[:, None]
    error = (denoiser(noisy, sigma) - x).square().sum(1)
    assert torch.allclose((loss * c_out**2)[:50], error[:50], rtol=1e-4)
    assert predict == "edm" or (c_out == 1).all() and not c_skip.any()
    assert abs(log_sigma.mean() + 1.2) < 0.02
    assert abs(log_sigma.std() - 1.2) < 0.02
    assert abs(((noisy - x) / sigma[:, None]).std() - 1) < 0.02


def test_scaled_input_and_target_have_unit_variance():
    """EDM's derivation: Var[c_in (x + sigma n)] = 1, and (x - c_skip x_sigma) / c_out has variance 1."""
    torch.manual_seed(0)
    x = 0.5 * torch.randn(400_000)
    n = torch.randn(400_000)
    for sigma in (0.02, 0.5, 30.0):
        c_skip, c_out, c_in, c_noise = Denoiser(Half()).scalings(torch.tensor([sigma]))
        noisy = x + sigma * n
        assert abs((c_in * noisy).var() - 1) < 0.02
        assert abs(((x - c_skip * noisy) / c_out).var() - 1) < 0.02
        assert abs(c_noise - math.log(sigma) / 4) < 1e-6


# Sampling

def test_the_schedule_is_edms():
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    for steps in (18, 40):
        sigmas = sigma_schedule(steps)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        assert sigmas.dtype == torch.float64
        assert torch.allclose(sigmas[:-1], (high + ramp * (low - high)) ** 7, rtol=1e-9)
        assert sigmas[steps] == 0


def gaussian(x, sigma):
    """The exact denoiser of N(1, 0.5²)."""
    variance = sigma[:, None] ** 2
    return (0.25 * x + variance) / (0.25 + variance)


def test_heun_solves_the_gaussian_ode_with_second_order():
    """For data N(m, s²) the flow is x(0) = m + (x(T) - m) s / √(s² + T²): the error falls as 1/N²."""
    noise = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = 1 + (80 * noise - 1) * 0.5 / math.sqrt(0.25 + 6400)
    errors = []
    for steps in (64, 128, 256):
        x = heun_sample(gaussian, noise, sigma_schedule(steps))
        errors.append((x - exact).abs().max())
    assert errors[2] < 1e-3
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5


def test_churn_keeps_the_law_of_the_samples():
    """With the exact denoiser, S_noise = 1 and saturated churn, the samples of N(1, 0.5²) stay N(1, 0.5²)."""
    torch.manual_seed(0)
    x = heun_sample(gaussian, torch.randn(40_000, 1), sigma_schedule(256), s_churn=1e9)
    assert abs(x.mean() - 1) < 0.01
    assert abs(x.std() - 0.5) < 0.01


@pytest.mark.parametrize("churn, first", [(0, 80), (4, 80 * 1.1), (50, 80 * math.sqrt(2))])
def test_heun_makes_2n_minus_1_evaluations_and_churn_saturates_at_root_two(churn, first):
    levels = []

    def denoise(x, sigma):
        levels.append(sigma[0].item())
        return x * 0

    heun_sample(denoise, torch.ones(2, 1), sigma_schedule(40), s_churn=churn)
    assert len(levels) == 79
    assert abs(levels[0] - first) < 1e-6
    assert abs(levels[-1] - 0.002 * first / 80) < 1e-9       # from there an Euler step


def test_noise_of_a_row_is_a_function_of_its_seed_alone():
    whole = SampleNoise([3, 5, 9]).randn(3, 2, 2)
    assert torch.equal(whole[1:2], SampleNoise([5]).randn(1, 2, 2))
    assert not torch.equal(whole[0], whole[1])


class Ideal(nn.Module):
    """The best net of a finite data set for predict="data": a softmax average of the points of its cond."""

    def __init__(self, points, conditions):
        super().__init__()
        self.points, self.conditions = nn.Parameter(points), conditions
        self.dim = self.channels = points.shape[1]
        self.resolution = points.shape[-1]

    def forward(self, x, c_noise, cond=None, augment=None):
        variance = (8 * c_noise).exp()[:, None]
        noisy = x.flatten(1) * (variance + 0.25).sqrt()
        distances = (noisy[:, None] - self.points.flatten(1)).square().sum(2)
        others = torch.cdist(cond, self.conditions) > 0.01
        weights = (-distances / (2 * variance)).masked_fill(others, -math.inf).softmax(1)
        return (weights @ self.points.flatten(1)).view_as(x)


def test_two_stages_with_ideal_denoisers_sample_the_data_set_itself():
    """Eq. 3: of ten (a, y, x), two for each a, every sample is an x of its a, and all are drawn."""
    torch.manual_seed(0)
    classes = torch.eye(5).repeat(2, 1)
    y = torch.randn(10, 4)
    x = torch.randn(10, 3, 2, 2)
    prior = Denoiser(Ideal(y, classes), predict="data")
    image = Denoiser(Ideal(x, torch.cat([y, classes], 1)), predict="data")
    rows = torch.arange(200) % 5
    samples = sample_two_stage(prior, image, range(200), torch.eye(5)[rows], Sampler(steps=40))
    nearest = torch.cdist(samples.flatten(1).double(), x.flatten(1).double()).min(1)
    assert nearest.values.max() < 1e-3
    assert torch.equal(nearest.indices % 5, rows)
    assert len(nearest.indices.unique()) == 10


def test_samples_do_not_depend_on_the_batch():
    prior = PriorTransformer(6, cond_dim=2, width=16, depth=1, heads=2)
    image = UNet(8, cond_dim=8, width=8, mults=(1, 2), blocks=1, attention=(4,))
    pair = Denoiser(loud(prior), predict="data"), Denoiser(loud(image))
    a = torch.eye(2)[[0, 1, 1]]
    whole = sample_two_stage(*pair, [7, 8, 9], a, Sampler(steps=4))
    alone = sample_two_stage(*pair, [8], a[1:2], Sampler(steps=4))
    assert whole.shape == (3, 3, 8, 8)
    assert (whole[1] - alone[0]).abs().max() < 1e-4
    fewer = sample_two_stage(*pair, [8], a[1:2], Sampler(steps=4), Sampler(steps=3))
    assert not torch.allclose(fewer, alone)           # the image model has steps of its own


# Networks

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
    kind = "Anything"

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src="import os; os.abort()", class_name=self.kind)
        return rebuild, (dict(meta, state=vars(self)),)


def publish(path, weights, protocol=3, insert=b"", **state):
    """A file of EDM's layout. These opcodes are inserted where the string 'insert' stands in its state."""
    network = Persistent()
    vars(network).update(dict(sigma_data=0.5, kind="EDMPrecond") | state)
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
            module._parameters[leaf] = tensor if isinstance(tensor, str) else nn.Parameter(tensor)
    content = pickle.dumps(dict(ema=network, augment_pipe=Persistent()), protocol)
    if protocol == 3:                                  # names of modules that are not there
        content = content.replace(b"ctest_twosdm\nrebuild\n",
                                  b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")
        content = content.replace(b"X\6\0\0\0insert", insert)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("arch", SIZES)
def test_the_unet_computes_what_edms_does_with_edms_file(arch, tmp_path):
    arrays = np.load(HERE / f"edm_tiny_{arch}.npz")
    reference = {name: torch.from_numpy(array) for name, array in arrays.items()}
    net = UNet(**SIZES[arch]).eval()
    net.load_state_dict(twosdm.load_edm_pickle(publish(tmp_path / "edm.pkl", edm_weights(arch))))
    for name, augment in (("denoised", reference["augment"]), ("denoised_no_augment", None)):
        out = Denoiser(net)(reference["x"], reference["sigma"], reference["label"], augment)
        assert (out - reference[name]).abs().max() < 1e-5


@pytest.mark.parametrize("arch", SIZES)
def test_initial_weights_follow_edms_rules(arch):
    """Xavier-uniform or, in ADM, U(±1/√fan_in); EDM's names tell the layers that are silent at first."""
    torch.manual_seed(0)
    adm = arch == "adm"
    for name, w in UNet(**SIZES[arch]).eval().state_dict().items():
        silent = any(layer in name for layer in ("conv1", "proj", "out_conv"))
        if w.ndim == 1:
            assert adm or "norm" in name or not w.any(), name
        elif adm and (silent or "map_augment" in name):
            assert not w.any(), name
        elif adm and "map_cond" in name:
            assert abs(w.std() - 1) < 0.02
        else:
            fan_in, fan_out = w[0].numel(), w[:, 0].numel()
            bound = math.sqrt(1 / fan_in) if adm else math.sqrt(6 / (fan_in + fan_out))
            if not adm and "qkv" in name:
                bound *= math.sqrt(0.2)
            if silent:
                bound *= 1e-5
            assert 0.9 < w.abs().max() / bound <= 1.001, name


def test_the_prior_predicts_from_every_token():
    """Its output depends on y_sigma, sigma, a and the augmentation label; an absent label equals zeros."""
    prior = loud(PriorTransformer(6, cond_dim=3, augment_dim=9, width=16, depth=2, heads=2), 0.3)
    inputs = [torch.randn(2, 6), torch.randn(2), torch.randn(2, 3), torch.randn(2, 9)]
    out = prior(*inputs)
    for i, value in enumerate(inputs):
        assert not torch.allclose(prior(*inputs[:i], value + 1, *inputs[i + 1:]), out), i
    assert torch.equal(prior(*inputs[:3]), prior(*inputs[:3], torch.zeros(2, 9)))


# Embeddings

def test_clip_without_weights_is_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    import open_clip

    def offline(*args, **options):
        raise RuntimeError("no network")

    with pytest.raises(UserError, match="missing.pt"):
        twosdm.ClipEmbedder(str(tmp_path / "missing.pt"))
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="open_clip_model.safetensors"):
        twosdm.ClipEmbedder(str(tmp_path / "bad.pt"))
    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match="--clip-weights FILE"):
        twosdm.ClipEmbedder()


@torch.no_grad()
def test_clip_embeds_raw_from_a_local_file_after_bilinear_resizing(tmp_path):
    """Random weights, in a file of the public format: half precision, as OpenAI has it."""
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().half()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    model.float()
    embedder = twosdm.ClipEmbedder(str(tmp_path / "clip.pt"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    large = (nn.functional.interpolate(x, (224, 224), mode="bilinear") + 1) / 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    y = embedder(x)
    assert y.shape == (2, 512)
    assert torch.allclose(y, model.encode_image((large - mean) / std), atol=1e-5)
    assert (y.norm(dim=1) - 1).abs().min() > 0.01
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a red star", "two dogs"])
    texts = embedder.encode_text(["a red star", "two dogs"])
    assert torch.allclose(texts, model.encode_text(tokens), atol=1e-5)


# The embedded world

def test_image_i_is_a_function_of_seed_and_i_alone():
    some = torch.tensor([5, 99, 10**9])
    images = twosdm.shapes_images(some, 16)
    assert torch.equal(images[:2], twosdm.shapes_images(torch.arange(100), 16)[some[:2]])
    assert not torch.equal(images, twosdm.shapes_images(some, 16, seed=1))


def test_attributes_are_uniform_and_independent_and_backgrounds_differ_from_objects():
    columns = []
    for seed in (0, 1):
        shown = twosdm.shapes_attributes(torch.arange(20_000), seed)
        for name, kinds in twosdm.ATTRIBUTES.items():
            frequency = torch.bincount(shown[name], minlength=kinds) / 20_000
            assert (frequency * kinds - 1).abs().max() < 0.07, name
        shown["background"] = (shown["background"] - shown["color"]) % 8
        assert shown["background"].min() == 1
        columns += shown.values()
    columns = torch.stack(columns).double()
    neighbors = columns[:4].roll(1, 1)
    correlations = torch.corrcoef(torch.cat([columns, neighbors]))
    assert correlations.fill_diagonal_(0).abs().max() < 0.02


def test_images_show_their_attributes():
    """At 64 pixels: the share of bright pixels grows with the count; the objects' hue is the color's."""
    index = torch.arange(300)
    shown = twosdm.shapes_attributes(index)
    images = twosdm.shapes_images(index, 64).double() / 255
    bright = images.max(3).values > 0.8                                     # (N, H, W): the objects
    share = [bright[shown["count"] == count].double().mean() for count in range(4)]
    assert share == sorted(set(share))
    hues = list(twosdm.COLORS.values())
    for i in range(50):
        r, g, b = images[i][bright[i]].mean(0)
        hue = math.degrees(math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b))
        wanted = hues[shown["color"][i]]
        assert abs((hue - wanted + 180) % 360 - 180) < 15, (i, hue, wanted)


def test_captions_say_what_the_images_show():
    captions = twosdm.shapes_captions(torch.arange(500))
    assert "one yellow star on an orange background" in captions
    assert {len(caption.split()) for caption in captions} == {7}
    clip = twosdm.SmallClip()
    assert clip.encode_text(captions[:3]).shape == (3, clip.dim)
    with pytest.raises(UserError, match="elephant"):
        clip.encode_text(["one red elephant on a blue background"])


# Training and files

def test_the_moving_average_has_its_half_life():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = twosdm.EMA(net, half_life=1000, ramp=0.05)
    nn.init.ones_(net.weight)
    for seen in range(10**6, 10**6 + 1000, 100):
        ema.update(net, seen, 100)
    assert abs(ema.net.weight.item() - 0.5) < 1e-5
    ema.update(net, 0, 100)                           # nothing seen: the average is the net itself
    assert ema.net.weight.item() == 1


def test_every_epoch_shows_every_example_once(call, tmp_path):
    """CLIP's loss of a whole epoch does not depend on its order, if nothing is learned."""
    flags = "--stage embedder --resolution 8 --size 8 --batch 8 --images 32 --log 8 --lr 0".split()
    code, out, err = call(train, *flags, cwd=tmp_path)
    assert code == 0, err
    lines = (tmp_path / "runs/shapes/embedder/log.jsonl").read_text().splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])
    assert len(losses) == 4
    assert np.ptp(losses) < 1e-5


def test_checkpoints_refuse_what_they_are_not(tmp_path):
    path = tmp_path / "run" / "checkpoint.pt"

    def refuses(words="checkpoint.pt", **expected):
        with pytest.raises(UserError, match=words):
            twosdm.load_checkpoint(path, **expected)

    refuses("does not exist")
    twosdm.save_checkpoint(path, value=torch.ones(3))
    assert torch.equal(twosdm.load_checkpoint(path)["value"], torch.ones(3))
    refuses("'None', not 'image'", stage="image")
    path.write_bytes(path.read_bytes()[:100])
    refuses("damaged")
    torch.save({"foreign": 1}, path)
    refuses()
    torch.save(Persistent(), path)                    # what is pickled is never run
    refuses()
    twosdm.save_checkpoint(path, value=torch.tensor(math.nan))
    refuses("finite")


@pytest.mark.parametrize("flags, words", [
    ("--batch 0", "--batch 0 is out of range"),
    ("--steps 1", "--steps 1 is out of range"),
    ("--lr nan", "--lr nan"),
    ("--dropout 1", "at most 0.99"),
    ("--arch vit", "choose one of ddpm++, adm"),
    ("--mults 1,0", "--mults"),
    ("--width 18", "--width 18"),
    ("--resolution 18", "--resolution 18"),
    ("--prior-heads 3", "--prior-width"),
    ("--images k", "--images"),
])
def test_settings_out_of_range_are_named(flags, words, call, tmp_path):
    refused(call(train, "--stage", "image", *flags.split(), cwd=tmp_path), words)


def test_numbers_have_suffixes(call, tmp_path):
    flags = "--stage prior --dry-run --images 25M --size 1.5k --seed 7".split()
    code, out, err = call(train, *flags, cwd=tmp_path)
    settings, = json.loads(out)
    found = [settings[name]["value"] for name in ("images", "size", "seed")]
    assert found == [25_000_000, 1500, 7]
