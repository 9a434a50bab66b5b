"""SUN together with IP-Adapters in diffusers: their attention over pictures is added to SUN's result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from einops import einsum, rearrange
from ip_adapters import image_embeds, ip_adapter, load
from tiny import TEXT_WIDTH, make_adapter

import sun
from sun.attention import sun_attention
from sun.pipelines.schedulers import make_scheduler
from sun.pipelines.unet import NEGATIVE


@pytest.fixture(scope="session")
def make_pipeline(make_short_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    return make_short_pipeline


def draw(pipe: Any, prompt: Any = "a cat", negative: Any = "a dog", images: Any = None, **options: Any) -> torch.Tensor:
    given = {"ip_adapter_image_embeds": images} if images is not None else {}
    return pipe(prompt, negative_prompt=negative, num_inference_steps=2, output_type="latent",
                generator=torch.Generator().manual_seed(1), **given, **options).images  # fmt: skip


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention written out."""
    q, k, v = (rearrange(x, "b t (h c) -> b h t c", h=heads) for x in (q, k, v))
    scores = einsum(q, k, "b h t c, b h l c -> b h t l") / q.shape[-1] ** 0.5
    return rearrange(einsum(scores.softmax(-1), v, "b h t l, b h l c -> b h t c"), "b h t c -> b t (h c)")


@pytest.fixture
def both(pipe: Any) -> Any:
    load(pipe, ip_adapter(pipe.unet))
    sun.attach(pipe, make_adapter(pipe.unet))
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "masks"])
def test_a_layer_is_suns_result_and_the_image_attentions_before_to_out(pipe: Any, kind: str) -> None:
    """By hand, two IP-Adapters of unequal scales, one with two pictures of which each has its part of the canvas."""
    load(pipe, ip_adapter(pipe.unet), ip_adapter(pipe.unet, seed=12, plus=True), scale=[0.8, 0.3])
    adapter = make_adapter(pipe.unet)
    sun.attach(pipe.unet, adapter)
    layer = sun.layers_of_unet(pipe.unet)[0]
    attn, own = pipe.unet.get_submodule(layer.diffusers), adapter.sun_layers()[0]
    generator = torch.Generator().manual_seed(5)
    x, text, negative = (torch.randn((2, n, w), generator=generator)
                         for n, w in ((64, layer.channels), (7, TEXT_WIDTH), (9, TEXT_WIDTH)))  # fmt: skip
    pictures = [torch.randn((2, n, 4, TEXT_WIDTH), generator=generator) for n in (1, 2)]
    masks = [torch.ones(1, 1, 8, 8), torch.zeros(1, 2, 8, 8)]
    masks[1][:, 0, :, :4], masks[1][:, 1, :, 4:] = 1, 1

    query, key, value = attn.to_q(x), attn.to_k(text), attn.to_v(text)
    z_p = attended(query, key, value, attn.heads)
    z_n = attended(query, own.to_k_neg(negative), own.to_v_neg(negative), attn.heads)
    z_e = attended(query, own.to_k_pos(text), own.to_v_pos(text), attn.heads)

    def normalized(z: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        ratio = z_p.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
        return alpha * z * rearrange(ratio, "b -> b 1 1") + beta

    z = z_p - normalized(z_n, own.alpha_neg, own.beta_neg) + normalized(z_e, own.alpha_pos, own.beta_pos)
    for i, (states, scale) in enumerate(zip(pictures, (0.8, 0.3), strict=True)):
        k, v = attn.processor.to_k_ip[i], attn.processor.to_v_ip[i]
        if kind == "plain":
            states = states.flatten(1, 2)
            z = z + scale * attended(query, k(states), v(states), attn.heads)
        else:
            for j in range(states.shape[1]):
                mask = rearrange(masks[i][0, j], "h w -> 1 (h w) 1")
                z = z + scale * mask * attended(query, k(states[:, j]), v(states[:, j]), attn.heads)
    expected = attn.to_out[0](z)

    texts = adapter.texts([(1.0, negative)], text)
    given = {"ip_adapter_masks": masks} if kind == "masks" else {}
    states = [s if kind == "masks" else s.flatten(1, 2) for s in pictures]
    found = attn(x, encoder_hidden_states=(text, states), sun_negative=texts, **given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    # ComfyUI's way (nodes/sun_patch.py): what the image attention's patch returns, and SUN's change on top
    z_sun = sun_attention(query, z_p, texts.layers[0], attn.heads)
    z_images = z - (z_p - normalized(z_n, own.alpha_neg, own.beta_neg) + normalized(z_e, own.alpha_pos, own.beta_pos))
    comfy = attn.to_out[0]((z_p + z_images) + (z_sun - z_p))
    torch.testing.assert_close(found, comfy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["sun", "ip"])
@pytest.mark.parametrize("plus", [False, True])
def test_both_act_in_either_order_and_leave_alone(make_pipeline: Any, count_calls: Any, first: str, plus: bool) -> None:
    pipe = make_pipeline()
    adapter, state, pictures = make_adapter(pipe.unet), ip_adapter(pipe.unet, plus=plus), [image_embeds(plus=plus)]
    plain = draw(pipe)
    sun.attach(pipe, adapter)
    alone = draw(pipe)
    if first == "ip":
        sun.detach(pipe)
    load(pipe, state)
    if first == "ip":
        sun.attach(pipe, adapter)
    calls = count_calls(pipe.unet)
    together = draw(pipe, images=pictures)
    assert calls.rows == [1, 1]
    assert (together - alone).abs().max() > 0.01
    assert (together - draw(pipe, negative="blue", images=pictures)).abs().max() > 0.01
    pipe.set_ip_adapter_scale(0.4)
    weaker = draw(pipe, images=pictures)
    assert not torch.equal(weaker, together)
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(draw(pipe, images=pictures), alone, rtol=1e-4, atol=1e-5)
    pipe.unload_ip_adapter()  # SUN stays
    assert torch.equal(draw(pipe), alone)
    load(pipe, state)
    assert torch.equal(draw(pipe, images=pictures), together)
    pipe.unload_ip_adapter()
    sun.detach(pipe)
    assert torch.equal(draw(pipe), plain)


def test_detach_leaves_the_ip_adapter_as_it_was_and_strength_zero_is_it_alone(pipe: Any) -> None:
    load(pipe, ip_adapter(pipe.unet))
    processors, pictures = pipe.unet.attn_processors, [image_embeds(2)]
    classes = {name: type(p) for name, p in processors.items()}
    guided = draw(pipe, images=pictures)
    pipe.scheduler, before = make_scheduler("ddim", pipe.scheduler.config), pipe.scheduler
    conditional = draw(pipe, images=[pictures[0][1:]], guidance_scale=1.0)
    pipe.scheduler = before
    keys = list(pipe.unet.state_dict())
    sun.attach(pipe, make_adapter(pipe.unet), strength=0.0)
    assert torch.equal(draw(pipe, images=pictures), conditional)
    assert list(pipe.unet.state_dict()) == keys  # its weights stay parts of the U-Net, which move and are saved with it
    sun.attach(pipe, make_adapter(pipe.unet))
    assert not torch.equal(draw(pipe, images=pictures), conditional)
    sun.detach(pipe)
    assert pipe.unet.attn_processors == processors
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == classes
    assert not [p for p in processors.values() if "position" in vars(p)]
    assert torch.equal(draw(pipe, images=pictures), guided)


def test_embeddings_made_for_guidance_count_with_their_pictures_half(both: Any) -> None:
    """``prepare_ip_adapter_image_embeds`` gives two rows to who prepares them for guidance; SUN has one."""
    halves = torch.cat([torch.zeros_like(image_embeds()), image_embeds()])
    assert torch.equal(draw(both, images=[halves]), draw(both, images=[image_embeds()]))


def test_batches_and_several_images_a_prompt(both: Any) -> None:
    """Each image keeps its own texts, beside one picture for all."""
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"images": [image_embeds()]}
    together = draw(both, ["a", "b"], ["x", "y"], num_images_per_prompt=2, latents=noise, **options)
    for i, (prompt, negative) in enumerate([("a", "x"), ("a", "x"), ("b", "y"), ("b", "y")]):
        alone = draw(both, prompt, negative, latents=noise[i : i + 1], **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_missing_picture_is_told_in_a_sentence(both: Any) -> None:
    with pytest.raises(ValueError, match=r"An IP-Adapter is loaded and this call has no picture.*unload_ip_adapter"):
        draw(both)


def test_a_copy_and_a_saved_pipeline(both: Any, tmp_path: Any) -> None:
    pictures = [image_embeds()]
    expected = draw(both, images=pictures)
    other = copy.deepcopy(both)
    sun.detach(both)
    assert torch.equal(draw(other, images=pictures), expected)
    both.unload_ip_adapter()
    both.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    sun.attach(again, make_adapter(again.unet))
    load(again, ip_adapter(again.unet))
    torch.testing.assert_close(draw(again, images=pictures), expected)


def test_the_processors_follow_the_unets_number_format(both: Any) -> None:
    exact = draw(both, images=[image_embeds()])
    both.to(torch.bfloat16)
    rough = draw(both, images=[image_embeds().bfloat16()])
    assert {p.dtype for p in both.unet.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(rough.float(), exact, rtol=0.2, atol=0.2)


def test_an_ip_adapters_layers_without_its_projection_are_told(both: Any) -> None:
    text = torch.randn(1, 5, TEXT_WIDTH)
    both.unet.encoder_hid_proj = None
    both.unet.config.encoder_hid_dim_type = None
    with pytest.raises(ValueError, match="no encoder_hid_proj"):
        both.unet(torch.randn(1, 4, 8, 8), 500, text, cross_attention_kwargs={NEGATIVE: text})
