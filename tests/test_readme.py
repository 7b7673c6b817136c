"""What the READMEs name exists: tests, files, flags, functions."""

import dataclasses
import re
from pathlib import Path

import ex2_main
from ex2.settings.cli import config_of_flags, parse_args
from ex2.settings.config import Config

ROOT = Path(__file__).resolve().parents[1]
README = "\n".join(path.read_text("utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8")))
    there = {
        name
        for path in ROOT.glob("tests/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    assert len(named) > 60 and named <= there, named - there


def test_every_module_has_its_line():
    modules = {path.name for path in ROOT.glob("ex2_*.py")}
    assert modules == set(re.findall(r"`(ex2_\w+\.py)`", README)) & modules


def test_every_function_that_is_named_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("ex2_*.py"))
    for module, name in re.findall(r"`(ex2_\w+)\.(\w+)`", README):
        if name not in ("py", "html", "json"):
            assert re.search(rf"^(def|class) {name}\b", (ROOT / f"{module}.py").read_text("utf-8"), re.M), (
                module,
                name,
            )
    for owner, name in re.findall(r"`(Diffusion|Unet)\.(\w+)`", README):
        assert re.search(rf"class {owner}.*?def {name}\b", sources, re.S), (owner, name)


def test_every_command_is_understood():
    commands = re.findall(r"^(?:.*&& )?\S*python (?:-u )?ex2_main\.py(.*)$", README, re.M)
    assert len(commands) >= 12
    for command in commands:
        args = parse_args(command.split("#")[0].split())
        assert args.command in ex2_main.COMMANDS
        if args.command in ("train", "compare"):
            config_of_flags(args)


def test_every_flag_that_is_named_exists():
    flags = set(re.findall(r"`--(\w+)", README)) - {
        "vary",
        "checkpoint",
        "eval_samples",
        "eval_scales",
        "inception_weights",
        "requeue",
        "json",
        "time_limit",
        "seeds",
    }
    flags -= {"weights", "classes", "n_images", "out", "preset", "signal", "max"}  # of commands, SLURM and torchrun
    names = {f.name for f in dataclasses.fields(Config)}
    assert {flag.replace("no_", "", 1) if flag.startswith("no_") else flag for flag in flags} <= names


def test_every_document_that_is_linked_is_there():
    links = re.findall(r"\]\(((?:docs/)?\w[\w-]*\.md)\)", README)
    assert len(links) >= 6
    for link in links:
        assert (ROOT / link).is_file() or (ROOT / "docs" / link).is_file(), link


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 160


def test_every_picture_is_there():
    for path in re.findall(r"\]\((results/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
