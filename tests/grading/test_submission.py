"""A submission is called by roles, whatever its arguments are called, and what had to be done is said."""

import pytest
from mini_solutions import RIGHT, evaluated, write


@pytest.mark.parametrize(
    "part, text, fact, found",
    [
        ("diffusion", "", "forward_signal", "ex02_diffusion.py has no Diffusion"),
        ("diffusion", "import cv2.no_such", "cosine_schedule", "cv2 isn't installed: pip install opencv-python"),
        ("diffusion", "import no_such_package", "cosine_schedule", "isn't installed: pip install no_such_package"),
        ("diffusion", "def cosine_beta_schedule(timesteps, s=0.008):\n    pass", "cosine_schedule", "returns nothing"),
        (
            "main",
            "def test(model, testloader, diffusor, device, args):\n    # still to be written\n    pass",
            "test_loop",
            "empty stub",
        ),
        ("main", "def test(args):\n    print(args.checkpoint)", "test_loop", "test takes no model"),
        ("model", "class Unet:\n    def forward(self, x, time):\n        pass", "class_matters", "takes no classes"),
    ],
)
def test_what_is_not_there_is_missing(tmp_path, part, text, fact, found):
    said = evaluated(write(tmp_path, {**RIGHT, f"ex02_{part}.py": text}), fact)[fact]
    assert said["verdict"] == "missing" and found in said["found"]


def test_code_that_raises_is_named_with_its_line(tmp_path):
    files = {
        **RIGHT,
        "ex02_diffusion.py": RIGHT["ex02_diffusion.py"].replace("scaled = extract(", "scaled = 1 / 0 * extract("),
    }
    said = evaluated(write(tmp_path, files), "reverse_image")["reverse_image"]
    line = files["ex02_diffusion.py"].split("1 / 0")[0].count("\n") + 1
    assert said["verdict"] == "fails" and f"ZeroDivisionError in ex02_diffusion.py, line {line}" in said["found"]


@pytest.mark.parametrize(
    "before, after",
    [
        (
            "p_sample(self, model, x, t, t_index, classes=None, w=0.0)",
            "p_sample(self, model, x, y, t, index, cfg_scale=0.0)",
        ),
        ("        return x\n", "        return [x, x]\n"),
        ("        return x\n", "        return torch.stack([x, x]).numpy()\n"),
        ("channels, image_size, image_size,", "channels, *image_size,"),
        ('device="cuda"):', "device):"),
        ('img_size, device="cuda"):', 'img_size):\n        device = "cuda"'),
        ("torch.full((batch_size,), i, device=self.device)", 'torch.full((batch_size,), i, device="cuda").cuda()'),
    ],
)
def test_other_signatures_are_adapted_to_and_said(tmp_path, before, after):
    text = RIGHT["ex02_diffusion.py"]
    assert text.count(before) == 1
    text = text.replace(before, after)
    if "index" in after:
        text = text.replace("t_index == 0", "index == 0").replace(
            "if classes is None", "classes, w = y, cfg_scale\n        if classes is None", 1
        )
        text = text.replace(
            "self.p_sample(model, x, torch.full((batch_size,), i, device=self.device), i, classes, w)",
            "self.p_sample(model, x, classes, torch.full((batch_size,), i), i, w)",
        )
    facts = "reverse_image sample_times sample_result guidance_equation guidance_in_sample guidance_calls".split()
    verdicts = evaluated(write(tmp_path, {**RIGHT, "ex02_diffusion.py": text}), *facts)
    assert [said for said in verdicts.values() if said["verdict"] != "right"] == []
    adapted = {text for said in verdicts.values() for text in said["adapted"]}
    assert after == "device):" or adapted > {"w of p_sample is taken for guidance_scale"} or "cfg" in str(adapted)
