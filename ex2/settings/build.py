"""What is made of settings: data, model, diffusion process, and the model of a checkpoint."""

from __future__ import annotations

from ex2.data.images import DataSplits
from ex2.data.load import load_splits
from ex2.data.sets import UNLABELLED
from ex2.errors import InputError
from ex2.machine.processes import main_process_first
from ex2.samplers import check_sampling
from ex2.settings.config import WEIGHTS, Config
from ex2_diffusion import SCHEDULES, Diffusion
from ex2_model import MAX_ATTENTION_POSITIONS, Unet


def load_data(config: Config) -> DataSplits:
    """The data set of a run; see `load_splits`."""
    names = ("data_dir", "image_size", "num_workers", "square", "cache_dir", "label_column")
    settings = {name: getattr(config, name) for name in names}
    seed = config.seed if config.data_seed is None else config.data_seed
    splits = main_process_first(lambda: load_splits(config.dataset, seed=seed, **settings), "the data")
    if config.class_free_guidance and splits.class_names == UNLABELLED:
        raise InputError(f"--class_free_guidance: the images in {config.data_dir} have no classes: give each a folder")
    return splits


def build_model(config: Config, num_classes: int) -> Unet:
    """The U-Net of a run, with new weights.

    Raises InputError: settings that the U-Net refuses.
    """
    names = ("dim", "dim_mults", "class_free_guidance", "p_uncond", "null_token", "dropout")
    inner = config.image_size // 2 ** (len(config.dim_mults) - 1)
    if inner**2 > MAX_ATTENTION_POSITIONS:
        left = f"leaves {inner}x{inner} positions to the innermost attention, at most 32x32 fit"
        raise InputError(f"--image_size {config.image_size} {left}: add a level to --dim_mults")
    try:
        return Unet(num_classes=num_classes, **{name: getattr(config, name) for name in names})
    except ValueError as error:
        raise InputError(str(error)) from error


def build_diffusion(config: Config, device) -> Diffusion:
    """The diffusion process of a run.

    Raises InputError: a schedule that does not work for that many timesteps.
    """
    try:
        return Diffusion(config.timesteps, SCHEDULES[config.schedule], config.image_size, device)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_buildable(config: Config) -> None:
    """Raises an InputError for settings of which no model, process or sampler can be made, before any work is done.

    It makes the model: torch's "meta" device would save its memory, and takes three seconds to load.
    """
    try:
        check_sampling(config.sampler, config.eta, config.guidance_interval)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    build_diffusion(config, "cpu")
    build_model(config, num_classes=2)


def restore_model(checkpoint: dict, config: Config, device, weights: str = "ema") -> Unet:
    """The trained U-Net in eval mode on `device`, with its EMA ("ema") or last ("raw") weights.

    Raises InputError: they are of a U-Net of other sizes.
    """
    model = build_model(config, len(checkpoint["class_names"]))
    try:
        model.load_state_dict(checkpoint[WEIGHTS[weights]])
    except RuntimeError as error:
        what = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"the checkpoint's weights don't fit the model its settings describe: {what}") from error
    return model.to(device).eval()
