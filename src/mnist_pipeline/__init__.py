"""A reproducible pipeline that trains, evaluates and reports a small convolutional network on MNIST.

Makers make the numbers: common, data, model, training, evaluation, report. Wings watch them or use what they made:
tracking, promotion, serving, experiments. A maker never imports a wing.
"""
