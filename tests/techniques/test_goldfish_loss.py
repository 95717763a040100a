import pytest
import torch
from torch import Tensor

from techniques.weighting.goldfish_loss import GoldfishLoss


def tokens(rows: int, length: int, vocabulary: int = 50_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (rows, length), generator=generator)


@pytest.mark.parametrize("context", [1, 4, 13])
def test_mask_is_that_of_exact_integer_arithmetic(context):
    """Python's integers, reduced to signed 64 bits, in place of tensors that wrap around."""
    goldfish = GoldfishLoss(k=3, context=context)
    labels = tokens(3, 40)
    expected = torch.zeros(3, 40, dtype=torch.bool)
    for row in range(3):
        for i in range(context - 1, 40):
            product = 1
            for token in labels[row, i - context + 1 : i + 1].tolist():
                product *= token
            wrapped = (product + 2**63) % 2**64 - 2**63
            expected[row, i] = goldfish.table[wrapped % 1_000_003] < 1 / 3
    assert expected.any()
    assert torch.equal(goldfish.dropped(labels), expected)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_one_in_k_tokens_is_dropped(k):
    share = GoldfishLoss(k=k).dropped(tokens(40, 2_000))[:, 12:].double().mean().item()
    deviation = ((1 / k) * (1 - 1 / k) / 80_000) ** 0.5
    assert abs(share - 1 / k) < 5 * deviation


def test_a_passage_is_masked_alike_wherever_it_stands():
    goldfish, passage = GoldfishLoss(), tokens(1, 200)
    first = torch.cat([tokens(1, 17, seed=1), passage, tokens(1, 83, seed=2)], dim=1)
    second = torch.cat([tokens(1, 91, seed=3), passage, tokens(1, 9, seed=4)], dim=1)
    masks = goldfish.dropped(torch.cat([first, second]))
    in_first, in_second = masks[0, 17:217], masks[1, 91:291]
    assert torch.equal(in_first[12:], in_second[12:])
    assert in_first[12:].any()


def test_table_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = GoldfishLoss().table
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(GoldfishLoss().table, first)
    assert first.sort().values.diff().max() < 1e-4  # uniform on [0, 1)


def test_mean_and_gradient_over_the_kept_tokens():
    goldfish, labels = GoldfishLoss(), tokens(2, 64)
    labels[1, 40:] = -100
    losses = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = goldfish(losses, {}, {"labels": labels})
    loss.backward()
    kept = [
        (row, i)
        for row in range(2)
        for i in range(64)
        if labels[row, i] != -100 and not goldfish.dropped(labels)[row, i]
    ]
    assert loss.item() == pytest.approx(sum(losses[at].item() for at in kept) / len(kept), rel=1e-6)
    for row in range(2):
        for i in range(64):
            expected = 1 / len(kept) if (row, i) in kept else 0.0
            assert losses.grad[row, i].item() == pytest.approx(expected, rel=1e-6)


def test_nothing_kept_is_a_loss_of_zero():
    labels = torch.full((1, 20), -100)
    assert GoldfishLoss()(torch.zeros(1, 20), {}, {"labels": labels}) == 0


def test_large_k_is_the_plain_mean():
    labels, losses = tokens(2, 64), torch.rand(2, 64)
    loss = GoldfishLoss(k=10**9)(losses, {}, {"labels": labels})
    torch.testing.assert_close(loss, losses.mean())


@pytest.mark.parametrize(("name", "value"), [("k", 1), ("context", 0)])
def test_refuses_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        GoldfishLoss(**{name: value})


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(2, 12, dtype=torch.int64)])
def test_refuses_labels_that_are_no_long_sequences(labels):
    with pytest.raises(ValueError, match="goldfish_loss needs token labels"):
        GoldfishLoss()(torch.zeros(labels.shape), {}, {"labels": labels})
