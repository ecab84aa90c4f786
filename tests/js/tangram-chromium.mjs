// tangram's own page, as its wheels hold it, in a real browser: on the relay in the place of tangram's channel service.
//   node tangram-chromium.mjs <url of the page> <url of the relay> <file for a picture> [<what to restart> …]
// What a page cannot do, the test is asked for, by {"do": …}: to publish aircraft, to restart a server.

import { inBrowser } from "./chromium.mjs"
import { PATIENCE, check, equal, failures, say, within } from "./report.mjs"

const [url, relay, picture, ...restarts] = process.argv.slice(2)
const START_MS = 60_000

await inBrowser(url, async (page, faults) => {
  const sent = [], sockets = []
  const devtools = await page.createCDPSession()
  await devtools.send("Network.enable")
  devtools.on("Network.webSocketCreated", ({ url }) => sockets.push(new URL(url)))
  devtools.on("Network.webSocketFrameSent", ({ response }) => sent.push(JSON.parse(response.payloadData)))

  const wait = (what, body, ...args) =>
    within(page.waitForFunction(body, { timeout: 0 }, ...args), what, START_MS)
  const text = selector => page.$eval(selector, element => element.textContent)
  const joins = topic => sent.filter(([, , name, event]) => event === "phx_join" && name === topic).length
  const streaming = () => sent.map(([, , topic]) => topic).find(topic => topic.startsWith("streaming-"))

  // The system panel counts up; an aircraft is shown; the map's bounds come out on Redis.
  async function works(round, count) {
    await check(`${round}: the system panel counts up`, async () => {
      await wait("an uptime", () => /^\d+:\d\d:\d\d$/.test(document.querySelector("#uptime")?.textContent))
      const before = await text("#uptime")
      await wait("the next uptime", shown => document.querySelector("#uptime").textContent !== shown, before)
    })
    await check(`${round}: an aircraft appears`, async () => {
      say({ do: "publish aircraft", topic: streaming(), count })
      await wait("the number of aircraft", count => document.body.innerText.includes(`1 (${count})`), count)
    })
    await check(`${round}: a bounding box comes out on Redis`, async () => {
      say({ do: "listen for a bounding box" })
      const drag = async () => {
        await page.mouse.move(500, 500)
        await page.mouse.down()
        await page.mouse.move(480, 480, { steps: 4 })
        await page.mouse.up()
      }
      const before = sent.length
      const isSent = () => sent.slice(before).some(([, , , event]) => event === "bound-box")
      const end = Date.now() + START_MS * PATIENCE
      while (!isSent() && Date.now() < end) {
        await drag()
        await new Promise(resolve => setTimeout(resolve, 200))
      }
      equal(isSent(), true, "a push of the bounds")
      say({ do: "expect a bounding box", id: streaming().slice("streaming-".length) })
    })
  }

  await check("the page joins", async () => {
    equal((await page.goto(url)).status(), 200, "status of the page")
    await wait("the page", () => document.querySelector("#uptime"))
    const end = Date.now() + START_MS * PATIENCE
    while (!(streaming() && joins("system")) && Date.now() < end) await new Promise(resolve => setTimeout(resolve, 50))
    equal([joins("system"), joins(streaming())], [1, 1], "joins")
    equal([...new Set(sockets.map(({ pathname }) => pathname))], ["/websocket"], "where it connects to")
    equal(sockets[0].host, new URL(relay).host, "host of the socket")
  })
  await works("at first", 41)
  await page.screenshot({ path: picture })
  for (const [index, restart] of restarts.entries()) {
    const before = joins("system")
    say({ do: restart })
    await check(`${restart}: the page joins again`, async () => {
      const end = Date.now() + START_MS * PATIENCE
      while (joins("system") === before && Date.now() < end) await new Promise(resolve => setTimeout(resolve, 50))
      equal(joins("system") > before, true, "a join")
    })
    await works(`after "${restart}"`, 42 + index)
  }
  await check("nothing is asked of another host", async () => {
    equal(faults.filter(fault => /^(another host|uncaught)/.test(fault)), [], "faults")
  })
}, {
  width: 1100,
  height: 700,
  hosts: [new URL(relay).host],
  args: [
    // The map needs WebGL, and no other host is to be found.
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1",
  ],
})

process.exit(failures() ? 1 : 0)
