"""Latent diffusion: the autoencoder, the scale of latents, their cache, pixels that stay in the source."""
import logging
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
import twosdm
from twosdm import Images, LazyPixels, UserError, denormalise_latent, normalise_latent, prepare_images

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


@pytest.fixture
def source(tmp_path):
    """A folder of two classes with 150 images, three chunks, of which the sixth cannot be read."""
    for i in range(150):
        path = tmp_path / "in" / f"{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE + i % 5, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "in" / "0" / "010.png").write_bytes(b"bad")
    return tmp_path / "in"


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


def test_the_cache_holds_the_moments_of_every_good_image(source, tmp_path, autoencoder):
    pixels = prepare_images(source, SIZE, tmp_path / "pixels", skip_bad=True, workers=1)
    with pytest.raises(UserError, match="1 of 150 images.*010.png"):
        prepare_images(source, SIZE, tmp_path / "latents", workers=2, autoencoder=autoencoder)
    images = prepare_images(source, SIZE, tmp_path / "latents", True, 2, autoencoder)
    direct = autoencoder.encode(pixels.batch(np.arange(149))).numpy()
    assert images.latents.shape == (149, 8, 8, 8) and images.latents.dtype == np.float32
    assert np.abs(images.latents - direct).max() < 1e-6
    assert images.shape == (4, 8, 8) and pixels.shape == (3, SIZE, SIZE) and pixels.latents is None
    assert not list((tmp_path / "latents").glob("*.u8")) and images.fingerprint != pixels.fingerprint
    assert (images.labels == pixels.labels).all() and images.classes == pixels.classes == ["0", "1"]


def test_the_cache_goes_on_after_an_interruption(source, tmp_path, autoencoder, monkeypatch):
    cache, encode, seen = tmp_path / "cache", autoencoder.encode, []

    def interrupted(x):
        seen.append(len(x))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(autoencoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(source, SIZE, cache, True, 1, autoencoder)
    assert not list(cache.glob("images-*.json"))
    with open(next(cache.glob("latents-*.f32")), "ab") as file:
        file.write(b"half a latent")
    resumed = prepare_images(source, SIZE, cache, True, 1, autoencoder)
    assert seen == [63, 64, 22, 22]                                    # two chunks were not encoded again
    whole = prepare_images(source, SIZE, tmp_path / "whole", True, 1, autoencoder)
    assert (resumed.latents == whole.latents).all() and resumed.fingerprint == whole.fingerprint


def test_a_cache_serves_only_the_autoencoder_that_made_it(source, tmp_path, autoencoder, monkeypatch):
    other = twosdm.Autoencoder(autoencoder.name)
    first = prepare_images(source, SIZE, tmp_path / "cache", True, 1, autoencoder)
    monkeypatch.setattr(other, "encode", lambda x: 1 / 0)
    same = prepare_images(source, SIZE, tmp_path / "cache", True, 1, other)
    assert same.info == first.info                                     # equal weights: nothing is encoded
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ZeroDivisionError):
        prepare_images(source, SIZE, tmp_path / "cache", True, 1, other)


def test_a_chunk_of_bad_images_alone_is_passed_over(tmp_path, autoencoder):
    (tmp_path / "in").mkdir()
    for i in range(65):
        (tmp_path / "in" / f"{i:02}.png").write_bytes(b"bad")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "in" / "64.png")
    assert len(prepare_images(tmp_path / "in", SIZE, tmp_path / "cache", True, 1, autoencoder).latents) == 1


@pytest.mark.parametrize("kind", ["folder", "stored zip", "deflated zip"])
def test_lazy_pixels_equal_prepared_pixels(source, tmp_path, autoencoder, kind):
    if kind != "folder":
        with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED * (kind[0] == "d")) as archive:
            for path in source.rglob("*.png"):
                archive.write(path, path.relative_to(source))
        source = tmp_path / "in.zip"
    plain = prepare_images(source, SIZE, tmp_path / "pixels", skip_bad=True, workers=1)
    images = prepare_images(source, SIZE, tmp_path / "latents", True, 3, autoencoder)
    assert isinstance(images.pixels, LazyPixels) and len(images) == len(images.pixels) == len(plain) == 149
    assert images.pixels.shape == plain.pixels.shape
    rows = np.random.RandomState(0).permutation(149)
    for part in (rows, rows[:1], rows[:0], [3, 3, -1], slice(2, 9), slice(None, None, 40), 7):
        lazy = images.pixels[part]
        assert lazy.dtype == np.uint8 and np.array_equal(lazy, plain.pixels[part])
    assert (images.batch(rows) == plain.batch(rows)).all()
    with pytest.raises(IndexError):
        images.pixels[149]


def test_embeddings_of_lazy_pixels_are_those_of_prepared_ones(source, tmp_path, autoencoder):
    plain = prepare_images(source, SIZE, tmp_path / "pixels", skip_bad=True, workers=1)
    images = prepare_images(source, SIZE, tmp_path / "latents", True, 1, autoencoder)
    embedder = twosdm.PixelEmbedder(SIZE, dim=4).fit(images)
    banks = [twosdm.embedding_bank(data, embedder, tmp_path / name)
             for data, name in ((plain, "one"), (images, "two"))]
    assert (banks[0] == banks[1]).all()


def test_a_file_that_is_gone_or_damaged_since_is_named(source, tmp_path, autoencoder):
    images = prepare_images(source, SIZE, tmp_path / "cache", True, 1, autoencoder)
    (source / "0" / "002.png").write_bytes(b"bad")
    (source / "1" / "001.png").unlink()
    for rows, words in ((slice(0, 9), "0/002.png cannot be read any more .not a readable image"),
                        (slice(74, 80), "1/001.png cannot be read any more .*No such file")):
        with pytest.raises(UserError, match=words) as error:
            images.pixels[rows]
        assert "\n" not in str(error.value)


def test_the_shape_is_that_of_pixels_where_there_are_no_latents():
    assert Images(np.zeros((2, 9, 9, 3), np.uint8)).shape == (3, 9, 9)


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


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(source, tmp_path, autoencoder):
    with pytest.raises(UserError, match="divisible by 2, not 15"):
        prepare_images(source, 15, tmp_path / "cache", autoencoder=autoencoder)


def test_a_disk_too_small_is_said_of_latents(source, tmp_path, autoencoder, monkeypatch):
    monkeypatch.setattr(twosdm.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=300_000)))
    prepare_images(source, SIZE, tmp_path / "pixels", True, 1)         # 115 kB
    with pytest.raises(UserError, match="GB free, but the latents need"):
        prepare_images(source, SIZE, tmp_path / "latents", True, 1, autoencoder)        # 307 kB


def test_latents_train_and_sample_from_files_to_pictures(source, weights, tmp_path, call):
    for stage in ("prior", "image", "baseline"):
        flags = ("--dataset imagenet-latent --data in --skip-bad --images 16 --batch 8 --resolution 16 "
                 "--embedder pixels --arch ddpm++ --width 8 --mults 1,2 --blocks 1 --attention 4 "
                 "--prior-width 16 --prior-depth 1 --prior-heads 2 --steps 2").split()
        assert call(train, *flags, "--stage", stage, "--vae", weights, cwd=tmp_path)[0] == 0
    checkpoint = twosdm.load_checkpoint("runs/imagenet-latent/image/checkpoint.pt")
    settings = checkpoint["model"]["settings"]
    assert (settings["channels"], settings["resolution"], settings["cond_dim"]) == (4, SIZE // 2, 64 + 2)
    assert Image.open("runs/imagenet-latent/image/samples-000000016.png").width >= 512
    assert len(list(tmp_path.glob("runs/imagenet-latent/data/*.f32"))) == 1               # latents, no pixels
    assert not list(tmp_path.glob("runs/imagenet-latent/data/*.u8"))
    for method in ("2sdm", "oracle", "baseline"):
        assert call(sample, "--method", method, "--n", 3, "--out", method, cwd=tmp_path)[0] == 0
        assert Image.open(f"{method}/000002.png").size == (SIZE, SIZE)
