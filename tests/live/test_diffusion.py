"""Schedules, process and samplers of the live page are those of the program."""

import numpy as np
import pytest
import torch
from javascript import Engine

from ex2.samplers import SAMPLERS, takes_eta
from ex2_diffusion import SCHEDULES, Diffusion, subsample_timesteps

SHAPE = (1, 3, 4, 4)


@pytest.fixture(scope="module")
def engine():
    return Engine("diffusion")


@pytest.mark.parametrize("timesteps", [100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_those_of_the_program(engine, schedule, timesteps):
    process = Diffusion(timesteps, SCHEDULES[schedule], 4, "cpu").respace(30)
    engine.context.eval(f"var process = new Diffusion(SCHEDULES.{schedule}({timesteps})).respace(30); undefined")
    names = "betas alphas_bar alphas_bar_prev sqrt_alphas_bar sqrt_one_minus_alphas_bar sqrt_recip_alphas"
    for name in [*names.split(), "eps_factor", "sqrt_betas", "posterior_variance", "model_timesteps"]:
        np.testing.assert_allclose(engine.run(f"process.{name}"), getattr(process, name), rtol=3e-6, err_msg=name)


def test_subsequences_of_every_length_are_those_of_the_program(engine):
    found = engine.run("Array.from({length: 1000}, (_, i) => subsample_timesteps(1000, i + 1))")
    assert all(row == subsample_timesteps(1000, i + 1).tolist() for i, row in enumerate(found))


def test_the_part_up_to_every_timestep_is_that_of_the_program(engine):
    process = Diffusion(1000, SCHEDULES["linear"], 4, "cpu").respace(30)
    engine.context.eval("var process = new Diffusion(SCHEDULES.linear(1000)).respace(30); undefined")
    found = engine.run("Array.from({length: 1000}, (_, i) => process.until(i + 1).timesteps)")
    assert found == [process.until(count).timesteps for count in range(1, 1001)]


class Model:
    """A made-up noise predictor with three classes and a null class, for both languages."""

    null_class = 3
    javascript = """var model = {null_class: 3, forward(x, t, label = 3) {
        return x.map((value, i) => Math.sin(3 * value + t / 100 + i) * (1 + label) / 2); }}; undefined"""

    def __call__(self, x, t, classes=None):
        classes = torch.full((len(x),), 3) if classes is None else classes
        order = torch.arange(x[0].numel()).reshape(x[0].shape)
        return torch.sin(3 * x + t.reshape(-1, 1, 1, 1) / 100 + order) * (1 + classes.reshape(-1, 1, 1, 1)) / 2


def test_the_page_has_every_sampler_of_the_program(engine):
    assert engine.run("Object.keys(SAMPLERS)") == list(SAMPLERS)
    assert engine.run("TAKE_ETA") == [name for name in SAMPLERS if takes_eta(name)]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "ddpm"},
        {"sampler": "ddim", "guidance_scale": 0.0},
        {"sampler": "ddim", "eta": 0.7, "guidance_scale": -1.0},
        {"sampler": "dpmpp_2m", "guidance_interval": (0.2, 0.7)},
        {"sampler": "dpmpp_2m", "eta": 1.0, "classes": None, "guidance_scale": 0.0},
        {"sampler": "heun"},
        {"sampler": "ipndm", "guidance_scale": 0.0},
        {"sampler": "ddim", "start_fraction": 0.6},
        {"sampler": "ddpm", "start_fraction": 0.05},
    ],
    ids=str,
)
def test_trajectories_from_the_same_noise_are_those_of_the_program(engine, changes):
    how = {"classes": [1], "guidance_scale": 2.0, "steps": 12, "eta": 0.0, "guidance_interval": (0.0, 1.0), **changes}
    process = Diffusion(1000, SCHEDULES["linear"], 4, "cpu")
    noise = torch.randn(13, *SHAPE, generator=torch.Generator().manual_seed(5))
    settings = {**how, "label": how["classes"][0] if how["classes"] else None}
    engine.put("noise", noise)
    engine.put("start", start := torch.linspace(-1, 1, 48).reshape(SHAPE[1:]))
    if "start_fraction" in how:
        how["start_image"] = start
    generator = torch.Generator().manual_seed(5)
    wanted = list(process.sample_trajectory(Model(), 4, 1, generator=generator, **how))

    engine.context.eval(Model.javascript)
    text = repr(settings).replace("None", "null").replace("(", "[").replace(")", "]")
    start = "start_image: start," if "start_image" in how else ""
    engine.context.eval(f"""var drawn = 0, settings = {{{start} ...{text}}};
        var draw = () => noise.slice(48 * drawn, 48 * ++drawn);
        var found = [...sample_trajectory(new Diffusion(SCHEDULES.linear(1000)), model, settings, draw)]; undefined""")
    assert engine.run("found.map((step) => step.t)") == [t for t, _, _ in wanted]
    for i, (_, x, x_zero) in enumerate(wanted):
        np.testing.assert_allclose(engine.floats(f"found[{i}].x"), x.ravel(), atol=2e-4)
        np.testing.assert_allclose(engine.floats(f"found[{i}].x_zero"), x_zero.ravel(), atol=2e-4)


def test_noise_is_standard_normal_and_that_of_its_seed(engine):
    noise = engine.floats("noise_of(7, 100000)()")
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**3).mean()) < 0.05
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01
    assert (engine.floats("noise_of(7, 100)()") == noise[:100]).all()
    assert abs(np.corrcoef(engine.floats("noise_of(8, 100000)()"), noise)[0, 1]) < 0.01
