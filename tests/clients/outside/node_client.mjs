// node_client.mjs URL: what a Node user does with the official client; prints one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const guidance = { method: "pargs", reward_model: "first", beta: 1.5 };
const fixed = { max_tokens: 8, temperature: 0, seed: 3 };
const messages = [{ role: "user", content: "hello there" }];

async function attempt(body) {
  try {
    await client.chat.completions.create(body);
    return null;
  } catch (error) {
    return { status: error.status, message: error.message, param: error.param };
  }
}

const whole = await client.chat.completions.create({ model: "base", messages, guidance, ...fixed });

const stream = await client.chat.completions.create({ model: "base", messages, guidance, stream: true, ...fixed });
let text = "";
let report = null;
for await (const chunk of stream) {
  const [choice] = chunk.choices;
  text += choice?.delta?.content ?? "";
  report = choice?.guidance ?? report;
}

const preset = await client.chat.completions.create({ model: "base:steered", messages, ...fixed });
const listed = [];
for await (const model of client.models.list()) listed.push(model.id);
const found = await client.models.retrieve("base:steered");

console.log(
  JSON.stringify({
    whole: { text: whole.choices[0].message.content, report: whole.choices[0].guidance },
    streamed: { text, report },
    preset: { model: preset.model, text: preset.choices[0].message.content, report: preset.choices[0].guidance },
    listed,
    found: found.id,
    misplaced: await attempt({ model: "base", messages, ...fixed, extra_body: { guidance } }),
    unknown: await attempt({ model: "base", messages, ...fixed, guidance: { method: "pargs", reward_model: "none" } }),
  }),
);
