"""Preparing images: every source and mode, labels, hostile files, kills, two processes at once."""
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

import train
import twosdm
from twosdm import UserError, made_once, prepare_images

RED, BLUE = (250, 10, 20), (10, 30, 240)
DATASET = "torchvision.datasets.cifar."


def encoded(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed, width=12, height=12):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def folder(path, *names, seed=0):
    """A folder of random PNGs."""
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encoded(noise(seed + i)))
    return path


def packed(source, method=zipfile.ZIP_DEFLATED):
    """A zip beside the folder, of it and what is in it."""
    path = source.with_name(f"{method}.zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(source.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(source.parent))
    return path


def begun(*arguments, largest=resource.RLIM_INFINITY):
    """A process that prepares images as a script does, and can write files of this size."""
    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
        twosdm.run(lambda: prepare_images(*arguments) and 0)

    process = multiprocessing.get_context("fork").Process(target=prepare)
    process.start()
    return process


@pytest.fixture
def square(tmp_path):
    """square(image, resolution) -> (R, R, 3): what becomes of one image."""
    def prepared(image, resolution=8, kind="PNG", **options):
        (tmp_path / "one").mkdir(exist_ok=True)
        content = encoded(image, kind, **options)
        (tmp_path / "one" / "image.png").write_bytes(content)
        shutil.rmtree(tmp_path / "squares", ignore_errors=True)
        return prepare_images(tmp_path / "one", resolution, tmp_path / "squares").pixels[0]

    return prepared


def test_others_than_squares_are_cropped_to_the_center_and_resized_by_lanczos(square):
    for image, box in ((noise(0), (0, 0, 12, 12)), (noise(0, 31, 20), (5, 0, 25, 20)),
                       (noise(1, 20, 33), (0, 6, 20, 26))):
        for side in (8, 20):
            expected = image.crop(box).resize((side, side), Image.Resampling.LANCZOS)
            assert (square(image, side) == np.asarray(expected)).all()


@pytest.mark.parametrize("mode, value, expected, options", [
    ("1", 1, 255, {}), ("LA", (0, 0), 255, {}),
    ("RGBA", (0, 0, 0, 128), 127, {}), ("I;16", 257 * 100, 100, {}), ("L", 5, 255, dict(transparency=5)),
    ("P", 0, RED, dict(kind="GIF")), ("P", 0, 255, dict(transparency=0)), ("P", 0, RED, dict(transparency=1)),
    ("RGB", BLUE, BLUE, dict(kind="WEBP", lossless=True)), ("RGB", BLUE, BLUE, dict(kind="BMP")),
    ("RGB", BLUE, BLUE, dict(kind="TIFF")), ("RGB", BLUE, BLUE, dict(kind="PPM")),
    ("CMYK", (200, 100, 50, 0), (55, 155, 205), dict(kind="JPEG")),
    ("YCbCr", (128, 128, 128), 128, dict(kind="JPEG"))])
def test_every_mode_and_format_becomes_rgb_on_white(square, mode, value, expected, options):
    image = Image.new(mode, (10, 10), value)
    if mode == "P":
        image.putpalette(RED + BLUE)
    error = np.abs(square(image, **options).astype(int) - expected).max()
    assert error <= (2 if mode in ("CMYK", "YCbCr") else 0)


def test_an_animation_gives_its_first_frame_and_exif_orientation_is_applied(square):
    red, blue = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 8), BLUE)
    assert (square(red, kind="GIF", save_all=True, append_images=[blue]) == RED).all()
    red.paste(blue, (0, 0))                                             # blue on top as stored
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # to be shown turned clockwise
    turned = square(red, 16, exif=exif.tobytes())
    assert (turned[:, 8:] == BLUE).all() and (turned[:, :8] == RED).all()


def test_first_folders_are_the_classes_unless_an_image_is_in_none(tmp_path):
    source = folder(tmp_path / "in", "dog/x/1.png", "cat/2.png", "cat/1.JPG", "dog/3.png")
    (source / "cat" / "notes.txt").write_text("no image")
    (source / "cat" / "._1.png").write_text("a shadow")
    (source / "dog" / "circle").symlink_to(source)
    images = prepare_images(source, 12, tmp_path / "cache")
    assert images.classes == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert (images.pixels == np.stack([noise(2), noise(1), noise(3), noise(0)])).all()
    folder(source, "stray.png")
    assert prepare_images(source, 12, tmp_path / "cache").labels is None


def test_a_zip_equals_its_folder_and_its_outer_folder_is_no_class(tmp_path):
    source = folder(tmp_path / "in", "cat/1.png", "dog/1.png")
    plain = prepare_images(source, 8, tmp_path / "cache")
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "._1.png").write_text("a shadow")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        zipped = prepare_images(packed(source, method), 8, tmp_path / "cache")
        assert (zipped.pixels == plain.pixels).all()
        assert zipped.labels.tolist() == [0, 1]
        assert zipped.classes == plain.classes == ["cat", "dog"]
        assert zipped.fingerprint == plain.fingerprint


def test_dataset_json_gives_the_labels_or_that_there_are_none(tmp_path):
    source = folder(tmp_path / "in", "00000/a.png", "00000/b.png")
    labels = [["00000/b.png", 7], ["00000/a.png", 2]]
    (source / "dataset.json").write_text(json.dumps(dict(labels=labels)))
    for each in (source, packed(source)):
        images = prepare_images(each, 8, tmp_path / "cache")
        assert images.labels.tolist() == [2, 7]
        assert images.classes == [str(i) for i in range(8)]
    (source / "dataset.json").write_text('{"labels": null}')
    assert prepare_images(source, 8, tmp_path / "cache").labels is None


@pytest.mark.parametrize("text", [
    "{", "[1]", '{"labels": [["a.png", "cat"]]}', '{"labels": [["a.png", -1]]}', '{"labels": [["b.png", 1]]}',
    '{"labels": [["a.png", 1000000000000]]}', '{"labels": ' + "[" * 200_000,
    '{"labels": ' + "9" * 10_000 + "}", "\udcff", "fifo", "/dev/zero"], ids=range(11))
def test_a_bad_dataset_json_is_named_in_one_sentence(tmp_path, text):
    source = folder(tmp_path / "in", "a.png")
    table = source / "dataset.json"
    if text == "fifo":
        os.mkfifo(table)
    elif text == "/dev/zero":
        table.symlink_to(text)
    else:
        table.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match="^[^\n]*dataset.json[^\n]*$"):
        prepare_images(source, 8, tmp_path / "cache")


def test_bad_and_hostile_images_are_counted_named_and_left_out_on_request(tmp_path):
    source = folder(tmp_path / "in", "x/0.png", "y/9.png")
    png, jpeg = encoded(noise(3, 64, 64)), encoded(noise(4, 64, 64), "JPEG")
    bad = {
        "bomb.ppm": b"P6 30000 30000 255\n", "cut.jpg": jpeg[:len(jpeg) // 2], "cut.png": png[:len(png) // 2],
        "dot.png": encoded(noise(0, 1, 1)), "empty.png": b"", "text.png": b"hello",
        "float.tiff": encoded(Image.new("F", (9, 9)), "TIFF")}
    for name, content in bad.items():
        (source / "x" / name).write_bytes(content)
    os.mkfifo(source / "x" / "fifo.png")
    (source / "x" / "zero.png").symlink_to("/dev/zero")
    (source / "x" / "gone.png").symlink_to("nowhere")
    (source / "x" / "folder.png").mkdir()
    with open(source / "x" / "huge.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="^11 of 13 images.*x/bomb.ppm .*decompression bomb.*x/cut.jpg "
                       "[^\n]*--skip-bad[^\n]*$") as error:
        prepare_images(source, 8, tmp_path / "cache")
    assert "0x" not in str(error.value)                                 # no addresses of objects
    images = prepare_images(source, 12, tmp_path / "cache", skip_bad=True)
    assert images.labels.tolist() == [0, 1]
    assert (images.pixels[:] == np.stack([noise(0), noise(1)])).all()
    for name in ("x/0.png", "y/9.png"):
        (source / name).unlink()
    with pytest.raises(UserError, match="11 of 11"):
        prepare_images(source, 8, tmp_path / "cache", skip_bad=True)


def test_damaged_and_absurd_entries_of_a_zip_are_named_and_nothing_is_unpacked(tmp_path):
    """A flipped bit, entries that claim a terabyte, names that point outside."""
    path = tmp_path / "in" / "in.zip"
    path.parent.mkdir()
    names = ["damaged.bmp", "../outside.png", "good.png"]
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, encoded(noise(i), "BMP"))
        archive.writestr("huge.png", b"")
        archive.infolist()[-1].file_size = 2**40
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="^2 of 3 images.*damaged.bmp .*huge.png [^\n]*$"):
        prepare_images(path, 8, tmp_path / "cache")
    assert len(prepare_images(path, 8, tmp_path / "cache", skip_bad=True)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"in", "cache"}


def test_unusable_sources_get_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 cut short")
    for source, words in [("missing", "missing cannot be read"), ("empty", "holds no images"),
                          ("broken.zip", "broken.zip is damaged")]:
        with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
            prepare_images(tmp_path / source, 8, tmp_path / "cache")


@pytest.mark.parametrize("source", ["pipe.zip", "/dev/zero"])
def test_a_pipe_or_device_as_source_is_refused_and_not_read(tmp_path, capfd, source):
    os.mkfifo(tmp_path / "pipe.zip")
    process = begun(tmp_path / source, 8, tmp_path / "cache")
    process.join(30)
    process.kill()
    err = capfd.readouterr().err
    assert err.startswith("error: ") and source in err


def test_a_disk_that_fills_up_is_said_with_the_files_name_and_then_resumed(tmp_path, capfd):
    source = folder(tmp_path / "in", *[f"{i:02}.png" for i in range(80)])
    begun(source, 8, tmp_path / "cache", largest=14_000).join()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'cache'}") and "File too large" in last
    resumed = prepare_images(source, 8, tmp_path / "cache")
    assert (resumed.pixels == prepare_images(source, 8, tmp_path / "other").pixels).all()


def test_killed_at_any_moment_it_goes_on_to_the_bit_and_two_processes_at_once_make_one(tmp_path):
    source = folder(tmp_path / "in", *[f"{i:04}.png" for i in range(1800)])
    (source / "1000.png").write_bytes(b"bad")
    cache, first = tmp_path / "cache", source / "0000.png"
    whole = prepare_images(source, 8, tmp_path / "whole", True)
    killed = begun(source, 8, cache, True)
    while not any(file.stat().st_size for file in cache.glob("*")):
        time.sleep(0.001)
    killed.kill()                                                       # signal 9
    killed.join()
    assert killed.exitcode == -9
    # What was done is not done again: it does not matter that its file is another one by now.
    times = first.stat()
    first.write_bytes(bytes(times.st_size))
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    both = [begun(source, 8, cache, True) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    images = prepare_images(source, 8, cache, True)
    assert len(images) == 1799 and images.fingerprint == whole.fingerprint
    assert (images.pixels[:] == whole.pixels[:]).all()


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_rows_made_once_are_resumed_by_whole_batches_and_never_made_again(tmp_path, stop):
    calls = []

    def make(start, end):
        calls.append((start, end))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return np.arange(start, end, dtype=np.int64) ** 2

    def made(total=10):
        return made_once(tmp_path / "new" / "rows", total, np.int64, make, "squares", batch=3).tolist()

    batches, squares = [(0, 3), (3, 6), (6, 9), (9, 10)], [i * i for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        made()
    for file in (tmp_path / "new").glob("*"):
        with open(file, "ab") as torn:
            torn.write(b"half")                                         # of a row, as a kill leaves it
    assert made() == made() == squares
    assert calls == batches[:stop] + batches[stop - 1:]
    assert made(11)[:10] == squares                                     # another size: made anew
    assert len(calls) == 9


def test_a_cache_is_used_again_only_if_sources_and_resolution_match(tmp_path):
    source, cache = folder(tmp_path / "in", "a.png", "b.png"), tmp_path / "cache"

    def prepare(resolution=32):
        """Images, and whether anything was made for them."""
        before = [file.stat().st_mtime_ns for file in sorted(cache.glob("*.rows"))]
        images = prepare_images(source, resolution, cache)
        return images, before != [file.stat().st_mtime_ns for file in sorted(cache.glob("*.rows"))]

    first, made = prepare()
    assert made and not first.pixels.flags.writeable
    assert prepare(16)[1] and not prepare()[1]                          # another resolution, beside the first
    folder(source, "a.png", seed=7)
    os.utime(source / "a.png", ns=(1, 1))
    changed, made = prepare()                                           # another image under the same name
    assert made and changed.fingerprint != first.fingerprint
    folder(source, "c.png")
    latest, made = prepare()
    assert made and len(latest) == 3
    os.truncate(max(cache.glob("*.rows"), key=os.path.getmtime), 100)   # damaged
    assert prepare()[1] and prepare()[0].fingerprint == latest.fingerprint
    source = source.rename(tmp_path / "moved")
    assert not prepare()[1]                                             # the same files elsewhere


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    config = train.configure("cifar10", "image", data=str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for i in range(5):
        rows = pixels[2 * i:2 * i + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        content = pickle.dumps(dict(data=rows, labels=[i, 9 - i]))
        (base / f"data_batch_{i + 1}").write_bytes(content)
    (base / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[f"class {i}" for i in range(10)])))
    monkeypatch.setattr(DATASET + "CIFAR10.download", lambda self: None)                 # no network
    with pytest.raises(UserError, match="cifar-10-python.tar.gz"):      # checksums not the real ones
        twosdm.load_images(config)
    monkeypatch.setattr(DATASET + "check_integrity", lambda *args: True)
    images = twosdm.load_images(config)
    assert (images.pixels == pixels).all()
    assert images.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert images.classes[3] == "class 3"
    with pytest.raises(UserError, match="--resolution"):
        twosdm.load_images(train.configure("cifar10", "image", data=str(tmp_path), resolution=64))
