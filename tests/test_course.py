"""A lecture's systems on this code: ten theorems that lead from each to EDM, eight exercises with solutions.

Nearly all runs on exact denoisers: where the data are a few points or Gaussians, the minimizer of Eq. 1 is
known in closed form, and what a test sees is the method alone. Only a classifier and two tiny priors are
trained, for seconds.

Notation: D(x; σ) denoises x = x₀ + σε. DDPM's state is x_t = √ᾱ x₀ + √(1 − ᾱ) ε, so x = x_t / √ᾱ.
"""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from evaluate import frechet_distance, nearest
from twosdm import (PCA, SHAPES, Denoiser, PriorTransformer, Sampler, heun_sample, sample_two_stage,
                    shapes_attributes, shapes_world, sigma_schedule)


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
        self.denoise, self.predict = denoise, predict
        self.dim, self.channels, self.resolution = dim, channels, resolution
        self.unused = nn.Parameter(torch.zeros(()))   # a sampler asks the parameters for their device

    def forward(self, x, c_noise, cond=None, augment=None):
        sigma = (4 * c_noise).exp()
        scalings = Denoiser(None, predict=self.predict).scalings(sigma)
        c_skip, c_out, c_in, _ = (per_row(c, x) for c in scalings)
        x = x / c_in
        told = () if cond is None else (cond,)
        denoised = self.denoise(x, sigma, *told)
        return (denoised - c_skip * x) / c_out


class Recorder(nn.Module):
    """Some function for a network, which remembers its last call."""

    def forward(self, x, c_noise, cond=None, augment=None):
        self.x, self.c_noise = x, c_noise
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
    net, x_0 = Recorder(), torch.randn(1000, 5)
    loss = Denoiser(net, sigma_data=1.0).loss(x_0)
    sigma = (4 * net.c_noise).exp()[:, None]
    alpha = (1 + sigma**2).rsqrt()
    return net, x_0, alpha, sigma * alpha, loss


def test_epsilon_x0_and_v_are_one_denoiser_and_edm_of_unit_data_predicts_v():
    """D = x̂₀ = (x_t − sε̂)/α = αx_t − sv̂, where v̂ = −F (Ho et al. 2020, Eq. 15; Salimans and Ho 2022)."""
    net, _, alpha, s, _ = edm_of_unit_data()
    x_t, v_hat = net.x, -net.output
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
    x_t, v_hat = net.x, -net.output
    epsilon = (x_t - alpha * x_0) / s
    v_error = v_hat - (alpha * epsilon - s * x_0)
    epsilon_error = alpha * v_hat + s * x_t - epsilon
    x_error = alpha * x_t - s * v_hat - x_0
    for weighted in (v_error, epsilon_error / alpha, x_error / s):
        assert error(weighted.square().sum(1), loss) < 1e-4


# Theorem 4: DDPM's forward process and its bound

def test_the_forward_process_of_ddpm_is_that_of_edm():
    """x_t / √ᾱ = x₀ + σε with σ² = (1 − ᾱ)/ᾱ (Ho et al. 2020, Eq. 2 and 4), and c_in = √ᾱ if σ_data = 1."""
    scale, variance, levels = 1.0, 0.0, []
    for beta in torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64):
        scale = scale * (1 - beta).sqrt()
        variance = variance * (1 - beta) + beta
        levels.append(variance.sqrt() / scale)
    alpha_bar, levels = ddpm_alpha_bar()[1:], torch.stack(levels)
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
    now, before = ddpm_alpha_bar()[2:], ddpm_alpha_bar()[1:-1]
    x_t, x_0, denoised = 0.3, 0.8, -0.4
    truth = Normal(*ancestral(x_t, x_0, now, before))
    model = Normal(*ancestral(x_t, denoised, now, before))
    weight = (edm_sigma(before) ** -2 - edm_sigma(now) ** -2) / 2
    squared_error = kl_divergence(truth, model) / weight
    assert (squared_error - (denoised - x_0) ** 2).abs().max() < 1e-8


# Theorem 5: DDIM

def ddim_step(denoise, x_t, now, after):
    """From ᾱ = now to ᾱ = after: Song et al. 2021, DDIM, Eq. 12 without noise."""
    sigma, x = edm_sigma(now), x_t / now.sqrt()
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
    alpha_bar, modes = ddpm_alpha_bar()[::2], torch.tensor([-1.0, 1.0])
    denoise = ideal(modes[:, None], 0.3)
    x_t = torch.randn(10_000, 1).double()
    for t in range(500, 0, -1):
        now, before = alpha_bar[t], alpha_bar[t - 1]
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
    noise, denoise = torch.randn(10_000, 1), ideal(modes[:, None], 0.3)
    without = heun_sample(denoise, noise, sigma_schedule(80))
    churned = heun_sample(denoise, noise, sigma_schedule(80), s_churn=80.0)
    assert distance_of_laws(without, modes, 0.3) < 0.02
    assert distance_of_laws(churned, modes, 0.3) < 0.02
    assert 0.45 < share(churned.sign(), without.sign()) < 0.55


def test_an_ancestral_step_is_an_euler_step_too_far_and_then_noise():
    """Down to σ_{t−1}²/σ_t, up to σ_{t−1}: churn's halves, the other way around (Ho et al. 2020, Eq. 7)."""
    torch.manual_seed(0)
    now, before = ddpm_alpha_bar()[401], ddpm_alpha_bar()[400]
    sigma, sigma_next = edm_sigma(now), edm_sigma(before)
    x, denoised = torch.randn(2, 100).double()
    too_far = sigma_next**2 / sigma
    euler_step = x + (too_far - sigma) * (x - denoised) / sigma
    mean, deviation = ancestral(now.sqrt() * x, denoised, now, before)
    assert error(mean / before.sqrt(), euler_step) < 1e-10
    assert error(deviation**2 / before, sigma_next**2 - too_far**2) < 1e-10


# Theorem 7: guidance

def gaussian(x, sigma, y):
    """D_y for y ~ N(0, 1) and x | y ~ N(y, 0.3²); where y is zero, the D that is told nothing."""
    noise, y = per_row(sigma, x) ** 2, per_row(y, x)
    free = 1.09 / (1.09 + noise) * x
    told = (0.09 * x + noise * y) / (0.09 + noise)
    return torch.where(y == 0, free, told)


def classifier_guided(x, sigma, y, scale):
    """D_y + scale · σ² ∇ log p(y | x; σ), by automatic differentiation."""
    noise, y_row = per_row(sigma, x) ** 2, per_row(y, x)
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
    calls, guided = [], Sampler(steps=20, s_churn=0.0, guidance=3.0)

    def recorded(x, sigma, y):
        calls.append((x, y))
        return gaussian(x, sigma, y)

    unit_gaussian = ideal(torch.zeros(1, 1), 1.0)
    prior = Denoiser(Exact(unit_gaussian, dim=1))
    image_model = Denoiser(Exact(recorded, channels=1, resolution=1))
    samples = sample_two_stage(prior, image_model, range(100), image_sampler=guided)
    start, y = next((x, y) for x, y in calls if y.any())
    by_gradient = functools.partial(classifier_guided, y=y, scale=2.0)
    expected = heun_sample(by_gradient, start / 80, sigma_schedule(20))
    assert error(samples, expected) < 1e-4


# Theorem 8: the ODE is invertible

def test_the_ode_leads_from_an_image_to_its_noise_and_back():
    """On rising σ heun_sample goes back (Song et al. 2021, Score SDE, Eq. 13; Karras et al. 2022, Eq. 1)."""
    torch.manual_seed(0)
    images, errors = IMAGES[:100].double(), []
    denoise = ideal(images, 0.1)
    x = images + 0.1 * torch.randn_like(images)
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
    net, s, losses = Recorder(), torch.tensor([0.2, 1.0, 4.0, 9.0]), []
    z = s * torch.randn(1000, 4)
    loss = Denoiser(net, sigma_data=0.5).loss(0.5 * z / s)
    sigma = (4 * net.c_noise).exp()[:, None]
    noisy = 2 * s * net.x * (sigma**2 + 0.5**2).sqrt()
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


SIGNS, MODE = torch.tensor([-1.0] * 3 + [1.0] * 7), torch.tensor([1.0, 0.5])


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
    others = (two_modes(len(data))[0] for _ in range(10))
    return max(energy_distance(other, data) for other in others)


def test_with_an_embedding_that_the_image_determines_two_stages_have_the_law_of_the_data():
    """p(x) = ∫ p(x | y) p(y) dy with p(y | x) = δ(y − e(x)) (Harvey and Wood 2023, Eq. 2 and 3)."""
    torch.manual_seed(0)
    data, _ = two_modes(1000)
    samples = sample_two_stage(*ideal_two_stages(), range(1000)).flatten(1)
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
    told, noise = functools.partial(image_model, cond=y), torch.randn_like(samples)
    oracle = heun_sample(told, noise, sigma_schedule(18))
    assert energy_distance(samples.flatten(1), oracle.flatten(1)) < chance(data)


# The exercises: on the embedded world's images of four objects. D is mostly the exact one of 1,500 of them,
# the goal of all training: samples are then training images, so that what they show is known.

RESOLUTION = 16


def world(start, n):
    """n images of four objects, (n, 3, R, R) in [-1, 1], and what they show: a dict of (n,)."""
    index = torch.arange(start, start + 5 * n)
    four = index[shapes_attributes(index)["count"] == 3][:n]
    images = shapes_world(four, RESOLUTION)
    return images.batch(np.arange(n)), shapes_attributes(four)


IMAGES, SHOWN = world(0, 1500)
HELD_OUT, HELD_OUT_SHOWN = world(20_000, 64)
DENOISE, SIGMAS = ideal(IMAGES), sigma_schedule(18)
RING, STAR = SHAPES.index("ring"), SHAPES.index("star")


def noise(n=64):
    random = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, RESOLUTION, RESOLUTION, generator=random).double()


def distance(images):
    """To the nearest training image: (B,)."""
    return nearest(images.double(), IMAGES.double())[0][:, 0]


def shows(what, images, gallery=IMAGES):
    """The "color", "shape" or other attribute of the nearest training image: (B,)."""
    index = nearest(images.double(), gallery.double())[1][:, 0]
    return SHOWN[what][index]


def share(a, b):
    """How often a is b."""
    return (a == b).double().mean().item()


def rms(x):
    return x.square().mean().sqrt().item()


def frechet(a, b):
    """The Fréchet distance of two sets of vectors, (N, D) and (M, D)."""
    of_a, of_b = (a.mean(0), a.T.cov()), (b.mean(0), b.T.cov())
    return frechet_distance(*of_a, *of_b)


def smaller(images):
    """Half as high and wide, by means of four pixels."""
    return F.avg_pool2d(images, 2)


def larger(images):
    """Twice as high and wide, by repeated pixels."""
    return F.interpolate(images, scale_factor=2)


# A solution wraps a denoiser, or starts heun_sample elsewhere. It takes a trained one as well.

def sdedit(denoise, drawing, noise, sigma, steps=18):
    """From the drawing, noised to σ, back to an image (Meng et al. 2022, Algorithm 1)."""
    return heun_sample(denoise, drawing / sigma + noise, sigma_schedule(steps, 0.002, sigma))


def test_exercise_1_sdedit_makes_an_image_of_a_drawing():
    """A little noise keeps what was drawn, much forgets it; an image comes out of both."""
    drawing, drawn = larger(smaller(HELD_OUT)), HELD_OUT_SHOWN["color"]
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
    right, gallery = filled[..., ~left], IMAGES[..., ~left]
    assert (filled - HELD_OUT)[..., left].abs().max() < 1e-3
    assert share(shows("color", right, gallery), HELD_OUT_SHOWN["color"]) > 0.8
    assert share(shows("shape", right, gallery), HELD_OUT_SHOWN["shape"]) > 0.4


def super_resolve(denoise, small):
    """D less the gradient of its low-pass distance squared, scaled (Wang et al. 2023, DDNM: A of means)."""
    def guided(x, sigma):
        denoised = denoise(x, sigma).double()
        return denoised + larger(small - smaller(denoised))

    return guided


def test_exercise_3_image_guiding_enlarges_a_small_image():
    """Its low-pass distance falls tenfold, and it is nearer to the image than repeated pixels are."""
    small = smaller(HELD_OUT.double())
    free = heun_sample(DENOISE, noise(), SIGMAS)
    found = heun_sample(super_resolve(DENOISE, small), noise(), SIGMAS)
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
        less, more = free(x, sigma), told(x, sigma)
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
    free, told = gaussian_model(IMAGES), gaussian_model(stars)
    right, saturated = [], []
    for denoise in (free, guide(told, free, shrinking), guide(told, free, constant)):
        images = heun_sample(denoise, noise(100), SIGMAS)
        right.append(share(shows("shape", images), STAR))
        saturated.append(share(images.abs() > 1, True))
    assert right[0] < 0.5 and right[1] > 0.9
    assert saturated[1] < 0.6 * saturated[2]


def train_prior(y, seed):
    """Not for long and on little: the seeds differ."""
    torch.manual_seed(seed)
    net = PriorTransformer(y.shape[1], width=32, depth=1, heads=2)
    prior = Denoiser(net, predict="data")
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(200):
        rows = torch.randint(len(y), (64,))
        loss = prior.loss(y[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior.requires_grad_(False)


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
    known, fresh = y[:100], y[1000:]
    first, second = train_prior(known, seed=0), train_prior(known, seed=1)
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
    of_samples, copied = nearest(samples, training)
    of_others, _ = nearest(HELD_OUT.double(), training)
    assert of_samples.max() < 1e-3 < 1 < np.median(of_others)
    assert len(set(copied[:, 0])) > 130
