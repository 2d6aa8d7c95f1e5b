// Usage: node node.js FOLDER TOKENS [ADAPTER...]    (the export, token ids such as 1,5,17, and safetensors files)
import { readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { generate } from "./generate.js";
import { LoraGraph } from "./lora.js";

const bytes = async (file) => new Uint8Array(await readFile(file)).buffer;
const [folder, tokens, ...adapters] = process.argv.slice(2);
const read = (name) => bytes(join(folder, name));
try {
  const graph = await LoraGraph.open(read);
  const { head_size } = JSON.parse(await readFile(join(folder, "genai_config.json"), "utf8")).model.decoder;
  const prompt = tokens.split(",").map(Number);
  for (const file of [undefined, ...adapters]) {
    const adapter = file && graph.adapter(await bytes(file), basename(file));
    console.log(`${file ?? "base model"}: ${await generate(graph, head_size, prompt, 8, adapter)}`);
  }
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 2;
}
