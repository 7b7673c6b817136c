"""Guards against what other libraries were seen to do without a word (docs/other-libraries.md)."""

import csv
import math
from copy import deepcopy
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch
import torch.nn.functional as F
from tiny import fit, tiny_config, tiny_splits, train_epoch

from ex2.data.images import ImageSet, reverse_transform, to_model_range
from ex2.evaluation.evaluate import evaluate
from ex2.noise import sample_in_batches
from ex2.optimisation import EMA
from ex2.training import run
from ex2_model import Unet
from ex2_viz import save_images


def test_group_norms_of_flat_images_are_exact_on_the_cpu():
    """torch's float32 group norm loses all but two digits on channels-last inputs of mean / deviation 100.

    The U-Net's own inputs are far from that, even of a white image with the noise of the first timestep, whose ratio is
    160: no group of channels is flat.
    """
    torch.manual_seed(0)
    model, ratios, errors = Unet(dim=16, dim_mults=(1, 2)).eval(), [], []

    def compare(norm, inputs, output):
        x = inputs[0].double()
        groups = x.reshape(len(x), norm.num_groups, -1)
        ratios.append((groups.mean(-1).abs() / groups.std(-1)).max().item())
        exact = F.group_norm(x, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
        errors.append((output - exact).abs().max().item())

    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(compare)
    with torch.no_grad():
        model(1 + 0.006 * torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))
    assert len(ratios) > 15 and max(ratios) < 10
    assert max(errors) < 3e-5


def test_all_256_levels_survive_every_path_from_pixels_to_pixels(tmp_path):
    """torchvision's to_pil_image cuts floats: 63 of the levels lose one."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats, _ = ImageSet(levels, torch.zeros(1, dtype=torch.long))[0]
    for images in (to_model_range(levels), floats[None], to_model_range(levels).double()):
        assert torch.equal(reverse_transform(images), levels)
        save_images(images, [tmp_path / "levels.png"])
        saved = torch.from_numpy(imageio.imread(tmp_path / "levels.png")).permute(2, 0, 1)
        assert torch.equal(saved, levels[0])


@pytest.mark.parametrize("ema_images, images, expected", [(50_000, 16_000, None), (1600, 64_000, 1600 / math.log(2))])
def test_the_average_is_as_old_as_the_ramp_says(ema_images, images, expected):
    """Mean age of what the EMA holds, in images: h / ln 2 at half-life h; with h a tenth of the images, 0.126 of them.

    After 1000 calls that of ema-pytorch is 499 calls old.
    """
    counter = torch.nn.Linear(1, 1, bias=False)
    counter.weight.data.zero_()
    average = EMA(counter, ema_images=ema_images, batch_size=16)
    for step in range(images // 16):
        counter.weight.data.fill_(16.0 * (step + 1))
        average.set_step(step)
        average.update(list(counter.parameters()))
    k = math.log(2) / 0.1
    lag = images - average.model.weight.item()
    assert lag == pytest.approx(images / (1 + k) if expected is None else expected, rel=0.02)


def test_logs_hold_numbers(tmp_path, diffusor):
    """A tensor kept for a mean would keep its batch, as the scalar of F.mse_loss does."""
    config = tiny_config(tmp_path, epochs=1, log_interval=1)
    fit(config, tiny_splits(), diffusor)
    with open(config.run_dir / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 2
    for row in rows:
        assert all(math.isfinite(float(cell)) for cell in row.values() if cell)


def test_evaluation_in_the_middle_of_a_training_leaves_its_bits_alone(tmp_path, diffusor):
    """torchmetrics' KID draws from the global generator, so that measuring changes the training after it."""
    weights, evaluations = [], []
    for name in ("plain", "evaluated"):
        config, splits = tiny_config(tmp_path, run_name=name), tiny_splits()
        training = run.open_run(config, splits, diffusor)
        go_on = training.after_step

        def after_step(*args, training=training, go_on=go_on, splits=splits, config=config, name=name):
            if name == "evaluated" and training.step == 1:
                model = deepcopy(training.ema.model).eval()
                evaluations.append(evaluate(model, splits, diffusor, replace(config, dry_run=True)))
                list(sample_in_batches(diffusor, model, 2, 2, 0, classes=torch.tensor([0, 1]), steps=2))
                torch.rand(7)
            return go_on(*args)

        training.after_step = after_step
        train_epoch(training)
        assert training.step == 3
        weights.append([parameter.clone() for parameter in training.network.parameters()])
    assert len(evaluations) == 1 and all(map(torch.equal, *weights))
