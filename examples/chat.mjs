// A chat with an edge agent, by OpenAI's library for Node: npm install openai && node examples/chat.mjs
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8080/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const models = await client.models.list();
const chunks = await client.chat.completions.create({
  model: models.data[0].id,
  messages: [{ role: "user", content: process.argv[2] ?? "Why is the sky blue?" }],
  max_tokens: 64,
  temperature: 0,
  stream: true,
});
for await (const chunk of chunks) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
process.stdout.write("\n");
