"""`assay sample`."""

from pathlib import Path
from typing import Annotated

import typer

from cli import complete
from cli.export import Which
from cli.output import Json, Trust, console, distrust, print_json


def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Keys of what decodes, as key=value.", show_default=False),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            help="How the next token is chosen, a name of conf/decode; default: the run's own.",
            autocompletion=complete.decode,
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 200,
    count: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    checkpoint: Annotated[Which, typer.Option(help="Which checkpoint.")] = Which.best,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Let a run's language model continue a text."""
    from training.folder import read_config
    from training.writing import decoder, write

    distrust(trust, True)
    config = read_config(run)
    name, node = decoder(config, decode, settings or [])
    written = write(run, config, node, prompt, tokens, count, seed, checkpoint.value)
    if json:
        print_json({"decode": name, "prompt": prompt, **written})
        return
    out = console()
    for number, text in enumerate(written["texts"]):
        if count > 1:
            out.rule(f"{number + 1}")
        out.print(prompt, style="dim", end="", highlight=False, markup=False, soft_wrap=True)
        out.print(text, highlight=False, markup=False, soft_wrap=True)
