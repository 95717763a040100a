import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from study.space import dumped, grid, loaded, split, written
from training.errors import UsageError


def test_hydras_grammar():
    fixed, space = split(
        [
            *("task=digits", "optimizer.lr=1e-4,3e-4", "model.activation=choice(a,b)"),
            *("model.depth=range(1,9,2)", "x=interval(0,1)", "y=int(interval(32,128))"),
            "z=tag(log,interval(1e-4,1e-2))",
        ]
    )
    assert fixed == ["task=digits"]
    assert space == {
        "optimizer.lr": CategoricalDistribution(["0.0001", "0.0003"]),
        "model.activation": CategoricalDistribution(["a", "b"]),
        "model.depth": IntDistribution(1, 7, step=2),
        "x": FloatDistribution(0.0, 1.0),
        "y": IntDistribution(32, 128),
        "z": FloatDistribution(1e-4, 1e-2, log=True),
    }
    assert loaded(dumped(space)) == space


def test_lists_are_choices_too():
    _, space = split(["technique=[golu,mish],[golu]"])
    assert [written(point) for point in grid(space)] == [
        ["technique=[golu,mish]"],
        ["technique=[golu]"],
    ]


def test_grid_is_the_product_in_order():
    _, space = split(["a=1,2", "b=range(0,4,2)"])
    assert grid(space) == [
        {"a": "1", "b": 0},
        {"a": "1", "b": 2},
        {"a": "2", "b": 0},
        {"a": "2", "b": 2},
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=1"], "nothing to sweep"),
        (["a=1,2", "b"], "'b' is not understood"),
        (["a=interval(2,1)"], "'a=interval(2,1)'"),
        (["a=tag(log,interval(0,1))"], "'a=tag(log,interval(0,1))'"),
        (["a=range(5,1)"], "'a=range(5,1)'"),
    ],
)
def test_mistakes(overrides, message):
    with pytest.raises(UsageError) as raised:
        split(overrides)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_interval_has_no_grid():
    with pytest.raises(UsageError, match="x is an interval"):
        grid(split(["x=interval(0,1)"])[1])
