"""The figures that the specification published for its own training."""

PARAMETERS = 19_210
MODEL_KB = 75  # "~75 KB"
EPOCH_SECONDS = 16
TOTAL_MINUTES = 3.7
TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000

# The mean loss (nats an image) and the number of right answers on the test images after epochs 1 to 14.
TEST_LOSS = [0.0541, 0.0376, 0.0291, 0.0241, 0.0243, 0.0203, 0.0207]
TEST_LOSS += [0.0196, 0.0209, 0.0191, 0.0176, 0.0177, 0.0180, 0.0170]
TEST_CORRECT = [9826, 9873, 9903, 9921, 9922, 9936, 9928, 9931, 9938, 9938, 9935, 9932, 9940, 9943]
TEST_ACCURACY = [correct / TEST_IMAGES for correct in TEST_CORRECT]

# The parameters of each block, and of its steps: a convolution with its batch normalisation, or a pooling.
BLOCK_PARAMETERS = dict(block1=642, block2=4134, block3=14434)
STEP_PARAMETERS = dict(conv1=72, conv2=570, pool1=0, conv3=1488, conv4=2646, pool2=0, conv5=5280, conv6=6984)
STEP_PARAMETERS |= dict(conv7=2170, gap=0)
