"""The tab "SUN": a prompt, a negative prompt, a button. A thin front end over `generate`."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from typing import Any

import gradio as gr
from modules import call_queue, infotext_utils, sd_models, shared
from modules.ui_components import ToolButton

from . import folders, generate
from .controls import GUIDANCE
from .run import SunSettings

LOADED_MODEL = "The loaded model"
TARGETS = ("txt2img", "img2img", "inpaint")
Outputs = tuple[list[Any], str, str, str, str]


def create_tabs() -> list[tuple[Any, str, str]]:
    """What the host's `on_ui_tabs` asks for."""
    if not getattr(shared.opts, "sun_show_tab", True):
        return []
    with gr.Blocks(analytics_enabled=False) as blocks:
        _create()
    return [(blocks, "SUN", "sun_tab")]


def _create() -> None:
    task = gr.Textbox(visible=False, elem_id="sun_task")
    with gr.Row():
        with gr.Column(scale=6):
            prompt = gr.Textbox(label="Prompt", lines=3, elem_id="sun_prompt")
            negative = gr.Textbox(label="Negative prompt", lines=2, elem_id="sun_negative")
        with gr.Column(scale=2, min_width=180):
            paint_button = gr.Button("Generate", variant="primary", elem_id="sun_generate")
            compare_button = gr.Button("Compare with 25 steps", elem_id="sun_compare")
            interrupt = gr.Button("Interrupt", elem_id="sun_interrupt")
    with gr.Row():
        with gr.Column():
            controls = _controls()
        with gr.Column(elem_id="sun_gallery_container"):
            gallery = gr.Gallery(label="SUN pictures", show_label=False, elem_id="sun_gallery", columns=2)
            infotexts = gr.Textbox("[]", visible=False, elem_id="sun_infotexts")
            infotext = gr.Textbox(label="Parameters", lines=2, interactive=False, elem_id="sun_infotext")
            report = gr.HTML(elem_id="sun_report")
            log = gr.HTML(elem_id="sun_log")
            with gr.Row():
                for target in TARGETS:
                    button = gr.Button(f"Send to {target}", elem_id=f"sun_send_{target}")
                    infotext_utils.register_paste_params_button(
                        infotext_utils.ParamBinding(
                            paste_button=button,
                            tabname=target,
                            source_text_component=infotext,
                            source_image_component=gallery,
                        )
                    )

    outputs = [gallery, infotexts, infotext, report, log]
    for button, work in ((paint_button, paint), (compare_button, compare)):
        button.click(
            fn=call_queue.wrap_gradio_gpu_call(work, extra_outputs=[None, "[]", "", ""]),
            _js="sun_submit",
            inputs=[task, prompt, negative, *controls],
            outputs=outputs,
            show_progress=False,
        )
    interrupt.click(fn=shared.state.interrupt, inputs=[], outputs=[])
    gallery.select(fn=infotext_of, inputs=[infotexts], outputs=[infotext], show_progress=False)


def _controls() -> list[Any]:
    """The tab's controls in the order of `read`."""
    names = folders.names()
    with gr.Row():
        model = gr.Dropdown(
            [LOADED_MODEL, *sd_models.checkpoint_tiles()], value=LOADED_MODEL, label="Model", elem_id="sun_model"
        )
        adapter = gr.Dropdown(names, value=names[0], label="SUN adapter", elem_id="sun_adapter")
        refresh = ToolButton("\U0001f504", elem_id="sun_refresh")
    with gr.Row():
        width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="sun_width")
        height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="sun_height")
    with gr.Row():
        batch = gr.Slider(1, 8, value=1, step=1, label="Batch size", elem_id="sun_batch")
        seed = gr.Number(-1, label="Seed", precision=0, elem_id="sun_seed")
        steps = gr.Slider(1, 12, value=4, step=1, label="Steps", elem_id="sun_steps")
        strength = gr.Slider(0, 2, value=1.0, step=0.05, label="SUN strength", elem_id="sun_strength")
        guidance = gr.Slider(0, 30, value=0, step=0.1, label=GUIDANCE, elem_id="sun_guidance")
    with gr.Accordion("Start from a picture", open=False, elem_id="sun_start"):
        with gr.Row():
            image = gr.Image(label="Picture", type="pil", elem_id="sun_image")
            mask = gr.Image(label="Mask: white is painted anew", type="pil", elem_id="sun_mask")
        with gr.Row():
            denoise = gr.Slider(0, 1, value=0.75, step=0.01, label="Denoise", elem_id="sun_denoise")
            mode = gr.Radio(["trained", "respaced"], value="trained", label="SUN image to image", elem_id="sun_mode")

    def refreshed() -> tuple[Any, Any]:
        sd_models.list_models()
        return (
            gr.update(choices=[LOADED_MODEL, *sd_models.checkpoint_tiles()]),
            gr.update(choices=folders.names()),
        )

    refresh.click(fn=refreshed, inputs=[], outputs=[model, adapter])
    return [model, adapter, width, height, batch, seed, steps, strength, guidance, image, mask, denoise, mode]


def read(
    prompt: str, negative: str, model: str, adapter: str, width: float, height: float, batch: float, seed: float | None,
    steps: float, strength: float, guidance: float, image: Any, mask: Any, denoise: float, mode: Any,
) -> generate.Request:  # fmt: skip
    """The controls' values as a request. Raises ValueError for a mask without a picture."""
    if mask is not None and image is None:
        raise ValueError("There is a mask but no picture. Add the picture the mask belongs to.")
    return generate.Request(
        prompt=prompt,
        negative=negative,
        settings=SunSettings(
            adapter, float(strength), int(steps), main_negative=True, denoise_mode=mode, guidance=float(guidance)
        ),
        model="" if model == LOADED_MODEL else model,
        width=int(width),
        height=int(height),
        batch_size=int(batch),
        seed=-1 if seed is None else int(seed),
        image=image,
        mask=mask,
        denoise=float(denoise),
    )


def paint(_task: str, *values: Any) -> Outputs:
    """The button Generate."""
    request = read(*values)
    result = generate.on_main_thread(lambda: generate.paint(request))
    return outputs_of([("SUN", result)])


def compare(_task: str, *values: Any) -> Outputs:
    """The button Compare: SUN and the many-step sampler of the settings page, with the same noise."""
    request = read(*values)

    def both() -> list[tuple[str, generate.Result]]:
        with_sun = generate.paint(request)
        results = [("SUN", with_sun)]
        if not with_sun.interrupted:
            other = reference(request, with_sun.seed)
            results.append((f"{other.sampler}, {other.steps} steps, CFG {other.cfg:g}", generate.paint(other)))
        return results

    return outputs_of(generate.on_main_thread(both))


def reference(request: generate.Request, seed: int) -> generate.Request:
    """The same picture without SUN, by the settings page; its CFG scale is SUN's where SUN was asked for one."""
    options = shared.opts
    return replace(
        request,
        settings=None,
        seed=seed,
        sampler=getattr(options, "sun_compare_sampler", "DPM++ 2M"),
        steps=int(getattr(options, "sun_compare_steps", 25)),
        cfg=(request.settings.guidance if request.settings else 0.0) or float(getattr(options, "sun_compare_cfg", 7.0)),
    )


def outputs_of(results: list[tuple[str, generate.Result]]) -> Outputs:
    """Gallery, infotexts as JSON, the first infotext, the table, and the host's comments."""
    images = [image for _, result in results for image in result.images]
    texts = [text for _, result in results for text in result.infotexts[: len(result.images)]]
    comments = "".join(result.comments for _, result in results)
    log = f"<p class='comments'>{html.escape(comments)}</p>" if comments else ""
    return images, json.dumps(texts), texts[0] if texts else "", table(results), log


def table(results: list[tuple[str, generate.Result]]) -> str:
    """Seconds and U-Net calls side by side."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{result.calls}</td><td>{result.evaluations:g}</td>"
        f"<td>{result.seconds:.2f}</td></tr>"
        for name, result in results
    )
    head = "".join(f"<th>{title}</th>" for title in ("Method", "U-Net calls", "U-Net passes a picture", "Seconds"))
    return f"<table class='sun-table'><tr>{head}</tr>{rows}</table>"


def infotext_of(infotexts: str, event: gr.SelectData) -> str:
    """The infotext of the picture selected in the gallery."""
    texts = json.loads(infotexts or "[]")
    return texts[event.index] if isinstance(event.index, int) and event.index < len(texts) else ""
