"""Train the specification's network for an epoch and test it, as a user of torch and torchvision would write it.

This is what the bench compares the pipeline with. It imports nothing of the pipeline, and it stays as it is: what makes
the pipeline faster must not come here. `python benchmarks/plain_loop.py DIRECTORY` reads MNIST from where torchvision
would put it, and prints the seconds.
"""

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def _convolve(inputs: int, outputs: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU()]


def main(directory: str) -> None:
    """Print the seconds from opening the files to the accuracy on the test images."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    training, test = (datasets.MNIST(directory, train=part, transform=transform) for part in (True, False))
    model = nn.Sequential(
        *_convolve(1, 6, padding=1),
        *_convolve(6, 10, padding=1),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *_convolve(10, 16, padding=1),
        *_convolve(16, 18, padding=1),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        *_convolve(18, 32, padding=0),
        *_convolve(32, 24, padding=0),
        nn.Conv2d(24, 10, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LogSoftmax(dim=1),
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=0.0001)
    model.train()
    for images, labels in DataLoader(training, batch_size=129, shuffle=True):
        optimizer.zero_grad()
        F.nll_loss(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in DataLoader(test, batch_size=1000):
            correct += int((model(images.to(device)).argmax(dim=1) == labels.to(device)).sum())
    print(f"{correct} of {len(test)} right", file=sys.stderr)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
