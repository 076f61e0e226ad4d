"""Small plain modules that the tests share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights: every second pixel, new channels zero (option A)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = channels // channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if y.shape != x.shape:
            added = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR residual network of He et al. (2015), section 4.2: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16)
        self.layer2 = self._stage(blocks, 16, 32)
        self.layer3 = self._stage(blocks, 32, 64)
        self.linear = nn.Linear(64, num_classes)

    def _stage(self, blocks: int, channels_in: int, channels: int) -> nn.Sequential:
        rest = (ResidualBlock(channels, channels) for _ in range(blocks - 1))
        return nn.Sequential(ResidualBlock(channels_in, channels), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet(depth: int, num_classes: int = 10) -> nn.Module:
    """A CIFAR ResNet of 6n + 2 layers, randomly initialised."""
    assert depth % 6 == 2, f"depth must be 6n + 2, got {depth}"
    return ResNet(depth // 6, num_classes)


def resnet20() -> nn.Module:
    return resnet(20)


def resnet56() -> nn.Module:
    return resnet(56)
