"""What holds for each data set: the defaults of its settings, and what may be done with it. Reads no image."""

from __future__ import annotations

from dataclasses import dataclass

SQUARES = ("crop", "pad")  # what makes an image square: its centre, or white bars

UNLABELLED = ("images",)  # class names of a folder of images without class folders


@dataclass(frozen=True)
class DataSet:
    """What holds for a data set."""

    image_size: int = 32  # default of --image_size
    flip: bool = True  # default of --flip: mirrored images are images of the same kind
    settings: tuple[str, ...] = ()  # flags of reading it; those of other data sets are refused
    has_templates: bool = False  # its classes can be told without a trained network, see `TemplateClassifier`
    may_be_shown: bool = False  # images of it belong into published results: photographs may have terms against that
    reference: str = ""  # the run of ours in `reference.json` that a run on it is compared with
    sub_task: str = "2.1"  # of the sheet


DATASETS = {
    "cifar10": DataSet(settings=("data_dir",), reference="CIFAR-10 photographs"),
    # A mirrored moon is none of the set.
    "shapes": DataSet(image_size=16, flip=False, has_templates=True, may_be_shown=True, reference="shapes"),
    "folder": DataSet(settings=("data_dir", "square"), sub_task="2.5"),
    "butterflies": DataSet(128, settings=("data_dir", "square", "cache_dir", "label_column"), sub_task="2.5"),
}
