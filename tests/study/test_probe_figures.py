import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from study import plots, probe_figures
from study.analyses import landscape
from study.probes import moving
from tests.cli.invoke import invoke

AXIS = np.linspace(-1, 1, 5)


def keep(folder, name, **arrays):
    """A run's row with these arrays, as its probe keeps them."""
    folder.mkdir(exist_ok=True)
    run = SimpleNamespace(main=True, folder=folder)
    moving.keep(run, name, plots.figure(1, 1), **arrays)  # type: ignore[arg-type]
    return {"arm": folder.name, "seed": 0, "run_dir": str(folder), "metrics": {"step": 1}}


def test_arrays_come_back(tmp_path):
    keep(tmp_path / "a", "line", axis=AXIS, seconds=1.5)
    found = moving.kept(tmp_path / "a", "line")
    assert found is not None
    assert found["axis"].tolist() == AXIS.tolist()
    assert found["seconds"] == 1.5
    assert moving.kept(tmp_path / "a", "plane") is None


def test_lines_are_of_every_arm(tmp_path):
    table = [
        keep(tmp_path / name, "landscape", axis=AXIS, losses=scale * AXIS[None] ** 2 + [[1.0]])
        for name, scale in (("flat", 1.0), ("sharp", 3.0))
    ]
    (axes,) = probe_figures.landscape(table).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}  # type: ignore[call-overload]
    assert drawn["flat"] == pytest.approx(AXIS**2 + 1)
    assert drawn["sharp"] == pytest.approx(3 * AXIS**2 + 1)
    (axes,) = probe_figures.landscape(table, arms=["sharp"]).axes
    assert len(axes.lines) == 1


def test_planes_have_one_scale(tmp_path):
    plane = AXIS[None, :, None] ** 2 + AXIS[None, None, :] ** 2 + 1
    table = [
        keep(tmp_path / name, "landscape", axis=AXIS, losses=scale * plane)
        for name, scale in (("a", 1.0), ("b", 2.0), ("c", 40.0), ("d", 1.0))
    ]
    drawn = probe_figures.landscape(table)
    titled = [axes.get_title() for axes in drawn.axes if axes.get_visible()]
    assert [title for title in titled if title] == ["a", "b", "c", "d"]
    images = [axes.collections[0] for axes in drawn.axes if axes.get_title()]
    assert not any(isinstance(image, QuadMesh) for image in images)
    assert {image.get_clim() for image in images} == {(1.0, 120.0)}


def test_own_figures_are_of_what_there_is(tmp_path):
    row = keep(tmp_path / "a", "landscape", axis=AXIS, losses=AXIS[None] ** 2 + 1)
    assert [caption for caption, _ in probe_figures.own([row])] == ["Loss landscape"]
    keep(tmp_path / "a", "spectrum", grid=AXIS, density=np.ones(5))
    keep(tmp_path / "a", "connectivity", losses=np.ones(5), aligned_losses=np.ones(5))
    assert len(probe_figures.own([row])) == 3
    with pytest.raises(ValueError, match=r"probes/raw\.npz"):
        probe_figures.landscape([row], name="raw")


def test_layers_are_averaged():
    lines = [{"step": 1, "m/a": 1.0, "m/b": 3.0, "m": 9.0}, {"step": 2, "m/a": None, "m/b": 5.0}]
    (axes,) = probe_figures.layers_over_steps([{"arm": "a", "lines": lines}], metric="m").axes
    assert list(axes.lines[0].get_ydata()) == [2.0, 5.0]  # type: ignore[call-overload]


def test_noise_scale_beside_the_fit(tmp_path):
    """Steps of S = 40 + 800/B exactly: the critical batch size is 20."""
    table = [
        {
            "config": {"trainer": {"batch_size": batch, "max_steps": 1000}},
            "metrics": {"step": 40 + 800 / batch},
            "lines": [{"step": 1, "probe/noise_scale": 7.0 * batch}],
        }
        for batch in (8, 32, 128)
    ]
    front, scale = probe_figures.noise_scale(table).axes
    dotted = scale.lines[-1].get_ydata()
    assert list(dotted) == pytest.approx([20, 20], rel=1e-3)  # type: ignore[call-overload]
    assert len(front.lines) == len(scale.lines) == 4
    with pytest.raises(ValueError, match="three"):
        probe_figures.noise_scale(table[:2])


def test_flatter_end(tmp_path):
    """Next to the run the loss rises by 0, 4 and 8, next to the other by 0, 1 and 2."""
    losses = np.array([1.0, 5.0, 9.0, 9.0, 9.0, 9.0, 4.0, 3.0, 2.0])
    row = keep(tmp_path / "a", "connectivity", losses=losses)
    assert landscape.flatter([row]) == {"a": {0: pytest.approx(4 - 1)}}
    (tmp_path / "b").mkdir()
    other = {**row, "arm": "b", "run_dir": str(tmp_path / "b")}
    assert landscape.flatter([row, other]) == {"a": {0: pytest.approx(3)}}
    with pytest.raises(ValueError, match="Connectivity"):
        landscape.flatter([other])


def test_report_of_a_run_shows_what_it_has_kept(tmp_path):
    folder = tmp_path / "outputs"
    given = ("task=digits", "tracker=none", "trainer.device=cpu", "trainer.max_steps=1")
    point = "callbacks.filter_normalized_landscape."
    given += ("technique=filter_normalized_landscape", f"{point}points=3", f"{point}samples=8")
    made = invoke("run", *given, "model.width=8", f"outputs={folder}", "--quiet", "--json")
    run_dir = json.loads(made.out.splitlines()[-1])["run_dir"]
    page = tmp_path / "page.html"
    assert invoke("report", run_dir, "--to", str(page)).code == 0
    assert "Loss landscape" in page.read_text()
