// Logits of a graph for runs with several adapters, in one session.
import * as ort from "onnxruntime-web";
import { emptyCache, nextCache } from "./generate.js";
import { LoraGraph } from "./lora.js";

ort.env.wasm.numThreads = 1;

const feed = ([name, { dims, data }]) => [name, new ort.Tensor("int64", BigInt64Array.from(data, BigInt), dims)];

/** Numbers of half precision from their bits, as in node 20. */
function half(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return (bits & 32768 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** What each batch gives with each adapter: the logits of its steps. `read` is described in lora.js. */
export async function logits(read, { folder, graph: file, head_size: headSize, batches, adapters }) {
  const graph = await LoraGraph.open((name) => read(`${folder}/${name}`), file);
  const found = batches.map(() => []);
  for (const name of adapters) {
    const adapter = name ? graph.adapter(await read(name), name) : undefined;
    for (const [i, { rows, steps }] of batches.entries()) {
      let cache = headSize ? emptyCache(graph, headSize, rows) : {};
      const run = [];
      for (const feeds of steps) {
        const outputs = await graph.run({ ...Object.fromEntries(Object.entries(feeds).map(feed)), ...cache }, adapter);
        cache = nextCache(cache, outputs);
        const { dims, data } = outputs.logits;
        run.push({ dims, data: Array.from(data, data instanceof Uint16Array ? half : Number) });
      }
      found[i].push(run);
    }
  }
  return found;
}

/** What a graph says to each of these adapters' files; null if it takes them. */
export async function refusals(read, { folder, graph: file, adapters }) {
  const graph = await LoraGraph.open((name) => read(`${folder}/${name}`), file);
  const said = [];
  for (const name of adapters) {
    try {
      graph.adapter(await read(name), name);
      said.push(null);
    } catch (error) {
      said.push(error.message);
    }
  }
  return said;
}
