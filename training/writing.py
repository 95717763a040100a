"""What `assay sample` does: a run's language model continues a text."""

from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from training.components import component
from training.configs import CONF, Config, options
from training.errors import UsageError, nearest
from training.sampling import continued
from training.trained import trained

DEFAULT = "sample"


def decoder(config: Config, name: str | None, settings: list[str]) -> tuple[str, Config]:
    """The name and the configuration of how tokens are chosen.

    Args:
        config: of the run, whose own `decode` it is unless there is a name.
        name: of a file in `conf/decode/`.
        settings: its keys to change, as `key=value`.

    Raises:
        UsageError: for an unknown name, or a setting that is not `key=value`.
    """
    known = options("decode")
    if name is not None and name not in known:
        raise UsageError(f"--decode: no '{name}'{nearest(name, known)}")
    own = None if name else config.get("decode")  # none in a run of before there was one
    node = own or yaml.safe_load((CONF / "decode" / f"{name or DEFAULT}.yaml").read_text())
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals or key not in node:
            keys = [key for key in node if key != "_target_"]
            raise UsageError(f"'{setting}': expected key=value, with a key of {', '.join(keys)}")
    changed = OmegaConf.merge(node, OmegaConf.from_dotlist(settings))
    return name or str(node["_target_"]).rpartition(".")[2], OmegaConf.to_container(changed)  # type: ignore[return-value]


def write(
    folder: Path,
    config: Config,
    decode: Config,
    prompt: str,
    tokens: int,
    count: int,
    seed: int,
    which: str,
) -> dict[str, Any]:
    """`texts` that continue a prompt, and the `step` of the checkpoint that wrote them.

    Args:
        folder, config: of the run.
        decode: the component that chooses tokens.
        prompt: what is continued, at least one token.
        tokens: to write.
        count: texts.
        seed: of the random numbers.
        which: `"best"` or `"last"` checkpoint.

    Raises:
        UsageError: for a run that is no causal language model's, or an empty prompt.
    """
    chooses = component(decode, "decode")
    if config["task"].get("objective") != "causal":
        raise UsageError(f"{folder}: task '{config['choices']['task']}' has no text to continue")
    run, step = trained(folder, config, which)
    start = run.task.tokenizer.encode([prompt])[0].astype("int64")
    if not len(start):
        raise UsageError("--prompt: needs at least one token")
    run.objective.eval()
    written = continued(
        run.objective.predict,
        torch.from_numpy(start).repeat(count, 1).to(run.device),
        tokens,
        torch.Generator().manual_seed(seed),
        chooses,
        run.task.dims["context_length"],
    )
    texts = [run.task.tokenizer.decode(row.tolist()) for row in written[:, len(start) :]]
    return {"texts": texts, "step": step}
