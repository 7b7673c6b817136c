"""What sets of images are compared by (2.2 e): the features of a small classifier that is trained here on the data set
itself, or those of Inception where its weights are given. Only on Inception's is a Fréchet distance called FID.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from ex2_config import load_checkpoint, save_checkpoint
from ex2_data import (
    DataSplits,
    ImageFiles,
    ImageSet,
    InputError,
    make_loader,
    reverse_transform,
    to_model_range,
    training_images,
)

INCEPTION_WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
CLASSIFIER_VERSION = 1  # of network and training: others are not taken from the cache, their features differ
CLASSIFIER_EPOCHS = 8
BATCH_SIZE = 128


# ---------------------------------------------------------------------------- the two networks


class SmallClassifier(nn.Module):
    """A convolutional classifier of 0.5 million parameters, whose last hidden layer describes an image.

    Works on 32x32 positions at most: of larger images each block of pixels becomes one position.
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
        self.head = nn.Linear(self.width, num_classes)
        self.description = "untrained classifier"

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

    Args:
        weights: the file of `INCEPTION_WEIGHTS`; nothing is downloaded.

    Raises:
        InputError: torch-fidelity or the file is missing, or the file holds something else.
    """

    width = 2048
    description = "Inception v3 (FID)"

    def __init__(self, weights: str | Path):
        super().__init__()
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ModuleNotFoundError as error:
            raise InputError(
                "--inception_weights needs torch-fidelity: pip install -r requirements-extras.txt"
            ) from error
        if not Path(weights).is_file():
            raise InputError(f"no Inception weights at {weights}: download {INCEPTION_WEIGHTS} and give its path")
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run code from the file
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except Exception as error:  # torch and pickle raise many kinds for a damaged or foreign file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{weights} holds no Inception weights ({reason}): download {INCEPTION_WEIGHTS}"
            ) from error
        self.network.use_antialias = False  # resize as the original does, or figures differ from published ones

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 2048) features of uint8 images (B, 3, H, W)."""
        return self.network(images)


# ---------------------------------------------------------------------------- training, applying, caching


def train_classifier(
    dataset, num_classes: int, device, *, flip: bool, epochs: int = CLASSIFIER_EPOCHS
) -> SmallClassifier:
    """A `SmallClassifier` trained on `dataset`, with shifts and, where `flip` says so, mirrored images; in eval mode.

    The same data and settings give the same classifier on the same machine.
    """
    image_size = dataset[0][0].shape[-1]
    loader = make_loader(dataset, BATCH_SIZE, device, train=True, flip=flip)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        model = SmallClassifier(num_classes, image_size).to(device, memory_format=torch.channels_last)
        optimizer = AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
        scheduler = OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(loader))
        progress = tqdm(total=epochs * len(loader), desc="training the classifier", leave=False, disable=None)
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for images, labels in loader:
                if len(images) == 1:  # a last batch that batch norm can't normalise
                    continue
                images = randomly_shifted(images.to(device, memory_format=torch.channels_last))
                loss = F.cross_entropy(model(images), labels.to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.update()
        progress.close()
    return model.eval()


def randomly_shifted(images: Tensor) -> Tensor:
    """The batch (B, C, H, W), shifted by up to a sixteenth of its size; mirrored content fills the gap."""
    size = images.shape[-1]
    reach = size // 16
    down, right = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    return F.pad(images, [reach] * 4, mode="reflect")[..., down : down + size, right : right + size]


def accuracy(classifier: SmallClassifier, dataset, device) -> float:
    """Share of the images that the classifier gives their label."""
    correct = [
        (classifier.classify(reverse_transform(images.to(device))) == labels.cpu()).double()
        for images, labels in make_loader(dataset, BATCH_SIZE, device)
    ]
    return torch.cat(correct).mean().item()


def features_of(extractor, dataset, device) -> Tensor:
    """(N, width) features of every image, on the CPU."""
    batches = tqdm(make_loader(dataset, BATCH_SIZE, device), "features", leave=False, disable=None)
    return torch.cat([extractor.features(reverse_transform(images.to(device))).cpu() for images, _ in batches])


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: the training images and their features (N, width)."""

    extractor: SmallClassifier | Inception
    features: Tensor
    images: ImageSet | ImageFiles


def classifier_reference(splits: DataSplits, folder: Path, device, *, flip: bool) -> Reference:
    """The training images by the data set's `SmallClassifier`; trained now where `folder` has none."""
    images, fingerprint = training_images(splits)
    path = folder / f"classifier-v{CLASSIFIER_VERSION}-{fingerprint}{'-flip' if flip else ''}.pt"

    def compute() -> dict:
        print(f"training the classifier that samples are judged by, on {len(images)} images; it is kept in {path}")
        model = train_classifier(images, len(splits.class_names), device, flip=flip)
        return {
            "model": model.state_dict(),
            "accuracy": accuracy(model, splits.test, device),
            "features": features_of(model, images, device).half(),
        }

    saved = cached(path, compute)
    classifier = SmallClassifier(len(splits.class_names), splits.test[0][0].shape[-1])
    classifier.load_state_dict(saved["model"])
    classifier.description = f"small classifier {fingerprint}, {saved['accuracy']:.1%} right on the test set"
    return Reference(classifier.to(device).eval(), saved["features"].float(), images)


def inception_reference(splits: DataSplits, weights: str, folder: Path, device) -> Reference:
    """The training images by `Inception`; their features come from `folder`, where it has them."""
    network = Inception(weights).to(device)
    images, fingerprint = training_images(splits)
    saved = cached(
        folder / f"inception-{fingerprint}.pt", lambda: {"features": features_of(network, images, device).half()}
    )
    return Reference(network, saved["features"].float(), images)


def cached(path: Path, compute: Callable[[], dict]) -> dict:
    """The content of `path`; where there is none, or a damaged one, that of `compute()`, which is then kept there."""
    if path.is_file():
        try:
            return load_checkpoint(path)
        except InputError as error:
            print(f"{error}; computing it anew")
    content = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, **content)
    return content
