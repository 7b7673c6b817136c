"""A checkpoint as a page that samples in the browser (`live.html`), as safetensors or as ONNX.

The page holds everything: the weights, and the JavaScript beside this file, which mirrors the network, the process and
the samplers. It asks for nothing outside, and its Content-Security-Policy forbids it to.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import inspect
import json
import logging
import warnings
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from torch import Tensor, nn

from ex2.errors import InputError
from ex2.machine.files import write_atomically
from ex2.noise import ImageNoise
from ex2.settings.build import build_diffusion
from ex2.settings.config import Config
from ex2_diffusion import guided_eps
from ex2_model import LinearAttention, Unet, WeightStandardizedConv2d

LARGEST_PAGE = 200e6  # bytes of inlined text: browsers take more, but a phone or a mail doesn't
SCRIPTS = ("kernel", "weights", "unet", "diffusion", "worker", "apng", "page", "painting")
HERE = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def export(model: Unet, checkpoint: dict, config: Config, format: str, weights_as: str, command: str) -> Path:
    """Writes the model into the folder of its run, and says so. Returns the file.

    Args:
        model: in eval mode, on the CPU.
        checkpoint: it is of.
        config: its settings; the file goes to its run folder.
        format: "page", "safetensors" or "onnx".
        weights_as: how the page holds them: "float16", "int8" or "float32".
        command: that was called, for the page.

    Raises InputError: a page that would be too large, or a package that isn't there.
    """
    about = describe(model, checkpoint, config)
    if format == "page":
        path = config.run_dir / "live.html"
        write_page(path, model, about, config, weights_as, command)
    elif format == "safetensors":
        path = config.run_dir / "model.safetensors"
        write_safetensors(path, model, about)
    else:
        path = config.run_dir / "model.onnx"
        write_onnx(path, model, config.image_size)
    print(f"done: see {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def describe(model: Unet, checkpoint: dict, config: Config) -> dict:
    """What one has to know of a model to sample from its weights: the settings of network, process and sampling."""
    names = ("image_size", "dim", "dim_mults", "timesteps", "schedule", "sampler", "sample_steps", "eta")
    return {
        "name": checkpoint["config"]["run_name"],
        **{name: getattr(config, name) for name in names},
        "levels": len(config.dim_mults),
        "groups": model.mid_block1.block1.norm.num_groups,
        "channels": model.channels,
        "null_class": model.null_class,
        "class_names": checkpoint["class_names"] if model.null_class is not None else [],
        "can_guide": config.can_guide,
        "guidance_scale": config.sampling["guidance_scale"],
        "guidance_interval": config.guidance_interval,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


# ------------------------------------------------------------------ the page


def write_page(path: Path, model: Unet, about: dict, config: Config, weights_as: str, command: str) -> None:
    """live.html, and a line about what rounding the weights costs."""
    parameters, content, rounded = encode_weights(model.state_dict(), weights_as)
    size = len(content) * 4 / 3
    if size > LARGEST_PAGE:
        smaller = "give --format safetensors" if weights_as == "int8" else "give --weights_as int8"
        limit = f"a page holds at most {LARGEST_PAGE / 1e6:.0f} MB"
        raise InputError(f"the weights as {weights_as} take {size / 1e6:.0f} MB of text, {limit}: {smaller}")
    error = rounding_error(model, rounded, config)
    rounding = f"Its weights are kept as {weights_as}: the predicted noise differs by {error:.2g} of its size."
    print(rounding)
    scripts = {name: Markup((HERE / f"{name}.js").read_text("utf-8")) for name in SCRIPTS}
    style = Markup((HERE / "live.css").read_text("utf-8"))
    page = TEMPLATES.get_template("live.html").render(
        title=about["name"],
        size=config.image_size,
        timesteps=config.timesteps,
        parameters=about["parameters"],
        classes=about["class_names"],
        can_guide=config.can_guide,
        config={**about, "weights": parameters},
        weights=base64.b64encode(content).decode(),
        scripts=scripts,
        style=style,
        policy=Markup(content_security_policy([scripts[name] for name in SCRIPTS if name != "worker"], style)),
        rounding=rounding,
        command=command,
    )
    write_atomically(path, page.encode("utf-8", "replace"))


def content_security_policy(scripts: list[str], style: str) -> str:
    """Only these scripts and this style, Workers made of them, WebAssembly, and pictures of the page's own."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(map(digest, scripts))
    return (
        f"default-src 'none'; script-src {allowed} 'wasm-unsafe-eval'; worker-src blob:; style-src {digest(style)}; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )


def encode_weights(state: dict[str, Tensor], weights_as: str) -> tuple[list, bytes, dict[str, Tensor]]:
    """([name, kind, shape] of each parameter, their bytes as weights.js reads them, what they are after rounding).

    int8 has a scale for every output channel, and keeps what has no such channels (biases, norms) as float16.

    Raises InputError: a weight that is not finite, or too large for float16.
    """
    parameters, content, rounded = [], bytearray(), {}
    for name, value in state.items():
        value, kind = value.detach().float().cpu(), weights_as
        if kind == "int8" and value.ndim > 1:
            rows = value.flatten(1)
            scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            whole = (rows / scales).round().to(torch.int8)
            content += scales.numpy().tobytes() + whole.numpy().tobytes()
            rounded[name] = (whole * scales).reshape(value.shape)
        else:
            kind = "float32" if kind == "float32" else "float16"
            kept = value if kind == "float32" else value.half()
            content += kept.numpy().tobytes()
            rounded[name] = kept.float()
        if not rounded[name].isfinite().all():
            raise InputError(f"the weights {name} are not finite as {kind}: give --weights_as float32, or train anew")
        parameters.append([name, kind, list(value.shape)])
    return parameters, bytes(content), rounded


@torch.no_grad()
def rounding_error(model: Unet, rounded: dict[str, Tensor], config: Config) -> float:
    """How much rounded weights change the predicted noise, relative to its size, along ten steps of a few samples."""
    other, diffusor = copy.deepcopy(model), build_diffusion(config, "cpu")
    other.load_state_dict(rounded)
    count = 4
    classes = None if model.null_class is None else torch.arange(count) % model.null_class
    how = {"classes": classes, "sampler": "ddim", "steps": min(10, config.timesteps)}
    noise = ImageNoise(config.seed, 0, count)
    trajectory = diffusor.sample_trajectory(model, config.image_size, count, generator=noise, **how)
    squares = torch.zeros(2)
    for t, x, _ in trajectory:
        if t >= 0:
            given = (x, torch.full((count,), t), classes)
            eps = guided_eps(model, *given)
            squares += torch.stack(((guided_eps(other, *given) - eps).square().sum(), eps.square().sum()))
    return float((squares[0] / squares[1]).sqrt())


# ------------------------------------------------------------------ files for other programs


def write_safetensors(path: Path, model: Unet, about: dict) -> None:
    """The weights under torch's names, with the settings as JSON in the metadata; see docs/export.md.

    Raises InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(f"--format safetensors needs a package: pip install safetensors ({error})") from error
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(state, metadata={"format": "pt", "settings": json.dumps(about)}))


def write_onnx(path: Path, model: Unet, image_size: int) -> None:
    """The call eps = f(x, time, classes) by torch's exporter, for batches of any size; see docs/export.md.

    Raises InputError: onnx or onnxscript is not installed, or torch is too old.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--format onnx needs packages: pip install onnx onnxscript ({error})") from error
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise InputError(f"--format onnx needs torch 2.5 or newer, this is {torch.__version__}")
    inputs = {"x": torch.zeros(2, model.channels, image_size, image_size), "time": torch.zeros(2, dtype=torch.long)}
    if model.null_class is not None:
        inputs["classes"] = torch.zeros(2, dtype=torch.long)
    batch = torch.export.Dim("batch")
    names = {"input_names": list(inputs), "output_names": ["eps"]}
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every Split
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the name of the batch, which it keeps
        program = torch.onnx.export(
            plain(model),
            tuple(inputs.values()),
            dynamo=True,
            dynamic_shapes={name: {0: batch} for name in inputs},
            verbose=False,
            **names,
        )
    content = program.model_proto
    for node in content.graph.node:  # the exporter's notes on where each operation came from: a tenth of the file
        del node.metadata_props[:]
    write_atomically(path, content.SerializeToString())


def plain(model: Unet) -> Unet:
    """The same function for a tracer: ordinary convolutions with standardised weights, attention to a whole batch."""
    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        if isinstance(module, LinearAttention):
            module.in_parts = False
        for name, child in module.named_children():
            if isinstance(child, WeightStandardizedConv2d):
                conv = nn.Conv2d(child.in_channels, child.out_channels, child.kernel_size, padding=child.padding)
                conv.weight.data, conv.bias.data = child.standardized().detach(), child.bias.detach()
                setattr(module, name, conv)
    return copied.eval()
