// Client events with the published phoenix client, in Node over `ws`: two users on two nodes.
//   node client-events-node.mjs <alias of the phoenix package, or relay> <socket url> <socket url of another node>
// The relay authenticates by the param `user`; `typing` and `cursor-*` are client events with their sender on room:*,
// and `raw` and `bytes` without on plain:*.

import WebSocket from "ws"
import { check, equal, failures, within } from "./report.mjs"

const [alias, ...urls] = process.argv.slice(2)
const phoenix = await import(alias === "relay" ? "../../clients/browser/relay.js" : alias)
const Socket = phoenix.Socket ?? phoenix.default.Socket

const answer = (push, what) => within(new Promise(resolve => push
  .receive("ok", response => resolve(["ok", response]))
  .receive("error", response => resolve(["error", response.reason]))), what)

async function open(user, url, topic) {
  const socket = new Socket(url, { transport: WebSocket, params: { user } })
  socket.connect()
  const channel = socket.channel(topic)
  const heard = []
  const waiting = []
  for (const event of ["typing", "cursor-move", "raw", "bytes", "new_msg", "done"]) {
    channel.on(event, payload => {
      heard.push([event, payload])
      waiting.splice(0).forEach(look => look())
    })
  }
  equal((await answer(channel.join(), `the join of ${user}`))[0], "ok", "the join")
  // Everything that was heard up to the event `done`, which is published when all else has been.
  const until = event => within(new Promise(resolve => {
    const look = () => heard.some(([name]) => name === event) ? resolve(heard.splice(0)) : waiting.push(look)
    look()
  }), `${event} at ${user}`)
  return { socket, channel, heard, until }
}

const [near, far] = urls
const alice = await open("alice", near, "room:1")
const bob = await open("bob", far, "room:1")
const carol = await open("carol", near, "room:1")

await check("a client event reaches the others on both nodes, with its sender, and not its sender", async () => {
  equal(await answer(alice.channel.push("typing", { on: true }), "typing"), ["ok", {}], "the reply")
  const expected = [["typing", { on: true, _user: "alice" }]]
  equal(await bob.until("typing"), expected, "what bob heard")
  equal(await carol.until("typing"), expected, "what carol heard")
  equal(await answer(bob.channel.push("cursor-move", { x: 1 }), "a cursor"), ["ok", {}], "the reply")
  equal(await alice.until("cursor-move"), [["cursor-move", { x: 1, _user: "bob" }]], "what alice heard: nothing of her own")
  equal(await carol.until("cursor-move"), [["cursor-move", { x: 1, _user: "bob" }]], "what carol heard")
})

await check("no client can be taken for another", async () => {
  for (const payload of [{ _user: "bob" }, { _user: null }, [], "x", 1]) {
    equal(await answer(alice.channel.push("typing", payload), "typing"), ["error", "invalid payload"], JSON.stringify(payload))
  }
  equal(await answer(alice.channel.push("typing", { a: { _user: "bob" } }), "typing"), ["ok", {}], "a nested one")
  equal(await bob.until("typing"), [["typing", { a: { _user: "bob" }, _user: "alice" }]], "what bob heard")
})

await check("too large a payload is refused", async () => {
  const large = { text: "x".repeat(4096) }
  equal(await answer(alice.channel.push("typing", large), "typing"), ["error", "payload too large"], "the reply")
})

await check("another push goes to no client", async () => {
  equal(await answer(alice.channel.push("new_msg", { text: "hi" }), "new_msg"), ["ok", {}], "the reply")
  equal(await answer(alice.channel.push("cursor-move", {}), "the next"), ["ok", {}], "the reply")
  equal((await bob.until("cursor-move")).map(([event]) => event), ["cursor-move"], "what bob heard")
})

await check("bytes and any other JSON pass where the sender is not said", async () => {
  const dave = await open("dave", near, "plain:1")
  const erin = await open("erin", far, "plain:1")
  equal(await answer(dave.channel.push("raw", [1, { _user: "x" }]), "raw"), ["ok", {}], "the reply")
  equal(await erin.until("raw"), [["raw", [1, { _user: "x" }]]], "what erin heard")
  equal(await answer(dave.channel.push("bytes", new Uint8Array([0, 255]).buffer), "bytes"), ["ok", {}], "the reply")
  const [[, payload]] = await erin.until("bytes")
  if (!(payload instanceof ArrayBuffer)) throw new Error(`a ${payload?.constructor?.name} came`)
  equal([...new Uint8Array(payload)], [0, 255], "the bytes")
  for (const { socket } of [dave, erin]) await within(new Promise(resolve => socket.disconnect(resolve)), "the disconnect")
})

await check("the sender gets nothing back", async () => {
  // Behind this on the bus, so whatever was to come has come.
  equal(await answer(bob.channel.push("typing", { last: true }), "typing"), ["ok", {}], "the reply")
  equal((await alice.until("typing")).map(([event, { _user }]) => [event, _user]), [["typing", "bob"]], "what alice heard")
})

for (const { socket } of [alice, bob, carol]) await within(new Promise(resolve => socket.disconnect(resolve)), "the disconnect")
process.exit(failures() ? 1 : 0)
