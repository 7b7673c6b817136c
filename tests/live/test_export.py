"""`export`: what is written is the model, loads elsewhere, and is refused in one line where it can't be."""

import json
import re
from pathlib import Path

import pytest
import torch
from javascript import Engine
from tiny import ROOT, rejected

import ex2_main
from ex2.live import export
from ex2.settings.build import restore_model
from ex2.settings.config import config_of
from ex2.training.checkpoint import load_checkpoint
from ex2_model import Unet

LOADING = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text("utf-8"), re.S)


@pytest.fixture(scope="module")
def model(trained):
    checkpoint = load_checkpoint(trained)
    return restore_model(checkpoint, config_of(checkpoint, {}), "cpu")


def written(trained, tmp_path, *flags):
    """The one file that a call of `export` writes beside its command."""
    assert ex2_main.main(["export", "--checkpoint", str(trained), "--out", str(tmp_path), *flags]) == 0
    (path,) = (path for path in tmp_path.iterdir() if path.name != "commands.txt")
    return path


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 8, 8, generator=g), torch.tensor([0, 29, 14]), torch.tensor([3, 0, 10])


# ------------------------------------------------------------------ the page


@pytest.mark.parametrize("weights_as, most", [("float32", 1e-5), ("float16", 3e-3), ("int8", 0.1)])
def test_the_page_holds_the_model(trained, model, inputs, tmp_path, weights_as, most):
    page = written(trained, tmp_path, "--weights_as", weights_as).read_text("utf-8")
    about = json.loads(re.search(r'id="config">(.*?)</script>', page).group(1))
    engine = Engine()
    scripts = dict(re.findall(r'<script id="(\w+)"[^>]*>(.*?)</script>', page, re.S))
    assert list(scripts) == list(export.SCRIPTS)
    for name in ("kernel", "weights", "unet", "diffusion"):
        engine.context.eval(scripts[name] + "\n;undefined")
    engine.put_bytes("bytes", re.search(r'id="bytes">(.*?)</script>', page).group(1))
    engine.context.eval(f"""var config = {json.dumps(about)};
        var model = build_unet(config, decode_weights(config.weights, bytes), true); undefined""")
    x, time, classes = inputs
    with torch.no_grad():
        wanted = model(x, time, classes)
    for i in range(3):
        engine.put("x", x[i])
        found = engine.floats(f"model.forward(x, {time[i]}, {classes[i]})")
        assert abs(found - wanted[i].numpy().ravel()).max() < most * wanted.abs().max()
    assert about["sample_steps"] == 3 and about["timesteps"] == 30 and about["schedule"] == "cosine"
    assert len(about["class_names"]) == about["null_class"] == 10


def test_weights_become_smaller_and_what_that_costs_is_said(trained, tmp_path, capsys):
    sizes, errors = {}, {}
    for kind in ("float32", "float16", "int8"):
        page = written(trained, tmp_path, "--weights_as", kind).read_text("utf-8")
        sizes[kind] = len(re.search(r'id="bytes">(.*?)</script>', page).group(1))
        said = re.search(rf"Its weights are kept as {kind}: the predicted noise differs by (\S+) of its size.", page)
        assert said.group(0) in capsys.readouterr().out
        errors[kind] = float(said.group(1))
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, abs=4)
    assert sizes["int8"] < 0.75 * sizes["float16"]  # the narrowest network: a scale for each of few weights
    assert errors["float32"] == 0 < errors["float16"] < 1e-3 < errors["int8"] < 0.1


def test_int8_is_at_most_half_a_step_of_its_channel_away():
    state = {"weight": torch.randn(5, 4, 3, 3) * torch.tensor([1e-4, 1e-2, 1.0, 100.0, 0.0]).reshape(5, 1, 1, 1)}
    parameters, content, rounded = export.encode_weights(state, "int8")
    largest = state["weight"].abs().amax((1, 2, 3), keepdim=True)
    assert ((rounded["weight"] - state["weight"]).abs() <= largest / 253.9).all()
    assert parameters == [["weight", "int8", [5, 4, 3, 3]]] and len(content) == 5 * 4 + 180


def test_float16_is_read_bit_by_bit():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every.isfinite()
    found = torch.from_numpy(
        Engine("weights").floats("from_float16(Uint16Array.from({length: 65536}, (_, i) => i))").copy()
    )
    assert torch.equal(found[finite], every[finite].float())


def test_a_class_name_is_no_markup(tmp_path, trained, model):
    checkpoint = load_checkpoint(trained)
    config = config_of(checkpoint, {"results_dir": str(tmp_path.parent), "run_name": tmp_path.name})
    checkpoint["class_names"][0] = "</script><script>alert(1)</script>"
    checkpoint["config"]["run_name"] = "a&b"
    page = export.export(model, checkpoint, config, "page", "int8", "python <b>").read_text("utf-8")
    assert "<script>alert" not in page and "python &lt;b&gt;" in page and "<title>a&amp;b:" in page


def test_no_script_ends_itself():
    for name in export.SCRIPTS:
        assert "</script" not in (Path(export.__file__).parent / f"{name}.js").read_text("utf-8")


# ------------------------------------------------------------------ other programs


def test_safetensors_are_a_quarter_of_the_checkpoint_and_load_as_documented(trained, model, inputs, tmp_path):
    pytest.importorskip("safetensors", reason="pip install -r requirements-extras.txt")
    path = written(trained, tmp_path, "--format", "safetensors")
    assert path.stat().st_size < 0.3 * (trained / "ckpt.pt").stat().st_size
    values = {"FILE": str(path)}
    exec(LOADING[0], values)
    with torch.no_grad():
        torch.testing.assert_close(values["model"](*inputs), model(*inputs), rtol=0, atol=0)


def test_onnx_takes_batches_of_any_size_and_loads_as_documented(inputs, tmp_path):
    """By a network of a single level: the exporter takes seconds for each."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="pip install -r requirements-extras.txt")
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1,), class_free_guidance=True, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    export.write_onnx(tmp_path / "model.onnx", model, 8)
    values = {"FILE": str(tmp_path / "model.onnx")}
    exec(LOADING[1], values)
    for count in (1, 3, 150):  # 150: more than a CPU attends to at a time
        x, time, classes = (given.repeat(count // 3 + 1, *[1] * (given.ndim - 1))[:count] for given in inputs)
        with torch.no_grad():
            wanted = model(x, time, classes)
        found = torch.from_numpy(values["predict_noise"](x.numpy(), time.numpy(), classes.numpy()))
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


# ------------------------------------------------------------------ what can't be exported


def test_bad_requests_for_an_export_are_one_line(trained, tmp_path, capsys, monkeypatch):
    command = ["export", "--checkpoint", str(trained), "--out", str(tmp_path)]
    assert "--weights_as is for --format page" in rejected(
        [*command, "--format", "onnx", "--weights_as", "int8"], capsys
    )
    assert "--format: invalid choice: 'gguf'" in rejected([*command, "--format", "gguf"], capsys)
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    assert "is damaged or no checkpoint" in rejected([*command[:2], str(tmp_path / "other.pt")], capsys)
    monkeypatch.setattr(export, "LARGEST_PAGE", 50_000)
    said = rejected(command, capsys)
    assert "the weights as float16 take 0 MB of text" in said and "give --weights_as int8" in said
    assert "give --format safetensors" in rejected([*command, "--weights_as", "int8"], capsys)
    assert not (tmp_path / "live.html").exists()


def test_weights_that_float16_does_not_hold_are_named(model):
    state = {**model.state_dict(), "init_conv.bias": torch.full((8,), 1e6)}
    with pytest.raises(ValueError, match="the weights init_conv.bias are not finite as float16"):
        export.encode_weights(state, "float16")
    assert export.encode_weights(state, "float32")


def test_the_page_of_the_showcase_is_made_of_these_scripts():
    page = (ROOT / "results" / "showcase" / "live.html").read_text(encoding="utf-8")
    missing = [name for name in (*export.SCRIPTS, "live.css") if read(name) not in page]
    assert not missing, f"{missing} changed: export the showcase's page again"


def read(name):
    return (export.HERE / (name if "." in name else f"{name}.js")).read_text(encoding="utf-8")
