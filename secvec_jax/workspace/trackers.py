"""Log per-step metrics: always to metrics.jsonl and TensorBoard, and to Weights & Biases on request.

tensorboard --logdir runs
WANDB_PROJECT=mine python train.py ...       # needs the extra `wandb`; WANDB_MODE=offline keeps it on this machine
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError


class Tracker:
    """Metrics logger for one stage of the run in `folder`; files are created at the first step."""

    def __init__(self, folder: Path, stage: str):
        self._folder, self._stage = folder, stage
        self._board: Any = None
        self._biases: Any = None

    def log(self, step: int, metrics: dict[str, float], pace: dict[str, float]) -> None:
        """Log a step's metrics and speed. Raises UserError if WANDB_PROJECT is set and wandb is not installed."""
        if self._board is None:
            self._open(step)
        numbers = metrics | pace
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": self._stage, "step": step} | numbers) + "\n")
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._biases is not None:
            self._biases.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close all logs."""
        if self._board is not None:
            self._board.close()
        if self._biases is not None:
            self._biases.finish()

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        board = self._folder / "tensorboard" / self._stage.replace("/", "-").replace(" ", "-")
        # Steps that a resumed run repeats replace the earlier ones.
        self._board = SummaryWriter(str(board), purge_step=step, write_to_disk=True)
        project = os.environ.get("WANDB_PROJECT")
        if not project:
            return
        if importlib.util.find_spec("wandb") is None:
            raise UserError("WANDB_PROJECT is set, but wandb is not installed: pip install wandb, or unset it")
        import wandb

        name = f"{self._folder.name}/{self._stage}"
        identity = hashlib.sha256(str(board.resolve()).encode()).hexdigest()[:16]
        self._biases = wandb.init(
            project=project,
            dir=str(self._folder),
            name=name,
            group=self._folder.name,
            id=identity,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
