// What the page shows and does. All work is the worker's; this thread only waits for its answers.
import { call, isBroken, start } from "./call.js";
import { addModel, modelOf, setUsable } from "./model.js";
import { addRow, at, clocks, digits, ratio } from "./table.js";

const say = (text) => { at("said").textContent = text; };
const status = (text) => { at("status").textContent = text; };
// How often the worker was started anew: what an earlier one had is gone.
let restarts = 0;

// Names of the browser and the system, as far as they are told.
function browser() {
  const brands = navigator.userAgentData?.brands ?? [];
  const own = brands.find((brand) => !/not.?a.?brand|^chromium$/i.test(brand.brand)) ?? brands.at(-1);
  const full = navigator.userAgent.match(/(Firefox|Edg|OPR|HeadlessChrome|Chrome|Version)\/([\d.]+)/);
  const version = full?.[2] ?? own?.version ?? "";
  const others = { Version: "Safari", Edg: "Edge", OPR: "Opera" };
  const name = own?.brand ?? others[full?.[1]] ?? full?.[1] ?? "unknown browser";
  return `${name} ${version}`.trim();
}

const system = () => navigator.userAgentData?.platform ?? navigator.platform ?? "unknown";

async function gpuName() {
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) return null;
  const { description, device, vendor, architecture } = adapter.info ?? {};
  return description || [vendor, architecture, device].filter(Boolean).join(" ") || "unnamed GPU";
}

function show(rows) {
  at("table").hidden = false;
  for (const row of rows) {
    addRow(at("rows"), [
      [row.name], [`${row.m}x${row.n}x${row.k}`], [row.dtype], [row.op], [row.vector ?? "", "number"],
      [digits(row.median_ms, row.noisy), "number"],
      [ratio(row.speedup_vs_dense, row.speedup_noisy), "number"],
      [row.verified ? "yes" : `FAILED: ${row.failure}`],
    ]);
  }
  const clock = rows.find((row) => row.clock)?.clock;
  if (clock) at("clock").textContent = `Timed by ${clocks[clock]}. ~ marks figures that the samples leave too open.`;
}

// This run's file, and those that were added.
let own = null;
const added = [];
const files = () => [...(own ? [{ name: "this device", text: own }] : []), ...added];

function showPage(html) {
  at("download").disabled = !own;
  at("copy").disabled = files().length === 0;
  at("page").hidden = false;
  at("page").srcdoc = html;
}

async function measure(set) {
  at("start").disabled = true;
  at("running").hidden = false;
  at("rows").replaceChildren();
  at("clock").textContent = "";
  own = null;
  const now = (text) => { at("now").textContent = text; };
  const era = restarts;
  let lost = false;
  try {
    const layers = await call("begin", [set]);
    const share = (done) => { at("bar").value = done / (layers.length + 1); };
    say("Measuring has begun.");
    share(0);
    let done = 0;
    for (const [number, layer] of layers.entries()) {
      const what = `${layer.name} ${layer.m}x${layer.n}x${layer.k} ${layer.dtype}`;
      now(`${what}: verifying, then timing`);
      try {
        show(await call("measure", [number], (part) => share(done + part)));
      } catch (error) {
        say(`${what} was not measured: ${error.message}`);
        lost = /lost/.test(error.message);
        if (lost || isBroken() || era !== restarts) throw error;
        await call("skip", [what, error.message]);
      }
      share(++done);
      if (done === 1) {
        now("What this GPU can do at most");
        await call("ceilings").catch((error) => say(`What this GPU can do at most is not known: ${error.message}`));
      }
    }
    share(layers.length + 1);
    now("Done");
  } catch (error) {
    now(`Stopped: ${error.message}`);
  }
  // What was measured until then is kept.
  try {
    if (at("rows").children.length > 0 && era === restarts) {
      own = await call("json");
      at("download").disabled = false;
      showPage(await call("html", [files()]));
    }
    say(lost ? "The GPU is gone: reload the page to measure again." : `${at("now").textContent}.`);
  } catch (error) {
    say(error.message);
  }
  at("start").disabled = lost;
}

async function add(list) {
  // A copy: a list of the browser's own changes while files are read.
  for (const file of [...list]) {
    say(`Reading ${file.name} …`);
    try {
      const one = { name: file.name, text: await file.text() };
      // Refused where it is no file of results, or holds what is there already.
      const html = await call("html", [[...files(), one]]);
      added.push(one);
      at("added").append(Object.assign(document.createElement("li"), { textContent: file.name }));
      showPage(html);
      say(`${file.name} was added.`);
    } catch (error) {
      say(error.message.includes(file.name) ? error.message : `${file.name}: ${error.message}`);
    }
  }
}

function save() {
  const url = URL.createObjectURL(new Blob([own], { type: "application/json" }));
  const link = Object.assign(document.createElement("a"), { href: url, download: "sparse24-web.json" });
  document.body.append(link);
  link.click();
  link.remove();
  // Some browsers read it later.
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function copy() {
  if (!navigator.clipboard) throw new Error("the browser gives its clipboard to pages with HTTPS alone");
  // A promise, because the click counts for as long as nothing was awaited.
  const text = call("markdown", [files()]).then((markdown) => new Blob([markdown], { type: "text/plain" }));
  await navigator.clipboard.write([new ClipboardItem({ "text/plain": text })]);
  say("The report is in the clipboard, as Markdown.");
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  measure(new FormData(event.target).get("set"));
});
at("download").addEventListener("click", save);
at("copy").addEventListener("click", () => copy().catch((error) => say(error.message)));
at("files").addEventListener("change", async (event) => {
  await add(event.target.files);
  event.target.value = "";
});
addEventListener("dragenter", () => document.body.classList.add("dropping"));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const model = modelOf(event.dataTransfer);
  if (!model) {
    await add(event.dataTransfer.files);
    return;
  }
  try {
    await addModel(await model);
  } catch (error) {
    say(`What was dropped cannot be read: ${error.message}`);
  }
});

// Opens the GPU, and says what it is; `failure` is what the worker before this one ended with.
async function open(failure) {
  setUsable(false);
  at("start").disabled = true;
  try {
    if (!navigator.gpu) throw new Error("this browser has no WebGPU, or not on this system");
    const gpu = await gpuName();
    if (gpu === null) throw new Error("the browser offers no GPU: it may be blocked, or switched off in the settings");
    const url = location.origin + location.pathname;
    const about = await call("open", [{ browser: browser(), os: system(), gpu, url }]);
    const what = about.kind === "software"
      ? `${about.name}: a driver that computes on the processor. Its times say nothing about a GPU.`
      : about.name;
    const before = failure ? ` There was an error: ${failure.message}; models have to be chosen again.` : "";
    status(what + before);
    at("facts").replaceChildren(...about.facts.flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    ]));
    at("start").disabled = false;
    setUsable(true);
  } catch (error) {
    status(`Nothing can be measured here: ${error.message}. Files of results can be shown all the same.`);
  }
}

start((failure) => {
  restarts += 1;
  open(failure);
});
await open(null);
