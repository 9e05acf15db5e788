"""A data set as uint8 tensors that stay on the device; order, crop, flip and conversion to float happen there."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dwf_cluster.data.registry import Data
from dwf_cluster.data.sources import Images
from dwf_cluster.data.subsets import balanced
from dwf_cluster.determinism import Draws


class DeviceImages:
    """The images of an experiment on one device.

    Attributes:
        x_train, x_validation, x_test: uint8, shape (n, channels, height, width).
        y_train, y_validation, y_test: int64, shape (n,).
    """

    def __init__(self, images: Images, data: Data, device: torch.device) -> None:
        self.x_train = torch.tensor(images.x_train, device=device)
        self.y_train = torch.tensor(images.y_train, device=device)
        self.x_validation = torch.tensor(images.x_validation, device=device)
        self.y_validation = torch.tensor(images.y_validation, device=device)
        self.x_test = torch.tensor(images.x_test, device=device)
        self.y_test = torch.tensor(images.y_test, device=device)
        self._crop_padding = data.crop_padding
        self._flip = data.flip

    def probed(self, count: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """A class-balanced, fixed draw of at most `count` images to follow a training by, without augmentation.

        Returns:
            Images float32 in [0, 1], shape (n, channels, height, width); labels int64, shape (n,); and what they are:
            `validation` images or, if no images are held out, `train`ing images.
        """
        split = "validation" if len(self.y_validation) else "train"
        x, y = (self.x_validation, self.y_validation) if len(self.y_validation) else (self.x_train, self.y_train)
        chosen = torch.tensor(balanced(y.cpu().numpy(), count, "probe"), device=y.device)
        return to_float(x[chosen]), y[chosen], split

    def epoch(self, batch_size: int, draws: Draws) -> list[torch.Tensor]:
        """The indices of each batch of one epoch, in a random order.

        Every image occurs once; sizes differ by one at most, so no batch is too small for BatchNorm.
        """
        order = torch.randperm(len(self.x_train), generator=draws.generator("order"))
        batches = -(-len(order) // batch_size)
        return [batch.to(self.x_train.device) for batch in order.tensor_split(batches)]

    def train_batch(
        self, indices: torch.Tensor, draws: Draws, part: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One augmented batch, or a worker's part of it.

        The draws are made for the whole batch, so its images do not depend on how it is cut.

        Returns:
            Images float32 in [0, 1], shape (b, channels, height, width); labels int64, shape (b,).
        """
        chosen = indices[part]
        x, size, device = self.x_train[chosen], len(indices), self.x_train.device
        if self._crop_padding:
            span = 2 * self._crop_padding + 1
            offsets = torch.randint(span, (2, size, 1), generator=draws.generator("crop"))[:, part].to(device)
            n, channels, height, width = x.shape
            rows = (offsets[0] + torch.arange(height, device=device))[:, None, :, None]
            columns = (offsets[1] + torch.arange(width, device=device))[:, None, None, :]
            padded = F.pad(x, (self._crop_padding,) * 4)
            image = torch.arange(n, device=device)[:, None, None, None]
            x = padded[image, torch.arange(channels, device=device)[:, None, None], rows, columns]
        if self._flip:
            mirrored = torch.rand(size, generator=draws.generator("flip"))[part].to(device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return to_float(x), self.y_train[chosen]


def to_float(x: torch.Tensor) -> torch.Tensor:
    """uint8 pixels 0..255 as float32 in [0, 1]."""
    return x.float() / 255
