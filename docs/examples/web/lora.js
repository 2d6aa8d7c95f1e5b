// Load and swap LoRA adapters in a graph of `loraover export onnx --mode swappable --web`, in a browser or in node.
import * as ort from "onnxruntime-web";

const TYPES = { F32: ["float32", Float32Array], F16: ["float16", Uint16Array] };
const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));

/** Tensors and metadata of a safetensors file: the length of a JSON header in 8 bytes, the header, and the data. */
function readSafetensors(buffer, name) {
  try {
    const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
    const { __metadata__: metadata = {}, ...entries } = parse(new Uint8Array(buffer, 8, start - 8));
    const tensor = ([key, { dtype, shape, data_offsets: [from, to] }]) => {
      const [type, Numbers] = TYPES[dtype];
      const data = new Numbers(buffer, start + from, (to - from) / Numbers.BYTES_PER_ELEMENT);
      return [key, new ort.Tensor(type, data, shape)];
    };
    return { metadata, tensors: Object.fromEntries(Object.entries(entries).map(tensor)) };
  } catch (error) {
    throw new Error(`${name} is not a complete safetensors file of F32 or F16 (${error.message})`);
  }
}

export class LoraGraph {
  /** Open a graph; `read` returns a file of its folder, by name, as an ArrayBuffer. */
  static async open(read, file = "model.onnx") {
    const layout = parse(await read("swappable.json"));
    if (!layout.web) throw new Error("this graph was exported without --web, so onnxruntime-web cannot load it");
    const externalData = [{ path: `${file}.data`, data: new Uint8Array(await read(`${file}.data`)) }];
    const session = await ort.InferenceSession.create(new Uint8Array(await read(file)), { externalData });
    return new LoraGraph(session, layout, file);
  }

  /** `base` fills every LoRA input with a matrix of rank 0, which gives the base model. */
  constructor(session, layout, file) {
    const [type, Numbers] = TYPES[layout.dtype === "fp16" ? "F16" : "F32"];
    const empty = ([site, { input, features }]) =>
      [input, new ort.Tensor(type, new Numbers(0), site.endsWith("lora_A") ? [features, 0] : [0, features])];
    const places = Object.entries(layout.places).filter(([, place]) => place.graph === file);
    Object.assign(this, { session, baseModel: layout.base_model, base: Object.fromEntries(places.map(empty)) });
  }

  /** The LoRA inputs in an adapter's file; `name` is for messages. */
  adapter(buffer, name) {
    const { metadata, tensors } = readSafetensors(buffer, name);
    const refuse = (found) => {
      throw new Error(`${name} ${found}; export the adapter for this graph: loraover export onnx ... --web --graph`);
    };
    if (metadata.base_model !== this.baseModel) refuse(`is for ${metadata.base_model}, not for ${this.baseModel}`);
    for (const [input, { type, dims }] of Object.entries(this.base)) {
      const found = tensors[input], at = dims[0] ? 0 : 1; // the other dimension is the rank
      if (!found) refuse(`has no ${input}, which the graph needs`);
      if (found.type !== type || found.dims.length !== 2 || found.dims[at] !== dims[at]) {
        refuse(`has ${input} as ${found.type} of [${found.dims}], expected ${type} with ${dims[at]} in place ${at}`);
      }
    }
    const unknown = Object.keys(tensors).find((input) => !this.base[input]);
    if (unknown) refuse(`has ${unknown}, which the graph does not take`);
    return tensors;
  }

  /** Run the graph with an adapter, or as the base model. Each run may take another adapter. */
  run(feeds, adapter = this.base) {
    const known = Object.entries(feeds).filter(([name]) => this.session.inputNames.includes(name));
    return this.session.run({ ...Object.fromEntries(known), ...adapter });
  }
}
