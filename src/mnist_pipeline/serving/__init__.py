"""A trained network at work: reading pictures, the web service, ONNX, and new digits to train on."""
