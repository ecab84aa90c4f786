// The relay's own page in a real browser: it connects, shows metrics and events, and asks no other host for anything.
//   node page-chromium.mjs <relay http url> <png path or -> [--dark] [--width=N] [--height=N] [--story]
// --story: let it run for a while before the picture, with events as a real day would bring them.
// The parts of the page it knows: #state[data-state="live"] while the socket is open; [data-metric] b, each metric of the
// system; #events, the events on the topics joined, room:1 among them from the start; #push and #push-result.

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, screenshot, ...flags] = process.argv.slice(2)
const number = (name, otherwise) => Number(flags.find(f => f.startsWith(`--${name}=`))?.split("=")[1] ?? otherwise)
const looks = { dark: flags.includes("--dark"), width: number("width", 1280), height: number("height", 800) }

const STORY = [
  ["new_msg", { from: "Ada", text: "Is the 14:02 on time?" }],
  ["position", { flight: "AF1782", lat: 43.6294, lon: 1.3638, altitude_ft: 4325 }],
  ["typing", { from: "Grace" }],
  ["new_msg", { from: "Grace", text: "Two minutes early, gate B7." }],
  ["order_paid", { order: 10482, total: "59.90", currency: "EUR" }],
  ["position", { flight: "LX405", lat: 47.4581, lon: 8.5555, altitude_ft: 1410 }],
  ["build", { branch: "main", state: "passed", seconds: 148 }],
]

await inBrowser(origin, async (page, faults) => {
  await check("the page opens", async () => {
    const response = await page.goto(`${origin}/`, { waitUntil: "load" })
    equal(response.status(), 200, "status of /")
  })

  await check("the page connects", () => within(page.waitForSelector("#state[data-state='live']"), "an open connection")
    .then(() => null))

  await check("the page shows metrics of the system", () => within(page.waitForFunction(
    () => [...document.querySelectorAll("[data-metric] b")].some(element => /\d/.test(element.textContent)),
  ), "a metric").then(() => null))

  await check("the page shows an event published outside", async () => {
    const marker = "Hello from Redis"
    // The join may still be on its way, and Pub/Sub keeps nothing: publish until it shows.
    const shown = within(page.waitForFunction(
      text => document.querySelector("#events").textContent.includes(text), {}, marker,
    ), "the text of the event")
    const ask = () => say({
      waiting: "event", publish: [{ redis_channel: "to:room:1:new_msg", payload: JSON.stringify({ text: marker }) }],
    })
    ask()
    const again = setInterval(ask, 500)
    await shown.finally(() => clearInterval(again))
  })

  await check("the page pushes", async () => {
    await page.click("#push button")
    await within(page.waitForSelector("#push-result[data-tone='ok']"), "the reply to the push")
    return page.$eval("#push-result", element => element.textContent)
  })

  await check("nothing is wider than the window", async () => {
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
    if (content > window) throw new Error(`the page is ${content} px wide, the window ${window} px`)
  })

  if (flags.includes("--story")) {
    await page.click("#clear")
    for (let n = 0; n < 40; n += 1) {
      const [event, payload] = STORY[n % STORY.length]
      say({ waiting: "event", publish: [{ redis_channel: `to:room:1:${event}`, payload: JSON.stringify(payload) }] })
      await new Promise(resolve => setTimeout(resolve, 150 + 130 * (n * n % 7)))
    }
  }

  if (screenshot && screenshot !== "-") {
    await page.mouse.move(0, 0)
    await page.evaluate(() => {
      document.activeElement.blur()
      scrollTo(0, 0)
      return document.fonts.ready.then(() => null)
    })
    await page.screenshot({ path: screenshot })
  }
  await check("nothing went wrong in the browser", () => equal(faults, [], "faults"))
}, looks)

process.exit(failures() ? 1 : 0)
