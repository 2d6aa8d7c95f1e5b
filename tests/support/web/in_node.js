// Usage: node in_node.js FUNCTION ROOT REQUEST RESULT    (a function of logits.js)
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import * as functions from "./logits.js";

const [name, root, request, result] = process.argv.slice(2);
const read = async (name) => new Uint8Array(await readFile(join(root, name))).buffer;
const found = await functions[name](read, JSON.parse(await readFile(request, "utf8")));
await writeFile(result, JSON.stringify(found));
