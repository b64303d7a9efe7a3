"""The digits: download MNIST, read it, and choose the images to train on."""
