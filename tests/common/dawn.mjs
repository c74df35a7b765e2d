// Compiles programs with Dawn, which is Chromium's WebGPU, in node: node dawn.mjs PATH_OF_THE_MODULE_webgpu PROGRAMS.json
// Dawn's null driver runs nothing, so that no driver is needed; it has f16. Prints the refused as a list in JSON.
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const [modulePath, programsPath] = process.argv.slice(2);
const { create, globals } = await import(pathToFileURL(modulePath));
Object.assign(globalThis, globals);
const compile = eval(fs.readFileSync(new URL("tint.js", import.meta.url), "utf8").replace(/^\/\/.*$/gm, ""));
// Held to the end: what comes from it does not keep it alive.
globalThis.gpu = create(["backend=null"]);
const adapter = await gpu.requestAdapter();
if (!adapter?.features.has("shader-f16")) throw new Error("Dawn has no null adapter with shader-f16");
const { maxComputeWorkgroupStorageSize, maxComputeInvocationsPerWorkgroup, maxComputeWorkgroupSizeX } = adapter.limits;
const device = await adapter.requestDevice({
  requiredFeatures: ["shader-f16"],
  requiredLimits: { maxComputeWorkgroupStorageSize, maxComputeInvocationsPerWorkgroup, maxComputeWorkgroupSizeX },
});
const refused = await compile(device, JSON.parse(fs.readFileSync(programsPath, "utf8")));
fs.writeFileSync(1, JSON.stringify(refused));
// Dawn's threads would keep the process; what is still to be written to a pipe would be lost.
process.exit(0);
