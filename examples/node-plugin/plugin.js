// A plugin in a process of its own: it hears browsers' pushes through Redis, answers through Redis, and serves REST
// routes that the relay forwards (see relay.toml).
//
//   a browser pushes "sum" to topic "calc"     from:calc:sum    {"request_id": "a1", "numbers": [1, 2, 3]}
//   the plugin tells all on that topic         to:calc:result   {"request_id": "a1", "sum": 6}

import { createServer } from "node:http";
import { createClient } from "redis";

const { REDIS_URL = "redis://localhost:6379", PORT = 8001 } = process.env;

const publisher = createClient({ url: REDIS_URL });
const subscriber = publisher.duplicate(); // a connection that subscribes can do nothing else
for (const client of [publisher, subscriber]) {
  client.on("error", ({ message }) => console.error(`Redis: ${message}`)); // it reconnects automatically
  await client.connect();
}

let answered = 0;

async function answer(message) {
  const { request_id, numbers } = JSON.parse(message); // throws for a binary push
  const isRight = Array.isArray(numbers) && numbers.every(Number.isFinite);
  const result = isRight ? { sum: numbers.reduce((a, b) => a + b, 0) } : { error: "expected numbers: [1, 2, …]" };
  await publisher.publish("to:calc:result", JSON.stringify({ request_id, ...result }));
  answered++;
}

// Whatever a browser pushes, it must not end this process.
await subscriber.subscribe("from:calc:sum", (message) => answer(message).catch(console.error));

const server = createServer((request, response) => {
  // The relay has taken its prefix off: GET /api/node-plugin/ arrives as GET /.
  const isFound = request.method === "GET" && request.url === "/";
  response.writeHead(isFound ? 200 : 404, { "content-type": "application/json" });
  response.end(JSON.stringify(isFound ? { plugin: "node", answered } : { error: `no ${request.url} here` }));
});
server.listen(PORT, "127.0.0.1", () => console.log(`serving http://127.0.0.1:${server.address().port}`));
