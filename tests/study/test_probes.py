import pytest
import torch
from torch import nn

from study.probes.activation_variance import ActivationVariance
from study.probes.class_accuracy import ClassAccuracy
from study.probes.hessian import HessianEigenvalue, eigenvalue
from study.probes.memory import MIB, Live, StepMemory
from study.probes.recitation import Recitation
from tests.cli.invoke import lines
from training.assemble import assemble
from training.compose import compose
from training.data import move

DIGITS = (
    *("task=digits", "tracker=none", "trainer.device=cpu", "trainer.max_steps=3"),
    *("trainer.log_every=1", "model.width=8", "trainer.eval_every=3", "trainer.eval_samples=32"),
)
CODE = (
    *("tracker=none", "trainer.device=cpu", "model.width=32", "model.depth=1", "model.heads=2"),
    *("task.path=tasks", "task.context_length=32", "trainer.batch_size=4"),
    *("trainer.eval_samples=4", "trainer.eval_every=1000", "schedule=constant"),
    "+data.transforms.few={_target_:tasks.transforms.subset,samples:4}",
)


def test_top_eigenvalue_of_a_quadratic():
    """½ xᵀAx has the Hessian A, here with eigenvalues −9, 1, 2 and 5."""
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    a = q @ torch.diag(torch.tensor([-9.0, 1.0, 2.0, 5.0])) @ q.T
    holder = nn.ParameterList([nn.Parameter(torch.randn(4))])
    found = eigenvalue(0.5 * holder[0] @ a @ holder[0], holder, 1e-6)
    assert found == pytest.approx(5.0, rel=1e-3)


def test_smallest_eigenvalue_of_a_quadratic():
    a = torch.diag(torch.tensor([1.0, -9.0, 5.0, 2.0]))
    holder = nn.ParameterList([nn.Parameter(torch.ones(4))])
    found = eigenvalue(0.5 * holder[0] @ a @ holder[0], holder, 1e-6, which="SA")
    assert found == pytest.approx(-9.0, rel=1e-3)


def test_hessian_of_some_classes(tmp_path):
    """Of all classes at once it is the whole loss's; of one it is another's."""
    probe = "study.probes.hessian.HessianEigenvalue,samples:256,smallest:true"
    keys = ("probe/hessian", "probe/hessian_smallest")
    found = []
    for number, classes in enumerate(("null", "[0,1,2,3,4,5,6,7,8,9]", "[3]")):
        given = f"+callbacks.h={{_target_:{probe},classes:{classes}}}"
        last = lines(tmp_path / str(number), *DIGITS, given)[-1]
        found.append([last[key] for key in keys])
        assert last[keys[1]] < last[keys[0]]
    assert found[0] == found[1] != found[2]


def test_accuracy_of_classes(tmp_path):
    """Of all classes it is the accuracy on the whole validation set."""
    probe = "+callbacks.c={_target_:study.probes.class_accuracy.ClassAccuracy,classes:%s}"
    everything = [*(o for o in DIGITS if "eval_samples" not in o), "trainer.eval_samples=null"]
    last = lines(tmp_path / "a", *everything, probe % "[0,1,2,3,4,5,6,7,8,9]")[-1]
    assert last["probe/accuracy_of_classes"] == pytest.approx(last["val/accuracy"], abs=1e-6)
    parts = [
        lines(tmp_path / str(i), *everything, probe % part)[-1]["probe/accuracy_of_classes"]
        for i, part in enumerate(("[0,1,2]", "[3,4,5,6,7,8,9]"))
    ]
    assert min(parts) <= last["val/accuracy"] <= max(parts)
    with pytest.raises(ValueError, match=r"^classes"):
        ClassAccuracy([])


def test_top_eigenvalue_with_parameters_held_constant():
    """Of 4·‖x‖² + 3·‖y‖² + 50·x₀y₀ with x constant it is 6."""
    holder = nn.ParameterDict({"x": torch.ones(3), "y": torch.ones(3)})
    x, y = holder["x"], holder["y"]
    loss = 4 * x.square().sum() + 3 * y.square().sum() + 50 * x[0] * y[0]
    assert eigenvalue(loss, holder, 1e-6, exclude="x$") == pytest.approx(6.0, rel=1e-3)


def test_top_eigenvalue_of_a_network():
    """Against the whole Hessian by `torch.autograd.functional` in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    shapes = [p.shape for p in model.parameters()]
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().double()

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, shapes))
        out = torch.tanh(x.double() @ w1.T + b1) @ w2.T + b2
        return nn.functional.cross_entropy(out, y)

    whole = torch.autograd.functional.hessian(loss, flat)
    expected = torch.linalg.eigvalsh(whole).max().item()
    found = eigenvalue(nn.functional.cross_entropy(model(x), y), model, 1e-6)
    assert found == pytest.approx(expected, rel=1e-3)


def test_hessian_is_recorded_at_the_end(tmp_path):
    probe = "+callbacks.h={_target_:study.probes.hessian.HessianEigenvalue,samples:32}"
    with_, without = lines(tmp_path / "a", *DIGITS, probe), lines(tmp_path / "b", *DIGITS)
    assert ["probe/hessian" in line for line in with_] == [False, False, True]
    value = with_[-1].pop("probe/hessian")
    assert value > 0
    assert with_ == without  # and leaves no other trace
    with pytest.raises(ValueError, match=r"^samples"):
        HessianEigenvalue(samples=0)


def test_live_counts_what_is_alive_at_once():
    """Two of three mebibytes at a time: the first goes before the third comes."""
    with Live() as live:
        first = torch.zeros(MIB, dtype=torch.uint8)
        second = torch.zeros(MIB, dtype=torch.uint8)
        del first
        third = torch.zeros(MIB, dtype=torch.uint8)
    assert live.peak == 2 * MIB
    del second, third


def test_step_memory_is_of_one_step(tmp_path):
    probe = "+callbacks.memory={_target_:study.probes.memory.StepMemory}"
    with_, without = lines(tmp_path / "a", *DIGITS, probe), lines(tmp_path / "b", *DIGITS)
    assert ["probe/step_memory" in line for line in with_] == [False, True, False]
    value, flops, again = (
        with_[1].pop(f"probe/{name}") for name in ("step_memory", "step_flops", "recomputed_flops")
    )
    assert (flops > 0, again) == (True, 0)
    # At least the 32 × 64 pixels' hidden layers, at most a few times all there is.
    assert 32 * 8 * 4 / MIB < value < 1
    assert with_ == without
    assert not hasattr(StepMemory(), "state_dict")


def test_activation_variance_of_known_layers(tmp_path):
    """A feed-forward that triples has nine times its input's variance."""
    run = assemble(compose([*CODE, f"outputs={tmp_path}"]))
    run.batch = move(run.batches[0][0], run.device)

    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    run.model.transformer.blocks[0].ffn = Triple()
    seen = []
    run.model.transformer.blocks[0].ffn_norm.register_forward_hook(
        lambda layer, inputs, output: seen.append(output.double().var().item())
    )
    probe = ActivationVariance("ffn")
    probe.on_fit_start(run)
    probe.on_batch(run)
    assert run.recorded["probe/variance_ratio/0"] == pytest.approx(9, rel=1e-5)
    assert run.recorded["probe/activation_variance/0"] == pytest.approx(9 * seen[0], rel=1e-5)
    run.step, run.recorded = 1, {}
    probe.on_batch(run)
    assert run.recorded == {}
    with pytest.raises(ValueError, match=r"^layers: the model has no layer"):
        ActivationVariance("ff").on_fit_start(run)


def test_recitation_of_what_was_learnt_by_heart(tmp_path):
    probe = "+callbacks.r={_target_:study.probes.recitation.Recitation,prefix:8,length:16}"
    few, many = (
        lines(tmp_path / n, *CODE, probe, f"trainer.max_steps={n}", "optimizer.lr=1e-2")[-1]
        for n in ("1", "200")
    )
    assert few["probe/recited"] == 0
    assert few["probe/recited_tokens"] < 0.2
    assert many["probe/recited"] == many["probe/recited_tokens"] == 1.0


def test_recitation_refuses():
    with pytest.raises(ValueError, match=r"^prefix"):
        Recitation(prefix=0)
