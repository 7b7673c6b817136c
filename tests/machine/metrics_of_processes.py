"""Metrics that must not depend on the number of processes; `test_processes.py` runs this in one and in two.

    torchrun --standalone --nproc_per_node=2 tests/machine/metrics_of_processes.py OUT

writes OUT/<rank>.pt, a dict of tensors, from every process.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).resolve().parents[levels]) for levels in (1, 2)]

from tiny import train_epoch  # noqa: E402

from ex2.data.images import DataSplits, ImageSet  # noqa: E402
from ex2.data.loader import make_loader  # noqa: E402
from ex2.evaluation.classifier import accuracy, features_of, train_classifier  # noqa: E402
from ex2.evaluation.samples import build_evaluator, evaluate_samples, shared_samples  # noqa: E402
from ex2.evaluation.vlb import bits_per_dim  # noqa: E402
from ex2.machine.processes import all_gather, connect_processes, rank, world_size  # noqa: E402
from ex2.settings.build import build_diffusion, build_model  # noqa: E402
from ex2.settings.config import Config  # noqa: E402
from ex2.training.run import Training  # noqa: E402
from ex2_diffusion import Diffusion, linear_beta_schedule  # noqa: E402
from ex2_model import Attention, LinearAttention  # noqa: E402
from ex2_train import draw_timesteps_and_noise, test  # noqa: E402

IMAGES = 21  # in batches of 8, 8 and 5, none of which three processes share evenly


def random_set(count, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=g)
    return ImageSet(images, torch.arange(count) % 3)


def new_state(folder, **changes):
    """A training of a tiny model that is about to take its first step, its process and its loader."""
    settings = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 30, "batch_size": 8, "schedule": "cosine"}
    settings.update(
        results_dir=str(folder), sample_steps=3, log_interval=2, p_uncond=0.0, amp="off", class_free_guidance=True
    )
    config = Config(**{**settings, **changes})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_model(config, 3)
    for layer in model.modules():  # attention starts at zero, and is to have a part in every figure
        if isinstance(layer, Attention):
            layer.to_out.reset_parameters()
        elif isinstance(layer, LinearAttention):
            layer.to_out[1].reset_parameters()
    loader = make_loader(random_set(IMAGES, 0), 8, "cpu", train=True, flip=True, part=(rank(), world_size()))
    state = Training(model, config, build_diffusion(config, "cpu"), loader, "abc")
    state.start()
    return state, state.diffusor, loader


def gradients(folder, **changes) -> dict:
    """The averaged gradient of every step of an epoch, all of the same weights; and what the loader handed out."""
    state, diffusor, loader = new_state(folder, **changes)
    images, found = [], {}
    for step, (x, labels) in enumerate(loader):
        rows = state.prepare_step()
        t, noise = draw_timesteps_and_noise(x, diffusor.timesteps, rows)
        classes = labels if state.config.class_free_guidance else None
        state.network.zero_grad()
        weight = 1.0 if rows is None else rows.weight
        (weight * diffusor.p_losses(state.network, x, t, noise, classes=classes)).backward()
        found[f"gradient of step {step}"] = torch.cat([p.grad.flatten() for p in state.model.parameters()])
        found[f"images of step {step}"] = torch.tensor(loader.plan.images_in(step))
        images += [x] if weight > 0 else []
        state.step += 1
    seen = torch.cat([part for own in all_gather(images, "images") for part in own])
    found["images seen, sorted"] = seen.flatten(1).sort(0).values
    return found


def epoch(folder) -> dict:
    """Loss, number of steps and weights after one epoch of the real training loop."""
    state, _, _ = new_state(folder)
    loss = train_epoch(state)
    weights = torch.cat([p.detach().flatten() for p in state.ema.model.parameters()])
    return {"epoch loss": torch.tensor(loss), "steps": torch.tensor(state.step), "average": weights}


def evaluation(folder) -> dict:
    """Losses, bound, samples and judged samples of a model that no process trained."""
    state, diffusor, _ = new_state(folder)
    model = state.ema.model.eval()
    loader = make_loader(random_set(IMAGES, 1), 8, "cpu")
    losses = test(model, loader, diffusor, "cpu", state.config)
    few = test(model, make_loader(random_set(1, 1), 8, "cpu"), diffusor, "cpu", state.config)
    bound = bits_per_dim(model, loader, diffusor, 5)
    # Ends at an alpha-bar of 0.006: by the cosine schedule's, which is tiny, estimates of x_0 would divide rounding.
    mild = Diffusion(30, lambda t: linear_beta_schedule(1e-4, 0.3, t), 8, "cpu")
    samples = shared_samples(mild, model, 7, 2, 0, classes=torch.arange(7) % 3, steps=3)
    splits = DataSplits(random_set(40, 2), random_set(20, 3), random_set(20, 4), ("a", "b", "c"))
    config = dataclasses.replace(state.config, dry_run=True)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    evaluator = build_evaluator(splits, "cpu", config, folder, 16)
    evaluated = evaluate_samples(evaluator, model, splits, diffusor, config)
    row, copied = evaluated["by_scale"][0], evaluated["memorisation"]
    classifier = train_classifier(splits.train, 3, "cpu", flip=False, epochs=1)
    return {
        "l2": torch.tensor(losses["l2"]),
        "l2 of one image": torch.tensor(few["l2"]),
        "images": torch.tensor([losses["images"], few["images"], bound["images"], row["count"]]),
        "bound": torch.tensor([bound["beta"]["total"], *bound["beta_tilde"]["terms"]]),
        "samples": samples,
        "kid, precision, recall, accuracy": torch.tensor([row[k] for k in ("kid", "precision", "recall")]),
        "nearest training images": torch.tensor(
            [*copied["pixels"]["median"].values(), copied["pixels"]["fraction_nearer"]]
        ),
        "features": features_of(classifier, splits.test, "cpu"),
        "accuracy of the classifier": torch.tensor(accuracy(classifier, splits.test, "cpu")),
    }


def figures(folder) -> dict:
    """Everything above."""
    found = {f"conditional, {name}": value for name, value in gradients(folder).items()}
    plain = gradients(folder, class_free_guidance=False, p_uncond=0.1)
    found.update({f"unconditional, {name}": value for name, value in plain.items()})
    return {**found, **epoch(folder), **evaluation(folder)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with connect_processes(False, 1):
        torch.save(figures(out / "runs"), out / f"{rank()}.pt")
