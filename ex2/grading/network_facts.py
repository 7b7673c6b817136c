"""What is true of every right solution of the exercise, whoever wrote it: network, test loop, images, guidance."""

from __future__ import annotations

import torch

from ex2.grading.facts import p_sample, sample
from ex2.grading.submission import ONE_BETA, P_UNCOND
from ex2.grading.verdicts import Fact, NotRight, check, expect, images, like, missing, random_images


@Fact("2.1", "the U-Net gives an image of the size it gets, finite")
def unet_shape(submission) -> None:
    x = random_images(2, 16)
    out = like(x, submission.forward(x, torch.tensor([0, 7]))["out"])
    check(out.isfinite().all(), "infinite numbers", "finite ones")


@Fact("2.1", "the U-Net gets the time, each image its own")
def unet_time(submission) -> None:
    x = random_images(2, 16)
    early, late, both = (like(x, submission.forward(x, torch.tensor(t))["out"]) for t in ([1, 1], [500, 500], [1, 500]))
    differ = not torch.allclose(early, late, atol=1e-6)
    check(differ, "the same output at t = 1 and t = 500", "different ones", "the time embedding reaches no block")
    own = torch.allclose(both, torch.stack((early[0], late[1])), atol=1e-3 * late.abs().max().item())
    check(own, "an output that depends on the times of other images", "one for each image")


@Fact("2.2 e", "the test loop judges in eval mode, without gradients")
def test_loop(submission) -> None:
    calls = submission.run_test()["calls"]
    check(calls, "a test loop that never calls the model", "losses of the test set")
    elsewhere = submission.outline["eval_elsewhere"]  # the caller may have done it
    slip = "model.eval() is missing: labels are dropped in the test"
    check(elsewhere or not any(call["training"] for call in calls), "the model in training mode", "eval mode", slip)
    check(not any(call["gradients"] for call in calls), "gradients", "none", "torch.no_grad() is missing")


@Fact("2.2 e", "a Fréchet distance (FID) is of at least 100 images", advice=True)
def fid_images(submission) -> None:
    submission.load("main")
    count = submission.outline["fid_images"]
    slip = f"FID on {count} images: most of it is the error of so few"
    check(count is None or count >= 100, f"{count} images", "100 or more, thousands where it is quoted", slip)


@Fact("2.2 f", "saved images have the range of images: a value of 0.5 is a grey of 191")
def saved_range(submission) -> None:
    counts = submission.saved_greys()
    check(counts.shape == (256,), f"{tuple(counts.shape)} counts", "256 of greys")
    inside = counts[17:240]  # without margins
    found = 17 + int(inside.argmax()) if inside.any() else int((counts.cumsum(0) * 2 >= counts.sum()).int().argmax())
    slips = {"images saved dark: [-1, 1] was cut to [0, 1], not scaled": 127, "images saved black": 0}
    expect(found, 191.0, slips, "grey", rel=0, scale=6)  # a JPEG changes it a little


@Fact("2.3", "x_T keeps less than 1% of the image with the settings of the program", advice=True)
def end_of_the_process(submission) -> None:
    submission.load("main")
    plain = submission.outline["settings"]
    if plain is None:
        return  # they can't be read off the source; the schedules are judged above
    steps, name, ends = plain["timesteps"], plain["name"], dict(zip(("beta_start", "beta_end"), plain["ends"]))
    left = torch.cumprod(1 - submission.schedule(name, timesteps=steps, **ends), 0)[-1].item()
    slip = f"x_T keeps {left:.0%} of the image at T = {steps}: samples start from noise the model never saw"
    check(left <= 0.01, f"alpha-bar {left:.3f} at T = {steps} of the {name} schedule", "below 0.01", slip)


def conditional(submission, value: int, training: bool = False, seed: int = 0) -> dict:
    """What a conditional U-Net with p_uncond = 0.5 makes of the same image 64 times, all of one class."""
    if not submission.takes("model", "Unet.forward", "classes"):
        raise missing("Unet.forward takes no classes")
    t, classes = torch.full((64,), 3), torch.full((64,), value)
    return submission.forward(random_images(64), t, classes, p_uncond=0.5, training=training, seed=seed)


def fraction_equal(submission, **options) -> float:
    """The fraction of images for which two classes give the same."""
    a, b = (like(random_images(64), conditional(submission, value, **options)["out"]) for value in (0, 1))
    check(a.isfinite().all() and b.isfinite().all(), "infinite numbers", "finite ones")
    return ((a - b).flatten(1).abs().amax(1) <= 1e-5 * a.abs().max()).double().mean().item()


@Fact("2.4 a", "the class changes what the U-Net predicts")
def class_matters(submission) -> None:
    equal = fraction_equal(submission)
    check(equal < 1, "the same output for two classes", "different ones", "the class embedding reaches no block")


@Fact("2.4 a", "labels are dropped in training mode only")
def class_in_eval(submission) -> None:
    equal = fraction_equal(submission)
    found = f"{equal:.0%} of the labels without effect in eval mode"
    check(equal == 0, found, "0%", "labels are dropped in eval mode")


@Fact("2.4 a", "in training each label is dropped by itself, with probability p_uncond")
def class_dropped(submission) -> None:
    fractions = [fraction_equal(submission, training=True, seed=seed) for seed in range(6)]
    if not any(fractions) and submission.outline.get("drops_elsewhere"):
        raise NotRight("differs", "none in the U-Net", "each by itself", "labels are dropped by the caller")
    slip = "dropped for the batch as a whole"
    check(set(fractions) != {0.0, 1.0}, "all labels of a batch dropped, or none", "each by itself", slip)
    slips = {"labels are never dropped": 0.0, "labels are always dropped": 1.0}
    expect(sum(fractions) / 6, 0.5, slips, "fraction of dropped labels for p_uncond = 0.5:", rel=0, scale=0.1)
    slip = "a fixed number of labels is dropped"
    check(len(set(fractions)) > 1, "the same fraction in every batch", "a random one", slip)


@Fact("2.4 a", "the labels that were given stay as they are")
def class_kept(submission) -> None:
    slip = "dropped in place: the caller's labels are lost"
    for training in (True, False):
        kept = torch.equal(conditional(submission, 2, training)["classes"], torch.full((64,), 2))
        check(kept, "labels that were changed by the call", "the ones given", slip)


@Fact("2.4 b", "p_losses hands the labels to the U-Net")
def loss_classes(submission) -> None:
    if not submission.takes("diffusion", "Diffusion.p_losses", "classes"):
        raise missing("p_losses takes no classes")
    classes, given = torch.arange(4), {"x_zero": images(0.0), "t": torch.full((4,), 3), "loss_type": "l2"}
    calls = submission.diffuse("p_losses", {"without": 0.2}, **given, classes=classes)["calls"]
    seen = calls[0]["labels"] if calls else None
    check(seen == classes.tolist(), f"labels {seen} in the U-Net", f"{classes.tolist()}", "labels are lost on the way")


FED = {"the guidance scale is fed with p_uncond": 1 + 0.8 * P_UNCOND}
UNGUIDED = {"guidance has no effect": 1.0, "the class has no effect: always unconditional": 0.2, **FED}


def guided(submission, w: float, through: str = "p_sample") -> tuple[float, int, bool]:
    """(noise that a step of guidance scale w takes for predicted, calls of the U-Net, whether a function takes w).

    The U-Net predicts 1 with a class and 0.2 without. A step at t = 0 has no noise and is linear in the prediction.
    """
    names, black, zeros = ("Diffusion", f"Diffusion.{through}"), images(0.0), torch.zeros(4, dtype=torch.long)
    scaled = any(submission.takes("diffusion", name, "guidance_scale") for name in names)
    if through == "p_sample" and not scaled:
        if not submission.takes("diffusion", "Diffusion.sample", "guidance_scale"):
            raise missing("neither p_sample, sample nor Diffusion takes a guidance scale")
        return guided(submission, w, "sample")
    conditions, stub = {"classes": zeros, "guidance_scale": w, "p_uncond": P_UNCOND}, {"without": 0.2}
    if through == "p_sample":
        seen = submission.diffuse("p_sample", stub, x=black, t=zeros, t_index=0, **conditions)
        eps = seen["result"].double().mean() / p_sample(submission, black, 1.0, 0).double().mean()
    else:
        seen = sample(submission, stub, betas=torch.tensor([ONE_BETA]), **conditions)
        if not seen["calls"]:
            raise missing("a process of the one step t = 0 never calls the U-Net")
        x_t, out = (like(black, seen[name]).double() for name in ("start", "result"))
        eps = ((x_t - (1 - ONE_BETA) ** 0.5 * out) / ONE_BETA**0.5).median()
    return eps.item(), len(seen["calls"]), scaled


def fixed_at(eps: float) -> dict:
    """What a prediction looks like that is the same for every w."""
    return {**UNGUIDED, f"the guidance scale is fixed, at w = {(eps - 1) / 0.8:.3g}": eps}


@Fact("2.4 b", "w = 0 is the conditional prediction", "Eq. 11")
def guidance_zero(submission) -> None:
    slips = {"w = 0 is the unconditional prediction": 0.2, **FED}
    expect(guided(submission, 0.0)[0], 1.0, slips, "prediction", rel=0.02)


@Fact("2.4 b", "guidance is (1 + w) eps(c) - w eps", "Eq. 11")
def guidance_equation(submission) -> None:
    slips = {
        **UNGUIDED,
        "w in place of 1 + w: eps + w (eps(c) - eps)": 0.2 + 3 * 0.8,
        "Eq. 11 with w and 1 + w exchanged": 3 * 1 - 4 * 0.2,
        "conditional and unconditional prediction exchanged": 4 * 0.2 - 3 * 1,
    }
    right, eps = 4 * 1 - 3 * 0.2, guided(submission, 3.0)[0]
    if abs(eps - right) > 0.02 and abs(eps - guided(submission, 5.0)[0]) < 1e-3:
        slips = fixed_at(eps)
    expect(eps, right, slips, "prediction for w = 3, of 1 and 0.2,", rel=0.02)


@Fact("2.4 b", "sample hands the guidance scale to its steps", "Eq. 11")
def guidance_in_sample(submission) -> None:
    if not submission.takes("diffusion", "Diffusion.sample", "classes"):
        raise missing("sample takes no classes")
    (eps, _, scaled), (other, *_) = (guided(submission, w, "sample") for w in (3.0, 5.0))
    if abs(eps - other) > 1e-3:
        return  # whether it is the right one: `guidance_equation`
    if not scaled and min(abs(eps - 1), abs(eps - 0.2)) < 0.02:
        raise missing("neither sample nor Diffusion takes a guidance scale")
    expect(eps, 4 * 1 - 3 * 0.2, fixed_at(eps), "prediction for w = 3 as for w = 5", rel=0.02)


@Fact("2.4 b", "both predictions of a step come from one call of the U-Net", advice=True)
def guidance_calls(submission) -> None:
    calls = guided(submission, 3.0)[1]
    slip = "the model is called twice where one batch of double size does"
    check(calls == 1, f"{calls} calls", "1, of a batch twice as large", slip)
