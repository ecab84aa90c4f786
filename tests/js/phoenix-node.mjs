// The published phoenix client against a relay, in Node over `ws`; or the relay's own, which can take its place.
//   node phoenix-node.mjs <alias of the phoenix package, or relay> <socket url>
// What must come from outside is published by the test that runs this: see report.mjs.

import net from "node:net"
import WebSocket from "ws"
import { check, equal, failures, PATIENCE, say, within } from "./report.mjs"

const [alias, url] = process.argv.slice(2)
const phoenix = await import(alias === "relay" ? "../../clients/browser/relay.js" : alias)
const Socket = phoenix.Socket ?? phoenix.default.Socket

const text = bytes => new TextDecoder().decode(bytes)
const bytes = string => new TextEncoder().encode(string).buffer
const publish = (redis_channel, payload) => ({ redis_channel, payload })

// Every connection a socket opens is kept, so that a check can reach beneath the client.
function open(options = {}, endpoint = url) {
  const connections = []
  class Recorded extends WebSocket {
    constructor(...args) {
      super(...args)
      this.sent = []
      connections.push(this)
    }
    send(frame, ...rest) {
      this.sent.push(frame)
      super.send(frame, ...rest)
    }
  }
  const socket = new Socket(endpoint, {
    transport: Recorded,
    reconnectAfterMs: () => 50,
    rejoinAfterMs: () => 50,
    ...options,
  })
  return { socket, connections }
}

const opened = socket => within(new Promise(resolve => socket.onOpen(resolve)), "the connection to open")
const answer = (push, what) => within(new Promise((resolve, reject) => push
  .receive("ok", resolve)
  .receive("error", response => reject(new Error(`${what}: error ${JSON.stringify(response)}`)))
  .receive("timeout", () => reject(new Error(`${what}: the client gave up waiting`)))), what)
const refusal = (push, what) => within(new Promise((resolve, reject) => push
  .receive("error", resolve)
  .receive("ok", () => reject(new Error(`${what}: ok`)))), what)
const next = (channel, event) => within(new Promise(resolve => {
  const ref = channel.on(event, payload => { channel.off(event, ref); resolve(payload) })
}), `${event} on ${channel.topic}`)
const finished = socket => within(new Promise(resolve => socket.disconnect(resolve)), "the disconnect")

const { socket } = open()
const room = socket.channel("room:1", { name: "Ada" })
const events = { new_msg: 0 }
room.on("new_msg", () => { events.new_msg += 1 })

await check("connects", async () => {
  socket.connect()
  await opened(socket)
})

await check("joins with parameters", async () => { equal(await answer(room.join(), "the join"), {}, "reply to the join") })

await check("a push is answered", async () => {
  equal(await answer(room.push("new_msg", { text: "hello" }), "the push"), {}, "reply to the push")
})

await check("a shout is acknowledged", async () => { await answer(room.push("shout", { text: "from node" }), "the shout") })

await check("a binary push is acknowledged", async () => {
  await answer(room.push("bytes", new Uint8Array([0, 1, 254, 255]).buffer), "the binary push")
})

await check("an event published outside arrives", async () => {
  const arrived = next(room, "new_msg")
  say({ waiting: "event", publish: [publish("to:room:1:new_msg", '{"text":"hi"}')] })
  equal(await arrived, { text: "hi" }, "the event")
})

await check("a payload that is not JSON arrives as an ArrayBuffer", async () => {
  const arrived = next(room, "raw")
  say({ waiting: "binary event", publish: [{ redis_channel: "to:room:1:raw", payload_base64: "AAH+/w==" }] })
  const payload = await arrived
  if (!(payload instanceof ArrayBuffer)) throw new Error(`a ${payload?.constructor?.name} came`)
  equal([...new Uint8Array(payload)], [0, 1, 254, 255], "the bytes")
})

await check("topics may hold colons and any letters", async () => {
  const topic = "zürich:鉄道:🚆:1"
  const channel = socket.channel(topic)
  await answer(channel.join(), "the join")
  await answer(channel.push("grüezi", { text: "日本" }), "the push")
  const arrived = next(channel, "ankunft")
  const raw = next(channel, "raw")
  say({
    waiting: "events on a topic in many scripts",
    publish: [publish(`to:${topic}:ankunft`, '{"gleis":"7½"}'), publish(`to:${topic}:raw`, "no JSON: é")],
  })
  equal(await arrived, { gleis: "7½" }, "the event")
  equal(text(await raw), "no JSON: é", "the bytes")
  // Before 1.8.7 the client itself wrote such a header wrongly.
  if (alias === "phoenix-1.8" || alias === "relay") await answer(channel.push("octets-é", bytes("xyz")), "the binary push")
  await answer(channel.leave(), "the leave")
})

await check("a join before the connection is sent once it is there", async () => {
  const { socket: late } = open()
  const channel = late.channel("room:early")
  const joined = answer(channel.join(), "the join")
  late.connect()
  await joined
  await finished(late)
})

await check("pushes before the join arrive after it, in their order", async () => {
  const { socket: late, connections } = open()
  const channel = late.channel("room:buffered")
  const joined = answer(channel.join(), "the join")
  const pushes = [1, 2, 3].map(n => answer(channel.push("step", { n }), `push ${n}`))
  late.connect()
  await joined
  await Promise.all(pushes)
  const order = connections[0].sent.filter(f => typeof f === "string").map(f => JSON.parse(f)[3])
  equal(order.filter(e => e !== "heartbeat"), ["phx_join", "step", "step", "step"], "what the client sent")
  await finished(late)
})

await check("a second channel on one topic takes over from the first", async () => {
  const first = socket.channel("room:twice")
  let closed = 0
  let heard = 0
  first.onClose(() => { closed += 1 })
  first.on("mark", () => { heard += 1 })
  await answer(first.join(), "the first join")
  const second = socket.channel("room:twice")
  await answer(second.join(), "the second join")
  const arrived = next(second, "mark")
  say({ waiting: "event for the second", publish: [publish("to:room:twice:mark", '{"n":1}')] })
  equal(await arrived, { n: 1 }, "the event")
  await answer(second.push("still", {}), "a push of the second")
  equal([closed, heard], [1, 0], "closes of the first, events it heard")
  await answer(second.leave(), "the leave")
})

await check("a join sent twice on the wire is the newer one's", async () => {
  // phoenix.js leaves by itself before it joins again; a frame beneath it does not.
  const { socket: raw, connections } = open()
  raw.connect()
  await opened(raw)
  const frames = []
  const all = within(new Promise(resolve => {
    connections[0].on("message", data => {
      frames.push(JSON.parse(data))
      if (frames.length === 3) resolve()
    })
  }), "three frames")
  connections[0].send(JSON.stringify(["901", "902", "room:again", "phx_join", {}]))
  connections[0].send(JSON.stringify(["903", "904", "room:again", "phx_join", {}]))
  await all
  equal(frames, [
    ["901", "902", "room:again", "phx_reply", { status: "ok", response: {} }],
    ["903", "904", "room:again", "phx_reply", { status: "ok", response: {} }],
    ["901", "901", "room:again", "phx_close", {}],
  ], "the frames")
  await finished(raw)
})

await check("after a leave there is an ok, a close, and no more events", async () => {
  const seen = []
  room.onClose(() => seen.push("close"))
  const before = events.new_msg
  const left = room.leave()
  left.receive("ok", () => seen.push("ok"))
  await answer(left, "the leave")
  // A witness on the same socket: what is published after the event for the left topic arrives after it.
  const witness = socket.channel("room:witness")
  await answer(witness.join(), "the join of the witness")
  const arrived = next(witness, "mark")
  say({ waiting: "event after leave", publish: [
    publish("to:room:1:new_msg", '{"text":"too late"}'), publish("to:room:witness:mark", "{}"),
  ] })
  await arrived
  // phoenix.js closes the channel by itself when it hears the ok, so the close may come first.
  equal([...seen].sort(), ["close", "ok"], "what the client heard")
  equal(events.new_msg, before, "events counted")
})

await check("the topic of the protocol itself cannot be joined", async () => {
  const channel = socket.channel("phoenix")
  equal(await refusal(channel.join(), "the join"), { reason: "unmatched topic" }, "the refusal")
  channel.leave()
})

await check("heartbeats are answered and keep the connection", async () => {
  const { socket: beating, connections } = open({ heartbeatIntervalMs: 500 * PATIENCE })
  let closes = 0
  beating.onClose(() => { closes += 1 })
  const replies = []
  const four = new Promise(resolve => beating.onMessage(message => {
    if (message.topic === "phoenix") replies.push(message.payload.status)
    if (replies.length === 4) resolve()
    return message
  }))
  beating.connect()
  await within(four, "four answers to heartbeats")
  equal([replies, closes, connections.length], [["ok", "ok", "ok", "ok"], 0, 1], "answers, closes, connections")
  await finished(beating)
})

async function rejoins(topic, endpoint, drop) {
  let asked = 0
  const { socket: dropped, connections } = open({ params: () => ({ attempt: ++asked }) }, endpoint)
  const channel = dropped.channel(topic, () => ({ token: `t${asked}` }))
  let joins = 0
  const twice = new Promise(resolve => {
    channel.join().receive("ok", () => { if (++joins === 2) resolve(); else drop(connections[0]) })
  })
  const closed = new Promise(resolve => dropped.onClose(resolve))
  dropped.connect()
  const { code } = await within(closed, "the close")
  await within(twice, "the second join")
  const arrived = next(channel, "mark")
  say({ waiting: `event after rejoin of ${topic}`, publish: [publish(`to:${topic}:mark`, '{"n":2}')] })
  equal(await arrived, { n: 2 }, "the event")
  await finished(dropped)
  return `closed with ${code}, ${asked} connections`
}

await check("comes back after the relay dropped the socket", async () => {
  // A frame that is no message: the relay closes, with a code that lets the client come back.
  const said = await rejoins("room:dropped", url, connection => connection.send("this is no message"))
  if (said.startsWith("closed with 1000") || said.startsWith("closed with 1006")) throw new Error(said)
  return said
})

await check("comes back after the network cut it off", async () => {
  const { hostname, port } = new URL(url)
  const cuts = new Set()
  const proxy = net.createServer(near => {
    const far = net.connect(Number(port), hostname)
    for (const [a, b] of [[near, far], [far, near]]) {
      a.on("error", () => b.destroy()).on("close", () => b.destroy()).pipe(b)
      cuts.add(a)
    }
  })
  await new Promise(resolve => proxy.listen(0, "127.0.0.1", resolve))
  const through = new URL(url)
  through.port = String(proxy.address().port)
  try {
    const said = await rejoins("room:cut", through.href, () => { for (const end of cuts) end.destroy() })
    if (!said.startsWith("closed with 1006")) throw new Error(said)
    return said
  } finally {
    for (const end of cuts) end.destroy()
    proxy.close()
  }
})

await check("disconnects", () => finished(socket))

process.exit(failures() ? 1 : 0)
