// Runs a folder for transformers.js, for `qalora.parity.runtimes.node`: an order a line on stdin, as JSON; for each a
// line of JSON on stdout, and, where it has "bytes", so many behind it: float32 logits.
//
// The packages come from NODE_PATH alone, by require: what lies in the folder that the process works in is not run.

import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";
import readline from "node:readline";

const [folder, backend, threads] = process.argv.slice(2);
const require = createRequire(path.join(path.parse(process.execPath).root, "nowhere.js"));
const PACKAGE = "@huggingface/transformers";
console.log = console.info = console.warn = console.error = () => {};

function version(entry) {
  for (let place = path.dirname(entry); place !== path.dirname(place); place = path.dirname(place)) {
    const file = path.join(place, "package.json");
    if (fs.existsSync(file)) {
      const content = JSON.parse(fs.readFileSync(file, "utf8"));
      if (content.name && content.version) return `${content.name} ${content.version}`;
    }
  }
  throw new Error(`${entry}: no package.json above it`);
}

function tensors(Tensor) {
  return (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
}

// onnxruntime-web by itself, as transformers.js depends on it and in the build that it has in browsers, which has fewer
// kernels than the one for WASM alone: a session of the graph, from bytes.
async function openWeb(library) {
  const entry = createRequire(library).resolve("onnxruntime-web/webgpu");
  const ort = require(entry);
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "fatal";
  const config = JSON.parse(fs.readFileSync(path.join(folder, "config.json"), "utf8"));
  const settings = config["transformers.js_config"];
  const name = `model_${settings.dtype}.onnx`;
  const bytes = (one) => new Uint8Array(fs.readFileSync(path.join(folder, "onnx", one)));
  const names = Array.from({ length: settings.use_external_data_format }, (_, n) => `${name}_data${n ? `_${n}` : ""}`);
  const session = await ort.InferenceSession.create(bytes(name), {
    executionProviders: ["wasm"],
    externalData: names.map((one) => ({ path: one, data: bytes(one) })),
  });
  const tensor = tensors(ort.Tensor);
  const past = session.inputNames.filter((one) => one.startsWith("past_key_values."));
  const heads = config.num_key_value_heads;
  return {
    version: version(entry),
    async run(ids, mask, cache) {
      const empty = () => new ort.Tensor("float32", new Float32Array(0), [ids.length, heads, 0, config.head_dim]);
      const feed = { input_ids: tensor(ids), attention_mask: tensor(mask) };
      for (const one of past) feed[one] = cache ? cache[one] : empty();
      const output = await session.run(feed);
      return [output.logits, cached(output)];
    },
  };
}

async function openLibrary(library) {
  const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = require(library);
  Object.assign(env, { allowRemoteModels: false, useFSCache: false, useBrowserCache: false });
  env.localModelPath = path.dirname(folder) + path.sep;
  const id = path.basename(folder);
  const options = { device: "cpu", session_options: { intraOpNumThreads: Number(threads), interOpNumThreads: 1 } };
  const model = await AutoModelForCausalLM.from_pretrained(id, options);
  const worded = fs.existsSync(path.join(folder, "tokenizer.json"));
  const tokenizer = worded ? await AutoTokenizer.from_pretrained(id) : null;
  const tensor = tensors(Tensor);
  const own = createRequire(library).resolve("onnxruntime-node");
  return {
    version: `${version(library)}, ${version(own)}`,
    ends: model.generation_config?.eos_token_id ?? model.config.eos_token_id ?? [],
    worded,
    async run(ids, mask, cache) {
      const inputs = { input_ids: tensor(ids), attention_mask: tensor(mask) };
      const output = await model({ ...inputs, past_key_values: cache });
      return [output.logits, cached(output)];
    },
    async generate(ids, count) {
      const inputs = { input_ids: tensor([ids]), attention_mask: tensor([ids.map(() => 1)]) };
      const plain = { do_sample: false, num_beams: 1, repetition_penalty: 1, no_repeat_ngram_size: 0 };
      const output = await model.generate({ ...inputs, ...plain, max_new_tokens: count });
      return output.tolist()[0].slice(ids.length).map(Number);
    },
    tokens: (text, around) => tokenizer.encode(text, { add_special_tokens: around }),
  };
}

// What a step gives, as the next one takes it.
function cached(output) {
  const kept = {};
  for (const name in output) {
    if (name.startsWith("present")) kept[name.replace("present", "past_key_values")] = output[name];
  }
  return kept;
}

function answer(content, data) {
  const bytes = data ? Buffer.from(data.buffer, data.byteOffset, data.byteLength) : Buffer.alloc(0);
  const line = Buffer.from(JSON.stringify({ ...content, bytes: bytes.length }) + "\n");
  for (const part of [line, bytes]) {
    for (let at = 0; at < part.length; ) {
      try {
        at += fs.writeSync(1, part, at);
      } catch (error) {
        if (error.code !== "EAGAIN") throw error;
      }
    }
  }
}

let runtime;
let cache = null;

async function obey(order) {
  if (order.do === "open") {
    const library = require.resolve(PACKAGE);
    runtime = await (backend === "wasm" ? openWeb : openLibrary)(library);
    answer({ version: runtime.version, ends: [runtime.ends ?? []].flat(), worded: runtime.worded ?? false });
  } else if (order.do === "run") {
    const [logits, next] = await runtime.run(order.ids, order.mask, order.onwards ? cache : null);
    cache = next;
    answer({ shape: logits.dims }, logits.data);
  } else if (order.do === "generate") {
    answer({ tokens: await runtime.generate(order.ids, order.count) });
  } else if (order.do === "tokens") {
    answer({ tokens: Array.from(runtime.tokens(order.text, order.around), Number) });
  } else {
    throw new Error(`no order ${order.do}`);
  }
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  try {
    await obey(JSON.parse(line));
  } catch (error) {
    answer({ error: String(error?.message ?? error).split("\n")[0].slice(0, 500) });
  }
}
process.exit(0);
