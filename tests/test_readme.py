"""What the READMEs name exists: tests, files, flags, functions."""

import ast
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
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    assert len(named) > 60 and named <= there, named - there


def test_the_top_folder_has_five_modules_and_every_room_its_line():
    modules = {path.name for path in ROOT.glob("*.py")} - {"conftest.py"}
    assert modules == {f"ex2_{name}.py" for name in ("main", "train", "diffusion", "model", "viz")}
    rooms = {f"{path.name}/" for path in (ROOT / "ex2").iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in (ROOT / "ex2").glob("*.py")} - {"__init__.py"}
    assert modules | rooms | files <= set(re.findall(r"`([\w./]+)`", README))


FLOORS = "main 8 report 7 live 7 evaluation 6 training 5 settings 4 viz 4 data 3 train 3 meter 3 machine 2 grading 2"
FLOORS = dict(zip(FLOORS.split()[::2], map(int, FLOORS.split()[1::2])))
BELOW = {"ex2/data/sets.py": 1}  # records that need nothing


def test_no_file_imports_a_higher_floor_and_importing_registers_nothing():
    def floor(module):
        parts = module.split(".")
        file = "/".join(parts) + ".py"
        room = parts[1] if parts[0] == "ex2" else parts[0].replace("ex2_", "")
        return BELOW.get(file, FLOORS.get(room, 1))

    files = [*ROOT.glob("ex2_*.py"), *ROOT.glob("ex2/**/*.py")]
    for path in files:
        if path.name == "__init__.py":
            continue
        module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        tree = ast.parse(path.read_text("utf-8"))
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for name in names:
            if re.match(r"ex2[._]", name):
                assert floor(name) <= floor(module), f"{module} imports {name}"
        assert "atexit" not in names, module


def test_every_function_that_is_named_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("ex2_*.py"))
    for module, name in re.findall(r"`(ex2_\w+)\.(\w+)`", README):
        if name not in ("py", "html", "json"):
            text = (ROOT / f"{module}.py").read_text("utf-8")
            assert re.search(rf"^(def|class) {name}\b", text, re.M), (module, name)
    for path in re.findall(r"`(ex2/[\w/]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
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
        "help",
        "csv",
        "jobs",
    }
    flags -= {"format", "weights_as", "start_image", "start_fraction"}  # of export and sample
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
