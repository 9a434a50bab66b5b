"""Several methods on one diffusers pipeline: each adds a layer to its class, and any of them may leave first.

A layer is a class with a context manager ``around(pipe, given)``, entered for every call of the pipeline, and whatever
else it changes. The pipeline keeps the name of its class: diffusers saves by it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

DENOISERS = ("unet", "transformer")
_OWN = "_sun_layer"


class Layer(Protocol):
    """What a method adds to a pipeline's class."""

    @staticmethod
    def around(pipe: Any, given: Mapping[str, Any]) -> AbstractContextManager[Mapping[str, Any] | None]:
        """Entered around a call of the pipeline. given: the arguments of the call by name, however they were passed.

        What it yields, if anything, are arguments to call with instead; those that the call does not take are left out.
        """


def put_on(pipe: Any, layer: Any) -> None:
    """Let every call of ``pipe`` run within ``layer``; a layer that is on already stays where it is."""
    base, layers = _taken_apart(type(pipe))
    if layer not in layers:
        pipe.__class__ = _put_together(base, (*layers, layer))


def take_off(pipe: Any, layer: Any) -> None:
    """Take ``layer`` away and keep the others in their order; without it, do nothing."""
    base, layers = _taken_apart(type(pipe))
    if layer in layers:
        pipe.__class__ = _put_together(base, tuple(other for other in layers if other is not layer))


def given_arguments(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the method ``call`` by name, without defaults. Wrong ones are left to the call."""
    signature = inspect.signature(call)
    try:
        bound = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def with_arguments(
    cls: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of a pipeline of class ``cls`` with ``changes`` by name, as far as it takes them, or the
    class behind it to which it hands others on. Those that were passed by position stay there; wrong ones are left to
    the call."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = list(inspect.signature(cls.__call__).parameters.values())[1:]
    places = [parameter.name for parameter in own if parameter.kind in by_position]
    taken, named, positional = _taken(cls, "__call__"), dict(kwargs), list(args)
    for name, value in changes.items():
        if name in places and places.index(name) < len(args):
            positional[places.index(name)] = value
        elif name in kwargs or name in taken:
            named[name] = value
    return tuple(positional), named


def _taken(cls: Any, method: str) -> set[str]:
    """Names of the arguments of a method, and of those behind it as long as they take any by name."""
    names: set[str] = set()
    for owner in cls.__mro__:
        if method in owner.__dict__:
            parameters = inspect.signature(owner.__dict__[method]).parameters
            names |= set(parameters)
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names


def spelled_out(cls: Any, method: str) -> inspect.Signature | None:
    """The signature, without self, of the first such method behind a class that names every argument that it takes by
    position: overriding ones may take ``*args``."""
    for owner in cls.__mro__:
        if method in owner.__dict__:
            signature = inspect.signature(owner.__dict__[method])
            own = list(signature.parameters.values())[1:]
            if all(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in own):
                return signature.replace(parameters=own)
    return None


def default_of(call: Callable[..., Any], name: str, otherwise: Any = None) -> Any:
    """What ``call`` takes for an argument that is not given."""
    parameter = inspect.signature(call).parameters.get(name)
    return otherwise if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def original_call(pipe: Any) -> Callable[..., Any]:
    """``__call__`` of the pipeline's own class."""
    return _taken_apart(type(pipe))[0].__call__


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's U-Net or transformer, without the wrapper of torch.compile; None if it has none."""
    found = next((getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None), None)
    return getattr(found, "_orig_mod", found)


@contextmanager
def one_at_a_time(model: Any) -> Iterator[None]:
    """Within it, other threads that ask for ``model`` wait.

    A diffusers pipeline keeps what belongs to a call on itself and on its scheduler, and the accelerators change parts
    of the model while it is called.
    """
    with contextlib.nullcontext() if model is None else _lock_of(model):
        yield


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def _lock_of(model: Any) -> threading.RLock:
    with _guard:
        return _locks.setdefault(model, threading.RLock())


def _taken_apart(cls: Any) -> tuple[Any, tuple[Any, ...]]:
    """The class a pipeline had at first and the layers put on it since, the first of them first."""
    layers: list[Any] = []
    while _OWN in cls.__dict__:
        base, layer = cls.__dict__[_OWN]
        layers.insert(0, layer)
        cls = base
    return cls, tuple(layers)


def _put_together(base: Any, layers: tuple[Any, ...]) -> Any:
    for layer in layers:
        base = _layered(base, layer)
    return base


@functools.cache
def _layered(base: Any, layer: Any) -> Any:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = given_arguments(base.__call__, args, kwargs)
        with one_at_a_time(denoiser_of(self)), layer.around(self, given) as changes:
            if changes:
                changed, named = with_arguments(base, args, kwargs, changes)
                return base.__call__(self, *changed, **named)
            return base.__call__(self, *args, **kwargs)

    own = {
        _OWN: (base, layer),
        "__call__": call,
        "__reduce_ex__": _reduced,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (layer, base), own)


def _reduced(pipe: Any, _protocol: Any) -> tuple[Any, ...]:
    """For pickle, which finds classes by their names, and copy."""
    return _empty, _taken_apart(type(pipe)), pipe.__dict__


def _empty(base: Any, layers: tuple[Any, ...]) -> Any:
    return object.__new__(_put_together(base, layers))
