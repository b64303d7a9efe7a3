"""The digits: MNIST downloaded and read, and the images that a training sees."""
