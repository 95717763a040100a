import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from study.probes.generation import Generation, distinct, divergence, ngrams, repeated
from tests.study.test_probes import CODE, lines


def test_divergence_is_scipys():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(5, (n,), generator=generator).tolist() for n in (40, 30))
    shares = [np.bincount(x, minlength=5) / len(x) for x in (ours, theirs)]
    found = divergence([(i,) for i in ours], [(i,) for i in theirs])
    assert found == pytest.approx(jensenshannon(*shares, base=2) ** 2, abs=1e-12)
    assert divergence([(1,), (2,)], [(2,), (1,)]) == 0
    assert divergence([(1,)], [(2,)]) == 1


def test_distinct_and_repeated():
    rows = ngrams(torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]), 2)
    assert rows[0] == [(1, 2), (2, 1), (1, 2), (2, 1)]
    assert distinct(rows) == 5 / 8
    assert repeated(rows) == 2 / 8


def test_probe(tmp_path):
    probe = "+callbacks.generation={_target_:study.probes.generation.Generation,passages:8,"
    probe += "prefix:8,length:16,n:2}"
    steps = ("trainer.max_steps=2", "trainer.log_every=1")
    found = lines(tmp_path / "with", *CODE, *steps, probe)
    assert 0 < found[-1]["probe/ngram_divergence"] <= 1
    assert 0 < found[-1]["probe/distinct"] <= 1
    assert found[-1]["probe/repeated_true"] > 0
    assert "probe/distinct" not in found[0]
    plain = lines(tmp_path / "without", *CODE, *steps)
    assert all(found[-1][key] == value for key, value in plain[-1].items())
    assert math.isfinite(found[-1]["probe/distinct_true"])


def test_refusals():
    for keys in ({"passages": 0}, {"prefix": 0}, {"n": 0}, {"length": 2}):
        with pytest.raises(ValueError, match=next(iter(keys))):
            Generation(**keys)
