// The relay's own client in a real browser, on a page of the relay: the wire, `await`, `for await`, and what only a
// browser has: a page that is hidden, a network that goes and comes.
//   node client-chromium.mjs <relay http url>

import fs from "node:fs"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, PATIENCE, say, within } from "./report.mjs"

const [origin] = process.argv.slice(2)
const vectors = JSON.parse(fs.readFileSync(new URL("../vectors/frames.json", import.meta.url)))
const publish = (redis_channel, payload) => say({ waiting: redis_channel, publish: [{ redis_channel, payload }] })

await inBrowser(origin, async (page, faults) => {
  const sent = []
  const devtools = await page.createCDPSession()
  await devtools.send("Network.enable")
  devtools.on("Network.webSocketFrameSent", ({ response }) => sent.push(response.payloadData))
  const heartbeats = () => sent.filter(frame => frame.includes('"heartbeat"')).length

  await page.goto(`${origin}/health`) // without scripts of its own, on the relay's own origin
  await page.evaluate(async () => Object.assign(window, await import("/static/relay.js")))

  await check("every frame of the table is encoded or decoded as it says", async () => {
    const wrong = await page.evaluate(vectors => {
      const bytes = hex => Uint8Array.from(hex.match(/../g) ?? [], pair => parseInt(pair, 16)).buffer
      const hexOf = frame => Array.from(new Uint8Array(frame), byte => byte.toString(16).padStart(2, "0")).join("")
      const plain = value => JSON.stringify(value, (_, part) => part instanceof ArrayBuffer ? hexOf(part) : part)
      const wrong = []
      for (const vector of vectors) {
        const { join_ref, ref, topic, event, status } = vector
        const valueOf = name => `${name}_hex` in vector ? bytes(vector[`${name}_hex`]) : vector[name]
        const payload = status ? { status, response: valueOf("response") } : valueOf("payload")
        const message = { join_ref, ref, topic, event, payload }
        const frame = vector.text ?? bytes(vector.hex)
        const [is, ought] = vector.direction === "server" ? [decode(frame), message] : [encode(message), frame]
        if (plain(is) !== plain(ought)) wrong.push(vector.name)
      }
      return wrong
    }, vectors.filter(({ version }) => version === 2))
    equal(wrong, [], "wrong ones")
  })

  await check("a join and a push are awaited", async () => {
    const replies = await within(page.evaluate(async patience => {
      class Kept extends WebSocket {
        constructor(...args) {
          super(...args)
          window.connection = this
          window.connections = (window.connections ?? 0) + 1
        }
      }
      window.socket = new Socket("socket", { transport: Kept, timeout: 3_000 * patience, reconnectAfterMs: () => 3_600_000 })
      socket.connect()
      window.room = socket.channel("room:own")
      const joined = await room.join()
      window.events = room.events()
      window.rejoined = 0
      room.onError(() => { window.rejoined += 1 })
      return [joined, await room.push("shout", { text: "from the browser" }), await room.push("raw", new Uint8Array([7]))]
    }, PATIENCE), "the replies")
    equal(replies, [{}, {}, {}], "the replies")
  })

  await check("events are iterated over", async () => {
    publish("to:room:own:new_msg", '{"text":"hi"}')
    publish("to:room:own:raw", "no JSON")
    const got = await within(page.evaluate(async () => {
      const got = []
      for await (const { event, payload, lost } of events) {
        got.push([event, payload instanceof ArrayBuffer ? new TextDecoder().decode(payload) : payload, lost])
        if (got.length === 2) return got
      }
    }), "two events")
    equal(got, [["new_msg", { text: "hi" }, 0], ["raw", "no JSON", 0]], "the events")
  })

  const until = (what, condition) => within(page.waitForFunction(condition), what).then(() => null)

  await check("a network that goes is probed at once", async () => {
    const before = heartbeats()
    await page.setOfflineMode(true)
    await within((async () => {
      while (heartbeats() === before) await new Promise(resolve => setTimeout(resolve, 10))
    })(), "a heartbeat")
  })

  await check("a network that is back means a connection at once, and the channel joined again", async () => {
    await until("the loss, for want of an answer", () => !socket.isConnected())
    await page.setOfflineMode(false) // the next try by itself would be in an hour
    await until("the rejoin", () => room.state === "joined" && connections > 1)
  })

  await check("a hidden page does not reconnect, and does when it is looked at", async () => {
    // A hidden page runs, and is told so by the browser itself.
    const other = await page.browser().newPage()
    await other.bringToFront()
    await within(page.evaluate(() => new Promise(resolve => {
      const look = () => document.hidden && resolve()
      document.addEventListener("visibilitychange", look)
      look()
    })), "the page to be hidden")
    const before = await page.evaluate(() => connections)
    await page.evaluate(() => { socket.reconnectAfterMs = () => 0 })
    await page.evaluate(() => connection.send("this is no message")) // the relay closes
    await within(page.evaluate(() => new Promise(resolve => {
      // Timers run in their order: had there been a try, its timer would have been set before this one.
      const wait = () => socket.isConnected() ? setTimeout(wait, 5) : setTimeout(resolve, 50)
      wait()
    })), "the loss")
    equal(await page.evaluate(() => connections), before, "connections while hidden")
    await page.bringToFront()
    await until("the rejoin", () => !document.hidden && room.state === "joined")
    equal(await page.evaluate(() => connections), before + 1, "connections afterwards")
    await other.close()
  })

  await check("a left channel ends its iteration", async () => {
    equal(await within(page.evaluate(async () => {
      await room.leave()
      return (await events.next()).done
    }), "the end"), true, "done")
  })

  await check("the example of its README does what it says", async () => {
    const readme = fs.readFileSync(new URL("../../clients/browser/README.md", import.meta.url), "utf8")
    const [, code] = readme.match(/```js\n([^]*?)```/)
    const example = await page.browser().newPage()
    const printed = []
    let replies = 0
    example.on("console", message => printed.push(message.text()))
    const wire = await example.createCDPSession()
    await wire.send("Network.enable")
    wire.on("Network.webSocketFrameReceived", ({ response }) => { replies += response.payloadData.includes('"ok"') })
    const came = (what, condition) => within((async () => {
      while (!condition()) await new Promise(resolve => setTimeout(resolve, 10))
    })(), what)
    await example.goto(`${origin}/health`)
    // As a module of a page; its last loop has no end.
    const body = code.replace(/^import (.*) from (".*");$/m, "const $1 = await import($2)")
    example.evaluate(`(async () => { ${body} })()`).catch(error => printed.push(error.message))
    await came("the replies to its join and its push", () => replies === 2)
    publish("to:room:1:new_msg", '{"text":"hi"}')
    await came("what it prints", () => printed.length >= 2)
    equal(printed.map(line => line.replace(/JSHandle@object|\[object Object\]/, "…")), ["hi", "new_msg … 0"], "printed")
    await example.close()
  })

  // A browser asks every new host for its icon, also where there is none.
  await check("nothing went wrong in the browser", () => {
    equal(faults.filter(fault => !fault.includes("favicon") && !fault.includes("404")), [], "faults")
  })
})

process.exit(failures() ? 1 : 0)
