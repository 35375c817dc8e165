// The model's side of the chat, in a thread of its own: transformers.js opens the folder that page.json names.

import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "./lib/transformers.min.js";

const MOST = 256; // tokens of an answer
const STEP = 4; // tokens between two looks at what the page wants
const here = new URL("./", self.location.href);
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false });
Object.assign(env.backends.onnx.wasm, { wasmPaths: new URL("lib/", here).href, numThreads: self.crossOriginIsolated ? undefined : 1 });

const post = (kind, content = {}) => self.postMessage({ kind, ...content });
let model, tokenizer;
let stopped = false;
let penalty = 1; // of tokens that were said before

async function open(device) {
  const page = await (await fetch(new URL("page.json", here))).json();
  post("named", { name: page.name });
  const folder = new URL(page.model, here);
  env.localModelPath = new URL("../", folder).pathname;
  const id = folder.pathname.split("/").filter(Boolean).at(-1);
  const sizes = new Map();
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status !== "progress") return;
    sizes.set(file, [loaded, total]);
    const [done, all] = [0, 1].map((n) => [...sizes.values()].reduce((sum, pair) => sum + pair[n], 0));
    post("loading", { loaded: done, total: all });
  };
  tokenizer = await AutoTokenizer.from_pretrained(id);
  model = await AutoModelForCausalLM.from_pretrained(id, { device, progress_callback });
  post("ready", { where: device === "webgpu" ? "GPU" : "processor" });
}

// Some tokens at a time, so that an order to stop is heard in between; the cache goes on.
async function talk(messages) {
  const { input_ids, attention_mask } = tokenizer.chat_template
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(messages.map(({ content }) => content).join("\n"));
  const prompt = input_ids.dims.at(-1);
  const ends = [model.generation_config?.eos_token_id ?? model.config.eos_token_id ?? []].flat().map(Number);
  const most = Math.min(MOST, (model.config.max_position_embeddings ?? Infinity) - prompt);
  if (most < 1) throw new Error(`The chat has ${prompt} tokens by now, which is all that the model reads. Load the page again.`);
  const began = performance.now();
  let ids = { input_ids, attention_mask };
  let past = null;
  let made = [];
  for (stopped = false; !stopped && made.length < most && !ends.includes(made.at(-1)); ) {
    const output = await model.generate({
      ...ids,
      past_key_values: past,
      max_new_tokens: Math.min(STEP, most - made.length),
      do_sample: false,
      repetition_penalty: penalty,
      return_dict_in_generate: true,
    });
    past = output.past_key_values;
    const all = output.sequences;
    ids = { input_ids: all, attention_mask: new Tensor("int64", new BigInt64Array(all.size).fill(1n), all.dims) };
    made = all.tolist()[0].slice(prompt).map(Number);
    post("words", { words: tokenizer.decode(made, { skip_special_tokens: true }) });
    await new Promise((resolve) => setTimeout(resolve));
  }
  post("done", { tokens: made.length, seconds: (performance.now() - began) / 1000 });
}

self.addEventListener("message", async ({ data }) => {
  try {
    if (data.do === "open") {
      penalty = data.penalty;
      await open(data.device);
    }
    else if (data.do === "talk") await talk(data.messages);
    else stopped = true;
  } catch (error) {
    post("failed", { reason: String(error?.message ?? error).split("\n")[0] });
  }
});
