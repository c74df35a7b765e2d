// Runs the library: WebGPU and the reference, away from the page's thread. It answers {id, call, args} with
// {id, value} or {id, error}, and sends {id, progress} in between. {panic} says that it can do nothing more.
import init, { ModelFiles, Session, html, markdown } from "./sparse24_web.js";

let session = null;
let ready = null;
let turn = Promise.resolve();

// The library calls it where it panics: what it was asked is never answered then.
self.panicked = (panic) => postMessage({ panic });

// A session does one thing at a time.
const inTurn = (work) => (...args) => {
  const answer = turn.then(() => work(...args));
  turn = answer.catch(() => {});
  return answer;
};

const ofSession = {
  async open(place) {
    session = await Session.open(JSON.stringify(place));
    return JSON.parse(session.about());
  },
  begin: (set) => JSON.parse(session.begin(set)),
  ceilings: () => session.measure_ceilings(),
  async measure(number, id) {
    const progress = (share) => postMessage({ id, progress: share });
    return JSON.parse(await session.measure(number, progress));
  },
  skip: (name, reason) => session.skip(name, reason),
  json: () => session.json(),
  async addModel(files) {
    const given = new ModelFiles();
    for (const { path, file } of files) given.add(path, new Uint8Array(await file.arrayBuffer()));
    return JSON.parse(session.add_model(given));
  },
  removeModel: (number) => session.remove_model(number),
  async compare(number, texts, id) {
    const progress = (share) => postMessage({ id, progress: share });
    return JSON.parse(await session.compare(number, ...texts, progress));
  },
};

const calls = {
  ...Object.fromEntries(Object.entries(ofSession).map(([name, work]) => [name, inTurn(work)])),
  html: (files) => html(JSON.stringify(files)),
  markdown: (files) => markdown(JSON.stringify(files)),
};

onmessage = async ({ data: { id, call, args } }) => {
  try {
    ready ??= init();
    await ready;
    postMessage({ id, value: await calls[call](...args, id) });
  } catch (error) {
    // Such as a stack or a memory that is full.
    if (error instanceof WebAssembly.RuntimeError) self.panicked(error.message);
    else postMessage({ id, error: error instanceof Error ? error.message : String(error) });
  }
};
