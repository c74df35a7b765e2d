// Figures in rows of tables.
export const at = (id) => document.getElementById(id);

export const digits = (x, noisy = false) =>
  x === null || x === undefined ? "–" : (noisy ? "~" : "") + x.toPrecision(4);

export const ratio = (x, noisy) => (x ? `${noisy ? "~" : ""}${x.toFixed(2)}x` : "–");

export const clocks = {
  gpu_timestamps: "the GPU’s own timestamps",
  host_wall: "the clock of the browser, waiting included",
};

// A row of cells, each a text and the class of its cell.
export function addRow(body, cells) {
  const line = body.insertRow();
  for (const [text, kind] of cells) {
    const cell = line.insertCell();
    cell.textContent = text;
    if (kind) cell.className = kind;
  }
  return line;
}
