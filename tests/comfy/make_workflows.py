"""Writes example_workflows/*.json from the schemas of the nodes as ComfyUI has them.

python tests/comfy/make_workflows.py [NAME ...]     all of them, or those named; then make_thumbnails.py for new ones

Every graph but those that say so in their note runs at once after installing the pack: it needs no file and makes its
own input pictures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workflow_graph import GREEN, RED, Added, Graph, Ref

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
SHIPPED = "emoji-sun (shipped with SUN)"
LORA_FILE = "emoji-google-style.safetensors"  # ships with the pack
CFG = 1.5  # the scale Emoji Diffusion is guided by


class EmojiGraph(Graph):
    """Steps that the emoji workflows have in common."""

    def model(self, note: str, variant: str = "base") -> tuple[Added, Added]:
        """The first group: the note, loaders and Apply SUN; (loader, apply)."""
        with self.group("Model with SUN"):
            loader = self.add("SUN_LoadEmojiDiffusion", variant=variant)
            adapter = self.add("SUN_LoadAdapter", adapter_name=SHIPPED)
            applied = self.add("SUN_Apply", model=loader["model"], adapter=adapter[0])
            self.note(note)
        return loader, applied

    def prompt(self, clip: Ref, text: str, negative: bool = False, title: str = "") -> Ref:
        kind = "Negative prompt" if negative else "Positive prompt"
        return self.add("CLIPTextEncode", title or kind, RED if negative else GREEN, clip=clip, text=text)[0]

    def inputs(self, clip: Ref, text: str, without: str = "blurry") -> tuple[Ref, Ref, Ref]:
        """Positive prompt, negative prompt and an empty latent of this model's size."""
        positive, negative = self.prompt(clip, text), self.prompt(clip, without, negative=True)
        return positive, negative, self.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0]

    def sampler(self, model: Ref, positive: Ref, negative: Ref, latent: Ref, seed: int = 7, **settings: Any) -> Ref:
        return self.add(
            "SUN_Sampler", model=model, positive=positive, negative=negative, latent=latent, seed=seed, **settings
        )[0]

    def picture(self, samples: Ref, vae: Ref, save: bool = True) -> Ref:
        """VAE Decode and the picture."""
        image = self.add("VAEDecode", samples=samples, vae=vae)[0]
        if save:
            self.add("SaveImage", images=image, filename_prefix=self.name.replace(" ", "_"))
        else:
            self.add("PreviewImage", images=image)
        return image

    def first_picture(self, loader: Added, applied: Added, text: str, seed: int = 7) -> tuple[Ref, Ref]:
        """A group that makes the input picture; (picture, negative prompt)."""
        with self.group("Input picture (or put Load Image in its place)"):
            positive, negative, latent = self.inputs(loader["clip"], text)
            samples = self.sampler(applied[0], positive, negative, latent, seed)
            image = self.picture(samples, loader["vae"], save=False)
        return image, negative

    def right_half(self, width: int = 128, height: int = 128) -> Ref:
        """A mask, white on the right half."""
        black = self.add("SolidMask", "Nothing", value=0.0, width=width, height=height)[0]
        white = self.add("SolidMask", "Half", value=1.0, width=width // 2, height=height)[0]
        return self.add(
            "MaskComposite", "Right half (or draw a mask on a Load Image)", destination=black, source=white,
            x=width // 2, y=0, operation="add",
        )[0]  # fmt: skip


def text_to_image(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# SUN in 4 steps\n\nPress **Run**: this graph needs no download.\n\n**Load Emoji Diffusion** is a small Stable "
        "Diffusion that comes with SUN (128 x 128 emoji). **Apply SUN to Model** puts the 4-step adapter on it, and "
        "**SUN 4-step Sampler** makes the picture with one U-Net call a step.\n\nThings to try:\n- change the *negative* "
        "prompt only: `yellow background`\n- two things: `polar bear next to ghost, purple background`\n- strength 0 in "
        "Apply SUN: what 4 steps give without SUN\n\nSelect a node and press the **i** above it to read its page."
    )
    with g.group("Prompts"):
        positive, negative, latent = g.inputs(loader["clip"], "large polar bear, yellow background")
    with g.group("Picture"):
        g.picture(g.sampler(applied[0], positive, negative, latent), loader["vae"])


def sd15(g: EmojiGraph) -> None:
    with g.group("Model with SUN"):
        loader = g.add("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")
        adapter = g.add("SUN_LoadAdapter", adapter_name="sun_adapter_sdv15_4step_addpos.safetensors")
        applied = g.add("SUN_Apply", model=loader["MODEL"], adapter=adapter[0])
        g.note(
            "# SUN on Stable Diffusion 1.5\n\nTwo files are needed:\n1. an SD 1.5 checkpoint, or any model fine-tuned "
            "from it, in `models/checkpoints`\n2. the authors' adapter [sun_adapter_sdv15_4step_addpos.safetensors]"
            "(https://huggingface.co/Williechai/SpeedUpNet/tree/main) (77 MB) in `models/sun`\n\nPress **R** after copying them and choose them in the two loaders.\n\nLoRA, "
            "ControlNet and IP-Adapter go where they always go: on the model line before or after **Apply SUN to "
            "Model**.\n\nKSampler works too: 4 steps, cfg **1.0**, euler, **simple**."
        )
    with g.group("Prompts"):
        positive = g.prompt(loader["CLIP"], "portrait of an old fisherman, weathered face, golden hour, photo")
        negative = g.prompt(loader["CLIP"], "blurry, cartoon, deformed", negative=True)
        latent = g.add("EmptyLatentImage", width=512, height=512, batch_size=1)[0]
    with g.group("Picture"):
        g.picture(g.sampler(applied[0], positive, negative, latent), loader["VAE"])


def image_to_image(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Image to image\n\nThe first group draws a picture, the second paints over it. `denoise` of the second sampler "
        "is how much is made anew: at 0.75 SUN runs the last 3 of its 4 steps, at 0.5 the last 2, at 0.25 one.\n\nTo "
        "start from a picture of yours, delete the first group and connect **Load Image** to VAE Encode; 128 x 128 "
        "pixels suit this model. Pale pictures want more **guidance** in Apply SUN to Model: 2 is good here."
    )
    image, negative = g.first_picture(loader, applied, "large panda, pink background")
    with g.group("Painted over"):
        latent = g.add("VAEEncode", pixels=image, vae=loader["vae"])[0]
        positive = g.prompt(loader["clip"], "large polar bear, pink background")
        g.picture(g.sampler(applied[0], positive, negative, latent, denoise=0.75), loader["vae"])


def inpaint_mask(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Inpainting with a mask\n\nWorks with every model: only what is white in the mask is painted, the rest of the "
        "picture is put back at every step.\n\nThe mask is made by the three nodes of the group below. For your "
        "own, use **Load Image**, right-click it, *Open in MaskEditor*, and connect its two outputs.\n\nThe graph "
        "*SUN inpainting model* does the same with an inpainting model, which sees the rest of the picture."
    )
    image, negative = g.first_picture(loader, applied, "soccer ball, white background")
    with g.group("What to paint: white in the mask", below=True):
        mask = g.right_half()
    with g.group("Painted under the mask"):
        latent = g.add("VAEEncode", pixels=image, vae=loader["vae"])[0]
        latent = g.add("SetLatentNoiseMask", samples=latent, mask=mask)[0]
        positive = g.prompt(loader["clip"], "soccer ball, red background")
        g.picture(g.sampler(applied[0], positive, negative, latent, seed=8), loader["vae"])


def inpaint_model(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Inpainting with a 9-channel model\n\nAn inpainting model gets two things more than a text-to-image model: the "
        "mask and the picture without what is masked. **InpaintModelConditioning** hands them over.\n\nSUN goes on it as "
        "on any other model. For Stable Diffusion 1.5, load an inpainting checkpoint instead (`sd-v1-5-inpainting`).\n\n"
        "With `noise_mask` off the model alone decides what stays."
    )
    image, negative = g.first_picture(loader, applied, "soccer ball, white background")
    with g.group("Inpainting model with SUN, and the mask", below=True):
        painter = g.add("SUN_LoadEmojiDiffusion", "Load Emoji Diffusion (inpainting)", variant="inpainting")
        adapter = g.add("SUN_LoadAdapter", adapter_name=SHIPPED)
        painting = g.add("SUN_Apply", model=painter["model"], adapter=adapter[0])
        mask = g.right_half()
    with g.group("Painted under the mask"):
        positive = g.prompt(loader["clip"], "soccer ball, red background")
        given = g.add(
            "InpaintModelConditioning", positive=positive, negative=negative, vae=loader["vae"], pixels=image, mask=mask
        )
        g.picture(g.sampler(painting[0], given[0], given[1], given[2], seed=8), loader["vae"])


def controlnet(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# ControlNet\n\nThe second picture follows the edges of the first one. **Load Emoji ControlNet** finds the edges "
        "by itself; switch `find_edges` off to connect a drawing of white lines on black.\n\n`strength` and the start "
        "and end of its effect are set in **Apply ControlNet**. It costs no U-Net call.\n\nWith a Stable Diffusion 1.5 "
        "model use ComfyUI's **Load ControlNet Model** in its place."
    )
    image, negative = g.first_picture(loader, applied, "smiling face with sunglasses, purple background")
    with g.group("Drawn along its edges"):
        control = g.add("SUN_LoadEmojiControlNet")[0]
        positive = g.prompt(loader["clip"], "smiling face with sunglasses, pink background")
        steered = g.add(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=control, image=image
        )
        latent = g.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0]
        g.picture(g.sampler(applied[0], steered[0], steered[1], latent, seed=8), loader["vae"])


def lora(g: EmojiGraph) -> None:
    with g.group("Model with a LoRA and SUN"):
        loader = g.add("SUN_LoadEmojiDiffusion")
        styled = g.add("LoraLoaderModelOnly", model=loader["model"], lora_name=LORA_FILE, strength_model=1.0)
        adapter = g.add("SUN_LoadAdapter", adapter_name=SHIPPED)
        applied = g.add("SUN_Apply", model=styled[0], adapter=adapter[0])
        g.note(
            "# LoRA\n\nA LoRA of Emoji Diffusion comes with SUN: it draws in the style of Google's emoji, which the "
            "adapter never saw. Choose another of `models/loras` in **Load LoRA**, 0 for its strength to compare.\n\nThe "
            "LoRA may stand before or after **Apply SUN to Model**: the picture is the same. With Stable Diffusion 1.5, "
            "any SD 1.5 LoRA goes here."
        )
    with g.group("Prompts"):
        positive, negative, latent = g.inputs(loader["clip"], "large polar bear, yellow background")
    with g.group("Picture"):
        g.picture(g.sampler(applied[0], positive, negative, latent), loader["vae"])


def regions(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Two regions\n\nTwo prompts share a wide picture: the left one is bound to an *area* (a rectangle), the right "
        "one to a *mask*. **Conditioning (Combine)** puts them together.\n\nThe negative prompt acts on the whole "
        "picture. Every region costs a U-Net call a step: here 2 x 4."
    )
    with g.group("Left: an area"):
        left = g.prompt(loader["clip"], "smiling face with sunglasses, purple background", title="Left")
        left = g.add("ConditioningSetArea", conditioning=left, width=128, height=128, x=0, y=0, strength=1.0)[0]
    with g.group("Right: a mask", below=True):
        right = g.prompt(loader["clip"], "soccer ball, pink background", title="Right")
        mask = g.right_half(256, 128)
        right = g.add("ConditioningSetMask", conditioning=right, mask=mask, strength=1.0)[0]
    with g.group("Together"):
        positive = g.add("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
        negative = g.prompt(loader["clip"], "blurry", negative=True)
        latent = g.add("EmptyLatentImage", width=256, height=128, batch_size=1)[0]
        g.picture(g.sampler(applied[0], positive, negative, latent), loader["vae"])


LONG = ", ".join(["large panda, pink background"] * 12)
LONG_NEGATIVE = (
    "blurry, unsharp, noisy, dark, gray background, black background, white background, text, letters, numbers, frame, "
    "border, shadow, two animals, several animals, cat face, dog face, fox face, lion face, tiger face, bear face, a car, "
    "a house, a tree, a person, hands, fingers, low quality, bad drawing, cropped, cut off, out of the picture, too small"
)


def long_prompts(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Long prompts\n\nA prompt of more than 75 words' pieces is encoded in several blocks of 77. Both sides may be "
        "long, and they need not be of equal length: SUN reads each with an attention of its own.\n\nIt was trained with "
        "one block a side, so what matters most belongs to the beginning. This small model knows short captions only, so the "
        "prompt repeats itself."
    )
    with g.group("Prompts of more than 77 tokens"):
        positive, negative, latent = g.inputs(loader["clip"], LONG, LONG_NEGATIVE)
    with g.group("Picture"):
        g.picture(g.sampler(applied[0], positive, negative, latent), loader["vae"])


def custom_sampler(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# SamplerCustomAdvanced\n\nThe sampler in its parts, for graphs that are built this way. **SUN Scheduler** gives "
        "the timesteps the adapter was trained on, **SUN Guider** both prompts at one U-Net call a step.\n\nThe picture "
        "is that of **SUN 4-step Sampler** with the same seed. Other samplers that fit: `ddim`, `dpmpp_2m`."
    )
    with g.group("Prompts"):
        positive, negative, latent = g.inputs(loader["clip"], "large polar bear, yellow background")
    with g.group("Sampling"):
        noise = g.add("RandomNoise", noise_seed=7)[0]
        guider = g.add("SUN_Guider", model=applied[0], positive=positive, negative=negative)[0]
        sampler = g.add("KSamplerSelect", sampler_name="euler")[0]
        sigmas = g.add("SUN_Scheduler", model=applied[0], steps=4, denoise=1.0)[0]
        samples = g.add(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
        )[0]
        g.picture(samples, loader["vae"])


def upscale(g: EmojiGraph) -> None:
    loader, applied = g.model(
        "# Larger in a second pass\n\nThe first pass draws at the model's own size. Its latent is enlarged and painted "
        "over by a second SUN pass of one step (`denoise` 0.25), which makes edges sharp again.\n\n5 U-Net calls in all. "
        "With Stable Diffusion 1.5: 512 first, then 768 or 1024, and `denoise` 0.5."
    )
    with g.group("First pass, 128 x 128"):
        positive, negative, latent = g.inputs(loader["clip"], "large soccer ball, pink background")
        samples = g.sampler(applied[0], positive, negative, latent)
        g.picture(samples, loader["vae"], save=False)
    with g.group("Second pass, 160 x 160"):
        larger = g.add(
            "LatentUpscale", samples=samples, upscale_method="bicubic", width=160, height=160, crop="disabled"
        )[0]
        again = g.sampler(applied[0], positive, negative, larger, seed=8, denoise=0.25)
        g.picture(again, loader["vae"])


def without_adapter(g: EmojiGraph, note: str, *nodes: str) -> None:
    """25 steps with guidance, accelerated by `nodes`, which take a model and give one."""
    with g.group("Model, accelerated"):
        loader = g.add("SUN_LoadEmojiDiffusion")
        model = loader["model"]
        for node in nodes:
            model = g.add(node, model=model)[0]
        g.note(note)
    with g.group("25 steps with CFG"):
        positive, negative, latent = g.inputs(loader["clip"], "owl, pink background")
        samples = g.add(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=7, steps=25,
            cfg=CFG, sampler_name="dpmpp_2m", scheduler="simple", denoise=1.0,
        )[0]  # fmt: skip
        g.picture(samples, loader["vae"])


def ltc_accel(g: EmojiGraph) -> None:
    without_adapter(
        g,
        "LTC-Accel skips whole steps of **any** model; nothing is trained.\n\n"
        "It carries on what the model said in the steps before, from the first picture on, with any sampler. *fine* stays "
        "nearest to the usual picture, *fast* saves most; here *balanced* leaves out 8 of 25 steps, or fewer where the "
        "picture turns. The node says what its last run did.",
        "SUN_ApplyLtcAccel",
    )


def inheritance(g: EmojiGraph) -> None:
    without_adapter(
        g,
        "Feature inheritance leaves out the inner parts of the U-Net in some steps and takes what they gave in an earlier "
        "one. For SD 1.x, 2.x and SDXL, with any sampler; nothing is trained.\n\n"
        "*fine* stays nearest to the usual picture, *fast* saves most.",
        "SUN_ApplyFeatureInheritance",
    )


def switching(g: EmojiGraph) -> None:
    with g.group("Two models in one"):
        loader = g.add("SUN_LoadEmojiDiffusion")
        small = g.add("SUN_LoadEmojiDiffusion", variant="compact")
        model = g.add(
            "SUN_SwitchUNets", model=loader["model"], small_model=small["model"], share=0.4, order="small first"
        )[0]  # fmt: skip
        g.note(
            "# Two U-Nets take turns\n\nThe compact model makes the first 40 % of the steps, the base model the rest, in "
            "one run of the sampler. The node says how many calls each made.\n\nSet *share* to 0 or 1 for each of the two "
            "alone. With other models: SSD-1B and SDXL, BK-SDM and Stable Diffusion 1.x, or a U-Net of `sun assemble`.\n\n"
            "Compare it with fewer steps of the base model alone, which cost nothing to try."
        )
    with g.group("25 steps with CFG"):
        positive, negative, latent = g.inputs(loader["clip"], "owl, pink background")
        samples = g.add(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=7, steps=25,
            cfg=CFG, sampler_name="dpmpp_2m", scheduler="simple", denoise=1.0,
        )[0]  # fmt: skip
        g.picture(samples, loader["vae"])


def together(g: EmojiGraph) -> None:
    with g.group("Model with SUN and both accelerators"):
        loader = g.add("SUN_LoadEmojiDiffusion")
        adapter = g.add("SUN_LoadAdapter", adapter_name=SHIPPED)
        applied = g.add("SUN_Apply", model=loader["model"], adapter=adapter[0])
        inheriting = g.add("SUN_ApplyFeatureInheritance", model=applied[0], preset="fine")
        model = g.add("SUN_ApplyLtcAccel", model=inheriting[0])[0]
        g.note(
            "SUN with 8 steps, of which LTC-Accel skips two, and feature "
            "inheritance makes others cheaper. The order of the three does not matter.\n\n"
            "With 4 steps LTC-Accel has nothing to skip; feature inheritance still saves time, at a small loss."
        )
    with g.group("Sample"):
        positive, negative, latent = g.inputs(loader["clip"], "owl, pink background")
        g.picture(g.sampler(model, positive, negative, latent, steps=8), loader["vae"])


def compact(g: EmojiGraph) -> None:
    with g.group("Compact model"):
        loader = g.add("SUN_LoadEmojiDiffusion", variant="compact")
        g.note(
            "# A compact U-Net\n\nThe variant *compact* has a U-Net assembled from the base's layers: what changes its "
            "pictures least is left out. It takes everything a model takes here: "
            "samplers, **Apply LTC-Accel**, **Apply SUN to Model** (the adapter drops the layers that are gone).\n\n"
            "Compare: set the variant to *base*, same seed.\n\nA compact U-Net of your own model: `sun assemble` and "
            "`sun train-compact`; its single file goes into the stock **Load Checkpoint**."
        )
    with g.group("Sample"):
        positive, negative, latent = g.inputs(loader["clip"], "large polar bear, yellow background")
        samples = g.add(
            "KSampler", model=loader["model"], positive=positive, negative=negative, latent_image=latent, seed=7,
            steps=25, cfg=CFG, sampler_name="dpmpp_2m", scheduler="simple",
        )[0]  # fmt: skip
        g.picture(samples, loader["vae"])


# Names are the titles that ComfyUI shows under Templates.
GRAPHS: dict[str, Callable[[EmojiGraph], None]] = {
    "SUN text to image": text_to_image,
    "SUN image to image": image_to_image,
    "SUN inpainting with a mask": inpaint_mask,
    "SUN inpainting model": inpaint_model,
    "SUN with ControlNet": controlnet,
    "SUN with a LoRA": lora,
    "SUN two regions": regions,
    "SUN long prompts": long_prompts,
    "SUN custom sampler": custom_sampler,
    "SUN upscaling": upscale,
    "LTC-Accel skips steps": ltc_accel,
    "Feature inheritance": inheritance,
    "Switch U-Nets by step": switching,
    "SUN with both accelerators": together,
    "Compact U-Net": compact,
    "SUN with Stable Diffusion 1.5": sd15,
}


def build(name: str, schemas: Mapping[str, Any]) -> EmojiGraph:
    graph = EmojiGraph(name, schemas)
    GRAPHS[name](graph)
    return graph


def main(names: list[str]) -> None:
    from comfyui_host import load_builtin_extras, obtain_comfyui, schemas, start_comfyui

    with tempfile.TemporaryDirectory() as base:
        host = start_comfyui(obtain_comfyui(), Path(base))
        load_builtin_extras("nodes_mask", "nodes_custom_sampler")
        for name in names or list(GRAPHS):
            print(build(name, schemas(host.nodes)).save(WORKFLOWS))


if __name__ == "__main__":
    main(sys.argv[1:])
