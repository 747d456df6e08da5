"""Theorems about the method, the networks, the embedded world and the plumbing."""
import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import twosdm
from twosdm import (Denoiser, PriorTransformer, SampleNoise, Sampler, UNet, UserError, heun_sample,
                    sigma_schedule)

HERE = Path(__file__).parent


class Silent(nn.Module):
    """A net that answers 0."""

    def forward(self, x, c_noise, cond=None, augment=None):
        return torch.zeros_like(x)


def count(module):
    return sum(p.numel() for p in module.parameters())


# Diffusion

@pytest.mark.parametrize("predict", ["edm", "data"])
def test_the_loss_weight_times_c_out_squared_is_one(predict):
    denoiser, sigma = Denoiser(Silent(), predict=predict), torch.logspace(-3, 2, 50)
    c_out, x = denoiser.scalings(sigma)[1], torch.randn(50, 7)
    noise = torch.randn(50, 7)
    c_skip = denoiser.scalings(sigma)[0]
    error = (c_skip[:, None] * (x + sigma[:, None] * noise) - x).square().sum(1)
    loss = denoiser.loss(x, draws=(sigma, noise))
    assert torch.allclose(loss * c_out**2, error, rtol=1e-4)
    assert predict == "edm" or torch.equal(c_out, torch.ones(50))


def test_scaled_input_and_target_have_unit_variance():
    """EDM's derivation: Var[c_in (x + sigma n)] = 1, and (x - c_skip x_sigma) / c_out has variance 1."""
    torch.manual_seed(0)
    x, n = 0.5 * torch.randn(400_000), torch.randn(400_000)
    for sigma in (0.02, 0.5, 30.0):
        c_skip, c_out, c_in, c_noise = Denoiser(Silent()).scalings(torch.tensor([sigma]))
        assert abs((c_in * (x + sigma * n)).var() - 1) < 0.02
        assert abs(((x - c_skip * (x + sigma * n)) / c_out).var() - 1) < 0.02
        assert abs(c_noise - math.log(sigma) / 4) < 1e-6


def test_noise_levels_are_log_normal():
    torch.manual_seed(0)
    sigma, noise = Denoiser(Silent()).draw(torch.zeros(100_000, 1))
    assert abs(sigma.log().mean() + 1.2) < 0.02 and abs(sigma.log().std() - 1.2) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_the_loss_is_a_sum_over_elements_and_rows_are_independent():
    torch.manual_seed(0)
    net = UNet(8, cond_dim=4, width=8, mults=(1, 2), blocks=1, attention=(4,)).eval()
    x, y = torch.randn(3, 3, 8, 8), torch.randn(3, 4)
    for p in net.parameters():                        # silent layers would hide a leak between rows
        nn.init.normal_(p, std=0.2)
    denoiser, draws = Denoiser(net), Denoiser(net).draw(x)
    whole = denoiser.loss(x, y, draws=draws)
    for i in range(3):
        alone = denoiser.loss(x[i:i + 1], y[i:i + 1], draws=(draws[0][i:i + 1], draws[1][i:i + 1]))
        assert alone.shape == (1,) and torch.allclose(alone[0], whole[i], rtol=1e-4)


# Sampling

def test_the_schedule_is_edms():
    sigmas = sigma_schedule(40)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (41,)
    assert abs(sigmas[0] - 80) < 1e-9 and abs(sigmas[39] - 0.002) < 1e-12 and sigmas[40] == 0
    assert (sigmas.diff() < 0).all()
    assert abs(sigma_schedule(18)[9] - (80**(1 / 7) + 9 / 17 * (0.002**(1 / 7) - 80**(1 / 7)))**7) < 1e-9


def gaussian(mean, std):
    """The exact denoiser of N(mean, std²)."""
    return lambda x, sigma: ((std**2 * x + twosdm.like(sigma, x)**2 * mean)
                             / (std**2 + twosdm.like(sigma, x)**2))


def test_heun_solves_the_gaussian_ode_with_second_order():
    """For data N(m, s²) the flow is x(0) = m + (x(T) - m) s / √(s² + T²): the error falls as 1/N²."""
    noise, errors = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    exact = 1 + (80 * noise - 1) * 0.5 / math.sqrt(0.25 + 6400)
    for steps in (64, 128, 256):
        errors.append(
            (heun_sample(gaussian(1.0, 0.5), noise, sigma_schedule(steps)) - exact).abs().max().item())
    assert errors[-1] < 1e-3
    assert all(3 < a / b < 5 for a, b in zip(errors, errors[1:])), errors


def test_churn_keeps_the_law_of_the_samples():
    """With the exact denoiser, S_noise = 1 and saturated churn, the samples of N(1, 0.5²) stay N(1, 0.5²)."""
    torch.manual_seed(0)
    x = heun_sample(gaussian(1.0, 0.5), torch.randn(40_000, 1), sigma_schedule(256), s_churn=1e9)
    assert abs(x.mean() - 1) < 0.01 and abs(x.std() - 0.5) < 0.01


def test_an_ideal_denoiser_samples_the_data_set_itself():
    """For finite data D(x; sigma) is a softmax average of the data: every sample ends on a data point."""
    data = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ideal(x, sigma):
        return (-torch.cdist(x, data).square() / (2 * sigma[:, None]**2)).softmax(1) @ data

    noise = SampleNoise(range(200)).randn(200, 4)
    nearest = torch.cdist(heun_sample(ideal, noise, sigma_schedule(40)), data).min(1)
    assert nearest.values.max() < 1e-3 and len(nearest.indices.unique()) == 5


def test_heun_makes_2n_minus_1_evaluations_and_ends_on_an_euler_step():
    calls = []
    heun_sample(lambda x, s: calls.append(s[0].item()) or x * 0, torch.ones(2, 1), sigma_schedule(10),
                s_churn=0)
    assert len(calls) == 19 and abs(calls[-1] - 0.002) < 1e-9 and min(calls) > 0


def test_churn_is_saturated_at_root_two_minus_one():
    seen = []
    heun_sample(lambda x, s: seen.append(s[0].item()) or x * 0, torch.ones(1, 1), sigma_schedule(40),
                s_churn=50)
    assert abs(seen[0] - 80 * math.sqrt(2)) < 1e-6


def test_noise_of_a_row_is_a_function_of_its_seed_alone():
    whole, part = SampleNoise([3, 5, 9]), SampleNoise([5])
    for shape in ((3, 2, 2), (7,)):
        assert torch.equal(whole.randn(3, *shape)[1:2], part.randn(1, *shape))
    assert not torch.equal(*SampleNoise([1, 2]).randn(2, 4))


def tiny_pair():
    torch.manual_seed(0)
    prior = Denoiser(PriorTransformer(6, cond_dim=2, width=16, depth=1, heads=2), predict="data").eval()
    image = Denoiser(UNet(8, cond_dim=8, width=8, mults=(1, 2), blocks=1, attention=(4,))).eval()
    for p in [*prior.parameters(), *image.parameters()]:
        nn.init.normal_(p, std=0.1)
    return prior, image


def test_samples_do_not_depend_on_the_batch():
    prior, image = tiny_pair()
    a, sampler = torch.eye(2)[[0, 1, 1]], Sampler(steps=4)
    whole = twosdm.sample_two_stage(prior, image, [7, 8, 9], a, sampler)
    assert whole.shape == (3, 3, 8, 8)
    alone = twosdm.sample_two_stage(prior, image, [8], a[1:2], sampler)
    assert (whole[1] - alone[0]).abs().max() < 1e-4


def test_two_stages_are_the_prior_then_the_image_model():
    prior, image = tiny_pair()
    a, sampler = torch.eye(2), Sampler(steps=4)
    y = twosdm.sample_embeddings(prior, [0, 1], a, sampler)
    x = twosdm.sample_images(image, [0, 1], y, a, Sampler(steps=3))
    assert torch.equal(x, twosdm.sample_two_stage(prior, image, [0, 1], a, sampler, Sampler(steps=3)))


# Networks

def test_parameter_counts_are_edms():
    with torch.device("meta"):
        assert count(UNet(64, augment_dim=9)) == 61_805_571
        assert count(UNet(64, cond_dim=512, augment_dim=9)) == 61_871_235
        assert count(UNet(64, cond_dim=1000, arch="adm")) == 295_899_267
        assert count(UNet(64, cond_dim=1512, arch="adm")) == 296_292_483
        assert count(UNet(64, cond_dim=512, arch="adm")) == 295_524_483


def edm_weights(arch):
    """EDM's state dict, each tensor drawn from its name alone (the recipe of the fixture)."""
    state = {}
    for name, shape in json.loads((HERE / f"edm_tiny_{arch}_shapes.json").read_text()).items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("resample_filter"):
            r = torch.full(shape, 0.25)
        elif r.ndim > 1:
            r = r / math.sqrt(r[0].numel())
        else:
            r = 1 + 0.1 * r if "norm" in name and name.endswith("weight") else 0.1 * r
        state[name] = r
    return state


def edm_tiny(arch):
    kind, width = ("ddpm++", 32) if arch == "ddpmpp" else ("adm", 64)
    return UNet(16, 3, 5, 9, arch=kind, width=width, mults=(1, 2), blocks=1, attention=(8,)).eval()


@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_the_unet_computes_what_edms_does(arch):
    reference = {k: torch.from_numpy(v) for k, v in np.load(HERE / f"edm_tiny_{arch}.npz").items()}
    net = edm_tiny(arch)
    net.load_state_dict(twosdm.from_edm_names(edm_weights(arch)))
    with torch.no_grad():
        for name, augment in ("denoised", reference["augment"]), ("denoised_no_augment", None):
            out = Denoiser(net)(reference["x"], reference["sigma"], reference["label"], augment)
            assert (out - reference[name]).abs().max() < 1e-5


def test_initial_weights_follow_edms_rules():
    torch.manual_seed(0)
    net = UNet(16, cond_dim=5, augment_dim=9, width=32, mults=(1, 2), blocks=1, attention=(8,))
    block = next(m for m in net.modules() if isinstance(m, twosdm.UNetBlock) and m.heads)

    def bound(layer):
        fan = layer.weight[0].numel() + layer.weight[:, :1].numel()
        return layer.weight.abs().max().item() / math.sqrt(6 / fan)

    assert 0.9 < bound(block.conv0) <= 1 and not block.conv0.bias.any()
    assert 0.9 < bound(block.qkv) / math.sqrt(0.2) <= 1
    assert 0.9 < bound(block.conv1) / 1e-5 <= 1.001 and 0.9 < bound(net.out_conv) / 1e-5 <= 1.001
    adm = UNet(16, cond_dim=400, augment_dim=9, arch="adm", width=64, mults=(1, 2), blocks=1, attention=(8,))
    assert not adm.out_conv.weight.any() and not adm.map_augment.weight.any()
    assert abs(adm.map_cond.weight.std() - 1) < 0.02 and adm.map_cond.bias is None
    fan_in = adm.enc[1].conv0.weight[0].numel()
    assert 0.9 < adm.enc[1].conv0.weight.abs().max() * math.sqrt(fan_in) <= 1


def test_the_prior_predicts_from_every_token():
    """Its output depends on y_sigma, sigma, a and the augmentation label; an absent label equals zeros."""
    torch.manual_seed(0)
    prior = PriorTransformer(6, cond_dim=3, augment_dim=9, width=16, depth=2, heads=2).eval()
    for p in prior.parameters():
        nn.init.normal_(p, std=0.3)
    args = dict(y=torch.randn(2, 6), c_noise=torch.randn(2), cond=torch.randn(2, 3),
                augment=torch.randn(2, 9))
    out = prior(**args)
    for name, value in args.items():
        assert not torch.allclose(prior(**(args | {name: value + 1})), out), name
    assert torch.equal(prior(**(args | dict(augment=None))),
                       prior(**(args | dict(augment=torch.zeros(2, 9)))))


# Embeddings

def test_pca_finds_the_axes_of_a_known_gaussian():
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    y = torch.randn(5000, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [5.0, 3, 1, .5, .1, .01])
    y = y @ rotation.T + 2
    pca = twosdm.PCA(y, 3)
    aligned = (pca.basis.double().T @ rotation[:, :3].double()).abs()
    assert (aligned - torch.eye(3)).abs().max() < 0.05
    z = pca.transform(y)
    assert (z.mean(0).abs().max() < 1e-4
            and torch.allclose(z.var(0, correction=0), pca.variance.float(), rtol=1e-4))


@pytest.mark.parametrize("n", [4, 40])
def test_pca_of_all_dimensions_keeps_distances(n):
    """Also with fewer rows than dimensions."""
    y = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    z = twosdm.PCA(y, 12).transform(y)
    z, y = z.double(), y.double()
    assert (torch.cdist(z, z) - torch.cdist(y, y)).abs().max() < 1e-5


def test_clip_without_weights_is_an_error_that_says_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        twosdm.ClipEmbedder(str(tmp_path / "missing.pt"))
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="it should be open_clip_model.safetensors"):
        twosdm.ClipEmbedder(str(tmp_path / "bad.pt"))
    import open_clip

    def offline(*args, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match="--clip-weights FILE"):
        twosdm.ClipEmbedder()


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A CLIP ViT-B/32 of random weights in a file of the public format, and the model that it came from."""
    import open_clip
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(model.state_dict(), path)
    return path, model


def test_clip_embeds_raw_from_a_local_file_after_bilinear_resizing(clip_file):
    path, model = clip_file
    embedder, x = twosdm.ClipEmbedder(str(path)), torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                         (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        y = embedder(x)
        large = nn.functional.interpolate(x, (224, 224), mode="bilinear")
        assert torch.allclose(y, model.encode_image(((large + 1) / 2 - mean) / std), atol=1e-5)
        assert y.shape == (2, 512) and (y.norm(dim=1) - 1).abs().min() > 0.01
        assert torch.allclose(embedder(x[1:]), y[1:], atol=1e-5)
        assert embedder.encode_text(["a red star", "two dogs"]).shape == (2, 512)
    assert type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    packed = twosdm.pack_embedder(embedder)
    assert packed["state"] == {} and twosdm.unpack_embedder(packed, 16, str(path)).dim == 512
    with pytest.raises(UserError, match="not those of this run"):
        twosdm.unpack_embedder(packed | dict(fingerprint="0"), 16, str(path))


# The embedded world

def test_image_i_is_a_function_of_seed_and_i_alone():
    some = torch.tensor([5, 99, 10**9])
    assert torch.equal(twosdm.shapes_images(some, 16)[:2],
                       twosdm.shapes_images(torch.arange(100), 16)[[5, 99]])
    assert torch.equal(twosdm.shapes_images(some[2:], 16), twosdm.shapes_images(some, 16)[2:])
    assert not torch.equal(twosdm.shapes_images(some, 16, seed=1), twosdm.shapes_images(some, 16))


def test_attributes_are_uniform_and_backgrounds_differ_from_objects():
    a = twosdm.shapes_attributes(torch.arange(40_000))
    for name, kinds in twosdm.ATTRIBUTES.items():
        assert (torch.bincount(a[name], minlength=kinds) / 40_000 * kinds - 1).abs().max() < 0.07, name
    assert (a["colour"] != a["background"]).all()


def test_the_counter_based_numbers_are_uniform_and_uncorrelated():
    u = twosdm.uniform(0, torch.arange(50_000), 8)
    assert (u >= 0).all() and (u < 1).all() and (u.mean(0) - 0.5).abs().max() < 0.01
    both = torch.cat([u, twosdm.uniform(1, torch.arange(50_000), 8), u.roll(1, 0)], 1)
    assert torch.corrcoef(both.T).fill_diagonal_(0).abs().max() < 0.02


def test_images_show_their_attributes():
    """At 64 pixels: the share of saturated pixels grows with the count; the objects' hue is the colour's."""
    index = torch.arange(300)
    a, images = twosdm.shapes_attributes(index), twosdm.shapes_images(index, 64).double() / 255
    bright = images.max(3).values > 0.8               # (N, H, W): the objects
    share = [bright[a["count"] == c].double().mean() for c in range(4)]
    assert all(x < y for x, y in zip(share, share[1:]))
    for i in range(50):
        mean = images[i][bright[i]].mean(0)
        r, g, b = (mean - mean.min()) / (mean.max() - mean.min())
        hue = math.degrees(math.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
        wanted = list(twosdm.COLOURS.values())[a["colour"][i]]
        assert abs((hue - wanted + 180) % 360 - 180) < 15, (i, hue, wanted)


def test_captions_say_what_the_images_show():
    captions = twosdm.shapes_captions(torch.arange(500))
    assert "one yellow star on an orange background" in captions
    assert all(len(c.split()) == 7 for c in captions)
    clip = twosdm.SmallClip()
    assert clip.encode_text(captions[:3]).shape == (3, clip.dim)
    with pytest.raises(UserError, match="elephant"):
        clip.encode_text(["one red elephant on a blue background"])


# Plumbing

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


def test_every_epoch_shows_every_example_once_whatever_the_batch():
    order = twosdm.Order(10, seed=3)
    rows = order[0:35]
    assert all(sorted(rows[i:i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert not np.array_equal(rows[:10], rows[10:20])
    again = twosdm.Order(10, seed=3)
    assert np.array_equal(np.concatenate([again[0:7], again[7:35]]), rows)
    assert np.array_equal(twosdm.Order(10, seed=3)[28:35], rows[28:])


def test_checkpoints_survive_a_failed_write_and_refuse_what_they_are_not(tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoint.pt"
    twosdm.save_checkpoint(path, stage="prior", value=torch.ones(3))
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(twosdm.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        twosdm.save_checkpoint(path, stage="prior", value=torch.zeros(3))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    with pytest.raises(UserError, match="'prior', not 'image'"):
        twosdm.load_checkpoint(path, stage="image")
    path.write_bytes(before[:100])
    with pytest.raises(UserError, match="damaged"):
        twosdm.load_checkpoint(path)
    torch.save({"foreign": 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        twosdm.load_checkpoint(path)
    torch.save(nn.Linear(1, 1), path)                 # a pickled class is never run
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        twosdm.load_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        twosdm.load_checkpoint(tmp_path / "nothing.pt")


def test_presets_hold_the_papers_numbers():
    for dataset, dropout in (("afhq", 0.25), ("ffhq", 0.05)):
        image, prior = (twosdm.configure(dataset, stage) for stage in ("image", "prior"))
        assert dataclasses.asdict(image) | dict(
            batch=256, lr=2e-4, dropout=dropout, augment=0.15, ema_half_life=500_000, lr_ramp=10_000_000,
            images=25_000_000, arch="ddpm++", width=128, mults=(1, 2, 2, 2), blocks=4, attention=(16,),
            resolution=64, steps=40, churn=50.0, embedder="clip") == dataclasses.asdict(image)
        assert (prior.batch, prior.lr, prior.prior_width, prior.prior_depth,
                prior.prior_heads) == (256, 1e-4, 512, 6, 8)
        assert twosdm.configure(dataset, "baseline") == dataclasses.replace(image, stage="baseline")


@pytest.mark.parametrize("changes, words", [
    (dict(batch=0), "--batch 0 is out of range"), (dict(steps=1), "--steps 1 is out of range"),
    (dict(lr=-1.0), "at least 0"), (dict(dropout=1.0), "at most 0.99"), (dict(lr=math.nan), "--lr nan"),
    (dict(arch="vit"), "choose one of ddpm\\+\\+, adm"), (dict(mults=(1, 0)), "--mults"),
    (dict(width=18), "--width 18"), (dict(resolution=18), "--resolution 18"),
    (dict(prior_heads=3), "--prior-width")])
def test_settings_out_of_range_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        twosdm.configure("shapes", "image", **changes)


def test_suffixes_of_numbers():
    assert [twosdm.count(t) for t in ("25M", "1.5k", "2G", "7")] == [25_000_000, 1500, 2_000_000_000, 7]
    for text in ("", "k", "1.5", "x"):
        with pytest.raises(ValueError):
            twosdm.count(text)


def test_a_grid_shows_every_image_in_its_place():
    pixels = np.arange(3)[:, None, None, None] * np.ones((3, 2, 2, 3)) * 50
    grid = twosdm.image_grid(pixels.astype(np.uint8), 2)
    assert grid.shape == (7, 7, 3)
    assert (grid[1:3, 1:3] == 0).all() and (grid[1:3, 4:6] == 50).all() and (grid[4:6, 1:3] == 100).all()
    assert (grid[0] == 255).all() and (grid[4:6, 4:6] == 255).all()
