import numpy as np
import pytest
import torch

from models.attention import SelfAttention
from study.probes.logits import Logits
from techniques.attention.qk_norm import QKNormAttention
from techniques.penalty.z_loss import z_loss
from training.assemble import assemble
from training.compose import compose
from training.progress import Progress
from training.train import start

QK = "model.attention._target_=techniques.attention.qk_norm.QKNormAttention"
SMALL = ["model.width=16", "model.depth=2", "model.heads=2", "task.context_length=16"]
SMALL += ["tracker=none", "trainer.device=cpu", "trainer.batch_size=4", "task.path=json"]


def normalised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_attention_in_numpy():
    layer = QKNormAttention(8, 2, 0).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    parts = (x[0] @ layer.qkv.weight.T).detach().numpy().reshape(5, 6, 4).transpose(1, 0, 2)
    out = []
    for head in range(2):
        q, k, v = (parts[head + 2 * part] for part in range(3))
        scores = normalised(q) @ normalised(k).T / 2
        weights = np.exp(scores) * np.tri(5)
        out.append(weights / weights.sum(-1, keepdims=True) @ v)
    expected = np.concatenate(out, axis=-1) @ layer.out.weight.detach().numpy().T
    assert layer(x)[0].detach().numpy() == pytest.approx(expected, abs=1e-10)


def test_logits_do_not_grow_with_the_projections():
    layer = QKNormAttention(8, 2, 0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, _ = layer.project(x)
    with torch.no_grad():
        layer.qkv.weight *= 1000
    larger = layer.project(x)
    for before, after in zip((q, k), larger):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert larger[0].detach().square().sum(-1).max().item() <= 4 + 1e-9


def test_z_loss_of_known_logits():
    """log Z of zeros is log 3, of (log 2, 0, 0) log 4; the third label is not counted."""
    logits = torch.zeros(1, 3, 3, dtype=torch.float64)
    logits[0, 1, 0] = np.log(2)
    labels = torch.tensor([[0, 1, -100]])
    found = z_loss(torch.nn.Identity(), {"logits": logits}, {"labels": labels})
    assert float(found) == pytest.approx((np.log(3) ** 2 + np.log(4) ** 2) / 2, abs=1e-6)


def test_probe_by_hand(tmp_path):
    """With the first layer's queries and keys made by hand, on the last batch of a run."""
    run = assemble(compose([*SMALL, f"outputs={tmp_path}"]))
    run.batch = run.batches.part(0, 0)
    run.step, told = 1, {}
    run.record = told.update
    probe = Logits(every=1)
    probe.on_fit_start(run)
    probe.on_step_end(run)
    largest = []
    for layer in (m for m in run.model.modules() if isinstance(m, SelfAttention)):
        layer.register_forward_pre_hook(
            lambda m, a: largest.append([p.detach() for p in m.project(a[0])[:2]])
        )
    logits = run.model(run.batch["input_ids"])["logits"].detach()
    expected = 0.0
    for q, k in largest:
        for row in range(q.shape[2]):
            seen = k[:, :, : row + 1]
            scores = torch.einsum("bhd,bhkd->bhk", q[:, :, row], seen).abs() / q.shape[-1] ** 0.5
            expected = max(expected, float(scores.max()))
    assert told["probe/attention_logit"] == pytest.approx(expected, rel=1e-5)
    log_z = float(torch.log(torch.exp(logits.double()).sum(-1)).mean())
    assert told["probe/log_z"] == pytest.approx(log_z, rel=1e-5)
    with pytest.raises(ValueError, match="every: must be at least 1, got 0"):
        Logits(every=0)


def test_a_run_has_them(tmp_path):
    overrides = [*SMALL, QK, "trainer.max_steps=2", f"outputs={tmp_path}"]
    overrides += ["+penalties.z={_target_:techniques.penalty.z_loss.z_loss,coefficient:1e-4}"]
    overrides += ["+callbacks.logits={_target_:study.probes.logits.Logits,every:2}"]
    metrics = start(compose(overrides), overrides, Progress())["metrics"]
    assert metrics["train/z"] > 1
    # LayerNorm makes queries and keys √d long at most, so that logits are at most √d.
    assert 0 < metrics["probe/attention_logit"] <= 8**0.5 + 1e-3
    assert metrics["probe/log_z"] == pytest.approx(np.log(256), abs=0.5)
