"""How a function of a submission is found by the skeleton's name, and called whatever its arguments are called."""

from __future__ import annotations

import importlib
import inspect
import linecache
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from ex2.grading.verdicts import missing

PREFIXES = ("ex02_", "ex2_")
PARTS = ("diffusion", "model", "main")
PACKAGES = {"cv2": "opencv-python", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
# A role, and how submissions call it.
NAMES = {
    "x_zero": "x_zero x_0 x0 x_start x",
    "x": "x x_t img",
    "t": "t time time_step timestep ts",
    "noise": "noise eps",
    "model": "model denoise_model denoiser net network unet eps_model noise_model denoise_fn model_fn",
    "classes": "classes labels label y c cls class_labels class_label class_cond cond",
    "guidance_scale": "guidance_scale w cfg_scale guidance guidance_weight guide_w scale",
    "class_free_guidance": "class_free_guidance classifier_free_guidance classifier_free_guidence",
    "p_uncond": "p_uncond prob_uncond uncond_prob cond_drop_prob drop_prob",
    "t_index": "t_index index i",
    "image_size": "image_size img_size size",
    "img_size": "img_size image_size size",
    "get_noise_schedule": "get_noise_schedule noise_schedule schedule beta_schedule",
    "n_images": "n_images num_images n",
    "testloader": "testloader test_loader loader dataloader",
    "store_path": "store_path save_path path folder",
    "reverse_transform": "reverse_transform rtransform transform",
}


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


def find_file(folder: Path, part: str) -> Path:
    """The file of a part, "diffusion", "model" or "main". Raises NotRight: it is missing."""
    for prefix in PREFIXES:
        if (folder / f"{prefix}{part}.py").is_file():
            return folder / f"{prefix}{part}.py"
    near = sorted(path.name for path in folder.glob(f"*{part}*.py"))[:3]
    raise missing(f"no ex02_{part}.py or ex2_{part}.py" + (f"; is {' or '.join(near)} meant?" if near else ""))


class Adapter:
    """A folder with a solution, and its functions. What is not there or can't be called raises NotRight: "missing".

    Attributes:
        where: file and line of the function that was called last.
        adapted: what had to be done to call it.
    """

    def __init__(self, folder: Path):
        self.folder, self.where, self.adapted = folder, "", set()
        OnCpu.used = False

    def load(self, part: str):
        """The module of a part."""
        name = find_file(self.folder, part).stem
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = str(error.name).split(".")[0]
            if package.startswith(PREFIXES):
                raise missing(f"{name}.py needs {package}.py, which isn't there") from error
            raise missing(f"{package} isn't installed: pip install {PACKAGES.get(package, package)}") from error

    def get(self, part: str, names: str):
        """A function or class, "Diffusion.p_sample" for example."""
        found = self.load(part)
        for name in names.split("."):
            found = getattr(found, name, None)
        if found is None:
            raise missing(f"{find_file(self.folder, part).name} has no {names}")
        return found

    def takes(self, part: str, names: str, role: str) -> bool:
        """Whether a function has an argument of that role."""
        function = self.get(part, names)
        self.where = locate(function) or self.where
        parameters = inspect.signature(function).parameters.values()
        return any(each.kind is each.VAR_KEYWORD or each.name in NAMES[role].split() for each in parameters)

    def arguments(self, function: Callable, given: Mapping) -> dict:
        """name -> value of the arguments of a function; those of unknown meaning are None.

        An argument of an unknown name has the role that the skeleton has in its place, where no other name has it.
        """
        self.where = locate(function) or self.where
        parameters, values, used = inspect.signature(function).parameters, {}, set()
        names = {role: NAMES.get(role, role).split() for role in given}
        free = [role for role in given if parameters.keys().isdisjoint(names[role])]
        for place, (name, parameter) in enumerate(parameters.items()):
            if parameter.kind is parameter.VAR_KEYWORD:
                values.update({role: given[role] for role in ("classes", "guidance_scale") if role in free})
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            roles = [role for role in given if name in names[role] and role not in used]
            if isinstance(parameter.default, str):  # a name: nothing else can stand for it
                roles = [role for role in roles if isinstance(given[role], str)]
            required = parameter.default is parameter.empty
            if not roles and required and name != "device":
                roles = [role for role in list(given)[place : place + 1] if role in free]
            if roles:
                values[name] = given[roles[0]]
                used.add(roles[0])
                if name not in (roles[0], "denoise_model", "time"):  # names that the skeleton has, too
                    self.adapted.add(f"{name} of {function.__name__} is taken for {roles[0]}")
            elif name == "device":
                values[name] = torch.device("cpu")
            elif required:
                values[name] = None
                self.adapted.add(f"{name} of {function.__name__} is given as None")
        return values

    def call(self, function: Callable, *optional: Mapping, **given):
        """Calls a function with those arguments that it has, by their role; with `optional` ones if it fails without.

        Raises NotRight: it is not implemented, returns nothing, or fails and has an argument of unknown meaning.
        """
        for extra in ({}, *optional):
            values = self.arguments(function, {**given, **extra})
            try:
                result = function(**values)
                break
            except NotImplementedError as error:
                raise missing(f"{function.__name__} is not implemented") from error
            except Exception as error:
                failure = error
        else:
            unknown = ", ".join(name for name, value in values.items() if value is None)
            if not unknown:
                raise failure
            text = f"what is {unknown}? ({describe(failure)})"
            raise missing(f"{function.__name__} can't be called: {text}") from failure
        if extra:
            self.adapted.add(f"{function.__name__} is given {', '.join(extra)}, as it fails without")
        if result is None:
            raise missing(f"{function.__name__} returns nothing")
        return result


def describe(error: BaseException) -> str:
    """The first line of a message."""
    return str(error).strip().split("\n")[0][:200]


def locate(function: Callable) -> str:
    """File and line of a function, or of the `__init__` of a class; "" where it has none."""
    code = getattr(inspect.unwrap(function.__init__ if inspect.isclass(function) else function), "__code__", None)
    if code is None:
        return ""
    lines = range(code.co_firstlineno, code.co_firstlineno + 9)  # decorators come before
    starts = [line for line in lines if linecache.getline(code.co_filename, line).lstrip().startswith("def ")]
    return f"{Path(code.co_filename).name}:{min(starts, default=code.co_firstlineno)}"
