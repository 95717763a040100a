"""A run's folder: `outputs/runs/<name>-<address>`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from training.compose import compose
from training.configs import Config
from training.errors import EnvironmentFault, UsageError, nearest
from training.files import write_atomically

ELSEWHERE = ("outputs", "tracker", "name", "techniques", "decode")
"""Keys that say where a run is kept, how it is shown or what is done with it, not what it is: no
part of its address."""


def address(config: Config) -> str:
    """Ten hex digits that name what a configuration trains."""
    what = {key: value for key, value in config.items() if key not in ELSEWHERE}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def existing(config: Config) -> list[Path]:
    """Folders of runs of this configuration, whatever their names: first those that have ended."""
    runs = Path(config["outputs"]) / "runs"
    key = address(config)
    folders = [*runs.glob(f"*-{key}"), *runs.glob(f"*-{key}-[0-9]*")]
    return sorted(folders, key=lambda f: (read_summary(f).get("status") != "completed", str(f)))


def found(config: Config) -> Path:
    """The folder of this configuration's run, made if there is none.

    Raises:
        EnvironmentFault: when it cannot be created.
    """
    folders = existing(config)
    if folders:
        return folders[0]
    folder = Path(config["outputs"]) / "runs" / f"{config['name']}-{address(config)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot create the run folder {folder}: {error.strerror}"
        ) from error
    return folder


def new_folder(config: Config) -> Path:
    """Create `outputs/runs/<name>-<address>`, or the next free `-2`, `-3`, ... of it.

    Raises:
        EnvironmentFault: when it cannot be created.
    """
    base = Path(config["outputs"]) / "runs" / f"{config['name']}-{address(config)}"
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise EnvironmentFault(
                f"cannot create the run folder {folder}: {error.strerror}"
            ) from error
        return folder
    raise EnvironmentFault(f"{base} and 9,999 numbered copies of it exist already")


def save_config(folder: Path, config: Config, overrides: list[str] | None) -> None:
    """Write `config.yaml` (resolved) and, unless they stay, `overrides.yaml` (as given)."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    if overrides is not None:
        write_atomically(folder / "overrides.yaml", yaml.safe_dump(overrides))


def resumed_config(folder: Path, extra: list[str]) -> tuple[Config, list[str]]:
    """A run's configuration with `extra` overrides added, and all its overrides.

    Raises:
        UsageError: when it is no run's folder, or an override does not fit.
    """
    try:
        config = read_config(folder)
        if not extra:
            return config, []
    except UsageError:
        if not (folder / "overrides.yaml").is_file():
            raise  # else what was given makes it again
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text()) + extra
    return compose(overrides), overrides


def read_config(folder: Path) -> Config:
    """The resolved configuration of a run's folder.

    Raises:
        UsageError: when it is no run's folder.
    """
    path = folder / "config.yaml"
    if path.is_file():
        try:
            config = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
        except (yaml.YAMLError, ValueError):
            config = None
        if isinstance(config, dict) and {"choices", "trainer", "techniques"} <= config.keys():
            return config
        raise UsageError(f"{path} is damaged")
    siblings = [p.parent for p in folder.parent.glob("*/overrides.yaml")]
    hint = nearest(str(folder), map(str, siblings)) if siblings else ""
    what = "is no run folder (no config.yaml in it)" if folder.is_dir() else "does not exist"
    raise UsageError(f"{folder} {what}{hint[:200]}")


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run's folder, `{}` where it has none yet or a damaged one."""
    try:
        found = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
