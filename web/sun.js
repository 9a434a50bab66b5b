/*
 * What the page adds to SUN's nodes: facts of the chosen adapter under its loader, the text of SUN Adapter Info in the
 * node, a line over the sampler about its run, and an orange frame on samplers whose cfg or scheduler does not fit SUN.
 * Asks only ComfyUI's own server. Whatever a page lacks (badges, stroke styles) is left out; no node stops working for it.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const ORANGE = "#f59a2e";
const FONT = "12px sans-serif";
const LINE_HEIGHT = 16;
const MARGIN = 15;
// Of ComfyUI's schedulers these two begin at full noise and visit the timesteps SUN was trained for.
const FITTING_SCHEDULERS = ["simple", "sgm_uniform"];
const MOST_STEPS = 12; // more are those of a model without SUN
const MUTED = 2;
const BYPASSED = 4;

// ------------------------------------------------------------------------------------------------------------- words

let words = {};

/** Reads this pack's texts (locales/LANGUAGE/main.json, key "sun") in the language of the page, else English. */
async function loadWords() {
  const translations = await (await api.fetchApi("/i18n")).json();
  const locale = app.ui?.settings?.getSettingValue?.("Comfy.Locale") || navigator.language || "en";
  words = { ...translations.en?.sun, ...translations[locale.split("-")[0]]?.sun, ...translations[locale]?.sun };
}

/** The text `key` with {names} filled in; empty when it is not known. */
function say(key, values = {}) {
  return (words[key] ?? "").replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

// --------------------------------------------------------------------------------------------------- text in a node

const measure = document.createElement("canvas").getContext("2d");

/** Splits text at spaces, and words at any letter (Chinese, paths), so that no line is wider than `width`. */
function wrap(text, width) {
  measure.font = FONT;
  const lines = [];
  for (const paragraph of text.split("\n")) {
    let line = "";
    for (const piece of paragraph.match(/\S+\s*|\s+/g) ?? [""]) {
      if (line && measure.measureText(line + piece.trimEnd()).width > width) {
        lines.push(line);
        line = "";
      }
      for (const letter of piece) {
        if (line && measure.measureText((line + letter).trimEnd()).width > width) {
          lines.push(line);
          line = "";
        }
        line += letter;
      }
    }
    lines.push(line);
  }
  return lines;
}

/**
 * Adds lines of text under a node's widgets. Returns show(text, needed, colour). Needed text makes the node grow; other
 * text fills the room there is, so that no node of an old graph comes to lie on its neighbour.
 * `beforeDraw` is called each time they are drawn.
 */
function addText(node, beforeDraw = () => {}) {
  let text = "";
  let needed = false;
  let colour;
  let lines = [];
  let wrappedFor = -1;
  const html = globalThis.LiteGraph?.vueNodesMode ? document.createElement("div") : null; // the page's other nodes
  if (html) html.style.cssText = "white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; padding: 2px 4px";
  const layOut = (width) => {
    if (width !== wrappedFor) {
      wrappedFor = width;
      lines = text ? wrap(text, width - 2 * MARGIN) : [];
    }
    return lines;
  };
  const widget = {
    type: "sun_text",
    name: "sun_text",
    value: "",
    serialize: false, // neither in the saved workflow
    options: { serialize: false }, // nor in the prompt
    // Asked for the least width a node may have; the lines are as long as the node is wide.
    computeSize: () => [0, needed ? layOut(node.size[0]).length * LINE_HEIGHT : 0],
    draw(ctx, _, width, y) {
      if (globalThis.LiteGraph?.vueNodesMode) return;
      beforeDraw();
      const room = needed ? Infinity : (node.size[1] - y) / LINE_HEIGHT;
      ctx.save();
      ctx.font = FONT;
      ctx.textAlign = "left";
      ctx.textBaseline = "top";
      ctx.fillStyle = colour ?? globalThis.LiteGraph?.WIDGET_SECONDARY_TEXT_COLOR ?? "#999";
      layOut(width).forEach((line, i) => i + 1 <= room && ctx.fillText(line, MARGIN, y + 2 + i * LINE_HEIGHT));
      ctx.restore();
    },
  };
  if (html) widget.element = html;
  node.addCustomWidget(widget);
  return (next, isNeeded, nextColour) => {
    [text, needed, colour, wrappedFor] = [next, isNeeded, nextColour, -1];
    widget.value = next;
    if (html) [html.textContent, html.style.color] = [next, colour ?? ""];
    const [, height] = node.computeSize();
    if (height > node.size[1]) node.setSize([node.size[0], height]);
    app.graph?.setDirtyCanvas(true, true);
  };
}

// ------------------------------------------------------------------------------------------------- over a node: badges

/**
 * Adds a badge over a node that shows what `text()` returns; nothing while that is empty.
 * Not on nodes made of HTML: they read badges once, and take the first for the page's own.
 */
function addBadge(node, text, bgColor) {
  const Badge = globalThis.LGraphBadge;
  if (!Badge || !Array.isArray(node.badges) || globalThis.LiteGraph?.vueNodesMode) return;
  let shown = new Badge({ text: "" });
  node.badges.unshift(() => {
    const now = text();
    if (now !== shown.text) shown = new Badge({ text: now, fgColor: "#fff", bgColor });
    return shown;
  });
}

// ----------------------------------------------------------------------------------------------------------- the nodes

/** `output` of a node's "executed" message as one string; nodes that send no text give an empty one. */
function textOf(output) {
  return [output?.text ?? []].flat(2).join("\n");
}

function afterRun(node, callback) {
  const original = node.onExecuted;
  node.onExecuted = function (output) {
    original?.apply(this, arguments);
    callback(textOf(output));
  };
}

const adapters = new Map(); // name -> promise of what to show of it
const UNKNOWN = ["", false];

async function describeAdapter(name) {
  const answer = await api.fetchApi(`/sun/adapter?name=${encodeURIComponent(name)}`);
  if (!answer.ok) return UNKNOWN;
  const facts = await answer.json();
  if (facts.error) return [facts.error, true, ORANGE];
  facts.millions = (facts.parameters / 1e6).toFixed(1);
  const lines = [
    say("base", { base: facts.base_model || say("not_recorded") }),
    say(facts.positive ? "both_branches" : "negative_branch", facts),
    facts.guidance_scale ? say(facts.takes_guidance_scale ? "trained_any" : "trained", facts) : "",
  ];
  return [lines.filter(Boolean).join("\n"), false];
}

function adapterLoader(node) {
  const combo = node.widgets?.find((widget) => widget.name === "adapter_name");
  if (!combo) return;
  let current = null;
  // Drawing follows every way a value changes on the canvas: a click, a loaded workflow, undo, a script.
  const show = addText(node, follow);
  node.setSize([node.size[0], node.size[1] + 3 * LINE_HEIGHT]); // a new node has room; a loaded one its saved size
  for (const [object, method] of [[combo, "callback"], [node, "onConfigure"]]) { // nodes made of HTML are not drawn
    const original = object[method];
    object[method] = function () {
      const result = original?.apply(this, arguments);
      follow();
      return result;
    };
  }

  function follow() {
    const name = combo.value;
    if (!adapters.has(name)) adapters.set(name, describeAdapter(name).catch(() => UNKNOWN));
    const asked = adapters.get(name);
    if (asked === current) return;
    current = asked;
    asked.then((answer) => asked === current && show(...answer));
  }
}

function adapterInfo(node) {
  const show = addText(node);
  node.setSize([Math.max(node.size[0], 380), node.size[1]]); // half of a file's hash
  afterRun(node, (text) => show(text, true));
}

function sampler(node) {
  let line = "";
  addBadge(node, () => line, "#2d4a36");
  const show = globalThis.LiteGraph?.vueNodesMode ? addText(node) : null; // in the badge's place
  afterRun(node, (text) => {
    line = text.split("\n")[0];
    show?.(line, false);
    app.graph?.setDirtyCanvas(true, true);
  });
}

// ------------------------------------------------------------------------------------------- settings that do not fit

function carriesModel(input) {
  return input.type === "MODEL" || input.type === "*"; // "*": Reroute
}

/** Whether the model that reaches `node` has come through Apply SUN to Model. */
function fedBySun(node, visited = new Set()) {
  return (node.inputs ?? []).some((input, slot) => {
    const source = carriesModel(input) && node.isInputConnected(slot) ? node.getInputNode(slot) : null;
    if (!source || visited.has(source)) return false;
    visited.add(source);
    const acts = source.mode !== MUTED && source.mode !== BYPASSED;
    return (acts && source.comfyClass === "SUN_Apply") || fedBySun(source, visited);
  });
}

/** The value in a node's widget; undefined when there is none, or when a link takes its place. */
function setting(node, name) {
  const linked = node.inputs?.some((input, slot) => input.widget?.name === name && node.isInputConnected(slot));
  return linked ? undefined : node.widgets?.find((widget) => widget.name === name)?.value;
}

/** What a sampler behind Apply SUN has to change, as a sentence; empty when all is well. */
function advice(node) {
  const cfg = setting(node, "cfg");
  const scheduler = setting(node, "scheduler");
  const wrong = [];
  if (setting(node, "steps") > MOST_STEPS) wrong.push("steps");
  if (typeof cfg === "number" && Math.abs(cfg - 1) > 1e-6) wrong.push("cfg");
  if (typeof scheduler === "string" && !FITTING_SCHEDULERS.includes(scheduler)) wrong.push("scheduler");
  if (!wrong.length || !fedBySun(node)) return "";
  return say("set", { what: wrong.map((name) => say(name)).join(say("and")) });
}

function watchSettings(node) {
  const names = (node.widgets ?? []).map((widget) => widget.name);
  const isSampler = names.includes("cfg") || names.includes("scheduler");
  if (!isSampler || !node.inputs?.some((input) => input.type === "MODEL")) return;
  addBadge(node, () => advice(node), "#8a4b08");
  if (node.strokeStyles) {
    node.strokeStyles.sunAdvice = () => (advice(node) ? { color: ORANGE, lineWidth: 3 } : undefined);
  }
}

const HELPERS = { SUN_LoadAdapter: adapterLoader, SUN_AdapterInfo: adapterInfo, SUN_Sampler: sampler };

app.registerExtension({
  name: "SUN.nodes",
  async setup() {
    try {
      await loadWords();
    } catch (error) {
      console.warn("SUN: its texts could not be loaded", error);
    }
  },
  nodeCreated(node) {
    try {
      (HELPERS[node.comfyClass] ?? watchSettings)(node);
    } catch (error) {
      console.warn(`SUN: ${node.comfyClass} is shown without its extras`, error);
    }
  },
  refreshComboInNodes() {
    adapters.clear(); // R was pressed: files may have changed
  },
});
