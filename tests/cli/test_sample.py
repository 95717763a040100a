"""`assay sample` on a run trained here."""

import json

import pytest

from tests.cli.invoke import invoke

SMALL = (
    *("tracker=none", "trainer.device=cpu", "model.width=16", "model.depth=1", "model.heads=1"),
    *("task.path=tasks", "task.context_length=32", "trainer.max_steps=2", "trainer.eval_samples=4"),
)


def folder_of(outputs, *overrides):
    result = invoke("run", *SMALL, *overrides, f"outputs={outputs}", "--quiet", "--json")
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])["run_dir"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("run"))


def written(run, *arguments):
    result = invoke("sample", run, "--tokens", "40", "--json", *arguments)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_seed_is_a_text(run):
    first, again = written(run, "--prompt", "def "), written(run, "--prompt", "def ")
    assert first == again
    assert first["texts"][0] != written(run, "--prompt", "def ", "--seed", "1")["texts"][0]
    assert (first["step"], first["decode"]) == (2, "TemperatureLogitsWarper")
    # 40 bytes, more than the model sees at once; those that are no character are shown as one.
    assert 20 <= len(first["texts"][0]) <= 40


def test_greedy_text_does_not_depend_on_the_seed(run):
    texts = {written(run, "--decode", "greedy", "--seed", s)["texts"][0] for s in "012"}
    assert len(texts) == 1
    few = written(run, "--decode", "top_k", "top_k=1", "--count", "2")
    assert set(few["texts"]) == texts


def test_a_run_keeps_how_it_is_sampled_from(tmp_path):
    run = folder_of(tmp_path, "technique=typical_sampling", "decode.mass=1e-9")
    own = written(run)
    assert own["decode"] == "TypicalSampling"
    assert own["texts"] == written(run, "--seed", "7")["texts"]  # one token is left
    assert own["texts"] != written(run, "--decode", "sample")["texts"]


def test_shown_for_people(run):
    result = invoke("sample", run, "--count", "2", "--tokens", "5", "--prompt", "import ")
    assert result.code == 0
    assert result.out.count("import ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "typical"], "--decode: no 'typical'; did you mean 'typical_sampling'?"),
        (["--decode", "top_p", "top_k=3"], "'top_k=3': expected key=value, with a key of top_p"),
        (["--decode", "top_p", "top_p=3"], "decode: `top_p` has to be a float > 0 and < 1"),
        (["--prompt", ""], "--prompt: needs at least one token"),
    ],
)
def test_mistakes(run, arguments, message):
    result = invoke("sample", run, *arguments)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_runs_without_text(tmp_path):
    result = invoke("sample", str(tmp_path))
    assert result.code == 2
    digits = ("task=digits", "tracker=none", "trainer.max_steps=1", "trainer.device=cpu")
    result = invoke("run", *digits, f"outputs={tmp_path}", "--quiet", "--json")
    run = json.loads(result.out.splitlines()[-1])["run_dir"]
    result = invoke("sample", run)
    assert result.code == 2
    assert "task 'digits' has no text to continue" in result.err
