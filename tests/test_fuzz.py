"""Input that nobody expects: an error of one line or a right result, never a traceback, a hang or silence.

`HYPOTHESIS_PROFILE=long python -m pytest tests/test_fuzz.py` tries fifty times as much.
"""

import dataclasses
import io
import os
import string
import unicodedata
import warnings
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import ex2_main
from ex2.data.folder import load_folder
from ex2.data.images import read_image
from ex2.data.load import load_splits
from ex2.errors import InputError
from ex2.settings.build import build_model
from ex2.settings.cli import config_of_flags, parse_vary
from ex2.settings.config import Config, config_of
from ex2.training import checkpoint
from ex2_diffusion import SCHEDULES, Diffusion, linear_beta_schedule, sigmoid_beta_schedule

common = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
settings.register_profile("short", max_examples=60, **common)
settings.register_profile("long", max_examples=3000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 1e-300]))
WORDS = st.one_of(
    st.text(max_size=8),
    NUMBERS.map(str),
    st.sampled_from(["", "-", "--", "linear", "cosine", "shapes", "learned", "ddim", "true", "None", "../x", "a/b"]),
)


# ------------------------------------------------------------------ command line and settings


@st.composite
def command_lines(draw):
    """Flags of the program, good and bad, with values of every kind."""
    argv = draw(st.sampled_from([[], ["train"], ["test", "--checkpoint", "x"], ["sample", "--checkpoint", "x"]]))
    argv = argv + draw(st.sampled_from([[], ["compare", "--vary", "lr=0.1"], ["report"], ["no_command"]]))
    for name in draw(
        st.lists(st.sampled_from([*FIELDS, "classes", "n_images", "preset", "vary", "nonsense"]), max_size=4)
    ):
        argv = [*argv, f"--{draw(st.sampled_from(['', 'no_']))}{name}", *draw(st.lists(WORDS, max_size=2))]
    return argv


def only_settings(args):
    """A command that goes as far as the settings."""
    if args.command in ("train", "compare"):
        config = config_of_flags(args)
        assert config.run_dir.name
    if args.command == "compare":
        parse_vary(args.vary)


@given(command_lines())
def test_every_command_line_is_understood_or_refused_in_one_line(argv):
    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(error), redirect_stdout(io.StringIO()):
        for command in ex2_main.COMMANDS:
            patch.setitem(ex2_main.COMMANDS, command, only_settings)
        try:
            code = ex2_main.main(argv)
        except SystemExit as stop:  # --help
            assert stop.code == 0
            return
    lines = error.getvalue().splitlines()
    assert (code, lines) == (0, []) or (code == 2 and len(lines) == 1 and lines[0].startswith("error: ")), lines


@given(
    st.dictionaries(
        st.sampled_from(list(FIELDS)),
        st.one_of(NUMBERS, st.text(max_size=5), st.booleans(), st.none(), st.lists(NUMBERS, max_size=3)),
        max_size=4,
    )
)
def test_every_dict_is_a_config_or_an_input_error(values):
    try:
        config = config_of({"config": values}, {})
    except InputError:
        return
    assert dataclasses.replace(config) == config
    again = config_of({"config": dataclasses.asdict(config)}, {})
    assert again == config


@given(
    st.integers(1, 300), st.integers(1, 80), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(-1, 12)
)
def test_every_accepted_size_runs_through_the_model(size, dim, mults, classes):
    settings_ = {"image_size": size, "dim": dim, "dim_mults": mults, "class_free_guidance": classes > 0}
    try:
        config = Config(**settings_)
        model = build_model(config, classes)
    except InputError:
        return
    if size > 64 or dim * max(mults) > 100:
        return  # accepted, and too slow to try
    labels = (torch.zeros(1, dtype=torch.long),) if classes > 0 else ()
    with torch.no_grad():
        eps = model.eval()(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long), *labels)
    assert eps.shape == (1, 3, size, size) and eps.isfinite().all()


@given(st.lists(st.text(alphabet=string.printable, max_size=20), min_size=1, max_size=3))
def test_every_vary_is_a_grid_or_an_input_error(texts):
    try:
        assert all(parse_vary(texts).values())
    except InputError as error:
        assert str(error)


# ------------------------------------------------------------------ schedules


@given(st.sampled_from(list(SCHEDULES)), st.integers(-3, 3000))
def test_every_number_of_timesteps_makes_a_process_or_a_value_error(name, timesteps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            diffusor = Diffusion(timesteps, SCHEDULES[name], 8, "cpu")
        except ValueError as error:
            assert str(error)
            return
    assert len(diffusor.betas) == timesteps and ((diffusor.betas > 0) & (diffusor.betas < 1)).all()
    for table in vars(diffusor).values():
        assert not isinstance(table, torch.Tensor) or table.isfinite().all()


@given(st.sampled_from([linear_beta_schedule, sigmoid_beta_schedule]), st.floats(), st.floats(), st.integers(-2, 500))
def test_every_range_of_betas_is_a_schedule_or_a_value_error(schedule, start, end, timesteps):
    try:
        betas = schedule(start, end, timesteps)
    except ValueError as error:
        assert str(error)
        return
    assert betas.shape == (timesteps,) and ((betas > 0) & (betas < 1)).all()


# ------------------------------------------------------------------ image files


def encoded(kind, size=(9, 7)):
    """The bytes of a good image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if kind == "gif":
        image.save(buffer, "gif", save_all=True, append_images=[image.rotate(90)])
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


GOOD = {kind: encoded(kind) for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff")}


@st.composite
def spoilt(draw, data):
    """Good bytes, cut and with some of them replaced."""
    data = bytearray(data[: draw(st.integers(0, len(data)))])
    for position in draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=5)):
        if data:
            data[position] = draw(st.integers(0, 255))
    return bytes(data)


@given(
    st.sampled_from(list(GOOD)).flatmap(lambda kind: st.tuples(st.just(kind), spoilt(GOOD[kind]))),
    st.sampled_from(["crop", "pad"]),
)
def test_every_image_file_is_an_image_or_named(tmp_path_factory, kind_and_data, square):
    kind, data = kind_and_data
    path = tmp_path_factory.mktemp("files") / f"image.{kind}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_image(path, 8, square)
        except InputError as error:
            assert str(path) in str(error)
            return
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (10_000, 3), (3, 10_000), (2, 9)])
@pytest.mark.parametrize("square", ["crop", "pad"])
def test_images_of_odd_shapes(tmp_path, size, square):
    path = tmp_path / "odd.png"
    Image.new("RGB", size, (200, 10, 20)).save(path)
    image = read_image(path, 8, square)
    assert image.shape == (3, 8, 8)
    middle = image[:, 4, 4].tolist()
    assert middle == [200, 10, 20] if square == "crop" else image.shape == (3, 8, 8)


@given(st.text(min_size=1, max_size=12).filter(lambda name: "/" not in name and "\0" not in name and name.strip(".")))
def test_class_folders_may_have_any_name(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("names")
    try:
        (root / name).mkdir()
    except (OSError, ValueError):
        return  # the file system does not take it
    for i in range(12):
        (root / name / f"{i}.png").write_bytes(GOOD["png"])
    if name.startswith("."):
        with pytest.raises(InputError):
            load_folder(str(root), 8)
        return
    train, *_, names = load_folder(str(root), 8)
    assert names == (unicodedata.normalize("NFC", name),) and len(train) == 12


def test_wrong_suffixes_links_in_circles_and_folders_that_look_like_images(tmp_path, capsys):
    folder = tmp_path / "a"
    (folder / "folder.png").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i}.png").write_bytes(GOOD["jpeg"])  # says png and is a jpeg: its content counts
    (folder / "notes.txt").write_text("no image")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "up").symlink_to(tmp_path)
    splits = load_splits("folder", str(tmp_path), 8, 0)
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 20
    said = capsys.readouterr().out
    assert "skipped 4 entries" in said and "1 broken links: circle.png" in said


def test_a_class_whose_files_are_all_broken_is_one_line(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    where = ["--results_dir", str(tmp_path.parent / f"{tmp_path.name}-results")]
    assert ex2_main.main(["--dataset", "folder", "--data_dir", str(tmp_path), "--no_cuda", *where]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "can't be read as an image" in error


# ------------------------------------------------------------------ checkpoints


CONTENT = {"w": torch.arange(40.0), "n": [1, 2.5, None, "x"], "d": {"k": (1, 2)}}


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "ckpt.pt"
    checkpoint.save_checkpoint(path, **CONTENT)
    return path.read_bytes()


@given(st.data())
def test_every_spoilt_checkpoint_is_refused_or_whole(tmp_path_factory, good_checkpoint, data):
    path = tmp_path_factory.mktemp("spoilt") / "ckpt.pt"
    path.write_bytes(data.draw(spoilt(good_checkpoint)))
    try:
        content = checkpoint.load_checkpoint(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert checkpoint.digest_of(content) == checkpoint.digest_of(CONTENT)


@given(st.binary(max_size=300))
def test_every_other_file_is_no_checkpoint(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("other") / "ckpt.pt"
    path.write_bytes(content)
    with pytest.raises(InputError):
        checkpoint.load_checkpoint(path)
