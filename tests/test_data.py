"""Preparation of images: every source and mode, bad input, resuming, the cache."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import twosdm as data
from twosdm import UserError, prepare_images

RED, BLUE = (250, 10, 20), (10, 30, 240)


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed, width=12, height=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def folder(path, names, start=0):
    """A folder of random PNGs."""
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(noise(start + i)))
    return path


def square(image, resolution=8, kind="PNG", **options):
    return data.read_square(encoded(image, kind, **options), resolution)[0]


def test_square_images_at_their_resolution_come_back_exactly(tmp_path):
    folder(tmp_path / "in", ["b.png", "a.png"])
    images = prepare_images(tmp_path / "in", 12, tmp_path / "cache", workers=1)
    assert len(images) == 2 and images.labels is None and images.classes == []
    assert (images.pixels == np.stack([noise(1), noise(0)])).all()
    assert not images.pixels.flags.writeable


def test_crop_is_the_centre_square_and_the_filter_is_lanczos():
    wide, tall = noise(0, 31, 20), noise(1, 20, 33)
    for image, box in ((wide, (5, 0, 25, 20)), (tall, (0, 6, 20, 26))):
        expected = image.crop(box).resize((8, 8), Image.Resampling.LANCZOS)
        assert (square(image) == np.asarray(expected)).all()


@pytest.mark.parametrize("mode, value, expected", [
    ("1", 1, (255,) * 3), ("L", 77, (77,) * 3), ("RGB", RED, RED),
    ("LA", (0, 0), (255,) * 3), ("LA", (60, 255), (60,) * 3),
    ("RGBA", RED + (255,), RED), ("RGBA", (0, 0, 0, 0), (255,) * 3), ("RGBA", (0, 0, 0, 128), (127,) * 3),
    ("I;16", 65535, (255,) * 3), ("I;16", 257 * 100, (100,) * 3)])
def test_every_png_mode_becomes_rgb(mode, value, expected):
    assert (square(Image.new(mode, (10, 10), value)) == expected).all()


@pytest.mark.parametrize("mode, kind, expected", [
    ("CMYK", "JPEG", (55, 155, 205)), ("CMYK", "TIFF", (55, 155, 205)), ("YCbCr", "JPEG", None)])
def test_other_colour_spaces_become_rgb(mode, kind, expected):
    value = (200, 100, 50, 0) if mode == "CMYK" else (128, 128, 128)
    pixels = square(Image.new(mode, (10, 10), value), kind=kind).astype(int)
    assert np.abs(pixels - (expected or 128)).max() <= 2


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (10, 10), 0)
    image.putpalette(RED + BLUE)
    assert (square(image) == RED).all() and (square(image, kind="GIF") == RED).all()
    assert (square(image, transparency=0) == 255).all()
    assert (square(image, transparency=1) == RED).all()


def test_grey_and_rgb_with_a_transparent_colour():
    assert (square(Image.new("L", (9, 9), 5), transparency=5) == 255).all()
    assert (square(Image.new("RGB", (9, 9), RED), transparency=RED) == 255).all()


def test_first_frame_and_other_formats():
    frames = [Image.new("RGB", (10, 10), RED), Image.new("RGB", (10, 10), BLUE)]
    assert (square(frames[0], kind="GIF", save_all=True, append_images=frames[1:]) == RED).all()
    for kind, options in (("WEBP", dict(lossless=True)), ("BMP", {}), ("TIFF", {}), ("PPM", {})):
        assert (square(frames[1], kind=kind, **options) == BLUE).all()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (0, 0, 16, 8))                                   # blue on top as stored
    exif = Image.Exif()
    exif[0x0112] = 6                                                   # to be shown turned clockwise
    pixels = square(image, 16, exif=exif.tobytes())
    assert (pixels[:, 8:] == BLUE).all() and (pixels[:, :8] == RED).all()


def test_first_folders_are_the_classes(tmp_path):
    source = folder(tmp_path / "in", ["dog/x/1.png", "cat/2.png", "cat/1.JPG", "dog/3.png"])
    (source / "cat" / "notes.txt").write_text("no image")
    (source / "cat" / "._1.png").write_text("a shadow")
    images = prepare_images(source, 8, tmp_path / "cache", workers=1)
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0, 0, 1, 1]
    assert images.labels.dtype == np.int64
    folder(source, ["stray.png"])
    assert prepare_images(source, 8, tmp_path / "cache", workers=1).labels is None


def test_a_zip_equals_its_folder_and_its_outer_folder_is_no_class(tmp_path):
    source = folder(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("__MACOSX/outer/cat/._1.png", b"shadow")
            for name in ("dog/1.png", "cat/1.png"):
                archive.write(source / name, f"outer/{name}")
        zipped = prepare_images(path, 8, tmp_path / f"cache{method}", workers=1)
        plain = prepare_images(source, 8, tmp_path / "cache", workers=1)
        assert (zipped.pixels == plain.pixels).all() and zipped.labels.tolist() == plain.labels.tolist()
        assert zipped.classes == ["cat", "dog"] and zipped.fingerprint == plain.fingerprint


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("labels", [[["00000/b.png", 7], ["00000/a.png", 2]], None])
def test_dataset_json_gives_the_labels(tmp_path, packed, labels):
    source = folder(tmp_path / "in", ["00000/a.png", "00000/b.png"])
    (source / "dataset.json").write_text(json.dumps(dict(labels=labels)))
    if packed:
        with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
            for file in source.rglob("*.*"):
                archive.write(file, file.relative_to(source))
        source = tmp_path / "in.zip"
    images = prepare_images(source, 8, tmp_path / "cache", workers=1)
    if labels is None:
        assert images.labels is None
    else:
        assert images.labels.tolist() == [2, 7] and images.classes == [str(i) for i in range(8)]


@pytest.mark.parametrize("content", [
    "{", "[1]", '{"labels": [["a.png", "cat"]]}', '{"labels": [["a.png", -1]]}', '{"labels": [["a.png", 1]]}',
    '{"labels": 3}'])
def test_a_broken_or_incomplete_dataset_json_is_named(tmp_path, content):
    source = folder(tmp_path / "in", ["a.png", "b.png"])
    (source / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="dataset.json"):
        prepare_images(source, 8, tmp_path / "cache", workers=1)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "..\\a.png", "C:/a.png"])
def test_zips_with_names_that_point_outside_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("good.png", encoded(noise(0)))
        archive.writestr(name, encoded(noise(1)))
    with pytest.raises(UserError, match="points outside"):
        prepare_images(tmp_path / "in.zip", 8, tmp_path / "cache", workers=1)
    assert not (tmp_path / "cache").exists()


def test_bad_images_are_named_counted_and_skipped_on_request(tmp_path, capsys):
    source = folder(tmp_path / "in", ["x/0.png", "y/9.png"])
    png, jpeg = encoded(noise(3, 64, 64)), encoded(noise(4, 64, 64), "JPEG")
    bad = {"cut.png": png[:len(png) // 2], "cut.jpg": jpeg[:len(jpeg) // 2], "text.png": b"hello",
           "empty.png": b"", "dot.png": encoded(noise(0, 1, 1)),
           "float.tiff": encoded(Image.new("F", (9, 9)), "TIFF")}
    for name, content in bad.items():
        (source / "x" / name).write_bytes(content)
    with pytest.raises(UserError, match="6 of 8 images.*x/cut.jpg.*and 1 more") as error:
        prepare_images(source, 8, tmp_path / "cache", workers=1)
    assert "\n" not in str(error.value) and "1x1 pixels" in str(error.value) and "0x" not in str(error.value)
    before = next((tmp_path / "cache").glob("images-*.json")).stat().st_mtime_ns
    images = prepare_images(source, 8, tmp_path / "cache", skip_bad=True, workers=1)
    assert len(images) == 2 and images.labels.tolist() == [0, 1]
    assert {name for _, name, _ in images.info["bad"]} == {f"x/{name}" for name in bad}
    assert (images.pixels[1] == square(noise(1))).all()
    assert before == next((tmp_path / "cache").glob("images-*.json")).stat().st_mtime_ns  # nothing done twice
    for name in ("x/0.png", "y/9.png"):
        (source / name).unlink()
    with pytest.raises(UserError, match="6 of 6"):
        prepare_images(source, 8, tmp_path / "cache", skip_bad=True, workers=1)


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    source = folder(tmp_path / "in", ["a.png", "b.png"])
    (source / "bomb.png").write_bytes(encoded(Image.new("1", (400, 400))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UserError, match="1 of 3 images.*bomb.png.*decompression bomb"):
        prepare_images(source, 8, tmp_path / "cache", workers=1)


def test_damage_inside_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("a.bmp", encoded(noise(0), "BMP"))
        archive.writestr("b.bmp", encoded(noise(1), "BMP"))
    content = bytearray((tmp_path / "in.zip").read_bytes())
    content[200] ^= 1
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(UserError, match="a.bmp .damaged inside the zip"):
        prepare_images(tmp_path / "in.zip", 8, tmp_path / "cache", workers=1)


def test_small_images_are_enlarged_with_a_warning(tmp_path, capsys):
    images = prepare_images(folder(tmp_path / "in", ["a.png"]), 32, tmp_path / "cache", workers=1)
    assert images.pixels.shape == (1, 32, 32, 3) and images.info["enlarged"] == 1
    assert "1 of 1 images are smaller than 32x32" in capsys.readouterr().err


def test_unusable_sources_and_caches_get_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "file").write_text("a file")
    good = folder(tmp_path / "in", ["a.png"])
    for source, cache, words in [
            ("missing", "c", "neither a folder nor a zip"), ("empty", "c", "holds no images"),
            ("broken.zip", "c", "cannot be read"), ("in", "file/c", "cannot write to")]:
        with pytest.raises(UserError, match=words) as error:
            prepare_images(tmp_path / source, 8, tmp_path / cache, workers=1)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at least 1"):
        prepare_images(good, 0, tmp_path / "c")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=100)))
    with pytest.raises(UserError, match="GB free"):
        prepare_images(good, 8, tmp_path / "c", workers=1)


def test_a_disk_that_fills_up_is_said_and_resumed(tmp_path):
    source = folder(tmp_path / "in", [f"{i:03}.png" for i in range(80)])
    code = ("import resource, signal, sys, twosdm as data\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, 14_000))\n"
            "try: data.prepare_images(*sys.argv[1:2], 8, sys.argv[2], workers=1)\n"
            "except data.UserError as error: print(error)\n")
    run = subprocess.run([sys.executable, "-c", code, source, tmp_path / "cache"], capture_output=True,
                         text=True, cwd=Path(data.__file__).parent)
    assert run.stdout.startswith("cannot write to") and run.stdout.count("\n") == 1, run.stderr
    assert not list((tmp_path / "cache").glob("images-*.json"))
    resumed = prepare_images(source, 8, tmp_path / "cache", workers=1)
    assert (resumed.pixels == prepare_images(source, 8, tmp_path / "other", workers=1).pixels).all()


def test_parallel_equals_serial(tmp_path):
    source = folder(tmp_path / "in", [f"{i % 3}/{i:03}.png" for i in range(150)])
    (source / "1" / "100.png").write_bytes(b"bad")
    one, two = (prepare_images(source, 8, tmp_path / f"cache{n}", skip_bad=True, workers=n) for n in (1, 2))
    assert len(one) == 149 and (one.pixels == two.pixels).all() and one.info["bad"] == two.info["bad"]
    assert one.fingerprint == two.fingerprint and (one.labels == two.labels).all()


def test_an_interrupted_preparation_continues(tmp_path, monkeypatch):
    source, cache = folder(tmp_path / "in", [f"{i:03}.png" for i in range(200)]), tmp_path / "cache"
    (source / "005.png").write_bytes(b"bad")
    whole = prepare_images(source, 8, tmp_path / "whole", skip_bad=True, workers=1)
    read, seen = data.read_square, []

    def interrupted(content, resolution):
        seen.append(content)
        if len(seen) == 150:
            raise KeyboardInterrupt
        return read(content, resolution)

    monkeypatch.setattr(data, "read_square", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(source, 8, cache, skip_bad=True, workers=1)
    assert not list(cache.glob("images-*.json"))
    with open(next(cache.glob("*.u8")), "ab") as file:
        file.write(b"half an image")
    with open(next(cache.glob("*.progress")), "a") as file:
        file.write("[192, 19")
    resumed = prepare_images(source, 8, cache, skip_bad=True, workers=1)
    assert len(seen) == 150 + 200 - 128                                # two chunks of 64 were not done again
    assert (resumed.pixels == whole.pixels).all() and resumed.fingerprint == whole.fingerprint
    assert resumed.info["bad"] == whole.info["bad"]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_the_cache_is_resumed(tmp_path, workers):
    source, cache = folder(tmp_path / "in", [f"{i:03}.png" for i in range(300)]), tmp_path / "cache"
    code = ("import sys, time, twosdm as data\n"
            "read = data.read_square\n"
            "def slow(*args):\n    time.sleep(0.002)\n    return read(*args)\n"
            "data.read_square = slow\n"
            "data.prepare_images(sys.argv[1], 8, sys.argv[2], workers=int(sys.argv[3]))\n")
    for moment in (0.1, 0.3):                                          # after the first pixels are written
        process = subprocess.Popen([sys.executable, "-c", code, source, cache, str(workers)],
                                   cwd=Path(data.__file__).parent, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(cache.glob("*.u8")):
            time.sleep(0.01)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = prepare_images(source, 8, cache, workers=1)
    assert (resumed.pixels == prepare_images(source, 8, tmp_path / "other", workers=1).pixels).all()
    assert (cache / resumed.info["pixels"]).exists() and list(cache.glob("images-*.json"))


def test_a_cache_is_used_again_only_if_it_matches(tmp_path, monkeypatch):
    source, cache = folder(tmp_path / "in", ["a.png", "b.png"]), tmp_path / "cache"
    built = []
    build = data.write_cache
    monkeypatch.setattr(data, "write_cache", lambda *args: built.append(1) or build(*args))

    def prepare(resolution=8):
        images = prepare_images(source, resolution, cache, workers=1)
        return images, len(built)

    first, count = prepare()
    again, count = prepare()
    assert count == 1 and again.fingerprint == first.fingerprint
    assert prepare(resolution=6)[1] == 2 and prepare()[1] == 2         # another resolution, beside the first
    folder(source, ["a.png"], start=7)
    os.utime(source / "a.png", ns=(1, 1))
    changed, count = prepare()                                         # another image under the same name
    assert count == 3 and changed.fingerprint != first.fingerprint
    assert (changed.pixels[0] == square(noise(7))).all()
    assert (cache / first.info["pixels"]).exists()                     # nothing is lost
    folder(source, ["c.png"])
    latest, count = prepare()
    assert len(latest) == 3 and count == 4                             # one image more
    (cache / f"images-{latest.info['key']}.json").write_text("{")
    assert len(prepare()[0]) == 3 and len(built) == 5                  # a damaged description
    os.truncate(cache / latest.info["pixels"], 100)
    assert (prepare()[0].pixels[0] == square(noise(7))).all() and len(built) == 6      # pixels cut short
    source.rename(tmp_path / "moved")
    source = tmp_path / "moved"
    assert prepare()[1] == 6                                           # the same files elsewhere


def cifar_files(root):
    """CIFAR-10's five training files of two images each, and its names; -> pixels (10, 32, 32, 3), labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for i in range(5):
        rows = pixels[2 * i:2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        (base / f"data_batch_{i + 1}").write_bytes(pickle.dumps(dict(data=rows, labels=[i, 9 - i])))
    (base / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[f"class {i}" for i in range(10)])))
    return pixels, np.array([label for i in range(5) for label in (i, 9 - i)])


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    import torchvision
    pixels, labels = cifar_files(tmp_path)
    config = data.configure("cifar10", "image", data=str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: None)       # no network
    with pytest.raises(UserError, match="cifar-10-python.tar.gz"):      # checksums not the real ones
        data.load_images(config)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    images = data.load_images(config)
    assert (images.pixels == pixels).all() and (images.labels == labels).all()
    assert images.classes[3] == "class 3" and images.shape == (3, 32, 32)
    with pytest.raises(UserError, match="--resolution"):
        data.load_images(data.configure("cifar10", "image", data=str(tmp_path), resolution=64))
