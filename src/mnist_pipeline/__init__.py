"""A reproducible pipeline that trains, evaluates and reports a small convolutional network on MNIST."""
