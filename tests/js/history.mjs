// What a client goes through that recovers what it missed: cuts under load. For history-node.mjs and history-chromium.mjs.

import fs from "node:fs"
import net from "node:net"
import { check, equal, within } from "./report.mjs"

const page = name => fs.readFileSync(new URL(`../../${name}`, import.meta.url), "utf8")

// The lines of the page itself, behind those that connect: a function body that makes the channel and returns it.
const phoenix = page("docs/history.md").match(/\n## With phoenix\.js\n[^]*?```js\n[^]*?\nsocket\.connect\(\)\n([^]*?)```/)[1]
const relay = page("clients/browser/README.md").match(/\n## Recover missed events\n[^]*?```js\n([^]*?)```/)[1]
export const lines = {
  phoenix: `${phoenix}\nreturn channel`,
  relay: `${relay.replace("await room.join()", "room.join()")}\nreturn room`,
}

// A way to the relay that can be cut, closed, and cut within what the server sends.
export async function openWay(origin) {
  const { hostname, port } = new URL(origin)
  const ends = new Set()
  let isOpen = true
  let limit = Infinity
  let limited = () => {}
  const server = net.createServer(near => {
    if (!isOpen) return near.destroy()
    const far = net.connect(Number(port), hostname)
    let left = Infinity
    for (const [one, other] of [[near, far], [far, near]]) {
      ends.add(one)
      one.setNoDelay()
      one.on("error", () => {}).on("close", () => { ends.delete(one); other.destroy() })
    }
    near.on("data", bytes => {
      if (bytes.includes("/websocket?")) { left = limit; limit = Infinity }
      far.write(bytes)
    })
    far.on("data", bytes => {
      if (bytes.length < left) return near.write(bytes, () => { left -= bytes.length })
      near.end(bytes.subarray(0, left)) // the end comes after what was sent
      left = Infinity
      far.destroy()
      limited()
    })
  })
  await new Promise(resolve => server.listen(0, "127.0.0.1", resolve))
  const cut = () => { for (const end of ends) end.destroy() }
  return {
    origin: `http://127.0.0.1:${server.address().port}`,
    cut,
    close() { isOpen = false; cut() },
    open() { isOpen = true },
    // The next WebSocket is given so many bytes and no more.
    limitNext(bytes) {
      limit = bytes
      return within(new Promise(resolve => { limited = resolve }), "the end of what the server may send")
    },
    end() { cut(); server.close() },
  }
}

// Several publishers at once, each with numbers of its own.
export function publish(origin, eventOf) {
  const published = []
  let isOver = false
  const send = async events => {
    const response = await fetch(`${origin}/api/publish`, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ events }),
    })
    if (!response.ok) throw new Error(await response.text())
  }
  const one = async publisher => {
    for (let number = 0; !isOver;) {
      const batch = Array.from({ length: 5 }, () => eventOf(publisher, number++))
      await send(batch)
      published.push(...batch.map(({ payload }) => payload))
      await new Promise(resolve => setTimeout(resolve, 10))
    }
  }
  const publishers = ["a", "b", "c"].map(one)
  return {
    published,
    send,
    async reach(count) { while (published.length < count) await new Promise(resolve => setTimeout(resolve, 5)) },
    end() { isOver = true; return Promise.all(publishers) },
  }
}

// Put a client through it. `client` says what its page was given (`seen()`, `count()`), with which positions it joined
// (`joins()`), and how often it was to fetch its state (`fetches()`).
export async function cutUnderLoad(client, way, origin, topic, payloadOf) {
  const eventOf = (...names) => ({ topic, event: "new_msg", payload: payloadOf(...names) })
  const load = publish(origin, eventOf)
  const until = (what, condition) => within((async () => {
    while (!await condition()) await new Promise(resolve => setTimeout(resolve, 10))
  })(), what, 20_000)
  const away = async () => {
    way.close()
    await load.reach(load.published.length + 150)
  }
  const back = async () => {
    const missed = load.published.length
    way.open()
    await until("what was missed", async () => await client.count() >= missed)
  }

  await check("events arrive", () => until("events", async () => await client.count() >= 50))

  await check("a cut is recovered from", async () => { await away(); await back() })

  await check("a cut that falls into what follows the rejoin is recovered from", async () => {
    await away()
    const [limited, before] = [way.limitNext(4000), (await client.joins()).length]
    way.open()
    await limited
    const most = load.published.length
    await until("the next join", async () => (await client.joins()).length >= before + 2)
    const [from, to] = (await client.joins()).slice(before).map(since => Number(since.split("-")[1]))
    if (!(from < to && to < most)) throw new Error(`from ${from} to ${to} of ${most}`)
    await back()
    return `from ${from} to ${to} of ${most}`
  })

  await check("a third cut is recovered from", async () => { way.cut(); await away(); await back() })

  await check("each event came once and in order", async () => {
    await load.end()
    await until("all events", async () => await client.count() >= load.published.length)
    const text = JSON.stringify
    const seen = (await client.seen()).map(text)
    equal(new Set(seen).size, seen.length, "different events")
    equal([...seen].sort(), load.published.map(text).sort(), "the events")
    for (const publisher of ["a", "b", "c"]) {
      const own = Array.from({ length: load.published.length / 3 + 500 }, (_, number) => text(payloadOf(publisher, number)))
      const places = own.map(payload => seen.indexOf(payload)).filter(place => place >= 0)
      equal(places, [...places].sort((a, b) => a - b), `order of ${publisher}`)
    }
    return `${seen.length} events, ${(await client.joins()).length} joins`
  })

  await check("nothing was reported as lost", async () => {
    equal((await client.joins()).length >= 5, true, "joins")
    equal(await client.fetches(), 1, "how often the state was fetched")
  })

  await check("a loss is reported, and what follows is recovered again", async () => {
    way.close()
    for (let from = 0; from < 6000; from += 600) { // more than are recovered, fewer than are stored
      await load.send(Array.from({ length: 600 }, (_, number) => eventOf("d", from + number)))
    }
    way.open()
    await until("the report", async () => await client.fetches() === 2)
    const before = await client.count()
    await load.send([eventOf("f", 0)])
    await until("an event", async () => await client.count() === before + 1)
    way.close()
    await load.send([eventOf("f", 1), eventOf("f", 2)])
    way.open()
    await until("two events", async () => await client.count() >= before + 3)
    equal((await client.seen()).slice(before), [0, 1, 2].map(number => payloadOf("f", number)), "the events")
    equal(await client.fetches(), 2, "how often the state was fetched")
  })
}
