"""Speed on this device: python tests/benchmark.py [--device cuda] [--bf16] [--only NAME].

Prints a line for each measurement, asserts nothing. It uses the public names alone, or what they were before, so
that a copy of it beside an older version measures that: cp benchmark.py OTHER/tests/.

Goals on one H200 or H100: DDPM++-64 trains on 1,000 images/s and samples 40 (40 steps), the prior trains on
100,000 embeddings/s and takes at most 1 % of sampling, training from the bank is 10 times faster than with
CLIP.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import twosdm

OLDER = not hasattr(twosdm, "full_float32")           # the second edition


def seconds(work, least=1.0, warm=True):
    """The shortest of as many runs of work() as fit into `least` seconds, at least one; one warms up."""
    times = []
    while len(times) <= warm or sum(times[warm:]) < least:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[warm:])


class Network:
    """One of the paper's networks with its batch: the seconds of a training step and of sampling a batch."""

    def __init__(self, net, shape, batch, args):
        self.batch = batch
        self.args = args
        self.denoiser = twosdm.Denoiser(net).to(args.device).train()
        if args.device.type == "cpu":                 # as train.py has it
            self.denoiser.to(memory_format=torch.channels_last)
        self.ema = twosdm.EMA(self.denoiser, 500_000)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), 1e-4, fused=True)
        self.x = torch.randn(batch, *shape, device=args.device)
        self.cond = None
        if net.cond_dim:
            self.cond = torch.randn(batch, net.cond_dim, device=args.device)

    def autocast(self):
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def step(self):
        """As train.py's: loss, gradients, optimizer, moving average."""
        self.optimizer.zero_grad()
        parts = max(1, self.batch // 32) if self.x.ndim == 4 else 1
        for part in range(parts):
            rows = slice(part * self.batch // parts, (part + 1) * self.batch // parts)
            cond = None if self.cond is None else self.cond[rows]
            with self.autocast():
                loss = self.denoiser.loss(self.x[rows], cond)
            (loss.sum() / self.batch).backward()
        self.optimizer.step()
        self.ema.update(self.denoiser, 10_000_000, self.batch)

    @torch.no_grad()
    def sample(self, steps):
        """2 · steps - 1 evaluations."""
        def denoise(x, sigma):
            with self.autocast():
                return self.ema.net(x, sigma, self.cond)

        twosdm.heun_sample(denoise, self.x, twosdm.sigma_schedule(steps), s_churn=50, s_noise=1.007)

    def sampling(self, steps=40):
        """Seconds for a batch; on a CPU scaled from 3 evaluations."""
        if self.args.device.type == "cuda":
            return seconds(lambda: self.sample(steps))
        return seconds(lambda: self.sample(2), warm=False) / 3 * (2 * steps - 1)


def networks(args, folder):
    """DDPM++-64, the prior, and what CLIP would cost in each step of the prior if there were no bank."""
    gpu = args.device.type == "cuda"
    image = Network(twosdm.UNet(64, cond_dim=512), (3, 64, 64), 256 if gpu else 4, args)
    prior = Network(twosdm.PriorTransformer(512), (512,), 256, args)
    small = Network(twosdm.PriorTransformer(512), (512,), image.batch, args)
    clip = twosdm.ClipEmbedder(None).to(args.device)          # random weights cost what others do
    sampling = {}
    for name, network in ("DDPM++-64", image), ("prior", prior):
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        step = seconds(network.step)
        yield f"{name}: training", network.batch / step, "images/s"
        if gpu:
            yield f"{name}: training, memory", torch.cuda.max_memory_allocated() / 1e9, "GB"
        sampling[name] = network.sampling()
        yield f"{name}: sampling, 40 steps", network.batch / sampling[name], "images/s"
    share = small.sampling()
    share = share / (share + sampling["DDPM++-64"])
    yield f"prior: share of two-stage sampling, batch {image.batch}", 100 * share, "%"
    with torch.no_grad():
        embedding = seconds(lambda: clip(image.x)) / image.batch * prior.batch
    yield "prior: slower with CLIP in each step than from the bank", 1 + embedding / step, "times"


def metrics(args, folder):
    """On random features of Inception's 2048 dimensions."""
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 10_000, 2048), np.float32))
    real, fake = features.to("cpu" if OLDER else args.device)
    moments = []
    for rows in (real, fake):
        stats = evaluate.RunningStats(2048) if OLDER else evaluate.RunningStats()
        start = time.perf_counter()
        for part in rows.split(64):
            stats.update(part)
        moments += stats.result()
        took = time.perf_counter() - start
    yield "covariance, 10,000 × 2048 in batches of 64", took, "s"
    yield "Fréchet distance, 2048", seconds(lambda: evaluate.frechet_distance(*moments), warm=False), "s"
    real = real[:5000]
    fake = fake[:5000]
    yield "precision and recall, 5k × 5k × 2048", seconds(
        lambda: evaluate.precision_recall(real, fake), warm=False), "s"


def start(args, folder, classes=1000):
    """The start of a training on `args.rows` prepared images, of 8 × 8 pixels to be quickly made."""
    source = folder / "source"
    for i in range(classes):
        Path(source, f"n{i:08d}").mkdir(parents=True)
    for i in range(args.rows):
        name = f"n{i % classes:08d}"
        open(source / name / f"{name}_{i}.JPEG", "w").close()
    def older(files, rows, side):
        return np.zeros((len(rows), side, side, 3), np.uint8), {}

    def newer(files, rows):
        return np.zeros((len(files.names[rows]), 8, 8, 3), np.uint8)

    reading = mock.patch.object(twosdm.ImageFiles, "load", older)
    if not OLDER:
        reading = mock.patch.object(twosdm.ImageFiles, "__getitem__", newer)
    with reading:
        for name in "first", "second":
            began = time.perf_counter()
            twosdm.prepare_images(source, 8, folder / "cache")
            yield f"{name} start, {args.rows:,} images", time.perf_counter() - began, "s"


def checkpoint(args, folder):
    """A checkpoint of ADM's size, of zeros: what sampling needs of it, and what training does."""
    settings = dict(resolution=64, cond_dim=512, arch="adm")
    model = dict(net="unet", predict="edm", settings=settings, sigma_data=0.5)
    with torch.device("meta"):
        state = twosdm.Denoiser(twosdm.UNet(**settings)).state_dict()
    prefix = "" if OLDER else "image."
    zeros = []
    for _ in range(4):                                # average, weights, both of Adam's moments
        zeros.append({prefix + name: torch.zeros(tensor.shape) for name, tensor in state.items()})
    path = folder / "checkpoint.pt"
    began = time.perf_counter()
    twosdm.save_checkpoint(path, model=model, models={"image": model}, ema=zeros[0], net=zeros[1],
                           optimizer=zeros[2:])
    yield "ADM: writing a checkpoint", time.perf_counter() - began, "s"
    del zeros
    began = time.perf_counter()
    content = twosdm.load_checkpoint(path)
    yield "ADM: opening a checkpoint", time.perf_counter() - began, "s"
    began = time.perf_counter()
    network = twosdm.load_denoiser(content, device=args.device)
    yield "ADM: the average of an open checkpoint", time.perf_counter() - began, "s"
    began = time.perf_counter()
    twosdm.fingerprint(network)
    yield "ADM: the fingerprint of the average, which sample.py takes", time.perf_counter() - began, "s"


def fetching(args, folder, rows=1_280_000, batch=128):
    """Training batches of ImageNet's size from a file that is one hole: the kernel makes zeros of it."""
    path = folder / "pixels"
    with open(path, "wb") as file:
        file.truncate(rows * 64 * 64 * 3)
    pixels = np.memmap(path, np.uint8, "r").reshape(rows, 64, 64, 3)
    labels = np.zeros(rows, np.int64)
    images = twosdm.Images(*[str(path), pixels, "name", labels] if OLDER else ["name", pixels, labels])
    rng = np.random.default_rng(0)
    for name in "cold", "warm":
        chosen = rng.integers(0, rows, (20, batch))
        times = []
        for _ in range(1 + (name == "warm")):
            for some in chosen:
                began = time.perf_counter()
                images.batch(some, args.device)
                times.append(time.perf_counter() - began)
        yield f"batch of {batch} images of 1,280,000, {name}", 1000 * np.median(times[-20:]), "ms"


def images(args, folder, count=3000):
    """JPEGs of 256 × 256 pixels, prepared at 64 × 64."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    (folder / "images").mkdir()
    picture = Image.fromarray(noise).resize((256, 256))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(count):
            picture.save(folder / f"images/{i}.jpg", quality=90)
            archive.write(folder / f"images/{i}.jpg", f"{i}.jpg")
    for source in "images", "images.zip":
        began = time.perf_counter()
        twosdm.prepare_images(folder / source, 64, folder / f"cache of {source}")
        yield f"preparing JPEGs of {source}", count / (time.perf_counter() - began), "images/s"


def whole(args, folder):
    """The README's first command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", "--device", args.device.type], cwd=folder, check=True,
                   capture_output=True)
    yield "python train.py", time.perf_counter() - began, "s"


GROUPS = [networks, metrics, start, checkpoint, fetching, images, whole]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(group.__name__ for group in GROUPS)
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="as train.py computes on cuda (default: no)")
    parser.add_argument("--only", nargs="+", default=[], help=f"of {names} (default: all)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the set of `start` (default: %(default)s)")
    args = parser.parse_args()
    args.device = twosdm.pick_device(args.device)
    print(f"{ROOT}, {args.device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for group in GROUPS:
        if not args.only or group.__name__ in args.only:
            with tempfile.TemporaryDirectory() as folder:
                for name, value, unit in group(args, Path(folder)):
                    print(f"{name:<60}{value:>12,.4g} {unit}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.1f} GB, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
