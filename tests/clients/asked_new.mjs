// Clients of @modelcontextprotocol/client that are asked, all at once: node asked_new.mjs URL TOOL MODE COUNT ARGUMENTS.
// As asked_new.py.
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";

const [url, tool, mode, count, given] = process.argv.slice(2);
const era = mode.startsWith("2") ? { pin: mode } : mode;

async function call(name) {
  const client = new Client(
    { name, version: "1" },
    { versionNegotiation: { mode: era }, capabilities: { elicitation: { form: {} }, sampling: {}, roots: {} } },
  );
  client.setRequestHandler("elicitation/create", async (request) => ({
    action: "accept",
    content: { name: `${name}: ${request.params.message}` },
  }));
  client.setRequestHandler("sampling/createMessage", async (request) => {
    const content = [request.params.messages[0].content].flat()[0];
    return {
      role: "assistant",
      content: { type: "text", text: `${name}: ${content.text}` },
      model: "m",
      stopReason: "endTurn",
    };
  });
  client.setRequestHandler("roots/list", async () => ({ roots: [{ uri: `file:///${name}` }] }));
  await client.connect(new StreamableHTTPClientTransport(new URL(url)));
  const result = await client.callTool({ name: tool, arguments: JSON.parse(given.replaceAll("NONCE", name)) });
  await client.close();
  return result.content[0].text;
}

const names = Array.from({ length: Number(count) }, (_, number) => `node-${process.pid}-${number}`);
const texts = await Promise.all(names.map(call));
console.log(JSON.stringify(Object.fromEntries(names.map((name, index) => [name, texts[index]]))));
