"""What guidance samples, against quadrature and closed forms (2.4 b)."""

import pytest
import torch

from ex2.report import exact_guidance
from ex2.report.exact_guidance import GRID, WAYS, TwoClasses, draw_exact_guidance, guided_samples, tilted_density
from ex2_diffusion import SCHEDULES, Diffusion, guided_eps

# (mean, deviation) of deterministic samples, of ancestral ones, and of p(x | c)^(1+w) / p(x)^w
KNOWN = {1.0: ((1.320, 0.358), (1.168, 0.441), (1.036, 0.468)), 3.0: ((1.674, 0.288), (1.288, 0.431), (1.062, 0.450))}


@pytest.mark.parametrize("w", KNOWN)
def test_guided_samples_are_not_those_of_the_tilted_distribution(w):
    deterministic, ancestral, tilted = KNOWN[w]
    density = tilted_density(w)
    mean = torch.trapezoid(density * GRID, GRID)
    deviation = torch.trapezoid(density * (GRID - mean) ** 2, GRID).sqrt()
    assert (mean.item(), deviation.item()) == pytest.approx(tilted, abs=1e-3)
    for how, expected in zip(WAYS.values(), (deterministic, ancestral)):
        x = guided_samples(w, **how)
        assert (x.mean().item(), x.std().item()) == pytest.approx(expected, abs=0.02)


def test_without_guidance_samples_are_those_of_the_class():
    for how in WAYS.values():
        x = guided_samples(0.0, **how)
        assert (x.mean().item(), x.std().item()) == pytest.approx((1, 0.5), abs=0.02)


@pytest.mark.parametrize("t", [0, 300, 700, 999])
def test_predictions_are_the_scores_of_the_noisy_densities(t):
    """eps = -sigma d log p(x_t) / dx, of the class, of both classes, and guided by Eq. 11."""
    process = Diffusion(1000, SCHEDULES["cosine"], 1, "cpu")
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    alpha_bar = process.alphas_bar_exact[t]
    variance = alpha_bar * 0.25 + 1 - alpha_bar
    of_class, other = (-((x - mean * alpha_bar**0.5) ** 2) / (2 * variance) for mean in (1, -1))
    mixture = torch.logaddexp(of_class, other)
    model, images, when = TwoClasses(process), x.detach().float().reshape(-1, 1, 1, 1), torch.full((50,), t)
    for log_density, w in ((of_class, 0), (mixture, -1), (3 * of_class - 2 * mixture, 2)):
        (score,) = torch.autograd.grad(log_density.sum(), x, retain_graph=True)
        eps = guided_eps(model, images, when, torch.zeros(50, dtype=torch.long), w).flatten()
        torch.testing.assert_close(eps.double(), -((1 - alpha_bar) ** 0.5) * score, atol=1e-4, rtol=1e-3)


def test_the_picture_has_all_densities(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(exact_guidance, "SAMPLES", 100)
    monkeypatch.setattr(exact_guidance.viz, "plot_guided_densities", lambda curves, path: drawn.update(curves))
    draw_exact_guidance(tmp_path / "a.png")
    assert [len(lines) for lines in drawn.values()] == [4, 4]
    for lines in drawn.values():
        for x, density in lines.values():
            assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=0.05)
