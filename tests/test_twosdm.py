"""Theorems about the method, the networks, embeddings, the embedded world, checkpoints."""
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import twosdm
from twosdm import Denoiser, PriorTransformer, SampleNoise, UNet, UserError, heun_sample, sigma_schedule

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


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


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
    sigma = (4 * c_noise).exp()
    _, c_out, c_in, _ = denoiser.scalings(sigma)
    noisy = scaled / c_in[:, None]
    error = (denoiser(noisy, sigma) - x).square().sum(1)
    assert torch.allclose((loss * c_out**2)[:50], error[:50], rtol=1e-4)
    assert abs(sigma.log().mean() + 1.2) < 0.02
    assert abs(sigma.log().std() - 1.2) < 0.02
    assert abs(((noisy - x) / sigma[:, None]).std() - 1) < 0.02
    if predict == "data":                             # D is the net's answer, and lambda is 1
        assert torch.allclose(denoiser(noisy, sigma), scaled / 2)
        assert (c_out == 1).all()


# Sampling

def test_the_schedule_is_edms():
    high = 80 ** (1 / 7)
    low = 0.002 ** (1 / 7)
    for steps in (18, 40):
        sigmas = sigma_schedule(steps)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        assert sigmas.dtype == torch.float64
        assert torch.allclose(sigmas[:-1], (high + ramp * (low - high)) ** 7, rtol=1e-9)
        assert sigmas[steps] == 0


@pytest.mark.parametrize("churn, gain", [(0, 1), (4, 1.1), (50, 2**0.5)])
def test_heun_makes_2n_minus_1_evaluations_and_churn_saturates_at_root_two(churn, gain):
    levels = []

    def denoise(x, sigma):
        levels.append(sigma[0].item())
        return x * 0

    heun_sample(denoise, torch.ones(2, 1), sigma_schedule(40), s_churn=churn)
    assert len(levels) == 79
    assert levels[0] == pytest.approx(80 * gain)
    assert levels[-1] == pytest.approx(0.002 * gain)  # from there an Euler step


def test_each_seed_of_each_stream_has_noise_of_its_own_for_all_kinds_of_integers():
    seeds = [0, 2**23, 2**24 - 1]
    drawn = torch.cat([SampleNoise(seeds, stream=stream).randn(3, 4) for stream in range(256)])
    assert len(drawn.unique(dim=0)) == 3 * 256
    assert torch.equal(drawn[-1:], SampleNoise(np.array(seeds[2:]), stream=255).randn(1, 4))
    for seed in (-1, 2**24):
        with pytest.raises(UserError, match="below 16,777,216"):
            SampleNoise([seed])


# Networks

@pytest.mark.parametrize("arch", SIZES)
def test_initial_weights_follow_edms_rules(arch):
    """Xavier-uniform or, in ADM, U(±1/√fan_in); EDM's names tell the layers that are silent at first."""
    torch.manual_seed(0)
    adm = arch == "adm"
    for name, w in UNet(**SIZES[arch]).named_parameters():
        if w.ndim == 1:
            assert adm or "norm" in name or not w.any(), name
            continue
        if adm and "map_cond" in name:
            assert abs(w.std() - 1) < 0.02
            continue
        bound = w[0].numel() ** -0.5 if adm else (6 / (w[0].numel() + w[:, 0].numel())) ** 0.5
        if any(layer in name for layer in ("conv1", "proj", "out_conv")):
            bound *= 0 if adm else 1e-5
        if not adm and "qkv" in name:
            bound *= 0.2**0.5
        if adm and "map_augment" in name:
            bound = 0
        assert 0.9 * bound <= w.abs().max() <= 1.001 * bound, name


def test_the_prior_predicts_from_every_token():
    """Its output depends on y_sigma, sigma, a and the augmentation label; an absent label equals zeros."""
    prior = loud(PriorTransformer(6, cond_dim=3, augment_dim=9, width=16, depth=2, heads=2), 0.3)
    inputs = [gaussian(2, 6), gaussian(2), gaussian(2, 3), torch.zeros(2, 9)]
    out = prior(*inputs)
    for i, value in enumerate(inputs):
        changed = [*inputs[:i], value + 1, *inputs[i + 1:]]
        assert not torch.allclose(prior(*changed), out), i
    assert torch.equal(prior(*inputs[:3]), out)


# Embeddings

@torch.no_grad()
def test_clip_embeds_raw_from_a_local_file_after_bilinear_resizing(tmp_path):
    """Random weights, in a file of the public format: half precision, as OpenAI has it."""
    import open_clip
    model = open_clip.create_model("ViT-B-32-quickgelu").eval().half()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    x = gaussian(2, 3, 16, 16)
    large = (F.interpolate(x, (224, 224), mode="bilinear") + 1) / 2
    mean, std = torch.tensor([open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD])[:, :, None, None]
    y = twosdm.ClipEmbedder(str(tmp_path / "clip.pt"))(x)
    assert y.shape == (2, 512)
    assert torch.allclose(y, model.float().encode_image((large - mean) / std), atol=1e-5)
    with pytest.raises(UserError, match="missing.pt.*open_clip_model.safetensors.*--embedder-weights FILE"):
        twosdm.ClipEmbedder(str(tmp_path / "missing.pt"))


# The embedded world

def test_the_world_is_the_one_whose_results_are_published():
    """And an image follows from its number alone."""
    index = torch.arange(64)
    images = [twosdm.shapes_images(part, 16).numpy().tobytes() for part in index.split(40)]
    digest = hashlib.sha256(b"".join(images)).hexdigest()
    assert digest == "29fb66a44a4ff6678d678937b6e829f24463baf5f74304bbb170ad521ddfb9b1"


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
    assert ema.net.weight == 1


class Foreign:
    """A pickle of it is a call of a function."""

    def __reduce__(self):
        return pytest.fail, ("a checkpoint was run",)


def test_checkpoints_refuse_what_they_are_not(tmp_path):
    path = tmp_path / "run/checkpoint.pt"

    def refuses(words):
        with pytest.raises(UserError, match=words):
            twosdm.load_checkpoint(path)

    refuses("checkpoint.pt does not exist")
    twosdm.save_checkpoint(path, value=torch.ones(3))
    assert torch.equal(twosdm.load_checkpoint(path)["value"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:100])
    refuses("checkpoint.pt is damaged")
    for foreign in ({"foreign": 1}, Foreign()):
        torch.save(foreign, path)
        refuses("checkpoint.pt is damaged")
