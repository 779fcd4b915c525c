// What JavaScript's clients hear of Responses and Messages, as one JSON object on standard output.
// Takes the edge's URL, the account, the key and the model as arguments.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import Anthropic from "@anthropic-ai/sdk";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [url, account, key, model] = process.argv.slice(2);
const ai = `${url}/client/v4/accounts/${account}/ai`;
const messages = [{ role: "user", content: "hello" }];

async function openai() {
  const client = new OpenAI({ baseURL: `${ai}/v1`, apiKey: key, maxRetries: 0 });
  const asked = { model, input: "hello", max_output_tokens: 4 };
  const whole = await client.responses.create(asked);
  let text = "", last = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event.type;
  }
  const again = await client.responses.create({ ...asked, previous_response_id: whole.id });
  const more = again.usage.input_tokens > whole.usage.input_tokens;
  return { whole: whole.output_text, text, last, more };
}

async function anthropic() {
  const client = new Anthropic({ baseURL: ai, apiKey: key, maxRetries: 0 });
  const asked = { model, messages, max_tokens: 4 };
  const whole = await client.messages.create(asked);
  const final = await client.messages.stream(asked).finalMessage();
  const counted = await client.messages.countTokens({ model, messages });
  let refused = "";
  try {
    await client.messages.create({ ...asked, temperature: 9 });
  } catch (error) {
    refused = `${error.constructor.name} ${error.error.error.type}`;
  }
  return {
    whole: whole.content[0].text,
    text: final.content[0].text,
    counted: counted.input_tokens === whole.usage.input_tokens,
    used: final.usage.output_tokens,
    reason: final.stop_reason,
    refused,
  };
}

// The second turn goes back to the first: with Responses by references to stored items.
async function aiSdk(language) {
  const asked = { model: language, messages, maxOutputTokens: 4, maxRetries: 0 };
  const whole = await generateText(asked);
  const stream = streamText(asked);
  let text = "";
  for await (const part of stream.textStream) text += part;
  const used = await stream.usage;
  const next = [...messages, ...whole.response.messages, { role: "user", content: "more" }];
  const second = await generateText({ ...asked, messages: next });
  return {
    whole: whole.text,
    text,
    used: used.outputTokens,
    reason: await stream.finishReason,
    more: second.usage.inputTokens > whole.usage.inputTokens,
  };
}

console.log(JSON.stringify({
  openai: await openai(),
  anthropic: await anthropic(),
  responses: await aiSdk(createOpenAI({ baseURL: `${ai}/v1`, apiKey: key }).responses(model)),
  messages: await aiSdk(createAnthropic({ baseURL: `${ai}/v1`, apiKey: key })(model)),
}));
