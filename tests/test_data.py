"""Images as people have them: odd files, labels, zips, kills, what file systems lack, latents."""
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import time
import unicodedata
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, PngImagePlugin

import train
import twosdm
from twosdm import ImageFiles, UserError, prepare_images

SIDE = 12


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(file):
    return Image.open(io.BytesIO(file)).convert("RGB")


def noise(seed, width=SIDE, height=SIDE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def plain(mode, value, kind="PNG", **options):
    """The bytes of an image of one value."""
    return encoded(Image.new(mode, (SIDE, SIDE), value), kind, **options)


def folder(path, files):
    """A folder of files {name: bytes, or the seed of a PNG}."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = encoded(noise(content))
        (path / name).write_bytes(content)
    return path


def zipped(source, rename=str):
    """A zip of the folder, of the same name, with an entry for each folder."""
    path = source.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in source.rglob("*"):                # in any order
            info = zipfile.ZipInfo()
            info.filename = rename(f"{file.relative_to(source)}{'/' * file.is_dir()}")
            archive.writestr(info, b"" if file.is_dir() else file.read_bytes())
    return path


def labeled(*pairs):
    table = dict(labels=pairs or None)
    return {"dataset.json": json.dumps(table).encode(), "0/a.png": 1, "0/é.png": 2}


PNG = encoded(noise(1))
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("a comment", "a" * 2**23, zip=True)
GRAY = (np.arange(SIDE**2) * 455).reshape(SIDE, SIDE).astype("<u2")
GRAY8 = np.round(GRAY / 257)[:, :, None]
# A negative width, an orientation, and the resolution as a text.
TAGS = [0x0100, 9, 1, -5, 0x0112, 3, 1, 6, 0x011A, 2, 3, 50]
EXIF = struct.pack("<6s2sHIH" + 3 * "HHIi" + "4x", b"Exif", b"II", 42, 8, 3, *TAGS)
JPEG = encoded(noise(1), "JPEG", exif=EXIF)
TURNED = np.rot90(decoded(JPEG), -1)
PROGRESSIVE = encoded(noise(2, 64, 64), "JPEG", progressive=True)
BAD = "^a.png .*--skip-bad"
# What: the bytes of a.png or several files; the pixels or labels that come of them, or words of the refusal.
CASES = {
    "half clear": (plain("RGBA", (0, 0, 0, 128)), 127),
    "one bit": (plain("1", 1), 255),
    "CMYK": (plain("CMYK", (200, 100, 50, 0), "TIFF"), (55, 155, 205)),
    "animation": (plain("L", 9, save_all=True, append_images=[noise(2)]), 9),
    "clear color": (plain("L", 5, transparency=5), 255),
    "16 bits": (encoded(Image.fromarray(GRAY)), GRAY8),
    "16 bits, TIFF": (encoded(Image.fromarray(GRAY), "TIFF"), "a.png .*16"),
    "long text": (encoded(noise(1), pnginfo=TEXT), noise(1)),
    "odd EXIF": (JPEG, TURNED),
    "broken EXIF": (encoded(noise(1), exif=b"Exif\0\0MM"), noise(1)),
    "no end mark": (JPEG[:-2], TURNED),
    "cut JPEG": (JPEG[:-22], BAD),
    "cut progressive JPEG": (PROGRESSIVE[:-222], BAD),
    "cut PNG": (PNG[:200], BAD),
    "bomb": (b"P6 30000 30000 255\n", BAD),
    "wide": (encoded(noise(1, 32, 24)),
             noise(1, 32, 24).crop((4, 0, 28, 24)).resize((12, 12), Image.LANCZOS)),
    "one class": ({"cat/a.png": 1, "cat/b.png": 2}, [0, 0]),
    "innermost folders": ({"train/dog/a.png": 1, "train/cat/a.png": 2, "test/dog/a.png": 3}, [1, 0, 1]),
    "a folder without": ({"cat/a.png": 1, "dog/a.heic": b""}, "dog"),
    "no images": ({"a.heic": b""}, "no images .*.png"),
    "labels": (labeled(["0/é.png", 7], ["0/a.png", 2.0]), [2, 7]),
    "other letters": (labeled(["0/a.png", 0], [unicodedata.normalize("NFD", "0/é.png"), 1]), [0, 1]),
    "a label lacks": (labeled(["0/a.png", 1]), "dataset.json .*0/é.png .*None"),
    "one-hot": (labeled(["0/a.png", [0, 1]]), "dataset.json .*0/a.png .*whole number")
}
for suffix in twosdm.SUFFIXES:
    file = encoded(noise(1).convert("L"), Image.EXTENSION[suffix])
    CASES[suffix] = ({"A" + suffix.upper(): file}, decoded(file))


@pytest.mark.parametrize("form", [str, zipped])
@pytest.mark.parametrize("files, expected", CASES.values(), ids=CASES)
def test_every_odd_file_is_read_right_or_refused_by_name(tmp_path, files, expected, form):
    if isinstance(files, bytes):
        files = {"a.png": files}
    source = form(folder(tmp_path / "in", files))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            prepare_images(source, SIDE, tmp_path)
        return
    images = prepare_images(source, SIDE, tmp_path)
    found = images.labels if isinstance(expected, list) else images.pixels[0]
    assert (found == np.asarray(expected)).all()


@pytest.mark.parametrize("rename", [str, "./{}".format, "/{}".format, lambda name: name.replace("/", "\\")])
def test_a_zip_and_the_same_files_unzipped_are_one_set_and_a_line_says_what_it_is(tmp_path, capsys, rename):
    source = folder(tmp_path / "in", {"cat/1.png": 1, "cat/2.png": 2, "dog/1.png": 3, "dog/1.HEIC": b"",
                                      "cat/1.heic": b"", "dog/.DS_Store": b"", "__MACOSX/cat/._1.png": b""})
    a = prepare_images(source, 8, tmp_path)
    b = prepare_images(zipped(source, rename), 8, tmp_path)
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith(": 3 images, classes: [('cat', 2), ('dog', 1)]; files left out: [('.heic', 2)]")
    assert a.name == b.name
    assert a.labels.tolist() == b.labels.tolist() == [0, 0, 1]
    assert (a.pixels == b.pixels).all()


def test_what_cannot_be_listed_is_named(tmp_path, monkeypatch):
    source = folder(tmp_path / "in", {"cat/1.png": 1, os.fsdecode(b"dog/\xe9.png"): 2})
    (source / "bird").symlink_to(source / "cat")
    assert prepare_images(source, 8, tmp_path).classes == ["bird", "cat", "dog"]
    for target in ("nowhere", source):                # which it lies in
        (source / "dog/fish").symlink_to(target)
        with pytest.raises(OSError, match="dog/fish"):                    # of which `run` makes a sentence
            ImageFiles(source)
        (source / "dog/fish").unlink()
    monkeypatch.setattr(os, "listdir", failing(errno.EACCES))             # root may read everything
    with pytest.raises(PermissionError):
        ImageFiles(source)


def failing(number):
    def fail(*_, **options):
        raise OSError(number, "this is how it fails")

    return fail


def test_without_a_resolution_images_are_of_one_size_and_an_odd_one_is_named(tmp_path):
    odd = encoded(noise(1, 17))
    source = folder(tmp_path, {"0.png": 1, "1.png": 2, "settings.json": b"", "grid.png": odd})
    assert (ImageFiles(source)[np.array([1, 0])] == [noise(2), noise(1)]).all()
    for bad, words in ((odd, "2.png .*17x12"), (b"", "2.png")):
        with pytest.raises(UserError, match=words):
            ImageFiles(folder(source, {"2.png": bad}))[:]


def test_bad_images_are_left_out_on_request_and_mended_ones_are_looked_at_again(tmp_path, capsys):
    source = folder(tmp_path / "in", {"cat/1.png": b"bad", "cat/2.png": 2, "dog/1.png": 3})
    with pytest.raises(UserError, match="cat/1.png"):
        prepare_images(source, SIDE, tmp_path)
    images = prepare_images(source, SIDE, tmp_path, skip_bad=True)
    assert (images.pixels == [noise(2), noise(3)]).all()
    assert "left out: [('.png', 1)]" in capsys.readouterr().out
    (source / "cat/1.png").unlink()
    assert prepare_images(source, SIDE, tmp_path).labels.tolist() == [0, 1]


def test_prepared_once_the_source_is_not_looked_at_again_and_may_be_gone(tmp_path, capsys, monkeypatch):
    source = folder(tmp_path / "in", {"1.png": 1, "2.png": 2})
    first = prepare_images(source, 8, tmp_path)
    assert "classes: none: 1.png" in capsys.readouterr().out
    monkeypatch.setattr(twosdm, "list_files", None)
    monkeypatch.setattr(twosdm, "read_square", None)
    prepare_images(source, 8, tmp_path)
    assert capsys.readouterr().out == ""
    folder(source, {"3.png": 3})
    prepare_images(source, 8, tmp_path)
    assert "has changed" in capsys.readouterr().out
    shutil.rmtree(source)
    again = prepare_images(source, 8, tmp_path)
    assert again.name == first.name
    assert (again.pixels == first.pixels).all()


@pytest.mark.parametrize("where, name, value", [
    (sys.modules, "fcntl", None), (vars(fcntl), "flock", failing(errno.ENOLCK)),
    (vars(np), "memmap", failing(errno.ENODEV))])
def test_what_a_file_system_lacks_is_not_fatal(tmp_path, monkeypatch, where, name, value):
    source = folder(tmp_path / "in", {"1.png": 1, "2.png": 2})
    monkeypatch.setitem(where, name, value)
    for _ in range(2):
        assert (prepare_images(source, SIDE, tmp_path).pixels == [noise(1), noise(2)]).all()


def test_killed_at_any_moment_it_goes_on_to_the_bit_and_two_processes_at_once_make_one(tmp_path):
    source = folder(tmp_path / "in", {f"{i:04}.png": i for i in range(1500)})
    whole = prepare_images(source, 8, tmp_path / "whole")

    def begun():
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=prepare_images, args=(source, 8, tmp_path))
        process.start()
        return process

    killed = begun()
    while not any(file.stat().st_size for file in tmp_path.glob("*.part")):
        time.sleep(0.001)
    killed.kill()                                     # signal 9
    killed.join()
    part, = tmp_path.glob("*.part")
    part.write_bytes(part.read_bytes() + b"torn")
    (source / "0000.png").write_bytes(bytes((source / "0000.png").stat().st_size))        # is not read again
    for process in [begun(), begun()]:
        process.join()
        assert process.exitcode == 0
    assert (prepare_images(source, 8, tmp_path).pixels == whole.pixels).all()


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    config = train.configure("cifar10", data=str(tmp_path), runs=str(tmp_path))
    kind = torchvision.datasets.CIFAR10
    pixels = np.asarray(noise(0, 32, 64)).reshape(2, 32, 32, 3)
    table = pickle.dumps(dict(data=pixels.transpose(0, 3, 1, 2), labels=[1, 0], label_names=["cat", "dog"]))
    folder(tmp_path / kind.base_folder, {"batches.meta": table, "images": table})
    monkeypatch.setattr(kind, "download", lambda self: None)              # no network
    monkeypatch.setattr(kind, "train_list", [("images", "")])
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    images = twosdm.load_images(config)
    assert (images.pixels == pixels).all()
    assert images.labels.tolist() == [1, 0]


def test_the_program_that_openai_gives_away_is_refused_with_the_name_of_the_weights(tmp_path):
    path = str(tmp_path / "ViT-B-32.pt")
    torch.jit.trace(torch.sqrt, torch.ones(1)).save(path)
    with pytest.raises(UserError, match="ViT-B-32.pt.*open_clip_model.safetensors"):
        twosdm.ClipEmbedder(path)


class TinyVae(torch.nn.Linear):
    """In place of Stable Diffusion's, with the interface of diffusers: it halves, and shrinks by 8."""

    def encode(self, x):
        mean = x[:, [0, 1, 2, 0], ::8, ::8] / 2
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=0 * mean))

    def decode(self, z):
        return SimpleNamespace(sample=2 * z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_latents_are_scaled_made_once_for_each_autoencoder_and_decoded(tmp_path, monkeypatch):
    TinyVae.from_pretrained = lambda weights: TinyVae(1, 1)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=TinyVae))
    vae = twosdm.Autoencoder("tiny")
    pixels = np.stack([noise(i, 16, 16) for i in range(9)])
    images = twosdm.Images("some", pixels[:, :1, :1] + 0 * pixels)        # of one color each
    moments = twosdm.latents_of(images, vae, tmp_path)
    x = images.batch(slice(None))
    z = vae.sample(torch.tensor(moments))
    assert (z * 2 * vae.std + vae.mean - (x[:, [0, 1, 2, 0], :2, :2] + 1) / 4).abs().max() < 1e-3
    assert (vae.decode(z, chunk=2) - x).abs().max() < 1e-2
    twosdm.latents_of(images, twosdm.Autoencoder("tiny"), tmp_path)       # whose weights are others
    assert len(list(tmp_path.glob("*.rows"))) == 2
