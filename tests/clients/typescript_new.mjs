// A tour with @modelcontextprotocol/client (both eras): node typescript_new.mjs URL PREFIX legacy|auto|2026-07-28.
import { Client, StreamableHTTPClientTransport } from "@modelcontextprotocol/client";

const [url, prefix, mode] = process.argv.slice(2);
const era = mode.startsWith("2") ? { pin: mode } : mode;
const client = new Client({ name: "tour", version: "1" }, { versionNegotiation: { mode: era } });
await client.connect(new StreamableHTTPClientTransport(new URL(url)));
const version = client.getNegotiatedProtocolVersion();
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
