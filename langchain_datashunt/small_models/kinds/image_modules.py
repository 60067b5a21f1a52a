"""Torch modules of small image networks, imported only when a network is built."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class _Block(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (option A of He et al. 2016).

    The shortcut subsamples pixels by `stride` and pads additional channels with zeros.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map states `[n, before, h, w]` to states `[n, after, h / stride, w / stride]`."""
        found = functional.relu(self.first_norm(self.first(x)))
        found = self.second_norm(self.second(found))
        if self.stride != 1 or self.more:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return functional.relu(found + x)


class SmallResNet(nn.Module):
    """The residual network for small images of He et al. (2016), section 4.2, without its last layer.

    One 3x3 convolution is followed by three groups of `(depth - 2) / 6` blocks with `width`, `2 width` and `4 width`
    channels. The second and third group halve height and width. Depth 32 and width 16 give the paper's ResNet-32.
    """

    def __init__(self, depth: int, width: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        before = width
        for group in range(3):
            for i in range((depth - 2) // 6):
                after = width * 2**group
                blocks.append(_Block(before, after, 2 if group and i == 0 else 1))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.size = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `[n, c, h, w]` to features `[n, 4 width, h / 4, w / 4]`."""
        states = functional.relu(self.first_norm(self.first(images)))
        found: torch.Tensor = self.blocks(states)
        return found


class ResNetClassifier(nn.Module):
    """A `SmallResNet` with global average pooling and a linear layer."""

    def __init__(self, depth: int, width: int, channels: int, labels: int) -> None:
        super().__init__()
        self.trunk = SmallResNet(depth, width, channels)
        self.output = nn.Linear(self.trunk.size, labels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images `[n, c, h, w]` to logits `[n, k]`."""
        logits: torch.Tensor = self.output(self.trunk(images).mean(dim=(2, 3)))
        return logits


def shifted(images: torch.Tensor, pixels: int, flip: bool) -> torch.Tensor:
    """Shift each image by a random offset, and mirror a random half of the images if `flip` is set.

    Args:
        images: Training images, shape `[n, c, h, w]`.
        pixels: Maximum shift in pixels in each direction. Border pixels are repeated.
        flip: Whether images are mirrored left to right with probability 0.5.

    Returns:
        Augmented images, shape `[n, c, h, w]`.
    """
    n, _, height, width = images.shape
    padded = functional.pad(images, (pixels, pixels, pixels, pixels), mode="replicate") if pixels else images
    rows = torch.randint(0, 2 * pixels + 1, (n, 1), device=images.device) + torch.arange(height, device=images.device)
    columns = torch.randint(0, 2 * pixels + 1, (n, 1), device=images.device) + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand(n, 1, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
