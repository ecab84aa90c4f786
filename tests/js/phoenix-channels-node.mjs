// The npm package phoenix-channels, a port of an older phoenix.js to Node, against a relay.
//   node phoenix-channels-node.mjs <relay ws url>

import phoenixChannels from "phoenix-channels"
import { check, equal, failures, say, within } from "./report.mjs"

const [url] = process.argv.slice(2)
const socket = new phoenixChannels.Socket(url)
socket.connect()
const channel = socket.channel("room:1", {})
const replyTo = push => within(new Promise((resolve, reject) => push.receive("ok", resolve).receive("error", reject)), "a reply")

await check("it joins", async () => equal(await replyTo(channel.join()), {}, "reply"))
await check("it hears an event", async () => {
  const heard = new Promise(resolve => channel.on("new_msg", resolve))
  say({ waiting: "new_msg", publish: [{ redis_channel: "to:room:1:new_msg", payload: '{"text":"hi"}' }] })
  equal(await within(heard, "an event"), { text: "hi" }, "payload")
})
await check("its push is answered", async () => equal(await replyTo(channel.push("shout", { a: 1 })), {}, "reply"))
await check("it leaves", async () => equal(await replyTo(channel.leave()), {}, "reply"))

process.exit(failures() ? 1 : 0)
