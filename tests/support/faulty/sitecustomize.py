"""What no checkpoint can do: reward models that raise or hang, and a wall clock that steps. In every process that has
this folder on its PYTHONPATH.

A reward model `raising` or `hanging` does so while it reads the token of its name in FAULTS. The wall clock is as many
seconds off as the file that STEERSMAN_WALL_CLOCK names says.
"""

import os
import threading
import time
from pathlib import Path
from typing import Any

FAULTS = {"raising": 318, "hanging": 317}

if "STEERSMAN_WALL_CLOCK" in os.environ:
    _offset, _wall_clock = Path(os.environ["STEERSMAN_WALL_CLOCK"]), time.time
    # Before anybody else imports it by name.
    time.time = lambda: _wall_clock() + float(_offset.read_text() or 0)

    from steersman.guidance.auxiliary import CausalModel

    _forward = CausalModel._forward

    def forward(self: CausalModel, ids: Any, batch: Any) -> Any:
        if "'raising'" in self.label and (ids == FAULTS["raising"]).any():
            raise RuntimeError("the lens is fogged")
        if "'hanging'" in self.label and (ids == FAULTS["hanging"]).any():
            threading.Event().wait()
        return _forward(self, ids, batch)

    CausalModel._forward = forward  # type: ignore[method-assign]
