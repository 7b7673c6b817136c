"""Our samplers beside those of Hugging Face's diffusers, where it is installed (2.2 b)."""

import re
from pathlib import Path

import pytest
import torch

from ex2 import samplers
from ex2_diffusion import SCHEDULES, Diffusion, linear_beta_schedule, subsample_timesteps

diffusers = pytest.importorskip("diffusers", reason="an extra to compare with")


@pytest.fixture
def diffusor():
    return Diffusion(1000, SCHEDULES["linear"], 8, "cpu")


def model(x, t):
    """Some network: what it predicts is bounded, and depends on every pixel and on the time."""
    return torch.tanh(x.roll(1, -1) - 0.3 * x) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)


def scheduler_of(kind, diffusor, **settings):
    return kind(trained_betas=diffusor.betas.numpy(), **settings)


def test_ancestral_sampling_is_that_of_ddpm_scheduler(diffusor):
    """Every step of T = 1000, with the same noise: sigma^2 = beta_t, the x_0 estimate clamped."""
    scheduler = scheduler_of(diffusers.DDPMScheduler, diffusor, variance_type="fixed_large", clip_sample=True)
    scheduler.set_timesteps(1000)
    trajectory = diffusor.sample_trajectory(model, 8, 2, generator=torch.Generator().manual_seed(0))
    noise, x = torch.Generator().manual_seed(0), None
    for t, ours, _ in trajectory:
        if x is None:
            x = torch.randn(2, 3, 8, 8, generator=noise)
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
        if t >= 0:
            eps = model(x, torch.full((2,), t))
            x = scheduler.step(eps, t, x, generator=noise).prev_sample


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_ddim_scheduler(diffusor, eta):
    """On the same subsequence of timesteps, which diffusers takes as evenly spaced ones here."""
    scheduler = scheduler_of(diffusers.DDIMScheduler, diffusor, clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    ours = diffusor.sample(model, 8, 2, sampler="ddim", eta=eta, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=noise)
    for t in scheduler.timesteps:
        eps = model(x, t.expand(2))
        last = {"eta": 0.0} if t == 0 else {"eta": eta, "generator": noise}
        x = scheduler.step(eps, int(t), x, use_clipped_model_output=True, **last).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_dpm_solver_is_that_of_dpm_solver_scheduler(diffusor, monkeypatch):
    """DPM-Solver++(2M) on our subsequence of timesteps; on all of them diffusers divides by 0.

    They take the middle of a step in log-SNR, we in the angle; here ours is given theirs.
    """
    monkeypatch.setattr(samplers, "angle", lambda process, i: process.log_snr[i].item())
    settings = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
    scheduler = scheduler_of(diffusers.DPMSolverMultistepScheduler, diffusor, **settings)
    scheduler.set_timesteps(timesteps=subsample_timesteps(1000, 20).flip(0).tolist())
    start = {"clamp": False, "generator": torch.Generator().manual_seed(2)}
    ours = diffusor.sample(model, 8, 2, sampler="dpmpp_2m", steps=20, **start)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_ipndm_is_that_of_ipndm_scheduler():
    """What it calls betas are the factors of the noise, in float32, and its model's output is v, not eps."""
    diffusor = Diffusion(1000, lambda count: linear_beta_schedule(1e-4, 0.01, count), 8, "cpu")
    sigmas = diffusor.sqrt_one_minus_alphas_bar[subsample_timesteps(1000, 20).flip(0)]
    scheduler = diffusers.IPNDMScheduler(trained_betas=[*sigmas.tolist(), 0.0])
    scheduler.set_timesteps(20)
    noise = torch.Generator().manual_seed(3)
    *trajectory, _ = diffusor.sample_trajectory(model, 8, 2, sampler="ipndm", steps=20, clamp=False, generator=noise)
    x = trajectory[0][1]
    for (t, ours, _), of_theirs in zip(trajectory, scheduler.timesteps):  # our last step, from 0, is of first order
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
        v = (model(x, torch.full((2,), t)) - diffusor.sqrt_one_minus_alphas_bar[t] * x) / diffusor.sqrt_alphas_bar[t]
        x = scheduler.step(v, of_theirs, x).prev_sample
    assert t == 0


def test_the_example_gives_our_samples(run):
    """The code of docs/other-libraries.md, on a tiny run: guided samples of all classes, clamped, on 25 timesteps."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "other-libraries.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert '"results/quick"' in code
    shown = {}
    exec(code.replace('"results/quick"', repr(str(run))), shown)
    diffusor, network, classes = shown["diffusor"], shown["model"], shown["classes"]
    how = {"classes": classes, "guidance_scale": 1.0, "steps": 25, "generator": torch.Generator().manual_seed(0)}
    ours = diffusor.sample(network, shown["config"].image_size, len(classes), **how)
    torch.testing.assert_close(ours, shown["x"], rtol=1e-3, atol=1e-3)
