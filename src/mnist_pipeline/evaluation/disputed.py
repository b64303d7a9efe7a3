"""The test images of MNIST whose label people dispute."""

from mnist_pipeline.data.digits import Digits

# A majority of five raters disagreed with these labels (Northcutt et al., arXiv:2103.14749; data at
# github.com/cleanlab/label-errors): ten images got another label, three got none, and two were a tie.
DISPUTED = [947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729]


def disputed_images(digits: Digits) -> list[int]:
    """Return the indices of the images whose label is disputed; only MNIST's own test images have any."""
    return DISPUTED if digits.is_mnist("test") else []
