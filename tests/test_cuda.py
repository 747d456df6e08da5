"""Right on GPUs, also where there is none.

FakeTensorMode computes shapes, types and devices alone, also of tensors "on cuda", and an operation on a tensor
that was left on the CPU raises. So every network of every preset runs forward on a GPU here, at its full size,
in less than a second. Where there is a real GPU, what trains, samples and measures on it is compared to the CPU.
"""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import train
import twosdm

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CLASSES = 10


@pytest.fixture
def fake(monkeypatch):
    """In a test: tensors are shapes "on cuda", and autocast believes that there is a GPU for bf16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **more: True)
    # What does not work when faked: moving modules, reading numbers.
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **more: module)
    monkeypatch.setattr(twosdm, "sigma_schedule", lambda steps: [80.0, 0.0])
    with FakeTensorMode(), torch.device("cuda"):
        yield


def models(dataset, stage):
    """A preset's models of a stage, as train.py makes them, and a batch for them on the GPU."""
    config = train.configure(dataset, **({"data": "images"} if dataset == "folder" else {}))
    classes = CLASSES if config.a == "class" else 0
    embedder = None
    if stage in ("prior", "image"):
        embedder = SimpleNamespace(dim=twosdm.EMBEDDERS[config.embedder].dim)
    latents = SimpleNamespace(shape=(1, 8, 32, 32))
    data = SimpleNamespace(embedder=embedder, classes=classes, images=SimpleNamespace(latents=latents),
                           device=torch.device("cuda"))
    described = train.describe(config, stage, data)
    built = train.build(config, stage, described, data)
    x = torch.randn(2, 3, config.resolution, config.resolution)
    y = None
    if config.vae:
        x = torch.randn(2, 4, 32, 32)
    if embedder is not None:
        y = torch.randn(2, embedder.dim)
    a = torch.randn(2, classes) if classes else None
    label = torch.randn(2, 9) if config.augment else None
    return built, x, y, a, label


TRAINABLE = list(itertools.product(train.PRESETS, train.STAGES))
TRAINABLE.remove(("imagenet-latent", "joint"))        # which train.py refuses
TRAINABLE.remove(("fashion-mnist", "joint"))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dataset, stage", TRAINABLE)
def test_losses_and_samples_are_computed_on_the_gpu(fake, dataset, stage, bf16):
    built, x, y, a, label = models(dataset, stage)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss = built(x, y, a, label)
    assert loss.device.type == "cuda" and loss.shape == (2,) and loss.dtype == torch.float32
    sampler = twosdm.Sampler(steps=2, guidance=1.5)
    noise = SimpleNoise(2)
    built.eval()
    if stage == "joint":
        y = torch.randn(2, built.embedder.dim)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        if built.prior is not None:
            y = twosdm.sample_embeddings(built.prior, noise, a, sampler)
            assert y.device.type == "cuda" and y.dtype == torch.float32
        if built.image is not None:
            image = twosdm.sample_images(built.image, noise, y, a, sampler)
            assert image.device.type == "cuda" and image.shape == x.shape and image.dtype == torch.float32
            twosdm.to_uint8(image)


class SimpleNoise:
    """Stands for a SampleNoise: there are no generators on a GPU that is not there."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return self.batch

    randn = staticmethod(torch.randn)
    randn_like = staticmethod(torch.randn_like)


def test_what_was_left_on_the_cpu_would_be_found(fake):
    """The faults of which the tests here are to warn, made on purpose."""
    built, x, y, a, label = models("shapes", "image")
    with pytest.raises(RuntimeError, match="(?i)device"):                 # an input
        built(x, y.cpu(), a, label)
    map_cond = built.image.net.map_cond
    map_cond.weight = nn.Parameter(torch.zeros(map_cond.weight.shape, device="cpu"))
    with pytest.raises(RuntimeError, match="(?i)device"):                 # a weight
        built(x, y, a, label)

    class Careless(nn.Module):                                            # a constant, made in forward
        def forward(self, x, c_noise, cond, augment):
            return x * torch.ones(len(x), 1, 1, 1, device="cpu")

    with pytest.raises(RuntimeError, match="(?i)device"):
        twosdm.Denoiser(Careless()).loss(x)


@pytest.mark.parametrize("name", twosdm.EMBEDDERS)
def test_embedders_compute_on_the_gpu_in_float32(fake, name):
    x = torch.randn(2, 3, 64, 64)
    embedder = twosdm.Embedder(name)
    for reduction in (
        None,
        twosdm.PCA(torch.zeros(embedder.dim), torch.zeros(embedder.dim, 4)),
        twosdm.KMeans(torch.zeros(4, embedder.dim), torch.ones(4, dtype=torch.int64)),
    ):
        embedder.reduction = reduction
        with torch.autocast("cuda", torch.bfloat16):
            y = embedder(x)
        assert y.device.type == "cuda" and y.dtype == torch.float32 and y.shape == (2, embedder.dim)


def test_features_are_computed_on_the_gpu_in_float32(fake, monkeypatch):
    monkeypatch.setattr(evaluate, "load_public", lambda *args: "random weights")
    images = torch.randn(2, 3, 64, 64)
    for features in (evaluate.InceptionFeatures(), evaluate.PixelFeatures(), evaluate.WorldFeatures()):
        for value in features(images).values():
            assert value.device.type == "cuda" and value.dtype == torch.float32 and len(value) == 2
    distances = evaluate.Lpips()(images, images)
    assert distances.device.type == "cuda" and distances.dtype == torch.float32


def test_metrics_are_computed_on_the_device_of_the_features(fake):
    """All but what asks for numbers, which shapes alone do not have."""
    features = torch.randn(20, 8)
    stats = evaluate.RunningStats()
    stats.update(features)
    for value in stats.result():
        assert value.device.type == "cuda" and value.dtype == torch.float64
    for value in (evaluate.squared_radii(features.double(), 3), *evaluate.distance_blocks(features, features)):
        assert value.device.type == "cuda"


def test_resampling_and_latents_on_the_gpu(fake, monkeypatch):
    def filters(size, device):
        fine = 2 * size + 2 * twosdm.PAD
        return torch.zeros(fine, size), torch.zeros(size, fine), torch.zeros(fine)

    monkeypatch.setattr(twosdm, "filters", filters)
    images = torch.randn(2, 3, 32, 32)
    with torch.backends.cudnn.flags(enabled=False):   # its grid_sample cannot be faked
        resampled = twosdm.resample(images, torch.randn(2, 2, 2), torch.randn(2, 2))
    assert resampled.device.type == "cuda" and resampled.shape == images.shape
    autoencoder = SimpleNamespace(mean=torch.zeros(4, 1, 1), std=torch.ones(4, 1, 1))
    latent = twosdm.Autoencoder.sample(autoencoder, torch.randn(2, 8, 32, 32, dtype=torch.float16))
    assert latent.device.type == "cuda" and latent.dtype == torch.float32


def test_bf16_needs_a_gpu_that_is_fast_in_it(monkeypatch):
    for capability, expected in (((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert twosdm.set_precision("auto", torch.device("cuda")) == expected
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (expected == "bf16")
    assert twosdm.set_precision("auto", torch.device("cpu")) == "fp32"
    twosdm.set_precision("tf32", torch.device("cpu"))
    with twosdm.full_float32("cpu"):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    twosdm.set_precision("fp32", torch.device("cpu"))


# ------------------------------------------------------------------------------------------- on a real GPU
TINY = dict(size=256, batch=16, prior_batch=16, images=320, prior_images=320, prior_width=32, prior_depth=1,
            prior_heads=2, width=16, mults=(1, 2), blocks=1, lr_ramp=32, log_every=160, preview_every=160,
            snapshot_every=0, threads=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same short trainings on CPU and GPU -> {device: folder of the runs}."""
    folders = {}
    for name in ("cpu", "cuda"):
        folders[name] = tmp_path_factory.mktemp(name)
        for stage in train.STAGES:
            config = train.configure("shapes", runs=str(folders[name]), precision="fp32", **TINY)
            train.train(config, stage, twosdm.pick_device(name))
    return folders


def denoiser(folder, stage, device):
    checkpoint = twosdm.load_checkpoint(folder / "shapes" / stage / "checkpoint.pt")
    part = "image" if stage == "joint" else None
    return twosdm.load_denoiser(checkpoint, part, device), checkpoint


@gpu
@pytest.mark.parametrize("stage", train.STAGES)
def test_training_on_the_gpu_ends_where_it_does_on_the_cpu(trained, stage):
    """To what different noise, which each device draws by itself, leaves of 20 steps' losses."""
    losses = []
    for device, folder in trained.items():
        _, checkpoint = denoiser(folder, stage, device)
        losses.append(checkpoint["log"][-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


@gpu
def test_a_checkpoint_gives_the_same_on_both(trained):
    """Denoised values to rounding, images to a gray level or two, in fp32."""
    twosdm.set_precision("fp32", torch.device("cuda"))
    x = torch.randn(8, 3, 16, 16)
    y = torch.randn(8, 16) / 2
    noise = twosdm.SampleNoise(range(8))
    shown = []
    for device in ("cpu", "cuda"):
        model, _ = denoiser(trained["cuda"], "image", device)
        value = model(x.to(device), torch.full((8,), 0.7, device=device), y.to(device))
        start = noise.randn(8, 3, 16, 16).to(device) if device == "cpu" else start.to(device)

        def denoise(x, sigma):
            return model(x, sigma, y.to(x.device))

        image = twosdm.heun_sample(denoise, start, twosdm.sigma_schedule(8)).float()
        shown.append((value.cpu(), twosdm.to_uint8(image).cpu().int()))
    torch.testing.assert_close(shown[0][0], shown[1][0], rtol=1e-3, atol=1e-4)
    assert (shown[0][1] - shown[1][1]).abs().max() <= 2


@gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_faster_precisions_are_near_fp32(trained, precision):
    model, _ = denoiser(trained["cuda"], "image", "cuda")
    x = torch.randn(8, 3, 16, 16, device="cuda")
    sigma = torch.full((8,), 0.7, device="cuda")
    y = torch.randn(8, 16, device="cuda") / 2
    values = []
    for name in ("fp32", precision):
        twosdm.set_precision(name, torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "bf16"):
            values.append(model(x, sigma, y))
    twosdm.set_precision("fp32", torch.device("cuda"))
    assert (values[0] - values[1]).abs().max() < 0.05


@gpu
def test_augmentation_embeddings_and_metrics_agree():
    """With TF32 allowed everywhere else, as in training."""
    twosdm.set_precision("tf32", torch.device("cuda"))
    x = torch.rand(32, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    expected, labels = twosdm.Augment(0.8)(x)
    torch.manual_seed(0)
    found, found_labels = twosdm.Augment(0.8)(x.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)
    assert torch.equal(found_labels.cpu(), labels)
    embedder = twosdm.Embedder("shapes")
    y = embedder(x)
    embedder.reduction = twosdm.PCA.fit(y, 4)
    expected = embedder(x)
    torch.testing.assert_close(embedder.cuda()(x.cuda()).cpu(), expected, rtol=1e-2, atol=1e-3)
    rng = np.random.default_rng(0)
    real, fake = [torch.from_numpy(rng.standard_normal((500, 64), np.float32)) for _ in range(2)]
    for device in ("cpu", "cuda"):
        moments = []
        for rows in (real, fake):
            stats = evaluate.RunningStats()
            stats.update(rows.to(device))
            moments += stats.result()
        values = [evaluate.frechet_distance(*moments), *evaluate.inception_score(real.to(device)),
                  *evaluate.precision_recall(real.to(device), fake.to(device))]
        if device == "cpu":
            expected = values
    assert values == pytest.approx(expected, rel=1e-6)
    twosdm.set_precision("fp32", torch.device("cuda"))


@gpu
def test_the_gradient_in_parts_is_that_of_the_whole_batch():
    torch.manual_seed(0)
    model = twosdm.Denoiser(twosdm.UNet(16, width=16, mults=(1, 2), blocks=1, attention=(8,))).cuda()
    x = torch.randn(8, 3, 16, 16, device="cuda")
    sigma = torch.rand(8, device="cuda") + 0.1
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        for part, level in zip(x.chunk(parts), sigma.chunk(parts)):
            ((model(part, level) - part).square().sum() / 8).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


@gpu
def test_a_second_gpu_is_used_when_it_is_asked_for():
    last = torch.cuda.device_count() - 1
    device = twosdm.pick_device(f"cuda:{last}")
    assert torch.cuda.current_device() == device.index == last
    assert twosdm.send(np.zeros(3), device).device == device
    twosdm.pick_device("cuda:0")
