"""The metrics are their formulas: closed forms, exact ties, and networks evaluated a second, direct way."""
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
from evaluate import (InceptionFeatures, Lpips, RunningStats, frechet_distance, inception_score,
                      nearest, precision_recall)
from twosdm import UserError

# ----------------------------------------------------------------------------------------- running statistics


def test_streamed_statistics_are_numpys_even_far_from_zero():
    x = np.random.default_rng(0).standard_normal((203, 7)) + 1000
    stats = RunningStats(7)
    for start in range(0, 203, 50):
        stats.update(x[start:start + 50])
    mu, sigma = stats.result()
    assert mu.dtype == sigma.dtype == np.float64
    assert abs(mu - x.mean(0)).max() < 1e-11 and abs(sigma - np.cov(x.T)).max() < 1e-12


def test_processes_merge_to_the_statistics_of_all():
    x = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    parts = [RunningStats(4).update(part) for part in (x[:13], x[13:13], torch.from_numpy(x[13:]))]
    whole = RunningStats(4)
    for part in parts:
        whole.merge(part.n, part.mean, part.scatter)
    assert whole.n == 50 and abs(whole.result()[1] - np.cov(x.T.astype(np.float64))).max() < 1e-14


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="two images, got 1"):
        RunningStats(3).update(np.ones((1, 3))).result()


# ------------------------------------------------------------------------------------------- Fréchet distance


def rotation(dims, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dims, dims)))[0]


def commuting(*spectra):
    """Covariances with common eigenvectors: tr (S1 S2)^(1/2) = sum sqrt(s1 s2)."""
    q = rotation(len(spectra[0]))
    return [(q * s) @ q.T for s in spectra]


def test_commuting_gaussians_have_their_closed_form():
    r = np.random.default_rng(0)
    s1, s2, mu = r.uniform(0, 3, 40), r.uniform(0, 3, 40), r.standard_normal(40)
    exact = mu @ mu + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    one, two = commuting(s1, s2)
    assert abs(frechet_distance(mu, one, np.zeros(40), two) - exact) < 1e-11
    assert abs(frechet_distance(np.zeros(40), two, mu, one) - exact) < 1e-11


def test_gaussians_that_do_not_commute_have_the_nuclear_norm_of_the_product_of_their_factors():
    r = np.random.default_rng(1)
    a, b = r.standard_normal((12, 30)), r.standard_normal((12, 30))
    exact = np.square(a).sum() + np.square(b).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert abs(frechet_distance(np.zeros(12), a @ a.T, np.zeros(12), b @ b.T) - exact) < 1e-10


def test_disjoint_supports_add_their_traces():
    one, two = commuting(np.r_[np.ones(5), np.zeros(5)], np.r_[np.zeros(5), 2 * np.ones(5)])
    assert abs(frechet_distance(np.zeros(10), one, np.zeros(10), two) - 15) < 1e-6


def test_spectra_over_sixteen_decades_are_right():
    s1 = np.logspace(-8, 8, 33)
    for s2 in (s1[::-1], s1 * 4):
        one, two = commuting(s1, s2)
        exact = np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
        # Rotated, the small eigenvalues are lost in the rounding of the large: an error of sqrt(1e-16).
        assert abs(frechet_distance(np.zeros(33), one, np.zeros(33), two) / exact - 1) < 1e-6
        one, two = np.diag(s1), np.diag(s2)
        assert abs(frechet_distance(np.zeros(33), one, np.zeros(33), two) / exact - 1) < 1e-12


def test_fewer_images_than_dimensions_give_the_exact_finite_value():
    r = np.random.default_rng(2)
    x, y = r.standard_normal((20, 200)), r.standard_normal((30, 200)) + 0.1
    (mu1, s1), (mu2, s2) = [RunningStats(200).update(z).result() for z in (x, y)]
    a, b = (x - mu1) / np.sqrt(19), (y - mu2) / np.sqrt(29)
    exact = np.square(mu1 - mu2).sum() + np.square(a).sum() + np.square(b).sum()
    exact -= 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum()
    assert abs(frechet_distance(mu1, s1, mu2, s2) - exact) < 1e-5
    assert abs(frechet_distance(mu1, s1, mu2, s2) - frechet_distance(mu2, s2, mu1, s1)) < 1e-5


@pytest.mark.parametrize("n", [10, 400])
def test_a_set_is_at_distance_zero_from_itself(n):
    mu, sigma = RunningStats(100).update(np.random.default_rng(3).standard_normal((n, 100))).result()
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-5


def test_constant_sets_are_apart_by_their_means_alone():
    (mu1, s1), (mu2, s2) = [RunningStats(6).update(np.full((4, 6), value)).result() for value in (1.0, 3.0)]
    assert frechet_distance(mu1, s1, mu2, s2) == 24 and frechet_distance(mu1, s1, mu1, s1) == 0


def test_in_one_dimension_it_is_the_difference_of_means_and_of_deviations():
    assert abs(frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) - 5) < 1e-14
    assert abs(frechet_distance(1.0, 4.0, 3.0, np.array(9.0)) - 5) < 1e-14


# -------------------------------------------------------------------------------------------- Inception Score


def slow_score(logits):
    p = np.exp(logits - np.logaddexp.reduce(logits, 1)[:, None])
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())


def test_the_score_is_its_formula_on_even_splits_also_when_they_do_not_divide():
    logits = np.random.default_rng(0).standard_normal((47, 9)) * 2
    parts = [slow_score(logits[i * 47 // 10:(i + 1) * 47 // 10]) for i in range(10)]
    assert inception_score(logits) == pytest.approx((np.mean(parts), np.std(parts)), abs=1e-13)
    whole = inception_score(torch.from_numpy(logits), splits=1)
    assert whole == pytest.approx((slow_score(logits), 0), abs=1e-13)


def test_blocks_are_consecutive_and_the_short_last_one_counts_equally():
    logits = np.random.default_rng(1).standard_normal((25, 5))
    parts = [slow_score(logits[:10]), slow_score(logits[10:20]), slow_score(logits[20:])]
    assert inception_score(logits, block=10) == pytest.approx((np.mean(parts), np.std(parts)), abs=1e-13)


def test_sure_and_varied_scores_the_number_of_classes_and_underflow_is_no_nan():
    sure = np.eye(8)[np.arange(800) % 8] * 1e5
    assert inception_score(sure) == pytest.approx((8, 0), abs=1e-12)
    assert inception_score(sure.astype(np.float32) - 7e4) == pytest.approx((8, 0), abs=1e-12)
    assert inception_score(sure[:, :1] + np.eye(8)[0] * 1e5) == pytest.approx((1, 0), abs=1e-12)
    with np.errstate(divide="ignore"):
        assert inception_score(np.log(np.eye(8)[np.arange(800) % 8])) == pytest.approx((8, 0), abs=1e-12)


def test_images_that_look_alike_score_one():
    assert inception_score(np.tile(np.arange(5.0), (30, 1))) == pytest.approx((1, 0), abs=1e-12)


def test_shuffling_mends_sorted_classes_and_is_the_same_every_time():
    logits = np.eye(10)[np.arange(1000) // 100] * 50
    assert inception_score(logits)[0] < 1.01
    assert inception_score(logits, shuffle_seed=0)[0] > 9
    assert inception_score(logits, shuffle_seed=0) == inception_score(logits, shuffle_seed=0)
    whole = inception_score(logits, 1)
    assert inception_score(logits, 1, shuffle_seed=0) == pytest.approx(whole, abs=1e-12)


def test_fewer_images_than_splits_is_said():
    with pytest.raises(UserError, match="each of its 10 splits, got 9"):
        inception_score(np.zeros((9, 3)))


# --------------------------------------------------------------------------------------- precision and recall


def slow_precision_recall(real, fake, k):
    """By the definition, on exact (integer) coordinates."""
    def squared(a, b):
        return np.stack([np.square(row - b).sum(1) for row in a])

    def inside(x, centres):
        own = squared(centres, centres)
        radii = np.stack([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(own)])
        return (squared(x, centres) <= radii).any(1).mean()

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("n, m", [(150, 150), (90, 210), (1100, 40)])
def test_ties_and_duplicates_are_inside_as_defined(k, n, m):
    r = np.random.default_rng(k * n)
    real, fake = r.integers(0, 12, (n, 4)), r.integers(0, 12, (m, 4)) + r.integers(0, 6, (m, 1))
    exact = slow_precision_recall(real, fake, k)
    assert 0 < min(exact) and max(exact) < 1
    for scale, offset, dtype in ((1, 0, np.float32), (1, 1000, np.float32), (0.1, 0, np.float64)):
        ours = precision_recall(*((x * scale + offset).astype(dtype) for x in (real, fake)), k)
        assert ours == pytest.approx(exact, abs=1e-12)


def test_an_offset_of_1000_on_every_feature_changes_nothing():
    r = np.random.default_rng(4)
    # Multiples of 1/256, so that float32 holds them as exactly with the offset as without.
    real = (np.round(r.standard_normal((300, 512)) * 256) / 256).astype(np.float32)
    fake = (np.round(r.standard_normal((200, 512)) * 230) / 256).astype(np.float32)
    plain = precision_recall(real, fake)
    assert 0 < plain[0] and precision_recall(real + 1000, fake + 1000) == plain


def test_copies_are_inside_balls_of_radius_zero_and_nothing_else_is():
    x = np.random.default_rng(5).standard_normal((60, 2048)).astype(np.float32) * 3 + 7
    real, fake = np.repeat(x, 4, axis=0), x[::-1].copy()
    assert precision_recall(real, fake, 3) == (1.0, 1.0)
    fake[:, 9] += 1e-3
    assert precision_recall(real, fake, 3)[0] == 0


def test_equal_sets_score_one_constant_sets_too_and_distant_sets_zero():
    x = np.random.default_rng(6).standard_normal((50, 20))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(torch.from_numpy(x), torch.from_numpy(x) + 100) == (0.0, 0.0)
    assert precision_recall(np.full((9, 20), 0.3), np.full((7, 20), 0.3)) == (1.0, 1.0)


def test_mode_collapse_is_precise_and_recalls_little():
    r = np.random.default_rng(7)
    real = r.standard_normal((400, 8)) + 20 * r.integers(0, 2, (400, 1))
    precision, recall = precision_recall(real, real[:100] * 0.1)
    assert precision_recall(real[:100] * 0.1, real) == (recall, precision)
    fake = r.standard_normal((300, 8)) * 0.2
    precision, recall = precision_recall(real, fake)
    assert precision > 0.95 and recall < 0.2


def test_too_few_images_for_k_is_said():
    with pytest.raises(UserError, match="more than k = 3 generated images, got 3"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))
    with pytest.raises(UserError, match="more than k = 5 real images, got 5"):
        precision_recall(np.zeros((5, 2)), np.zeros((9, 2)), k=5)


# ----------------------------------------------------------------------------------------- nearest neighbours


def test_neighbours_are_those_of_the_full_matrix_however_the_gallery_is_cut():
    r = np.random.default_rng(8)
    queries, gallery = r.standard_normal((40, 3, 4, 4)), r.standard_normal((1500, 3, 4, 4))
    full = np.linalg.norm(queries.reshape(40, 1, -1) - gallery.reshape(1, 1500, -1), axis=2)
    order = np.argsort(full, 1)[:, :4]
    for chunks in (gallery, torch.from_numpy(gallery), np.array_split(gallery, 7), iter(gallery[:, None])):
        distances, indices = nearest(queries, chunks, k=4)
        assert (indices == order).all()
        assert abs(distances - np.take_along_axis(full, order, 1)).max() < 1e-12


def test_a_copy_is_at_distance_zero_and_its_own_neighbour_unless_excluded():
    x = np.random.default_rng(9).random((60, 3000)).astype(np.float32) + 50
    distances, indices = nearest(x, x)
    assert (distances == 0).all() and (indices[:, 0] == np.arange(60)).all()
    distances, indices = nearest(x, np.array_split(x, 9), k=2, exclude_self=True)
    assert (distances > 1).all() and (indices != np.arange(60)[:, None]).all()


def test_cosine_neighbours_ignore_length():
    r = np.random.default_rng(10)
    queries, gallery = r.standard_normal((5, 16)), r.standard_normal((80, 16)) * r.uniform(0.1, 9, (80, 1))
    cosine = queries @ gallery.T / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(gallery, axis=1))
    distances, indices = nearest(queries, gallery, k=3, metric="cosine")
    assert (indices == np.argsort(-cosine, 1)[:, :3]).all()
    assert abs(distances - np.sort(1 - cosine, 1)[:, :3]).max() < 1e-14


def test_more_neighbours_than_images_is_said():
    with pytest.raises(UserError, match="need 4 images to search, got 3"):
        nearest(np.ones((3, 2)), np.ones((3, 2)), k=3, exclude_self=True)


# -------------------------------------------------------------------------------------------------- Inception


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (256, 256), (512, 512), (299, 40)])
def test_the_resize_reads_coordinate_i_times_in_over_out(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float64)

    def ends(n):
        source = np.arange(299) * n / 299
        low = np.floor(source).astype(int)
        return low, np.minimum(low + 1, n - 1), source - low

    (top, bottom, v), (left, right, u) = ends(height), ends(width)
    upper = image[top][:, left] * (1 - u) + image[top][:, right] * u
    lower = image[bottom][:, left] * (1 - u) + image[bottom][:, right] * u
    exact = upper * (1 - v)[:, None] + lower * v[:, None]
    ours = evaluate.tf1_resize(torch.from_numpy(image).float()[None, None])[0, 0].double().numpy()
    assert abs(ours - exact).max() < 1e-4                                                 # of 255 grey levels


@pytest.fixture(scope="module")
def public_layout():
    """Random weights under the public file's names, with activations of about unit size."""
    torch.manual_seed(0)
    net = torchvision.models.Inception3(
        num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.1, 0.3)
    return {key: x for key, x in net.state_dict().items() if "num_batches_tracked" not in key}


@pytest.fixture(scope="module")
def weights_file(public_layout, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(public_layout, path)
    return path


@pytest.fixture(scope="module")
def inception(weights_file):
    return InceptionFeatures(weights_file)


IMAGES = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_public_layout_of_472_tensors_loads_strictly(public_layout, inception):
    assert len(public_layout) == 472 and sum(x.numel() for x in public_layout.values()) == 23_885_392
    loaded = inception.net.state_dict()
    assert all(torch.equal(loaded[key], x) for key, x in public_layout.items() if key != "fc.bias")
    assert len(inception.sha256) == 8


def test_a_wrong_file_is_refused_in_one_sentence_that_names_the_right_one(public_layout, tmp_path):
    renamed = {key.replace("Mixed_7c", "Mixed_7d"): x for key, x in public_layout.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    torch.save({**public_layout, "fc.bias": torch.zeros(1000)}, tmp_path / "shape.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    for name in ("renamed.pth", "shape.pth", "list.pth", "text.pth", "absent.pth"):
        with pytest.raises(UserError) as refusal:
            InceptionFeatures(tmp_path / name)
        sentence = str(refusal.value)
        assert name in sentence and evaluate.INCEPTION_URL in sentence and "\n" not in sentence


def test_without_a_network_the_sentence_says_how_to_get_the_file(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for make, url in ((InceptionFeatures, evaluate.INCEPTION_URL), (Lpips, evaluate.LPIPS_URL + "alex.pth")):
        with pytest.raises(UserError) as refusal:
            make()
        assert all(part in str(refusal.value) for part in (url, str(tmp_path), "no route to host"))


def test_a_cached_file_with_another_hash_is_refused(monkeypatch, tmp_path, weights_file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / evaluate.INCEPTION_URL.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights_file)
    with pytest.raises(UserError, match="sha256"):
        InceptionFeatures()


@pytest.mark.parametrize("name", "5b 5c 5d 6b 6c 6d 6e 7b 7c".split())
def test_the_pooling_branch_averages_without_padding_and_in_the_last_block_takes_the_maximum(inception, name):
    block = inception.net.get_submodule(f"Mixed_{name}")
    x = torch.randn(2, block.branch_pool.conv.in_channels, 5, 6, generator=torch.Generator().manual_seed(1))
    pooled = torch.empty_like(x)
    for i in range(5):
        for j in range(6):
            window = x[:, :, max(i - 1, 0):i + 2, max(j - 1, 0):j + 2]
            pooled[:, :, i, j] = window.amax((2, 3)) if name == "7c" else window.mean((2, 3))
    with torch.no_grad():
        direct = block.branch_pool.bn(block.branch_pool.conv(pooled)).relu()
        difference = block(x)[:, -direct.shape[1]:] - direct
    assert difference.abs().max() < 1e-5 * direct.abs().max()


def test_features_are_pool_spatial_in_channels_last_order_and_logits_without_bias(inception, public_layout):
    seen = []
    hook = inception.net.Mixed_6d.register_forward_hook(lambda _, args, out: seen.append(out))
    features = inception(IMAGES)
    hook.remove()
    assert {key: tuple(x.shape) for key, x in features.items()} == {
        "pool": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008)}
    spatial = features["spatial"].reshape(3, 17, 17, 7)
    assert all(torch.equal(spatial[..., c], seen[0][:, c]) for c in range(7))
    expected = features["pool"] @ public_layout["fc.weight"].T
    assert (features["logits"] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert features["pool"].std(0).mean() > 1e-3 * features["pool"].mean()


def test_features_depend_on_neither_batch_nor_mode_nor_autocast_and_floats_equal_their_bytes(inception):
    together = inception(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changed = inception.train()(IMAGES[1:2].float() / 127.5 - 1)
    for key, x in together.items():
        assert changed[key].dtype == torch.float32 and not changed[key].requires_grad
        assert (changed[key] - x[1:2]).abs().max() < 1e-5 * x.abs().max()


def test_tf32_is_off_inside_and_as_it_was_outside(inception, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    hook = inception.net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    inception(IMAGES[:1])
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


# ------------------------------------------------------------------------------------------------------ LPIPS


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_files(request, tmp_path_factory):
    torch.manual_seed(1)
    folder, taps = tmp_path_factory.mktemp(request.param), evaluate.LPIPS_NETS[request.param][0]
    with torch.device("meta"):
        model = torchvision.models.alexnet() if request.param == "alex" else torchvision.models.vgg16()
    features = model.features
    trunk = {f"features.{key}": torch.randn(x.shape) * (2 / max(x[0].numel(), 9)) ** 0.5
             for key, x in features.state_dict().items()}
    trunk["classifier.6.bias"] = torch.zeros(1000)            # the public file has more than is needed
    linear = {f"lin{i}.model.1.weight": torch.rand(1, features[tap - 1].out_channels, 1, 1)
              for i, tap in enumerate(taps)}
    torch.save(trunk, folder / "trunk.pth")
    torch.save(linear, folder / "linear.pth")
    return request.param, (folder / "linear.pth", folder / "trunk.pth"), linear, trunk


def direct_lpips(net, linear, trunk, a, b):
    """Layer by layer, as published, with none of the module's code."""
    shift, scale = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    x = (torch.cat([a, b]) - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
    plan = {"alex": [(0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)],
            "vgg": [(i, 1, 1, pool) for i, pool in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
                                                       (0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0))]}[net]
    compared = {"alex": (0, 3, 6, 8, 10), "vgg": (2, 7, 14, 21, 28)}[net]
    total = 0
    for i, stride, padding, pool in plan:                     # pool: a max-pool comes before the convolution
        if pool:
            x = F.max_pool2d(x, 3 if net == "alex" else 2, 2)
        x = F.conv2d(x, trunk[f"features.{i}.weight"], trunk[f"features.{i}.bias"], stride, padding).relu()
        if i in compared:
            f = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
            w = linear[f"lin{compared.index(i)}.model.1.weight"]
            total = total + (w * (f[:len(a)] - f[len(a):]).pow(2)).sum(1).mean((1, 2))
    return total


def image_pairs():
    a = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))).clamp(-1, 1)


def test_lpips_is_its_definition_and_the_squared_distance_of_its_embeddings(lpips_files):
    net, paths, linear, trunk = lpips_files
    lpips, (a, b) = Lpips(paths, net), image_pairs()
    exact = direct_lpips(net, linear, trunk, a, b)
    assert (exact > 1e-3).all()
    assert (lpips(a, b) - exact).abs().max() < 1e-6
    for i in range(2):
        distances, _ = nearest(lpips.embed(a[i:i + 1]), lpips.embed(b[i:i + 1]))
        assert abs(distances[0, 0] ** 2 - exact[i].item()) < 1e-6


def test_lpips_is_zero_on_equal_images_symmetric_and_alike_on_bytes_and_floats(lpips_files):
    net, paths, *_ = lpips_files
    lpips, (a, b) = Lpips(paths, net), image_pairs()
    assert (lpips(a, a) == 0).all() and torch.equal(lpips(a, b), lpips(b, a))
    a8, b8 = evaluate.to_uint8(a), evaluate.to_uint8(b)
    assert torch.equal(lpips(a8, b8), lpips(a8 / 127.5 - 1, b8 / 127.5 - 1))


def test_lpips_refuses_wrong_files(lpips_files, tmp_path):
    net, (linear_path, trunk_path), linear, trunk = lpips_files
    with pytest.raises(UserError, match=f"{net}.pth"):
        Lpips((trunk_path, trunk_path), net)
    with pytest.raises(UserError, match="https://download.pytorch.org/models/"):
        Lpips((linear_path, linear_path), net)
    torch.save({key: -x for key, x in linear.items()}, tmp_path / "negative.pth")
    with pytest.raises(UserError, match="negative"):
        Lpips((tmp_path / "negative.pth", trunk_path), net)
