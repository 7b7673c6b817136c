"""2.5: butterflies through the `datasets` library, from a small parquet file in the schema of the real set."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ex2_main
from ex2.data import butterflies
from ex2.data.butterflies import load_butterflies
from ex2.data.decode import prepare_image, read_image
from ex2.data.load import load_splits
from ex2.errors import InputError

SPECIES = ["Danaus plexippus", "Morpho menelaus", "Heliconius charitonius", None]


def draw_butterfly(rng, size):
    """A pair of wings on white, in the wide format of the photographs."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size
    colour = tuple(rng.integers(0, 200, 3).tolist())
    draw.ellipse((0, 0, width * 0.48, height), fill=colour)
    draw.ellipse((width * 0.52, 0, width, height), fill=colour)
    return image


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    datasets = pytest.importorskip("datasets", reason="an extra")
    rng = np.random.default_rng(0)
    names = [SPECIES[i % 3] for i in range(45)] + [None, "Rare one"]
    images = [draw_butterfly(rng, ((60, 40), (40, 60), (50, 50))[i % 3]) for i in range(len(names))]
    rows = {"id": list(range(len(names))), "scientific_name": names, "image": images}
    features = datasets.Features(
        {"id": datasets.Value("int64"), "scientific_name": datasets.Value("string"), "image": datasets.Image()}
    )
    path = tmp_path_factory.mktemp("butterflies") / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def test_unconditional_butterflies_are_square_and_of_one_class(parquet, tmp_path):
    splits = load_splits("butterflies", str(parquet), 16, 0, square="pad", cache_dir=str(tmp_path))
    assert splits.class_names == ("butterfly",)
    assert splits.train.images.shape[1:] == (3, 16, 16) and splits.train.images.dtype == torch.uint8
    sizes = [len(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 47 and min(sizes) >= 4
    seen = [image.numpy().tobytes() for part in (splits.train, splits.val, splits.test) for image in part.images]
    assert len(set(seen)) == 47  # no image is in two parts


def test_a_column_gives_the_classes_and_rare_ones_are_put_together(parquet, tmp_path):
    train, _, _, names = load_butterflies(str(parquet), 8, "crop", str(tmp_path), "scientific_name")
    assert names == ("Danaus plexippus", "Heliconius charitonius", "Morpho menelaus", "other")
    assert train.labels.bincount().tolist() == [15, 15, 15, 2]


def test_images_are_resized_once_and_again_for_another_size_or_version(parquet, tmp_path, monkeypatch):
    def load(size):
        images = load_butterflies(str(parquet), size, "pad", str(tmp_path), None)[0].images
        return images, {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}

    first, files = load(8)
    again, same_files = load(8)
    assert torch.equal(first, again) and same_files == files
    larger, more_files = load(12)
    assert larger.shape[-1] == 12 and len(more_files) == len(files) + 1
    monkeypatch.setattr(butterflies, "PREPARE_VERSION", 0)
    assert len(load(8)[1]) == len(files) + 2


def test_a_folder_of_images_does_as_well(parquet, tmp_path):
    rng = np.random.default_rng(1)
    for i in range(24):
        folder = tmp_path / "images" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        draw_butterfly(rng, (30, 20)).save(folder / f"{i}.jpg")
    train, _, _, names = load_butterflies(str(tmp_path / "images"), 8, "pad", str(tmp_path / "cache"), "label")
    assert names == ("a", "b") and train.labels.bincount().tolist() == [12, 12]


def test_an_image_folder_with_a_test_part_loses_none_and_a_folder_of_parquet_files_is_read(parquet, tmp_path):
    rng = np.random.default_rng(1)
    for i in range(24):
        folder = tmp_path / "images" / ("train", "test")[i % 2] / "a"
        folder.mkdir(parents=True, exist_ok=True)
        draw_butterfly(rng, (30, 20)).save(folder / f"{i}.jpg")
    assert len(load_butterflies(str(tmp_path / "images"), 8, "pad", str(tmp_path / "cache"), None)[0]) == 24
    assert len(load_butterflies(str(parquet.parent), 8, "pad", str(tmp_path / "cache"), None)[0]) == 47


def test_butterflies_are_trained_conditional_on_their_species(parquet, tmp_path):
    command = "--dataset butterflies --image_size 8 --dim 8 --dim_mults 1 2 --timesteps 30 --epochs 1 --sample_steps 3"
    command += " --class_free_guidance --schedule cosine --square pad --label_column scientific_name --no_cuda"
    where = ["--data_dir", str(parquet), "--cache_dir", str(tmp_path / "cache"), "--results_dir", str(tmp_path)]
    assert ex2_main.main([*command.split(), *where]) == 0
    sample = [
        "sample",
        "--no_cuda",
        "--checkpoint",
        str(tmp_path / "DDPM"),
        "--n_images",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert ex2_main.main([*sample, "--classes", "Morpho menelaus"]) == 0
    assert (tmp_path / "out" / "images" / "0000_Morpho_menelaus.png").is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data_dir": "nowhere.parquet"}, "no butterflies at nowhere.parquet"),
        ({"label_column": "id"}, "--label_column id: no value of it has 10 images"),
        ({"label_column": "colour"}, "--label_column colour: the butterflies have id, scientific_name, image"),
    ],
)
def test_what_is_missing_is_said(parquet, tmp_path, change, message):
    arguments = {"data_dir": str(parquet), "label_column": None, **change}
    with pytest.raises(InputError, match=message):
        load_butterflies(arguments["data_dir"], 8, "pad", str(tmp_path), arguments["label_column"])


def test_a_damaged_parquet_file_is_said(parquet, tmp_path):
    path = tmp_path / "half.parquet"
    path.write_bytes(parquet.read_bytes()[:500])
    with pytest.raises(InputError, match=f"can't load the butterflies from {path}"):
        load_butterflies(str(path), 8, "pad", str(tmp_path / "cache"), None)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install -r requirements-extras.txt"):
        load_butterflies(None, 8, "pad", None, None)


# ------------------------------------------------------------------ crop or pad


def test_padding_keeps_the_whole_image_and_cropping_fills_the_square(tmp_path):
    wide = Image.new("RGB", (60, 20), "black")
    padded = np.array(prepare_image(wide, 30, "pad"))
    assert padded.shape == (30, 30, 3)
    assert (padded[:9] == 255).all() and (padded[11:19] == 0).all() and (padded[21:] == 255).all()
    assert (np.asarray(prepare_image(wide, 30, "crop")) == 0).all()
    wide.save(tmp_path / "wide.png")
    assert torch.equal(read_image(tmp_path / "wide.png", 30, "pad"), torch.from_numpy(padded).permute(2, 0, 1))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset shapes --square pad", "--square is for --dataset folder or butterflies, not for shapes"),
        ("--dataset folder --label_column name", "--label_column is for --dataset butterflies"),
        ("--cache_dir x", "--cache_dir is for --dataset butterflies"),
        ("--dataset butterflies --class_free_guidance", "needs --label_column"),
        ("--dataset folder --square stretch", "--square must be one of crop, pad"),
    ],
)
def test_settings_that_would_not_be_heeded_are_refused(capsys, flags, message):
    assert ex2_main.main(flags.split()) == 2
    assert message in capsys.readouterr().err
