"""The U-Net, its time embedding and its class conditioning (2.1, 2.4 a)."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import ex2_model
from ex2.machine.compiling import compile_blocks
from ex2.optimisation import build_optimizer
from ex2_model import SinusoidalPositionEmbeddings, Unet, WeightStandardizedConv2d

SKELETON = json.loads((Path(__file__).parent / "skeleton_unet.json").read_text())


def deterministic_weights(shapes):
    """Weights that depend on names and shapes alone, so that another network can be given the very same."""
    weights = {}
    for name, shape in shapes.items():
        seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        weights[name] = 1 + 0.1 * values if name.endswith("norm.weight") else 0.1 * values
    return weights


def conditional(**options):
    torch.manual_seed(0)
    return Unet(dim=8, dim_mults=(1, 2), class_free_guidance=True, **{"num_classes": 10, **options})


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=g), torch.tensor([0, 5, 500, 999]), torch.tensor([0, 3, 3, 9])


# ------------------------------------------------------------------ the skeleton's network


def test_skeleton_checkpoint_loads_and_gives_the_skeletons_output():
    """`skeleton_unet.json` holds names and shapes of the handed-out network's parameters, and its output for
    `deterministic_weights`, recorded by running the handed-out code."""
    model = Unet(dim=32, channels=3, dim_mults=(1, 2, 4)).eval()
    assert sum(p.numel() for p in model.parameters()) == 2_602_115
    model.load_state_dict(deterministic_weights(SKELETON["shapes"]), strict=True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(x, torch.tensor([3, 700]))
    expected = torch.tensor(SKELETON["output"])
    assert (output[:, :, ::4, ::4] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_one_class_for_all_sizes(size):
    model = Unet(dim=8, dim_mults=(1, 2, 4)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size), torch.tensor([1])).shape == (1, 3, size, size)


def test_upsampling_is_repeated_pixels_then_a_convolution():
    torch.manual_seed(0)
    layer = ex2_model.Upsample(3, 5).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    repeat, conv = layer
    inputs = (x, conv.weight, conv.bias)
    expected, output = conv(repeat(x)), layer(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((output * weights).sum(), inputs), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [ex2_model.Attention, ex2_model.LinearAttention])
def test_attention_adds_nothing_at_the_start_and_learns_from_the_first_step_on(kind):
    torch.manual_seed(0)
    layer, x = ex2_model.attention(8, kind), torch.randn(2, 8, 4, 4)
    weights = torch.randn(2, 8, 4, 4)
    assert torch.equal(layer(x), x)
    for _ in range(2):  # queries and keys have no gradient before the second step
        layer.zero_grad()
        (layer(x) * weights).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert (layer(x) - x).std(dim=(0, 2, 3)).min() > 1e-4
    assert min(float(p.grad.abs().max()) for p in layer.parameters()) > 0


def test_full_attention_never_runs_over_more_than_32x32_positions():
    with pytest.raises(ValueError, match="64x64 positions"):
        Unet(dim=8, dim_mults=(1, 2))(torch.randn(1, 3, 128, 128), torch.tensor([1]))


def test_sides_that_cannot_be_halved_are_named():
    with pytest.raises(ValueError, match="10x10 pixels.*multiples of 4"):
        Unet(dim=8, dim_mults=(1, 2, 4))(torch.randn(1, 3, 10, 10), torch.tensor([1]))


def test_widths_that_group_norm_cannot_divide_are_named():
    with pytest.raises(ValueError, match="10 channels into 4 groups"):
        Unet(dim=10)
    with pytest.raises(ValueError, match="30 channels into 4 groups"):
        Unet(dim=8, init_dim=30)


def test_init_dim_and_out_dim_are_honoured():
    model = Unet(dim=8, init_dim=16, out_dim=6, dim_mults=(1, 2), channels=1)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).shape == (2, 6, 8, 8)


def test_every_skip_connection_is_used_once():
    model = Unet(dim=8, dim_mults=(1, 2, 4))
    model(torch.randn(1, 3, 16, 16), torch.tensor([1]))
    del model.ups[-1]
    with pytest.raises((AssertionError, RuntimeError)):
        model(torch.randn(1, 3, 16, 16), torch.tensor([1]))


def test_autocast_changes_rounding_and_not_the_function():
    torch.manual_seed(0)
    conv = WeightStandardizedConv2d(4, 4, 3)
    conv.weight.data.mul_(0.1)  # so small that the epsilon counts
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = conv(x.bfloat16()).float()
    exact = conv(x)
    assert 0 < (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_every_parameter_gets_a_gradient(batch):
    model, (x, t, classes) = conditional(p_uncond=0.5), batch
    torch.manual_seed(1)
    model(x, t, classes).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("dim", [4, 6, 8, 32, 128])
def test_time_embedding_is_finite_and_of_width_dim(dim):
    embedding = SinusoidalPositionEmbeddings(dim)(torch.arange(1000))
    assert embedding.shape == (1000, dim)
    assert embedding.isfinite().all() and embedding.abs().max() <= 1
    assert len(torch.unique(embedding, dim=0)) == 1000


@pytest.mark.parametrize("dim", [0, 1, 2, 3, 7])
def test_time_embedding_refuses_widths_it_cannot_fill(dim):
    with pytest.raises(ValueError, match=f"dim={dim}"):
        SinusoidalPositionEmbeddings(dim)


def test_time_embedding_values():
    embedding = SinusoidalPositionEmbeddings(4)(torch.tensor([2]))[0]
    expected = torch.tensor([2.0, 2e-4])
    torch.testing.assert_close(embedding, torch.cat((expected.sin(), expected.cos())))


# ------------------------------------------------------------------ 2.4 a: classes


@pytest.mark.parametrize("null_token", ["learned", "zero"])
def test_null_labels_are_the_same_as_none(batch, null_token):
    model, (x, t, _) = conditional(null_token=null_token).eval(), batch
    torch.testing.assert_close(model(x, t), model(x, t, torch.full((4,), model.null_class)))


def test_with_p_uncond_one_training_does_not_depend_on_labels(batch):
    model, (x, t, classes) = conditional(p_uncond=1.0), batch
    assert torch.equal(model(x, t, classes), model(x, t, 9 - classes))


@pytest.mark.parametrize("p_uncond, null_gets_gradient", [(0.5, True), (0.0, False)])
def test_null_token_learns_when_labels_are_dropped(batch, p_uncond, null_gets_gradient):
    model, (x, t, classes) = conditional(p_uncond=p_uncond), batch
    torch.manual_seed(0)
    model(x, t, classes).square().mean().backward()
    assert (model.null_token.grad.abs().max() > 0) == null_gets_gradient


@pytest.mark.parametrize("p_uncond, expected, tolerance", [(0.0, 0, 0), (1.0, 1, 0), (0.1, 0.1, 0.005)])
def test_share_of_dropped_labels(p_uncond, expected, tolerance):
    torch.manual_seed(0)
    model, classes = conditional(p_uncond=p_uncond), torch.arange(100_000) % 10
    before = classes.clone()
    dropped = model.drop_labels(classes)
    assert torch.equal(classes, before), "labels must not change in place"
    assert (dropped == model.null_class).float().mean().item() == pytest.approx(expected, abs=tolerance)
    kept = dropped != model.null_class
    assert torch.equal(dropped[kept], classes[kept])


def test_null_tokens():
    learned, zero = conditional(null_token="learned"), conditional(null_token="zero")
    assert isinstance(learned.null_token, torch.nn.Parameter)
    assert "null_token" in zero.state_dict() and not zero.null_token.any()
    assert "null_token" not in dict(zero.named_parameters())


def test_default_share_of_dropped_labels_is_a_tenth():
    assert conditional(p_uncond=None).p_uncond == 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_classes": None}, "num_classes"),
        ({"num_classes": 0}, "got 0"),
        ({"p_uncond": 1.5}, "got 1.5"),
        ({"null_token": "none"}, "'none'"),
    ],
)
def test_class_settings_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        conditional(**options)


def test_labels_for_an_unconditional_model_or_of_wrong_number_are_errors(batch):
    x, t, classes = batch
    with pytest.raises(ValueError, match="unconditional"):
        Unet(dim=8, dim_mults=(1, 2))(x, t, classes)
    with pytest.raises(ValueError, match="expected 4 class labels"):
        conditional()(x, t, classes[:2])


@pytest.mark.parametrize("per_part, sizes", [(5, [5]), (2, [2, 2, 1])])
def test_parts_of_a_batch_are_the_batch(monkeypatch, per_part, sizes):
    """A CPU computes linear attention in parts: outputs and gradients are those of every image alone."""
    torch.manual_seed(0)
    layer, x = ex2_model.LinearAttention(8), torch.randn(5, 8, 4, 6)
    torch.nn.init.ones_(layer.to_out[1].weight)  # which starts at zero
    alone = torch.cat([layer(image[None]) for image in x])
    wanted = torch.autograd.grad(alone.square().mean(), list(layer.parameters()))
    seen, attend = [], layer.attend
    monkeypatch.setattr(ex2_model, "CACHED_ELEMENTS", per_part * 4 * 6 * 128)
    monkeypatch.setattr(layer, "attend", lambda part: seen.append(len(part)) or attend(part))
    out = layer(x)
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(torch.autograd.grad(out.square().mean(), list(layer.parameters())), wanted)
    assert seen == sizes


def test_dropout_is_for_training_alone_and_adds_no_weights():
    torch.manual_seed(0)
    with_dropout, without = (Unet(dim=8, dim_mults=(1, 2), dropout=share) for share in (0.5, 0.0))
    without.load_state_dict(with_dropout.state_dict(), strict=True)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 5])
    assert not torch.equal(with_dropout.train()(x, t), without.train()(x, t))
    assert torch.equal(with_dropout.eval()(x, t), without.eval()(x, t))


@torch.no_grad()
def test_weights_that_are_kept_standardised_follow_every_change():
    """In eval mode without gradients, where they are computed once."""
    torch.manual_seed(0)
    layer, other = WeightStandardizedConv2d(3, 4, 3).eval(), WeightStandardizedConv2d(3, 4, 3)
    x = torch.randn(1, 3, 8, 8)
    before = layer(x)
    assert layer.kept is not None and torch.equal(layer(x), before)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.weight.mul_(torch.linspace(0.5, 2, 27).reshape(3, 3, 3))
    other.weight.copy_(layer.weight)
    assert torch.equal(layer(x), other.train()(x))
    assert "kept" not in " ".join(layer.state_dict())


def test_weights_that_are_kept_standardised_follow_an_optimiser_that_changes_all_in_one_pass():
    torch.manual_seed(0)
    layer = WeightStandardizedConv2d(3, 4, 3)
    optimizer, x = build_optimizer(layer, 0.5), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = layer.eval()(x)
    layer.train()(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = layer.eval()(x)
        assert torch.equal(after, layer.train()(x)) and not torch.equal(after, before)


def test_only_batches_of_one_size_are_compiled(monkeypatch):
    """The last batch of an epoch is smaller, and would have all blocks compiled anew."""
    used = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *args: used.append(len(args[0])) or f(*args))
    model = Unet(dim=8, dim_mults=(1, 2)).eval()
    batches = [(torch.randn(size, 3, 8, 8), torch.arange(size)) for size in (2, 3)]
    plain = [model(*batch) for batch in batches]
    compile_blocks(model, 2)
    for batch, expected in zip(batches, plain):
        torch.testing.assert_close(model(*batch), expected)
    assert set(used) == {2} and model.compiled
    compile_blocks(model)
    used.clear()
    model(*batches[0])
    assert not used and not model.compiled
