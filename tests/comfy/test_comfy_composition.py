"""SUN beside what else people put on a model: every order gives one picture, and every part of it acts."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_helpers import attention_blocks, make_adapter, make_lora, relative
from comfyui_host import load_builtin_extras

Feature = Callable[[Any], Any]
SAME = 1e-5  # relative; weights or attention added in another order may differ in the last bits


class ImageAttention:
    """What an IP-Adapter pack puts into an attn2 slot, by the same contract as ours.

    It computes the text's attention itself, adds attention over image tokens of its own within a range of sigmas, one
    set for rows of the positive and one for rows of the negative prompt, and others join it through `.add`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = [settings]

    def add(self, **settings: Any) -> None:
        self.settings.append(settings)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        heads, order = extra_options["n_heads"], extra_options["cond_or_uncond"]
        out = optimized_attention(q, k, v, heads)
        sigma = float(extra_options["sigmas"][0])
        for weight, images, start, end in (s.values() for s in self.settings):
            if end <= sigma <= start:
                rows = [images[i].expand(len(q) // len(order), -1, -1) for i in order]
                tokens = torch.cat(rows).to(q)
                generator = torch.Generator().manual_seed(q.shape[-1])
                to_k, to_v = (
                    torch.randn(tokens.shape[-1], q.shape[-1], generator=generator).to(q) * 0.1 for _ in range(2)
                )
                out = out + weight * optimized_attention(q, tokens @ to_k, tokens @ to_v, heads)
        return out

    @classmethod
    def put_on(cls, model: Any, weight: float = 1.0, start: float = 1e9, end: float = 0.0, seed: int = 0) -> Any:
        """As those packs do: join whatever is in the slot already, under a key without the depth."""
        model = model.clone()
        images = torch.randn(2, 1, 4, 128, generator=torch.Generator().manual_seed(seed))
        options = model.model_options.setdefault("transformer_options", {})
        slots = options.setdefault("patches_replace", {}).setdefault("attn2", {})
        settings = {"weight": weight, "images": images, "start": start, "end": end}
        for block in attention_blocks(model):
            if block in slots:
                slots[block].add(**settings)
            else:
                slots[block] = cls(**settings)
        return model


def couple(model: Any, texts: list[torch.Tensor], masks: torch.Tensor) -> Any:
    """Attention couple: each region's text [1, L, W] attends by itself, and `masks` [R, H, W] put the regions together.

    As the packs of that name do it: an attn2 patch makes the batch R times as long before the layer's attention, an
    output patch folds it after.
    """
    model, regions = model.clone(), len(texts)

    def split(n: Any, context: Any, value: Any, extra: dict[str, Any]) -> tuple[Any, Any, Any]:
        order = extra["cond_or_uncond"]
        queries, contexts = [], []
        for kind, rows, text in zip(order, n.chunk(len(order)), context.chunk(len(order)), strict=True):
            positive = kind == 0
            queries.append(rows.repeat(regions, 1, 1) if positive else rows)
            contexts += [t.to(text).expand(len(rows), -1, -1) for t in texts] if positive else [text]
        joined = torch.cat(contexts)
        return torch.cat(queries), joined, joined

    def join(n: Any, extra: dict[str, Any]) -> Any:
        order = extra["cond_or_uncond"]
        height, width = extra["original_shape"][-2:]
        shrink = round((height * width / n.shape[1]) ** 0.5)
        small = torch.nn.functional.interpolate(masks[None].to(n), size=(height // shrink, width // shrink))
        weights = small.reshape(regions, 1, -1, 1)
        batch = n.shape[0] // sum(regions if kind == 0 else 1 for kind in order)
        parts, first = [], 0
        for kind in order:
            rows = n[first : first + batch * (regions if kind == 0 else 1)]
            first += len(rows)
            parts.append((rows.unflatten(0, (regions, batch)) * weights).sum(0) if kind == 0 else rows)
        return torch.cat(parts)

    model.set_model_attn2_patch(split)
    model.set_model_attn2_output_patch(join)
    return model


def halves() -> torch.Tensor:
    """[2, 16, 16]: the left and the right half."""
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    return torch.stack([left, 1 - left])


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


@pytest.fixture(scope="module")
def run(run: SimpleNamespace) -> SimpleNamespace:
    """The same in two steps where a test asks for no other number: what acts once acts twice."""
    return SimpleNamespace(
        **{**vars(run), "sun": partial(run.sun, steps=2), "ksampler": partial(run.ksampler, steps=2)}
    )


@pytest.fixture(scope="module")
def lora_file(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(emoji_folder, tmp_path_factory.mktemp("lora"))


@pytest.fixture
def features(host: SimpleNamespace, run: SimpleNamespace, lora_file: Path) -> dict[str, Feature]:
    """Every way to change a MODEL that is tested here, each with other random content."""
    load_builtin_extras("nodes_pag", "nodes_sag", "nodes_freelunch")
    weights = host.comfy.utils.load_torch_file(str(lora_file))
    texts = [run.encode(text)[0][0] for text in ("red apple, white background", "snake, purple background")]

    def node(name: str, **settings: Any) -> Feature:
        kind = host.nodes[name]
        if hasattr(kind, "execute"):  # nodes of the newer kind
            return lambda model: kind.execute(model, **settings).result[0]
        return lambda model: getattr(kind(), kind.FUNCTION)(model, **settings)[0]

    return {
        "lora": lambda model: host.comfy.sd.load_lora_for_models(model, None, weights, 1.0, 0.0)[0],
        "ip-adapter": ImageAttention.put_on,
        "couple": lambda model: couple(model, texts, halves()),
        # The middle of this small model has 4 tokens, whose attention matters little: a scale far above the usual 3.
        "pag": node("PerturbedAttentionGuidance", scale=300.0),
        "sag": node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
        "freeu": node("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2),
    }


def steered(host: SimpleNamespace, run: SimpleNamespace, strength: float = 1.0) -> tuple[Any, Any]:
    """Positive and negative with the (random) emoji ControlNet on a drawn square."""
    lines = torch.zeros(1, 128, 128, 3)
    lines[:, 32:34, 32:96] = lines[:, 94:96, 32:96] = lines[:, 32:96, 32:34] = lines[:, 32:96, 94:96] = 1.0
    control = host.nodes["SUN_LoadEmojiControlNet"].execute(False).result[0]
    node = host.nodes["ControlNetApplyAdvanced"]()
    return node.apply_controlnet(run.positive, run.negative, control, lines, strength, 0.0, 1.0)


# In 2 steps, U-Net calls and those in which SUN acts. PAG calls the U-Net once more for the positive prompt; SAG twice
# more for the negative one, on which SUN does not act.
CALLS = {"lora": (2, 2), "ip-adapter": (2, 2), "couple": (2, 2), "pag": (4, 4), "sag": (6, 2), "freeu": (2, 2)}


@pytest.mark.parametrize("name", CALLS)
def test_before_and_after_sun_are_the_same(
    name: str, run: SimpleNamespace, emoji: SimpleNamespace, features: dict[str, Feature]
) -> None:
    feature = features[name]
    after = feature(run.apply())
    with run.count(after) as counts:
        picture = run.sun(after)
    assert (counts.unet, counts.sun / run.layers) == CALLS[name]
    assert picture.isfinite().all()
    assert relative(run.sun(run.apply(feature(emoji.model))), picture) < SAME
    assert relative(picture, run.sun(run.apply())) > 1e-3, f"{name} has no effect beside SUN"
    assert relative(picture, run.ksampler(feature(emoji.model))) > 1e-3, f"SUN has no effect beside {name}"


PAIRS = [
    ("lora", "ip-adapter"), ("lora", "pag"), ("ip-adapter", "pag"), ("ip-adapter", "sag"), ("ip-adapter", "couple"),
    ("lora", "couple"), ("couple", "pag"),
]  # fmt: skip
FIRST_PAIRS = PAIRS[:3]  # every way to take part once: weights, a slot of the attention, guidance


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id="+".join(pair), marks=[] if pair in FIRST_PAIRS else [pytest.mark.slow]) for pair in PAIRS],
)
def test_two_others_and_sun_in_any_order(
    pair: tuple[str, str], run: SimpleNamespace, emoji: SimpleNamespace, features: dict[str, Feature]
) -> None:
    steps = {"sun": run.apply, **{name: features[name] for name in pair}}
    pictures = {}
    # The two others keep their order among each other: whether that matters is theirs to say.
    for order in [("sun", *pair), (pair[0], "sun", pair[1]), (*pair, "sun")]:
        model = emoji.model
        for name in order:
            model = steps[name](model)
        pictures[order] = run.sun(model)
    (first, expected), *others = pictures.items()
    assert expected.isfinite().all()
    for order, picture in others:
        assert relative(picture, expected) < SAME, f"{order} and {first} differ"
    for name in pair:
        other = next(n for n in pair if n != name)
        assert relative(expected, run.sun(features[other](run.apply()))) > 1e-4, f"{name} has no effect"


def test_all_at_once_in_several_orders_with_a_controlnet(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, features: dict[str, Feature], random_extras
) -> None:
    steps = {"sun": run.apply, **{name: features[name] for name in ("lora", "ip-adapter", "freeu")}}
    positive, negative = steered(host, run)
    pictures = []
    for order in itertools.islice(itertools.permutations(steps), 0, None, 5):
        model = emoji.model
        for name in order:
            model = steps[name](model)
        pictures.append(run.sun(model, positive, negative))
    assert len(pictures) == 5
    assert all(relative(picture, pictures[0]) < SAME for picture in pictures[1:])
    assert relative(pictures[0], run.sun(model)) > 1e-3  # the ControlNet acts


# ------------------------------------------------------------------------------------------------------- each by itself


def test_an_ip_adapter_acts_in_its_range_alone(run: SimpleNamespace) -> None:
    model = run.apply()
    everywhere, nowhere = ImageAttention.put_on(model), ImageAttention.put_on(model, start=0.01)
    plain = run.sun(model, steps=4)
    assert relative(run.sun(nowhere, steps=4), plain) < SAME
    early = run.sun(ImageAttention.put_on(model, end=3.0), steps=4)  # the first two steps
    assert relative(early, plain) > 1e-3
    assert relative(early, run.sun(everywhere, steps=4)) > 1e-4


def test_two_ip_adapters_around_sun_are_both_there(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    def inner() -> Any:  # anew each time: in newer ComfyUI clones share what is in the slots, and `put_on` adds to it
        return ImageAttention.put_on(emoji.model, weight=0.5, seed=1)

    both = ImageAttention.put_on(run.apply(inner()), weight=0.5, seed=2)
    joined = ImageAttention.put_on(inner(), weight=0.5, seed=2)
    assert relative(run.sun(both), run.sun(run.apply(joined))) < SAME
    assert relative(run.sun(both), run.sun(run.apply(inner()))) > 1e-4


def test_equal_regions_are_no_regions(run: SimpleNamespace) -> None:
    """Attention couple with the same text in both halves must give the picture without it, positive branch included."""
    text = run.positive[0][0]
    model = run.apply()
    assert relative(run.sun(couple(model, [text, text], halves())), run.sun(model)) < 1e-4


def test_regions_in_a_batch(run: SimpleNamespace, features: dict[str, Feature]) -> None:
    model = features["couple"](run.apply())
    batch = run.sun(model, start=run.latent(batch=2))
    assert relative(batch[:1], run.sun(model)) < 1e-4


def test_each_region_has_its_own_text(shipped: SimpleNamespace) -> None:
    """Another text in the right half changes the first step's prediction of a trained model far more there than on the
    left."""
    run = shipped.run
    apple, snake = (run.encode(text)[0][0] for text in ("red apple, white background", "snake, purple background"))
    model = run.apply()
    one, other = (run.sun(couple(model, [apple, right], halves()), steps=1) for right in (apple, snake))
    change = (one - other).abs().mean((0, 1, 2))
    assert change[9:].mean() > 1.2 * change[:7].mean()


def test_a_controlnet_acts_within_its_percents(host: SimpleNamespace, run: SimpleNamespace, random_extras) -> None:
    model = run.apply()
    plain, full = run.sun(model), run.sun(model, *steered(host, run))
    assert relative(full, plain) > 1e-3
    assert torch.equal(run.sun(model, *steered(host, run, strength=0.0)), plain)
    control = host.nodes["SUN_LoadEmojiControlNet"].execute(False).result[0]
    node = host.nodes["ControlNetApplyAdvanced"]()
    late = node.apply_controlnet(run.positive, run.negative, control, torch.ones(1, 128, 128, 3), 1.0, 0.999, 1.0)
    assert torch.equal(run.sun(model, *late), plain)


def test_two_controlnets_in_a_row(host: SimpleNamespace, run: SimpleNamespace, random_extras) -> None:
    control = host.nodes["SUN_LoadEmojiControlNet"].execute(False).result[0]
    node = host.nodes["ControlNetApplyAdvanced"]()
    once = steered(host, run)
    twice = node.apply_controlnet(*once, control, torch.ones(1, 128, 128, 3), 0.5, 0.0, 1.0)
    model = run.apply()
    with run.count(model) as counts:
        picture = run.sun(model, *twice)
    assert (counts.unet, counts.sun) == (2, 2 * run.layers)
    assert relative(picture, run.sun(model, *once)) > 1e-4


def test_a_controlnet_reads_both_prompts_as_the_authors_code_did(
    host: SimpleNamespace, run: SimpleNamespace, random_extras
) -> None:
    """The negative's tokens after the positive's. Attention over a text twice is attention over it once: with the
    same words on both sides nothing changes."""
    model, node = run.apply(), host.nodes["SUN_ControlNetReadsBoth"]
    positive, negative = steered(host, run)
    alone = run.sun(model, positive, negative)
    both = node.execute(positive, run.negative).result[0]
    text = both[0][1]["cross_attn_controlnet"]
    assert torch.equal(text, torch.cat([run.positive[0][0], run.negative[0][0]], dim=1))
    assert relative(run.sun(model, both, negative), alone) > 1e-4
    same = node.execute(positive, run.positive).result[0]
    assert relative(run.sun(model, same, negative), alone) < 1e-4
    before = node.execute(run.positive, run.negative).result[0]  # or ahead of the ControlNet
    ahead = steered(host, SimpleNamespace(positive=before, negative=run.negative))[0]
    assert torch.equal(run.sun(model, ahead, negative), run.sun(model, both, negative))
    with pytest.raises(ValueError, match="Encode both with the CLIP"):
        node.execute(positive, [[torch.zeros(1, 77, 5), {}]])


@torch.no_grad()
def test_an_image_prompt_beside_sun_is_the_same_in_diffusers(host: SimpleNamespace) -> None:
    """One layer, the same weights: our patch around an image attention in the slot, and diffusers' IP-Adapter."""
    from comfy.ldm.modules.attention import optimized_attention
    from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0

    from sun.adapter import SunAdapter
    from sun.pipelines.processors import put_into

    torch.manual_seed(0)
    attn = Attention(16, cross_attention_dim=12, heads=2, dim_head=8, processor=IPAdapterAttnProcessor2_0(16, 12))
    attn.processor.scale[0] = 0.7
    adapter = SunAdapter([16], 12).eval()
    for parameter in adapter.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    x, text, negative, image = (torch.randn(2, n, w) for n, w in ((20, 16), (7, 12), (9, 12), (4, 12)))
    texts = adapter.texts([(1.0, negative)], text)
    put_into(attn, 0)
    ours = attn(x, encoder_hidden_states=(text, [image]), sun_negative=texts)

    patch = host.pack.nodes.sun_patch

    def images(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        to_k, to_v = attn.processor.to_k_ip[0], attn.processor.to_v_ip[0]
        return optimized_attention(q, k, v, 2) + 0.7 * optimized_attention(q, to_k(image), to_v(image), 2)

    forward = patch.SunForward(adapter, (), 1.0, None, [(1.0, negative)], text, texts, prior={0: images})
    extra = {patch.KEY: forward, "n_heads": 2}
    z = patch.attn2_of(0)(attn.to_q(x), attn.to_k(text), attn.to_v(text), extra)
    torch.testing.assert_close(attn.to_out[0](z), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pag", "sag"])
def test_guidance_nodes_leave_the_model_as_it_was(
    name: str, run: SimpleNamespace, emoji: SimpleNamespace, features: dict[str, Feature]
) -> None:
    model, plain = run.apply(), run.ksampler(emoji.model)
    expected = run.sun(model)
    run.sun(features[name](model))
    assert torch.equal(run.sun(model), expected)
    assert torch.equal(run.ksampler(emoji.model), plain)


def test_an_inpainting_model_carries_lora_and_image_prompts(
    host: SimpleNamespace, run: SimpleNamespace, features: dict[str, Feature], random_extras
) -> None:
    model = host.nodes["SUN_LoadEmojiDiffusion"].execute(variant="inpainting").result[0]
    plain = run.sun(run.apply(model))
    before = run.sun(run.apply(features["ip-adapter"](features["lora"](model))))
    after = run.sun(features["lora"](features["ip-adapter"](run.apply(model))))
    assert relative(before, after) < SAME
    assert relative(before, plain) > 1e-3


def test_the_guidance_scale_holds_where_others_change_the_text(
    host: SimpleNamespace, run: SimpleNamespace, emoji_folder: Path, tmp_path: Path
) -> None:
    """Regional prompters hand each layer its text, wrappers the whole U-Net: K and V are made anew, at that scale."""
    from comfy.patcher_extension import WrappersMP

    from sun import SunAdapter
    from sun.surgery import bake

    make_adapter(emoji_folder, tmp_path / "any.safetensors", guided=True)
    bake(SunAdapter.load(tmp_path / "any.safetensors"), 7.0).save(tmp_path / "seven.safetensors")
    load = host.part("nodes.loading").load_adapter
    anything, seven = (load(tmp_path / f"{name}.safetensors") for name in ("any", "seven"))
    texts = [run.encode(text)[0][0] for text in ("red apple, white background", "snake, purple background")]

    def other_text(executor: Any, x: Any, t: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(x, t, context * 1.01, *args, **kwargs)

    def wrapped(model: Any) -> Any:
        model = model.clone()
        model.add_wrapper(WrappersMP.DIFFUSION_MODEL, other_text)
        return model

    for change in (lambda model: couple(model, texts, halves()), wrapped):
        asked = run.sun(change(run.apply(adapter=anything, guidance=7.0)))
        baked = run.sun(change(run.apply(adapter=seven)))
        own = run.sun(change(run.apply(adapter=anything)))
        assert relative(asked, baked) < relative(own, baked) / 10


@pytest.mark.parametrize("what", ["SUN_ApplyLtcAccel", "SUN_ApplyFeatureInheritance"])
def test_a_node_that_copies_the_options_in_every_step(host: SimpleNamespace, run: SimpleNamespace, what: str) -> None:
    """Some guiders hand a deep copy of model_options on; the run's state must not fork with it."""
    from comfy.patcher_extension import WrappersMP

    node = host.nodes[what]
    arguments = ("balanced",) if what == "SUN_ApplyLtcAccel" else ("balanced", "")
    model = node.execute(run.apply(), *arguments).result[0]
    copying = model.clone()
    wrappers = copying.wrappers.setdefault(WrappersMP.PREDICT_NOISE, {})
    others = dict(wrappers)
    wrappers.clear()  # first in line, so that all that the pack hangs there sees the copy
    wrappers |= {"copying": [lambda executor, x, t, options, seed=None: executor(x, t, copy.deepcopy(options), seed)]}
    wrappers |= others
    assert torch.equal(run.ksampler(copying, steps=8), run.ksampler(model, steps=8))
