"""The tab "SUN": a prompt, a negative prompt, a button. A thin front end over `generate`."""

from __future__ import annotations

import html
import importlib
import json
from dataclasses import replace
from typing import Any

import gradio as gr
from modules import call_queue, infotext_utils, sd_models, shared
from PIL import ImageChops

from ..sun.user_pictures import flatten, flatten_mask
from . import choices, generate, infotext
from .choices import SunSettings
from .controls import DENOISE_CHOICES, GUIDANCE_LABEL, adapter_list

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
            prompt, negative = _prompt("sun_prompt", "Prompt", 3), _prompt("sun_negative", "Negative prompt", 2)
        with gr.Column(scale=2, min_width=180):
            paint_button = gr.Button("Generate", variant="primary", elem_id="sun_generate")
            compare_button = gr.Button(f"Compare with {compare_steps()} steps", elem_id="sun_compare")
            interrupt = gr.Button("Interrupt", elem_id="sun_interrupt")
    with gr.Row():
        with gr.Column():
            controls = _controls()
        with gr.Column(elem_id="sun_results"):
            # The host puts its progress bar before this group, into the column around it.
            with gr.Group(elem_id="sun_gallery_container"):
                gallery = gr.Gallery(label="SUN pictures", show_label=False, elem_id="sun_gallery", columns=2)
            infotexts = gr.Textbox("[]", visible=False, elem_id="sun_infotexts")
            shown = gr.Textbox(label="Parameters", lines=2, interactive=False, elem_id="sun_infotext")
            for_txt2img = gr.Textbox(visible=False, elem_id="sun_infotext_txt2img")
            report = gr.HTML(elem_id="sun_report")
            log = gr.HTML(elem_id="sun_log")
            with gr.Row():
                for target in TARGETS:
                    button = gr.Button(f"Send to {target}", elem_id=f"sun_send_{target}")
                    infotext_utils.register_paste_params_button(
                        infotext_utils.ParamBinding(
                            paste_button=button,
                            tabname=target,
                            source_text_component=for_txt2img if target == "txt2img" else shown,
                            source_image_component=gallery,
                        )
                    )

    outputs = [gallery, infotexts, shown, report, log]
    for button, work in ((paint_button, paint), (compare_button, compare)):
        button.click(
            fn=call_queue.wrap_gradio_gpu_call(work, extra_outputs=[None, "[]", "", ""]),
            _js="sun_submit",
            inputs=[task, prompt, negative, *controls],
            outputs=outputs,
            show_progress=False,
        )
    interrupt.click(fn=shared.state.interrupt, inputs=[], outputs=[])
    gallery.select(fn=infotext_of, inputs=[infotexts], outputs=[shown], show_progress=False)
    shown.change(fn=infotext.for_txt2img, inputs=[shown], outputs=[for_txt2img], show_progress=False)


def _prompt(elem_id: str, label: str, lines: int) -> Any:
    """A box for a prompt with the host's counter of tokens in its corner (javascript/sun.js starts it)."""
    with gr.Row():  # of its own: the host puts the counter into the corner of what is around the box
        box = gr.Textbox(label=label, lines=lines, elem_id=elem_id)
    counter = gr.HTML("<span>0/75</span>", elem_id=f"{elem_id}_token_counter", elem_classes=["token-counter"])
    count = gr.Button(visible=False, elem_id=f"{elem_id}_token_button")
    count.click(fn=tokens_of, inputs=[box], outputs=[counter], show_progress=False)
    return box


def tokens_of(text: str) -> str:
    """The host's count of a prompt's tokens, as HTML."""
    count = getattr(importlib.import_module("modules.ui"), "update_token_counter", None)
    return str(count(text, 4, [])) if count else ""


def _controls() -> list[Any]:
    """The tab's controls in the order of `read`."""
    model = gr.Dropdown(
        [LOADED_MODEL, *sd_models.checkpoint_tiles()], value=LOADED_MODEL, label="Model", elem_id="sun_model"
    )

    def models() -> dict[Any, Any]:
        sd_models.list_models()
        return {model: gr.update(choices=[LOADED_MODEL, *sd_models.checkpoint_tiles()])}

    adapter = adapter_list("sun_adapter", "sun_refresh", models)
    with gr.Row():
        width = gr.Slider(64, 2048, value=512, step=8, label="Width", elem_id="sun_width")
        height = gr.Slider(64, 2048, value=512, step=8, label="Height", elem_id="sun_height")
    with gr.Row():
        batch = gr.Slider(1, 8, value=1, step=1, label="Batch size", elem_id="sun_batch")
        seed = gr.Number(-1, label="Seed", precision=0, elem_id="sun_seed")
        steps = gr.Slider(*choices.STEPS, value=4, step=1, label="Steps", elem_id="sun_steps")
    with gr.Row():
        strength = gr.Slider(*choices.STRENGTH, value=1.0, step=0.05, label="SUN strength", elem_id="sun_strength")
        guidance = gr.Slider(*choices.GUIDANCE, value=0, step=0.1, label=GUIDANCE_LABEL, elem_id="sun_guidance")
    with gr.Accordion("Start from a picture", open=False, elem_id="sun_start"):
        image, brush = _picture()
        mask = gr.Image(
            label="A mask of your own: white is painted anew", type="pil", image_mode="RGBA", elem_id="sun_mask"
        )
        denoise = gr.Slider(0, 1, value=0.75, step=0.01, label="Denoise", elem_id="sun_denoise")
        mode = gr.Radio(DENOISE_CHOICES, value="trained", label="SUN image to image", elem_id="sun_mode")
    return [model, adapter, width, height, batch, seed, steps, strength, guidance, image, brush, mask, denoise, mode]


def _picture() -> tuple[Any, Any]:
    """A picture to start from, and what a brush painted over the parts to paint anew.

    Forge has a canvas of two components; in Gradio 3 one component gives both, and the second one is empty.
    """
    gr.HTML("<p>Paint over what is to be made anew; without paint all of it is.</p>", elem_classes=["sun-hint"])
    try:
        canvas = importlib.import_module("modules_forge.forge_canvas.canvas").ForgeCanvas(
            elem_id="sun_image",
            height=512,
            scribble_color="#ffffff",
            scribble_color_fixed=True,
            scribble_alpha=60,
            scribble_alpha_fixed=True,
            scribble_softness_fixed=True,
        )
    except (ImportError, AttributeError, TypeError):
        image = gr.Image(
            label="Picture",
            source="upload",
            tool="sketch",
            type="pil",
            image_mode="RGBA",
            elem_id="sun_image",
            brush_color="#ffffff",
        )
        return image, gr.State(None)
    return canvas.background, canvas.foreground


def read(
    prompt: str,
    negative: str,
    model: str,
    adapter: str,
    width: float,
    height: float,
    batch: float,
    seed: float | None,
    steps: float,
    strength: float,
    guidance: float,
    image: Any,
    brush: Any,
    mask: Any,
    denoise: float,
    mode: Any,
) -> generate.Request:
    """The controls' values as a request. Raises ValueError for a mask without a picture, and for masks of another size
    than the picture."""
    if isinstance(image, dict):  # Gradio 3, with a brush
        image, brush = image["image"], image["mask"]
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
        image=None if image is None else flatten(image),
        mask=None if image is None else mask_of(image, brush, mask),
        denoise=float(denoise),
    )


def mask_of(image: Any, brush: Any, mask: Any) -> Any:
    """What to paint anew (mode L, white), of the brush's strokes and a mask of one's own; None for all of `image`."""
    painted = None
    if brush is not None:
        strokes = brush.getchannel("A") if brush.mode in ("RGBA", "LA") else brush.convert("L")
        if brush.mode in ("RGBA", "LA") and strokes.getextrema()[0] == 255:  # opaque all over: white on black
            strokes = brush.convert("L")
        painted = strokes.point(lambda level: 255 if level else 0) if strokes.getextrema()[1] else None
    if mask is None:
        return painted
    own = flatten_mask(mask)
    return own if painted is None else ImageChops.lighter(own.resize(painted.size), painted)


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
            other = reference(request, with_sun)
            results.append((f"{other.sampler}, {other.steps} steps, CFG {other.cfg:g}", generate.paint(other)))
        return results

    return outputs_of(generate.on_main_thread(both))


def compare_steps() -> int:
    """How many the other picture of Compare takes, by the settings page."""
    return int(getattr(shared.opts, "sun_compare_steps", 25))


def reference(request: generate.Request, with_sun: generate.Result) -> generate.Request:
    """The same picture without SUN, by the settings page; its CFG scale is the one that SUN stood in for, where its
    adapter says one."""
    options = shared.opts
    return replace(
        request,
        settings=None,
        seed=with_sun.seed,
        sampler=getattr(options, "sun_compare_sampler", "DPM++ 2M"),
        steps=compare_steps(),
        cfg=with_sun.guidance or float(getattr(options, "sun_compare_cfg", 7.0)),
    )


def outputs_of(results: list[tuple[str, generate.Result]]) -> Outputs:
    """Gallery, infotexts as JSON, the first infotext, the table, and the host's comments.

    Where there is something to compare, the pictures say what made them.
    """
    images = [(image, name) if len(results) > 1 else image for name, result in results for image in result.images]
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
