"""A course on this code: 26 theorems that lead from a lecture's systems to EDM and back, and 11 exercises.

Theorems 1 to 10 lead from DDPM, DDIM, score matching and guidance to EDM and to two stages. Theorems 11 to 18
are about samplers and noise levels, 19 to 23 about systems of several networks, 24 to 26 about what else a
denoiser can do. Each exercise is here with its solution.

Nearly all runs on exact denoisers: where the data are a few points or Gaussians, the minimizer of Eq. 1 is
known in closed form, and what a test sees is the method alone. Only a classifier, a tiny CLIP and a few tiny
denoisers are trained, for seconds.

Notation: D(x; σ) denoises x = x₀ + σε. DDPM's state is x_t = √ᾱ x₀ + √(1 − ᾱ) ε, so x = x_t / √ᾱ.
"""
import functools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import (Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal,
                                 kl_divergence)

from evaluate import frechet_distance, nearest, precision_recall
from twosdm import (COLORS, EMBEDDERS, PCA, SHAPES, Denoiser, Embedder, KMeans, PriorTransformer, SampleNoise,
                    Sampler, UNetBlock, heun_sample, pack_embedder, sample_embeddings, sample_two_stage,
                    shapes_attributes, shapes_images, sigma_schedule, to_float, unpack_embedder)


def per_row(numbers, x):
    """(B,) -> (B, 1, ..., 1): one number for each row of x (B, ...)."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


def error(a, b):
    """The largest difference, relative to the largest number."""
    largest = (a - b).abs().max()
    return (largest / b.abs().max()).item()


def ideal(points, width=0.0):
    """The exact D(x; σ) of data that are one of the points, all as likely, and noise of deviation `width`.

    D is the mean of the points, weighted by p(point | x) (Karras et al. 2022, Appendix B.3), and of the rest
    x − mean the part that is no noise.
    """
    rows = points.double().flatten(1)

    def denoise(x, sigma):
        variance = sigma.double() ** 2 + width**2
        products = x.double().flatten(1) @ rows.T
        scores = products - rows.square().sum(1) / 2
        weights = (scores / variance[:, None]).softmax(1)
        mean = (weights @ rows).reshape(x.shape)
        return mean + per_row(width**2 / variance, x) * (x - mean)

    return denoise


class Exact(nn.Module):
    """The network of which Denoiser makes the given D(x, sigma) or D(x, sigma, cond)."""

    def __init__(self, denoise, predict="edm", dim=None, channels=None, resolution=None):
        super().__init__()
        self.denoise = denoise
        self.predict = predict
        self.dim = dim
        self.channels = channels
        self.resolution = resolution
        self.unused = nn.Parameter(torch.zeros(()))   # a sampler asks the parameters for their device

    def forward(self, x, c_noise, cond=None, augment=None):
        sigma = (4 * c_noise).exp()
        scalings = Denoiser(None, predict=self.predict).scalings(sigma)
        c_skip, c_out, c_in, _ = (per_row(c, x) for c in scalings)
        x = x / c_in
        if cond is None:
            denoised = self.denoise(x, sigma)
        else:
            denoised = self.denoise(x, sigma, cond)
        return (denoised - c_skip * x) / c_out


class Recorder(nn.Module):
    """Some function for a network, which remembers its last call."""

    def forward(self, x, c_noise, cond=None, augment=None):
        self.x = x
        self.c_noise = c_noise
        self.output = (3 * x + c_noise[:, None]).sin()
        return self.output


def ddpm_alpha_bar():
    """ᾱ_0 = 1, ..., ᾱ_1000: Ho et al. 2020, Section 4, with β from 1e-4 to 0.02."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    return torch.cat([torch.ones(1), alpha_bar])


def edm_sigma(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt()


# Theorem 1: Tweedie

def test_tweedie_the_score_is_the_denoiser_minus_the_input_over_sigma_squared():
    """∇ log p(x; σ) = (D(x; σ) − x) / σ² (Efron 2011, Section 1; Karras et al. 2022, Eq. 3)."""
    torch.manual_seed(0)
    modes = torch.randn(3, 2, dtype=torch.float64)
    for sigma in torch.tensor([0.1, 0.7, 5.0], dtype=torch.float64):
        x = modes.repeat(100, 1) + sigma * torch.randn(300, 2)
        x.requires_grad_()
        noisy_modes = Independent(Normal(modes, (0.3**2 + sigma**2).sqrt()), 1)
        density = MixtureSameFamily(Categorical(torch.ones(3)), noisy_modes)
        log_density = density.log_prob(x).sum()
        score, = torch.autograd.grad(log_density, x)
        denoised = ideal(modes, 0.3)(x, sigma.expand(300))
        assert error((denoised - x) / sigma**2, score) < 1e-10


# Theorem 2: denoising score matching

def test_denoising_score_matching_finds_the_exact_linear_denoiser_of_gaussian_data():
    """argmin_W E|W(x + σε) − x|² = Σ (Σ + σ²I)⁻¹, up to 1/√n (Vincent 2011, Section 4.2; our Eq. 1)."""
    torch.manual_seed(0)
    root = torch.randn(3, 3)
    covariance = root @ root.T
    noisy_covariance = covariance + 0.5**2 * torch.eye(3)
    exact = covariance @ torch.linalg.inv(noisy_covariance)
    errors = []
    for n in (2_000, 200_000):
        x = torch.randn(n, 3) @ root.T
        noisy = x + 0.5 * torch.randn(n, 3)
        found = torch.linalg.lstsq(noisy, x).solution.T
        errors.append(error(found, exact))
    assert errors[1] < 0.01 and errors[1] < errors[0] / 4


def test_the_loss_of_denoiser_is_least_for_the_exact_denoiser():
    """Of all D = vx/(v + σ²) that of the data's variance has the least loss (Karras et al. 2022, Eq. 8)."""
    def loss(variance):
        def denoise(x, sigma):
            return x * variance / (variance + sigma[:, None] ** 2)

        torch.manual_seed(0)
        x = 0.7 * torch.randn(100_000, 1)
        return Denoiser(Exact(denoise)).loss(x).double().mean()

    less, exact, more = loss(0.44), loss(0.49), loss(0.54)
    vertex = 0.025 * (less - more) / (less - 2 * exact + more)
    assert abs(vertex) < 0.01


# Theorem 3: ε, x₀ and v

def edm_of_unit_data():
    """One loss at σ_data = 1: the network, which saw x_t = αx₀ + sε with α² + s² = 1; x₀, α, s; the loss."""
    torch.manual_seed(0)
    net = Recorder()
    x_0 = torch.randn(1000, 5)
    loss = Denoiser(net, sigma_data=1.0).loss(x_0)
    sigma = (4 * net.c_noise).exp()[:, None]
    alpha = (1 + sigma**2).rsqrt()
    return net, x_0, alpha, sigma * alpha, loss


def test_epsilon_x0_and_v_are_one_denoiser_and_edm_of_unit_data_predicts_v():
    """D = x̂₀ = (x_t − sε̂)/α = αx_t − sv̂, where v̂ = −F (Ho et al. 2020, Eq. 15; Salimans and Ho 2022)."""
    net, _, alpha, s, _ = edm_of_unit_data()
    x_t = net.x
    v_hat = -net.output
    epsilon_hat = alpha * v_hat + s * x_t
    denoiser = Denoiser(net, sigma_data=1.0)
    denoised = denoiser(x_t / alpha, (s / alpha)[:, 0])
    assert error(denoised, alpha * x_t - s * v_hat) < 1e-5
    assert error(denoised, (x_t - s * epsilon_hat) / alpha) < 1e-5


def test_the_losses_of_epsilon_x0_and_v_differ_by_weights():
    """EDM's loss at σ_data = 1 is |v̂ − v|² = (1 + σ²) |ε̂ − ε|² = (1 + 1/σ²) |x̂₀ − x₀|².

    The loss of ε is Eq. 14 of Ho et al. 2020; that of v is in Salimans and Ho 2022, Section 4.
    """
    net, x_0, alpha, s, loss = edm_of_unit_data()
    x_t = net.x
    v_hat = -net.output
    epsilon = (x_t - alpha * x_0) / s
    v_error = v_hat - (alpha * epsilon - s * x_0)
    epsilon_error = alpha * v_hat + s * x_t - epsilon
    x_error = alpha * x_t - s * v_hat - x_0
    for weighted in (v_error, epsilon_error / alpha, x_error / s):
        assert error(weighted.square().sum(1), loss) < 1e-4


# Theorem 4: DDPM's forward process and its bound

def test_the_forward_process_of_ddpm_is_that_of_edm():
    """x_t / √ᾱ = x₀ + σε with σ² = (1 − ᾱ)/ᾱ (Ho et al. 2020, Eq. 2 and 4), and c_in = √ᾱ if σ_data = 1."""
    scale = 1.0
    variance = 0.0
    levels = []
    for beta in torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64):
        scale = scale * (1 - beta).sqrt()
        variance = variance * (1 - beta) + beta
        levels.append(variance.sqrt() / scale)
    levels = torch.stack(levels)
    alpha_bar = ddpm_alpha_bar()[1:]
    c_in = Denoiser(None, sigma_data=1.0).scalings(levels)[2]
    assert error(levels, edm_sigma(alpha_bar)) < 1e-10
    assert error(c_in, alpha_bar.sqrt()) < 1e-10
    assert abs(levels[-1] - 157.4) < 0.1


def ancestral(x_t, x_0, now, before):
    """Mean and deviation of q(x_{t−1} | x_t, x₀); now is ᾱ_t, before ᾱ_{t−1} (Ho et al. 2020, Eq. 7)."""
    alpha = now / before
    of_x_0 = before.sqrt() * (1 - alpha)
    of_x_t = alpha.sqrt() * (1 - before)
    mean = of_x_0 * x_0 + of_x_t * x_t
    variance = (1 - before) / (1 - now) * (1 - alpha)
    return mean / (1 - now), variance.sqrt()


def test_the_bound_of_ddpm_weighs_the_error_by_the_fall_of_the_signal_to_noise_ratio():
    """KL(q(x_{t−1} | x_t, x₀) | q(x_{t−1} | x_t, D)) = ½ (1/σ_{t−1}² − 1/σ_t²) |D − x₀|².

    Ho et al. 2020, Eq. 5 to 8; Kingma et al. 2021, VDM, Section 4.
    """
    now = ddpm_alpha_bar()[2:]
    before = ddpm_alpha_bar()[1:-1]
    x_t = 0.3
    x_0 = 0.8
    denoised = -0.4
    truth = Normal(*ancestral(x_t, x_0, now, before))
    model = Normal(*ancestral(x_t, denoised, now, before))
    weight = (edm_sigma(before) ** -2 - edm_sigma(now) ** -2) / 2
    squared_error = kl_divergence(truth, model) / weight
    assert (squared_error - (denoised - x_0) ** 2).abs().max() < 1e-8


# Theorem 5: DDIM

def ddim_step(denoise, x_t, now, after):
    """From ᾱ = now to ᾱ = after: Song et al. 2021, DDIM, Eq. 12 without noise."""
    sigma = edm_sigma(now)
    x = x_t / now.sqrt()
    epsilon = (x - denoise(x, sigma.expand(len(x)))) / sigma
    x_0 = (x_t - (1 - now).sqrt() * epsilon) / now.sqrt()
    return after.sqrt() * x_0 + (1 - after).sqrt() * epsilon


def euler(denoise):
    """For heun_sample: answers the second call of each step so that the first slope stays, for free."""
    slopes = []

    def once_per_step(x, sigma):
        if slopes:
            return x - per_row(sigma, x) * slopes.pop()
        denoised = denoise(x, sigma)
        slopes.append((x - denoised) / per_row(sigma, x))
        return denoised

    return once_per_step


def test_ddim_is_the_method_of_euler_on_the_ode_of_edm():
    """x_{t−1}/√ᾱ_{t−1} = x_t/√ᾱ_t + (σ_{t−1} − σ_t) ε̂ (Song et al. 2021, DDIM, Eq. 13 and 14)."""
    torch.manual_seed(0)
    alpha_bar = ddpm_alpha_bar()[::20].flip(0)
    denoise = ideal(torch.randn(10, 2), 0.1)
    noise = torch.randn(50, 2).double()
    x_t = noise * (1 - alpha_bar[0]).sqrt()
    for now, after in zip(alpha_bar[:-1], alpha_bar[1:]):
        x_t = ddim_step(denoise, x_t, now, after)
    euler_steps = heun_sample(euler(denoise), noise, edm_sigma(alpha_bar))
    assert error(euler_steps, x_t) < 1e-10


def ode_error(method, levels):
    """Of one sample of N(0, 0.5²), where the ODE is solved by x ∝ √(σ² + 0.5²)."""
    sigmas = sigma_schedule(levels)[:-1]
    denoise = method(ideal(torch.zeros(1, 1), 0.5))
    x = heun_sample(denoise, torch.ones(1, 1).double(), sigmas)
    exact = 80 * math.hypot(0.002, 0.5) / math.hypot(80, 0.5)
    return abs(x.item() - exact)


def test_twice_the_steps_halve_the_error_of_euler_and_quarter_that_of_heun():
    """Orders 1 and 2 (Karras et al. 2022, Section 3): Heun is better with half of the evaluations."""
    def heun(denoise):
        return denoise

    assert 1.8 < ode_error(euler, 81) / ode_error(euler, 161) < 2.2
    assert 3.6 < ode_error(heun, 41) / ode_error(heun, 81) < 4.4
    assert ode_error(heun, 41) < 0.6 * ode_error(euler, 161)


# Theorem 6: DDPM's ancestral step and churn

def distance_of_laws(samples, modes, width):
    """Kolmogorov's distance of samples (N, 1) to an even mixture of Gaussians: about 1/√N if it is theirs."""
    samples = samples[:, 0].sort().values
    of_each = Normal(modes, width).cdf(samples[:, None])
    empirical = (torch.arange(len(samples)) + 0.5) / len(samples)
    return (of_each.mean(1) - empirical).abs().max().item()


def test_ancestral_steps_keep_the_marginals():
    """x_t ~ √ᾱ x₀ + √(1 − ᾱ) ε at every t (Ho et al. 2020, Eq. 4, 7 and Algorithm 2)."""
    torch.manual_seed(0)
    alpha_bar = ddpm_alpha_bar()[::2]
    modes = torch.tensor([-1.0, 1.0])
    denoise = ideal(modes[:, None], 0.3)
    x_t = torch.randn(10_000, 1).double()
    for t in range(500, 0, -1):
        now = alpha_bar[t]
        before = alpha_bar[t - 1]
        sigma = edm_sigma(now).expand(10_000)
        x_0 = denoise(x_t / now.sqrt(), sigma)
        mean, deviation = ancestral(x_t, x_0, now, before)
        x_t = mean + deviation * torch.randn_like(x_t)
        if t in (201, 101, 51, 1):
            width = (0.3**2 * before + 1 - before).sqrt()
            assert distance_of_laws(x_t, modes * before.sqrt(), width) < 0.02


def test_churn_keeps_the_law():
    """Noise goes in and is removed (Karras et al. 2022, Algorithm 2): other samples, the same law."""
    torch.manual_seed(0)
    modes = torch.tensor([-1.0, 1.0])
    noise = torch.randn(10_000, 1)
    denoise = ideal(modes[:, None], 0.3)
    without = heun_sample(denoise, noise, sigma_schedule(80))
    churned = heun_sample(denoise, noise, sigma_schedule(80), s_churn=80.0)
    assert distance_of_laws(without, modes, 0.3) < 0.02
    assert distance_of_laws(churned, modes, 0.3) < 0.02
    assert 0.45 < share(churned.sign(), without.sign()) < 0.55


def test_an_ancestral_step_is_an_euler_step_too_far_and_then_noise():
    """Down to σ_{t−1}²/σ_t, up to σ_{t−1}: churn's halves, the other way around (Ho et al. 2020, Eq. 7)."""
    torch.manual_seed(0)
    now = ddpm_alpha_bar()[401]
    before = ddpm_alpha_bar()[400]
    sigma = edm_sigma(now)
    sigma_next = edm_sigma(before)
    x, denoised = torch.randn(2, 100).double()
    too_far = sigma_next**2 / sigma
    euler_step = x + (too_far - sigma) * (x - denoised) / sigma
    mean, deviation = ancestral(now.sqrt() * x, denoised, now, before)
    assert error(mean / before.sqrt(), euler_step) < 1e-10
    assert error(deviation**2 / before, sigma_next**2 - too_far**2) < 1e-10


# Theorem 7: guidance

def gaussian(x, sigma, y):
    """D_y for y ~ N(0, 1) and x | y ~ N(y, 0.3²); where y is zero, the D that is told nothing."""
    noise = per_row(sigma, x) ** 2
    y = per_row(y, x)
    free = 1.09 / (1.09 + noise) * x
    told = (0.09 * x + noise * y) / (0.09 + noise)
    return torch.where(y == 0, free, told)


def classifier_guided(x, sigma, y, scale):
    """D_y + scale · σ² ∇ log p(y | x; σ), by automatic differentiation."""
    noise = per_row(sigma, x) ** 2
    y_row = per_row(y, x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        shrink = 1 / (1.09 + noise)
        posterior = Normal(shrink * x, (1 - shrink).sqrt())
        log_posterior = posterior.log_prob(y_row).sum()
        gradient, = torch.autograd.grad(log_posterior, x)
    return gaussian(x.detach(), sigma, y) + scale * noise * gradient


def test_classifier_guidance_is_classifier_free_guidance_of_one_more():
    """D_y + wσ² ∇ log p(y | x; σ) = D + (1 + w)(D_y − D), so that w = 2 is W = 3 here.

    Dhariwal and Nichol 2021, Section 4.2; Ho and Salimans 2022, Eq. 6.
    """
    torch.manual_seed(0)
    x, y = torch.randn(2, 1000, 1, dtype=torch.float64)
    sigma = torch.logspace(-2, 2, 1000, dtype=torch.float64)
    free = gaussian(x, sigma, torch.zeros_like(y))
    told = gaussian(x, sigma, y)
    by_gradient = classifier_guided(x, sigma, y, 2.0)
    assert error(free + 3 * (told - free), by_gradient) < 1e-10


def test_guidance_of_the_two_stage_sampler_is_that_of_a_classifier():
    """W = 3 draws what a classifier's gradient draws from the same noise: the equation above."""
    calls = []

    def recorded(x, sigma, y):
        calls.append((x, y))
        return gaussian(x, sigma, y)

    guided = Sampler(steps=20, s_churn=0.0, guidance=3.0)
    unit_gaussian = ideal(torch.zeros(1, 1), 1.0)
    prior = Denoiser(Exact(unit_gaussian, dim=1))
    image_model = Denoiser(Exact(recorded, channels=1, resolution=1))
    samples = sample_two_stage(prior, image_model, range(100), image_sampler=guided)
    start, y = [call for call in calls if call[1].any()][0]          # the first that is told y
    by_gradient = functools.partial(classifier_guided, y=y, scale=2.0)
    expected = heun_sample(by_gradient, start / 80, sigma_schedule(20))
    assert error(samples, expected) < 1e-4


# Theorem 8: the ODE is invertible

def test_the_ode_leads_from_an_image_to_its_noise_and_back():
    """On rising σ heun_sample goes back (Song et al. 2021, Score SDE, Eq. 13; Karras et al. 2022, Eq. 1)."""
    torch.manual_seed(0)
    images = IMAGES[:100].double()
    denoise = ideal(images, 0.1)
    x = images + 0.1 * torch.randn_like(images)
    errors = []
    for steps in (50, 100):
        sigmas = sigma_schedule(steps)[:-1]
        noise = heun_sample(denoise, x / 0.002, sigmas.flip(0)) / 80
        back = heun_sample(denoise, noise, sigmas)
        errors.append(rms(back - x))
    assert errors[1] < 3e-4 and errors[1] < errors[0] / 3
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


# Theorem 9: latent diffusion

def shifted(net, shift):
    """The network, told c_noise less a shift: of all it is told, this alone does not scale."""
    def forward(x, c_noise, cond=None, augment=None):
        return net(x, c_noise - shift)

    return forward


def test_scaling_latents_by_component_gives_each_its_own_sigma_data():
    """The loss of 0.5 z/s at σ is that of z at 2sσ with σ_data = s (Rombach et al. 2022, Appendix G)."""
    torch.manual_seed(0)
    net = Recorder()
    s = torch.tensor([0.2, 1.0, 4.0, 9.0])
    z = s * torch.randn(1000, 4)
    loss = Denoiser(net, sigma_data=0.5).loss(0.5 * z / s)
    sigma = (4 * net.c_noise).exp()[:, None]
    noisy = 2 * s * net.x * (sigma**2 + 0.5**2).sqrt()
    losses = []
    for j in range(4):
        denoiser = Denoiser(shifted(net, (2 * s[j]).log() / 4), sigma_data=s[j])
        sigma_j = 2 * s[j] * sigma[:, 0]
        denoised = denoiser(noisy[:, j:j + 1], sigma_j)
        _, c_out, _, _ = denoiser.scalings(sigma_j)
        losses.append(((denoised[:, 0] - z[:, j]) / c_out) ** 2)
    assert error(sum(losses), loss) < 1e-4


# Theorem 10: two stages

def energy_distance(a, b):
    """2 E|a − b| − E|a − a'| − E|b − b'|, zero only for equal laws (Székely and Rizzo 2013)."""
    def apart(a, b):
        return torch.cdist(a.double(), b.double()).mean().item()

    return 2 * apart(a, b) - apart(a, a) - apart(b, b)


SIGNS = torch.tensor([-1.0] * 3 + [1.0] * 7)
MODE = torch.tensor([1.0, 0.5])


def two_modes(n):
    """x (n, 2), three tenths about (−1, −½), the rest about (1, ½), and y = e(x), the sign of x₁ (n, 1)."""
    sign = SIGNS[torch.randint(10, (n, 1))]
    x = sign * MODE + 0.2 * torch.randn(n, 2)
    return x, x[:, :1].sign()


def ideal_two_stages():
    """The exact prior and the exact image model of the two modes."""
    def image(x, sigma, y):
        mean = (y * MODE).reshape(x.shape)
        kept = 0.2**2 / (0.2**2 + sigma**2)
        return mean + per_row(kept, x) * (x - mean)

    prior = Exact(ideal(SIGNS[:, None]), "data", dim=1)
    image_model = Exact(image, channels=2, resolution=1)
    return Denoiser(prior, predict="data"), Denoiser(image_model)


def chance(data):
    """The largest of ten energy distances of other data to these."""
    distances = []
    for _ in range(10):
        other, _ = two_modes(len(data))
        distances.append(energy_distance(other, data))
    return max(distances)


def test_with_an_embedding_that_the_image_determines_two_stages_have_the_law_of_the_data():
    """p(x) = ∫ p(x | y) p(y) dy with p(y | x) = δ(y − e(x)) (Harvey and Wood 2023, Eq. 2 and 3)."""
    torch.manual_seed(0)
    data, _ = two_modes(1000)
    prior, image_model = ideal_two_stages()
    samples = sample_two_stage(prior, image_model, range(1000)).flatten(1)
    root = torch.linalg.cholesky(data.T.cov())
    same_moments = data.mean(0) + torch.randn(1000, 2) @ root.T
    assert distance_of_laws(samples[:, :1], SIGNS, 0.2) < 0.04
    assert energy_distance(samples, data) < chance(data)
    assert energy_distance(same_moments, data) > 5 * chance(data)


def test_the_oracle_and_an_ideal_prior_have_the_same_law():
    """The oracle is told embeddings of the data, 2SDM those of its prior (Harvey and Wood 2023)."""
    torch.manual_seed(0)
    data, y = two_modes(1000)
    prior, image_model = ideal_two_stages()
    samples = sample_two_stage(prior, image_model, range(1000))
    told = functools.partial(image_model, cond=y)
    oracle = heun_sample(told, torch.randn_like(samples), sigma_schedule(18))
    assert energy_distance(samples.flatten(1), oracle.flatten(1)) < chance(data)


# Theorem 11: DDIM with noise

def ddim_with_noise(denoise, x_t, now, before, eta):
    """Mean and deviation of the step to ᾱ_{t−1} = before (Song et al. 2021, DDIM, Eq. 12 and 16)."""
    sigma = edm_sigma(now)
    x = x_t / now.sqrt()
    x_0 = denoise(x, sigma.expand(len(x)))
    epsilon = (x - x_0) / sigma
    variance = (1 - before) / (1 - now) * (1 - now / before)
    deviation = eta * variance.sqrt()
    mean = before.sqrt() * x_0 + (1 - before - deviation**2).sqrt() * epsilon
    return mean, deviation


def test_ddim_of_eta_1_is_the_ancestral_step_of_ddpm_and_of_eta_0_that_of_euler():
    """One network, one family of samplers: η says how much noise is drawn anew (Song et al. 2021, Eq. 16)."""
    torch.manual_seed(0)
    now = ddpm_alpha_bar()[401]
    before = ddpm_alpha_bar()[380]
    denoise = ideal(torch.randn(10, 2), 0.1)
    x_t = torch.randn(50, 2).double()
    x_0 = denoise(x_t / now.sqrt(), edm_sigma(now).expand(50))
    mean, deviation = ancestral(x_t, x_0, now, before)
    mean_1, deviation_1 = ddim_with_noise(denoise, x_t, now, before, eta=1)
    mean_0, deviation_0 = ddim_with_noise(denoise, x_t, now, before, eta=0)
    euler_step = ddim_step(denoise, x_t, now, before)
    assert error(mean_1, mean) < 1e-10 and error(deviation_1, deviation) < 1e-10
    assert error(mean_0, euler_step) < 1e-10 and deviation_0 == 0
    assert error(mean, euler_step) > 0.01


def test_ddim_keeps_the_marginals_for_every_eta():
    """x_t ~ √ᾱ x₀ + √(1 − ᾱ) ε for every η, were D(x; σ) x₀ itself (Song et al. 2021, DDIM, Lemma 1).

    D is the mean of x₀ instead; with 200 steps the law of the samples is right up to chance.
    """
    torch.manual_seed(0)
    alpha_bar = ddpm_alpha_bar()[::5]
    modes = torch.tensor([-1.0, 1.0])
    denoise = ideal(modes[:, None], 0.3)
    for eta in (0.0, 0.5, 1.0):
        x_t = torch.randn(4000, 1).double()
        for t in range(200, 0, -1):
            mean, deviation = ddim_with_noise(denoise, x_t, alpha_bar[t], alpha_bar[t - 1], eta)
            x_t = mean + deviation * torch.randn_like(x_t)
        assert distance_of_laws(x_t, modes, 0.3) < 0.03


# Theorem 12: DDPM's two variances

def exact_variance(of_data, now, before):
    """Var(x_{t−1} | x_t) where x₀ ~ N(0, of_data): Gaussian conditioning on x_t = √α x_{t−1} + √β ε."""
    alpha = now / before
    variance = before * of_data + 1 - before
    variance_now = now * of_data + 1 - now
    return variance - alpha * variance**2 / variance_now


def test_the_two_variances_of_ddpm_are_exact_for_unit_noise_and_for_a_single_point():
    """β is exact for x₀ ~ N(0, 1), β̃ for one known x₀; other data are between (Ho et al. 2020, Section 3.2).

    `ancestral` has β̃, as if D(x; σ) were x₀ itself. The two differ in the last few steps alone.
    """
    now = ddpm_alpha_bar()[2:]
    before = ddpm_alpha_bar()[1:-1]
    beta = 1 - now / before
    beta_tilde = (1 - before) / (1 - now) * beta
    between = exact_variance(0.1, now, before)
    assert error(exact_variance(1.0, now, before), beta) < 1e-10
    assert error(exact_variance(0.0, now, before), beta_tilde) < 1e-10
    assert (beta_tilde < between).all() and (between < beta).all()
    assert beta_tilde[0] < 0.6 * beta[0] and beta_tilde[100] > 0.98 * beta[100]


# Theorem 13: annealed Langevin dynamics

def langevin(denoise, x, sigma, step, steps):
    """x ← x + ½ step · score + √step ε, whose law becomes p(x; σ) (Song and Ermon 2019, Eq. 4)."""
    for _ in range(steps):
        score = (denoise(x, sigma.expand(len(x))) - x) / sigma**2
        x = x + step / 2 * score + step**0.5 * torch.randn_like(x)
    return x


def test_langevin_dynamics_finds_how_likely_each_mode_is_only_when_annealed():
    """One mode is four times as likely; at a low σ nothing crosses over (Song and Ermon 2019, Section 3.2.2).

    With σ falling from 20, step ∝ σ², the modes share the samples while they still overlap (Algorithm 1).
    """
    torch.manual_seed(0)
    modes = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0])
    denoise = ideal(modes[:, None], 0.1)
    start = torch.randn(4000, 1).double()
    low = torch.tensor(0.02).double()
    stuck = langevin(denoise, start, low, step=0.003, steps=450)
    x = 20 * start
    for sigma in torch.logspace(math.log10(20), math.log10(0.02), 30).double():
        x = langevin(denoise, x, sigma, step=0.3 * sigma**2, steps=15)
    assert distance_of_laws(x, modes, 0.1) < 0.05
    assert share(x > 0, True) == pytest.approx(0.8, abs=0.03)
    assert share(stuck > 0, True) == pytest.approx(0.5, abs=0.03)


# Theorem 14: flow matching

def velocity(denoise, z, t):
    """The flow's u = E[ε − x₀ | z] at z = (1 − t)x₀ + tε (Liu et al. 2023, Rectified Flow, Eq. 1)."""
    sigma = t / (1 - t)
    x_0 = denoise(z / (1 - t), sigma.expand(len(z)))
    return (z - x_0) / t


def test_flow_matching_is_edm_at_sigma_t_over_1_minus_t():
    """z/(1 − t) = x₀ + σε with σ = t/(1 − t), and an Euler step of the one is one of the other.

    Lipman et al. 2023, Eq. 20 to 23, let t go from noise to data; here t is 0 at the data.
    """
    torch.manual_seed(0)
    denoise = ideal(torch.randn(10, 2), 0.1)
    noise = torch.randn(50, 2).double()
    times = torch.linspace(0.98, 0.02, 25).double()
    z = times[0] * noise
    for t, after in zip(times, times[1:]):
        z = z + (after - t) * velocity(denoise, z, t)
    edm = heun_sample(euler(denoise), noise, times / (1 - times))
    assert error(z / (1 - times[-1]), edm) < 1e-9


def test_the_loss_of_flow_matching_is_that_of_edm_with_another_weight():
    """|û − u|² = |D − x₀|²/t² (Lipman et al. 2023, Eq. 23)."""
    torch.manual_seed(0)
    denoise = ideal(torch.randn(10, 2), 0.1)
    x_0, epsilon = torch.randn(2, 50, 2).double()
    for t in torch.tensor([0.1, 0.5, 0.9]).double():
        z = (1 - t) * x_0 + t * epsilon
        flow_error = velocity(denoise, z, t) - (epsilon - x_0)
        sigma = t / (1 - t)
        edm_error = denoise(x_0 + sigma * epsilon, sigma.expand(50)) - x_0
        assert error(flow_error.square(), (edm_error / t).square()) < 1e-9


# Theorem 15: zero-terminal SNR

def brightness(sigma):
    """The spread of the brightness of gray images that are drawn from pure noise at σ; of the data it is 1.

    An image is 768 equal numbers, drawn from N(0, 1): D keeps of the mean of x what is no noise.
    """
    def denoise(x, sigma):
        kept = 768 / (768 + per_row(sigma, x) ** 2)
        return kept * x.mean(1, keepdim=True).expand_as(x)

    noise = torch.randn(200, 768)
    samples = heun_sample(denoise, noise, sigma_schedule(100, 0.002, sigma))
    chance = 768**0.5 * noise.mean(1).std()           # about 1
    return (samples.mean(1).std() / chance).item()


def test_pure_noise_where_training_left_some_of_the_image_loses_the_bright_and_the_dark():
    """Samples from N(0, σ²I) have a brightness of spread σ/√(σ² + 768) instead of 1.

    Stable Diffusion ends at σ = 14.6, where the mean of 768 numbers still shows how bright the image is; it
    is trained to believe that mean, and starts from noise (Lin et al. 2024, Section 3.1). DDPM ends at 157.
    """
    torch.manual_seed(0)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2      # Stable Diffusion's
    stable_diffusion = edm_sigma((1 - beta).prod()).item()
    ddpm = edm_sigma(ddpm_alpha_bar()[-1]).item()
    assert stable_diffusion == pytest.approx(14.6, abs=0.1)
    for sigma in (stable_diffusion, ddpm, 1e4):
        assert brightness(sigma) == pytest.approx(sigma / math.hypot(sigma, 768**0.5), abs=0.01)
    assert brightness(stable_diffusion) == pytest.approx(0.47, abs=0.01)
    assert brightness(1e4) == pytest.approx(1, abs=0.01)


# Theorem 16: progressive distillation

def student_of(teacher, levels):
    """The D whose Euler step from a level to the next but one goes where two steps of the teacher's go.

    It is (x_end − (σ_end/σ) x) / (1 − σ_end/σ) (Salimans and Ho 2022, Algorithm 2, with α = 1).
    """
    def denoise(x, sigma):
        i = levels.index(sigma[0].item())
        two_steps = levels[i:i + 3]
        x_end = heun_sample(euler(teacher), x / levels[i], two_steps)
        rest = levels[i + 2] / levels[i]
        return (x_end - rest * x) / (1 - rest)

    return denoise


def test_a_distilled_student_takes_two_steps_of_its_teacher_in_one_again_and_again():
    """16, 8, 4, 2, 1 steps make the same samples; the exact D in one step makes but the mean of the data.

    What a student has to learn is no mean any more: at σ = 80 its D says which sample the noise becomes.
    """
    torch.manual_seed(0)
    teacher = ideal(torch.randn(10, 2), 0.1)
    noise = torch.randn(50, 2)
    levels = sigma_schedule(16).tolist()
    slow = heun_sample(euler(teacher), noise, levels)
    student = teacher
    while len(levels) > 2:
        student = student_of(student, levels)
        levels = levels[::2]
        assert error(heun_sample(euler(student), noise, levels), slow) < 1e-9
    undistilled = heun_sample(euler(teacher), noise, levels)
    assert len(levels) == 2
    assert undistilled.std(0).max() < 0.1 * slow.std(0).min()


# Theorem 17: likelihood

def divergence(denoise, x, sigma):
    """∇ · (x − D)/σ, of the ODE's slope dx/dσ, by one derivative for each dimension: (B, d) -> (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (x - denoise(x, sigma.expand(len(x)))) / sigma
        total = torch.zeros(len(x))
        for i in range(x.shape[1]):
            gradient, = torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)
            total = total + gradient[:, i]
    return total


def log_likelihood(denoise, x, sigmas):
    """log p(x) = log N(x_T; 0, σ_T²) + ∫ ∇ · (dx/dσ) dσ, on rising σ (Song et al. 2021, SDE, Eq. 39)."""
    integral = 0
    for sigma, higher in zip(sigmas, sigmas[1:]):
        before = divergence(denoise, x, sigma)
        x = heun_sample(denoise, x / sigma, [sigma, higher])
        after = divergence(denoise, x, higher)
        integral = integral + (higher - sigma) * (before + after) / 2
    return Normal(0, sigmas[-1]).log_prob(x).sum(1) + integral


def test_the_ode_gives_the_bits_per_dimension_of_a_gaussian():
    """−log₂ p(x)/d; its mean is the entropy, ½ log₂ |2πeΣ| / d (Song et al. 2021, Score SDE, Section 4.3).

    For pixels of 256 levels in [−1, 1], log₂ 127.5 = 7 bits come on top.
    """
    torch.manual_seed(0)
    root = torch.randn(3, 3).double()
    covariance = root @ root.T
    data = MultivariateNormal(torch.zeros(3).double(), covariance)

    def denoise(x, sigma):
        noisy_covariance = covariance + sigma[0] ** 2 * torch.eye(3)
        return x @ torch.linalg.solve(noisy_covariance, covariance)

    x = data.sample((1000,))
    nats = log_likelihood(denoise, x, sigma_schedule(150)[:-1].flip(0))
    bits = -nats / (3 * math.log(2))
    assert (nats - data.log_prob(x)).abs().max() < 0.02
    assert bits.mean() == pytest.approx(data.entropy().item() / (3 * math.log(2)), abs=0.05)


# Theorem 18: product of experts

def experts():
    """D of the sum of the scores of N(−1, 0.6²) and N(1, 0.6²); D of their product, N(0, 0.18)."""
    first = ideal(torch.tensor([[-1.0]]), 0.6)
    second = ideal(torch.tensor([[1.0]]), 0.6)

    def both(x, sigma):
        return first(x, sigma) + second(x, sigma) - x      # D = x + σ² · score

    return both, ideal(torch.zeros(1, 1), 0.6 / 2**0.5)


def test_the_sum_of_two_scores_is_the_score_of_the_product_only_as_sigma_falls_to_zero():
    """The sum is (s² + 2σ²)/(s² + σ²) times it: noise added to a product is not a product of noises.

    Hinton 2002 has products of experts; Du et al. 2023, Section 3, say what goes wrong.
    """
    both, product = experts()
    x = torch.ones(5, 1).double()
    sigma = torch.logspace(-3, 3, 5).double()
    too_strong = ((both(x, sigma) - x) / (product(x, sigma) - x))[:, 0]
    expected = (0.6**2 + 2 * sigma**2) / (0.6**2 + sigma**2)
    assert error(too_strong, expected) < 1e-9
    assert abs(too_strong[0] - 1) < 1e-4
    assert abs(too_strong[-1] - 2) < 1e-4


def test_the_ode_of_two_summed_scores_misses_their_product_and_langevin_finds_it():
    """The product has deviation 0.42; the ODE nearly falls on one point (Du et al. 2023, Section 3)."""
    torch.manual_seed(0)
    both, product = experts()
    noise = torch.randn(4000, 1).double()
    by_product = heun_sample(product, noise, sigma_schedule(40))
    by_sum = heun_sample(both, noise, sigma_schedule(40))
    corrected = langevin(both, by_sum, torch.tensor(0.02).double(), step=0.01, steps=200)
    assert by_product.std() == pytest.approx(0.424, abs=0.02)
    assert by_sum.std() < 0.02
    assert corrected.std() == pytest.approx(0.424, abs=0.02)


# What follows uses the embedded world's images of four objects. D is mostly the exact one of 1,500 of them,
# the goal of all training: samples are then training images, so that what they show is known.

RESOLUTION = 16


def world(start, n):
    """n images of four objects, (n, 3, R, R) in [-1, 1], and what they show: a dict of (n,)."""
    index = torch.arange(start, start + 5 * n)
    four = index[shapes_attributes(index)["count"] == 3][:n]
    pixels = shapes_images(four, RESOLUTION)                              # (n, R, R, 3) uint8
    return to_float(pixels).permute(0, 3, 1, 2), shapes_attributes(four)


IMAGES, SHOWN = world(0, 1500)
HELD_OUT, HELD_OUT_SHOWN = world(20_000, 64)
DENOISE = ideal(IMAGES)
SIGMAS = sigma_schedule(18)
RING = SHAPES.index("ring")
STAR = SHAPES.index("star")


def noise(n=64):
    random = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, RESOLUTION, RESOLUTION, generator=random).double()


def find(images, gallery):
    """The nearest image, or y, of the gallery: its distance and its row, each (B,)."""
    distances, rows = nearest(images.double().flatten(1), gallery.double().flatten(1))
    return torch.as_tensor(distances)[:, 0], torch.as_tensor(rows)[:, 0]


def distance(images):
    """To the nearest training image: (B,)."""
    return find(images, IMAGES)[0]


def shows(what, images, gallery=IMAGES):
    """The "color", "shape" or other attribute of the nearest training image: (B,)."""
    _, rows = find(images, gallery)
    return SHOWN[what][rows]


def share(a, b):
    """How often a is b."""
    return (a == b).double().mean().item()


def rms(x):
    return x.square().mean().sqrt().item()


def frechet(a, b):
    """The Fréchet distance of two sets of vectors, (N, D) and (M, D)."""
    return frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def smaller(images):
    """Half as high and wide, by means of four pixels."""
    return F.avg_pool2d(images, 2)


def larger(images):
    """Twice as high and wide, by repeated pixels."""
    return F.interpolate(images, scale_factor=2)


# Theorem 19: cross-attention

def added_by_condition(block, pixels, y):
    """What a `UNetBlock` adds to its pixels (B, C, H, W) because of y (B, E), before its second norm."""
    before_norm = []

    def record(norm, inputs):
        before_norm.append(inputs[0])

    block.norm1.register_forward_pre_hook(record)
    block(pixels, y)
    block(pixels, torch.zeros_like(y))
    return before_norm[0] - before_norm[1]


def test_cross_attention_to_one_token_adds_what_the_unet_adds_the_same_to_every_pixel():
    """softmax over one token is 1: softmax(QKᵀ/√d)V is V = W y (Rombach et al. 2022, Section 3.3).

    A class is one token in latent diffusion. `UNetBlock` adds its condition by such a W, its map `affine`.
    Of several tokens, such as words, each pixel takes its own share.
    """
    torch.manual_seed(0)
    block = UNetBlock(4, 16, emb_dim=8, adm=False)
    tokens = torch.randn(2, 5, 8)
    added = added_by_condition(block, torch.randn(2, 4, 6, 6), tokens[:, 0])              # (2, 16, 6, 6)
    queries = torch.randn(2, 36, 16)                                      # of any 6×6 pixels
    keys = torch.randn(2, 5, 16)
    values = tokens @ block.affine.weight.T                                               # (2, 5, 16)
    one = F.scaled_dot_product_attention(queries, keys[:, :1], values[:, :1])             # (2, 36, 16)
    five = F.scaled_dot_product_attention(queries, keys, values)
    assert error(one, added.flatten(2).transpose(1, 2)) < 1e-5
    assert one.std(1).max() < 1e-6
    assert five.std(1).mean() > 0.1


# Theorem 20: the autoencoders of latent diffusion

def test_a_vector_quantizer_lets_gradients_straight_through():
    """z + sg(q − z) is q, the nearest code; its gradient is that of z (van den Oord et al. 2017, 3.2).

    sg, "stop gradient", is `detach`.
    """
    torch.manual_seed(0)
    z = torch.randn(200, 4, requires_grad=True)
    target = torch.randn(200, 4)
    kmeans = KMeans.fit(z.detach(), 16)
    quantized = kmeans.transform(z) @ kmeans.centers
    straight = z + (quantized - z).detach()
    (straight - target).square().sum().backward()
    assert error(straight, quantized) < 1e-6
    assert error(z.grad, 2 * (quantized - target)) < 1e-5


def pull(codes, z):
    """How strongly the codebook loss |sg(z) − e|² moves the codes e (van den Oord et al. 2017, Eq. 3)."""
    codes = codes.clone().requires_grad_()
    chosen = torch.cdist(z, codes).argmin(1)
    codebook_loss = (z - codes[chosen]).square().sum(1).mean()
    gradient, = torch.autograd.grad(codebook_loss, codes)
    return gradient.norm().item()


def test_a_codebook_is_at_rest_where_k_means_puts_it():
    """Each code goes to the mean of the z that chose it (van den Oord et al. 2017, Appendix A.1)."""
    torch.manual_seed(0)
    z = torch.randn(200, 4)
    assert pull(KMeans.fit(z, 16).centers, z) < 1e-5
    assert pull(z[:16], z) > 0.05


def linear_vae_loss(encoder, decoder, log_variance, covariance):
    """½ E|x − Dz|² + KL(N(Ex, diag v) | N(0, I)) for z ~ N(Ex, diag v), and its mean over x ~ N(0, Σ).

    Less a constant: Kingma and Welling 2014, Eq. 3, and their Appendix B for the KL term.
    """
    variance = log_variance.exp()
    rest = torch.eye(len(covariance)) - decoder @ encoder
    squared_error = (rest @ covariance @ rest.T).trace() + (decoder.square() * variance).sum()
    squared_mean = (encoder @ covariance @ encoder.T).trace()
    divergence = squared_mean + variance.sum() - log_variance.sum()
    return (squared_error + divergence) / 2


def test_a_linear_autoencoder_with_a_kl_term_is_pca():
    """Each latent finds a principal axis of its own, of length √(λ − 1); where λ < 1 it stays unused.

    Tipping and Bishop 1999, Eq. 7, for noise of variance 1; Lucas et al. 2019, Section 4.
    """
    torch.manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(5, 5))                          # columns
    covariance = axes @ torch.diag(torch.tensor([5.0, 3.0, 0.5, 0.2, 0.1])) @ axes.T
    encoder = (0.1 * torch.randn(3, 5)).requires_grad_()
    decoder = (0.1 * torch.randn(5, 3)).requires_grad_()
    log_variance = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([encoder, decoder, log_variance], lr=0.03)
    for _ in range(600):
        optimizer.zero_grad()
        linear_vae_loss(encoder, decoder, log_variance, covariance).backward()
        optimizer.step()
    along = (axes.T @ decoder.detach()).square()                                          # (axis, latent)
    expected = torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0])
    assert (along.amax(1) - expected).abs().max() < 0.01                  # of one latent
    assert (along.sum(1) - expected).abs().max() < 0.01                   # of all: the others have no share


# Theorem 21: a cascade

def gaussian_of_images():
    """Mean (768,) and covariance (768, 768) of the world's images, and a little noise."""
    rows = IMAGES.double().flatten(1)
    return rows.mean(0), rows.T.cov() + 0.05**2 * torch.eye(768)


def upsampler(small, s):
    """The exact D(x; σ | small) of Gaussian images, told small = A x₀ + s ε, where A is `smaller`.

    Two observations of one Gaussian: precisions add, Σ⁻¹ + I/σ² + AᵀA/s² (Bishop 2006, Eq. 2.117).
    """
    mean, covariance = gaussian_of_images()
    pixels = torch.eye(768).double().reshape(768, 3, RESOLUTION, RESOLUTION)
    a = smaller(pixels).flatten(1).T                                                      # (192, 768)
    precision = torch.linalg.inv(covariance)
    told = precision @ mean + small.flatten(1) @ a / s**2                                 # (B, 768)
    precision = precision + a.T @ a / s**2

    def denoise(x, sigma):
        of_both = precision + torch.eye(768) / sigma[0] ** 2
        weighted = told + x.flatten(1) / sigma[0] ** 2
        return torch.linalg.solve(of_both, weighted.T).T.reshape(x.shape)

    return denoise


def cascade(small, added, told):
    """The second stage's images, (B, 768): noise is added to the first's, and it is told of so much."""
    noisy = small + added * torch.randn_like(small)
    return heun_sample(upsampler(noisy, told), noise(len(small)), sigma_schedule(12)).flatten(1)


def first_stage(n):
    """Images of 8×8 of an exact first stage, and true images of 16×16 to compare with, as rows (n, 768)."""
    mean, covariance = gaussian_of_images()
    law = MultivariateNormal(mean, covariance)
    images = law.sample((n,)).reshape(n, 3, RESOLUTION, RESOLUTION)
    return smaller(images), law.sample((n,))


def test_noise_on_the_condition_of_a_cascade_hides_the_flaws_of_its_first_stage():
    """Conditioning augmentation (Ho et al. 2022, *Cascaded Diffusion Models*, Section 4.3): 8×8 to 16×16.

    The flawed first stage leaves a faint checkerboard in its images. A second stage that trusts them keeps
    it; one that is told of noise of deviation 0.2 does not. After a perfect first stage noise does not help.
    """
    torch.manual_seed(0)
    perfect, real = first_stage(200)
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)                  # (8, 8)
    flawed = perfect + 0.1 * checkerboard
    best = energy_distance(cascade(perfect, 0.02, 0.02), real)
    best_careful = energy_distance(cascade(perfect, 0.2, 0.2), real)
    trusting = energy_distance(cascade(flawed, 0.02, 0.02), real)
    careful = energy_distance(cascade(flawed, 0.2, 0.2), real)
    assert best_careful == pytest.approx(best, rel=0.15)
    assert careful < 1.2 * best
    assert trusting > 2.5 * careful


def test_a_cascade_has_to_be_told_of_the_noise_that_is_added_no_more_and_no_less():
    """∫ p(x | small + sε) p(small + sε) = p(x) for any s: the spread of the images stays as it is.

    Told of noise that nobody added, the second stage makes all images too much like the mean.
    """
    torch.manual_seed(0)
    perfect, _ = first_stage(400)
    _, covariance = gaussian_of_images()
    as_told = cascade(perfect, added=1.0, told=1.0).var(0).sum() / covariance.trace()
    less = cascade(perfect, added=0.0, told=1.0).var(0).sum() / covariance.trace()
    more = cascade(perfect, added=1.0, told=0.5).var(0).sum() / covariance.trace()
    assert as_told == pytest.approx(1, abs=0.08)                   # 12 steps are few
    assert less < 0.95 * as_told
    assert more > 1.1 * as_told


# Theorem 22: unCLIP

def train(denoiser, x, cond=None, steps=400, rate=1e-2):
    """Eq. 1 on batches of 64, at a rate that falls to zero -> the same Denoiser."""
    optimizer = torch.optim.Adam(denoiser.parameters())
    for step in range(steps):
        rows = torch.randint(len(x), (64,))
        told = None
        if cond is not None:
            told = cond[rows]
        loss = denoiser.loss(x[rows], told).mean()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.requires_grad_(False)


def small_prior(seed, dim, cond_dim=0, predict="data"):
    torch.manual_seed(seed)
    net = PriorTransformer(dim, cond_dim, width=32, depth=1, heads=2)
    return Denoiser(net, predict=predict)


WORDS = [*COLORS, *SHAPES]
CAPTIONS = []                                         # of IMAGES: "red star"
for color, shape in zip(SHOWN["color"].tolist(), SHOWN["shape"].tolist()):
    CAPTIONS.append(list(COLORS)[color] + " " + SHAPES[shape])


class TinyClip(nn.Module):
    """Both sides of CLIP: images, captions -> (B, 16), of length 2 and so of rms 0.5.

    A caption is a bag of words.
    """

    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 16))
        self.text = nn.EmbeddingBag(len(WORDS), 16, mode="sum")

    def of_images(self, images):
        return 2 * F.normalize(self.vision(images), dim=1)

    def of_captions(self, captions):
        numbers = []
        for caption in captions:
            numbers.append([WORDS.index(word) for word in caption.split()])
        return 2 * F.normalize(self.text(torch.tensor(numbers)), dim=1)


@pytest.fixture(scope="module")
def clip():
    """Each image learns to find its caption among 64, each caption its image: Radford et al. 2021, Fig. 3."""
    torch.manual_seed(0)
    clip = TinyClip()
    optimizer = torch.optim.Adam(clip.parameters(), lr=3e-3)
    target = torch.arange(64)
    for rows in torch.randint(len(IMAGES), (200, 64)):
        y = clip.of_images(IMAGES[rows])
        t = clip.of_captions([CAPTIONS[row] for row in rows])
        logits = 2.5 * y @ t.T                                                            # (64, 64)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clip.requires_grad_(False)


def test_unclip_in_fifteen_lines_a_prior_told_a_caption_draws_its_y(clip):
    """p(y | a) where a is the caption's embedding: the first stage of unCLIP (Ramesh et al. 2022, Eq. 2).

    The caption's own embedding is not among those of red stars; that is what the prior is for.
    """
    y = clip.of_images(IMAGES)
    prior = train(small_prior(seed=0, dim=16, cond_dim=16), y, clip.of_captions(CAPTIONS))
    asked = clip.of_captions(200 * ["red star"])
    drawn = sample_embeddings(prior, SampleNoise(range(200)), asked, Sampler(steps=18, s_churn=0.0))
    red_star = torch.tensor([caption == "red star" for caption in CAPTIONS])
    to_red_stars, _ = find(drawn, y[red_star])
    to_others, _ = find(drawn, y[~red_star])
    from_caption, _ = find(asked, y[red_star])
    assert share(to_red_stars < to_others, True) >= 0.9
    assert to_red_stars.median() < 0.8 * from_caption[0]


# Theorem 23: why a prior that predicts the data is better here

def gaussian_like(y):
    """As many draws of a Gaussian of the same mean and covariance."""
    return MultivariateNormal(y.mean(0), y.T.cov() + 1e-6 * torch.eye(y.shape[1])).sample((len(y),))


def typical_distance(drawn, y):
    """The median distance of a draw to the nearest y."""
    distances, _ = find(drawn, y)
    return distances.median().item()


def test_a_gaussian_is_as_near_in_frechet_distance_as_other_data_and_has_no_precision(clip):
    """The distance knows mean and covariance alone (Heusel et al. 2017, Eq. 6); y has clusters.

    Precision asks whether a draw lies among the data (Kynkäänniemi et al. 2019, Eq. 2).
    """
    torch.manual_seed(0)
    y = clip.of_images(IMAGES)
    known = y[:750]
    other = y[750:]
    gaussian = gaussian_like(known)
    assert frechet(known, gaussian) < frechet(known, other)
    assert precision_recall(known, other)[0] > 0.8
    assert precision_recall(known, gaussian)[0] < 0.02


def test_a_prior_that_predicts_y_keeps_to_the_data_and_one_of_edms_scalings_does_not(clip):
    """At a low σ EDM's D is nearly its input (c_skip ≈ 1), wherever that lies (Karras et al. 2022, Table 1).

    A D that is the network's output keeps of its input only what the network has learned to keep. Trained for
    a second, the prior of EDM's scalings draws y as far from the data as a Gaussian does; those of the prior
    that predicts y are nearer, although their Fréchet distance is larger.
    """
    torch.manual_seed(0)
    y = clip.of_images(IMAGES)
    drawn = {}
    for predict in ("data", "edm"):
        prior = train(small_prior(seed=0, dim=16, predict=predict), y)
        drawn[predict] = heun_sample(prior, torch.randn(len(y), 16), SIGMAS)
    of_gaussian = typical_distance(gaussian_like(y), y)
    assert frechet(y, drawn["edm"]) < frechet(y, drawn["data"])
    assert typical_distance(drawn["edm"], y) > 0.85 * of_gaussian
    assert typical_distance(drawn["data"], y) < 0.7 * of_gaussian


# Theorem 24: image guiding

def shrinks_to(small):
    """log p(small | x) = −½ |small − A x|² + constant, where A is `smaller` (Rombach et al. 2022, Eq. 17)."""
    def log_probability(images):
        rest = small - smaller(images)
        return -rest.square().flatten(1).sum(1) / 2

    return log_probability


def test_image_guiding_by_the_gradient_through_the_denoiser_stays_in_the_world():
    """`classifier_guidance`, with exercise 4, for p(small | D(x; σ)) (Rombach et al. 2022, Eq. 16).

    The gradient moves D only where D can go: the samples are images of the world, which resemble the small
    ones nearly as well as any can. The projection of exercise 3 adds what is missing, and leaves the world.
    """
    small = smaller(HELD_OUT.double())
    guided = classifier_guidance(DENOISE, shrinks_to(small))
    found = heun_sample(guided, noise(), SIGMAS)
    free = heun_sample(DENOISE, noise(), SIGMAS)
    projected = heun_sample(project(DENOISE, small), noise(), SIGMAS)
    _, best = find(small, smaller(IMAGES))
    assert rms(smaller(found) - small) < 1.5 * rms(smaller(IMAGES[best]) - small)
    assert rms(smaller(found) - small) < rms(smaller(free) - small) / 3
    assert distance(found).max() < 1e-3
    assert distance(projected).median() > 1
    assert share(shows("color", found), HELD_OUT_SHOWN["color"]) > 0.95


# Theorem 25: score distillation

def test_score_distillation_moves_an_image_until_it_is_of_the_world():
    """x ← x + rate · (D(x + σε; σ) − x), which is −w(σ)(ε̂ − ε) with w(σ) = σ (Poole et al. 2023, Eq. 3).

    From gray, each image comes at least three times nearer to the nearest star. It seeks a mode and does not
    sample: eight images become the same few stars.
    """
    torch.manual_seed(0)
    stars = IMAGES[SHOWN["shape"] == STAR]
    denoise = ideal(stars)
    x = torch.zeros(8, 3, RESOLUTION, RESOLUTION).double()
    before, _ = find(x, stars)
    for _ in range(100):
        sigma = (4 * torch.rand(8) - 3).exp()
        noisy = x + per_row(sigma, x) * torch.randn_like(x)
        x = x + 0.1 * (denoise(noisy, sigma) - x)
    after, found = find(x, stars)
    _, sampled = find(heun_sample(denoise, noise(8), SIGMAS), stars)
    assert (after < before / 3).all()
    assert len(found.unique()) < len(sampled.unique())


# Theorem 26: a diffusion classifier

def class_losses(denoise, images):
    """Σ |D(x + σε; σ) − x|² over three σ, with the same noise whatever D is: (B,)."""
    torch.manual_seed(0)
    total = 0
    for sigma in (0.5, 1.0, 2.0):
        noisy = images + sigma * torch.randn_like(images)
        denoised = denoise(noisy, torch.full((len(images),), sigma))
        total = total + (denoised - images).square().flatten(1).sum(1)
    return total


def test_the_class_whose_denoiser_has_the_least_loss_is_the_class():
    """p(class | x) ∝ exp(−E |D_class − x|²), up to weights (Li et al. 2023, Section 3.2).

    For the loss bounds −log p(x | class), by theorem 4. Chance is right in one of six, one of eight.
    """
    for what, classes in (("shape", len(SHAPES)), ("color", len(COLORS))):
        losses = []
        for number in range(classes):
            told = ideal(IMAGES[SHOWN[what] == number], 0.1)
            losses.append(class_losses(told, HELD_OUT))
        found = torch.stack(losses).argmin(0)
        assert share(found, HELD_OUT_SHOWN[what]) >= 0.95


# The exercises. A solution wraps a denoiser, or starts heun_sample elsewhere. It takes a trained one as well.

def sdedit(denoise, drawing, noise, sigma, steps=18):
    """From the drawing, noised to σ, back to an image (Meng et al. 2022, Algorithm 1)."""
    return heun_sample(denoise, drawing / sigma + noise, sigma_schedule(steps, 0.002, sigma))


def test_exercise_1_sdedit_makes_an_image_of_a_drawing():
    """A little noise keeps what was drawn, much forgets it; an image comes out of both."""
    drawing = larger(smaller(HELD_OUT))
    drawn = HELD_OUT_SHOWN["color"]
    little = sdedit(DENOISE, drawing, noise(), sigma=0.5)
    much = sdedit(DENOISE, drawing, noise(), sigma=40.0)
    assert distance(drawing).min() > 1
    assert distance(little).max() < 1e-3 and distance(much).max() < 1e-3
    assert share(shows("color", little), drawn) > 0.9
    assert share(shows("color", much), drawn) < 0.3
    assert rms(little - drawing) < 0.6 * rms(much - drawing)


def inpaint(denoise, known, mask):
    """Where the mask is, D is what is known (Song et al. 2021, Score SDE, Appendix I.2)."""
    def guided(x, sigma):
        denoised = denoise(x, sigma).double()
        return torch.where(mask, known.double(), denoised)

    return guided


def test_exercise_2_inpainting_keeps_the_known_half_and_draws_what_fits_in_the_other():
    """The left half is known; churn lets it tell the right half what it shows, again and again."""
    left = torch.arange(RESOLUTION) < RESOLUTION // 2
    torch.manual_seed(0)
    guided = inpaint(DENOISE, HELD_OUT, left)
    filled = heun_sample(guided, noise(), sigma_schedule(60), s_churn=60.0)
    right = filled[..., ~left]
    gallery = IMAGES[..., ~left]
    assert (filled - HELD_OUT)[..., left].abs().max() < 1e-3
    assert share(shows("color", right, gallery), HELD_OUT_SHOWN["color"]) > 0.8
    assert share(shows("shape", right, gallery), HELD_OUT_SHOWN["shape"]) > 0.4


def project(denoise, small):
    """D + A⁺(small − A D), with A = `smaller` and A⁺ = `larger`: the nearest image that shrinks to `small`.

    A projection; theorem 24 goes along a gradient instead (Wang et al. 2023, DDNM, Section 3.1).
    """
    def guided(x, sigma):
        denoised = denoise(x, sigma).double()
        return denoised + larger(small - smaller(denoised))

    return guided


def test_exercise_3_a_projection_enlarges_a_small_image():
    """Its low-pass distance falls tenfold, and it is nearer to the image than repeated pixels are."""
    small = smaller(HELD_OUT.double())
    free = heun_sample(DENOISE, noise(), SIGMAS)
    found = heun_sample(project(DENOISE, small), noise(), SIGMAS)
    assert rms(smaller(found) - small) < rms(smaller(free) - small) / 10
    assert rms(found - HELD_OUT) < rms(larger(small) - HELD_OUT)
    assert share(shows("color", found), HELD_OUT_SHOWN["color"]) > 0.8


def classifier_guidance(denoise, log_probability, scale=1.0):
    """D + scale · σ² ∇ log p(class | D(x; σ)) (Dhariwal and Nichol 2021, Section 4.2)."""
    def guided(x, sigma):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = denoise(x, sigma)
            total = log_probability(denoised).sum()
            gradient, = torch.autograd.grad(total, x)
        return denoised.detach() + scale * per_row(sigma, x) ** 2 * gradient

    return guided


@pytest.fixture(scope="module")
def classifier():
    """Images -> logits of the shape: trained for a second, on other images than those of D."""
    torch.manual_seed(0)
    images, shown = world(40_000, 1000)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, len(SHAPES)))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for rows in torch.randint(len(images), (200, 64)):
        loss = F.cross_entropy(net(images[rows]), shown["shape"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def test_exercise_4_classifier_guidance_draws_the_asked_class(classifier):
    """Without it one in six shows rings."""
    def ring(images):
        return classifier(images.float()).log_softmax(1)[:, RING]

    guided = classifier_guidance(DENOISE, ring, scale=3.0)
    by_chance = heun_sample(DENOISE, noise(), SIGMAS)
    asked = heun_sample(guided, noise(), SIGMAS)
    assert share(shows("shape", by_chance), RING) < 0.3
    assert share(shows("shape", asked), RING) > 0.8


def test_exercise_5_heun_beats_euler_at_equal_evaluations_but_not_with_very_few():
    """12 steps of Heun are 23 evaluations, 4 are 7; the solution is `euler`, with theorem 5."""
    denoise = ideal(IMAGES[:200])

    def sample(method, steps):
        images = heun_sample(method, noise(200), sigma_schedule(steps))
        return smaller(images).flatten(1)

    def fid(method, steps):
        return frechet(sample(method, steps), exact)

    exact = sample(denoise, 40)
    assert fid(denoise, 12) < 0.7 * fid(euler(denoise), 23)
    assert fid(denoise, 4) > 1.1 * fid(euler(denoise), 7)


def guide(told, free, w):
    """D + W (D_y − D), where W = w(σ) (Ho and Salimans 2022, Eq. 6)."""
    def guided(x, sigma):
        less = free(x, sigma)
        more = told(x, sigma)
        return less + per_row(w(sigma), x) * (more - less)

    return guided


def shrinking(sigma):
    """From 4 to 1, as the image forms."""
    return 1 + 3 * sigma / (1 + sigma)


def constant(sigma):
    return 4 + 0 * sigma


def gaussian_model(images):
    """What a network too simple for more would learn: the exact D of a Gaussian with the images' moments."""
    rows = images.double().flatten(1)
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh(rows.T.cov())
    variances = variances + 0.1**2                    # few images span few dimensions

    def denoise(x, sigma):
        along = (x.double().flatten(1) - mean) @ axes
        kept = variances / (variances + sigma.double()[:, None] ** 2)
        return (mean + kept * along @ axes.T).reshape(x.shape)

    return denoise


def test_exercise_6_guidance_that_shrinks_with_sigma_does_not_leave_the_world():
    """W = 4 to the end saturates the images; W that shrinks asks for stars and leaves them in the world."""
    stars = IMAGES[SHOWN["shape"] == STAR]
    free = gaussian_model(IMAGES)
    told = gaussian_model(stars)
    right = []
    saturated = []
    for denoise in (free, guide(told, free, shrinking), guide(told, free, constant)):
        images = heun_sample(denoise, noise(100), SIGMAS)
        right.append(share(shows("shape", images), STAR))
        saturated.append(share(images.abs() > 1, True))
    assert right[0] < 0.5 and right[1] > 0.9
    assert saturated[1] < 0.6 * saturated[2]


def ensemble(first, second):
    """The mean of what the two say."""
    def denoise(x, sigma):
        return (first(x, sigma) + second(x, sigma)) / 2

    return denoise


def test_exercise_7_an_ensemble_of_two_seeds_of_the_prior_is_better_than_either():
    """Its error is the mean of theirs less |D₁ − D₂|²/4 (Krogh and Vedelsby 1995)."""
    pixels = IMAGES.flatten(1)
    y = PCA.fit(pixels, 8).transform(pixels)
    y = y / (2 * rms(y))
    known = y[:100]
    fresh = y[1000:]
    first = train(small_prior(seed=0, dim=8), known, steps=200)
    second = train(small_prior(seed=1, dim=8), known, steps=200)
    sigma = torch.logspace(-2, 0, len(fresh))
    noisy = fresh + sigma[:, None] * torch.randn_like(fresh)
    outputs = [prior(noisy, sigma) for prior in (first, second, ensemble(first, second))]
    one, other, both = (rms(y - fresh) ** 2 for y in outputs)
    apart = rms(outputs[0] - outputs[1]) ** 2
    assert both == pytest.approx((one + other) / 2 - apart / 4, rel=1e-4)
    assert both < min(one, other)


def test_exercise_8_the_ideal_denoiser_of_500_training_images_copies_them():
    """D = Σ_i softmax_i(−|x − x_i|²/2σ²) x_i (Karras et al. 2022, Appendix B.3): perfect training copies."""
    training = IMAGES[:500].double()
    samples = heun_sample(ideal(training), noise(200), SIGMAS)
    of_samples, copied = find(samples, training)
    of_others, _ = find(HELD_OUT, training)
    assert of_samples.max() < 1e-3
    assert of_others.median() > 1
    assert len(copied.unique()) > 130


def temperature(y, mean, t):
    """mean + t (y − mean): t < 1 draws y to the mean (Karras et al. 2019, StyleGAN, Appendix B)."""
    return mean + t * (y - mean)


def test_exercise_9_temperature_of_y_helps_only_about_the_mean_of_its_own_cluster(clip):
    """About the mean of its own kind, a lower temperature trades recall for precision, as it should.

    About the mean of all y it loses both: there is nothing between the clusters. The y of other images stand
    for the draws of an ideal prior.
    """
    y = clip.of_images(IMAGES)
    kind = SHOWN["color"] * len(SHAPES) + SHOWN["shape"]
    means = [y[kind == k].mean(0) for k in range(len(COLORS) * len(SHAPES))]
    known = y[:750]
    drawn = y[750:]
    of_kind = torch.stack(means)[kind[750:]]
    precision, recall = precision_recall(known, drawn)
    precision_kind, recall_kind = precision_recall(known, temperature(drawn, of_kind, 0.8))
    precision_all, recall_all = precision_recall(known, temperature(drawn, y.mean(0), 0.8))
    assert precision_kind > precision + 0.05
    assert recall_kind < recall - 0.05
    assert precision_all < 0.1
    assert recall_all < 0.1


class ColorHistogram(nn.Module):
    """How much of the image each of 64 colors has: (B, 3, H, W) -> (B, 64), of rms 0.5."""
    dim = 64

    def __init__(self, weights=None):                 # there are none
        super().__init__()

    def forward(self, x):
        red, green, blue = (2 * x + 2).long().clip(0, 3).unbind(1)                        # (B, H, W), 0 to 3
        color = 16 * red + 4 * green + blue
        shares = F.one_hot(color.flatten(1), 64).float().mean(1)                          # (B, 64), sum 1
        return 4 * shares.sqrt()                      # its square has sum 16, and so mean 0.25


def test_exercise_10_an_embedder_of_ones_own_is_a_class_and_a_line_in_the_registry(monkeypatch):
    """A histogram of colors knows the color and not where it is; checkpoints rebuild it by its name."""
    # EMBEDDERS["histogram"] = ColorHistogram, and at the end of the test it is removed again.
    monkeypatch.setitem(EMBEDDERS, "histogram", ColorHistogram)
    embedder = Embedder("histogram")
    y = embedder(IMAGES)
    of_held_out = embedder(HELD_OUT)
    _, alike = find(of_held_out, y)
    rebuilt = unpack_embedder(pack_embedder(embedder))
    assert embedder.dim == y.shape[1] and rms(y) == pytest.approx(0.5)
    assert embedder(HELD_OUT.flip(3)).equal(of_held_out)
    assert rebuilt(HELD_OUT).equal(of_held_out)
    assert share(SHOWN["color"][alike], HELD_OUT_SHOWN["color"]) > 0.9


class SmallNet(nn.Module):
    """Three layers for images of a few pixels: (B, dim), c_noise (B,), y (B, cond_dim) -> (B, dim)."""

    def __init__(self, dim, cond_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 1 + cond_dim, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, dim))

    def forward(self, x, c_noise, cond, augment=None):
        return self.layers(torch.cat([x, c_noise[:, None], cond], dim=1))


def oracle_frechet(pixels, y, steps):
    """Of 4×4 images that are drawn with true y, by an image model of so many steps of training."""
    torch.manual_seed(0)
    image_model = train(Denoiser(SmallNet(48, y.shape[1])), pixels, y, steps, rate=4e-3)
    told = functools.partial(image_model, cond=y)
    return frechet(heun_sample(told, torch.randn_like(pixels), SIGMAS), pixels)


def test_exercise_11_few_dimensions_of_y_are_better_for_a_small_budget_and_many_for_a_large_one(clip):
    """Figure 4 in miniature: the oracle is told one or all 16 principal components of y.

    What y says has to be learned first. 75 steps are too few for that, and 16 numbers distract more than one;
    after 1,000 steps they tell more. The paper's budgets are longer, its dimensions more.
    """
    pixels = F.adaptive_avg_pool2d(IMAGES, 4).flatten(1)                                  # (1500, 48)
    y = clip.of_images(IMAGES)
    few = PCA.fit(y, 1).transform(y)
    many = PCA.fit(y, 16).transform(y)
    assert oracle_frechet(pixels, few, 75) < 0.95 * oracle_frechet(pixels, many, 75)
    assert oracle_frechet(pixels, many, 1000) < 0.8 * oracle_frechet(pixels, few, 1000)
