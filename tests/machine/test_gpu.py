"""What only a GPU can show; skipped where there is none. `benchmarks/gpu_check.py` runs it with its measurements."""

import subprocess
import sys

import pytest
import torch
from tiny import ROOT, random_set, tiny_config, train_epoch

from ex2.data.loader import make_loader
from ex2.machine.cuda_graphs import GraphReplay
from ex2.machine.inference import InferenceModel
from ex2.noise import ImageNoise
from ex2.settings.build import build_model
from ex2.training.run import Training
from ex2_diffusion import SCHEDULES, Diffusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def trained(tmp_path, replayed, **changes):
    """(losses, weights, the training) of four epochs on 40 images in batches of 9, the last of which is smaller."""
    config = tiny_config(tmp_path, batch_size=9, dim=16, save_model=False, compile="off", **changes)
    torch.manual_seed(0)
    model = build_model(config, 3).to(GPU)
    loader = make_loader(random_set(40), 9, GPU, train=True, flip=True)
    training = Training(model, config, Diffusion(50, SCHEDULES["cosine"], 8, GPU), loader, "abc")
    training.start()
    if not replayed:
        training.step_function = training.eager_step
    losses = []
    for _ in range(4):
        losses.append(train_epoch(training))
        training.end_epoch(losses[-1], 1.0)
    return losses, [p.detach().clone() for p in training.ema.model.parameters()], training


@pytest.mark.parametrize("amp", ["off", "auto"])
def test_a_replayed_training_is_the_eager_one_to_rounding(tmp_path, capsys, amp):
    settings = {"amp": amp, "dropout": 0.1, "p_uncond": 0.2}
    eager, weights, _ = trained(tmp_path, False, **settings)
    replayed, others, training = trained(tmp_path, True, **settings)
    assert isinstance(training.step_function, GraphReplay) and training.step_function.checked
    assert "can't be replayed" not in capsys.readouterr().out
    assert replayed == pytest.approx(eager, rel=1e-2)
    for a, b in zip(weights, others):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def test_replays_have_new_random_numbers_and_learning_rates(tmp_path):
    _, _, training = trained(tmp_path, True)
    batch = next(iter(training.loader))
    training.epochs_done = training.step // training.steps_per_epoch
    losses = set()
    for _ in range(4):
        losses.add(training.take_step(*batch)[0].item())
    assert len(losses) == 4
    assert float(training.optimizer.param_groups[0]["lr"]) == pytest.approx(training.lr)


def test_replayed_samples_are_the_eager_ones(tmp_path):
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    model = build_model(config, 3).to(GPU).eval()
    diffusor = Diffusion(50, SCHEDULES["linear"], 8, GPU)
    options = {"classes": torch.arange(6) % 3, "guidance_scale": 1.0, "sampler": "ddim", "steps": 10}
    eager, replayed = InferenceModel(model), InferenceModel(model)
    eager.replayed = eager.predict
    images = [diffusor.sample(m, 8, 6, generator=ImageNoise(0, 0, 6, GPU), **options) for m in (eager, replayed)]
    assert replayed.replayed.checked and not replayed.replayed.failed
    torch.testing.assert_close(*images, rtol=1e-2, atol=1e-2)


def test_the_same_seed_gives_the_same_noise_on_the_gpu_whatever_the_batch():
    whole = ImageNoise(3, 0, 40, GPU).draw((40, 3, 4, 4))
    assert whole.device.type == "cuda"
    assert torch.equal(ImageNoise(3, 20, 7, GPU).draw((7, 3, 4, 4)), whole[20:27])


WAITS = """
import torch
from ex2.machine.cuda_graphs import GraphReplay

replayed = GraphReplay(lambda x: (x * float(torch.rand((), device="cuda").item()),))
for _ in range(6):
    assert replayed(torch.ones(3, device="cuda"))[0].isfinite().all()
assert torch.rand(2, device="cuda").unique().numel() == 2
"""


def test_what_cannot_be_recorded_goes_on_eagerly_and_draws_random_numbers():
    """In a process of its own: before torch 2.13 its allocator takes itself for recorded from then on."""
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can't be replayed on this GPU" in done.stdout


def test_both_shapes_of_an_epoch_are_replayed_and_share_their_memory(tmp_path):
    _, _, training = trained(tmp_path, True)
    assert len(training.step_function.graphs) == 2 and training.step_function.checked
