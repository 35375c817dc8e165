// The page's side of the chat: what is typed goes to the worker, what the model says comes back in pieces.
//
// index.html?device=webgpu runs the model on the GPU; on the processor otherwise. ?repetition_penalty=1 leaves tokens that
// were said before as likely as they are.

const find = (id) => document.getElementById(id);
const [status, progress, list, form, text, send] = ["status", "progress", "messages", "form", "text", "send"].map(find);
const wanted = new URLSearchParams(location.search);
const device = wanted.get("device") === "webgpu" ? "webgpu" : "wasm";
const penalty = Number(wanted.get("repetition_penalty")) || 1.2;
const worker = new Worker("worker.js", { type: "module" });
const messages = [];
let reply = null;

function say(state, words) {
  status.dataset.state = state;
  status.textContent = words;
  const ready = state === "ready";
  text.disabled = !ready;
  send.disabled = !ready && state !== "talking";
  send.textContent = state === "talking" ? "Stop" : "Send";
  if (ready) text.focus();
}

function show(role, words) {
  const item = document.createElement("li");
  item.dataset.role = role;
  item.textContent = words;
  list.append(item);
  item.scrollIntoView();
  return item;
}

const told = {
  named({ name }) {
    find("name").textContent = document.title = name;
  },
  loading({ loaded, total }) {
    progress.value = total ? loaded / total : 0;
    say("loading", `Loading … ${(loaded / 1e6).toFixed(0)} of ${(total / 1e6).toFixed(0)} MB`);
  },
  ready({ where }) {
    progress.hidden = true;
    say("ready", `Runs in this browser, on the ${where}. No text leaves this computer.`);
  },
  words({ words }) {
    reply.textContent = words;
    reply.scrollIntoView({ block: "end" });
  },
  done({ tokens, seconds }) {
    messages.push({ role: "assistant", content: reply.textContent });
    reply = null;
    say("ready", `${tokens} tokens in ${seconds.toFixed(1)} s, ${(tokens / seconds).toFixed(1)} tokens a second`);
  },
  failed({ reason }) {
    progress.hidden = true;
    say("error", reason);
  },
};

worker.addEventListener("message", ({ data }) => told[data.kind](data));
worker.addEventListener("error", (event) => told.failed({ reason: event.message || "The worker did not start." }));

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (status.dataset.state === "talking") {
    worker.postMessage({ do: "stop" });
    return;
  }
  const words = text.value.trim();
  if (!words || status.dataset.state !== "ready") return;
  text.value = "";
  messages.push({ role: "user", content: words });
  show("user", words);
  reply = show("model", "");
  say("talking", "The model writes …");
  worker.postMessage({ do: "talk", messages });
});

text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

worker.postMessage({ do: "open", device, penalty });
