"""The host's own components: an accordion whose open state is a value, a small button."""

import gradio as gr


class InputAccordion(gr.Checkbox):
    pass


class ToolButton(gr.Button):
    pass
