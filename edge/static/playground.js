// The playground: what any client could send, and what came of it. No build step, nothing fetched
// from elsewhere. The key stays in this tab (sessionStorage), or comes as #key=... in the address.

const $ = (id) => document.getElementById(id);
const SCHEMA = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 40 },
    age: { type: "integer", minimum: 0, maximum: 120 },
    hobbies: { type: "array", items: { type: "string", maxLength: 20 }, maxItems: 3 },
  },
  required: ["name", "age", "hobbies"],
  additionalProperties: false,
};
const TOOLS = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city now",
    parameters: {
      type: "object",
      properties: {
        city: { type: "string", maxLength: 40 },
        unit: { enum: ["celsius", "fahrenheit"] },
      },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
}];

let turns = [];                      // of the chat, as the API takes them
let session = crypto.randomUUID();   // one a chat: its turns go where its prefix is cached
let aborting = null;                 // of the request that is being answered
let servedBy = null;                 // the region that answered last

// --- asking ---------------------------------------------------------------------------------

function headers() {
  const made = {
    "authorization": `Bearer ${$("key").value.trim()}`,
    "content-type": "application/json",
    "x-session-affinity": session,
  };
  const [latitude, longitude] = $("place").value.split(",");
  if (longitude) Object.assign(made, { "cf-iplatitude": latitude, "cf-iplongitude": longitude });
  return made;
}

function body(messages) {
  return {
    model: $("model").value,
    messages,
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value) || 512,
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  const said = await answer.json();
  if (!answer.ok) throw new Error(message(said, answer.status));
  return said;
}

function message(said, status) {
  return said?.error?.message ?? said?.errors?.[0]?.message ?? `HTTP ${status}`;
}

// Runs one chat completion and hands on each delta; returns what there is to say of it.
async function run(asked, hear) {
  aborting = new AbortController();
  const began = performance.now();
  let first = null, usage = null, reason = null;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(asked), signal: aborting.signal,
    });
    if (!answer.ok) throw new Error(message(await answer.json().catch(() => null), answer.status));
    servedBy = answer.headers.get("x-served-by");
    for await (const event of events(answer.body)) {
      if (event.error || event.errors?.length) throw new Error(message(event, "stream"));
      const choice = event.choices?.[0];
      const delta = choice?.delta ?? {};
      if (first === null && (delta.content || delta.reasoning_content || delta.tool_calls)) {
        first = performance.now();
      }
      reason = choice?.finish_reason ?? reason;
      usage = event.usage ?? usage;
      hear(delta);
    }
  } finally {
    aborting = null;
  }
  return { region: servedBy, usage, reason, ttft: first && first - began,
           decode: first && performance.now() - first };
}

// The data of server-sent events, as JSON, until [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// --- saying ---------------------------------------------------------------------------------

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").classList.toggle("bad", bad);
}

function figures(outcome) {
  const used = outcome.usage ?? {};
  const rate = used.completion_tokens > 1 && outcome.decode
    ? (1000 * (used.completion_tokens - 1) / outcome.decode).toFixed(1) : "-";
  const parts = [
    ["served by", outcome.region ?? "-"],
    ["first token", outcome.ttft === null ? "-" : `${outcome.ttft.toFixed(0)} ms`],
    ["tokens/s", rate],
    ["prompt", used.prompt_tokens ?? "-"],
    ["of it cached", used.prompt_tokens_details?.cached_tokens ?? 0],
    ["answer", used.completion_tokens ?? "-"],
    ["ended by", outcome.reason ?? "-"],
  ];
  $("figures").replaceChildren(...parts.flatMap(([name, value]) => {
    const strong = document.createElement("b");
    strong.textContent = value;
    return [`${name} `, strong, " \u00a0 "];
  }));
}

function bubble(kind, text = "") {
  const made = document.createElement("li");
  made.className = kind;
  made.textContent = text;
  $("turns").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

function busy(is) {
  for (const button of document.querySelectorAll(".go")) button.disabled = is;
  $("stop").disabled = !is;
}

async function attempt(work, failed) {
  busy(true);
  try {
    await work();
    say("");
  } catch (error) {
    const left = error.name === "AbortError";
    say(left ? "stopped" : error.message, !left);
    if (!left) failed(error.message);
  } finally {
    busy(false);
  }
}

// --- chat -----------------------------------------------------------------------------------

async function chat(text) {
  turns.push({ role: "user", content: text });
  bubble("user", text);
  let thought = null, said = null, answer = "";
  await attempt(async () => {
    const outcome = await run(body(turns), (delta) => {
      if (delta.reasoning_content) {
        thought ??= bubble("reasoning");
        thought.textContent += delta.reasoning_content;
      }
      if (delta.content) {
        said ??= bubble("assistant");
        said.textContent += delta.content;
        answer += delta.content;
        said.scrollIntoView({ block: "nearest" });
      }
    });
    figures(outcome);
  }, (why) => bubble("failed", why));
  if (answer) turns.push({ role: "assistant", content: answer });
  else turns.pop();
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("chat-text").value.trim();
  if (!text || aborting) return;
  $("chat-text").value = "";
  chat(text);
});
$("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => aborting?.abort());
$("clear").addEventListener("click", () => {
  aborting?.abort();
  turns = [];
  session = crypto.randomUUID();
  $("turns").replaceChildren();
  $("figures").replaceChildren();
});

// --- JSON and tools -------------------------------------------------------------------------

function parsed(id, what) {
  try {
    return JSON.parse($(id).value);
  } catch (error) {
    throw new Error(`${what}: ${error.message}`);
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

$("json-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const shown = $("json-answer");
  shown.className = "";
  let text = "";
  attempt(async () => {
    const schema = parsed("schema", "the schema");
    const asked = body([{ role: "user", content: $("json-text").value }]);
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
    shown.textContent = "";
    const outcome = await run(asked, (delta) => {
      text += delta.content ?? "";
      shown.textContent = text;
    });
    shown.textContent = pretty(text);
    figures(outcome);
  }, (why) => { shown.className = "failed"; shown.textContent = why; });
});

$("tools-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const shown = $("tools-answer");
  shown.className = "";
  const calls = [];
  let text = "";
  attempt(async () => {
    const asked = body([{ role: "user", content: $("tools-text").value }]);
    asked.tools = parsed("tool-list", "the tools");
    asked.tool_choice = $("tool-choice").value;
    shown.textContent = "";
    const outcome = await run(asked, (delta) => {
      text += delta.content ?? "";
      for (const part of delta.tool_calls ?? []) {
        calls[part.index] ??= { id: part.id, name: "", arguments: "" };
        calls[part.index].name += part.function?.name ?? "";
        calls[part.index].arguments += part.function?.arguments ?? "";
      }
      shown.textContent = [text, ...calls.map((it) => `${it.name}(${it.arguments})`)]
        .filter(Boolean).join("\n");
    });
    figures(outcome);
  }, (why) => { shown.className = "failed"; shown.textContent = why; });
});

// --- regions --------------------------------------------------------------------------------

async function showRegions() {
  if ($("regions").hidden || !$("key").value.trim()) return;
  try {
    const { result } = await get("/v1/regions");
    $("region-rows").replaceChildren(...result.map(row));
    draw(result);
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function row(region) {
  const made = document.createElement("tr");
  const cells = [
    region.name, region.state,
    region.rtt_ms === null ? "-" : `${region.rtt_ms.toFixed(1)} ms`,
    region.room, region.in_flight, region.models.join(", "), region.processes,
  ];
  for (const text of cells) made.insertCell().textContent = text;
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// Plate carree: degrees are the coordinates.
function draw(regions) {
  const shapes = [];
  for (let at = -150; at < 180; at += 30) shapes.push(shape("line", { x1: at, x2: at, y1: -90, y2: 90 }));
  for (let at = -60; at < 90; at += 30) shapes.push(shape("line", { x1: -180, x2: 180, y1: at, y2: at }));
  const [latitude, longitude] = $("place").value.split(",").map(Number);
  for (const region of regions) {
    const at = { cx: region.longitude, cy: -region.latitude, r: 4 };
    const served = region.name === servedBy;
    if (served && $("place").value) {
      shapes.push(shape("line", { class: "asked", x1: longitude, y1: -latitude, x2: at.cx, y2: at.cy }));
    }
    shapes.push(shape("circle", { ...at, class: `${region.state} ${served ? "served" : ""}` }));
    shapes.push(shape("text", { x: at.cx, y: at.cy - 7 }, region.name));
  }
  $("map").replaceChildren(...shapes);
}

// --- settings -------------------------------------------------------------------------------

let models = [];

async function showModels() {
  sessionStorage.setItem("key", $("key").value.trim());
  if (!$("key").value.trim()) return say("a key is needed: edge key create --account me");
  try {
    models = (await get("/v1/models")).data.filter((it) => it.task === "text-generation");
    $("model").replaceChildren(...models.map((it) => new Option(it.id, it.id)));
    about();
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function about() {
  const model = models.find((it) => it.id === $("model").value);
  $("about").textContent = model
    ? `${model.description ?? ""} ${model.precision ?? ""} Context of ${model.context_window} tokens.` : "";
}

function choose(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const chosen = each === tab;
    each.setAttribute("aria-selected", chosen);
    $(each.getAttribute("aria-controls")).hidden = !chosen;
  }
  showRegions();
}

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => choose(tab));
}
$("temperature").addEventListener("input", () => {
  $("temperature-shown").textContent = $("temperature").value;
});
$("model").addEventListener("change", about);
$("key").addEventListener("change", showModels);
$("schema").value = JSON.stringify(SCHEMA, null, 2);
$("tool-list").value = JSON.stringify(TOOLS, null, 2);

const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) history.replaceState(null, "", location.pathname);  // out of the address and of history
$("key").value = given ?? sessionStorage.getItem("key") ?? "";
showModels();
setInterval(showRegions, 2000);
