"""Samples from trained models: prior -> embedding -> image (2SDM), or one of the methods it is compared with.

    python sample.py                                 64 images of the newest runs, as PNGs and one grid
    python sample.py --method baseline --n 1000      the EDM model without embeddings
    python sample.py --method baseline --checkpoint edm-ffhq-64x64-uncond-vp.pkl      EDM's own
    python sample.py --n 50000 --npz --out big       also `arr_0` (N, H, W, 3) uint8 for OpenAI's evaluator

Image i depends on seed + i alone, not on the batch or the number of processes (torchrun sample.py ...).
The same command again continues where it stopped.
"""
import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import twosdm
from twosdm import UserError

METHODS = {"2sdm": ("prior", "image"), "oracle": ("image",), "baseline": ("baseline",),   # the runs they need
           "joint": ("joint",)}


def stages(method, y):
    """The runs that a method needs. Clusters are drawn by their frequency, without a prior: Class-cond."""
    if method == "2sdm" and (y.startswith("kmeans") or y in ("none", "pca:0")):
        return ("image",)
    return METHODS[method]


class Pipeline:
    """A method with its networks: seeds -> images. Raises UserError if a run is missing or two do not fit.

    2sdm: y ~ prior, x ~ image model. oracle: y is the embedding of a training image. baseline: no y at all.
    joint: 2sdm, its networks and embedder trained together (Overfit-2SDM).
    """

    def __init__(self, args, method, device):
        self.args, self.method, self.device = args, method, device
        self.precision = twosdm.set_precision(args.precision, device, auto="tf32")
        given = load_given(args.checkpoint)
        files = self.files = {
            stage: given[stage][0] if stage in given else find_run(args, stage)
            for stage in stages(method, args.y)}
        self.checkpoints = {
            stage: given[stage][1] if stage in given else twosdm.load_checkpoint(path, stage=stage)
            for stage, path in files.items()}
        if method == "joint":
            self.checkpoints = split_joint(self.checkpoints["joint"])
        self.models = {stage: twosdm.load_denoiser(c, device) for stage, c in self.checkpoints.items()}
        for model in self.models.values():
            twosdm.compile_network(model.net, args.compile, device)
        self.prior, self.main = self.checkpoints.get("prior"), list(self.checkpoints.values())[-1]
        self.image = list(self.models.values())[-1]                     # the network that draws the pixels
        if args.temperature != 1 and not (self.prior and "y_mean" in self.prior):
            raise UserError("--temperature is for --method 2sdm, with a prior trained by this version")
        if self.prior and self.prior["fingerprints"] != self.main["fingerprints"]:
            raise UserError(f"{files['prior']} and {files['image']} were trained on different images or "
                            f"embeddings: train both with the same settings")
        saved, self.data = self.main["config"], self.main["data"]
        self.text = self.prior is not None and self.prior["config"]["a"] == "text"
        if self.text != (args.prompt is not None):
            raise UserError("--prompt needs a prior that knows captions, and such a prior needs a --prompt: "
                            "python train.py --stage prior --a text")
        if self.text and saved["a"] != "none":
            raise UserError(f"{files['image']} was trained with classes, of which captions know nothing: "
                            f"train it with --a none")
        if not self.text and any(c["config"]["a"] != saved["a"] for c in self.checkpoints.values()):
            raise UserError(f"one of {' and '.join(map(str, files.values()))} was trained with classes and "
                            f"the other without: train both with the same --a")
        churn = saved["churn"] if args.churn is None else args.churn
        steps, s_noise = args.steps or saved["steps"], args.s_noise
        self.sampler = twosdm.Sampler(steps, churn, s_noise=s_noise)
        self.image_sampler = twosdm.Sampler(args.image_steps or steps, churn, s_noise=s_noise,
                                            guidance=args.guidance)
        if args.guidance != 1 and not (self.main["stage"] == "image" and saved.get("y_dropout")):
            raise UserError("--guidance needs an image model that sometimes was not told y: train.py --stage "
                            "image --y-dropout 0.1 --tag guided, then --checkpoint .../image-guided/checkpoint.pt")
        self.classes = len(self.data["classes"]) if saved["a"] == "class" else 0
        if args.label is not None and not 0 <= args.label < self.classes:
            names = ", ".join(f"{i} {name}" for i, name in enumerate(self.data["classes"][:20]))
            raise UserError(f"--class {args.label}: " + (
                f"the classes are {names}" + ", ..." * (self.classes > 20) if self.classes
                else "this model was trained without classes (train.py --a class)"))
        if args.label is not None and not self.data["class_counts"][args.label]:
            raise UserError(f"--class {args.label}: no training image has this class")
        vae, self.images = args.vae or saved.get("vae"), None
        self.autoencoder = twosdm.Autoencoder(vae).to(device) if vae else None
        packed = self.main["embedder"]
        self.clusters = packed["reduction"]["counts"].double() if packed and "counts" in packed.get(
            "reduction", ()) else None
        self.embedder = None
        if packed and (method == "oracle" or self.text):
            self.embedder = twosdm.unpack_embedder(packed, saved["resolution"],
                                                   args.clip_weights or saved["clip_weights"]).to(device)
        if method == "oracle":
            config = twosdm.TrainConfig(**saved)
            config.runs, config.data = args.runs, args.data or config.data
            self.images = twosdm.load_images(config, self.autoencoder)
            if self.images.fingerprint != self.data["fingerprint"]:
                raise UserError("the training images are not those of this run: give its own with --data")
        self.shape = (saved["resolution"], saved["resolution"], 3)

    def describe(self):
        """What the images depend on, for the record."""
        return dict(sampler="Algorithm 2, streams by name", device=self.device.type, method=self.method,
                    dataset=self.main["dataset"], steps=self.sampler.steps,
                    image_steps=self.image_sampler.steps, churn=self.sampler.s_churn,
                    s_noise=self.sampler.s_noise, label=self.args.label, arithmetic=self.precision,
                    y=self.main["config"].get("y", "clip"), prompt=self.args.prompt,
                    guidance=self.args.guidance, temperature=self.args.temperature,
                    fingerprints=self.main["fingerprints"],
                    images_seen={s: c["seen"] for s, c in self.checkpoints.items()},
                    networks={s: twosdm.fingerprint(m) for s, m in self.models.items()})

    def items(self, seeds):
        """Per seed a random training item, of the class asked for: rows (B,) for the oracle's y and a."""
        rows = []
        pool = np.arange(len(self.images)) if self.args.label is None else \
            np.flatnonzero(self.images.labels == self.args.label)
        for seed in seeds:
            generator = torch.Generator().manual_seed(twosdm.mix_seed("label", seed))
            rows.append(pool[int(torch.randint(len(pool), (), generator=generator))])
        return np.array(rows)

    def labels(self, seeds):
        """Per seed a class, as asked for or by its frequency in the training set: one-hot (B, A)."""
        if self.args.label is not None:
            drawn = torch.full((len(seeds),), self.args.label)
        else:
            drawn = self.drawn("label", seeds, torch.tensor(self.data["class_counts"], dtype=torch.float64))
        return F.one_hot(drawn, self.classes).float().to(self.device)

    @torch.no_grad()
    def conditions(self, seeds):
        """Stage 1: (B,) seeds -> y (B, D) and a (B, A), either of them None if the method has none."""
        a, y = self.labels(seeds) if self.classes else None, None
        if self.text:
            clip = getattr(self.embedder, "inner", self.embedder)                     # beneath a PCA
            a = clip.text_condition([self.args.prompt]).expand(len(seeds), -1)
        if self.method == "oracle":
            rows = self.items(seeds)
            if self.classes:
                labels = torch.from_numpy(self.images.labels[rows])
                a = F.one_hot(labels, self.classes).float().to(self.device)
            if self.embedder is not None:
                y = self.embedder(self.images.batch(rows, self.device))
        elif self.prior is not None:
            with self.autocast():
                y = twosdm.sample_embeddings(self.models["prior"], seeds, a, self.sampler)
            if self.args.temperature != 1:
                mean = self.prior["y_mean"].to(self.device)
                y = mean + self.args.temperature * (y - mean)
        elif self.clusters is not None:
            y = F.one_hot(self.drawn("cluster", seeds, self.clusters), len(self.clusters)).float()
        return None if y is None else y.to(self.device), None if self.text else a

    @torch.no_grad()
    def draw(self, seeds, y, a):
        """Stage 2: (B,) seeds and what `conditions` gives -> (B, H, W, 3) uint8."""
        with self.autocast():
            x = twosdm.sample_images(self.image, seeds, y, a, self.image_sampler)
        x = x if self.autoencoder is None else self.autoencoder.decode(x)
        return twosdm.to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()

    def __call__(self, seeds):
        """(B,) whole numbers -> (B, H, W, 3) uint8."""
        return self.draw(seeds, *self.conditions(seeds))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @staticmethod
    def drawn(name, seeds, shares):
        """Per seed a number i with probability ~ shares[i]: (B,)."""
        return torch.cat([torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(
            twosdm.mix_seed(name, seed))) for seed in seeds])


def load_given(paths, methods=()):
    """{stage: (path, checkpoint)} of checkpoints given by name; EDM's .pkl files are baselines."""
    given = {}
    for path in paths or ():
        edm = str(path).endswith(".pkl")
        checkpoint = twosdm.edm_checkpoint(path) if edm else twosdm.load_checkpoint(path)
        if checkpoint["stage"] in given:
            raise UserError(f"--checkpoint: {given[checkpoint['stage']][0]} and {path} are both of the stage "
                            f"{checkpoint['stage']}: give one of each")
        if not any(checkpoint["stage"] in METHODS[method] for method in methods or METHODS):
            raise UserError(f"--checkpoint: {path} is of the stage {checkpoint['stage']}, for which --method "
                            f"{' '.join(methods)} has no use")
        given[checkpoint["stage"]] = path, checkpoint
    return given


def split_joint(checkpoint):
    """The checkpoint of the joint stage -> {stage: what the checkpoints of prior and image model would be}."""
    weights = checkpoint["ema"]

    def part(name):
        return {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}

    return {stage: dict(checkpoint, model=checkpoint["model"][stage], ema=part(stage), embedder=None)
            for stage in ("prior", "image")}


def find_run(args, stage):
    """The newest checkpoint of a stage below args.runs, of args.dataset if it is given."""
    text = args.prompt is not None and stage == "prior"
    name = twosdm.run_name(stage, args.y, "text" if text else "none")
    found = list(Path(args.runs).glob(f"{args.dataset or '*'}/{name}/checkpoint.pt"))
    if not found:
        where = f"--dataset {args.dataset}" if args.dataset else "any data set"
        flags = stage + f" --y {args.y}" * (stage in ("prior", "image") and args.y != "clip") + " --a text" * text
        raise UserError(f"{args.runs} has no trained '{name}' of {where}: run python train.py first (for "
                        f"this alone: --stage {flags}), or say where the runs are with --runs")
    return max(found, key=lambda path: path.stat().st_mtime)


def add_sampling_flags(parser):
    """The flags of everything that samples; evaluate.py has them too."""
    def at_least(low, kind):
        def number(text):
            value = kind(text)
            if not low <= value <= 2**31:
                raise argparse.ArgumentTypeError(f"{text} is out of range: at least {low}, at most 2^31")
            return value
        return number

    add = parser.add_argument
    add("--seed", type=at_least(0, int), default=0,
        help="image i is drawn from seed + i (default: %(default)s)")
    add("--steps", type=at_least(2, int),
        help="sampling steps of prior and image model (default: the run's preset)")
    add("--image-steps", type=at_least(2, int), help="steps of the image model alone (default: as --steps)")
    add("--churn", type=at_least(0, float), help="S_churn; 0 = deterministic (default: the run's preset)")
    add("--y", default="clip", help="which variant of prior and image model: clip, pca:D, kmeans:K, none "
        "(default: %(default)s)")
    add("--guidance", type=at_least(0, float), default=1.0, help="classifier-free guidance on y; 1 = none, the "
        "model must have been trained with --y-dropout (default: %(default)s)")
    add("--temperature", type=at_least(0, float), default=1.0, help="scales the prior's embeddings about their "
        "mean in the training set (default: %(default)s)")
    add("--prompt", metavar="TEXT", help='a caption, such as "three red stars on a blue background", for priors '
        "trained with --a text")
    add("--s-noise", type=at_least(0, float), default=1.007,
        help="S_noise of the churn (default: %(default)s)")
    add("--class", type=int, dest="label", metavar="CLASS",
        help="draw this class alone (default: as in the data)")
    add("--batch", type=at_least(1, int), default=64, help="images drawn at a time (default: %(default)s)")
    add("--runs", default="runs", help="folder of all runs (default: %(default)s)")
    add("--dataset", help="whose runs to take (default: those trained last)")
    add("--checkpoint", nargs="+", metavar="FILE", help="checkpoints of prior, image model or baseline, in "
        "place of the newest; EDM's published .pkl files serve as baseline")
    add("--data", help="the training images, for the oracle (default: where they were)")
    add("--clip-weights", help="CLIP's weights, for the oracle (default: where they were)")
    add("--vae", help="Stable Diffusion's VAE, for latent models (default: where it was)")
    add("--device", default="auto", help="auto = cuda, else mps, else cpu (default: %(default)s)")
    add("--precision", choices=("auto", *twosdm.PRECISIONS), default="auto",
        help="of the networks; auto = tf32 on cuda, else fp32 (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the networks, which pays for thousands of images on cuda (default: no)")
    return at_least


def same_dataset(args):
    """Without --dataset: the one whose image model or baseline was trained last, for all stages alike."""
    if not args.dataset and not args.checkpoint:
        stages = ("image", "baseline")
        found = [path for stage in stages for path in Path(args.runs).glob(f"*/{stage}/checkpoint.pt")]
        if found:
            args.dataset = max(found, key=lambda path: path.stat().st_mtime).parts[-3]


def open_folder(out, settings, default):
    """A folder for samples of these settings: new, or one that holds the same. Never another's."""
    candidates = [Path(out)] if out else [
        Path(default + (f"-{i}" if i > 1 else "")) for i in range(1, 10_000)]
    for folder in candidates:
        record = folder / "settings.json"
        with twosdm.user_errors(f"{folder} cannot be written"):
            if record.is_file() and record.read_text() == settings:
                return folder
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                folder.mkdir(parents=True, exist_ok=True)
                record.write_text(settings)
                return folder
    raise UserError(f"{out} holds something else already: give another --out")


def write_npz(path, folder, names, shape):
    """All PNGs of a folder as one array `arr_0` (N, H, W, 3) uint8, streamed: memory does not grow with N."""
    with twosdm.written(path) as fresh, zipfile.ZipFile(fresh, "w") as archive, archive.open(
            "arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(
            file, dict(descr="|u1", fortran_order=False, shape=(len(names), *shape)))
        for name in names:
            file.write(np.asarray(Image.open(folder / name)).tobytes())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    at_least = add_sampling_flags(parser)
    parser.add_argument("--method", choices=list(METHODS), default="2sdm", help="(default: %(default)s)")
    parser.add_argument("--n", type=at_least(1, int), default=64,
                        help="number of images (default: %(default)s)")
    parser.add_argument("--out", help="folder for the images (default: samples/<dataset>-<method>, numbered)")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz, all images as one array")
    args = parser.parse_args()
    same_dataset(args)
    device = twosdm.pick_device(args.device)
    twosdm.join_processes(device)
    load_given(args.checkpoint, [args.method])
    pipeline = Pipeline(args, args.method, device)
    settings = json.dumps(pipeline.describe(), indent=1)
    sources = ", ".join(map(str, pipeline.files.values()))
    print(f"{args.method} from {sources}, {pipeline.sampler.steps} steps", file=sys.stderr)
    folder = None
    if not twosdm.rank():
        folder = open_folder(args.out, settings, f"samples/{pipeline.main['dataset']}-{args.method}")
    folder = twosdm.gather(folder)[0]
    seeds = range(args.seed, args.seed + args.n)
    names = [f"{seed:06d}.png" for seed in seeds]
    missing = [seed for seed, name in zip(seeds, names) if not (folder / name).exists()]
    twosdm.gather(None)                               # nobody draws before all have looked
    bar = tqdm(total=args.n, initial=args.n - len(missing), desc=args.method, unit=" images")
    for part in twosdm.share([missing[i:i + args.batch] for i in range(0, len(missing), args.batch)]):
        for seed, pixels in zip(part, pipeline(part)):
            twosdm.save_picture(folder / f"{seed:06d}.png", pixels)
        bar.update(min(len(part) * twosdm.processes(), bar.total - bar.n))
    bar.close()
    twosdm.gather(None)
    if twosdm.rank():
        return 0
    shown = np.stack([np.asarray(Image.open(folder / name)) for name in names[:64]])
    twosdm.save_picture(folder / "grid.png", twosdm.image_grid(shown, min(8, len(shown))), least=512)
    if args.npz:
        write_npz(folder / "samples.npz", folder, names, pipeline.shape)
    print(folder / "grid.png")
    return 0


if __name__ == "__main__":
    twosdm.run(main)
