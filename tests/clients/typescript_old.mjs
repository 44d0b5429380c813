// A tour with @modelcontextprotocol/sdk (sessions only): node typescript_old.mjs URL PREFIX [sse]. Prints JSON.
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";
import { SSEClientTransport } from "@modelcontextprotocol/sdk/client/sse.js";

const [url, prefix, transport] = process.argv.slice(2);
const client = new Client({ name: "tour", version: "1" });
const Transport = transport === "sse" ? SSEClientTransport : StreamableHTTPClientTransport;
const way = new Transport(new URL(url));
await client.connect(way);
const version = way._protocolVersion; // what it sends as MCP-Protocol-Version; the SSE one has no getter
const names = (await client.listTools()).tools.map((tool) => tool.name);
const echo = await client.callTool({ name: prefix + "echo", arguments: { message: "from TypeScript" } });
const read = await client.readResource({ uri: "demo://resource/dynamic/text/1" });
let error;
try {
  error = `isError ${(await client.callTool({ name: prefix + "no-such-tool", arguments: {} })).isError}`;
} catch (failure) {
  error = failure.code;
}
const seen = { version, names, echo: echo.content[0].text, read: read.contents[0].text, error };
console.log(JSON.stringify(seen));
await client.close();
