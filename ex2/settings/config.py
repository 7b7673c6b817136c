"""The settings of a run: every field of `Config` is a flag. Needs no torch, so that --help is quick."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from ex2.data.sets import DATASETS, SQUARES
from ex2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def names_in(file: str, table: str) -> tuple[str, ...]:
    """The names in a table of a module (keys of a dict, or entries of a tuple), without the seconds of importing it."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if table in [getattr(target, "id", None) for target in targets]:
            return tuple(ast.literal_eval(entry) for entry in getattr(node.value, "keys", None) or node.value.elts)
    raise KeyError(f"{file} has no table {table}")


WEIGHTS = {"ema": "ema", "raw": "model"}  # choices of the command line -> entries of a checkpoint
SMALLEST, LARGEST, MAX_INTEGER = 1e-30, 1e9, 10**9  # of a setting that gives no limits of its own
SWITCH, SEEDS, SCALES = ("auto", "on", "off"), 2**32 - 1, {"minimum": -1000, "maximum": 1000}
TRAINING_GROUPS = ("data", "diffusion process", "model", "training")  # what a resumed run must have in common


def setting(group: str, default, help: str, **rules):
    """A Config field. Its type is that of its annotation, see `kind_of`.

    Its rules: `minimum`, `maximum`, `above`, `choices`, `path`; for the command line `nargs`, and `off`, the help of
    its --no_ form.
    """
    return field(default=default, metadata={"group": group, "help": help, **rules})


GROUPS = ("run", "data", "access to the data", "diffusion process", "model", "training", "evaluation", "sampling")
run, data, access, process, model, training, evaluation, sampling = (partial(setting, group) for group in GROUPS)


def kind_of(f: dataclasses.Field) -> type:
    """bool, int, float or str: the type of a setting's value, or of each value where there are several."""
    return {"bool": bool, "int": int, "float": float, "str": str}[re.search("bool|int|float|str", f.type)[0]]


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is the flag of the same name.

    Raises InputError: a value out of range, named with its flag and what is allowed.
    """

    run_name: str = run("DDPM", "folder of the run in <results_dir> (of compare: compare-SETTINGS)")
    results_dir: str = run("results", "folder of all runs", path=True)
    seed: int = run(0, "random seed of weights, data order, noise and samples", minimum=0, maximum=SEEDS)
    cuda: bool | None = run(None, "require a GPU (default: use one if there is one)", off="do without a GPU")
    dry_run: bool = run(False, "one batch of every phase, to see that all works")
    log_interval: int = run(100, "optimiser steps between two rows of log.csv", minimum=1)
    save_model: bool = run(True, "write ckpt.pt, from which the same command goes on")
    save_minutes: float = run(10.0, "minutes between two checkpoints within an epoch", above=0)
    resume: bool | None = run(
        None, "require a checkpoint (default: resume if there is one)", off="ignore it, start anew"
    )
    allow_changes: bool = run(False, "go on from a checkpoint of other settings")
    animation: str = run("gif", "format of animations; apng and webp are exact", choices=("gif", "apng", "webp"))
    compile: str = run("auto", "compile the network; auto: for long trainings on a GPU", choices=SWITCH)
    num_threads: int | None = run(None, "CPU threads (default: torch's)", minimum=1, maximum=1024)
    timeout_minutes: float = run(30.0, "distributed timeout in minutes", above=0, maximum=10**6)

    data_seed: int | None = data(None, "random seed of the data split (default: seed)", minimum=0, maximum=SEEDS)
    dataset: str = data("cifar10", "the data set", choices=tuple(DATASETS))
    image_size: int | None = data(
        None, "height and width in pixels (default: 32; shapes: 16, butterflies: 128)", minimum=8
    )
    flip: bool | None = data(None, "mirror training images at random (default: all but shapes)")
    square: str = data("crop", "make images square: centre crop, or pad with white", choices=SQUARES)
    label_column: str | None = data(None, "column that gives a butterfly its class")
    data_dir: str | None = access(None, "where the data set lies", path=True)
    cache_dir: str | None = access(None, "for downloaded butterflies", path=True)
    num_workers: int = access(0, "DataLoader workers", minimum=0, maximum=1024)

    timesteps: int = process(1000, "T, the number of noising steps", minimum=1, maximum=10**6)
    schedule: str = process("linear", "beta schedule", choices=names_in("ex2_diffusion.py", "SCHEDULES"))

    dim: int = model(32, "base width of the U-Net", minimum=4, maximum=4096)
    dim_mults: tuple[int, ...] = model((1, 2, 4), "width of each level over dim", nargs="+", minimum=1)
    class_free_guidance: bool = model(False, "condition on the class, for classifier-free guidance")
    p_uncond: float = model(0.1, "fraction of labels dropped in training", minimum=0, maximum=1)
    null_token: str = model("learned", "what stands for no class", choices=names_in("ex2_model.py", "NULL_TOKENS"))
    dropout: float = model(0.0, "fraction of activations dropped in training", minimum=0, maximum=0.9)

    epochs: int = training(5, "passes over the training images", minimum=1)
    batch_size: int = training(64, "images per optimiser step", minimum=1, maximum=10**6)
    lr: float = training(1e-3, "peak learning rate of AdamW", above=0)
    adam_beta1: float = training(0.9, "beta_1 of AdamW", minimum=0, maximum=0.999)
    warmup_steps: int = training(200, "learning-rate warm-up steps, at most a tenth of all steps", minimum=0)
    loss_type: str = training("l2", "error of the predicted noise", choices=("l1", "l2"))
    grad_clip: float = training(1.0, "largest gradient norm", above=0)
    ema_images: float = training(50_000.0, "EMA half-life in training images", above=0)
    min_snr: float | None = training(None, "gamma of min-SNR loss weights, say 5", above=0)
    max_minutes: float | None = training(
        None, "stop training after so many minutes, with the learning rate at zero", above=0
    )
    amp: str = training("auto", "bfloat16; auto: where the hardware computes in it", choices=SWITCH)

    eval_images: int = evaluation(512, "images of val and test that are evaluated", minimum=1)
    eval_timesteps: int = evaluation(10, "timesteps at which losses and VLB are evaluated", minimum=1)

    sampler: str = sampling(
        "ddpm", "ancestral (Eq. 8) or one for few steps", choices=names_in("ex2/samplers.py", "SAMPLERS")
    )
    sample_steps: int | None = sampling(None, "number of sampling steps (default: all T)", minimum=1)
    eta: float = sampling(0.0, "stochasticity of ddim and dpmpp_2m: 0 is the ODE, 1 ancestral", minimum=0, maximum=1)
    guidance_interval: tuple[float, float] = sampling(
        (0.0, 1.0), "fractions of T between which samples are guided", nargs=2
    )
    guidance_scale: float | None = sampling(None, "w of Eq. 11 (default: 1 if class-conditional)", **SCALES)
    sample_batch: int = sampling(100, "images that are sampled at a time", minimum=1)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if "nargs" in f.metadata:
                object.__setattr__(self, f.name, tuple(value))
            if "path" in f.metadata and isinstance(value, str):
                object.__setattr__(self, f.name, expand_path(value))
            for item in value if "nargs" in f.metadata else (value,):
                check_setting(f, item)
        for name in ("image_size", "flip"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(DATASETS[self.dataset], name))
        if not self.dim_mults:
            raise InputError("--dim_mults needs at least one level")
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

    def _check_data_settings(self) -> None:
        """Refuses settings that the data set would ignore."""
        for f in fields(self):
            of = [name for name, dataset in DATASETS.items() if f.name in dataset.settings]
            if of and self.dataset not in of and getattr(self, f.name) != f.default:
                raise InputError(f"--{f.name} is for --dataset {' or '.join(of)}, not for {self.dataset}")
        if "label_column" in DATASETS[self.dataset].settings and self.class_free_guidance and not self.label_column:
            raise InputError(f"--class_free_guidance on {self.dataset} needs --label_column, which gives the classes")

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


def expand_path(path: str) -> str:
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
    wanted = kind_of(f)
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
    if isinstance(value, float) and value and not SMALLEST <= abs(value) <= LARGEST:
        raise InputError(f"{flag} must be 0 or between {SMALLEST:g} and {LARGEST:g}, got {value:g}")
    if isinstance(value, int) and "maximum" not in rules and value > MAX_INTEGER:
        raise InputError(f"{flag} must be at most {MAX_INTEGER}, got {value}")


def config_of(checkpoint: dict, given: dict) -> Config:
    """The Config a checkpoint was trained with, with the fields in `given` replaced.

    Raises InputError: a value out of range, or settings that this version does not know.
    """
    try:
        settings = dict(checkpoint["config"])
        config = Config(**settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint's settings are not this version's ({error}): train anew") from error
    if "sampler" in given:
        given = {"eta": Config.eta, **given}  # the saved one is that of the saved sampler
    return dataclasses.replace(config, **given)


GUIDANCE_SCALES = (-1.0, 0.0, 1.0, 3.0)  # columns of the guidance grid
