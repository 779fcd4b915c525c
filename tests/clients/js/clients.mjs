// What JavaScript's clients hear from an edge, as one JSON object on standard output.
// Takes the edge's URL, the account, the key and the model as arguments.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import Cloudflare from "cloudflare";
import OpenAI from "openai";
import { createWorkersAI } from "workers-ai-provider";

const [url, account, key, model] = process.argv.slice(2);
const messages = [{ role: "user", content: "hello" }];

async function openai() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
  const whole = await client.chat.completions.create({ model, messages, max_tokens: 4 });
  const stream = await client.chat.completions.create({
    model, messages, max_tokens: 4, stream: true, stream_options: { include_usage: true },
  });
  let text = "", used = 0;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    used += chunk.usage?.completion_tokens ?? 0;
  }
  const models = [];
  for await (const each of client.models.list()) models.push(each.id);
  let refused = "";
  try {
    await client.chat.completions.create({ model, messages, temperature: 9 });
  } catch (error) {
    refused = `${error.constructor.name} ${error.param}`;
  }
  return { whole: whole.choices[0].message.content, text, used, models, refused };
}

async function cloudflare() {
  const client = new Cloudflare({ baseURL: `${url}/client/v4`, apiToken: key, maxRetries: 0 });
  const whole = await client.ai.run(model, { account_id: account, messages, max_tokens: 4 });
  const models = [];
  for await (const each of client.ai.models.list({ account_id: account })) models.push(each.name);
  let refused = 0;
  try {
    await client.ai.run("@cf/no/model", { account_id: account, prompt: "A" });
  } catch (error) {
    refused = error.errors[0].code;
  }
  return { whole: whole.response, models, refused };
}

async function aiSdk(language) {
  const asked = { model: language, prompt: "hello", maxOutputTokens: 4, maxRetries: 0 };
  const whole = await generateText(asked);
  const stream = streamText(asked);
  let text = "";
  for await (const part of stream.textStream) text += part;
  const used = await stream.usage;
  return { whole: whole.text, text, used: used.outputTokens, reason: await stream.finishReason };
}

// Its address is fixed in its code: only `fetch` can lead it elsewhere.
const toEdge = (input, init) =>
  fetch(String(input).replace("https://api.cloudflare.com", url), init);

console.log(JSON.stringify({
  openai: await openai(),
  cloudflare: await cloudflare(),
  compatible: await aiSdk(createOpenAICompatible({
    name: "edge", baseURL: `${url}/client/v4/accounts/${account}/ai/v1`, apiKey: key,
    includeUsage: true,
  })(model)),
  provider: await aiSdk(createWorkersAI({ accountId: account, apiKey: key, fetch: toEdge })(model)),
}));
