"""Latent diffusion: the autoencoder and the scale of latents."""
import logging
import shutil
import sys

import pytest
import torch

import twosdm
from twosdm import UserError, denormalise_latent, normalise_latent

SIZE = 16


def save_vae(path, channels=4):
    """A folder with a tiny random VAE of factor 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def autoencoder(weights):
    return twosdm.Autoencoder(weights)


def images_like(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_gives_mean_and_deviation_of_the_vae_for_images_from_0_to_1(weights, autoencoder):
    import diffusers
    x = images_like((3, 3, SIZE, SIZE))
    with torch.no_grad():
        posterior = diffusers.AutoencoderKL.from_pretrained(
            weights, low_cpu_mem_usage=False).encode((x + 1) / 2).latent_dist
    moments = autoencoder.encode(x)
    assert moments.shape == (3, 8, SIZE // 2, SIZE // 2) and moments.dtype == torch.float32
    assert (moments[:, :4] == posterior.mean).all() and (moments[:, 4:] == posterior.std).all()
    assert (autoencoder.channels, autoencoder.factor, autoencoder.name) == (4, 2, str(weights))
    assert not autoencoder.model.training and not any(p.requires_grad for p in autoencoder.parameters())


def test_autocast_changes_neither_direction(autoencoder):
    x = images_like((2, 3, SIZE, SIZE))
    z = normalise_latent(autoencoder.encode(x), torch.zeros(2, 4, SIZE // 2, SIZE // 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert (autoencoder.encode(x) == autoencoder.encode(x.double())).all()
        again = autoencoder.decode(z)
    assert again.dtype == torch.float32 and (again == autoencoder.decode(z)).all()


def test_denormalise_undoes_normalise():
    g = torch.Generator().manual_seed(0)
    moments, noise = torch.randn(3, 8, 5, 5, generator=g) * 5, torch.randn(3, 4, 5, 5, generator=g)
    sample = moments[:, :4] + moments[:, 4:] * noise
    assert (denormalise_latent(normalise_latent(moments, noise)) - sample).abs().max() < 1e-5


def test_latents_with_the_statistics_of_stable_diffusion_get_mean_0_and_rms_one_half():
    g = torch.Generator().manual_seed(0)
    centre, spread = (torch.tensor(n)[:, None, None] for n in (twosdm.LATENT_MEAN, twosdm.LATENT_STD))
    share = 0.6                                                        # of the variance, between the means
    means = centre + spread * share**0.5 * torch.randn(200, 4, 16, 16, generator=g)
    deviations = (spread * (1 - share)**0.5).expand_as(means)
    z = normalise_latent(torch.cat([means, deviations], 1), torch.randn(means.shape, generator=g))
    assert (z.mean((0, 2, 3)).abs() < 0.01).all() and (z.std((0, 2, 3)) - 0.5).abs().max() < 0.01


def test_decoding_in_chunks_equals_decoding_at_once_and_stays_in_range(autoencoder):
    z = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 3
    whole = autoencoder.decode(z, chunk=5)
    assert whole.shape == (5, 3, 12, 12) and whole.abs().max() <= 1
    for chunk in (1, 2, 8):
        assert (autoencoder.decode(z, chunk) - whole).abs().max() < 1e-5


def test_decode_gives_the_image_of_the_denormalised_latent(autoencoder):
    z = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = autoencoder.model.decode(denormalise_latent(z)).sample
    assert (autoencoder.decode(z) - (image * 2 - 1).clip(-1, 1)).abs().max() == 0


def test_without_diffusers_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        twosdm.Autoencoder()


def test_weights_that_cannot_be_used_get_one_sentence(weights, tmp_path, capfd):
    import safetensors.torch as st
    (tmp_path / "empty").mkdir()
    for name in ("cut", "lacking"):
        shutil.copytree(weights, tmp_path / name)
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    file = tmp_path / "lacking" / "diffusion_pytorch_model.safetensors"
    st.save_file(dict(list(st.load_file(file).items())[1:]), file, metadata={"format": "pt"})
    for name in ("missing", "empty", "cut", "lacking"):
        with pytest.raises(UserError, match=f"{name}' cannot be loaded .*connect once") as error:
            twosdm.Autoencoder(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="8 latent channels"):
        twosdm.Autoencoder(save_vae(tmp_path / "other", channels=8))
    assert capfd.readouterr().err == "" and not logging.root.manager.disable
