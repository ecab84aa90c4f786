// The relay's client as its README has it, and what its types must refuse: compiled with tsc --strict.
import { Channel, decode, encode, type ChannelEvent, type Message, Push, PushError, Socket } from "client"
import { Presence } from "presence"

const socket = new Socket("socket", { authToken: () => undefined, params: { a: { b: 1 } } })
socket.connect()

const room: Channel = socket.channel("room:1", () => ({ since: Date.now() }))
await room.join()
const reply: { id: number } = await room.push("new_msg", new Uint8Array([1, 2]))
const settled: Push = room.push("x")
await settled.catch((error: PushError) => console.log(error.status, error.reason, error.response))
await settled.finally(() => {})

for await (const { event, payload, lost } of room) {
  const counted: number = lost
  console.log(event.length, payload.text, counted, reply.id)
}
const kept: Channel = socket.channel("room:2").recover({ since: sessionStorage.position ?? null, last: 20 })
kept.on("new_msg", (payload, ref, joinRef, position?: string) => console.log(payload, ref, joinRef, position))
for await (const { position } of kept) sessionStorage.position = position
const stream = room.events({ limit: 10 })
const first: IteratorResult<ChannelEvent> = await stream.next()
console.log(first.done, stream.lost, room.isJoined() && room.canPush())

const message: Message = decode(encode({ join_ref: null, ref: "1", topic: "t", event: "e", payload: {} }))
console.log(message.join_ref)
socket.off([socket.onOpen(() => {}), socket.onMessage(({ topic }) => console.log(topic))])

const presence = new Presence(room)
presence.onJoin((key, current, joined) => console.log(key, current?.metas.length, joined.metas[0].user))
presence.onLeave((key, current, left) => console.log(key, current.metas.length, left.metas[0].meta.name))
const names: string[] = presence.list((key, { metas: [first] }) => first.user ?? key)
console.log(names, presence.count + 1, presence.state.ada?.metas, presence.inPendingSyncState())

// @ts-expect-error: no such option
new Socket("socket", { heartbeatMs: 1 })
// @ts-expect-error: a position is text
room.recover({ since: 1 })
// @ts-expect-error: channels are made by a socket
new Channel()
// @ts-expect-error: an event has a name
room.push()
// @ts-expect-error: callbacks come first
socket.disconnect(1000)
// @ts-expect-error: what failed is no Error of any kind
const status: number = new PushError().status
