"""A submission: its modules and functions are found by the skeleton's names, and called whatever their arguments are
called.

This file imports nothing of ours, so that a submission with modules of the same names can be judged.
"""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = 10  # of the process that most facts are about
BETAS = torch.linspace(0.02, 0.3, T)  # large, so that slips show
TIMES = torch.arange(T)
CLASSES, NULL = 5, 5
PREFIXES = ("ex02_", "ex2_")
# A role, and how solutions call it.
NAMES = {
    "x_zero": "x_zero x_0 x0 x_start x",
    "x": "x x_t img",
    "t": "t time time_step timestep ts",
    "noise": "noise eps",
    "model": "model denoise_model denoiser net",
    "classes": "classes labels label y c cls class_labels class_label class_cond cond",
    "guidance_scale": "guidance_scale w cfg_scale guidance guidance_weight guide_w scale",
    "class_free_guidance": "class_free_guidance classifier_free_guidance",
    "t_index": "t_index index i",
    "image_size": "image_size img_size size",
    "img_size": "img_size image_size size",
    "get_noise_schedule": "get_noise_schedule noise_schedule schedule beta_schedule",
    "n_images": "n_images num_images n",
    "testloader": "testloader test_loader loader dataloader",
    "store_path": "store_path save_path path folder",
    "reverse_transform": "reverse_transform rtransform transform",
}


class Missing(Exception):
    """A part of the exercise that isn't there, or is an empty stub."""


class OnCpu(TorchFunctionMode):
    """The CPU in place of a GPU that a solution insists on."""

    used = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            OnCpu.used = True
            return args[0]
        return function(*map(self.swap, args), **{name: self.swap(value) for name, value in (kwargs or {}).items()})

    def swap(self, value):
        if not isinstance(value, (str, torch.device)) or not str(value).startswith("cuda"):
            return value
        OnCpu.used = True
        return torch.device("cpu")


class Stub(nn.Module):
    """Stands for a U-Net: `predict(x, t)` is its noise; it remembers how it was called.

    Given `without` it is conditional: 1 for a class and `without` for none, whatever `predict` says.
    """

    def __init__(self, predict=lambda x, t: torch.zeros_like(x), without: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.predict, self.without = predict, without
        self.class_free_guidance = without is not None
        self.null_class, self.num_classes, self.p_uncond = NULL, CLASSES, 0.1
        self.calls: list[SimpleNamespace] = []

    def forward(self, x, t=None, *args, **kwargs):
        for name in NAMES["t"].split():
            t = kwargs.pop(name, t)
        named = [kwargs[name] for name in NAMES["classes"].split() if name in kwargs]
        extra = (*named, *args, *kwargs.values())
        labels = next((value for value in extra if torch.is_tensor(value) and value.dtype == torch.long), None)
        call = {"x": x, "t": t, "labels": labels, "training": self.training, "grad": torch.is_grad_enabled()}
        self.calls.append(SimpleNamespace(**call))
        eps = self.predict(x, t)
        if self.without is not None:
            # A label that is no class, no labels at all, or a probability of 1 to drop them.
            if labels is None or any(type(value) in (int, float) and value == 1 for value in extra):
                labels = torch.full((len(x),), NULL)
            known = ((labels >= 0) & (labels < NULL)).view(-1, 1, 1, 1)
            eps = torch.where(known, 1.0, self.without).expand_as(x)
        return eps + 0 * self.weight


def seed_all(seed: int) -> None:
    """The same random numbers again, whichever generator a solution draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Arguments:
    """Stands for the parsed command line: flags that a solution has made up are off."""

    dry_run, log_interval, timesteps, batch_size, eval_images, eval_timesteps = True, 1, T, 4, 4, 3

    def __getattr__(self, name: str) -> bool:
        return False


class Solution:
    """A folder with a solution; its functions are called by name, whatever their arguments are called.

    Attributes:
        adapted: what had to be done to call them.
    """

    def __init__(self, folder: Path):
        self.folder, self.adapted, self.modules = folder, set(), {}
        OnCpu.used = False

    def module(self, part: str):
        """The module of a part, "diffusion", "model" or "main"; or `Missing`."""
        for prefix in PREFIXES:
            if part not in self.modules and (self.folder / f"{prefix}{part}.py").is_file():
                try:
                    self.modules[part] = importlib.import_module(f"{prefix}{part}")
                except ModuleNotFoundError as error:
                    raise Missing(f"{prefix}{part}.py needs {error.name}, which isn't installed here") from error
        if part not in self.modules:
            raise Missing(f"no ex02_{part}.py or ex2_{part}.py")
        return self.modules[part]

    def get(self, part: str, name: str):
        """A function or class of a module; or `Missing`."""
        found = getattr(self.module(part), name, None)
        if found is None:
            raise Missing(f"{self.module(part).__name__}.py has no {name}")
        return found

    def call(self, function: Callable, optional: Mapping | None = None, **given):
        """Calls a function with those arguments that it has, by their role; `optional` ones only if it fails without.

        `Missing` where it returns nothing.
        """
        try:
            result = function(**self.arguments(function, given))
        except NotImplementedError as error:
            raise Missing(f"{function.__name__} is not implemented") from error
        except Exception:
            if not optional:
                raise
            result = function(**self.arguments(function, {**given, **optional}))
            self.adapted.add(f"{function.__name__} is given {', '.join(optional)}, as it fails without")
        if result is None:
            raise Missing(f"{function.__name__} returns nothing")
        return result

    def arguments(self, function: Callable, given: Mapping) -> dict:
        """Name -> value of the arguments of a function."""
        arguments = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            roles = [role for role in given if name in NAMES.get(role, role).split()]
            if roles:
                arguments[name] = given[roles[0]]
                if name not in (roles[0], "denoise_model", "time"):  # these are the skeleton's own
                    self.adapted.add(f"{name} of {function.__name__} is taken for {roles[0]}")
            elif name == "device":
                arguments[name] = torch.device("cpu")
            elif parameter.default is parameter.empty:
                arguments[name] = None
                self.adapted.add(f"{name} of {function.__name__} is given as None")
        return arguments

    def takes(self, function: Callable, role: str) -> bool:
        """Whether a function has an argument of that role."""
        return bool(set(NAMES[role].split()) & set(inspect.signature(function).parameters))

    # ---- what the exercise is made of

    def schedule(self, name: str, **given) -> Tensor:
        """Betas of a schedule, in float64."""
        return torch.as_tensor(self.call(self.get("diffusion", f"{name}_beta_schedule"), **given)).double()

    def diffusion(self, betas: Tensor = BETAS, **given):
        """The `Diffusion` with these betas."""
        kind = self.get("diffusion", "Diffusion")
        schedule = lambda timesteps, *args, **kwargs: betas.float()  # noqa: E731  as the skeleton's main has it
        roles = {"timesteps": len(betas), "get_noise_schedule": schedule, "img_size": 8, **given}
        return kind(**self.arguments(kind, roles))

    def q_sample(self, x_zero: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        given = {} if noise is None else {"noise": noise}
        return self.call(self.diffusion().q_sample, x_zero=x_zero, t=t, **given)

    def p_sample(self, x: Tensor, eps: float, t: int, seed: int = 0) -> Tensor:
        """x_{t-1} of images x where the network predicts `eps` everywhere."""
        seed_all(seed)
        model = Stub(lambda x, t: torch.full_like(x, eps))
        optional = {"classes": torch.zeros(len(x), dtype=torch.long), "guidance_scale": 0.0}
        times = torch.full((len(x),), t)
        return self.call(self.diffusion().p_sample, optional, model=model, x=x, t=times, t_index=t).detach()

    def sample(self, model: Stub, betas: Tensor = BETAS, count: int = 4, conditional: bool = False, **given) -> Tensor:
        """Images (count, 3, 8, 8) of the whole reverse process."""
        seed_all(0)
        optional = {"classes": torch.zeros(count, dtype=torch.long), "guidance_scale": 0.0}
        sizes = {"image_size": 8, "batch_size": count, "channels": 3}
        diffusor = self.diffusion(betas, class_free_guidance=True) if conditional else self.diffusion(betas)
        return self.images(self.call(diffusor.sample, optional, model=model, **sizes, **given), count)

    def images(self, result, count: int) -> Tensor:
        """The images at the end, whatever `sample` returns: all steps, a list, an array."""
        if isinstance(result, (list, tuple)):
            self.adapted.add("sample returns a list: its last entry is taken")
            result = result[-1]
        if isinstance(result, np.ndarray):
            self.adapted.add("sample returns an array")
            result = torch.from_numpy(result)
        if result.ndim == 5:
            self.adapted.add("sample returns all steps: the last one is taken")
            result = result[:, -1] if len(result) == count else result[-1]
        return result

    def loss(self, model: Stub, x_zero: Tensor, t: Tensor, loss_type: str = "l2", **given) -> float:
        optional = {} if "classes" in given else {"classes": torch.zeros(len(x_zero), dtype=torch.long)}
        diffusor = self.diffusion(class_free_guidance=True) if "classes" in given else self.diffusion()
        given = {"model": model, "x_zero": x_zero, "t": t, "loss_type": loss_type, **given}
        return float(torch.as_tensor(self.call(diffusor.p_losses, optional, **given)).detach())

    def unet(self, p_uncond: float | None = None) -> nn.Module:
        """A small U-Net with random weights, conditional where `p_uncond` is given."""
        kind = self.get("model", "Unet")
        given = {"dim": 8, "dim_mults": (1, 2), "channels": 3, "class_free_guidance": p_uncond is not None}
        if p_uncond is not None:
            given.update(p_uncond=p_uncond, num_classes=CLASSES)
        torch.manual_seed(0)
        model = self.call(kind, {"class_free_guidance": True, "num_classes": CLASSES, "p_uncond": 0.0}, **given)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))  # a layer that starts at zero would hide what it does
        return model

    def forward(self, model: nn.Module, x: Tensor, t: Tensor, classes: Tensor | None = None) -> Tensor:
        optional = {"classes": torch.zeros(len(x), dtype=torch.long)}
        given = {} if classes is None else {"classes": classes}
        return self.call(model.forward, None if given else optional, x=x, t=t, **given).detach()


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Imports modules of the exercise from `folder`, and forgets them afterwards. Ours of the same names are hidden."""

    def taken_out() -> dict:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PREFIXES)}

    sys.path.insert(0, str(folder))
    hidden = taken_out()
    try:
        with OnCpu():
            yield
    finally:
        sys.path.remove(str(folder))
        taken_out()
        sys.modules.update(hidden)
