import pytest
import torch

from models.transducer import histories
from tasks.rnnt import rnnt

DIMS = {"vocab_size": 7, "frames": 10, "frame_features": 3}
SMALL = {"width": 16, "depth": 2, "heads": 2}


@pytest.fixture
def batch(generator):
    mask = torch.arange(10) < torch.tensor([10, 6])[:, None]
    features = torch.randn(2, 10, 3, generator=generator) * mask[..., None]
    labels = torch.tensor([[1, 5, 2, 6], [3, 3, -100, -100]])
    return {"input_features": features, "attention_mask": mask.long(), "labels": labels}


def test_shapes_and_gradients(build, batch):
    model = build("transducer", DIMS, **SMALL, simple_joiner=True)
    outputs = model(**batch)
    shapes = {k: tuple(outputs[k].shape) for k in ("encoder", "predictor", "am", "lm")}
    assert shapes == {
        **{"encoder": (2, 10, 16), "predictor": (2, 5, 16)},
        **{"am": (2, 10, 7), "lm": (2, 5, 7)},
    }
    logits = outputs["joiner"](outputs["encoder"][:, :, None], outputs["predictor"][:, None])
    assert logits.shape == (2, 10, 5, 7)
    loss = rnnt(outputs, batch).sum() + outputs["am"].square().sum() + outputs["lm"].square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_without_the_simple_joiner_every_parameter_is_the_loss_s(build, batch):
    model = build("transducer", DIMS, **SMALL)
    outputs = model(**batch)
    assert "am" not in outputs
    rnnt(outputs, batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_padding_and_other_samples_are_not_seen(build, batch):
    model = build("transducer", DIMS, **SMALL).eval()
    together = model(**batch)
    alone = model(
        input_features=batch["input_features"][1:, :6],
        attention_mask=batch["attention_mask"][1:, :6],
        labels=batch["labels"][1:, :2],
    )
    torch.testing.assert_close(together["encoder"][1:, :6], alone["encoder"])
    torch.testing.assert_close(together["predictor"][1:, :3], alone["predictor"])


def test_the_predictor_sees_the_last_two_symbols(build, batch):
    """Step by step it has the states that it has of the whole text."""
    assert histories(batch["labels"][1:], 2).tolist() == [[[0, 0], [0, 3], [3, 3], [3, 0], [0, 0]]]
    model = build("transducer", DIMS, **SMALL)
    outputs = model(**batch)
    history = torch.zeros(1, 2, dtype=torch.long)
    for state, symbol in zip(outputs["predictor"][0], [1, 5, 2, 6, 0]):
        torch.testing.assert_close(outputs["prediction"](history)[0], state)
        history = torch.cat([history[:, 1:], torch.tensor([[symbol]])], 1)


def test_every_activation_and_norm_comes_from_its_slot(build):
    keys = {
        "activation": {"_target_": "torch.nn.Softsign"},
        "norm": {"_target_": "torch.nn.RMSNorm"},
    }
    model = build("transducer", DIMS, **SMALL, **keys)
    assert not [m for m in model.modules() if isinstance(m, (torch.nn.GELU, torch.nn.LayerNorm))]


def test_mistakes(build, batch):
    with pytest.raises(ValueError, match=r"model\.width"):
        build("transducer", DIMS, **SMALL | {"width": 0})
    model = build("transducer", DIMS | {"frames": 9}, **SMALL)
    with pytest.raises(ValueError, match="at most 9 frames, got 10"):
        model(**batch)
