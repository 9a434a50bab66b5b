"""What LTC-Accel cannot do, said in a sentence."""

from __future__ import annotations


class LtcError(ValueError):
    """A sampler, table or setting that LTC-Accel cannot work with; the message says what to use instead."""


SUPPORTED = "Euler, DDIM with eta 0, DPM-Solver++ 2M, Heun, DPM2 and flow-matching Euler"


def noise_added(sampler: str) -> LtcError:
    """The refusal of ancestral and SDE samplers."""
    return LtcError(
        f"LTC-Accel does not work with {sampler}: it adds fresh noise at every step, which cannot be told from the "
        f"direction that LTC-Accel carries on. Use {SUPPORTED}."
    )


def unknown_sampler(sampler: str) -> LtcError:
    """The refusal of samplers whose steps are not known here."""
    return LtcError(f"LTC-Accel does not know the sampler {sampler}. Use {SUPPORTED}.")
