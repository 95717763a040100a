import pytest
import torch
from torch import nn

from techniques.data.pilot import embeddings, pilot


class Model(nn.Module):
    def forward(self, features):
        return {"logits": features[..., :1], "hidden": features}


def test_embeddings_are_the_features_before_the_head():
    x = torch.randn(4, 3)
    assert embeddings(Model())({"features": x}).equal(x)


def test_of_tokens_the_mean_over_those_that_count():
    x = torch.randn(2, 3, 5)
    batch = {"features": x, "labels": torch.tensor([[1, 2, -100], [4, -100, -100]])}
    expected = torch.stack([x[0, :2].mean(0), x[1, 0]])
    torch.testing.assert_close(embeddings(Model())(batch), expected)


def test_needs_one_model():
    for of, model in ((None, None), ("folder", Model)):
        with pytest.raises(ValueError, match="of, model"):
            pilot(of, model, None, None)
