"""The network of the live page computes what the torch model does, and its kernel is that of kernel.wat."""

import json

import pytest
import torch
from javascript import INSTALL, LIVE, Engine

from ex2_diffusion import SCHEDULES, Diffusion
from ex2_model import Unet

NETWORKS = {
    "unconditional": (16, {"dim": 8, "dim_mults": (1, 2, 2)}),
    "learned null token": (16, {"dim": 16, "dim_mults": (1, 2), "class_free_guidance": True, "num_classes": 3}),
    "zero null token, 12 pixels": (
        12,
        {"dim": 8, "dim_mults": (1, 2, 4), "class_free_guidance": True, "num_classes": 3, "null_token": "zero"},
    ),
    "four levels, 32 pixels": (32, {"dim": 8, "dim_mults": (1, 2, 4, 8)}),
}


def random_model(settings):
    """A U-Net of which no weight is zero, as after a training."""
    torch.manual_seed(0)
    model = Unet(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build(model, settings, size, simd=True):
    """V8 with that model as `model`."""
    engine = Engine("kernel", "unet", "diffusion")
    engine.put_state("state", model)
    config = {"dim": settings["dim"], "levels": len(settings["dim_mults"]), "groups": 4, "channels": 3}
    config |= {"image_size": size, "null_class": model.null_class}
    engine.context.eval(f"var model = build_unet({json.dumps(config)}, state, {json.dumps(simd)}); undefined")
    return engine


def relative_difference(found, wanted):
    return float(abs(found - wanted.numpy().ravel()).max() / abs(wanted).max())


@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_eps_is_that_of_torch(name, simd):
    size, settings = NETWORKS[name]
    model = random_model(settings)
    engine = build(model, settings, size, simd)
    for time, label in [(0, 0), (999, 2), (500, None)] if simd else [(731, 1)]:
        x = torch.randn(1, 3, size, size)
        engine.put("x", x)
        classes = None if label is None or model.null_class is None else torch.tensor([label])
        with torch.no_grad():
            wanted = model(x, torch.tensor([time]), classes)
        found = engine.floats(f"model.forward(x, {time}, {'undefined' if classes is None else label})")
        assert relative_difference(found, wanted) < 1e-5


def test_a_whole_trajectory_of_ddim_is_that_of_torch():
    size, settings = NETWORKS["learned null token"]
    model, process = random_model(settings), Diffusion(1000, SCHEDULES["linear"], size, "cpu")
    engine = build(model, settings, size)
    g = torch.Generator().manual_seed(0)
    how = {"classes": [1], "guidance_scale": 1.0, "sampler": "ddim", "steps": 10}
    wanted = list(process.sample_trajectory(model, size, 1, generator=g, **how))
    engine.put("noise", wanted[0][1])
    engine.context.eval("""
        var settings = {label: 1, guidance_scale: 1, guidance_interval: [0, 1], sampler: "ddim", steps: 10, eta: 0};
        var process = new Diffusion(SCHEDULES.linear(1000));
        var found = [...sample_trajectory(process, model, settings, () => noise)]; undefined""")
    for i, (_, x, _) in enumerate(wanted):
        assert abs(engine.floats(f"found[{i}].x") - x.numpy().ravel()).max() < 1e-3


def test_every_block_is_that_of_torch():
    size, settings = NETWORKS["learned null token"]
    model = random_model(settings)
    engine = build(model, settings, size)
    x, emb = torch.randn(1, 16, 8, 8), torch.randn(1, 64)
    engine.put("x", x)
    engine.put("emb", emb)
    engine.context.eval("""function given() {
        const tensor = new_tensor(model.kernel, 16, 8);
        tensor.data.set(x);
        return tensor;
    }""")
    blocks = {
        "downs[0][0].forward(given(), Array.from(emb))": lambda: model.downs[0][0](x, emb),
        "downs[0][2].forward(given())": lambda: model.downs[0][2](x),
        "downs[0][3].forward(given())": lambda: model.downs[0][3](x),
        "downs[1][3].forward(given())": lambda: model.downs[1][3](x),
        "ups[1][3].forward(given())": lambda: model.ups[1][3](x),
        "final_conv.forward(given())": lambda: model.final_conv(x),
    }
    for code, call in blocks.items():
        with torch.no_grad():
            wanted = call()
        assert relative_difference(engine.floats(f"model.{code}.data"), wanted) < 1e-5, code
    for time in (0, 1, 999):
        with torch.no_grad():
            wanted = model.time_mlp(torch.tensor([time]))
        engine.context.eval(f"var emb = model.time_mlp[0].forward({time}); undefined")
        found = engine.floats("Float32Array.from(model.time_mlp[2].forward(model.time_mlp[1].forward(emb).map(gelu)))")
        assert relative_difference(found, wanted) < 1e-5


def test_a_class_that_is_not_there_is_named():
    size, settings = NETWORKS["learned null token"]
    engine = build(random_model(settings), settings, size)
    engine.put("x", torch.zeros(3, size, size))
    said = engine.run("(() => { try { model.forward(x, 0, 4); } catch (error) { return error.message; } })()")
    assert said == "class 4: this model has 0 .. 2, and 3 for none"


@pytest.mark.parametrize("K, M, N", [(4, 1, 8), (3, 5, 7), (64, 576, 16), (8, 27, 36), (5, 3, 1)])
def test_the_kernel_multiplies_matrices_of_any_size_with_and_without_simd(K, M, N):
    w, x = torch.randn(K, M), torch.randn(M, N)
    engine = Engine("kernel")
    engine.put("w", w)
    engine.put("x", x)
    for simd in ("true", "false"):
        engine.context.eval(f"""var kernel = new Kernel(2 ** 20, {simd});
            var [a, b, y, after] = [{K * M}, {M * N}, {K * N}, 9].map((size) => kernel.floats(size).fill(7));
            a.set(w); b.set(x); kernel.product(a, b, y, {K}, {M}, {N}); undefined""")
        assert relative_difference(engine.floats("y"), w @ x) < 1e-5
        assert (engine.floats("after") == 7).all()  # nothing beside y is written


def test_the_bytes_of_the_kernel_are_those_of_its_source():
    wasmtime = pytest.importorskip("wasmtime", reason=f"{INSTALL}: wasmtime reads kernel.wat")
    found = bytes(Engine("kernel").run("Array.from(KERNEL_BYTES)"))
    assert found == bytes(wasmtime.wat2wasm((LIVE / "kernel.wat").read_text("utf-8")))
    assert len(found) < 1000
