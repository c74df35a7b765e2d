// Models that the page was given: their list, two texts, and the table of what each form of each makes of them.
import { call } from "./call.js";
import { addRow, at, clocks, digits, ratio } from "./table.js";

// What is read of a folder: other files, such as weights in other formats, stay where they are.
const wanted = (path) => /\.(json|safetensors|jinja)$/.test(path) && !/\/(\.|onnx\/|openvino\/)/.test(path);
const hint = (text) => { at("model-said").textContent = text; };
const models = [];
let usable = false;

function enable(on) {
  for (const id of ["folder", "parts"]) at(id).disabled = !on;
  for (const button of at("models").querySelectorAll("button")) button.disabled = !on;
  at("compare").disabled = !on || models.length === 0;
}

// Says whether there is a device; models that were read by one that is gone are forgotten.
export function setUsable(on) {
  usable = on;
  models.length = 0;
  list();
  enable(on);
}

function list() {
  const described = ({ name, stored, provenance, prompt }) => {
    const parts = [`${name}: linear layers ${stored}`, provenance, prompt && `prompt “${prompt}”`];
    return parts.filter(Boolean).join("; ");
  };
  at("models").replaceChildren(...models.map((model, number) => {
    const item = Object.assign(document.createElement("li"), { textContent: `${described(model)} ` });
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
    remove.setAttribute("aria-label", `Remove ${model.name}`);
    remove.addEventListener("click", async () => {
      models.splice(number, 1);
      list();
      enable(usable);
      await call("removeModel", [number]).catch((error) => hint(error.message));
    });
    item.append(remove);
    return item;
  }));
}

// Adds the model of some files, each with its path.
export async function addModel(files) {
  if (!usable) {
    hint("There is no GPU here to run a model on.");
    return;
  }
  enable(false);
  const read = files.filter(({ path }) => wanted(path));
  const bytes = read.reduce((sum, { file }) => sum + file.size, 0);
  hint(`Reading ${read.length} files, ${Math.ceil(bytes / 2 ** 20)} MiB …`);
  try {
    const about = await call("addModel", [read]);
    models.push(about);
    list();
    hint(`${about.name} is read.`);
  } catch (error) {
    hint(`This is no model that can be run here: ${error.message}.`);
  }
  enable(usable);
}

// The files of a drop that are a model's, each with its path: of folders all, else weights and what lies beside them.
// Entries are asked for at once, for a drop is over when its event is.
export function modelOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const isModel = entries.some((entry) => entry.isDirectory || entry.name.endsWith(".safetensors"));
  return isModel ? Promise.all(entries.map(filesOf)).then((all) => all.flat()) : null;
}

async function filesOf(entry) {
  const promised = (method) => new Promise((resolve, reject) => entry[method](resolve, reject));
  if (entry.isFile) return [{ path: entry.fullPath.replace(/^\//, ""), file: await promised("file") }];
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(filesOf))).flat();
}

async function compare() {
  enable(false);
  at("model-running").hidden = false;
  at("model-rows").replaceChildren();
  at("model-clock").textContent = "";
  const texts = [at("first").value, at("second").value];
  const counted = [];
  let clock = null;
  try {
    for (const [number, { name }] of models.entries()) {
      at("model-now").textContent = `${name}: verifying, then timing`;
      const share = (part) => { at("model-bar").value = (number + part) / models.length; };
      share(0);
      const { rows, tokens, truncated } = await call("compare", [number, texts], share);
      at("model-table").hidden = false;
      for (const row of rows) {
        const line = addRow(at("model-rows"), [
          [row.model], [row.form],
          [row.similarity === null ? "–" : row.similarity.toFixed(4), "number"],
          [digits(row.ms_per_text, row.noisy), "number"],
          [ratio(row.vs_dense, row.vs_dense_noisy), "number"],
          [row.verified ? "yes" : `FAILED: ${row.failure}`],
        ]);
        line.dataset.similarity = row.similarity;
        clock ??= row.clock;
      }
      const cut = truncated ? `, cut off where the model’s limit is` : "";
      counted.push(`${name} makes ${tokens.join(" and ")} tokens of the texts${cut}.`);
    }
    const by = clock ? ` Timed by ${clocks[clock]}. ~ marks figures that the samples leave too open.` : "";
    at("model-clock").textContent = counted.join(" ") + by;
    hint("Compared.");
  } catch (error) {
    hint(`The texts were not compared: ${error.message}.`);
  }
  at("model-running").hidden = true;
  enable(usable);
}

at("texts").addEventListener("submit", (event) => {
  event.preventDefault();
  compare();
});
for (const id of ["folder", "parts"]) {
  at(id).addEventListener("change", async ({ target }) => {
    const files = [...target.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
    target.value = "";
    if (files.length > 0) await addModel(files);
  });
}
