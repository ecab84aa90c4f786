// What an application does with `phoenix` does with the relay's client too: compiled against the types of each.
import { Channel, Socket } from "client"

const socket = new Socket("/socket", {
  params: () => ({ nick: "ada" }),
  timeout: 10_000,
  heartbeatIntervalMs: 30_000,
  longPollFallbackMs: 2500,
  logger: (kind: string, message: string, data: unknown) => console.log(kind, message, data),
  reconnectAfterMs: (tries: number) => tries * 1000,
  rejoinAfterMs: (tries: number) => tries * 1000,
})
socket.onOpen(() => {})
socket.onError(() => {})
socket.onClose(() => {})
socket.connect()

const channel: Channel = socket.channel("room:1", { token: "t" })
const ref: number = channel.on("new_msg", payload => console.log(payload.text))
channel.onError(reason => console.log(reason))
channel.onClose(() => {})
channel
  .join()
  .receive("ok", response => console.log(response))
  .receive("error", ({ reason }) => console.log(reason))
  .receive("timeout", () => {})
channel.push("new_msg", { text: "hi" }, 5000).receive("ok", () => {})
channel.off("new_msg", ref)
channel.off("new_msg")
const open: boolean = socket.isConnected()
console.log(open, channel.topic, channel.state, socket.connectionState(), socket.endPointURL())
channel.leave().receive("ok", () => socket.disconnect(() => {}, 1000, "bye"))
