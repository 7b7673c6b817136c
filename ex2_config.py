"""One run's settings: the `Config`, what is built from it, and checkpoints that rebuild themselves."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

from ex2_data import DATASETS, SQUARES, DataSplits, InputError, load_splits
from ex2_diffusion import SAMPLERS, SCHEDULES, Diffusion, check_sampling
from ex2_distributed import in_turns
from ex2_model import MAX_ATTENTION_POSITIONS, NULL_TOKENS, Unet

WEIGHTS = {"ema": "ema", "raw": "model"}  # choices of the command line -> entries of a checkpoint
SWITCH, SEEDS, SCALES = ("auto", "on", "off"), 2**32 - 1, {"minimum": -1000, "maximum": 1000}
TRAINING_GROUPS = ("data", "diffusion process", "model", "training")  # what a resumed run must have in common


def setting(default, group: str, help: str, **rules):
    """A Config field; `rules` are `minimum`, `maximum`, `choices` and, for the command line, `type` and `nargs`.

    The type is that of the default, where there is one.
    """
    if default is not None and not isinstance(default, (bool, tuple)):
        rules["type"] = type(default)
    return field(default=default, metadata={"group": group, "help": help, **rules})


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is the flag of the same name.

    Raises InputError: a value out of range, named with its flag and what is allowed.
    """

    run_name: str = setting("DDPM", "run", "everything of the run lands in <results_dir>/<run_name>/")
    results_dir: str = setting("results", "run", "folder of all runs", path=True)
    seed: int = setting(0, "run", "of weights, data order, noise and samples", minimum=0, maximum=SEEDS)
    cuda: Optional[bool] = setting(None, "run", "insist on the GPU, or stay off it (default: where there is one)")
    dry_run: bool = setting(False, "run", "one batch of every phase, to see that all works")
    log_interval: int = setting(100, "run", "optimiser steps between two rows of log.csv", minimum=1)
    save_model: bool = setting(True, "run", "write ckpt.pt, from which the same command goes on")
    save_minutes: float = setting(10.0, "run", "minutes between two checkpoints within an epoch", above=0)
    resume: Optional[bool] = setting(None, "run", "insist on a checkpoint, or start anew (default: go on from one)")
    allow_changes: bool = setting(False, "run", "go on from a checkpoint of other settings")
    compile: str = setting("auto", "run", "compile the network; auto: for long trainings on a GPU", choices=SWITCH)
    num_threads: Optional[int] = setting(None, "run", "CPU threads (default: torch's choice)", type=int, minimum=1)
    timeout_minutes: float = setting(30.0, "run", "how long a process may keep the others waiting", above=0)

    data_seed: Optional[int] = setting(None, "data", "of the split (default: seed)", type=int, minimum=0, maximum=SEEDS)
    dataset: str = setting("cifar10", "data", "the data set", choices=DATASETS)
    image_size: Optional[int] = setting(None, "data", "pixels (default: 32; butterflies: 128)", type=int, minimum=8)
    flip: Optional[bool] = setting(None, "data", "mirror training images at random (default: all but shapes)")
    square: str = setting("crop", "data", "what makes images square", choices=SQUARES)
    label_column: Optional[str] = setting(None, "data", "column that gives a butterfly its class", type=str)
    data_dir: Optional[str] = setting(None, "access to the data", "where the data set lies", type=str, path=True)
    cache_dir: Optional[str] = setting(None, "access to the data", "for downloaded butterflies", type=str, path=True)
    num_workers: int = setting(0, "access to the data", "processes that read image files", minimum=0)

    timesteps: int = setting(1000, "diffusion process", "T, the number of noising steps", minimum=1, maximum=10**6)
    schedule: str = setting("linear", "diffusion process", "beta schedule", choices=tuple(SCHEDULES))

    dim: int = setting(32, "model", "base width of the U-Net", minimum=4, maximum=4096)
    dim_mults: tuple = setting((1, 2, 4), "model", "width of each level over dim", type=int, nargs="+", minimum=1)
    class_free_guidance: bool = setting(False, "model", "condition on the class, for classifier-free guidance")
    p_uncond: float = setting(0.1, "model", "share of labels dropped in training", minimum=0, maximum=1)
    null_token: str = setting("learned", "model", "what stands for no class", choices=NULL_TOKENS)
    dropout: float = setting(0.0, "model", "share of activations dropped", minimum=0, maximum=0.9)

    epochs: int = setting(5, "training", "passes over the training images", minimum=1)
    batch_size: int = setting(64, "training", "images per optimiser step", minimum=1, maximum=10**6)
    lr: float = setting(1e-3, "training", "peak learning rate of AdamW", above=0)
    adam_beta1: float = setting(0.9, "training", "share of the mean gradient AdamW keeps", minimum=0, maximum=0.999)
    warmup_steps: int = setting(200, "training", "steps to the peak, at most a tenth", minimum=0)
    loss_type: str = setting("l2", "training", "error of the predicted noise", choices=("l1", "l2"))
    grad_clip: float = setting(1.0, "training", "largest gradient norm", above=0)
    ema_images: float = setting(50_000.0, "training", "in which the averaged weights forget half", above=0)
    min_snr: Optional[float] = setting(None, "training", "gamma of min-SNR loss weights, say 5", type=float, above=0)
    max_minutes: Optional[float] = setting(None, "training", "of training at most, annealed", type=float, above=0)
    amp: str = setting("auto", "training", "bfloat16; auto: where the hardware computes in it", choices=SWITCH)

    eval_images: int = setting(512, "evaluation", "images of val and test that are evaluated", minimum=1)
    eval_timesteps: int = setting(10, "evaluation", "times of losses and bound", minimum=1)

    sampler: str = setting("ddpm", "sampling", "ancestral (Eq. 8) or one for few steps", choices=SAMPLERS)
    sample_steps: Optional[int] = setting(None, "sampling", "times visited (default: all T)", type=int, minimum=1)
    eta: float = setting(0.0, "sampling", "share of fresh noise of ddim and dpmpp_2m", minimum=0, maximum=1)
    guidance_interval: tuple = setting((0.0, 1.0), "sampling", "shares of T that are guided", type=float, nargs=2)
    guidance_scale: Optional[float] = setting(None, "sampling", "w of Eq. 11 (default: 1)", type=float, **SCALES)
    sample_batch: int = setting(100, "sampling", "images that are sampled at a time", minimum=1)

    def __post_init__(self):
        if self.image_size is None:
            object.__setattr__(self, "image_size", 128 if self.dataset == "butterflies" else 32)
        if self.flip is None:
            object.__setattr__(self, "flip", self.dataset != "shapes")
        for f in fields(self):
            value = getattr(self, f.name)
            if "nargs" in f.metadata:
                object.__setattr__(self, f.name, tuple(value))
            if "path" in f.metadata and isinstance(value, str):
                object.__setattr__(self, f.name, expanded(value))
            for item in value if "nargs" in f.metadata else (value,):
                check_setting(f, item)
        if not self.dim_mults:
            raise InputError("--dim_mults needs at least one level")
        try:
            check_sampling(self.sampler, self.eta, self.guidance_interval)
        except ValueError as error:
            raise InputError(f"--{error}") from error
        if self.sample_steps is not None and self.sample_steps > self.timesteps:
            raise InputError(f"--sample_steps must be at most --timesteps ({self.timesteps}), got {self.sample_steps}")
        self._check_class_settings()
        self._check_data_settings()
        if self.run_name in ("", ".", "..") or Path(self.run_name).name != self.run_name:
            raise InputError(f"--run_name must be a plain folder name, got {self.run_name!r}")
        factor = 2 ** (len(self.dim_mults) - 1)
        if self.image_size % factor:
            halved = f"can't be halved {len(self.dim_mults) - 1} times, as --dim_mults asks"
            raise InputError(f"--image_size {self.image_size} {halved}: use a multiple of {factor}")
        inner = self.image_size // factor
        if inner**2 > MAX_ATTENTION_POSITIONS:
            left = f"leaves {inner}x{inner} positions to the innermost attention, at most 32x32 fit"
            raise InputError(f"--image_size {self.image_size} {left}: add a level to --dim_mults")

    def _check_data_settings(self) -> None:
        """Refuses settings that the data set would ignore."""
        if self.data_dir is not None and self.dataset == "shapes":
            raise InputError("--data_dir: the shapes are drawn and not read; give --dataset folder or cifar10 with it")
        if self.square != "crop" and self.dataset not in ("folder", "butterflies"):
            raise InputError(f"--square {self.square}: the images of {self.dataset} are square already")
        for name in ("label_column", "cache_dir"):
            if getattr(self, name) is not None and self.dataset != "butterflies":
                raise InputError(f"--{name} is for --dataset butterflies")
        if self.dataset == "butterflies" and self.class_free_guidance and self.label_column is None:
            raise InputError("--class_free_guidance on butterflies needs --label_column, which gives the classes")

    def _check_class_settings(self) -> None:
        """Refuses settings that a model without classes would ignore."""
        if self.class_free_guidance:
            if self.guidance_scale and self.p_uncond == 0:
                raise InputError("--guidance_scale needs a model that also learnt without labels (--p_uncond above 0)")
            return
        for f in fields(self):
            if f.name in ("p_uncond", "null_token", "guidance_interval") and getattr(self, f.name) != f.default:
                raise InputError(f"--{f.name} is for class-conditional models: give --class_free_guidance with it")
        if self.guidance_scale:
            raise InputError("--guidance_scale needs a class-conditional model: train with --class_free_guidance")

    @property
    def can_guide(self) -> bool:
        """Whether the model predicts both with and without a class, as Eq. 11 needs."""
        return self.class_free_guidance and self.p_uncond > 0

    @property
    def run_dir(self) -> Path:
        """Where the run's files go; a dry run keeps out of the way of the real one."""
        return Path(self.results_dir) / (f"{self.run_name}-dry_run" if self.dry_run else self.run_name)

    @property
    def sampling(self) -> dict:
        """The keyword arguments of `Diffusion.sample` that are the user's choice."""
        default_scale = 1.0 if self.can_guide else 0.0
        return {
            "guidance_scale": default_scale if self.guidance_scale is None else self.guidance_scale,
            "sampler": self.sampler,
            "steps": min(2, self.timesteps) if self.dry_run else self.sample_steps,
            "eta": self.eta,
            "guidance_interval": self.guidance_interval,
        }


def expanded(path: str) -> str:
    """A path as a shell reads it: ~ is the home folder, $NAME an environment variable. Used for every path.

    Raises InputError: there is no such home folder or variable.
    """
    if os.path.isabs(path) and os.path.exists(path):  # expanded before; its name may hold a $
        return path
    whole = os.path.expandvars(os.path.expanduser(path))
    if whole.startswith("~") or re.search(r"\$\w|\$\{", whole):
        raise InputError(f"{path}: no such home folder or environment variable; write the path in full")
    return whole


def check_setting(f: dataclasses.Field, value) -> None:
    """Raises an InputError where `value` breaks a rule of the Config field `f`."""
    rules, flag = f.metadata, f"--{f.name}"
    if value is None and f.default is None:
        return
    wanted = rules.get("type", bool)
    if not isinstance(value, (int, float) if wanted is float else wanted) or (
        wanted is int and isinstance(value, bool)
    ):
        raise InputError(f"{flag} must be of type {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag} must be finite, got {value}")
    if "choices" in rules and value not in rules["choices"]:
        raise InputError(f"{flag} must be one of {', '.join(rules['choices'])}; got {value!r}")
    if "minimum" in rules and value < rules["minimum"]:
        raise InputError(f"{flag} must be at least {rules['minimum']}, got {value}")
    if "maximum" in rules and value > rules["maximum"]:
        raise InputError(f"{flag} must be at most {rules['maximum']}, got {value}")
    if "above" in rules and value <= rules["above"]:
        raise InputError(f"{flag} must be above {rules['above']}, got {value}")


def load_data(config: Config) -> DataSplits:
    """The data set of a run; see `load_splits`."""

    names = ("data_dir", "image_size", "num_workers", "square", "cache_dir", "label_column")
    settings = {name: getattr(config, name) for name in names}
    seed = config.seed if config.data_seed is None else config.data_seed
    return in_turns(lambda: load_splits(config.dataset, seed=seed, **settings), "the data")


def build_model(config: Config, num_classes: int) -> Unet:
    """The U-Net of a run, with new weights.

    Raises InputError: settings that the U-Net refuses.
    """
    names = ("dim", "dim_mults", "class_free_guidance", "p_uncond", "null_token", "dropout")
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


def config_of(checkpoint: dict, given: dict) -> Config:
    """The Config a checkpoint was trained with, with the fields in `given` replaced.

    Raises InputError: a value out of range, or settings that this version does not know.
    """
    try:
        settings = dict(checkpoint["config"])
        if isinstance(settings.get("compile"), bool):  # as of versions until 2026-11-26
            settings["compile"] = "on" if settings["compile"] else "auto"
        config = Config(**settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's settings are not this version's ({error}): train anew") from error
    return dataclasses.replace(config, **given)


def restore_model(checkpoint: dict, config: Config, device, weights: str = "ema") -> Unet:
    """The trained U-Net in eval mode on `device`, with its averaged ("ema") or last ("raw") weights.

    Raises InputError: the checkpoint lacks them, or they are of a U-Net of other sizes.
    """
    model = build_model(config, len(checkpoint["class_names"]))
    state = checkpoint.get(WEIGHTS[weights])
    if state is None:
        there = [name for name, key in WEIGHTS.items() if checkpoint.get(key) is not None]
        raise InputError(f"the checkpoint holds no {weights} weights: give --weights {there[0] if there else 'raw'}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"the checkpoint's weights don't fit the model its settings describe: {what}") from error
    return model.to(device).eval()
