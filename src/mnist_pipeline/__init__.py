"""A reproducible pipeline that trains, evaluates and reports a small convolutional network on MNIST.

Makers make the numbers: common, data, model, training, evaluation, report. Wings watch them or use what they made:
tracking, promotion, serving, experiments. A maker never imports a wing.
"""

from mnist_pipeline.common.kernels import pin_kernels

pin_kernels()  # before any library looks at the processor
