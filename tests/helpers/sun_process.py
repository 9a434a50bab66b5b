"""One process of a SUN training run, for tests: ``torchrun ... sun_process.py SETTINGS.json [STEP_TO_DIE_AT]``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from sun.common.settings import apply
from sun.training import run as run_module
from sun.training import sun as sun_module


def main() -> None:
    torch.set_num_threads(1)
    config = apply(sun_module.SunTrainConfig(), json.loads(Path(sys.argv[1]).read_text()))
    dies_at = int(sys.argv[2]) if len(sys.argv) > 2 else -1
    update = run_module.TrainingRun.update

    def mortal(self: run_module.TrainingRun, *args: torch.Tensor, **named: torch.Tensor) -> None:
        if self.progress.step == dies_at and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, *args, **named)

    run_module.TrainingRun.update = mortal  # type: ignore[method-assign]
    sun_module.sample_grid = lambda *_: None
    sun_module.train_sun(config)


if __name__ == "__main__":
    main()
