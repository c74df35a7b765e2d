// Calls of the worker: each is a message, and its answer keeps a promise.
const waiting = new Map();
const stages = { starting: "starting", running: "running", broken: "broken" };
let stage = stages.starting;
let worker = null;
let reason = null;
let last = 0;
let onRestart = async () => {};

// Calls a function of static/worker.js. Rejected where it fails, and where the worker does.
export function call(name, args = [], progress = null) {
  const id = ++last;
  return new Promise((resolve, reject) => {
    if (stage === stages.broken) {
      reject(reason);
      return;
    }
    waiting.set(id, { resolve, reject, progress });
    worker.postMessage({ id, call: name, args });
  });
}

export const isBroken = () => stage === stages.broken;

// Starts the worker. `restarted` is called when it failed and another was started, with what went wrong.
export function start(restarted) {
  onRestart = restarted;
  begin();
}

function begin() {
  worker = new Worker("worker.js", { type: "module" });
  const own = worker;
  own.onmessage = ({ data: { id, value, error, progress, panic } }) => {
    if (own !== worker) return;
    if (panic !== undefined) {
      fail(panic);
      return;
    }
    const request = waiting.get(id);
    if (progress !== undefined) {
      request?.progress?.(progress);
      return;
    }
    stage = stages.running;
    waiting.delete(id);
    if (error === undefined) request?.resolve(value);
    else request?.reject(new Error(error));
  };
  own.onerror = (event) => {
    event.preventDefault();
    if (own === worker) fail(event.message || "this browser cannot start the page’s worker");
  };
}

// A worker that never answered would fail again; one that did is replaced.
function fail(text) {
  worker.terminate();
  const failed = [...waiting.values()];
  waiting.clear();
  if (stage === stages.running) {
    const error = new Error(`the program of this page failed (${text}) and was started anew`);
    stage = stages.starting;
    begin();
    for (const { reject } of failed) reject(error);
    onRestart(error);
  } else {
    stage = stages.broken;
    reason = new Error(text);
    for (const { reject } of failed) reject(reason);
  }
}
