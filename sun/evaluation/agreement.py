"""Do pictures show what was asked for? Shares of right pictures, by method and by guidance scale.

A method can be near a reference that is itself wrong; this says whether it is right. What is asked and how pictures are
judged belongs to the world a model was trained on, a :class:`Judge` of :mod:`..common.worlds`. Half of the pictures
are drawn without negative prompts and half with. Negatives that contradict the prompt are a set apart, of which the
whole knows nothing: guidance is asked there to go past what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cells import Tensors
from .measured import ModelEvaluation
from .metrics import mean_and_interval
from .names import REFERENCE, MethodCall, parse_method
from .prompts import Drawn

PARTS = ("background", "object", "colour", "negative")
PART_WORDS = {
    "background": "named background",
    "object": "named object",
    "colour": "object's own colours",
    "negative": "without the negative",
}
SETS = ("plain", "with_negatives")
CONTRADICTING = "contradicting"  # half as many, at the guidance scales alone
SET_WORDS = {
    "plain": "without negatives",
    "with_negatives": "with negatives",
    CONTRADICTING: "with contradicting negatives (not in the whole)",
}
BLOCK = 16  # pictures a cell; a longer run goes on from a shorter one's


class Question(Protocol):
    """What is asked of one picture."""

    @property
    def prompt(self) -> str: ...

    @property
    def negative(self) -> str: ...


class Judge(Protocol):
    """Asks for pictures and says whether they are right. ``print`` is all that its judgement depends on."""

    print: str

    def questions(self, count: int, seed: int, kind: str) -> Sequence[Question]:
        """``count`` questions for one of ``SETS`` or ``CONTRADICTING``; a larger count begins with the same ones."""
        ...

    def judge(self, pixels: Tensor, questions: Sequence[Any]) -> dict[str, Tensor]:
        """Of pixels [B, 3, H, W] in -1..1, for each of ``PARTS`` [B]: 1 right, 0 wrong, not a number: not asked or
        not to be told."""
        ...


class Agreement:
    """The agreement of one :class:`~.measured.ModelEvaluation`, as a judge sees it."""

    def __init__(self, evaluation: ModelEvaluation, judge: Judge):
        self.of, self.judge = evaluation, judge
        count, seed = evaluation.config.agreement_prompts, evaluation.config.seed
        self.asked = {name: self.judge.questions(count, seed, name) for name in SETS}
        self.asked[CONTRADICTING] = self.judge.questions(-(-count // 2), seed, CONTRADICTING)

    def row(self, call: MethodCall, contradicting: bool = False) -> dict[str, Any]:
        """``agreement``: the share of pictures that are right in all that was asked, with its 95 % interval;
        ``agreement_parts``: the same of each part alone; ``agreement_sets``: the whole without and with negatives,
        and with ``contradicting`` ones if they are drawn."""
        judged = {name: self._judged(call, name) for name in SETS}
        right = {name: all_right(parts) for name, parts in judged.items()}
        found = mean_and_interval("agreement", torch.cat(list(right.values())))
        found["agreement_parts"] = {
            part: mean_and_interval("share", torch.cat([judged[name][part] for name in SETS])).get("share")
            for part in PARTS
        }
        if contradicting:
            right[CONTRADICTING] = all_right(self._judged(call, CONTRADICTING))
        found["agreement_sets"] = {
            name: mean_and_interval("share", values).get("share") for name, values in right.items()
        }
        return found

    def figures(self) -> dict[str, Any]:
        """``agreement_pictures``, and ``agreement_by_guidance``: the reference's row at each of the chosen scales, and
        ``best``, the scale with the largest share of right pictures, the smallest of equals."""
        out: dict[str, Any] = {"agreement_pictures": sum(len(self.asked[name]) for name in SETS)}
        if not self.of.config.agreement_scales:
            return out
        rows = {}
        for scale in sorted(self.of.config.agreement_scales):
            # at w = 1 guidance is the prompt's own prediction, at half the cost
            call = parse_method(f"cond-{REFERENCE.steps}") if scale == 1 else REFERENCE
            with self.of.sampler.guided_by(scale):
                rows[f"{scale:g}"] = self.row(call, contradicting=True)
        best = max(rows, key=lambda scale: (rows[scale]["agreement"], -float(scale)))
        return out | {"agreement_by_guidance": {"rows": rows, "best": float(best)}}

    def _judged(self, call: MethodCall, name: str) -> Tensors:
        """The judgement [N] of every part, of the questions of a set."""
        questions = self.asked[name]
        blocks = [self._block(call, name, begin) for begin in range(0, len(questions), BLOCK)]
        return {part: torch.cat([block[part] for block in blocks]).double() for part in PARTS}

    def _block(self, call: MethodCall, name: str, begin: int) -> Tensors:
        evaluation, questions = self.of, list(self.asked[name][begin : begin + BLOCK])
        drawn = Drawn([q.prompt for q in questions], [q.negative for q in questions], evaluation.config.seed + begin)
        latents = evaluation.sample(call, drawn)["latents"]
        key = {
            "sample": evaluation.sample_key(call, drawn),
            "vae": evaluation.vae_key,
            "questions": [repr(question) for question in questions],
            "judge": [self.judge.print, evaluation.features.name, evaluation.features.print],
        }

        def compute(rows: slice) -> Tensors:
            return self.judge.judge(evaluation.pixels(latents[rows]), questions[rows])

        label = f"{evaluation.name} {call} {name} agreement"
        return evaluation.store.get(label, key, len(questions), BLOCK, compute)


def all_right(parts: Tensors) -> Tensor:
    """[N]: 1 where no judged part is wrong, 0 where one is, not a number where nothing could be judged."""
    stacked = torch.stack([parts[part] for part in PARTS])
    judged = ~stacked.isnan()
    right = (stacked.nan_to_num(1.0) > 0.5).all(0).double()
    return right.masked_fill(~judged.any(0), torch.nan)
