"""Speed on this device: python tests/benchmark.py [--device cuda] [--bf16] [--only NAME].

Prints a line for each measurement, asserts nothing. It knows the public names alone, so that a copy of it
measures another version of the code, too, from beside it: cp benchmark.py OTHER/tests/.

Goals on one H200 or H100: DDPM++-64 trains on 1,000 images/s and samples 40 (40 steps), the prior trains on
100,000 embeddings/s and takes at most 1 % of sampling, training from the bank is 10 times faster than with
CLIP.
"""
import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import twosdm


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
        self.batch, self.args, device = batch, args, args.device
        self.denoiser = twosdm.Denoiser(net).to(device, memory_format=torch.channels_last).train()
        self.ema = twosdm.EMA(self.denoiser, 500_000)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), 1e-4, fused=True)
        self.x = torch.randn(batch, *shape, device=device)
        self.cond = torch.randn(batch, net.cond_dim, device=device) if net.cond_dim else None

    def autocast(self):
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def step(self):
        """As train.py's: loss, gradients, optimizer, moving average."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.denoiser.loss(self.x, self.cond)
        loss.mean().backward()
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
        step, sampling[name] = seconds(network.step), network.sampling()
        yield f"{name}: training", network.batch / step, "images/s"
        yield f"{name}: sampling, 40 steps", network.batch / sampling[name], "images/s"
    share = small.sampling()
    share = share / (share + sampling["DDPM++-64"])
    yield f"prior: share of two-stage sampling, batch {image.batch}", 100 * share, "%"
    with torch.no_grad():
        embedding = seconds(lambda: clip(image.x)) / image.batch * prior.batch
    yield "prior: slower with CLIP in each step than from the bank", 1 + embedding / step, "times"


def metrics(args, folder):
    """On random features of Inception's 2048 dimensions."""
    real, fake = np.random.default_rng(0).standard_normal((2, 5000, 2048), np.float32)
    stats = [evaluate.RunningStats(2048).update(x).result() for x in (real, fake)]
    yield "Fréchet distance, 2048", seconds(lambda: evaluate.frechet_distance(*stats[0], *stats[1])), "s"
    yield "precision and recall, 5k × 5k × 2048", seconds(
        lambda: evaluate.precision_recall(real, fake), warm=False), "s"


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
        start = time.perf_counter()
        twosdm.prepare_images(folder / source, 64, folder / f"cache of {source}")
        yield f"preparing JPEGs of {source}", count / (time.perf_counter() - start), "images/s"


def whole(args, folder):
    """The README's first command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "train.py", "--device", args.device.type], cwd=folder, check=True,
                   capture_output=True)
    yield "python train.py", time.perf_counter() - start, "s"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="as train.py computes on cuda (default: no)")
    parser.add_argument("--only", default="", help="networks, metrics, images or whole (default: all)")
    args = parser.parse_args()
    args.device = twosdm.pick_device(args.device)
    print(f"{ROOT}, {args.device}, {torch.get_num_threads()} threads")
    for group in networks, metrics, images, whole:
        if args.only in group.__name__:
            with tempfile.TemporaryDirectory() as folder:
                for name, value, unit in group(args, Path(folder)):
                    print(f"{name:<56}{value:>12,.4g} {unit}", flush=True)


if __name__ == "__main__":
    main()
