// The lines of the documentation that recover what a client missed, with the published browser build of the phoenix
// client in a real browser; or with the relay's own.
//   node history-chromium.mjs <alias of the phoenix package, or relay> <relay http url>

import { fileURLToPath } from "node:url"
import { inBrowser } from "./chromium.mjs"
import { cutUnderLoad, lines, openWay } from "./history.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [alias, origin] = process.argv.slice(2)
const build = fileURLToPath(new URL(`node_modules/${alias}/priv/static/phoenix.js`, import.meta.url))
const way = await openWay(origin)
const isOwn = alias === "relay"

await inBrowser(way.origin, async page => {
  const joins = []
  const devtools = await page.createCDPSession()
  await devtools.send("Network.enable")
  devtools.on("Network.webSocketFrameSent", ({ response }) => {
    const [, , , event, params] = JSON.parse(response.payloadData)
    if (event === "phx_join") joins.push(params.since)
  })

  let topic
  await check("opens a page and joins", async () => {
    equal((await page.goto(`${way.origin}/health`)).status(), 200, "status of /health")
    if (isOwn) await page.evaluate(async () => { window.Phoenix = await import("/static/relay.js") })
    else await page.addScriptTag({ path: build })
    topic = await page.evaluate((body, isOwn) => {
      const socket = new window.Phoenix.Socket("/socket", { reconnectAfterMs: () => 20, rejoinAfterMs: () => 20 })
      window.seen = []
      window.fetches = isOwn ? 1 : 0
      const channel = new Function("socket", "console", "fetchState", body)(
        socket,
        { log: text => { if (text === "too many events missed") window.fetches += 1 } },
        () => { window.fetches += 1 },
      )
      channel.on("new_msg", ({ _position, ...payload }) => window.seen.push(payload))
      socket.connect()
      window.channel = channel
      return channel.topic
    }, lines[isOwn ? "relay" : "phoenix"], isOwn)
    await within(page.waitForFunction(() => window.channel.state === "joined"), "the join")
  })

  await cutUnderLoad({
    seen: () => page.evaluate(() => window.seen),
    count: () => page.evaluate(() => window.seen.length),
    joins: () => joins,
    fetches: () => page.evaluate(() => window.fetches),
  }, way, origin, topic, (publisher, number) => ({ publisher, number, text: `${publisher}${number}` }))
})

way.end()
process.exit(failures() ? 1 : 0)
