"""A submission: its functions are found by the skeleton's names, and called whatever their arguments are called.

As a program, `python submission.py FOLDER SECONDS`, this file holds one submission in a process of its own. Each line
that it reads asks for a call, each line that it writes answers with tensors, numbers and text. Nothing in this process
knows what is right: the facts are judged by the one that asks. It imports nothing of ours, so a submission may have
modules and packages of the same names.
"""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import json
import math
import os
import random
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

T = 10  # of the process that most facts are about
BETAS = torch.linspace(0.02, 0.3, T)  # large, so that slips show
ONE_BETA = 0.02  # of a process of one step: most pixels stay within -1 and 1, where some samplers clip
CLASSES, NULL, P_UNCOND = 5, 5, 0.1
PREFIXES = ("ex02_", "ex2_")
PARTS = ("diffusion", "model", "main")
DTYPES = ("float32", "float64", "int64", "uint8", "bool")  # of tensors on their way
FID = re.compile(r"(?<![a-z])fid|frechet")
# A role, and how submissions call it.
NAMES = {
    "x_zero": "x_zero x_0 x0 x_start x",
    "x": "x x_t img",
    "t": "t time time_step timestep ts",
    "noise": "noise eps",
    "model": "model denoise_model denoiser net network unet eps_model noise_model denoise_fn model_fn",
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
PACKAGES = {"cv2": "opencv-python", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
SKELETON = ("denoise_model", "time")  # other names that the skeleton itself has


class Missing(Exception):
    """A part of the exercise that isn't there, is an empty stub, or can't be called."""


class OnCpu(TorchFunctionMode):
    """The CPU in place of a GPU that a submission insists on."""

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
    """Stands for a U-Net: its noise is `scale` * x + `shift`, and it remembers how it was called.

    Args:
        scale: one number, or one for each time (T,).
        shift: a number or a tensor of the shape of x.
        without: makes it conditional: it predicts 1 for a class and `without` for none.
    """

    def __init__(self, scale=0.0, shift=0.0, without: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.scale, self.shift, self.without = torch.as_tensor(scale).flatten(), shift, without
        self.class_free_guidance = without is not None
        self.null_class, self.num_classes, self.p_uncond, self.channels, self.out_dim = NULL, CLASSES, P_UNCOND, 3, 3
        self.calls, self.start = [], None  # what each call was like, and the first x

    def forward(self, x, t=None, *args, **kwargs):
        for name in NAMES["t"].split():
            t = kwargs.pop(name, t)
        named = [kwargs[name] for name in NAMES["classes"].split() if name in kwargs]
        extra = (*named, *args, *kwargs.values())
        labels = next((value for value in extra if torch.is_tensor(value) and value.dtype == torch.long), None)
        first = torch.as_tensor(t).flatten()[0].item()
        call = {"t": first, "labels": None if labels is None else labels.flatten().tolist()}
        self.calls.append({**call, "training": self.training, "gradients": torch.is_grad_enabled()})
        self.start = x.detach().clone() if self.start is None else self.start
        eps = self.scale[int(first) if len(self.scale) > 1 else 0] * x + self.shift
        if self.without is not None:
            # A label that is no class, no labels at all, or a probability of 1 to drop them.
            if labels is None or any(type(value) in (int, float) and value == 1 for value in extra):
                labels = torch.full((len(x),), NULL)
            known = ((labels >= 0) & (labels < NULL)).view(-1, 1, 1, 1)
            eps = torch.where(known, 1.0, self.without).expand_as(x)
        return eps + 0 * self.weight


def seed_all(seed: int) -> None:
    """The same random numbers again, whichever generator a submission draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Arguments:
    """Stands for the parsed command line: flags that a submission has made up are off."""

    dry_run, log_interval, timesteps, batch_size, eval_images, eval_timesteps = True, 1, T, 4, 4, 3

    def __getattr__(self, name: str) -> bool:
        return False


class Submission:
    """A folder with a solution; its functions are called by name, whatever their arguments are called.

    Args:
        limit: CPU seconds for each fact.

    Attributes:
        adapted: what had to be done to call them.
    """

    def __init__(self, folder: Path, limit: float = math.inf):
        self.folder, self.limit, self.adapted, self.modules, self.unets = folder, limit, set(), {}, {}
        OnCpu.used = False

    def path(self, part: str) -> Path:
        """The file of a part; or `Missing`."""
        for prefix in PREFIXES:
            if (self.folder / f"{prefix}{part}.py").is_file():
                return self.folder / f"{prefix}{part}.py"
        near = sorted(path.name for path in self.folder.glob(f"*{part}*.py"))[:3]
        raise Missing(f"no ex02_{part}.py or ex2_{part}.py" + (f"; is {' or '.join(near)} meant?" if near else ""))

    def load(self, part: str):
        """The module of a part, "diffusion", "model" or "main"; or `Missing`."""
        if part not in self.modules:
            name = self.path(part).stem
            try:
                self.modules[part] = importlib.import_module(name)
            except ModuleNotFoundError as error:
                package = str(error.name).split(".")[0]
                if package.startswith(PREFIXES):
                    raise Missing(f"{name}.py needs {package}.py, which isn't there") from error
                raise Missing(f"{package} isn't installed: pip install {PACKAGES.get(package, package)}") from error
        return self.modules[part]

    def get(self, part: str, name: str):
        """A function or class of a module; or `Missing`."""
        found = getattr(self.load(part), name, None)
        if found is None:
            raise Missing(f"{self.path(part).name} has no {name}")
        return found

    def call(self, function: Callable, optional: Mapping | None = None, **given):
        """Calls a function with those arguments that it has, by their role; `optional` ones only if it fails without.

        Raises Missing: it is not implemented, returns nothing, or fails and has an argument of unknown meaning.
        """
        values, unknown = self.arguments(function, given)
        try:
            result = function(**values)
        except NotImplementedError as error:
            raise Missing(f"{function.__name__} is not implemented") from error
        except Exception as error:
            values, unknown = self.arguments(function, {**given, **(optional or {})})
            if unknown:
                name = ", ".join(unknown)
                raise Missing(f"{function.__name__} can't be called: what is {name}? ({describe(error)})") from error
            if not optional:
                raise
            result = function(**values)
            self.adapted.add(f"{function.__name__} is given {', '.join(optional)}, as it fails without")
        if result is None:
            raise Missing(f"{function.__name__} returns nothing")
        return result

    def arguments(self, function: Callable, given: Mapping) -> tuple[dict, list[str]]:
        """(name -> value of the arguments of a function, those of unknown meaning, which are None).

        An argument of an unknown name has the role that the skeleton has in its place, where no other name has it.
        """
        parameters = inspect.signature(function).parameters
        free = [role for role in given if not set(NAMES.get(role, role).split()) & set(parameters)]
        values, unknown = {}, []
        for place, (name, parameter) in enumerate(parameters.items()):
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update({role: given[role] for role in ("classes", "guidance_scale") if role in free})
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            roles = [role for role in given if name in NAMES.get(role, role).split()]
            if isinstance(parameter.default, str):  # a name: nothing else can stand for it
                roles = [role for role in roles if isinstance(given[role], str)]
            if not roles and parameter.default is parameter.empty and name != "device":
                roles = [role for role in list(given)[place : place + 1] if role in free]
            if roles:
                values[name] = given[roles[0]]
                if name not in (roles[0], *SKELETON):
                    self.adapted.add(f"{name} of {function.__name__} is taken for {roles[0]}")
            elif name == "device":
                values[name] = torch.device("cpu")
            elif parameter.default is parameter.empty:
                values[name] = None
                unknown.append(name)
                self.adapted.add(f"{name} of {function.__name__} is given as None")
        return values, unknown

    def takes(self, part: str, names: str, role: str) -> bool:
        """Whether a function, "Diffusion.p_sample" for example, has an argument of that role."""
        found = self.load(part)
        for name in names.split("."):
            found = getattr(found, name, None)
        if found is None:
            raise Missing(f"{self.path(part).name} has no {names}")
        parameters = inspect.signature(found).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return any_name or bool(set(NAMES[role].split()) & set(parameters))

    # ---- what the exercise is made of

    def schedule(self, name: str, **given) -> Tensor:
        """Betas of a schedule, in float64."""
        return torch.as_tensor(self.call(self.get("diffusion", f"{name}_beta_schedule"), **given)).double()

    def diffusion(self, betas: Tensor = BETAS, model: nn.Module | None = None, **given):
        """The `Diffusion` with these betas."""
        asked = []

        def schedule(timesteps, *args, **kwargs):
            asked.append(timesteps)
            return betas.float()

        roles = {"timesteps": len(betas), "get_noise_schedule": schedule, "img_size": 8, "model": model or Stub()}
        diffusor = self.call(self.get("diffusion", "Diffusion"), **roles, **given)
        if not asked:
            raise Missing("Diffusion doesn't ask get_noise_schedule for its betas")
        return diffusor

    def q_sample(self, x_zero: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        seed_all(0)
        given = {} if noise is None else {"noise": noise}
        return self.call(self.diffusion().q_sample, x_zero=x_zero, t=t, **given)

    def p_sample(self, x: Tensor, eps: float, t: int, seed: int = 0) -> Tensor:
        """x_{t-1} of images x where the network predicts `eps` everywhere."""
        seed_all(seed)
        model = Stub(shift=eps)
        optional = {"classes": torch.zeros(len(x), dtype=torch.long), "guidance_scale": 0.0}
        times = torch.full((len(x),), t)
        return self.call(self.diffusion(model=model).p_sample, optional, model=model, x=x, t=times, t_index=t)

    def sample(self, model: dict, count: int = 4, betas: Tensor = BETAS, **given) -> dict:
        """The whole reverse process: images (count, 3, 8, 8), and how the network was called."""
        seed_all(0)
        model = Stub(**model)
        optional = {"classes": torch.zeros(count, dtype=torch.long), "guidance_scale": 0.0}
        sizes = {"image_size": 8, "batch_size": count, "channels": 3}
        conditional = {"class_free_guidance": True, **given} if "classes" in given else {}
        diffusor = self.diffusion(betas, model, **conditional)
        result = self.images(self.call(diffusor.sample, optional, model=model, **sizes, **given), count)
        return {
            "images": result,
            "gradient": result.requires_grad,
            "calls": model.calls,
            "start": None if model.start is None else model.start[:count],
        }

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

    def loss(self, model: dict, x_zero: Tensor, t: Tensor, loss_type: str = "l2", **given) -> dict:
        """The loss, and how the network was called."""
        seed_all(0)
        model, conditional = Stub(**model), "classes" in given
        optional = {} if conditional else {"classes": torch.zeros(len(x_zero), dtype=torch.long)}
        diffusor = self.diffusion(model=model, **({"class_free_guidance": True} if conditional else {}))
        given = {"model": model, "x_zero": x_zero, "t": t, "noise": None, "loss_type": loss_type, **given}
        given = {role: value for role, value in given.items() if value is not None}
        return {
            "loss": float(torch.as_tensor(self.call(diffusor.p_losses, optional, **given)).detach()),
            "calls": model.calls,
        }

    def unet(self, p_uncond: float | None) -> nn.Module:
        """A small U-Net with random weights, conditional where `p_uncond` is given."""
        if p_uncond not in self.unets:
            given = {"dim": 8, "dim_mults": (1, 2), "channels": 3, "class_free_guidance": p_uncond is not None}
            if p_uncond is not None:
                given.update(p_uncond=p_uncond, num_classes=CLASSES)
            torch.manual_seed(0)
            optional = {"class_free_guidance": True, "num_classes": CLASSES, "p_uncond": 0.0}
            model = self.call(self.get("model", "Unet"), optional, **given)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))  # a layer that starts at zero would hide what it does
            self.unets[p_uncond] = model
        return self.unets[p_uncond]

    def forward(self, x: Tensor, t: Tensor, classes=None, p_uncond=None, training=False, seed: int = 0) -> dict:
        """What the U-Net makes of images, and the labels as they are afterwards."""
        model = self.unet(p_uncond).train(training)
        seed_all(seed)
        optional = {"classes": torch.zeros(len(x), dtype=torch.long)}
        given = {} if classes is None else {"classes": classes}
        with torch.no_grad():
            out = self.call(model.forward, None if given else optional, x=x, t=t, **given)
        return {"out": out, "classes": classes}

    def guide(self, w: float, through: str = "p_sample") -> dict:
        """One step at t = 0, where no noise is added, with guidance scale `w`.

        The network predicts 1 with a class and 0.2 without. `scaled`: whether a function takes the scale at all.
        Through `p_sample`: `step` of a black image, and `unit` if 1 is predicted. Through `sample`, as what it returns.
        """
        by_diffusion = self.takes("diffusion", "Diffusion", "guidance_scale")
        scaled = by_diffusion or self.takes("diffusion", f"Diffusion.{through}", "guidance_scale")
        if through == "p_sample" and scaled:
            black, zeros, model = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), Stub(without=0.2)
            diffusor = self.diffusion(model=model, guidance_scale=w, class_free_guidance=True, p_uncond=P_UNCOND)
            given = {"model": model, "x": black, "t": zeros, "t_index": 0, "classes": zeros, "guidance_scale": w}
            step = self.call(diffusor.p_sample, **given)
            return {"step": step, "unit": self.p_sample(black, 1.0, 0), "calls": model.calls, "scaled": True}
        if through == "p_sample":
            return self.guide(w, "sample")
        given = {"classes": torch.zeros(4, dtype=torch.long), "guidance_scale": w, "p_uncond": P_UNCOND}
        return {**self.sample({"without": 0.2}, 4, torch.tensor([ONE_BETA]), **given), "scaled": scaled}

    def run_test(self) -> dict:
        """How the test loop calls the network."""
        function, model = self.get("main", "test"), Stub().train()
        loader = DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), batch_size=4)
        given = {"model": model, "testloader": loader, "diffusor": self.diffusion(model=model)}
        given.update(device=torch.device("cpu"), args=Arguments(), epoch=0)
        try:
            function(**self.arguments(function, given)[0])
        except Exception:  # what comes after the losses may need flags that only the submission knows
            if not model.calls:
                raise
        return {"calls": model.calls}

    def saved_greys(self) -> Tensor:
        """(256,) how often each grey is in a saved image of value 0.5 with a black and a white row."""
        function, model = self.get("main", "sample_and_save_images"), Stub()
        diffusor = self.diffusion(torch.linspace(1e-4, 0.2, 100), model)  # some pick out steps of T = 100
        optional = {"classes": torch.zeros(2, dtype=torch.long), "guidance_scale": 0.0}
        kind = self.call(diffusor.sample, optional, model=model, image_size=8, batch_size=2, channels=3)
        is_list = isinstance(kind, (list, tuple))
        scaled = torch.as_tensor(np.asarray(kind[-1] if is_list else kind)).min() >= 0  # some scale to [0, 1] in it

        def half(*args, **kwargs):
            """Grey images with a black and a white row, as the submission's own `sample` returns images."""
            made = torch.full((2, 3, 8, 8) if is_list else tuple(kind.shape), 0.75 if scaled else 0.5)
            made[..., 0, :], made[..., 1, :] = 0.0 if scaled else -1.0, 1.0
            return [made for _ in kind] if is_list else made if torch.is_tensor(kind) else made.numpy()

        diffusor.sample = half
        with tempfile.TemporaryDirectory() as folder:
            given = {"n_images": 2, "diffusor": diffusor, "model": model, "device": torch.device("cpu")}
            given.update(store_path=folder + os.sep, reverse_transform=reverse_transform, image_size=8)
            function(**self.arguments(function, given)[0])
            files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg"))
            if not files:
                raise Missing("sample_and_save_images saves no PNG or JPEG file in its store_path")
            return torch.from_numpy(np.bincount(np.asarray(Image.open(files[-1]).convert("L")).ravel(), minlength=256))

    # ---- read off the source, before any of it runs

    def outline(self) -> dict:
        """Where functions stand, and what is plain in the source of the main file."""
        lines, trees, missing = {}, {}, {}
        for part in PARTS:
            try:
                path = self.path(part)
                trees[part] = ast.parse(path.read_bytes())
            except Missing as error:
                missing[part] = str(error)
            except (SyntaxError, ValueError):  # importing it will tell
                continue
            for name, node in named_nodes(trees[part].body if part in trees else ()):
                lines[f"{part}.{name}"] = f"{path.name}:{node.lineno}"
        main = trees.get("main", ast.parse(""))
        test = dict(named_nodes(main.body)).get("test")
        own = {id(node) for node in ast.walk(test)} if test else set()
        others = [node for node in ast.walk(main) if getattr(node, "attr", "") == "eval" and id(node) not in own]
        plain = {"test_is_empty": test is not None and is_empty(test), "eval_elsewhere": bool(others)}
        plain.update(settings=settings_of_main(main), fid_images=count_fid_images(main))
        return {"lines": lines, "missing": missing, **plain}

    def answer(self, line: str | bytes) -> str:
        """The answer to a request, as a line of JSON."""
        request = json.loads(line, object_hook=unpack)
        self.adapted = set()
        if request["fresh"] and self.limit < math.inf:
            allow(self.limit)
        try:
            value = getattr(self, request["call"])(**request["given"])
            answer = {"value": None if request["call"] == "load" else value}
            text = json.dumps(answer, default=pack)  # now, as what it returned may be of any type
        except Missing as error:
            text = json.dumps({"missing": str(error)})
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in frames if frame.filename.startswith(str(self.folder))]
            where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
            text = json.dumps({"fails": f"{type(error).__name__}{where}: {describe(error)}"})
        if OnCpu.used:
            self.adapted.add("the code insists on a GPU: it is put on the CPU")
        return f'{text[:-1]}, "id": {request["id"]}, "adapted": {json.dumps(sorted(self.adapted))}}}\n'


def describe(error: BaseException) -> str:
    """The first line of a message."""
    return str(error).strip().split("\n")[0][:200]


def reverse_transform(image: Tensor) -> Image.Image:
    """As the skeleton has it, an argument of `sample_and_save_images` in some submissions."""
    array = ((image.squeeze() + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return Image.fromarray(array)


def named_nodes(body: list, prefix: str = ""):
    """("Diffusion.q_sample", its node) of every function and class, in order: the last of one name counts."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from named_nodes(node.body, f"{prefix}{node.name}.")


def is_empty(function: ast.FunctionDef) -> bool:
    """Whether a function is a docstring and `pass`."""
    return all(
        isinstance(node, ast.Pass) or isinstance(getattr(node, "value", None), ast.Constant) for node in function.body
    )


def flags_of(tree: ast.AST) -> dict:
    """Flag -> default of every `add_argument("--flag", default=...)`, where it is a constant."""
    flags = {}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        default = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}.get("default")
        flags.update({str(arg.value)[2:]: default for arg in call.args if str(getattr(arg, "value", ""))[:2] == "--"})
    return flags


def settings_of_main(tree: ast.AST) -> dict | None:
    """Default of --timesteps, name of the schedule and its ends, beta_start and beta_end; None if not plain.

    The schedule is the one in the function that the call of `Diffusion` names, as the skeleton has it.
    """
    steps, used, schedules = flags_of(tree).get("timesteps"), None, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Diffusion" and len(node.args) > 1:
            used = getattr(node.args[1], "id", None)
        name = getattr(node, "name", None) or getattr(next(iter(getattr(node, "targets", ())), None), "id", None)
        if isinstance(node, (ast.Assign, ast.FunctionDef)):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            calls = [call for call in calls if str(getattr(call.func, "id", "")).endswith("_beta_schedule")]
            if len(calls) == 1:
                schedules[name] = calls[0]
    call = schedules.get(used)
    if call is None or not isinstance(steps, int):
        return None
    kind = call.func.id.replace("_beta_schedule", "")
    ends = [a.value for a in call.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, float)]
    if kind != "cosine" and len(ends) != 2:
        return None
    return {"timesteps": steps, "name": kind, "ends": [] if kind == "cosine" else ends}


def count_fid_images(tree: ast.AST) -> int | None:
    """How many samples a Fréchet distance is of, if a function that names one draws them at once; None if not plain."""
    numbers = flags_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            numbers.update({getattr(name, "id", ""): getattr(node.value, "value", None) for name in node.targets})
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if not FID.search(ast.dump(function).lower()):
            continue
        names, defaults = reversed(function.args.args), reversed(function.args.defaults)
        numbers.update({name.arg: getattr(default, "value", None) for name, default in zip(names, defaults)})
        loops = [node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While, ast.ListComp))]
        looped = {id(node) for loop in loops for node in ast.walk(loop)}
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call) and id(node) not in looped):
            if getattr(call.func, "attr", "") == "sample":
                size = {keyword.arg: keyword.value for keyword in call.keywords}.get("batch_size")
                size = size or (call.args[2] if len(call.args) > 2 else None)
                name = getattr(size, "attr", getattr(size, "id", None))
                count = getattr(size, "value", None) if isinstance(size, ast.Constant) else numbers.get(name)
                return count if isinstance(count, int) else None
    return None


# ---- the line between the two processes


def pack(value) -> dict:
    """A tensor as JSON."""
    array = value.detach().cpu() if torch.is_tensor(value) else torch.as_tensor(value)
    array = (array if str(array.dtype)[6:] in DTYPES else array.double()).numpy()
    data = base64.b64encode(array.tobytes()).decode()
    return {"tensor": data, "dtype": str(array.dtype), "shape": list(array.shape)}


def unpack(value: dict):
    """What `pack` made, as a tensor. Runs none of it, so the other side need not be trusted."""
    if "tensor" not in value:
        return value
    if value["dtype"] not in DTYPES:
        raise ValueError("a tensor of an unknown type")
    array = np.frombuffer(base64.b64decode(value["tensor"]), value["dtype"])
    return torch.from_numpy(array.reshape(value["shape"]).copy())


def allow(seconds: float, in_all: float | None = None) -> None:
    """Lets this process compute for so many more seconds, where the system can tell; no more `in_all`, ever."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1] if in_all is None else math.ceil(in_all)
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main(folder: str, seconds: str) -> None:
    """Answers until nobody asks. Python refuses connections, and what the submission prints is not shown."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def refuse(*args, **kwargs):
        raise OSError("no network while a submission is checked")

    socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.create_connection = refuse
    torch.set_num_threads(1)
    sys.path[0] = folder  # in place of the folder of this file
    submission = Submission(Path(folder), float(seconds))
    allow(submission.limit, 10 * submission.limit + time.process_time())
    print(json.dumps({"value": None, "id": 0}), file=answers, flush=True)  # torch is there
    with OnCpu():
        for line in requests:
            answers.write(submission.answer(line))
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
