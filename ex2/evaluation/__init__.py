"""How good a model is: losses, variational lower bound, distances, samples."""
