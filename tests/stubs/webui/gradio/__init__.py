"""Gradio as the hosts use it: components that remember their arguments and their handlers. Shows nothing."""

from __future__ import annotations

from typing import Any

CREATED: list[Any] = []
_around: list[Any] = []


class Component:
    defaults: tuple[str, ...] = ("value",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self.defaults, args, strict=False)) | kwargs
        self.value = given.pop("value", None)
        self.label, self.elem_id = given.get("label"), given.get("elem_id")
        self.choices, self.visible = given.get("choices"), given.get("visible", True)
        self.arguments, self.handlers = given, []
        self.values = [choice[1] if isinstance(choice, tuple) else choice for choice in self.choices or []]
        self.parent = _around[-1] if _around else None
        CREATED.append(self)

    def __enter__(self) -> Any:
        _around.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _around.remove(self)

    def _on(self, fn: Any = None, _js: str | None = None, inputs: Any = None, outputs: Any = None, **_: Any) -> None:
        inputs, outputs = inputs or [], outputs or []
        for component in [*inputs, *outputs]:
            assert isinstance(component, Component), "gradio wants components as inputs and outputs"
        self.handlers.append({"fn": fn, "js": _js, "inputs": inputs, "outputs": outputs})

    click = change = select = _on


class Blocks(Component):
    defaults = ()


class Row(Component):
    defaults = ()


class Column(Component):
    defaults = ()


class Group(Component):
    defaults = ()


class Accordion(Component):
    defaults = ("label",)


class Textbox(Component):
    pass


class Number(Component):
    pass


class Checkbox(Component):
    pass


class HTML(Component):
    pass


class Image(Component):
    pass


class State(Component):
    pass


class Gallery(Component):
    pass


class Button(Component):
    pass


class Slider(Component):
    defaults = ("minimum", "maximum")


class Dropdown(Component):
    defaults = ("choices",)


class Radio(Component):
    defaults = ("choices",)


class SelectData:
    def __init__(self, index: Any) -> None:
        self.index = index


def update(**kwargs: Any) -> dict[str, Any]:
    return {"__type__": "update", **kwargs}
