import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tasks.digits import Digits
from tasks.fetch import fetch
from tasks.image import ImageClassification
from tasks.images import crop_and_flip
from tasks.modular import Modular
from tasks.pairs import Pairs, infonce, view
from tasks.series import Series
from tasks.tabular import Tabular
from training.errors import UsageError


def everything(task, split="train"):
    dataset = getattr(task, split)
    rows = fetch(dataset, torch.arange(len(dataset)))
    return task.prepare(rows, torch.Generator().manual_seed(0), False)


def test_digits_are_standardised_and_stratified():
    task = Digits()
    train, validation = everything(task), everything(task, "validation")
    assert len(train["labels"]) + len(validation["labels"]) == 1797
    assert train["pixel_values"].shape[1:] == (1, 8, 8)
    assert train["pixel_values"].mean().item() == pytest.approx(0, abs=1e-5)
    assert train["pixel_values"].std().item() == pytest.approx(1, abs=1e-3)
    shares = [b["labels"].bincount() / len(b["labels"]) for b in (train, validation)]
    torch.testing.assert_close(*shares, atol=0.01, rtol=0)


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "divide"])
def test_modular_equations_hold(operation):
    task = Modular(modulus=13, operation=operation)
    batches = [everything(task), everything(task, "validation")]
    ids = torch.cat([b["input_ids"] for b in batches])
    results = torch.cat([b["labels"] for b in batches])
    assert (results[:, :3] == -100).all()
    a, b, c = ids[:, 0], ids[:, 2], results[:, 3]
    left, right = {
        "add": (a + b, c),
        "subtract": (a - b, c),
        "multiply": (a * b, c),
        "divide": (a, b * c),
    }[operation]
    assert ((left - right) % 13 == 0).all()
    assert len({tuple(row) for row in ids.tolist()}) == 13 * (12 if operation == "divide" else 13)
    assert len(batches[0]["labels"]) == pytest.approx(len(ids) / 2, abs=1)


def test_modular_refusals():
    with pytest.raises(UsageError, match="did you mean 'add'"):
        Modular(operation="ad")
    with pytest.raises(UsageError, match="prime"):
        Modular(modulus=12, operation="divide")
    with pytest.raises(UsageError, match="train_fraction"):
        Modular(train_fraction=1.0)


def test_tabular_classification_and_regression():
    iris, diabetes = Tabular(path="iris"), Tabular(path="diabetes")
    assert iris.dims == {"in_features": 4, "out_features": 3}
    assert diabetes.dims == {"in_features": 10, "out_features": 1}
    for task in (iris, diabetes):
        features = everything(task)["features"]
        torch.testing.assert_close(
            features.mean(0), torch.zeros(features.shape[1]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(features.std(0, correction=0), torch.ones(features.shape[1]))
    labels = everything(diabetes)["labels"]
    assert labels.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def write_csv(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_tabular_file(tmp_path):
    rows = [f"{i},{'red' if i % 2 else 'blue'},{'yes' if i % 3 else 'no'}" for i in range(60)]
    path = write_csv(tmp_path / "data.csv", "size,colour,bought", rows)
    with pytest.raises(UsageError, match=r"column 'colour' is text; task\.categorical=onehot"):
        Tabular(path=path, target="bought")
    with pytest.raises(UsageError, match="did you mean 'bought'"):
        Tabular(path=path, target="bougth")
    with pytest.raises(UsageError, match="which column"):
        Tabular(path=path)
    task = Tabular(path=path, target="bought", categorical="onehot")
    assert task.dims == {"in_features": 3, "out_features": 2}
    holes = write_csv(
        tmp_path / "holes.csv", "a,b", [",1" if i == 3 else f"{i},1" for i in range(9)]
    )
    with pytest.raises(UsageError, match="one value only"):
        Tabular(path=holes, target="b")
    with pytest.raises(UsageError, match="lacks a value in 1 rows"):
        Tabular(path=holes, target="a")


def test_series_windows_are_cut_where_they_say(tmp_path):
    rows = [f"2020-01-01 {i % 24:02}:00:00,{i},{-i}" for i in range(200)]
    path = write_csv(tmp_path / "series.csv", "date,up,down", rows)
    task = Series(path=path, context_length=10, horizon=5)
    mean, std = np.arange(140).mean(), np.arange(140).std()
    train, validation = everything(task), everything(task, "validation")
    first = train["past_values"][3, :, 0] * std + mean
    torch.testing.assert_close(first, torch.arange(3.0, 13.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        train["labels"][3, :, 0] * std + mean, torch.arange(13.0, 18.0), atol=1e-3, rtol=0
    )
    # Training ends at 140; validation forecasts 140 to 159, looking back into training.
    assert round((train["labels"][-1, -1, 0] * std + mean).item()) == 139
    assert round((validation["labels"][0, 0, 0] * std + mean).item()) == 140
    assert round((validation["labels"][-1, -1, 0] * std + mean).item()) == 159
    with pytest.raises(UsageError, match="shorter than"):
        Series(path=path, context_length=100, horizon=90)


def test_ett_split(data):
    """Informer's 12 and 4 months of 30 days, hourly."""
    task = Series(path=str(data / "ett"), context_length=96, horizon=24)
    assert len(task.train) == 12 * 30 * 24 - 96 - 24 + 1
    assert len(task.validation) == 4 * 30 * 24 - 24 + 1
    assert task.dims == {"in_features": 96 * 7, "out_features": 24 * 7}


def pictures(folder, sizes=(12,), classes=("cat", "dog")):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            for i in range(6):
                size = sizes[i % len(sizes)]
                pixels = rng.integers(0, 100 + 100 * number, (size, size, 3), dtype=np.uint8)
                path = folder / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return str(folder)


def test_image_folder(tmp_path):
    task = ImageClassification(path=pictures(tmp_path / "pets"))
    assert task.dims["num_classes"] == 2
    assert task.dims["image_size"] == 12
    pixels = everything(task)["pixel_values"]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0
    )
    assert len(task.train) == len(task.validation) == 12


def test_images_of_different_sizes_need_one(tmp_path):
    path = pictures(tmp_path / "pets", sizes=(12, 16))
    with pytest.raises(UsageError, match=r"set task\.size"):
        ImageClassification(path=path)
    assert ImageClassification(path=path, size=8).dims["image_size"] == 8


def test_crop_and_flip_moves_pixels_and_makes_none():
    images = torch.arange(1.0, 26).view(1, 1, 5, 5).expand(400, 1, 5, 5)
    out = crop_and_flip(images, torch.Generator().manual_seed(0), padding=1)
    assert set(out.unique().tolist()) <= set(range(26))
    centre = out[:, 0, 2, 2]
    assert set(centre.tolist()) == {7.0, 8, 9, 12, 13, 14, 17, 18, 19}
    flipped = (out[:, 0, 2, 3] < out[:, 0, 2, 1]).float().mean().item()
    assert flipped == pytest.approx(0.5, abs=0.08)


def test_cifar10(data):
    task = ImageClassification(path=str(data / "cifar10"))
    assert (len(task.train), len(task.validation)) == (10_000, 2_000)
    assert task.dims["num_classes"] == 10
    # Published channel means and deviations of CIFAR-10's training set; this is a sample of it.
    torch.testing.assert_close(
        task.images.mean, torch.tensor([0.491, 0.482, 0.447]), atol=0.01, rtol=0
    )


def test_infonce_against_the_loop_of_the_definition():
    embeddings = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = infonce({"logits": embeddings}, {}, temperature=0.3)
    for i in range(8):
        cosines = [F.cosine_similarity(embeddings[i], embeddings[j], dim=0) / 0.3 for j in range(8)]
        below = sum(torch.exp(cosines[j]) for j in range(8) if j != i)
        expected = -(cosines[(i + 4) % 8] - torch.log(below))
        assert ours[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_pairs_are_two_views_of_one_image():
    task = Pairs()
    found = everything(task, "validation")["pixel_values"]
    half = len(found) // 2
    same = F.cosine_similarity(found[:half].flatten(1), found[half:].flatten(1)).mean()
    other = F.cosine_similarity(found[:half].flatten(1), found[half:].roll(1, 0).flatten(1)).mean()
    assert same > other + 0.1


def test_a_view_of_a_flat_image_is_flat():
    out = view(torch.full((16, 1, 8, 8), 2.0), torch.Generator().manual_seed(0), mirror=True)
    assert out.std((1, 2, 3)).max() < 1e-4


def test_validation_is_never_on_the_training_split(tmp_path):
    path = pictures(tmp_path / "pets")
    task = ImageClassification(path=path, train_split="test")
    assert (len(task.train), len(task.validation)) == (10, 2)  # a tenth of the 12, held out


def test_images_of_16_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for split in ("train", "test"):
        for name in ("one", "two"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ramp).save(tmp_path / split / name / "a.png")
    task = ImageClassification(path=str(tmp_path))
    assert task.dims["in_channels"] == 1
    pixels = np.array(task.train[0]["pixels"])
    np.testing.assert_array_equal(pixels, ramp.reshape(-1) // 257)


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    path = pictures(tmp_path / "pets")
    grey = tmp_path / "pets" / "train" / "cat" / "0.png"
    Image.open(grey).convert("L").save(grey)
    assert ImageClassification(path=path).dims["in_channels"] == 3


def test_a_corrupt_image_is_named_as_one(tmp_path):
    path = pictures(tmp_path / "pets")
    broken = tmp_path / "pets" / "train" / "cat" / "3.png"
    whole = broken.read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        broken.write_bytes(content)
        with pytest.raises(UsageError, match="an image cannot be read"):
            ImageClassification(path=path)


def test_values_that_cannot_be_trained_on_are_named(tmp_path):
    rows = [f"{'inf' if i == 3 else i},{'' if i == 5 else 'red'},{i % 2}" for i in range(9)]
    path = write_csv(tmp_path / "a.csv", "size,colour,bought", rows)
    with pytest.raises(UsageError, match="column 'colour' has rows without a value"):
        Tabular(path=path, target="bought", categorical="onehot")
    rows = [f"{'inf' if i == 3 else i},{i % 2}" for i in range(9)]
    path = write_csv(tmp_path / "c.csv", "size,bought", rows)
    with pytest.raises(UsageError, match="column 'size' has infinite values"):
        Tabular(path=path, target="bought")
    with pytest.raises(UsageError, match="column 'size' has infinite values"):
        Series(path=path, context_length=2, horizon=1)
