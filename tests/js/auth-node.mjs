// The published phoenix client with tokens that expire, in Node over `ws`.
//   node auth-node.mjs <alias of the phoenix package> <socket url> <http url> <secret>

import { createHmac } from "node:crypto"
import WebSocket from "ws"
import { check, equal, failures, PATIENCE, within } from "./report.mjs"

const [alias, url, http, secret] = process.argv.slice(2)
const phoenix = await import(alias)
const Socket = phoenix.Socket ?? phoenix.default.Socket
const short_s = 2 * PATIENCE // of a token that expires meanwhile
const knowsAuthToken = alias === "phoenix-1.8"

const base64url = data => Buffer.from(data).toString("base64url")
const topics = { "room:*": "join,push" }

function token(sub, ttl_s, claims = { topics }) {
  const exp = Date.now() / 1000 + ttl_s
  const text = `${base64url('{"alg":"HS256"}')}.${base64url(JSON.stringify({ sub, exp, ...claims }))}`
  return `${text}.${createHmac("sha256", secret).update(text).digest("base64url")}`
}

// The token of the connection, where the client knows how: `authToken`, or else in the params.
const carrying = make => knowsAuthToken ? { authToken: make } : { params: () => ({ token: make() }) }

function open(options) {
  const codes = []
  const socket = new Socket(url, { transport: WebSocket, reconnectAfterMs: () => 50, rejoinAfterMs: () => 50, ...options })
  socket.onClose(event => codes.push(event.code))
  return { socket, codes }
}
const joined = channel => within(new Promise((resolve, reject) => channel.join()
  .receive("ok", resolve).receive("error", e => reject(new Error(JSON.stringify(e))))), `the join of ${channel.topic}`)
const happens = (what, condition) => within((async () => {
  while (!condition()) await new Promise(resolve => setTimeout(resolve, 20))
})(), what)
const finished = socket => within(new Promise(resolve => socket.disconnect(resolve)), "the disconnect")

await check("an expired token is renewed by the rejoin, whose params are asked anew", async () => {
  let asked = 0
  let errors = 0
  const { socket, codes } = open(carrying(() => token("ada", short_s)))
  socket.connect()
  const channel = socket.channel("room:1", () => ({ token: token("ada", ++asked === 1 ? short_s : 60) }))
  channel.onError(() => { errors += 1 })
  await joined(channel)
  await happens("the end of the token", () => errors === 1)
  await happens("the rejoin", () => channel.state === "joined")
  // Past the grace, and still the same connection.
  await new Promise(resolve => setTimeout(resolve, 1500 * PATIENCE))
  equal([channel.state, socket.isConnected(), codes.length, asked], ["joined", true, 0, 2], "state")
  await finished(socket)
})

await check("a socket that is not renewed is closed, and comes back with a new token", async () => {
  let made = 0
  const { socket, codes } = open(carrying(() => token("ada", ++made === 1 ? short_s : 60)))
  socket.connect()
  const channel = socket.channel("room:2")
  await joined(channel)
  await happens("the close for the expired token", () => codes.includes(1008))
  await happens("the rejoin on a new connection", () => channel.state === "joined" && socket.isConnected())
  equal([codes, made], [[1008], 2], "closes, tokens made")
  await finished(socket)
})

await check("access_token renews in place", async () => {
  const { socket, codes } = open(carrying(() => token("ada", short_s)))
  socket.connect()
  const channel = socket.channel("room:3")
  let errors = 0
  channel.onError(() => { errors += 1 })
  await joined(channel)
  await within(new Promise(resolve => channel.push("access_token", { access_token: token("ada", 60) })
    .receive("ok", resolve)), "the answer")
  await new Promise(resolve => setTimeout(resolve, 3500 * PATIENCE))
  equal([errors, codes.length, channel.state], [0, 0, "joined"], "errors, closes, state")
  await finished(socket)
})

await check("whoever is kicked does not rejoin, whoever is disconnected comes back", async () => {
  const { socket, codes } = open(carrying(() => token("eve", 60)))
  socket.connect()
  const [kept, lost] = [socket.channel("room:4"), socket.channel("room:5")]
  await Promise.all([joined(kept), joined(lost)])
  equal((await fetch(`${http}/api/topics/room:5/users/eve`, { method: "DELETE", headers: { authorization: "Bearer operators-key" } })).status, 204, "status of the kick")
  await happens("the end of the topic", () => lost.state === "closed")
  equal((await fetch(`${http}/api/users/eve`, { method: "DELETE", headers: { authorization: "Bearer operators-key" } })).status, 204, "status of the disconnect")
  await happens("the close", () => codes.includes(1001))
  await happens("the return", () => socket.isConnected() && kept.state === "joined")
  equal(lost.state, "closed", "the topic that was taken away")
  await finished(socket)
})

process.exit(failures() ? 1 : 0)
