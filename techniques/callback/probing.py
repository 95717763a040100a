"""A forward pass that leaves no trace, for callbacks that watch layers."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from training.run import Run


def forward(run: "Run") -> None:
    """Run the model on the last micro-batch in evaluation mode; hooks on its layers see it.

    Neither the random state nor any layer's state changes. It runs uncompiled: what a hook does
    would otherwise be compiled anew each time.
    """
    devices = [run.device] if run.device.type == "cuda" else []
    training = run.model.training
    run.model.eval()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            run.accelerator.autocast(),
        ):
            outputs = run.objective.predict(run.batch)
            if "hidden" in outputs:
                outputs["logits"]  # made on first use: the classifier runs now
    finally:
        run.model.train(training)
