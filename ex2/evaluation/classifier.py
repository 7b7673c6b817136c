"""Image features for comparing sets of images (2.2 e): those of a small classifier that is trained here on the data set
itself, or those of Inception where its weights are given. Only on Inception's is a Fréchet distance called FID.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from ex2.data.images import DataSplits, ImageFiles, ImageSet, reverse_transform, to_model_range, training_images
from ex2.data.loader import make_loader
from ex2.errors import InputError
from ex2.evaluation.tables import INCEPTION
from ex2.machine.processes import all_gather_rows, broadcast_from_main, is_main, shard
from ex2.machine.progress import track
from ex2.training.checkpoint import digest_of, read_checkpoint, save_checkpoint

INCEPTION_SHA256 = "6726825d"  # its first digits stand in the file's name
FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
INCEPTION_WEIGHTS = f"{FIDELITY}weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"
CLASSIFIER_VERSION = 1  # of network and training: others are not taken from the cache, their features differ
CLASSIFIER_EPOCHS = 8
BATCH_SIZE = 128


class SmallClassifier(nn.Module):
    """A convolutional classifier of half a million parameters, whose last hidden layer gives the features of an image.

    From 64 pixels on, space-to-depth to 32 to 63.

    Args:
        num_classes: of the data set. Single-class data: predict rotations instead (Gidaris et al. 2018,
            https://arxiv.org/abs/1803.07728).
        image_size: pixels.
    """

    width = 128

    def __init__(self, num_classes: int, image_size: int):
        super().__init__()
        block = 2 ** max(0, int(math.log2(image_size / 32)))  # the sizes that the U-Net takes are divisible by it
        self.body = nn.Sequential(
            nn.PixelUnshuffle(block),
            conv(3 * block**2, 32),
            nn.MaxPool2d(2),
            conv(32, 64),
            nn.MaxPool2d(2),
            conv(64, 128),
            Residual(128),
            nn.MaxPool2d(2),
            conv(128, 128),
            Residual(128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.predicts_rotation = num_classes == 1
        self.head = nn.Linear(self.width, 4 if self.predicts_rotation else num_classes)
        self.description = "untrained classifier"

    def task(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) as the classifier sees them in training."""
        if not self.predicts_rotation:
            return images, labels
        parts = [images[turns::4].rot90(turns, (-2, -1)) for turns in range(4)]
        return torch.cat(parts), torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_classes) logits of images (B, 3, H, W) in [-1, 1]."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 128) features of uint8 images (B, 3, H, W)."""
        return self.body(to_model_range(images))

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """(B,) labels of uint8 images (B, 3, H, W)."""
        return self(to_model_range(images)).argmax(1).cpu()


def conv(channels: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    layer = nn.Conv2d(channels, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU())


class Residual(nn.Module):
    """A convolution with a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Inception(nn.Module):
    """Inception v3 with the weights of the original FID, as torchmetrics and torch-fidelity have it; 2048 features.

    weights: the file of `INCEPTION_WEIGHTS`; nothing is downloaded.

    Raises InputError: torch-fidelity or the file is missing, or it is another file.
    """

    width = 2048
    description = INCEPTION

    def __init__(self, weights: str | Path):
        super().__init__()
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ModuleNotFoundError as error:
            advice = "pip install -r requirements-extras.txt"
            raise InputError(f"--inception_weights needs torch-fidelity: {advice}") from error
        if not Path(weights).is_file():
            raise InputError(f"no Inception weights at {weights}: download {INCEPTION_WEIGHTS} and give its path")
        if not hashlib.sha256(Path(weights).read_bytes()).hexdigest().startswith(INCEPTION_SHA256):
            raise InputError(f"{weights} is not the file behind FID, or damaged: download {INCEPTION_WEIGHTS}")
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        self.network.use_antialias = False  # resize as the original does, or distances differ from published ones

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 2048) features of uint8 images (B, 3, H, W)."""
        return self.network(images)


def train_classifier(dataset, num_classes: int, device, *, flip: bool, epochs: int, num_workers=0) -> SmallClassifier:
    """A `SmallClassifier` trained on `dataset`, with shifts and, where `flip` says so, mirrored images; in eval mode.

    The same on the same machine with the same number of threads; elsewhere rounding makes it another one.
    """
    loader = make_loader(dataset, BATCH_SIZE, device, train=True, flip=flip, num_workers=num_workers)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        model = SmallClassifier(num_classes, dataset[0][0].shape[-1])
        model = model.to(device, memory_format=torch.channels_last)
        optimizer = AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
        scheduler = OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(loader))
        for epoch in track(range(epochs), "training the classifier", epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                images, labels = model.task(*batch)
                if len(images) == 1:  # a last batch that batch norm can't normalise
                    continue
                images = randomly_shifted(images.to(device)).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(images), labels.to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
    return model.eval()


def randomly_shifted(images: Tensor) -> Tensor:
    """The batch (B, C, H, W), shifted by up to a sixteenth of its size; mirrored content fills the gap."""
    size = images.shape[-1]
    reach = size // 16
    down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    return F.pad(images, [reach] * 4, mode="reflect")[..., down : down + size, right : right + size]


def real_batches(dataset, device, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of a data set: uint8 images (B, 3, H, W) on the device, and their labels (B,)."""
    mine = shard(len(dataset))
    own = dataset if len(mine) == len(dataset) else dataset.subset(torch.arange(mine.start, mine.stop))
    loader = make_loader(own, BATCH_SIZE, device, num_workers=num_workers)
    for images, labels in track(loader, "reading images", len(loader)):
        yield reverse_transform(images.to(device)), labels


def accuracy(classifier: SmallClassifier, dataset, device, num_workers: int = 0) -> float:
    """Fraction of the images for which the classifier is right in its task."""
    right = []
    for batch in real_batches(dataset, device, num_workers):
        images, labels = classifier.task(*batch)
        right.append((classifier.classify(images) == labels.cpu()).double())
    return all_gather_rows(right, "accuracy of the classifier").mean().item()


def rounded_features(extractor, images: Tensor) -> Tensor:
    """(N, width) features of uint8 images (N, 3, H, W), on the CPU.

    They are rounded to half precision, as those of the training images are kept: so a copy is 0 apart.
    """
    return torch.cat([extractor.features(part).cpu() for part in images.split(BATCH_SIZE)]).half().float()


def features_of(extractor, dataset, device, num_workers: int = 0) -> Tensor:
    """(N, width) features of every image, on the CPU."""
    batches = real_batches(dataset, device, num_workers)
    return all_gather_rows([rounded_features(extractor, images) for images, _ in batches], "features of a data set")


@dataclass(frozen=True)
class Evaluator:
    """What samples are evaluated by, and how many of them.

    Attributes:
        extractor: the network whose features of images are compared.
        features: (N, width), those of the training images.
        images: the training images.
        classify: labels (N,) of uint8 images (N, 3, H, W); None where there is nothing to tell.
        count: samples at each guidance scale.
        scales: guidance scales, beside the run's own; ignored where the model can't be guided.
        num_workers: DataLoader workers.
    """

    extractor: SmallClassifier | Inception
    features: Tensor
    images: ImageSet | ImageFiles
    classify: Callable[[Tensor], Tensor] | None = None
    count: int = 0
    scales: Sequence[float] = ()
    num_workers: int = 0


def evaluator_by_classifier(splits: DataSplits, folder: Path, device, flip: bool, num_workers: int = 0) -> Evaluator:
    """The evaluator by the data set's `SmallClassifier`, which is trained now if `folder` has none.

    Its description has a digest of its weights: only metrics by the same features can be compared.
    """
    images, fingerprint = training_images(splits)
    classifier = SmallClassifier(len(splits.class_names), images[0][0].shape[-1])

    def train() -> dict:
        how = {"flip": flip, "epochs": CLASSIFIER_EPOCHS, "num_workers": num_workers}
        return train_classifier(images, len(splits.class_names), device, **how).cpu().state_dict()

    def compute() -> dict:
        print(f"training the classifier whose features samples are evaluated by, on {len(images)} images")
        classifier.load_state_dict(broadcast_from_main(train, "the classifier"))
        classifier.to(device).eval()
        right = accuracy(classifier, splits.test, device, num_workers)
        features = features_of(classifier, images, device, num_workers).half()
        return {"model": classifier.state_dict(), "accuracy": right, "features": features}

    name = f"classifier-v{CLASSIFIER_VERSION}-{fingerprint}{'-flip' if flip else ''}.pt"
    saved = load_or_compute(folder / name, compute)
    classifier.load_state_dict(saved["model"])
    task = "quarter turns" if classifier.predicts_rotation else "classes"
    right = f"{saved['accuracy']:.1%} of the {task} of test images right"
    classifier.description = f"small classifier {digest_of(saved['model'])[:8]}, {right}"
    classifier.to(device).eval()
    return Evaluator(classifier, saved["features"].float(), images, classifier.classify, num_workers=num_workers)


def evaluator_by_inception(splits: DataSplits, weights: str, folder: Path, device, num_workers: int = 0) -> Evaluator:
    """The evaluator by `Inception`. The features of the training images come from `folder` if they are there."""
    network = Inception(weights).to(device)
    images, fingerprint = training_images(splits)
    path = folder / f"inception-{fingerprint}.pt"
    saved = load_or_compute(path, lambda: {"features": features_of(network, images, device, num_workers).half()})
    return Evaluator(network, saved["features"].float(), images, num_workers=num_workers)


def load_or_compute(path: Path, compute: Callable[[], dict]) -> dict:
    """The content of `path`. If there is no such file, or a damaged one, `compute()` makes it, and it is kept there.

    A folder that can't be written to costs the next call the same work, and not this one its result. Of several
    processes the first one reads and writes, all of them compute.
    """

    def read() -> dict | None:
        try:
            return read_checkpoint(path) if path.is_file() else None
        except InputError as error:
            print(f"{error}; computing it anew")
            return None

    content = broadcast_from_main(read, "what an earlier call computed")
    if content is None:
        content = compute()
        try:
            if is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_checkpoint(path, **content)
        except OSError as error:
            print(f"can't keep {path} for the next time ({error.strerror})")
    return content
