// EventSource in a real browser with its own reconnection, against a relay that is restarted, cut, without Redis and
// full. The test does what `{"do": …}` asks for; the lines of docs/sse.md are run as they are.
//   node sse-chromium.mjs <relay http url> <JavaScript of the page's blocks, as a JSON array>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, blocks] = process.argv.slice(2)
const [live, kept, listen] = JSON.parse(blocks)
const RECONNECT_MS = 30_000 // it waits up to 5 s, and the relay has to start

await inBrowser(origin, async page => {
  let next = 1
  const publish = (count, topic = "room:1") => {
    say({ do: "publish", topic, numbers: Array.from({ length: count }, () => next++) })
  }
  const upTo = n => Array.from({ length: n }, (_, i) => i + 1)
  const shown = (count, what) => within(page.waitForFunction(
    count => window.shown.length >= count, { timeout: 0 }, count), what, RECONNECT_MS)
  const all = () => page.evaluate(() => window.shown.map(({ n }) => n))

  // Each page begins with what the blocks of the documentation expect of theirs.
  const begin = async (block, path = "/health") => {
    await page.goto(origin + path)
    await page.evaluate(() => Object.assign(window, {
      shown: [], refetched: 0, reasons: [],
      show: payload => window.shown.push(payload),
      refetch: () => { window.refetched += 1 },
    }))
    if (block) await page.addScriptTag({ content: block })
  }

  await check("the page's lines show events and fetch the state once joined", async () => {
    await begin(live.replace("room:1", "live:1"))
    await within(page.waitForFunction(() => window.refetched === 1), "relay:join")
    say({ do: "publish", topic: "live:1", numbers: [1, 2, 3] })
    await shown(3, "three events")
    equal(await all(), [1, 2, 3], "events")
  })

  await check("on a topic with a history each event is shown once and in order through three cuts", async () => {
    await begin(kept)
    await within(page.waitForFunction(() => room.readyState === EventSource.OPEN), "the stream to open")
    publish(5)
    await shown(5, "five events")
    for (let cuts = 1; cuts <= 3; cuts++) {
      say({ do: "cut" })
      publish(5)
      await shown(5 + 5 * cuts, `the events around cut ${cuts}`)
    }
    equal(await all(), upTo(20), "events")
  })

  await check("it outlives a restart of the relay", async () => {
    await page.evaluate(() => room.addEventListener("relay:error", e => window.reasons.push(JSON.parse(e.data).reason)))
    say({ do: "restart" })
    publish(3)
    await shown(23, "the events after the restart")
    equal(await all(), upTo(23), "events")
    equal(await page.evaluate(() => window.reasons), ["the relay is restarting"], "reasons")
    equal(await page.evaluate(() => window.refetched), 0, "losses")
  })

  const status = (path, wanted) => within(page.waitForFunction(
    async (path, wanted) => (await fetch(path)).status === wanted, { timeout: 0, polling: 50 }, path, wanted), path, RECONNECT_MS)
  // Another stream, which notes what it is told.
  const open = topic => page.evaluate(topic => {
    const other = { source: new EventSource(`/socket/sse?topic=${topic}`), reasons: [], numbers: [], joins: 0 }
    other.source.addEventListener("new_msg", e => other.numbers.push(JSON.parse(e.data).n))
    other.source.addEventListener("relay:error", e => other.reasons.push(JSON.parse(e.data).reason))
    other.source.addEventListener("relay:join", () => { other.joins += 1 })
    window.other = other
  }, topic)
  const refused = reason => within(page.waitForFunction(
    reason => window.other.reasons.includes(reason), { timeout: 0 }, reason), reason, RECONNECT_MS)
  const joins = () => within(page.waitForFunction(() => window.other.joins === 1, { timeout: 0 }), "the join", RECONNECT_MS)

  await check("it outlives a time without Redis, in which a new one waits", async () => {
    say({ do: "pause redis" })
    await status("/ready", 503)
    await open("room:1")
    await refused("topic 'room:1': bus unavailable")
    say({ do: "resume redis" })
    await joins()
    publish(2)
    await shown(25, "the events after it")
    equal(await all(), upTo(25), "events")
    equal(await page.evaluate(() => other.numbers), [24, 25], "events of the new one")
    await page.evaluate(() => other.source.close())
  })

  const sockets = count => within(page.waitForFunction(
    async count => (await (await fetch("/health")).json()).sockets === count, { timeout: 0, polling: 50 }, count), "sockets")

  await check("it outlives that no place is left", async () => {
    await sockets(1) // a stream that its page has closed keeps its place until the relay hears of it
    say({ do: "fill" })
    await sockets(3)
    await open("room:2")
    await refused("no room for another socket; try again later")
    say({ do: "empty" })
    await joins()
    say({ do: "publish", topic: "room:2", numbers: [77] })
    await within(page.waitForFunction(() => window.other.numbers[0] === 77), "its event")
    equal(await page.evaluate(() => room.readyState), 1, "state of the other")
    await page.evaluate(() => other.source.close())
    await sockets(2)
  })

  await check("what will not change ends it for good", async () => {
    const state = await within(page.evaluate(() => new Promise(resolve => {
      const source = new EventSource("/socket/sse?topic=phoenix")
      source.onerror = () => resolve(source.readyState)
    })), "the error")
    equal(state, 2, "readyState")
  })

  await check("the page's lines come back after a proxy's own answer, with a new address", async () => {
    await begin(listen
      .replace("listen(last =>", "let tries = 0\nlisten(last => tries++ === 0 ? '/nowhere' :")
      .replace("{ new_msg:", "{ 'relay:join': () => { window.joined = true }, new_msg:"))
    await within(page.waitForFunction(() => window.joined && tries === 2, { timeout: 0 }), "the second try", RECONNECT_MS)
    say({ do: "publish", topic: "room:1", numbers: [500] })
    await shown(1, "an event")
    equal(await all(), [500], "events")
  })
})

process.exit(failures() ? 1 : 0)
