"""LTC-Accel in loops that pipelines of video and sound have: copied schedulers, a second model, other names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin

import sun.ltc
from sun.ltc import Counts

Loop = Callable[["Toy", torch.Tensor], torch.Tensor]


class Model(torch.nn.Module):
    """A velocity that leads to ``goal``; it notes its calls."""

    def __init__(self, goal: float = 0.5) -> None:
        super().__init__()
        self.goal = torch.nn.Parameter(torch.full((1, 4, 1, 1), goal), requires_grad=False)
        self.calls: list[float] = []

    def forward(self, hidden_states: torch.Tensor, timestep: Any = None, **given: Any) -> tuple[torch.Tensor, ...]:
        time = next(value for value in (timestep, given.get("timesteps"), given.get("sigma")) if value is not None)
        sigma = float(time.flatten()[0]) / 1000
        self.calls.append(sigma)
        clean = (0.25 * (1 - sigma) * hidden_states + self.goal * sigma**2) / (0.25 * (1 - sigma) ** 2 + sigma**2)
        return ((hidden_states - clean) / sigma,)


class Toy(DiffusionPipeline):
    """A pipeline whose loop a test writes."""

    def __init__(self, loop: Loop, transformer: Any = None, transformer_2: Any = None) -> None:
        super().__init__()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
        self.register_modules(
            transformer=transformer or Model(), transformer_2=transformer_2 or Model(0.7), scheduler=scheduler
        )
        self.loop = loop

    @torch.no_grad()
    def __call__(self, steps: int = 20) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        return self.loop(self, torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0)))


def test_a_copied_scheduler_steps_itself_and_nothing_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """The sound of LTX-2, Kandinsky 6 and Cosmos 3, which one model makes with the picture."""
    kept: list[SchedulerMixin] = []

    def loop(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
        second, sound = copy.deepcopy(pipe.scheduler), x[:, :, :4] * 0.5
        kept.append(second)
        assert {"model_output", "generator"} <= set(inspect.signature(second.step).parameters)
        assert inspect.signature(second.step) == inspect.signature(pipe.scheduler.step)
        for t in pipe.scheduler.timesteps:
            both = pipe.transformer(hidden_states=x, timestep=t)[0], pipe.transformer(sound, t)[0]
            x = pipe.scheduler.step(both[0], t, x, return_dict=False)[0]
            sound = second.step(both[1], t, sound, return_dict=False)[0]
        return torch.cat([x, sound], 2)

    pipe = Toy(loop)
    plain = pipe()
    for attach in (lambda: sun.ltc.attach(pipe), lambda: sun.ltc.attach(pipe, "paper", tau=0)):
        attach()
        for _ in range(2):
            assert torch.equal(pipe(), plain)
        assert sun.ltc.last_run(pipe) == Counts(20, 20, why="it steps a second scheduler")
    assert caplog.text.count("from here on: it steps a second scheduler") == 4
    assert "step" not in vars(pipe.scheduler)
    sun.ltc.detach(pipe)
    kept[-1].set_timesteps(4)  # a copy that outlives the run is a scheduler as any
    assert kept[-1].step(plain, kept[-1].timesteps[0], plain).prev_sample.shape == plain.shape


def test_a_scheduler_that_is_never_stepped_itself_is_said() -> None:
    """As in SkyReels' diffusion forcing, with a copy a frame; and the count of the run before is not told again."""

    def alone(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
        mine = copy.deepcopy(pipe.scheduler)
        for t in mine.timesteps:
            x = mine.step(pipe.transformer(x, t)[0], t, x, return_dict=False)[0]
        return x

    pipe = Toy(usual)
    sun.ltc.attach(pipe, guard=0)
    pipe()
    assert sun.ltc.last_run(pipe) == Counts(13, 20)
    pipe.loop = alone
    pipe()
    assert sun.ltc.last_run(pipe) == Counts(0, 0, why="it steps a second scheduler")
    assert len(pipe.transformer.calls) == 13 + 20


def test_what_a_scheduler_holds_may_be_copied_and_given_back() -> None:
    """As the panorama pipeline does for every view: then there is one scheduler still."""

    def loop(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.__dict__.update(copy.deepcopy(pipe.scheduler.__dict__))
            x = pipe.scheduler.step(pipe.transformer(x, t)[0], t, x, return_dict=False)[0]
        return x

    pipe = Toy(loop)
    sun.ltc.attach(pipe, guard=0)
    pipe()
    assert sun.ltc.last_run(pipe) == Counts(13, 20)


def usual(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.transformer(x, t)[0], t, x, return_dict=False)[0]
    return x


def test_the_first_call_of_a_second_model_runs_and_counts_and_is_no_forecast_of_the_first() -> None:
    """Wan 2.2, at whichever step its second transformer takes over: the scheduler steps what that one said."""

    def two_models(first: int) -> Loop:
        def loop(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
            for i, t in enumerate(pipe.scheduler.timesteps):
                made = (pipe.transformer if i < first else pipe.transformer_2)(x, t)[0]
                here, there = pipe.scheduler.sigmas[i : i + 2]
                before, x = x, pipe.scheduler.step(made, t, x, return_dict=False)[0]
                if i == first:
                    torch.testing.assert_close(x, before + (there - here) * made)
            return x

        return loop

    for first in range(4, 17):
        pipe = Toy(two_models(first))
        large, small = pipe.transformer.calls, pipe.transformer_2.calls
        for preset, settings in (("balanced", {"guard": 0}), ("paper", {"tau": 0})):
            sun.ltc.attach(pipe, preset, **settings)
            pipe()  # by the paper it measures
            large.clear(), small.clear()
            pipe()
            assert sun.ltc.last_run(pipe) == Counts(len(large) + len(small), 20)
            assert len(large) + len(small) < 20
            assert small[0] == pytest.approx(float(pipe.scheduler.sigmas[first]))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_model_compiled_in_place_is_one_graph_and_gets_its_own_call_back(fullgraph: bool) -> None:
    ran: list[int] = []

    class Traced(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
            return (hidden_states * (0.3 + timestep / 5000),)

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            ran.append(1)
            return graph.forward(*inputs)

        return run

    pipe = Toy(usual, Traced())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile(backend=backend, fullgraph=fullgraph)
    compiled = pipe.transformer._compiled_call_impl
    try:
        plain = pipe()
        for preset, settings in (("balanced", {"guard": 0}), ("paper", {"tau": 0})):
            sun.ltc.attach(pipe, preset, **settings)
            pipe()
            ran.clear()
            fast = pipe()
            assert sun.ltc.last_run(pipe).calls == len(ran) < 20
            assert 0 < (fast - plain).norm() < 0.05 * plain.norm()
            assert pipe.transformer._compiled_call_impl is compiled
            assert "forward" not in vars(pipe.transformer)
        pipe.loop = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            pipe()
        assert pipe.transformer._compiled_call_impl is compiled
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["timesteps", "sigma"])
def test_a_model_that_calls_its_time_otherwise_skips_too(name: str) -> None:
    """HiDream and LTX-2."""

    def loop(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
        for t in pipe.scheduler.timesteps:
            made = pipe.transformer(hidden_states=x, **{name: t.expand(1)})[0]
            x = pipe.scheduler.step(made, t, x, return_dict=False)[0]
        return x

    pipe = Toy(loop)
    sun.ltc.attach(pipe, guard=0)
    pipe()
    assert sun.ltc.last_run(pipe) == Counts(13, 20)


def test_a_model_that_is_asked_something_else_in_every_step_says_what() -> None:
    """Latents of a second kind, a number in a dictionary, or more of a tensor."""

    def asking(ask: Callable[[int], dict[str, Any]]) -> Counts | None:
        def loop(pipe: Toy, x: torch.Tensor) -> torch.Tensor:
            for i, t in enumerate(pipe.scheduler.timesteps):
                for text in (torch.ones(1, 3), torch.zeros(1, 3)):
                    made = pipe.transformer(x, t, text=text, **ask(i))[0]
                x = pipe.scheduler.step(made, t, x, return_dict=False)[0]
            return x

        pipe = Toy(loop)
        sun.ltc.attach(pipe, guard=0)
        pipe()
        return sun.ltc.last_run(pipe)

    said = "the model is asked something else in every step"
    assert asking(lambda i: {"audio_hidden_states": torch.full((1, 2), i)}).why == f"{said} (audio_hidden_states)"
    assert asking(lambda i: {"options": {"scale": 0.1 * i}}) == Counts(20, 20, why=f"{said} (options.scale)")
    assert asking(lambda i: {"seen": torch.zeros(1, i)}).why == f"{said} (arguments of another form)"
    assert asking(lambda i: {"options": {"scale": 0.1 * (i < 9)}}) == Counts(14, 20)
