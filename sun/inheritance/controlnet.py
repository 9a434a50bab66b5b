"""ControlNet's residuals in an inherit step, for hosts that hand them to the U-Net as lists (ComfyUI, Forge)."""

from __future__ import annotations

from typing import Any

from .places import Places
from .plan import Plan
from .roles import skipped_outputs


def control_of_what_runs(control: Any, plan: Plan, places: Places) -> Any:
    """Residuals by name without those of the parts left out: hosts add them in place, and those have no room.

    Lists are taken from the end: by the input blocks from the first, by the output blocks from the first.
    """
    ran, left_out = skipped_outputs(plan, places)
    if not control or not left_out:
        return control
    control = {name: list(values) for name, values in control.items()}
    if "middle" in control:
        control["middle"] = [None] * len(control["middle"])
    if "output" in control:
        keep = max(len(control["output"]) - left_out, 0)
        control["output"] = control["output"][:keep] + [None] * (len(control["output"]) - keep)
    if "input" in control:
        drop = max(len(control["input"]) - ran, 0)
        control["input"] = [None] * drop + control["input"][drop:]
    return control
