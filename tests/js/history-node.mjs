// The lines of the documentation that recover what a client missed, with the published phoenix client in Node over `ws`;
// or with the relay's own.
//   node history-node.mjs <alias of the phoenix package, or relay> <relay http url>

import WebSocket from "ws"
import { cutUnderLoad, lines, openWay } from "./history.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [alias, origin] = process.argv.slice(2)
const phoenix = await import(alias === "relay" ? "../../clients/browser/relay.js" : alias)
const Socket = phoenix.Socket ?? phoenix.default.Socket
const way = await openWay(origin)

const joins = []
class Recorded extends WebSocket {
  send(frame, ...rest) {
    const [, , , event, params] = typeof frame === "string" ? JSON.parse(frame) : []
    if (event === "phx_join") joins.push(params.since)
    super.send(frame, ...rest)
  }
}

const socket = new Socket(`${way.origin.replace("http", "ws")}/socket`, {
  transport: Recorded, reconnectAfterMs: () => 20, rejoinAfterMs: () => 20,
})
const seen = []
const logged = []
let fetches = 0
// The state is fetched at the first join and after losses; relay's client reports the losses alone.
if (alias === "relay") fetches = 1
const log = text => {
  logged.push(text)
  if (text === "too many events missed") fetches += 1
}
const body = lines[alias === "relay" ? "relay" : "phoenix"]
const channel = new Function("socket", "console", "fetchState", body)(
  socket, { log }, () => { fetches += 1 },
)
channel.on("new_msg", payload => seen.push(payload))
socket.connect()

await check("payloads of any kind reach their handlers as they were published", async () => {
  await within(new Promise(resolve => {
    const wait = () => joins.length && channel.state === "joined" ? resolve() : setTimeout(wait, 5)
    wait()
  }), "the join")
  const got = []
  const payloads = [[1, 2], "text", 17, 0, "", false, null, [], { response: { _position: "mine" }, text: "t" }]
  const arrived = within(new Promise(resolve => channel.on("any", payload => {
    got.push(payload)
    if (got.length === payloads.length) resolve()
  })), "the events")
  const response = await fetch(`${origin}/api/publish`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ events: payloads.map(payload => ({ topic: channel.topic, event: "any", payload })) }),
  })
  equal(response.status, 200, "the answer")
  await arrived
  const position = got.at(-1)._position
  if (alias === "relay") equal(position, undefined, "a position in the payload")
  else delete got.at(-1)._position
  equal(got, payloads, "the payloads")
})

const numbers = (publisher, number) => ({ publisher, number, text: `${publisher}${number}` })
// phoenix.js hands an event on before its position, where that is in the next message: a cut may fall in between.
const kinds = (publisher, number) => number % 3 ? numbers(publisher, number) : [publisher, number]
await cutUnderLoad({
  seen: () => seen.map(({ _position, ...payload }, at) => Array.isArray(seen[at]) ? seen[at] : payload),
  count: () => seen.length,
  joins: () => joins,
  fetches: () => fetches,
}, way, origin, channel.topic, alias === "relay" ? kinds : numbers)

await check("the handler of the page itself was called for each", () => {
  equal(logged.filter(text => /^[a-f]\d+$/.test(text)).length, seen.filter(payload => payload.text).length, "calls")
})

way.end()
process.exit(failures() ? 1 : 0)
