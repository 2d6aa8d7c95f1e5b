// Greedy decoding in a decoder's graph, through its KV cache.
import * as ort from "onnxruntime-web";

const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

/** Inputs of a decoder's next step: all tokens so far, of which the first `past` are in the cache. */
export const step = (tokens, past) => ({
  input_ids: row(tokens.slice(past)),
  attention_mask: row(tokens.map(() => 1)),
  position_ids: row(tokens.map((_, i) => i).slice(past)),
});

/** Half-precision numbers are bits where JavaScript has no Float16Array; this puts them in order. */
const inOrder = (data) =>
  data instanceof Uint16Array ? Int32Array.from(data, (bits) => (bits < 32768 ? bits : 32768 - bits)) : data;

/** A cache without tokens; the head size is `model.decoder.head_size` in genai_config.json. */
export function emptyCache(graph, headSize, rows = 1) {
  const keys = graph.session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
  const empty = ({ type, shape }) =>
    new ort.Tensor(type, type === "float16" ? new Uint16Array(0) : new Float32Array(0), [rows, shape[1], 0, headSize]);
  return Object.fromEntries(keys.map((key) => [key.name, empty(key)]));
}

/** The cache for the next step, from this step's outputs. */
export const nextCache = (cache, outputs) =>
  Object.fromEntries(Object.keys(cache).map((name) => [name, outputs[name.replace("past_key_values", "present")]]));

/** The next `count` tokens after a prompt, with an adapter or without. */
export async function generate(graph, headSize, prompt, count, adapter) {
  const tokens = [...prompt];
  let cache = emptyCache(graph, headSize), past = 0;
  while (tokens.length < prompt.length + count) {
    const outputs = await graph.run({ ...step(tokens, past), ...cache }, adapter);
    cache = nextCache(cache, outputs);
    past = tokens.length;
    const last = inOrder(outputs.logits.data.slice(-outputs.logits.dims[2]));
    tokens.push(last.reduce((best, logit, i) => (logit > last[best] ? i : best), 0));
  }
  return tokens.slice(prompt.length);
}
