"""Latent diffusion: the autoencoder, the scale of latents, their cache, pixels that stay in the source."""
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

import sample
import train
import twosdm
from twosdm import UserError, prepare_images

SIZE = 16


def save_vae(path, channels=4):
    """A folder with a tiny random VAE of factor 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4)
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def autoencoder(weights):
    return twosdm.Autoencoder(weights)


@pytest.fixture
def source(tmp_path):
    """A folder of two classes with 40 images, of which one cannot be read."""
    for i in range(40):
        path = tmp_path / "in" / f"{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE + i % 5, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "in/0/010.png").write_bytes(b"bad")
    return tmp_path / "in"


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_encode_gives_mean_and_deviation_of_the_vae_for_images_from_0_to_1(weights, autoencoder):
    import diffusers
    vae = diffusers.AutoencoderKL.from_pretrained(weights, low_cpu_mem_usage=False)
    x = random(3, 3, SIZE, SIZE).clip(-1, 1)
    posterior = vae.encode((x + 1) / 2).latent_dist
    moments = autoencoder.encode(x)
    assert moments.shape == (3, 8, SIZE // 2, SIZE // 2)
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], posterior.std)
    assert autoencoder.channels == 4


@torch.no_grad()
def test_decode_undoes_the_scale_of_latents_and_gives_the_vaes_image(weights, autoencoder):
    import diffusers
    vae = diffusers.AutoencoderKL.from_pretrained(weights, low_cpu_mem_usage=False)
    moments = 5 * random(3, 8, 6, 6)
    noise = random(3, 4, 6, 6)
    mean, deviation = moments.chunk(2, dim=1)
    expected = vae.decode(mean + deviation * noise).sample * 2 - 1
    image = autoencoder.decode(autoencoder.sample(moments, noise))
    assert image.shape == (3, 3, 12, 12)
    assert (image - expected.clip(-1, 1)).abs().max() < 1e-4


def test_latents_with_the_statistics_of_stable_diffusion_get_mean_0_and_rms_one_half(autoencoder):
    """Of the variance, 60 % are between the images' means."""
    center, spread = (torch.tensor(n)[:, None, None] for n in (twosdm.LATENT_MEAN, twosdm.LATENT_STD))
    means = center + spread * 0.6**0.5 * random(200, 4, 16, 16)
    deviations = (spread * 0.4**0.5).expand_as(means)
    z = autoencoder.sample(torch.cat([means, deviations], 1), random(400, 4, 16, 16)[200:])
    assert z.mean((0, 2, 3)).abs().max() < 0.01
    assert (z.std((0, 2, 3)) - 0.5).abs().max() < 0.01


def test_neither_autocast_nor_chunks_change_a_direction(autoencoder):
    x = random(5, 3, SIZE, SIZE)
    moments = autoencoder.encode(x)
    z = 3 * moments[:, :4]
    image = autoencoder.decode(z)
    assert image.abs().max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        for chunk in (1, 2, 8):
            assert (autoencoder.encode(x, chunk) - moments).abs().max() < 1e-5
            assert (autoencoder.decode(z, chunk) - image).abs().max() < 1e-5


def test_latents_are_prepared_of_every_good_image_and_pixels_stay_in_the_source(
        source, tmp_path, autoencoder):
    with pytest.raises(UserError, match="1 of 40 images.*010.png"):
        prepare_images(source, SIZE, tmp_path / "latents", autoencoder=autoencoder)
    pixels = prepare_images(source, SIZE, tmp_path / "pixels", skip_bad=True)
    images = prepare_images(source, SIZE, tmp_path / "latents", True, autoencoder)
    encoded = autoencoder.encode(pixels.batch(np.arange(39))).numpy()
    latents = images.latents[np.arange(39)]
    assert np.abs(latents - encoded).max() < 1e-5
    assert images.shape == (4, 8, 8) and pixels.shape == (3, SIZE, SIZE)
    assert images.fingerprint != pixels.fingerprint
    assert (images.labels == pixels.labels).all()
    assert images.classes == pixels.classes == ["0", "1"]
    rows = np.random.RandomState(0).permutation(39)
    for part in (rows, rows[:1], slice(2, 9)):
        assert np.array_equal(images.pixels[part], pixels.pixels[part])
    files = (tmp_path / "latents").glob("*.rows")
    assert sum(file.stat().st_size for file in files) == 40 * (1 + 4 * 8 * 8 * 8)
    # Pixels that have gone bad since are named.
    (source / "0/002.png").write_bytes(b"bad")
    with pytest.raises(UserError, match="^[^\n]*0/002.png cannot be read any more[^\n]*$"):
        images.pixels[:9]


def test_latents_serve_only_the_autoencoder_that_made_them(weights, source, tmp_path, autoencoder):
    first = prepare_images(source, SIZE, tmp_path / "cache", True, autoencoder)
    other = twosdm.Autoencoder(weights)
    assert prepare_images(source, SIZE, tmp_path / "cache", True, other).fingerprint == first.fingerprint
    assert len(list(tmp_path.glob("cache/*.rows"))) == 1
    with torch.no_grad():
        next(other.parameters()).add_(1)
    changed = prepare_images(source, SIZE, tmp_path / "cache", True, other)
    assert changed.fingerprint != first.fingerprint
    assert not np.array_equal(changed.latents[:9], first.latents[:9])


def test_without_diffusers_or_usable_weights_one_sentence_says_what_to_do(
        weights, tmp_path, monkeypatch, capfd):
    import safetensors.torch as safe
    (tmp_path / "empty").mkdir()
    for name in ("cut", "lacking"):
        shutil.copytree(weights, tmp_path / name)
    file = tmp_path / "cut/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    file = tmp_path / "lacking/diffusion_pytorch_model.safetensors"
    tensors = list(safe.load_file(file).items())
    safe.save_file(dict(tensors[1:]), file, metadata={"format": "pt"})
    save_vae(tmp_path / "other", channels=8)
    for name in ("missing", "empty", "cut", "lacking", "other"):
        with pytest.raises(UserError, match=f"^[^\n]*{name}' cannot be loaded [^\n]*connect once[^\n]*$"):
            twosdm.Autoencoder(tmp_path / name)
    assert capfd.readouterr().err == "" and not logging.root.manager.disable
    with pytest.raises(UserError, match="--resolution 100 must be divisible by 64"):
        train.configure("imagenet-latent", resolution=100)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        twosdm.Autoencoder()


def test_latents_train_and_sample_from_files_to_pictures(source, weights, tmp_path, call):
    flags = ("--dataset imagenet-latent --data in --skip-bad --images 16 --batch 8 --resolution 16 "
             "--embedder pixels --arch ddpm++ --width 8 --mults 1,2 --blocks 1 --attention 4 "
             "--prior-width 16 --prior-depth 1 --prior-heads 2 --steps 2 --stage").split()
    for stage in ("prior", "image", "baseline"):
        code, out, err = call(train, *flags, stage, "--vae", weights, cwd=tmp_path)
        assert code == 0, err
    folder = tmp_path / "runs/imagenet-latent"
    settings = twosdm.load_checkpoint(folder / "image/checkpoint.pt")["model"]["settings"]
    assert (settings["channels"], settings["resolution"], settings["cond_dim"]) == (4, SIZE // 2, 48 + 2)
    assert picture(folder / "image/samples-000000016.png").shape[1] >= 512
    for method in ("2sdm", "oracle", "baseline"):
        code, out, err = call(sample, "--method", method, "--n", 3, "--out", method, cwd=tmp_path)
        assert code == 0, err
        assert picture(tmp_path / method / "000002.png").shape == (SIZE, SIZE, 3)
