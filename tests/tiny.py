"""What several files of tests need: a run that takes a second, small data sets, a refusal of one line."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

import ex2_main
import ex2_viz
from ex2.data.images import ImageSet
from ex2.settings.config import Config
from ex2.training import run
from ex2_train import train

ROOT = Path(__file__).resolve().parents[1]

TINY = "--dataset shapes --image_size 8 --dim 8 --dim_mults 1 --timesteps 30 --batch_size 100 --epochs 1".split()
TINY += "--eval_images 20 --eval_timesteps 3 --sample_steps 3 --schedule cosine --no_cuda".split()


def random_set(count, size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=g)
    return ImageSet(images, torch.arange(count) % 3)


def tiny_config(results_dir, **changes):
    settings = {
        "dataset": "shapes",
        "image_size": 8,
        "dim": 8,
        "dim_mults": (1,),
        "timesteps": 50,
        "batch_size": 16,
        "epochs": 2,
        "results_dir": str(results_dir),
        "eval_images": 8,
        "eval_timesteps": 2,
        "class_free_guidance": True,
    }
    config = Config(**{**settings, **changes})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def tiny_splits():
    sets = [random_set(40), random_set(8), random_set(8)]
    return SimpleNamespace(train=sets[0], val=sets[1], test=sets[2], class_names=("a", "b", "c"))


def fit(config, splits, diffusor):
    """Trains a run to its end, or goes on with it; the model with its EMA weights."""
    return run.fit(run.open_run(config, splits, diffusor))


def train_epoch(training):
    """The rest of the current epoch of a training, as `fit` does it; its mean loss."""
    hooks = {"meter": training.meter, "take_step": training.take_step, "after_step": training.after_step}
    parts = (training.network, training.loader, training.optimizer, training.diffusor, training.epochs_done)
    with training.epoch():
        return train(*parts, training.device, training.config, **hooks)


def without_curves(patch):
    """Empty files in place of curves, each of which takes half a second. test_viz.py draws them all."""
    from ex2.report import exact_guidance, metrics, pictures, study

    def touch(plot):
        signature = inspect.signature(plot)
        return lambda *args: Path(signature.bind(*args).arguments["path"]).touch()

    plots = [(run, "plot_training"), (study, "plot_comparison")]
    plots += [(metrics, name) for name in ("plot_loss_over_t", "plot_bits_per_dim", "plot_guidance")]
    for module, name in plots:
        patch.setattr(module, name, touch(getattr(module, name)))
    names = ("plot_schedules", "plot_time_embedding", "plot_guided_densities")
    viz = SimpleNamespace(**{**vars(ex2_viz), **{name: touch(getattr(ex2_viz, name)) for name in names}})
    for module in (pictures, exact_guidance):
        patch.setattr(module, "viz", viz)


def without_evaluation(patch):
    """`train` ends after the training."""
    from ex2.evaluation import evaluate
    from ex2.report import metrics, pictures

    patch.setattr(run, "plot_training", lambda rows, path: path.touch())
    patch.setattr(evaluate, "evaluate", lambda *args: {})
    patch.setattr(metrics, "write_metrics", lambda *args: None)
    for name in ("draw_process", "draw_samples"):
        patch.setattr(pictures, name, lambda *args: None)


def rejected(argv, capsys, code=2):
    """The one line that `argv` is refused with."""
    assert ex2_main.main(argv) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def images_with_numbers(count):
    """Images whose left column holds their number and whose right column holds 255."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    images[..., 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    images[..., 1] = 255
    return ImageSet(images, torch.arange(count))


def make_tree(root, layout, size=(20, 14)):
    for name, count in layout.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i, 100, 200)).save(root / name / f"{i:03d}.png")
