"""What the specification published of its own training: the figures that ours stand beside, not ours."""

PARAMETERS = 19_210
MODEL_KB = 75  # "~75 KB"
EPOCH_SECONDS = 16
TOTAL_MINUTES = 3.7

# Of the 10,000 test images after epochs 1 to 14: the average loss (nats an image) and how many were right.
TEST_LOSS = [0.0541, 0.0376, 0.0291, 0.0241, 0.0243, 0.0203, 0.0207]
TEST_LOSS += [0.0196, 0.0209, 0.0191, 0.0176, 0.0177, 0.0180, 0.0170]
TEST_CORRECT = [9826, 9873, 9903, 9921, 9922, 9936, 9928]
TEST_CORRECT += [9931, 9938, 9938, 9935, 9932, 9940, 9943]
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000

# The parameters of each convolution with its batch normalisation, and its receptive field where one is named.
LAYER_PARAMETERS = {
    "conv1": 72,
    "conv2": 570,
    "conv3": 1488,
    "conv4": 2646,
    "conv5": 5280,
    "conv6": 6984,
    "conv7": 2170,
}
BLOCK_PARAMETERS = {"block1": 642, "block2": 4134, "block3": 14434}
RECEPTIVE_FIELD = {"conv2": 5, "conv4": 14}
