"""What a model would say in a step that is skipped, from what it said in the steps before.

The output is taken as a function of sigma and carried on along its last changes. Between two calls it changed by
y = o_j - o_{j-1}; the change before it, scaled to the same length of sigma, is f. How much of f came true, y = c f, is
fitted by ridge least squares for every picture on its own, and used for the next step. No host and no solver is named
here: all that is known of a call is (sigma, x, denoised).

The transitions of LTC-Accel (arXiv 2503.09675) are these outputs where a step is one of Euler, D_i = (sigma_{i+1} -
sigma_i) o_i; one term with a factor is the paper. Forecasting outputs leaves every solver its own history. Terms beyond
the first, and fitting them in the run itself, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

NOISE, X0 = "noise", "x0"
KINDS = (NOISE, X0)
MOST_TERMS = 3


class Forecast:
    """The outputs of one sampling run, carried on.

    kind: "noise" carries on (x - denoised) / sigma, which is dx/dsigma of the sampling ODE (for flow matching, the
    velocity); "x0" carries on denoised, which fresh noise between two calls leaves alone. terms: outputs a forecast is
    made of, 1 to 3; 1 is the last one again. ridge: how strongly the fit is held to ``prior``, as a share of the size
    of the changes it is fitted on. prior: the factor of each change, 1 being "as before". memory: what the calls before
    the last one weigh in the fit.
    """

    def __init__(
        self,
        kind: str = NOISE,
        terms: int = 2,
        *,
        ridge: float = 0.3,
        prior: Sequence[float] = (1.0, 0.0),
        memory: float = 0.5,
    ) -> None:
        self.kind, self.terms, self.ridge, self.memory = kind, terms, ridge, memory
        self.prior = tuple(prior)[: terms - 1]
        self.turned: Tensor | None = None
        """How far the last call was from its forecast, relative to its size: [B]; None while nothing was foretold."""
        self._seen: list[tuple[float, Tensor]] = []  # sigma and output of the last calls, the latest first
        self._products: Tensor | None = None  # [B, terms - 1, terms - 1] of changes with changes
        self._moments: Tensor | None = None  # [B, terms - 1] of changes with what came

    @property
    def ready(self) -> bool:
        """Whether enough calls were seen to go on from: one, or two for a line; a third bends it."""
        return len(self._seen) >= min(self.terms, 2)

    def suits(self, x: Tensor) -> bool:
        """Whether what was seen has the form of latents ``x`` [B, ...]."""
        return bool(self._seen) and self._seen[0][1].shape == x.shape

    def see(self, sigma: float, x: Tensor, denoised: Tensor) -> None:
        """Note a call of the model: ``denoised`` [B, ...] at latents ``x`` [B, ...] of noise level ``sigma`` > 0."""
        output = self._output(sigma, x, denoised)
        if self._seen and self._seen[0][1].shape != output.shape:
            self.forget()
        if self._seen and abs(self._seen[0][0] - sigma) <= 1e-6 * sigma:
            self._seen[0] = (sigma, output)  # asked again at the same level (Heun): the later x is the better one
            return
        if len(self._seen) >= 2:
            self._fit(sigma, output)
        self._seen = [(sigma, output), *self._seen][: max(self.terms, 2)]

    def denoised(self, sigma: float, x: Tensor) -> Tensor:
        """What the model would say at latents ``x`` [B, ...] of noise level ``sigma``."""
        output = self.output(sigma).to(x.device)
        return (x.float() - sigma * output if self.kind == NOISE else output).to(x.dtype)

    def output(self, sigma: float) -> Tensor:
        """The forecast output [B, ...] at noise level ``sigma``, float32."""
        last = self._seen[0][1]
        if self.terms == 1 or len(self._seen) < 2:
            return last
        changes = self._changes(sigma)
        factors = self.factors(len(last))[:, : changes.shape[1]]
        return last + torch.einsum("bk,bkn->bn", factors.to(changes), changes).view_as(last)

    def factors(self, pictures: int) -> Tensor:
        """[B, terms - 1]: the factor of each change, fitted where calls were seen, else the prior."""
        prior = torch.tensor(self.prior)
        if self._products is None or self._moments is None:
            return prior.expand(pictures, -1)
        held = (self.ridge * self._products.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-20)
        matrix = self._products + held[:, None, None] * torch.eye(len(prior))
        return torch.linalg.solve(matrix, self._moments + held[:, None] * prior)

    def forget(self) -> None:
        """Let go of everything."""
        self._seen, self._products, self._moments, self.turned = [], None, None, None

    def _output(self, sigma: float, x: Tensor, denoised: Tensor) -> Tensor:
        clean = denoised.detach().float()
        return clean if self.kind == X0 else (x.detach().float() - clean) / sigma

    def _changes(self, sigma: float) -> Tensor:
        """[B, K, N]: the last changes of the output, each scaled to the way from the last call to ``sigma``."""
        way = sigma - self._seen[0][0]
        pairs = zip(self._seen, self._seen[1:], strict=False)
        made = [(a - b) * (way / (at - before)) for (at, a), (before, b) in pairs]
        return torch.stack([rearrange(change, "b ... -> b (...)") for change in made[: max(self.terms - 1, 1)]], 1)

    def _fit(self, sigma: float, output: Tensor) -> None:
        """Learn from a call how much of the changes before it went on, and how far off the forecast was."""
        changes, flat = self._changes(sigma), rearrange(output, "b ... -> b (...)")
        came = flat - rearrange(self._seen[0][1], "b ... -> b (...)")
        size = flat.norm(dim=1).clamp_min(1e-30)
        if self.terms == 1:
            self.turned = (came.norm(dim=1) / size).cpu()
            return
        count = changes.shape[1]
        factors = self.factors(len(flat))[:, :count].to(changes)
        off = came - torch.einsum("bk,bkn->bn", factors, changes)
        self.turned = (off.norm(dim=1) / size).cpu()
        products, moments = (
            torch.zeros(len(flat), self.terms - 1, self.terms - 1),
            torch.zeros(len(flat), self.terms - 1),
        )
        scale = size.square().reciprocal()  # calls weigh alike, whatever their size
        products[:, :count, :count] = (torch.einsum("bkn,bln->bkl", changes, changes) * scale[:, None, None]).cpu()
        moments[:, :count] = (torch.einsum("bkn,bn->bk", changes, came) * scale[:, None]).cpu()
        if self._products is not None and self._moments is not None:
            products, moments = products + self.memory * self._products, moments + self.memory * self._moments
        self._products, self._moments = products, moments
