"""How well does one call stand in for guidance? The change that a method makes to a prediction, beside guidance's own.

Along the reference's path, at the beginning of each of four stages, a method predicts the noise of the same state; what
it adds to the plain prediction of the prompt is compared with what classifier-free guidance adds, (w - 1) (e(c_p) -
e(c_n)), in direction and size. A method of one call can be no nearer to guidance in few steps than it is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cells import Tensors
from .measured import ModelEvaluation
from .methods import prepare, scheduler_of
from .metrics import mean_and_interval
from .names import REFERENCE, MethodCall, parse_method

STAGES, SUBSTEPS = 4, 6
PARTS = ("method", "guidance", "product")
PATH = ("states", "plain", "guided")


class Guidance:
    """The experiment on one :class:`~.measured.ModelEvaluation`."""

    def __init__(self, evaluation: ModelEvaluation):
        self.of = evaluation

    def methods(self) -> list[MethodCall]:
        """The methods of one call that take the negative on the model's own weights, each once."""
        found: dict[tuple[str, str], MethodCall] = {}
        for call in self.of.methods:
            kind = call.method
            if kind.uses_negative and not (kind.guided or kind.peer or kind.unet or kind.ltc or kind.inside):
                found.setdefault((kind.name, call.variant), call)
        return list(found.values())

    def figures(self) -> dict[str, Any]:
        """``timesteps``, and of each method ``cosine`` with its interval, ``relative_size`` and ``explained``, the
        share of guidance's change (squared) that the method's makes: a list each, one entry a stage."""
        found = {call.text: self._measured(call) for call in self.methods()}
        return {"timesteps": self._times(), "methods": {name: summary(parts) for name, parts in found.items()}}

    def _scheduler(self) -> Any:
        call = parse_method(f"{REFERENCE.method.name}-{STAGES * SUBSTEPS}")
        scheduler = scheduler_of(call, self.of.sampler.scheduler_config)
        scheduler.set_timesteps(call.steps, device=self.of.sampler.device)
        return scheduler

    def _times(self) -> list[int]:
        return [int(t) for t in self._scheduler().timesteps[::SUBSTEPS]]

    def _measured(self, call: MethodCall) -> Tensors:
        """Squared norms [N, 4] of the two changes, and their scalar product."""
        evaluation, sampler = self.of, self.of.sampler
        drawn, path = evaluation.all_prompts(), self._path()

        @torch.no_grad()
        def compute(rows: slice) -> Tensors:
            texts = sampler.encode_both(drawn.positives[rows], drawn.negatives[rows])
            states, plain, guided = (path[part][rows].to(sampler.device) for part in PATH)
            made = []
            with sampler.autocast(evaluation.config.precision), prepare(sampler.assets, call) as ready:
                for t, x in zip(self._times(), states.unbind(1), strict=True):
                    at = torch.tensor(t, device=x.device)
                    made.append(ready.predict(x.to(ready.unet.dtype), at, *texts).float())
            change, wanted = (noise.flatten(2) - plain.flatten(2) for noise in (torch.stack(made, 1), guided))
            products = (change.square(), wanted.square(), change * wanted)
            return {part: product.sum(2) for part, product in zip(PARTS, products, strict=True)}

        key = {"guidance": STAGES * SUBSTEPS, "sample": evaluation.sample_key(call, drawn), "w": sampler.w}
        label = f"{evaluation.name} {call} guidance"
        return evaluation.store.get(label, key, len(drawn), evaluation.config.batch_size, compute)

    def _path(self) -> Tensors:
        """[N, 4, 4, h, w] each: ``states`` at the beginning of the stages of the reference, and what the model says of
        them, ``plain`` and ``guided``."""
        evaluation, sampler = self.of, self.of.sampler
        drawn = evaluation.all_prompts()

        @torch.no_grad()
        def compute(rows: slice) -> Tensors:
            noise = sampler.noise(rows.stop - rows.start, drawn.seed + rows.start)
            texts = torch.cat(sampler.encode_both(drawn.positives[rows], drawn.negatives[rows]))
            scheduler = self._scheduler()
            kept: dict[str, list[Tensor]] = {part: [] for part in PATH}
            x = noise.float() * scheduler.init_noise_sigma
            with sampler.autocast(evaluation.config.precision):
                for i, t in enumerate(scheduler.timesteps):
                    both = torch.cat([scheduler.scale_model_input(x, t)] * 2).to(sampler.unet.dtype)
                    positive, negative = sampler.unet(both, t, texts).sample.float().chunk(2)
                    goal = negative + sampler.w * (positive - negative)
                    if i % SUBSTEPS == 0:
                        for part, value in zip(PATH, (x, positive, goal), strict=True):
                            kept[part].append(value)
                    x = scheduler.step(goal, t, x, return_dict=False)[0]
            return {part: torch.stack(values, 1) for part, values in kept.items()}

        key = {"guidance path": STAGES * SUBSTEPS, "sample": evaluation.sample_key(REFERENCE, drawn)}
        label = f"{evaluation.name} guidance path"
        return evaluation.store.get(label, key, len(drawn), evaluation.config.batch_size, compute)


def summary(parts: Tensors) -> dict[str, list[Any]]:
    """Of squared norms and products [N, stages]: cosine (mean over pictures), size and share explained (over all)."""
    method, guidance, product = (parts[part].double() for part in PARTS)
    cosines = product / (method * guidance).sqrt().clamp_min(1e-12)
    means = [mean_and_interval("cosine", column) for column in cosines.unbind(1)]
    sums = {"method": method.sum(0), "guidance": guidance.sum(0), "product": product.sum(0)}
    left = (sums["method"] - 2 * sums["product"] + sums["guidance"]) / sums["guidance"].clamp_min(1e-12)
    return {
        "cosine": [found["cosine"] for found in means],
        "interval": [found["cosine_interval"] for found in means],
        "relative_size": (sums["method"] / sums["guidance"].clamp_min(1e-12)).sqrt().tolist(),
        "explained": (1 - left).tolist(),
    }
