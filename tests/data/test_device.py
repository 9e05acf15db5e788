"""Order, crop and flip happen on the device, drawn for the whole batch."""

from __future__ import annotations

import numpy as np
import torch

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import Data
from dwf_cluster.data.sources import Images
from dwf_cluster.determinism import Draws

CPU = torch.device("cpu")


def _images(count: int = 50) -> Images:
    x = np.random.default_rng(0).integers(1, 256, (count, 3, 8, 6), dtype=np.uint8)
    y = np.arange(count) % 10
    return Images(x, y, x[:5], y[:5], 10, (0.5,) * 3, (0.25,) * 3)


def test_an_epoch_holds_every_image_once_in_batches_of_nearly_equal_size() -> None:
    images = DeviceImages(_images(50), Data(), CPU)
    batches = images.epoch(16, Draws((0, "benign", 0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(50))
    assert [len(batch) for batch in batches] == [13, 13, 12, 12]
    assert [len(batch) for batch in images.epoch(128, Draws((0,)))] == [50]


def test_order_follows_seed_model_and_epoch() -> None:
    images = DeviceImages(_images(), Data(), CPU)

    def order(*key: int | str) -> list[int]:
        return torch.cat(images.epoch(16, Draws(key))).tolist()

    assert order(0, "pgd-1", 0) == order(0, "pgd-1", 0)
    different = [(0, "pgd-1", 0), (1, "pgd-1", 0), (0, "pgd-2", 0), (0, "pgd-1", 1)]
    assert len({tuple(order(*key)) for key in different}) == 4


def test_without_augmentation_a_batch_is_the_images_in_unit_range() -> None:
    raw = _images()
    x, y = DeviceImages(raw, Data(), CPU).train_batch(torch.tensor([3, 1]), Draws((0,)))
    assert torch.equal(x, torch.tensor(raw.x_train[[3, 1]]).float() / 255)
    assert y.tolist() == [3, 1]


def test_crop_and_flip_equal_the_slow_way_image_by_image() -> None:
    raw, draws, indices = _images(), Draws((0, "benign", 2, 7)), torch.arange(40)
    x, _ = DeviceImages(raw, Data(crop_padding=2, flip=True), CPU).train_batch(indices, draws)
    offsets = torch.randint(5, (2, 40, 1), generator=draws.generator("crop"))[..., 0]
    mirrored = torch.rand(40, generator=draws.generator("flip")) < 0.5
    for i in range(40):
        padded = np.pad(raw.x_train[i], ((0, 0), (2, 2), (2, 2)))
        top, left = int(offsets[0, i]), int(offsets[1, i])
        slow = padded[:, top : top + 8, left : left + 6]
        slow = slow[:, :, ::-1] if mirrored[i] else slow
        assert np.array_equal((x[i] * 255).round().numpy(), slow)
    assert 5 < int(mirrored.sum()) < 35


def test_a_part_of_a_batch_is_augmented_as_in_the_whole() -> None:
    images = DeviceImages(_images(), Data(crop_padding=2, flip=True), CPU)
    indices, draws = torch.arange(30), Draws((0,))
    whole, labels = images.train_batch(indices, draws)
    parts = [images.train_batch(indices, draws, slice(a, b)) for a, b in ((0, 11), (11, 30))]
    assert torch.equal(whole, torch.cat([x for x, _ in parts]))
    assert torch.equal(labels, torch.cat([y for _, y in parts]))
