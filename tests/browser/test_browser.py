"""The pack as its users see it: ComfyUI's own page in Chromium, from dropping a workflow to reading an error.

`pytest -c tests/pytest.ini tests/browser --screenshots DIR` writes what it saw to DIR.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_host import REPOSITORY
from comfyui_server import Server
from PIL import Image

if TYPE_CHECKING:
    from page import Page
    from selenium.webdriver.remote.webelement import WebElement

WORKFLOWS = sorted(path.stem for path in (REPOSITORY / "example_workflows").glob("*.json"))
FIRST = "SUN text to image"
TITLE = 30  # height of a node's title, which stands over its position


def workflow(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def pictures(page: Page) -> list[str]:
    """Addresses of the pictures the saving node shows."""
    return page.node("SaveImage", "(node.imgs ?? []).map(image => image.src)")


def words(element: WebElement) -> str:
    """Text of an element, each run of white space as one space: pages break lines where they like."""
    return " ".join(element.text.split())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_an_example_opens_complete_and_tidy(page: Page, name: str) -> None:
    """Every node is known, and at the size the page gives it none lies on another."""
    page.drop(workflow(name), name)
    unknown = page.js("return app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert set(unknown) <= {"Note", "MarkdownNote"}, "missing nodes"
    assert page.js("return document.querySelector('.p-dialog')?.innerText ?? ''") == ""
    # Newer pages mark a loader whose file its user has yet to get; nothing else may be marked.
    absent = "n.widgets?.some(w => Array.isArray(w.options?.values) && !w.options.values.includes(w.value))"
    assert not page.js(f"return app.graph.nodes.filter(n => n.has_errors && !({absent})).map(n => n.type)")
    page.shoot(name)
    boxes = page.js("return app.graph.nodes.map(n => [n.title, n.pos[0], n.pos[1], n.size[0], n.size[1]])")
    overlaps = [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes, 2)
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] - TITLE < b[2] + b[4] and b[2] - TITLE < a[2] + a[4]
    ]
    assert not overlaps, f"{name}: nodes lie on each other"


def test_run_shows_previews_the_picture_and_what_happened(page: Page, server: Server) -> None:
    page.drop(workflow(FIRST), FIRST)
    loader = "node.widgets.find(w => w.name === 'sun_text')?.value"
    about = page.wait(lambda: page.node("SUN_LoadAdapter", loader), "tell of the adapter")
    assert "Emoji Diffusion" in about
    assert "16 layers" in about
    before = page.js("return window.seen.previews")
    page.run()
    (address,) = page.wait(lambda: pictures(page), "show the picture")
    assert page.js("return window.seen.previews") - before >= 3  # one a step, but for those that come too close
    picture = Image.open(io.BytesIO(server.fetch(address)))
    assert picture.size == (128, 128)
    line = page.wait(lambda: next((b for b in page.badges("SUN_Sampler") if "U-Net" in b), None), "tell of the run")
    assert re.fullmatch(r"4 U-Net calls, [\d.]+ s, 16 layers, negative 77 tokens", line)
    page.fit()
    page.shoot("run")
    page.set("SUN_Sampler", "steps", 12)
    before = page.js("return window.seen.previews")
    page.run()
    page.wait(lambda: page.js("return window.seen.previews") - before >= 4, "show previews")
    page.shoot("preview")
    page.wait(lambda: any(b.startswith("12 U-Net") for b in page.badges("SUN_Sampler")), "finish")


def test_adapter_info_shows_its_text_in_the_node(page: Page) -> None:
    page.drop(workflow(FIRST), FIRST)
    page.js(
        """
        const find = (type) => app.graph.nodes.find(node => node.type === type);
        const info = LiteGraph.createNode(arguments[0]);
        app.graph.add(info);
        find('SUN_LoadAdapter').connect(0, info, 0);
        for (const type of ['SaveImage', 'VAEDecode', 'MarkdownNote']) app.graph.remove(find(type));
        info.pos = [find('SUN_LoadAdapter').pos[0], find('SUN_LoadAdapter').pos[1] + 500];
        """,
        "SUN_AdapterInfo",
    )
    text = "node.widgets.find(w => w.name === 'sun_text')?.value"
    page.run()
    said = page.wait(lambda: page.node("SUN_AdapterInfo", text), "show the text")
    assert "Emoji Diffusion" in said
    assert page.node("SUN_AdapterInfo", "node.size[1] >= node.computeSize()[1]")
    page.focus("SUN_AdapterInfo")
    page.shoot("adapter-info", ["SUN_AdapterInfo"])


def test_nodes_made_of_html_work_too(page: Page) -> None:
    """ComfyUI's newer way to draw nodes, off by default in this version."""
    page.js("return app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.open()
        page.drop(workflow(FIRST), FIRST)
        page.element("[data-node-id]")

        def shown() -> str:
            return page.js("return [...document.querySelectorAll('[data-node-id]')].map(e => e.innerText).join('\\n')")

        page.wait(lambda: "M weights" in shown(), "tell of the adapter")
        page.run()
        page.wait(lambda: "4 U-Net calls" in shown(), "tell of the run")
        page.shoot("html-nodes")
        sampler = page.element(f"[data-node-id='{page.node('SUN_Sampler', 'String(node.id)')}']")
        assert sampler.text.split("\n").count("SUN") <= 1  # newer pages write the pack's name on its nodes: once
        page.js(WITH_KSAMPLER)
        page.set("KSampler", "cfg", 7.0)
        page.wait(lambda: "SUN: set steps to 4, cfg to 1.0" in shown(), "name the settings")
        page.shoot("html-settings")
        assert page.js("return window.seen.errors") == []
    finally:
        page.js("return app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.open()


def test_what_the_page_adds_is_not_saved(page: Page) -> None:
    page.drop(workflow(FIRST), FIRST)
    saved = page.js("return app.graph.serialize()")
    loader = next(node for node in saved["nodes"] if node["type"] == "SUN_LoadAdapter")
    assert loader["widgets_values"] == ["emoji-sun (shipped with SUN)"]
    prompt = page.driver.execute_async_script(
        "const done = arguments[0]; app.graphToPrompt().then(({output}) => done(output))"
    )
    inputs = next(node["inputs"] for node in prompt.values() if node["class_type"] == "SUN_LoadAdapter")
    assert inputs == {"adapter_name": "emoji-sun (shipped with SUN)"}


def test_settings_that_do_not_fit_are_named_over_the_sampler(page: Page) -> None:
    """Behind Apply SUN only, through a LoRA loader or a reroute, and no longer once they are put right."""
    page.drop(workflow(FIRST), FIRST)
    page.js(
        """
        const find = (type) => app.graph.nodes.find(node => node.type === type);
        const old = find('SUN_Sampler'), apply = find('SUN_Apply');
        const node = LiteGraph.createNode('KSampler'), lora = LiteGraph.createNode('LoraLoaderModelOnly');
        node.pos = [old.pos[0], old.pos[1] + 40]; lora.pos = [apply.pos[0], apply.pos[1] - 200];
        app.graph.add(node); app.graph.add(lora);
        apply.connect(0, lora, 0); lora.connect(0, node, 0);
        app.graph.remove(old);
        """
    )

    def advice() -> list[str]:
        return [text for text in page.badges("KSampler") if text.startswith("SUN")]

    page.set("KSampler", "cfg", 7.0)
    page.set("KSampler", "scheduler", "karras")
    assert advice() == ["SUN: set steps to 4, cfg to 1.0, scheduler to simple"]
    page.focus("KSampler")
    page.shoot("settings", ["KSampler"])
    page.set("KSampler", "steps", 8)
    page.set("KSampler", "cfg", 1.0)
    assert advice() == ["SUN: set scheduler to simple"]
    page.set("KSampler", "scheduler", "simple")
    assert advice() == []
    page.set("KSampler", "cfg", 7.0)
    page.node("SUN_Apply", "node.mode = 4")  # bypassed: the model is a plain one
    assert advice() == []


WITH_KSAMPLER = """
    const find = (type) => app.graph.nodes.find(node => node.type === type);
    const old = find('SUN_Sampler'), node = LiteGraph.createNode('KSampler');
    node.pos = [old.pos[0], old.pos[1]];
    app.graph.add(node);
    find('SUN_Apply').connect(0, node, 0);
    app.graph.remove(old);
"""


def test_settings_are_named_through_subgraphs(page: Page) -> None:
    """SUN in one, or the sampler: on the sampler, and on the node that stands for the subgraph it is in."""
    texts = "n => n.badges.map(b => (typeof b === 'function' ? b() : b).text).filter(t => t.startsWith('SUN:'))"
    page.drop(workflow(FIRST), FIRST)
    page.js(WITH_KSAMPLER)
    page.set("KSampler", "cfg", 7.0)
    page.js(
        """
        const inside = app.graph.nodes.filter(n => ['SUN_Apply', 'SUN_LoadAdapter'].includes(n.type));
        app.graph.convertToSubgraph(new Set(inside));
        """
    )
    assert page.js(f"return app.graph.nodes.filter(n => n.type === 'KSampler').map({texts})") == [
        ["SUN: set steps to 4, cfg to 1.0"]
    ]
    page.fit()
    page.shoot("subgraph-sun")
    page.drop(workflow(FIRST), FIRST)
    page.js(WITH_KSAMPLER)
    page.set("KSampler", "cfg", 7.0)
    page.js("app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(n => n.type === 'KSampler')))")
    outer, inner = page.js(
        f"""
        const outer = app.graph.nodes.find(n => n.subgraph), texts = {texts};
        return [texts(outer), texts(outer.subgraph.nodes.find(n => n.type === 'KSampler'))];
        """
    )
    assert outer == inner == ["SUN: set steps to 4, cfg to 1.0"]
    page.fit()
    page.shoot("subgraph-sampler")


def test_accelerators_show_what_a_run_did_on_their_nodes(page: Page) -> None:
    name = "SUN with both accelerators"
    page.drop(workflow(name), name)
    page.run()
    said = "node.widgets.find(w => w.name === 'sun_notice')?.value"
    page.wait(lambda: "saved" in (page.node("SUN_ApplyLtcAccel", said) or "").lower(), "tell of LTC-Accel's run")
    # of the 8 steps LTC-Accel leaves out two
    assert re.fullmatch(r"\d of 6 U-Net calls whole, \d inherited", page.node("SUN_ApplyFeatureInheritance", said))
    page.fit()
    page.shoot("accelerators")


def test_a_merge_says_that_sun_stays_behind(page: Page) -> None:
    """On the merging node; and not on a node that has the same number in another workflow."""
    page.drop(workflow(FIRST), FIRST)
    page.js(
        """
        const find = (type) => app.graph.nodes.find(node => node.type === type);
        const merge = LiteGraph.createNode('ModelMergeSimple'), save = LiteGraph.createNode('ModelSave');
        merge.pos = [find('SUN_Apply').pos[0], find('SUN_Apply').pos[1] + 300];
        for (const node of [merge, save]) app.graph.add(node);
        find('SUN_LoadEmojiDiffusion').connect(0, merge, 0);
        find('SUN_Apply').connect(0, merge, 1);
        merge.connect(0, save, 0);
        for (const type of ['SaveImage', 'VAEDecode', 'SUN_Sampler']) app.graph.remove(find(type));
        """
    )
    page.run()
    said = "node.widgets.find(w => w.name === 'sun_notice')?.value"
    page.wait(
        lambda: "first model of a merge alone" in (page.node("ModelMergeSimple", said) or ""), "tell of the merge"
    )
    page.focus("ModelMergeSimple")
    page.shoot("merge", ["ModelMergeSimple"])


def test_example_workflows_speak_the_page_s_language(page: Page) -> None:
    page.js("return app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    try:
        page.open()
        page.drop(workflow(FIRST), FIRST)
        note = page.node("MarkdownNote", "[node.title, node.widgets[0].value]")
        assert note[0] == "请先读"
        assert note[1].startswith("# 4 步 SUN")
        assert page.js("return app.graph.groups.map(group => group.title)") == ["带 SUN 的模型", "提示词", "图片"]
        page.shoot("workflow-zh")
    finally:
        page.js("return app.extensionManager.setting.set('Comfy.Locale', 'en')")
        page.open()
    page.drop(workflow(FIRST), FIRST)
    assert page.node("MarkdownNote", "node.widgets[0].value").startswith("# SUN in 4 steps")


@pytest.mark.parametrize(("language", "title"), [("zh", "SUN 4 步采样器"), ("en", "SUN 4-step Sampler")])
def test_the_help_page_opens_in_the_user_s_language(page: Page, language: str, title: str) -> None:
    page.js("return app.extensionManager.setting.set('Comfy.Locale', arguments[0])", language)
    page.open()
    page.drop(workflow(FIRST), FIRST)
    page.js("app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'SUN_Sampler')); app.canvas.draw(true)")
    page.element("[data-testid='info-button']").click()
    heading = page.element(".node-help-content h1")
    page.wait(lambda: heading.text == title, f"show the page {title}")
    page.shoot(f"help-{language}")
    page.element("[data-testid='info-button']").click()  # closes it


def test_a_broken_adapter_is_explained(page: Page) -> None:
    """Under the loader as soon as it is chosen, and in a sentence when it is run all the same."""
    page.drop(workflow(FIRST), FIRST)
    page.set("SUN_LoadAdapter", "adapter_name", "broken.safetensors")
    loader = "node.widgets.find(w => w.name === 'sun_text')?.value"
    page.wait(lambda: "broken" in (page.node("SUN_LoadAdapter", loader) or ""), "tell of the file")
    said = page.node("SUN_LoadAdapter", loader)
    assert re.fullmatch(r"broken\.safetensors is a truncated safetensors file .* Download or copy it again\.", said)
    page.focus("SUN_LoadAdapter")
    page.shoot("broken-adapter", ["SUN_LoadAdapter"])
    page.fit()
    page.run()
    error = page.error()
    page.wait(lambda: "broken.safetensors is a truncated safetensors file" in words(error), "explain the error")
    assert "Download or copy it again." in words(error)
    page.shoot("error")
    page.close_errors()


def test_a_missing_adapter_is_explained(page: Page) -> None:
    """Under the loader, and when it is run all the same: in a sentence or, in newer pages, by the input's name."""
    page.drop(workflow(FIRST), FIRST)
    page.set("SUN_LoadAdapter", "adapter_name", "gone.safetensors")
    loader = "node.widgets.find(w => w.name === 'sun_text')?.value"
    page.wait(lambda: "'gone.safetensors' is not there." in (page.node("SUN_LoadAdapter", loader) or ""), "tell of it")
    assert page.node("SUN_LoadAdapter", loader).endswith("Put it into models/sun and press R, or choose another.")
    page.run()
    error = page.error()
    sentence, name = "No SUN adapter named 'gone.safetensors'", "Load SUN Adapter - adapter_name"
    page.wait(lambda: sentence in words(error) or name in words(error), "explain the error")
    page.shoot("missing")
    page.close_errors()


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..%2F..%2Fsecret.safetensors", ""])
def test_the_page_learns_nothing_of_files_elsewhere(server: Server, name: str) -> None:
    answer = server.get(f"/sun/adapter?name={name}")
    assert answer.keys() == {"error"}
    assert answer["error"].endswith("is not there. Put it into models/sun and press R, or choose another.")


def test_the_script_of_the_pack_ran_without_a_complaint(page: Page) -> None:
    assert page.js("return window.seen.errors") == []
    ours = [line for line in page.said().splitlines() if "SUN:" in line or "/extensions/SUN/" in line]
    assert not [line for line in ours if "404" not in line]  # the page asks for NODE/en.md before it takes NODE.md
