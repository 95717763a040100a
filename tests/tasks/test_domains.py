import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.domains import Domains
from tasks.fetch import fetch
from training.assemble import assemble
from training.compose import compose
from training.errors import UsageError
from training.evaluate import evaluate


@pytest.fixture
def corpora(tmp_path):
    """Two folders of files, and one file."""
    for name, word, files in (("a", "alpha beta\n", 40), ("b", "0123456789\n", 20)):
        for number in range(files):
            path = tmp_path / name / f"{number}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(word * 30)
    (tmp_path / "c.txt").write_text("gamma\n" * 400)
    return [str(tmp_path / "a"), {"digits": str(tmp_path / "b")}, str(tmp_path / "c.txt")]


def batch(task, split, indices):
    rows = fetch(getattr(task, split), indices)
    return task.prepare(rows, torch.Generator().manual_seed(0), False)


def test_windows_are_of_their_domain(corpora):
    task = Domains(domains=corpora, context_length=16)
    assert task.domains == ["a", "digits", "c"]
    assert task.dims == {"vocab_size": 256, "context_length": 16}
    for split in ("train", "validation"):
        found = batch(task, split, range(len(getattr(task, split))))
        for ids, domain in zip(found["input_ids"].tolist(), found["domain"].tolist()):
            text = bytes(ids).decode().strip("\n")
            letters = ("alph bet\n", "0123456789\n", "gam\n")[domain]
            assert set(text) <= set(letters)
        assert set(found["domain"].tolist()) == {0, 1, 2}


def test_one_tokenizer_is_trained_on_all(corpora):
    task = Domains(domains=corpora, context_length=8, tokenizer="bpe", vocab_size=300)
    for text in ("alpha beta\n", "0123456789\n", "gamma\n"):
        (ids,) = task.tokenizer.encode([text])
        assert len(ids) < len(text) / 2
        assert task.tokenizer.decode(ids.tolist()) == text
    assert task.bytes_per_token > 2


def test_losses_of_domains_are_means_over_their_labels(corpora):
    """Against torch's cross-entropy of each domain's windows by themselves."""
    task = Domains(domains=corpora, context_length=16)
    rows, expected = [], {}
    logits = torch.randn(len(task.validation), 16, 256, dtype=torch.float64)
    everything = batch(task, "validation", range(len(task.validation)))
    everything["labels"][:, 3] = -100
    for indices in torch.arange(len(task.validation)).split(7):
        part = {name: value[indices] for name, value in everything.items()}
        rows.append(task.collect({"logits": logits[indices]}, part))
    joined = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    for number, name in enumerate(task.domains):
        own = everything["domain"] == number
        found = F.cross_entropy(logits[own].flatten(0, 1), everything["labels"][own].flatten())
        expected[f"loss_{name}"] = float(found)
    assert task.summarise(joined) == pytest.approx(expected, rel=1e-12)
    one = {name: value[:1] for name, value in joined.items()}
    assert np.isnan(list(task.summarise(one).values())).sum() == 2


@pytest.mark.parametrize("model", ["gpt", "encoder"])
def test_a_run_has_the_losses_beside_the_whole(corpora, model):
    written = f"[{corpora[0]},{{digits:{corpora[1]['digits']}}},{corpora[2]}]"
    overrides = [
        *("task=domains", f"task.domains={written}", "task.context_length=16", f"model={model}"),
        *("model.width=16", "model.depth=1", "model.heads=2", "trainer.device=cpu"),
        *("tracker=none", "trainer.monitor=val/loss_digits"),
    ]
    run = assemble(compose(overrides))
    found = evaluate(run)
    task = run.task
    if model == "gpt":  # of as many labels in each window
        sizes = np.bincount(task.validation["domain"][:])
        means = [found[f"val/loss_{name}"] for name in task.domains]
        assert found["val/loss"] == pytest.approx(np.average(means, weights=sizes), rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(np.exp(found["val/loss"]))


def test_training_may_see_some_alone(corpora):
    whole = Domains(domains=corpora, context_length=16)
    task = Domains(domains=corpora, train=["c", "digits"], context_length=16)
    found = fetch(task.train, range(len(task.train)))
    assert found["domain"].unique_consecutive().tolist() == [2, 1]
    expected = fetch(whole.train, [i for i, d in enumerate(whole.train["domain"][:]) if d == 2])
    assert found["tokens"][found["domain"] == 2].equal(expected["tokens"])
    assert len(task.validation) == len(whole.validation)
    with pytest.raises(UsageError, match=r"task\.train: no domain 'digit'; did you mean 'digits'"):
        Domains(domains=corpora, train=["digit"], context_length=16)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([], "needs at least one"),
        (["json", {"json": "email"}], "'json' is named twice"),
        (["jsonn"], "no file or folder 'jsonn'"),
    ],
)
def test_refuses_bad_domains(domains, message):
    with pytest.raises(UsageError, match=rf"task\.domains: .*{message}|task\.domains: {message}"):
        Domains(domains=domains)
