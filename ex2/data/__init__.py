"""What a model learns from: CIFAR-10, shapes, folders of images, butterflies."""
