import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, rotate, shift

from tasks import corruptions
from tasks.arrays import as_dataset
from tasks.digits import Digits


@pytest.fixture(scope="module")
def digits():
    return Digits().validation


def images(dataset):
    return np.asarray(dataset["pixels"]).reshape(-1, 8, 8)


def test_noise_is_normal_within_the_range_and_the_same_each_time(digits):
    noisy = corruptions.noise(digits, std=3.0)
    drawn = np.random.default_rng(0).normal(0, 3, (360, 1, 8, 8)).reshape(-1, 8, 8)
    np.testing.assert_allclose(images(noisy), (images(digits) + drawn).clip(0, 16), atol=1e-5)
    assert noisy["labels"] == digits["labels"]
    assert noisy["pixels"] != corruptions.noise(digits, std=3.0, seed=1)["pixels"]


def test_colours_are_blurred_apart():
    pixels = np.zeros((2, 3, 4, 4), np.float32)
    pixels[0, 1, 2, 2] = 9.0
    found = np.asarray(
        corruptions.blur(as_dataset({"pixels": pixels.reshape(2, -1)}), sigma=0.5)["pixels"]
    )
    expected = np.zeros_like(pixels)
    expected[0, 1] = gaussian_filter(pixels[0, 1], 0.5, mode="constant")
    np.testing.assert_allclose(found.reshape(2, 3, 4, 4), expected, atol=1e-5)


def test_blur_and_turn_change_each_image_alone(digits):
    blurred, turned = corruptions.blur(digits, sigma=0.8), corruptions.turn(digits, degrees=30)
    for i in (0, 100):
        image = images(digits)[i].astype(float)
        expected = gaussian_filter(image, 0.8, mode="constant")
        np.testing.assert_allclose(images(blurred)[i], expected, rtol=1e-5, atol=1e-5)
        expected = rotate(image, 30, reshape=False, order=1)
        np.testing.assert_allclose(np.abs(images(turned)[i] - expected).max(), 0, atol=1e-5)


def test_nothing_is_nothing(digits):
    for corrupted in (
        corruptions.noise(digits, std=0),
        corruptions.blur(digits, sigma=0),
        corruptions.turn(digits, degrees=0),
    ):
        np.testing.assert_allclose(images(corrupted), images(digits), atol=1e-6)


def test_a_quarter_turn_is_counter_clockwise(digits):
    turned = images(corruptions.turn(digits, degrees=90))
    np.testing.assert_allclose(turned, np.rot90(images(digits), axes=(1, 2)), atol=1e-4)


def test_mistakes(digits):
    with pytest.raises(ValueError, match=r"^std: must not be negative, got -1"):
        corruptions.noise(digits, std=-1)
    with pytest.raises(ValueError, match=r"^sigma: must not be negative, got -1"):
        corruptions.blur(digits, sigma=-1)


def test_shifts_are_whole_pixels_of_every_copy():
    """Each copy of each image is one of its nine shifts by up to a pixel, as scipy makes them."""
    images = np.arange(1, 28, dtype=np.float32).reshape(3, 9)
    dataset = as_dataset({"pixels": images, "labels": np.array([4, 5, 6])})
    found = corruptions.shifts(dataset, copies=4, seed=1)
    assert list(found["labels"]) == [4, 5, 6] * 4
    offsets = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    for place, image in enumerate(np.array(found["pixels"])):
        square = images[place % 3].reshape(3, 3)
        moved = [shift(square, offset, order=0).ravel() for offset in offsets]
        assert any(np.array_equal(image, one) for one in moved)
    assert len({tuple(image) for image in np.array(found["pixels"])}) > 6
    again = corruptions.shifts(dataset, copies=4, seed=1)
    other = corruptions.shifts(dataset, copies=4, seed=2)
    assert found["pixels"] == again["pixels"]
    assert found["pixels"] != other["pixels"]
    with pytest.raises(ValueError, match="at least 1 and 0, got 0 and 1"):
        corruptions.shifts(dataset, copies=0)
