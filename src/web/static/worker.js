// Runs the library: WebGPU and the reference, away from the page's thread. It answers {id, call, args} with
// {id, value} or {id, error}, and sends {id, progress} in between.
import init, { Session, html, markdown } from "./sparse24_web.js";

let session = null;
let ready = null;

const calls = {
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
  html: (files) => html(JSON.stringify(files)),
  markdown: (files) => markdown(JSON.stringify(files)),
};

onmessage = async ({ data: { id, call, args } }) => {
  try {
    ready ??= init();
    await ready;
    postMessage({ id, value: await calls[call](...args, id) });
  } catch (error) {
    postMessage({ id, error: error instanceof Error ? error.message : String(error) });
  }
};
