"""How well a trained network reads the test images, plain and corrupted."""
