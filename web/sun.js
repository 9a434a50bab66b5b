/*
 * What the page adds to SUN's nodes: facts of the chosen adapter under its loader, the text of SUN Adapter Info in the
 * node, what a run did at the nodes it concerns, and an orange word on samplers whose cfg or scheduler does not fit SUN,
 * through subgraphs too. The example workflows it shows in the language of the page.
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
let workflowTexts = {}; // text of an example workflow in any language -> the same in the page's

/** Reads this pack's texts (locales/LANGUAGE/main.json) in the language of the page, else English. */
async function loadWords() {
  const translations = await (await api.fetchApi("/i18n")).json();
  const locale = app.ui?.settings?.getSettingValue?.("Comfy.Locale") || navigator.language || "en";
  const language = locale.split("-")[0];
  words = { ...translations.en?.sun, ...translations[language]?.sun, ...translations[locale]?.sun };
  const here = { ...translations[language]?.sun_workflows, ...translations[locale]?.sun_workflows };
  for (const { sun_workflows: texts = {} } of Object.values(translations)) {
    for (const [english, translated] of Object.entries(texts)) {
      for (const text of [english, translated]) workflowTexts[text] = here[english] ?? english;
    }
  }
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
function addText(node, beforeDraw = () => {}, name = "sun_text") {
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
    name,
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

function trainedFor(facts) {
  [facts.from, facts.to] = facts.guidance_range ?? [];
  if (!facts.takes_guidance_scale) return "trained";
  return facts.guidance_range ? "trained_range" : "trained_any";
}

async function describeAdapter(name) {
  const answer = await api.fetchApi(`/sun/adapter?name=${encodeURIComponent(name)}`);
  if (!answer.ok) return UNKNOWN;
  const facts = await answer.json();
  if (facts.error) return [facts.error, true, ORANGE];
  facts.millions = (facts.parameters / 1e6).toFixed(1);
  const lines = [
    say("base", { base: facts.base_model || say("not_recorded") }),
    say(facts.positive ? "both_branches" : "negative_branch", facts),
    facts.guidance_scale ? say(trainedFor(facts), facts) : "",
  ];
  return [lines.filter(Boolean).join("\n"), false];
}

function adapterLoader(node) {
  const combo = node.widgets?.find((widget) => widget.name === "adapter_name");
  if (!combo) return;
  let current = null;
  // Drawing follows every way a value changes on the canvas: a click, a loaded workflow, undo, a script.
  const show = addText(node, follow);
  measure.font = FONT;
  const longest = Math.max(...[combo.value, ...[combo.options?.values].flat().filter((name) => typeof name === "string")].map((name) => measure.measureText(name).width));
  // A new node has room for its text and the longest name, up to a bound; a loaded one has its saved size.
  node.setSize([Math.min(Math.max(node.size[0], longest + 200), 520), node.size[1] + 3 * LINE_HEIGHT]);
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

/** A line about a node's run: over it or, in nodes made of HTML, in it. Returns show(text). */
function addLine(node) {
  let line = "";
  addBadge(node, () => line, "#2d4a36");
  const show = globalThis.LiteGraph?.vueNodesMode ? addText(node, undefined, "sun_line") : null;
  return (text) => {
    line = text;
    show?.(line, false);
    app.graph?.setDirtyCanvas(true, true);
  };
}

function sampler(node) {
  const line = addLine(node);
  watch(node, { line });
  afterRun(node, (text) => line(text.split("\n")[0]));
}

// --------------------------------------------------------------------------------- what the server says of other nodes

const has = (slots, type) => (slots ?? []).some((slot) => slot.type === type);
const isLtc = (node) => node.comfyClass === "SUN_ApplyLtcAccel";
const isSwitch = (node) => node.comfyClass === "SUN_SwitchUNets";
// The nodes each of the server's texts is for: a run that goes on behind another workflow names nodes of its own.
const NOTICES = {
  "ltc_saved": isLtc,
  "ltc_real": isLtc,
  "ltc_measured": isLtc,
  "ltc_nothing": isLtc,
  "ltc_unused": isLtc,
  "inherited": (node) => node.comfyClass === "SUN_ApplyFeatureInheritance",
  "switched": isSwitch,
  "switched_swapped": isSwitch,
  "switched_alone": isSwitch,
  "switched_same": isSwitch,
  "switched_reversed": isSwitch,
  "ran": (node) => has(node.outputs, "LATENT") && (has(node.inputs, "MODEL") || has(node.inputs, "GUIDER")),
  "merged": (node) => has(node.inputs, "MODEL"),
  "saved": (node) => has(node.inputs, "MODEL"),
};
const WARNINGS = ["merged", "saved", "ltc_unused", "switched_alone", "switched_same", "switched_reversed"];
const noticed = new WeakMap(); // node -> its show(text, warning)

/** The node behind an id of the server; "12:5" is node 5 of the subgraph that node 12 stands for. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function noticeOn(node) {
  if (!noticed.has(node)) {
    const overIt = watched.get(node)?.line; // samplers: in the same place as the pack's own
    const inIt = overIt ? null : addText(node, undefined, "sun_notice");
    noticed.set(node, (text, warning) => (overIt ? overIt(text) : inIt(text, Boolean(text), warning ? ORANGE : undefined)));
  }
  return noticed.get(node);
}

function onNotice({ detail }) {
  const { node: id, text, values } = detail;
  const node = nodeOf(id);
  if (node && NOTICES[text]?.(node)) noticeOn(node)(say(text, values), WARNINGS.includes(text));
}

/** A node that runs anew says nothing any more of what it did before. */
function onExecuting({ detail }) {
  const node = detail == null ? null : nodeOf(detail.node ?? detail);
  if (node && noticed.has(node)) noticed.get(node)("", false);
}

// ------------------------------------------------------------------------------------------- settings that do not fit

const SUBGRAPH_INPUT = -10; // what ComfyUI names the place where wires enter a subgraph

function carriesModel(input) {
  return input.type === "MODEL" || input.type === "*"; // "*": Reroute
}

/** The link that ends in an input of a node. Nodes that stand for a subgraph give another one of their own. */
function linkInto(node, slot) {
  const getInputLink = globalThis.LiteGraph?.LGraphNode?.prototype.getInputLink ?? node.getInputLink;
  return getInputLink?.call(node, slot) ?? null;
}

/** The nodes that stand for a subgraph, in every graph of the workflow. */
function instancesOf(subgraph) {
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => (graph?.nodes ?? []).filter((node) => node.subgraph === subgraph));
}

/** Where the link `link` in `graph` comes from, as [node, output] pairs; more than one where a subgraph is used often. */
function origins(graph, link) {
  if (!link) return [];
  if (Number(link.origin_id) === SUBGRAPH_INPUT) {
    return instancesOf(graph).flatMap((node) => origins(node.graph, linkInto(node, link.origin_slot)));
  }
  const node = graph.getNodeById(link.origin_id);
  return node ? [[node, link.origin_slot]] : [];
}

/** Links inside a subgraph that end in its output `slot`. */
function linksToOutput(subgraph, slot) {
  const ids = subgraph.outputs?.[slot]?.linkIds ?? [];
  return ids.map((id) => subgraph.getLink?.(id) ?? subgraph.links?.get?.(id)).filter(Boolean);
}

/** Whether the model that link `link` in `graph` carries has come through Apply SUN to Model. */
function carriesSun(graph, link, visited) {
  return origins(graph, link).some(([source, slot]) => {
    const acts = source.mode !== MUTED && source.mode !== BYPASSED;
    if (acts && source.comfyClass === "SUN_Apply") return true;
    if (acts && source.subgraph) {
      return linksToOutput(source.subgraph, slot).some((inner) => carriesSun(source.subgraph, inner, visited));
    }
    return fedBySun(source, visited);
  });
}

/** Whether a model that reaches `node` has come through Apply SUN to Model. */
function fedBySun(node, visited = new Set()) {
  if (visited.has(node)) return false;
  visited.add(node);
  return (node.inputs ?? []).some(
    (input, slot) => carriesModel(input) && carriesSun(node.graph, linkInto(node, slot), visited),
  );
}

/** The value in a node's widget, or in that of the subgraph it is led out to; undefined when another node gives it. */
function setting(node, name) {
  if (name === undefined) return undefined;
  const slot = node.inputs?.findIndex((input) => input.widget?.name === name) ?? -1;
  const link = slot < 0 ? null : linkInto(node, slot);
  if (!link) return node.widgets?.find((widget) => widget.name === name)?.value;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return undefined;
  const values = instancesOf(node.graph).map((outer) => setting(outer, outer.inputs[link.origin_slot]?.widget?.name));
  return values.every((value) => value === values[0]) ? values[0] : undefined;
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

function isSampler(node) {
  const names = (node.widgets ?? []).map((widget) => widget.name);
  const settings = names.includes("cfg") || names.includes("scheduler");
  return settings && (node.inputs ?? []).some((input) => input.type === "MODEL");
}

/** What a node has to say of settings: its own or, for a subgraph, those of the samplers in it. */
function adviceOf(node, depth = 0) {
  if (!node.subgraph) return isSampler(node) && node.mode !== MUTED && node.mode !== BYPASSED ? advice(node) : "";
  if (depth > 8) return "";
  return (node.subgraph.nodes ?? []).map((inner) => adviceOf(inner, depth + 1)).find(Boolean) ?? "";
}

const watched = new Map(); // node -> {line, advise}

function watch(node, entry) {
  watched.set(node, entry);
  const original = node.onRemoved;
  node.onRemoved = function () {
    watched.delete(node);
    return original?.apply(this, arguments);
  };
}

function watchSettings(node) {
  if (!isSampler(node) && !node.subgraph) return;
  const entry = { line: node.subgraph ? null : addLine(node) };
  addBadge(node, () => adviceOf(node), "#8a4b08");
  if (node.strokeStyles) {
    node.strokeStyles.sunAdvice = () => (adviceOf(node) ? { color: ORANGE, lineWidth: 3 } : undefined);
  }
  if (globalThis.LiteGraph?.vueNodesMode && !node.subgraph) { // one for a subgraph takes its widgets from within
    const show = addText(node, undefined, "sun_advice");
    let shown = "";
    entry.advise = () => {
      const now = adviceOf(node);
      if (now !== shown) show((shown = now), false, ORANGE);
    };
  }
  watch(node, entry);
}

/** Nodes made of HTML are not drawn again when something before them changes: they are looked after. */
function adviseAll() {
  if (!globalThis.LiteGraph?.vueNodesMode || document.hidden) return;
  for (const { advise } of watched.values()) advise?.();
}

// ----------------------------------------------------------------------------- example workflows in the page's language

/** Notes, and titles of nodes and groups, of an example workflow; what its user has written stays. */
function translateExample(graph) {
  if (!graph?.extra?.sun_example) return;
  const translated = (text) => (Object.hasOwn(workflowTexts, text) ? workflowTexts[text] : text);
  for (const node of graph.nodes ?? []) {
    node.title = translated(node.title);
    if (node.type !== "MarkdownNote") continue;
    for (const widget of node.widgets ?? []) {
      if (typeof widget.value === "string") widget.value = translated(widget.value);
    }
  }
  for (const group of graph.groups ?? []) group.title = translated(group.title);
}

const HELPERS = { SUN_LoadAdapter: adapterLoader, SUN_AdapterInfo: adapterInfo, SUN_Sampler: sampler };

/** `callback`, whose failure is written to the console and stops nothing of the page. */
function guarded(callback) {
  return (...given) => {
    try {
      callback(...given);
    } catch (error) {
      console.warn("SUN: something of the page's extras failed", error);
    }
  };
}

// Values of Apply LTC-Accel in workflows saved before it had presets: tau, every, calibration. They mean "paper".
const OLD_LTC_VALUES = 3;

function readOldWorkflows(nodeType) {
  const configure = nodeType.prototype.configure;
  nodeType.prototype.configure = function (saved) {
    const values = saved?.widgets_values;
    const old = Array.isArray(values) && values.length === OLD_LTC_VALUES && typeof values[0] === "number";
    return configure.call(this, old ? { ...saved, widgets_values: ["paper", -1, -1, ...values] } : saved);
  };
}

app.registerExtension({
  name: "SUN.nodes",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === "SUN_ApplyLtcAccel") {
      readOldWorkflows(nodeType);
    }
  },
  async setup() {
    try {
      await loadWords();
    } catch (error) {
      console.warn("SUN: its texts could not be loaded", error);
    }
    api.addEventListener("sun.notice", guarded(onNotice));
    api.addEventListener("executing", guarded(onExecuting));
    setInterval(guarded(adviseAll), 700);
  },
  afterConfigureGraph() {
    guarded(translateExample)(app.rootGraph ?? app.graph);
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
