// The published browser build of the phoenix client against a relay, in a real browser; or the relay's own in its place.
//   node phoenix-chromium.mjs <relay http url> <alias of the phoenix package, or relay> <screenshot path or ->

import { fileURLToPath } from "node:url"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, alias, screenshot] = process.argv.slice(2)
const build = fileURLToPath(new URL(`node_modules/${alias}/priv/static/phoenix.js`, import.meta.url))

await inBrowser(origin, async (page, faults) => {
  await check("opens a page of the relay", async () => {
    // /health answers JSON: a page without scripts or a content policy, on the relay's own origin.
    const response = await page.goto(`${origin}/health`)
    equal(response.status(), 200, "status of /health")
    if (alias === "relay") await page.evaluate(async () => { window.Phoenix = await import("/static/relay.js") })
    else await page.addScriptTag({ path: build })
  })

  await check("joins from the browser", async () => {
    const status = await within(page.evaluate(() => new Promise(resolve => {
      const socket = new window.Phoenix.Socket("/socket")
      socket.connect()
      window.room = socket.channel("room:1", {})
      window.arrived = new Promise(done => window.room.on("new_msg", done))
      window.room.join().receive("ok", () => resolve("ok")).receive("error", r => resolve(JSON.stringify(r)))
    })), "the reply to the join")
    equal(status, "ok", "reply to the join")
  })

  await check("an event published outside reaches the browser", async () => {
    say({ waiting: "event", publish: [{ redis_channel: "to:room:1:new_msg", payload: '{"text":"hi"}' }] })
    const payload = await within(page.evaluate(() => window.arrived), "new_msg")
    equal(payload, { text: "hi" }, "the event")
    return payload
  })

  await check("a push from the browser is answered", async () => {
    const status = await within(page.evaluate(() => new Promise(resolve => {
      window.room.push("shout", { text: "from the browser" })
        .receive("ok", () => resolve("ok")).receive("error", r => resolve(JSON.stringify(r)))
    })), "the reply to the push")
    equal(status, "ok", "reply to the push")
  })

  // A browser asks every new host for its icon, also where there is none.
  await check("nothing went wrong in the browser", () => {
    equal(faults.filter(fault => !fault.includes("favicon") && !fault.includes("404")), [], "faults")
  })
  if (screenshot && screenshot !== "-") await page.screenshot({ path: screenshot })
})

process.exit(failures() ? 1 : 0)
