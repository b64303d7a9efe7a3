"""What a trained network gets right and wrong on the test images, as they are and corrupted."""
