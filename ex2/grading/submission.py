"""A submission in a process of its own: what the facts ask it for, and the line to the process that asks.

`main` answers requests until there are no more: each line that it reads asks for a call of a method, each line that it
writes answers with tensors, numbers and text. Nothing in this process knows what is right. Names and paths of ours are
taken away before the submission is imported, so it may have modules and packages of the same names.
"""

from __future__ import annotations

import ast
import base64
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
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ex2.grading.adapter import NAMES, Adapter, OnCpu, describe, find_file, locate
from ex2.grading.verdicts import NotRight, missing

T = 10  # of the process that most facts are about
BETAS = torch.linspace(0.02, 0.3, T)  # large, so that slips show
ONE_BETA = 0.02  # of a process of one step: most pixels stay within -1 and 1, where some samplers clip
CLASSES, NULL, P_UNCOND = 5, 5, 0.1
FID = re.compile(r"(?<![a-z])fid|frechet")


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
        extra = (*args, *kwargs.values())
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

    predict = forward  # as some call it


class Arguments:
    """Stands for the parsed command line: flags that a submission has made up are off."""

    dry_run, log_interval, timesteps, batch_size, eval_images, eval_timesteps = True, 1, T, 4, 4, 3

    def __getattr__(self, name: str) -> bool:
        return False


class Submission(Adapter):
    """A folder with a solution, and the results of its functions that facts ask for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.unets = {}  # p_uncond -> U-Net

    def schedule(self, name: str, **given) -> Tensor:
        """Betas of a schedule, in float64."""
        return torch.as_tensor(self.call(self.get("diffusion", f"{name}_beta_schedule"), **given)).double()

    def diffusion(self, model: nn.Module, betas: Tensor = BETAS, **given):
        """The `Diffusion` with these betas."""
        asked = []

        def schedule(timesteps, *args, **kwargs):
            asked.append(timesteps)
            return betas.float()

        roles = {"timesteps": len(betas), "get_noise_schedule": schedule, "img_size": 8, "model": model}
        diffusor = self.call(self.get("diffusion", "Diffusion"), **roles, **given)
        if not asked:
            raise missing("Diffusion doesn't ask get_noise_schedule for its betas")
        return diffusor

    def diffuse(self, method: str, stub: dict | None = None, betas: Tensor = BETAS, seed: int = 0, **given) -> dict:
        """What a method of `Diffusion` returns, and how the network, `Stub(**stub)`, was called.

        Args:
            given: arguments in the skeleton's order, without the model; with classes the process is conditional.
        """
        seed_all(seed)
        model = Stub(**(stub or {}))
        roles = given if method == "q_sample" else {"model": model, **given}
        count = roles.get("batch_size") or len(roles.get("x", roles.get("x_zero")))
        tuples, labels = [{"image_size": (8, 8)}] if method == "sample" else [], labels_for(count)
        settings, optional = {}, [labels, *({**labels, **extra} for extra in tuples)]
        if "classes" in roles:
            settings, optional = {"class_free_guidance": True, "p_uncond": P_UNCOND}, tuples
            settings.update({"guidance_scale": roles["guidance_scale"]} if "guidance_scale" in roles else {})
        result = self.call(getattr(self.diffusion(model, betas, **settings), method), *optional, **roles)
        if method == "sample":
            result = self.last_images(result, count)
        result, start = torch.as_tensor(result), None if model.start is None else model.start[:count]
        return {"result": result, "gradient": result.requires_grad, "calls": model.calls, "start": start}

    def last_images(self, result, count: int):
        """The images at the end, whatever `sample` returns: all steps, a list, an array."""
        if isinstance(result, (list, tuple)):
            self.adapted.add("sample returns a list: its last entry is taken")
            result = result[-1]
        if result.ndim == 5:
            self.adapted.add("sample returns all steps: the last one is taken")
            result = result[:, -1] if len(result) == count else result[-1]
        return result

    def unet(self, p_uncond: float | None) -> nn.Module:
        """A small U-Net with random weights, conditional where `p_uncond` is given."""
        if p_uncond not in self.unets:
            conditional = {"class_free_guidance": True, "num_classes": CLASSES}
            given = {"dim": 8, "dim_mults": (1, 2), "channels": 3, "class_free_guidance": False}
            if p_uncond is not None:
                given.update(conditional, p_uncond=p_uncond)
            torch.manual_seed(0)
            model = self.call(self.get("model", "Unet"), {**conditional, "p_uncond": 0.0}, **given)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))  # a layer that starts at zero would hide what it does
            self.unets[p_uncond] = model
        return self.unets[p_uncond]

    def forward(self, x: Tensor, t: Tensor, classes=None, p_uncond=None, training=False, seed: int = 0) -> dict:
        """What the U-Net makes of images, and the labels as they are afterwards."""
        model = self.unet(p_uncond).train(training)
        seed_all(seed)
        optional = [{"classes": torch.zeros(len(x), dtype=torch.long)}] if classes is None else []
        given = {} if classes is None else {"classes": classes}
        if training:  # some take it here
            given["p_uncond"] = p_uncond
        with torch.no_grad():
            return {"out": self.call(model.forward, *optional, x=x, t=t, **given), "classes": classes}

    def run_test(self) -> dict:
        """How the test loop calls the network."""
        function, model = self.get("main", "test"), Stub().train()
        self.where = locate(function)
        if not inspect.unwrap(function).__code__.co_names:
            raise missing("test is an empty stub")
        loader = DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), batch_size=4)
        given = {"model": model, "testloader": loader, "diffusor": self.diffusion(model), "device": torch.device("cpu")}
        values = self.arguments(function, {**given, "args": Arguments(), "epoch": 0})
        if model not in values.values():
            raise missing("test takes no model, so that it can't be tried with another")
        try:
            function(**values)
        except Exception:  # what comes after the losses may need flags that only the submission knows
            if not model.calls:
                raise
        return {"calls": model.calls}

    def saved_greys(self) -> Tensor:
        """(256,) how often each grey is in a saved image of value 0.5 with a black and a white row."""
        function, model = self.get("main", "sample_and_save_images"), Stub()
        diffusor = self.diffusion(model, torch.linspace(1e-4, 0.2, 100))  # some pick out steps of T = 100
        optional = labels_for(8), {**labels_for(8), "image_size": (8, 8)}
        sampled = self.call(diffusor.sample, *optional, model=model, image_size=8, batch_size=8, channels=3)
        steps = sampled if isinstance(sampled, (list, tuple)) else [sampled]
        low = 0.0 if steps[-1].min() >= 0 else -1.0  # some scale to [0, 1] in it

        def sample(*args, **kwargs):
            for images in steps:
                images[...] = 0.75 + 0.25 * low
                images[..., 0, :], images[..., 1, :] = low, 1.0
            return sampled

        diffusor.sample = sample
        with tempfile.TemporaryDirectory() as folder:
            given = {"n_images": 8, "diffusor": diffusor, "model": model, "device": torch.device("cpu")}
            given.update(store_path=folder + os.sep, reverse_transform=reverse_transform, image_size=8)
            function(**self.arguments(function, {**given, "args": Arguments()}))
            files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".png", ".jpg"))
            if not files:
                raise missing("sample_and_save_images saves no PNG or JPEG file in its store_path")
            return torch.from_numpy(np.bincount(np.asarray(Image.open(files[-1]).convert("L")).ravel(), minlength=256))

    def outline(self) -> dict:
        """What is plain in the source of the main file; none of it runs."""
        path = find_file(self.folder, "main")
        tree = ast.parse(path.read_bytes(), path.name)
        test = {node for part in tree.body if getattr(part, "name", "") == "test" for node in ast.walk(part)}
        evals = [node for node in ast.walk(tree) if getattr(node, "attr", "") == "eval" and node not in test]
        drops = re.search(r"rand\w*\(.*[<>].*(uncond|drop)", ast.unparse(tree))
        plain = {"settings": settings_of(tree), "fid_images": count_fid_images(tree)}
        return {"eval_elsewhere": bool(evals), "drops_elsewhere": bool(drops), **plain}

    # ---- the line between the two processes

    def answer(self, line: str | bytes) -> str:
        """The answer to a request, as a line of JSON."""
        request = json.loads(line, object_hook=unpack)
        self.adapted, self.where = set(), ""
        if request["seconds"]:
            allow(request["seconds"])
        try:
            value = getattr(self, request["call"])(*request["args"], **request["given"])
            said = {"value": json.dumps(None if request["call"] == "load" else value, default=pack)}
        except NotRight as error:
            said = {"missing": error.found}
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            frames = [frame for frame in frames if frame.filename.startswith(str(self.folder))]
            where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
            said = {"fails": f"{type(error).__name__}{where}: {describe(error)}"}
        if OnCpu.used:
            self.adapted.add("the code insists on a GPU: it is put on the CPU")
        return json.dumps({**said, "id": request["id"], "where": self.where, "adapted": sorted(self.adapted)})


def seed_all(seed: int) -> None:
    """The same random numbers again, whichever generator a submission draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def labels_for(count: int) -> dict:
    """What is given to a function that fails without classes."""
    return {"classes": torch.zeros(count, dtype=torch.long), "guidance_scale": 0.0}


def reverse_transform(image: Tensor) -> Image.Image:
    """As the skeleton has it, an argument of `sample_and_save_images` in some submissions."""
    array = ((image.squeeze() + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return Image.fromarray(array)


def settings_of(tree: ast.AST) -> dict | None:
    """T, name and ends of the schedule that a main file gives to `Diffusion`; None if they are not plain."""
    text = ast.unparse(tree)  # no comments, no line breaks within a statement
    steps = re.search(r"'--timesteps'.*default=(\d+)[,)]", text)
    used = re.search(r"\bDiffusion\([^,]+, (\w+)[,)]", text)
    schedule = r"(?:(cosine)|(\w+))_beta_schedule\((?:([\d.e-]+), ([\d.e-]+), )?\w+(?:, [\d.]+)?\)$"
    found = used and set(re.findall(rf"\b{used[1]}(?: = lambda \w+:|\(.*\n *return) {schedule}", text, re.M))
    if not steps or not found or len(found) > 1:
        return None
    cosine, name, *ends = found.pop()
    if not cosine and not all(ends):
        return None
    return {"timesteps": int(steps[1]), "name": cosine or name, "ends": [float(end) for end in ends if end]}


def count_fid_images(tree: ast.AST) -> int | None:
    """How many samples a Fréchet distance is of, if a function that names one draws them at once; None if not plain."""
    numbers = dict(re.findall(r"(\w+)(?:'.*default)? ?= ?(\d+)\b", ast.unparse(tree)))  # of variables and flags
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        loops = [node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While, ast.ListComp))]
        looped = {node for loop in loops for node in ast.walk(loop)}
        for call in ast.walk(function) if FID.search(ast.dump(function).lower()) else ():
            if call not in looped and getattr(getattr(call, "func", None), "attr", "") == "sample":
                sizes = [word.value for word in call.keywords if word.arg == "batch_size"] + call.args[2:3]
                count = ast.unparse(sizes[0]).split(".")[-1] if sizes else ""
                count = numbers.get(count, count)
                return int(count) if count.isdigit() else None
    return None


def pack(value) -> dict:
    """A tensor as JSON."""
    array = torch.as_tensor(value).detach().cpu().numpy()
    data = base64.b64encode(array.tobytes()).decode()
    return {"tensor": data, "dtype": str(array.dtype), "shape": list(array.shape)}


def unpack(value: dict):
    """What `pack` made, as a tensor. Runs none of it, so the other side need not be trusted."""
    if "tensor" not in value:
        return value
    array = np.frombuffer(base64.b64decode(value["tensor"]), value["dtype"])
    return torch.from_numpy(array.reshape(value["shape"]).copy())


def allow(seconds: float) -> None:
    """Lets this process compute for so many more seconds, where the system can tell and allows as many."""
    with suppress(ImportError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def main(folder: str) -> None:
    """Answers until nobody asks. Python refuses connections, and what the submission prints is not shown."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def refuse(*args, **kwargs):
        raise OSError("no network while a submission is checked")

    socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = socket.create_connection = refuse
    sys.path[0] = folder  # in place of ours
    for name in [name for name in sys.modules if name.split(".")[0] == "ex2"]:
        del sys.modules[name]
    submission = Submission(Path(folder))
    print(file=answers, flush=True)  # torch is there
    with OnCpu():
        for line in requests:
            print(submission.answer(line), file=answers, flush=True)
