// Creates the shader module of each program on a WebGPU device, and its pipeline where it has constants for one, all at
// once. Returns a line for each program that is refused.
async (device, programs) => {
  const refusal = async ({ code, constants }) => {
    const module = device.createShaderModule({ code });
    const { messages } = await module.getCompilationInfo();
    const error = messages.find(message => message.type === "error");
    if (error) return `line ${error.lineNum}, ${code.split("\n")[error.lineNum - 1]}: ${error.message}`;
    if (!constants) return;
    const compute = { module, entryPoint: "main", constants };
    await device.createComputePipelineAsync({ layout: "auto", compute });
  };
  // All modules are created before the first of them is waited for. What is wrong with them is asked of each.
  device.pushErrorScope("validation");
  const lines = programs.map(program => refusal(program).catch(e => e.message).then(why => why && `${program.name}: ${why}`));
  await device.popErrorScope();
  return (await Promise.all(lines)).filter(Boolean);
}
