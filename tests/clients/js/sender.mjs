// One of JavaScript's clients: a line of JSON in, {"route", "body"}, is sent by it, and a line of JSON
// out is what it handed back, or {"failed"}.
//
//     node sender.mjs NAME URL ACCOUNT KEY MODEL VECTORS

import { createInterface } from "node:readline";

const [name, url, account, key, model, vectors] = process.argv.slice(2);
const ai = `${url}/client/v4/accounts/${account}/ai`;

async function openai() {
  const { default: OpenAI } = await import("openai");
  const client = new OpenAI({ baseURL: `${ai}/v1`, apiKey: key, maxRetries: 0 });
  const of = {
    chat: client.chat.completions, completions: client.completions,
    embeddings: client.embeddings, responses: client.responses,
  };
  return async (route, body) => plain(await of[route].create(body));
}

async function cloudflare() {
  const { default: Cloudflare } = await import("cloudflare");
  const client = new Cloudflare({ baseURL: `${url}/client/v4`, apiToken: key, maxRetries: 0 });
  return async (route, body) => {
    const run = client.ai.run(route === "run" ? model : vectors, { account_id: account, ...body });
    if (!body.stream) return run;
    const lines = (await (await run.asResponse()).text()).split("\n");
    const data = lines.filter((line) => line.startsWith("data: {"));
    return data.map((line) => JSON.parse(line.slice(6)));
  };
}

async function anthropic() {
  const { default: Anthropic } = await import("@anthropic-ai/sdk");
  const client = new Anthropic({ baseURL: ai, apiKey: key, maxRetries: 0 });
  return async (route, body) => plain(await client.messages.create(body));
}

// The AI SDK has words of its own; what it has none for, a provider's options take.
const WORDS = {
  max_tokens: "maxOutputTokens", max_output_tokens: "maxOutputTokens", temperature: "temperature",
  top_p: "topP", top_k: "topK", seed: "seed", frequency_penalty: "frequencyPenalty",
  presence_penalty: "presencePenalty", messages: "messages", system: "system",
};
const OPTIONS = {
  parallel_tool_calls: "parallelToolCalls", previous_response_id: "previousResponseId",
};

async function sdk(languages, options) {
  const { generateText, jsonSchema, Output, streamText, tool } = await import("ai");

  function translated(route, body) {
    const asked = { maxRetries: 0 }, further = {};
    for (const [field, value] of Object.entries(body)) {
      if (field in WORDS && !(field === "top_k" && route === "chat")) asked[WORDS[field]] = value;
      else if (field === "input") {
        asked.messages = typeof value === "string" ? [{ role: "user", content: value }] : value;
      } else if (field === "tools") {
        asked.tools = Object.fromEntries(value.map((one) => {
          const it = one.function ?? one;
          const inputSchema = jsonSchema(it.parameters ?? it.input_schema);
          return [it.name, tool({ description: it.description, inputSchema })];
        }));
      } else if (field === "tool_choice") {
        const toolName = value.function?.name ?? value.name;
        asked.toolChoice = toolName ? { type: "tool", toolName } : "required";
        if (value.disable_parallel_tool_use) further.disableParallelToolUse = true;
      } else if (["response_format", "text", "output_config"].includes(field)) {
        const schema = value.json_schema?.schema ?? value.format.schema;
        further.structuredOutputMode = "outputFormat"; // Anthropic's: no tool in its place
        asked.output = Output.object({ schema: jsonSchema(schema) });
      } else if (field !== "model" && field !== "stream") {
        further[route === "responses" ? OPTIONS[field] ?? field : field] = value;
      }
    }
    return { ...asked, model: languages[route], providerOptions: { [options[route]]: further } };
  }

  return async (route, body) => {
    const asked = translated(route, body);
    if (body.stream) return plain(streamText(asked).textStream);
    const whole = await generateText(asked);
    return { text: whole.text, reason: whole.finishReason, id: whole.response.id };
  };
}

async function aiSdk() {
  const { createAnthropic } = await import("@ai-sdk/anthropic");
  const { createOpenAI } = await import("@ai-sdk/openai");
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  const about = { baseURL: `${ai}/v1`, apiKey: key };
  return sdk({
    chat: createOpenAICompatible({ name: "edge", supportsStructuredOutputs: true, ...about })(model),
    responses: createOpenAI(about).responses(model),
    messages: createAnthropic(about)(model),
  }, { chat: "edge", responses: "openai", messages: "anthropic" });
}

async function provider() {
  const { createWorkersAI } = await import("workers-ai-provider");
  // Its address is fixed in its code: only `fetch` can lead it elsewhere.
  const toEdge = (input, init) =>
    fetch(String(input).replace("https://api.cloudflare.com", url), init);
  const made = createWorkersAI({ accountId: account, apiKey: key, fetch: toEdge });
  const generate = await sdk({ run: made(model) }, { run: "workers-ai" });
  const { embedMany, rerank } = await import("ai");
  return async (route, body) => {
    if (route !== "vectors") return generate(route, body);
    if ("query" in body) {
      const documents = body.contexts.map((one) => one.text);
      const { ranking } = await rerank({
        model: made.reranking(vectors), query: body.query, documents, topN: body.top_k,
      });
      return { ranking };
    }
    const values = Array.isArray(body.text) ? body.text : [body.text];
    return { embeddings: (await embedMany({ model: made.textEmbedding(vectors), values })).embeddings };
  };
}

async function plain(answer) {
  if (answer?.[Symbol.asyncIterator] === undefined) return answer;
  const events = [];
  for await (const event of answer) events.push(event);
  return events;
}

const clients = {
  "openai.js": openai, "cloudflare.js": cloudflare, "anthropic.js": anthropic,
  "ai-sdk": aiSdk, "workers-ai-provider": provider,
};
globalThis.AI_SDK_LOG_WARNINGS = false;
const send = await clients[name]();
for await (const line of createInterface({ input: process.stdin })) {
  const { route, body } = JSON.parse(line);
  let said;
  try {
    said = { answer: await send(route, body) };
  } catch (error) {
    said = { failed: `${error.stack} ${error.responseBody ?? ""}` };
  }
  console.log(JSON.stringify(said));
}
