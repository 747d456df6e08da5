"""The metrics are their formulas: closed forms, exact ties, and networks evaluated a second, direct way."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import evaluate
from evaluate import Lpips, RunningStats, frechet_distance, inception_score, nearest, precision_recall
from twosdm import UserError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(a, b, tolerance):
    return abs(a - b).max() < tolerance


def gaussian(*parts):
    """The mean and covariance of rows that come in parts."""
    stats = RunningStats()
    for part in parts:
        stats.update(part)
    return stats.result()


# ------------------------------------------------------------------------------------------- Fréchet distance


def test_streamed_statistics_are_numpys():
    x = normal(203, 7) + 5
    mu, sigma = gaussian(*np.split(x, [50, 120]))
    assert close(mu.numpy(), x.mean(0), 1e-12) and close(sigma.numpy(), np.cov(x.T), 1e-11)


@pytest.mark.parametrize("n, m, dims, tolerance", [(40, 50, 12, 1e-10), (20, 30, 200, 1e-5)])
def test_others_have_the_nuclear_norm_also_of_fewer_images_than_dimensions(n, m, dims, tolerance):
    x = normal(n, dims)
    y = normal(m, dims, seed=1) + 0.1
    a = (x - x.mean(0)) / np.sqrt(n - 1)
    b = (y - y.mean(0)) / np.sqrt(m - 1)
    exact = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum()
    exact -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert frechet_distance(*gaussian(x), *gaussian(y)) == pytest.approx(exact, abs=tolerance, rel=0)
    assert 0 <= frechet_distance(*gaussian(x), *gaussian(x)) < 1e-5


# -------------------------------------------------------------------------------------------- Inception Score


def test_the_score_is_its_formula_on_even_splits_also_when_they_do_not_divide():
    logits = normal(47, 9) * 2
    scores = []
    for part in np.array_split(logits, 10):
        p = np.exp(part - np.logaddexp.reduce(part, 1)[:, None])
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), abs=1e-13)


def test_sure_and_varied_scores_the_number_of_classes_alike_scores_one_and_underflow_is_no_nan():
    classes = np.eye(8)[np.arange(800) % 8]
    with np.errstate(divide="ignore"):
        impossible = np.log(classes)
    for logits in classes * 1e5, (classes * 1e5).astype(np.float32) - 7e4, impossible:
        assert inception_score(logits) == pytest.approx((8, 0), abs=1e-12)
    assert inception_score(np.tile(np.arange(5.0), (30, 1))) == pytest.approx((1, 0), abs=1e-12)


# ------------------------------------------------------------------------- precision, recall, nearest images


def covered(x, centers, k):
    """By the definition, on exact (integer) coordinates."""
    own = np.square(centers[:, None] - centers).sum(2)
    radii = np.sort(own, 1)[:, k]                             # the nearest of all is the center itself
    return (np.square(x[:, None] - centers).sum(2) <= radii).any(1).mean()


@pytest.mark.parametrize("n, m, k", [(150, 150, 1), (90, 210, 3), (1100, 40, 5)])
def test_ties_and_duplicates_are_inside_as_defined(n, m, k):
    r = np.random.default_rng(k)
    real = r.integers(0, 12, (n, 4))
    fake = r.integers(0, 12, (m, 4)) + r.integers(0, 6, (m, 1))
    exact = covered(fake, real, k), covered(real, fake, k)
    assert 0 < min(exact) and max(exact) < 1
    for offset in 0, 1000:
        ours = precision_recall((real + offset).astype(np.float32), (fake + offset).astype(np.float32), k)
        assert ours == pytest.approx(exact, abs=1e-12)


def test_copies_are_inside_balls_of_radius_zero_and_nothing_else_is():
    x = normal(60, 2048).astype(np.float32) * 3 + 7
    fake = x[::-1].copy()
    assert (nearest(fake, x)[0] == 0).all()
    assert precision_recall(np.repeat(x, 4, axis=0), fake) == (1, 1)
    fake[:, 9] += 1e-3
    assert precision_recall(np.repeat(x, 4, axis=0), fake)[0] == 0


def test_neighbors_are_those_of_the_full_matrix_however_the_gallery_is_cut():
    queries = normal(40, 48)
    gallery = normal(1500, 48, seed=1)
    full = np.linalg.norm(queries[:, None] - gallery, axis=2)
    order = np.argsort(full, 1)[:, :4]
    for chunks in torch.from_numpy(gallery), np.array_split(gallery, 7), iter(gallery[:, None]):
        distances, indices = nearest(queries, chunks, k=4)
        assert (indices == order).all()
        assert close(distances, np.take_along_axis(full, order, 1), 1e-12)


def test_too_few_images_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="more than 3 images, got 9 and 3"):
        precision_recall(normal(9, 2), normal(3, 2))


# -------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("height, width", [(64, 64), (512, 512), (299, 40)])
def test_the_resize_reads_coordinate_i_times_in_over_out(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float64)

    def along(x):
        source = np.arange(299) * len(x) / 299
        return np.stack([np.interp(source, np.arange(len(x)), column) for column in x.T])

    ours = evaluate.tf1_resize(torch.from_numpy(image).float()[None, None])[0, 0]
    assert close(ours.double().numpy(), along(along(image)), 1e-4)        # of 255 gray levels


@pytest.fixture(scope="session")
def reference():
    """torchvision's Inception with random weights and activations of about unit size."""
    torch.manual_seed(0)
    net = torchvision.models.Inception3(
        num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.1, 0.3)
    return net.eval()


@pytest.fixture(scope="session")
def inception_file(reference, tmp_path_factory):
    """Its weights as the public file has them."""
    state = {key: x for key, x in reference.state_dict().items() if "num_batches" not in key}
    assert len(state) == 472 and sum(x.numel() for x in state.values()) == 23_885_392
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@torch.no_grad()
def test_features_are_those_of_the_published_graph(inception_file, reference, monkeypatch):
    """Its averages leave out the padding, its last block has a maximum, its logits no bias."""
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    average = F.avg_pool2d
    pools = []
    found = {}

    def pool(x, *window, **options):
        pools.append(x)
        if len(pools) == 9:
            return F.max_pool2d(x, *window, **options)
        return average(x, *window, **options) / average(torch.ones_like(x), *window, **options)

    reference.fc.register_forward_hook(lambda _, args, out: found.update(pool=args[0]))
    reference.Mixed_6d.register_forward_hook(lambda _, args, out: found.update(map=out))
    monkeypatch.setattr(F, "avg_pool2d", pool)
    logits = reference((evaluate.tf1_resize(images.float()) - 128) / 128)
    monkeypatch.undo()
    exact = dict(
        pool=found["pool"],
        spatial=found["map"][:, :7].permute(0, 2, 3, 1).flatten(1),           # channels last in the row
        logits=logits - reference.fc.bias)
    inception = evaluate.InceptionFeatures(inception_file)
    ours = inception(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):         # of another batch, as floats, in low precision
        alone = inception(images[1:2].float() / 127.5 - 1)
    assert len(pools) == 9 and ours.keys() == exact.keys()
    for name, x in exact.items():
        assert x.shape == ours[name].shape and close(ours[name], x, 1e-5 * x.abs().max())
        assert close(alone[name], x[1:2], 1e-5 * x.abs().max())


RELUS = [1, 4, 7, 9, 11]                                      # that LPIPS compares


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory):
    """(the trunk's layers, the linear layers' weights, the files of both as they are published)."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("lpips")
    alexnet = torchvision.models.alexnet()
    trunk = alexnet.features
    state = alexnet.state_dict()
    for key, x in state.items():
        if key.startswith("classifier"):                      # of the right shape, in a small file
            state[key] = torch.zeros(1).expand(x.shape)
    weights = [torch.rand(1, len(trunk[i - 1].bias), 1, 1) for i in RELUS]
    torch.save(state, folder / "trunk.pth")
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(weights)}, folder / "linear.pth")
    return trunk, weights, (folder / "linear.pth", folder / "trunk.pth")


@torch.no_grad()
def test_lpips_is_its_definition_and_the_squared_distance_of_its_embeddings(lpips_files):
    trunk, weights, files = lpips_files
    torch.manual_seed(2)
    a = torch.rand(2, 3, 48, 40) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape)).clamp(-1, 1)
    shift, scale = torch.tensor([[-.030, -.088, -.188], [.458, .448, .450]])[:, :, None, None]
    x = (torch.cat([a, b]) - shift) / scale
    exact = 0
    left = list(weights)
    for i, layer in enumerate(trunk[:12]):
        x = layer(x)
        if i in RELUS:
            f, g = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            exact = exact + (left.pop(0) * (f - g).pow(2)).sum(1).mean((1, 2))
    lpips = Lpips(files)
    assert (exact > 1e-4).all() and close(lpips(a, b), exact, 1e-6)
    distances, _ = nearest(lpips.embed(a[:1]), lpips.embed(b[:1]))
    assert abs(distances[0, 0] ** 2 - exact[0].item()) < 1e-6


def test_wrong_and_missing_files_are_refused_in_one_sentence_that_names_the_right_one(
        inception_file, lpips_files, tmp_path, monkeypatch):
    _, _, (linear, trunk) = lpips_files
    state = torch.load(inception_file)
    state["fc.bias"] = torch.zeros(1000)
    torch.save(state, tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in "shape", "text", "absent":
        with pytest.raises(UserError, match=f"{name}.pth is missing, damaged or .*{evaluate.INCEPTION}"):
            evaluate.InceptionFeatures(tmp_path / f"{name}.pth")
    for files, url in ((trunk, trunk), evaluate.LPIPS), ((linear, linear), evaluate.ALEXNET):
        with pytest.raises(UserError, match=url):
            Lpips(files)

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for network in evaluate.InceptionFeatures, Lpips:
        with pytest.raises(UserError, match="no route to host.*https://.*save it as " + str(tmp_path)):
            network()
