import json
from dataclasses import replace
from pathlib import Path

import pytest

from study import reproduce
from study.recipe import Term, Tuning, names, read
from study.record import PAGE, RESULTS, page
from training.configs import options
from training.errors import UsageError
from training.folder import address

WHOLE = """\
paper: "1234.56789"
base: [task=digits, model=mlp]
arms:
  plain: []
  new: [technique=golu]
  tuned: {from: plain, overrides: [optimizer.lr=1e-4]}
tune:
  grid: {optimizer.lr: [1e-3, 1e-2]}
  seeds: [7]
seeds: [0, 1]
metric: val/accuracy
direction: higher
analyses:
  fit: {_target_: study.analyses.scaling.fit, held_out: plain}
claims:
  - new > plain
  - new > plain by 0.01
  - val/loss(new) < val/loss(plain)
  - fit.r2 > 0.95
profiles:
  paper: {seeds: [0, 1, 2]}
"""


def write(tmp_path, text):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return str(path)


def test_a_whole_recipe(tmp_path):
    recipe = read(write(tmp_path, WHOLE))
    assert list(recipe.arms) == ["plain", "new", "tuned"]
    assert recipe.arms["tuned"].runs == {"trainer.start_from": "plain"}
    assert recipe.tuning.grid == {"optimizer.lr": ["1e-3", "1e-2"]}
    first, margin, named, analysis = recipe.claims
    assert (first.left, first.below) == (Term(metric="val/accuracy", arm="new"), False)
    assert margin.margin == 0.01
    assert named.right == Term(metric="val/loss", arm="plain")
    assert analysis.left == Term(analysis="fit", key="r2")
    assert analysis.right == Term(number=0.95)
    assert read(write(tmp_path, WHOLE), "paper").seeds == (0, 1, 2)


def test_a_teacher_is_an_arms_run_of_the_same_seed(tmp_path):
    given = "{from: plain, teacher: tuned, overrides: [technique=nkd_uskd]}"
    text = WHOLE.replace("[technique=golu]", given)
    text = "".join(line for line in text.splitlines(True) if "tune:" not in line)
    text = text.replace("  grid: {optimizer.lr: [1e-3, 1e-2]}\n  seeds: [7]\n", "")
    study = reproduce.plan(read(write(tmp_path, text)), (0, 1), str(tmp_path))
    runs = {(trial.arm, trial.seed): trial for trial in study.trials}
    for seed in (0, 1):
        student, teacher = runs["new", seed].config, runs["tuned", seed]
        assert Path(student["callbacks"]["teacher"]["of"]).name.endswith(address(teacher.config))
        assert address(runs["plain", seed].config) in student["trainer"]["start_from"]
    levels = [sorted(arms) for arms in reproduce._levels(study.recipe)]
    assert levels == [["plain"], ["tuned"], ["new"]]


def test_an_arm_is_told_the_folders_of_other_arms_runs(tmp_path):
    given = "{runs: {+post.one.of: plain, +post.all.of: [plain, tuned]}, overrides: [{}]}"
    given = given.replace("[{}]", "['+post={one: {_target_: a}, all: {_target_: a}}']")
    text = WHOLE.replace("[technique=golu]", given).partition("tune:")
    text = text[0] + "seeds:" + text[2].partition("\nseeds:")[2]
    study = reproduce.plan(read(write(tmp_path, text)), (0, 1), str(tmp_path))
    runs = {(trial.arm, trial.seed): trial for trial in study.trials}
    for seed in (0, 1):
        post = runs["new", seed].config["post"]
        plain, tuned = (address(runs[arm, seed].config) for arm in ("plain", "tuned"))
        assert Path(post["one"]["of"]).name.endswith(plain)
        assert [Path(of).name[-len(tuned) :] for of in post["all"]["of"]] == [plain, tuned]


def test_a_ratio_is_of_two_arms(tmp_path):
    text = (
        'paper: "1"\narms: {a: [], b: [seed=1]}\nseeds: [0, 1]\nclaims: ["ratio(seconds) < 0.5"]\n'
    )
    claim = read(write(tmp_path, text)).claims[0]
    assert claim.left == Term(metric="seconds")
    with pytest.raises(UsageError, match="exactly two arms"):
        read(write(tmp_path, text.replace("{a: []", "{c: [], a: []")))


@pytest.mark.parametrize("name", names())
def test_every_recipe_of_the_repository_reads(name):
    recipe = read(name)
    assert len(recipe.seeds) >= 5
    assert "paper" in (recipe.path.read_text().partition("profiles:")[2])


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seeds: [0, 1]\n", "sedes: [0, 1]\n", 10, "no key 'sedes'; did you mean 'seeds'"),
        ("new > plain\n", "new > palin\n", 16, "no arm 'palin'; did you mean 'plain'"),
        ("new > plain\n", "new >> plain\n", 16, "'> plain' is not understood"),
        ("new > plain\n", "new plain\n", 16, "expected `left < right`"),
        ("by 0.01", "by much", 17, "'much' is no number"),
        ("fit.r2", "fti.r2", 19, "no analysis 'fti'; did you mean 'fit'"),
        ("from: plain", "from: tuned", 6, "stages go in a circle: tuned -> tuned"),
        ("from: plain", "from: other", 6, "no arm 'other'"),
        ("from: plain", "form: plain", 6, "did you mean 'from'"),
        ("from: plain", "teacher: tuned", 6, "stages go in a circle: tuned -> tuned"),
        ("from: plain", "runs: {post.a.of: [plan]}", 6, "post.a.of: no arm 'plan'; did you mean"),
        ("from: plain", "runs: [plain]", 6, "expected arms by configuration key"),
        ("from: plain", "teacher: plan", 6, "teacher: no arm 'plan'; did you mean 'plain'"),
        ("  new: [technique=golu]", "  new: [golu]", 5, "expected a list of key=value"),
        ("direction: higher", "direction: up", 12, "lower or higher, not 'up'"),
        ("seeds: [7]", "seeds: [1]", 7, "must not be those of the evaluation"),
        ("seeds: [0, 1]\n", "seeds: [0, 0]\n", 10, "expected different whole numbers"),
        ("seeds: [0, 1]\n", "seeds: []\n", 1, "'seeds' is missing"),
        ("metric: val/accuracy", "metric: [", 13, ""),
        ("{seeds: [0, 1, 2]}", "{seed: [0]}", 21, "no key 'seed'"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, old, new, line, message):
    assert old in WHOLE
    with pytest.raises(UsageError) as raised:
        read(write(tmp_path, WHOLE.replace(old, new)), "paper" if line == 21 else "small")
    text = str(raised.value)
    assert "\n" not in text
    assert message in text
    assert f"some.yaml:{line}: " in text


def test_the_page_of_results_is_current():
    assert PAGE.read_text() == page()


def test_unknown_names():
    with pytest.raises(UsageError, match="did you mean 'golu'"):
        read("goul")
    with pytest.raises(UsageError, match="--profile: no 'papre'; did you mean 'paper'"):
        read("golu", "papre")


@pytest.mark.parametrize("name", names())
def test_every_recipe_plans_its_runs(name, tmp_path):
    """Small and paper scale: all overrides compose, arms are different, claims have five seeds."""
    for profile in ("small", "paper"):
        recipe = read(name, profile)
        grid = {key: values[:1] for key, values in recipe.tuning.grid.items()}
        one = replace(recipe, tuning=Tuning(grid, recipe.tuning.seeds[:1]))
        study = reproduce.plan(one, recipe.seeds[:1], str(tmp_path))
        trials = study.tuning or study.trials
        assert len({address(trial.config) for trial in trials}) == len(trials)
        assert recipe.reported
    small = read(name)
    assert len(small.seeds) >= 5
    assert small.claims


def test_every_technique_has_a_recipe_with_a_verdict():
    assert set(options("technique")) <= set(names())
    recorded = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert set(recorded) == set(names())
    for name, result in recorded.items():
        assert [claim["claim"] for claim in result["claims"]] == [c.text for c in read(name).claims]
        assert all(run["metrics"] for run in result["runs"])
        assert len({run["seed"] for run in result["runs"]}) >= 5
