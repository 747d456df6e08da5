"""The metrics are their formulas: closed forms, exact ties, and networks evaluated a second, direct way."""
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import evaluate
from conftest import close
from evaluate import Lpips, RunningStats, frechet_distance, inception_score, nearest, precision_recall
from twosdm import UserError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ----------------------------------------------------------------------------------------- running statistics


def test_streamed_statistics_are_numpys_even_far_from_zero():
    x = normal(203, 7) + 1000
    stats = RunningStats(7)
    for part in np.split(x, [50, 50, 120]):                   # one of them empty
        stats.update(part)
    mu, sigma = stats.result()
    assert mu.dtype == sigma.dtype == np.float64
    assert close(mu, x.mean(0), 1e-11) and close(sigma, np.cov(x.T), 1e-12)


# ------------------------------------------------------------------------------------------- Fréchet distance


UNIFORM = np.random.default_rng(0).uniform(0, 3, (2, 40))
HALVES = np.repeat([[1.0, 0], [0, 2]], 5, axis=1)             # disjoint supports
DECADES = np.logspace(-8, 8, 33)
# Rotated, the small eigenvalues are lost in the rounding of the large: an error of sqrt(1e-16).
SPECTRA = [(*UNIFORM, 1e-13), (*HALVES, 5e-8), (DECADES, DECADES[::-1], 1e-6),
           (DECADES, DECADES * 4, 1e-6)]


@pytest.mark.parametrize("s1, s2, tolerance", SPECTRA)
def test_commuting_gaussians_have_their_closed_form(s1, s2, tolerance):
    dims = len(s1)
    q, mu, zero = np.linalg.qr(normal(dims, dims))[0], normal(dims), np.zeros(dims)
    exact = mu @ mu + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    one, two = (mu, (q * s1) @ q.T), (zero, (q * s2) @ q.T)
    for pair in (*one, *two), (*two, *one):
        assert frechet_distance(*pair) == pytest.approx(exact, rel=tolerance)
    plain = frechet_distance(mu, np.diag(s1), zero, np.diag(s2))
    assert plain == pytest.approx(exact, abs=0, rel=1e-12)


@pytest.mark.parametrize("n, m, dims, tolerance", [(40, 50, 12, 1e-10), (20, 30, 200, 1e-5)])
def test_others_have_the_nuclear_norm_also_of_fewer_images_than_dimensions(n, m, dims, tolerance):
    x, y = normal(n, dims), normal(m, dims, seed=1) + 0.1
    one, two = [RunningStats(dims).update(z).result() for z in (x, y)]
    a, b = (x - x.mean(0)) / np.sqrt(n - 1), (y - y.mean(0)) / np.sqrt(m - 1)
    exact = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum()
    exact -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert frechet_distance(*one, *two) == pytest.approx(exact, abs=tolerance, rel=0)


@pytest.mark.parametrize("n", [10, 400])
def test_a_set_is_at_distance_zero_from_itself(n):
    gaussian = RunningStats(100).update(normal(n, 100)).result()
    assert 0 <= frechet_distance(*gaussian, *gaussian) < 1e-5


def test_in_one_dimension_it_is_the_difference_of_means_and_of_deviations():
    assert abs(frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) - 5) < 1e-14


# -------------------------------------------------------------------------------------------- Inception Score


def slow_scores(logits, edges):
    scores = []
    for part in np.split(logits, edges):
        p = np.exp(part - np.logaddexp.reduce(part, 1)[:, None])
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return pytest.approx((np.mean(scores), np.std(scores)), abs=1e-13)


def test_the_score_is_its_formula_on_even_splits_also_when_they_do_not_divide():
    logits = normal(47, 9) * 2
    assert inception_score(logits) == slow_scores(logits, np.arange(1, 10) * 47 // 10)
    assert inception_score(torch.from_numpy(logits), splits=1) == slow_scores(logits, [])


def test_blocks_are_consecutive_and_the_short_last_one_counts_equally():
    logits = normal(25, 5)
    assert inception_score(logits, block=10) == slow_scores(logits, [10, 20])


def test_sure_and_varied_scores_the_number_of_classes_alike_scores_one_and_underflow_is_no_nan():
    classes = np.eye(8)[np.arange(800) % 8]
    with np.errstate(divide="ignore"):
        impossible = np.log(classes)
    for logits in classes * 1e5, (classes * 1e5).astype(np.float32) - 7e4, impossible:
        assert inception_score(logits) == pytest.approx((8, 0), abs=1e-12)
    for logits in classes[:, :1] + classes[0] * 1e5, np.tile(np.arange(5.0), (30, 1)):
        assert inception_score(logits) == pytest.approx((1, 0), abs=1e-12)


def test_shuffling_mends_sorted_classes_and_is_the_same_every_time():
    logits = np.eye(10)[np.arange(1000) // 100] * 50
    shuffled = inception_score(logits, shuffle_seed=0)
    assert inception_score(logits)[0] < 1.01 and shuffled[0] > 9
    assert inception_score(logits, shuffle_seed=0) == shuffled
    whole = inception_score(logits, 1)
    assert inception_score(logits, 1, shuffle_seed=0) == pytest.approx(whole, abs=1e-12)


def test_fewer_images_than_splits_is_said():
    with pytest.raises(UserError, match="each of its 10 splits, got 9"):
        inception_score(np.zeros((9, 3)))


# --------------------------------------------------------------------------------------- precision and recall


def covered(x, centers, k):
    """By the definition, on exact (integer) coordinates."""
    own = np.square(centers[:, None] - centers).sum(2)
    radii = np.sort(own, 1)[:, k]                             # the nearest of all is the center itself
    return (np.square(x[:, None] - centers).sum(2) <= radii).any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("n, m", [(150, 150), (90, 210), (1100, 40)])
def test_ties_and_duplicates_are_inside_as_defined(k, n, m):
    r = np.random.default_rng(k * n)
    real = r.integers(0, 12, (n, 4))
    fake = r.integers(0, 12, (m, 4)) + r.integers(0, 6, (m, 1))
    exact = covered(fake, real, k), covered(real, fake, k)
    assert 0 < min(exact) and max(exact) < 1
    for scale, offset, dtype in (1, 0, np.float32), (1, 1000, np.float32), (0.1, 0, np.float64):
        ours = precision_recall(*((x * scale + offset).astype(dtype) for x in (real, fake)), k)
        assert ours == pytest.approx(exact, abs=1e-12)
    assert precision_recall(fake, real, k) == ours[::-1]


def test_copies_are_inside_balls_of_radius_zero_and_nothing_else_is():
    x = normal(60, 2048).astype(np.float32) * 3 + 7
    real, fake = np.repeat(x, 4, axis=0), x[::-1].copy()
    assert precision_recall(real, fake, 3) == (1, 1)
    fake[:, 9] += 1e-3
    assert precision_recall(real, fake, 3)[0] == 0


# ----------------------------------------------------------------------------------------- nearest neighbors


def test_neighbors_are_those_of_the_full_matrix_however_the_gallery_is_cut():
    queries, gallery = normal(40, 3, 4, 4), normal(1500, 3, 4, 4, seed=1)
    full = np.linalg.norm(queries.reshape(40, 1, -1) - gallery.reshape(1, 1500, -1), axis=2)
    order = np.argsort(full, 1)[:, :4]
    for chunks in torch.from_numpy(gallery), np.array_split(gallery, 7), iter(gallery[:, None]):
        distances, indices = nearest(queries, chunks, k=4)
        assert (indices == order).all()
        assert close(distances, np.take_along_axis(full, order, 1), 1e-12)


def test_cosine_neighbors_ignore_length():
    queries = normal(5, 16)
    gallery = normal(80, 16, seed=1) * np.random.default_rng(2).uniform(0.1, 9, (80, 1))
    lengths = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(gallery, axis=1))
    exact = 1 - queries @ gallery.T / lengths
    distances, indices = nearest(queries, gallery, k=3, metric="cosine")
    assert (indices == np.argsort(exact, 1)[:, :3]).all()
    assert close(distances, np.sort(exact, 1)[:, :3], 1e-14)


def test_a_copy_is_at_distance_zero_and_a_set_has_the_neighbors_that_it_has_in_a_copy_of_itself():
    x = np.random.default_rng(9).random((1200, 3000)).astype(np.float32) + 50             # of two blocks
    distances, indices = nearest(x, x, k=3)
    assert (distances[:, 0] == 0).all() and (indices[:, 0] == np.arange(1200)).all()
    assert (distances[:, 1:] > 1).all()
    copied, found = nearest(x, np.array_split(x, 9), k=3)
    assert (found == indices).all() and close(copied, distances, 1e-10)


ROWS, GAUSSIAN = np.ones((3, 2)), (np.zeros(2), np.eye(2))


@pytest.mark.parametrize("words, metric", [
    ("two images, got 1", lambda: RunningStats(2).update(ROWS[:1]).result()),
    ("more than k = 3 generated images, got 3", lambda: precision_recall(normal(9, 2), ROWS)),
    ("more than k = 5 real images, got 3", lambda: precision_recall(ROWS, normal(9, 2), k=5)),
    ("NaN or infinite values", lambda: frechet_distance(*GAUSSIAN, np.zeros(2), np.full((2, 2), np.nan))),
    ("not symmetric", lambda: frechet_distance(*GAUSSIAN, np.zeros(2), np.tri(2))),
    ("need 4 images to search, got 3", lambda: nearest(ROWS, ROWS, k=4)),
])
def test_too_few_images_and_what_is_no_gaussian_are_refused_in_one_sentence(words, metric):
    with pytest.raises(UserError, match=words):
        metric()


# -------------------------------------------------------------------------------------------------- Inception


@pytest.mark.parametrize("height, width", [(64, 64), (512, 512), (299, 40)])
def test_the_resize_reads_coordinate_i_times_in_over_out(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float64)

    def along(x):
        source = np.arange(299) * len(x) / 299
        return np.stack([np.interp(source, np.arange(len(x)), column) for column in x.T])

    ours = evaluate.tf1_resize(torch.from_numpy(image).float()[None, None])[0, 0]
    assert close(ours.double().numpy(), along(along(image)), 1e-4)        # of 255 gray levels


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def public_layout(reference):
    """Its weights, under the public file's names."""
    return {key: x for key, x in reference.state_dict().items() if "num_batches" not in key}


@pytest.fixture(scope="module")
def weights_file(public_layout, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(public_layout, path)
    return path


@pytest.fixture(scope="module")
def inception(weights_file):
    return evaluate.InceptionFeatures(weights_file)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()


@torch.no_grad()
def test_features_are_those_of_the_published_graph(inception, reference, public_layout, images, monkeypatch):
    """Its averages leave out the padding, its last block has a maximum, its logits no bias."""
    assert sum(x.numel() for x in public_layout.values()) == 23_885_392
    average, pools, found = F.avg_pool2d, [], {}

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
    assert len(pools) == 9
    exact = dict(
        pool=found["pool"],
        spatial=found["map"][:, :7].permute(0, 2, 3, 1).flatten(1),           # channels last in the row
        logits=logits - reference.fc.bias)
    ours = inception(images)
    assert ours.keys() == exact.keys() and len(inception.sha256) == 8
    for name, x in exact.items():
        assert x.shape == ours[name].shape and close(ours[name], x, 1e-5 * x.abs().max())
        assert x.std(0).mean() > 1e-3 * x.abs().mean()


def test_features_depend_on_neither_batch_nor_autocast_and_floats_equal_their_bytes(
        inception, images):
    together = inception(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed = inception(images[1:2].float() / 127.5 - 1)
    for key, x in together.items():
        assert changed[key].dtype == torch.float32 and not changed[key].requires_grad
        assert close(changed[key], x[1:2], 1e-5 * x.abs().max())


def test_tf32_is_off_inside_and_as_it_was_outside(inception, images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    inception(images[:1])
    hook.remove()
    assert not any(seen[:-1]) and torch.backends.cudnn.allow_tf32             # the last is after the end


def test_a_wrong_file_is_refused_in_one_sentence_that_names_the_right_one(public_layout, tmp_path):
    renamed = {key.replace("Mixed_7c", "Mixed_7d"): x for key, x in public_layout.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in "renamed.pth", "text.pth", "absent.pth":
        with pytest.raises(UserError) as refusal:
            evaluate.InceptionFeatures(tmp_path / name)
        sentence = str(refusal.value)
        assert name in sentence and evaluate.INCEPTION_URL in sentence and "\n" not in sentence


def test_without_a_network_the_sentence_says_how_to_get_the_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for make, url in (evaluate.InceptionFeatures, evaluate.INCEPTION_URL), (Lpips, "https://"):
        with pytest.raises(UserError) as refusal:
            make()
        for part in url, str(tmp_path), "no route to host":
            assert part in str(refusal.value)


def test_a_cached_file_with_another_hash_is_refused(monkeypatch, tmp_path, weights_file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / evaluate.INCEPTION_URL.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights_file)
    with pytest.raises(UserError, match="sha256"):
        evaluate.InceptionFeatures()


# ------------------------------------------------------------------------------------------------------ LPIPS


RELUS = dict(alex=(1, 4, 7, 9, 11), vgg=(3, 8, 15, 22, 29))   # that are compared, in torchvision's trunks
TRUNKS = dict(alex=torchvision.models.alexnet, vgg=torchvision.models.vgg16)


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_files(request, tmp_path_factory):
    """(which, the trunk's layers, the linear layers' weights, the files of both)."""
    torch.manual_seed(1)
    net, folder = request.param, tmp_path_factory.mktemp(request.param)
    with torch.device("meta"):
        trunk = TRUNKS[net]().features.to_empty(device="cpu")
    for x in trunk.parameters():
        torch.nn.init.normal_(x, 0, (2 / max(x[0].numel(), 9)) ** 0.5)
    more = {"classifier.6.bias": torch.zeros(1000)}           # the public file has more than is needed
    state = {f"features.{key}": x for key, x in trunk.state_dict().items()}
    weights = [torch.rand(1, len(trunk[i - 1].bias), 1, 1) for i in RELUS[net]]
    torch.save(state | more, folder / "trunk.pth")
    torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(weights)}, folder / "linear.pth")
    return net, trunk, weights, (folder / "linear.pth", folder / "trunk.pth")


@torch.no_grad()
def direct_lpips(net, trunk, weights, pair):
    """Layer by layer, as published, with none of the module's code."""
    shift, scale = torch.tensor([[-.030, -.088, -.188], [.458, .448, .450]]).view(2, 3, 1, 1)
    x, total, left = (torch.cat(pair) - shift) / scale, 0, list(weights)
    for i, layer in enumerate(trunk[:max(RELUS[net]) + 1]):
        x = layer(x)
        if i in RELUS[net]:
            f, g = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            total = total + (left.pop(0) * (f - g).pow(2)).sum(1).mean((1, 2))
    return total


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(2)
    a = torch.rand(2, 3, 48, 40) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape)).clamp(-1, 1)


def test_lpips_is_its_definition_and_the_squared_distance_of_its_embeddings(lpips_files, pair):
    net, trunk, weights, paths = lpips_files
    lpips, (a, b) = Lpips(paths, net), pair
    exact = direct_lpips(net, trunk, weights, pair)
    assert (exact > 1e-3).all() and close(lpips(a, b), exact, 1e-6)
    for i in range(2):
        distances, _ = nearest(lpips.embed(a[i:i + 1]), lpips.embed(b[i:i + 1]))
        assert abs(distances[0, 0] ** 2 - exact[i].item()) < 1e-6


def test_lpips_is_zero_on_equal_images_symmetric_and_alike_on_bytes_and_floats(lpips_files, pair):
    lpips, (a, b) = Lpips(lpips_files[-1], lpips_files[0]), pair
    assert (lpips(a, a) == 0).all() and torch.equal(lpips(a, b), lpips(b, a))
    a, b = evaluate.to_uint8(a), evaluate.to_uint8(b)
    assert torch.equal(lpips(a, b), lpips(a / 127.5 - 1, b / 127.5 - 1))


def test_lpips_refuses_wrong_files(lpips_files, tmp_path):
    net, _, weights, (linear, trunk) = lpips_files
    negative = {f"lin{i}.model.1.weight": -w for i, w in enumerate(weights)}
    torch.save(negative, tmp_path / "negative.pth")
    for path in trunk, tmp_path / "negative.pth":
        with pytest.raises(UserError, match=f"{path.name}.*{net}.pth"):
            Lpips((path, trunk), net)
    with pytest.raises(UserError, match="https://download.pytorch.org/models/"):
        Lpips((linear, linear), net)
