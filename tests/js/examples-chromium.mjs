// The examples' pages in a real browser, driven by tests/integration/test_examples.py.
//   node examples-chromium.mjs <relay http url> chat|aircraft <png path> [--dark] [--width=N] [--height=N]

import { findings } from "./axe.mjs"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, name, screenshot, ...flags] = process.argv.slice(2)
const number = (flag, otherwise) => Number(flags.find(f => f.startsWith(`--${flag}=`))?.split("=")[1] ?? otherwise)
const looks = { dark: flags.includes("--dark"), width: number("width", 1280), height: number("height", 800) }
const publish = (redis_channel, payload) => say({ waiting: redis_channel, publish: [{ redis_channel, payload }] })

const until = (page, what, condition, ...args) => within(page.waitForFunction(condition, { polling: 100 }, ...args), what) // also behind other pages
const isShown = text => document.querySelector("#messages").textContent.includes(text)

async function chat(page) {
  const nick = `Ada${looks.width}${looks.dark}`
  const enter = async visitor => {
    await visitor.type("#nick", nick)
    await visitor.click("#enter button")
  }

  await check("one comes in", async () => {
    await enter(page)
    await within(page.waitForSelector("#say:not([hidden])"), "the room")
    equal(await page.$eval("#title", element => element.textContent), "#lobby", "title")
  })

  await check("what one says is shown, as text", async () => {
    await page.type("#text", "<b>Hello</b>")
    await page.click("#say button")
    await until(page, "one's own message", isShown, `${nick}<b>Hello</b>`)
  })

  await check("what another says is shown", async () => {
    publish("to:chat:lobby:new_msg", JSON.stringify({ nick: "Grace", text: "Good morning", at: "2026-05-04T09:30:00Z" }))
    await until(page, "the other's message", isShown, "GraceGood morning")
  })

  await check("who is here, and who is typing", async () => {
    const other = await page.browser().newPage()
    await other.goto(`${origin}/api/chat/`)
    await other.type("#nick", "Grace")
    await other.click("#enter button")
    await within(other.waitForSelector("#say:not([hidden])"), "the room")
    const both = nick => [...document.querySelectorAll("#members li")].map(li => li.textContent).join() === `${nick},Grace`
    for (const visitor of [page, other]) await until(visitor, "both", both, nick)
    // What is shown for three seconds is kept, in case this page is looked at later.
    await page.evaluate(() => {
      window.typed = []
      const line = document.querySelector("#typing")
      new MutationObserver(() => typed.push(line.textContent)).observe(line, { childList: true, characterData: true, subtree: true })
    })
    const hasSaid = text => window.typed.includes(text)
    await other.type("#text", "Good")
    const says = text => document.querySelector("#typing").textContent === text
    await page.bringToFront()
    await until(page, "that Grace is typing", hasSaid, "Grace is typing…")
    await until(other, "nothing of oneself", says, "")
    await page.screenshot({ path: screenshot.replace(".png", "-typing.png") })
    await until(page, "that she is not any more", says, "")
    await other.bringToFront()
    await page.evaluate(() => { window.typed = [] })
    await other.type("#text", "!")
    await until(page, "that she is again", hasSaid, "Grace is typing…")
    await other.click("#say button")
    await page.bringToFront()
    await until(page, "what she has written", isShown, "Good!")
    await until(page, "that she is not any more", says, "")
    await other.close()
    const alone = nick => [...document.querySelectorAll("#members li")].map(li => li.textContent).join() === nick
    await until(page, "her leave", alone, nick)
  })

  await check("nothing said is nothing sent", async () => {
    await page.click("#say button")
    await until(page, "the refusal", () => document.querySelector("#failure").textContent === "Not sent: text is missing.")
  })

  await check("a nick that is taken is refused, and free again afterwards", async () => {
    const other = await page.browser().newPage()
    await other.goto(`${origin}/api/chat/`)
    await enter(other)
    const refused = () => document.querySelector("#refusal").textContent === "Refused: nick is taken."
    await until(other, "the refusal", refused)
    await page.bringToFront()
    await page.click("#leave")
    await other.bringToFront()
    const again = setInterval(() => other.click("#enter button").catch(() => null), 200)
    await within(other.waitForSelector("#say:not([hidden])"), "the room").finally(() => clearInterval(again))
    await other.close()
    await page.bringToFront()
  })
}

async function aircraft(page) {
  const text = id => page.$eval(id, element => element.textContent)
  const report = (latitude, longitude) =>
    JSON.stringify({ icao24: "39de4f", callsign: "AFR1782", latitude, longitude, altitude: 12_000, groundspeed: 280 })

  await check("the page joins the tiles in view, and as few as the relay allows", async () => {
    await until(page, "joined topics", () => Number(document.querySelector("#topics").textContent) > 5)
    const topics = Number(await text("#topics"))
    if (topics > 96) throw new Error(`${topics} topics`)
    return topics
  })

  await check("an aircraft that is reported is in view, and says what it is when pointed at", async () => {
    const again = setInterval(() => publish("jet1090-full", report(48.5, 9)), 300)
    const seen = until(page, "an aircraft in view", () => document.querySelector("#in-view").textContent === "1")
    await seen.finally(() => clearInterval(again))
    await page.mouse.move(looks.width / 2, looks.height / 2) // where the map begins
    await within(page.waitForSelector("#card:not([hidden])"), "its card")
    equal(await text("#callsign"), "AFR1782", "callsign")
    equal(await text("#altitude"), "12,000 ft", "altitude")
    equal(await text("#topic"), "aircraft:45:5", "topic")
  })

  await check("dragging shows other tiles, whose aircraft are there at once", async () => {
    publish("jet1090-full", report(64, 9).replace("39de4f", "4ca123"))
    const [x, y] = [looks.width / 2, looks.height / 2]
    for (let drag = 0; drag < 4; drag += 1) {
      await page.mouse.move(x, y)
      await page.mouse.down()
      await page.mouse.move(x, y + 0.19 * Math.max(looks.width, looks.height), { steps: 5 }) // a quarter of the way
      await page.mouse.up()
    }
    await until(page, "the aircraft in the north", () => document.querySelector("#in-view").textContent === "1")
  })

  await check("the map is drawn", async () => {
    const colours = await page.$eval("#map", canvas => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
      return new Set(new Uint32Array(data.buffer)).size
    })
    if (colours < 10) throw new Error(`${colours} colours`)
    return colours
  })
}

await inBrowser(origin, async (page, faults) => {
  await check("the page opens and connects", async () => {
    equal((await page.goto(`${origin}/api/${name}/`, { waitUntil: "load" })).status(), 200, "status")
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
  })
  await { chat, aircraft }[name](page)
  await check("nothing is wider than the window", async () => {
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
    if (content > window) throw new Error(`the page is ${content} px wide, the window ${window} px`)
  })
  await page.screenshot({ path: screenshot })
  await check("axe finds nothing", async () => equal(await findings(page), [], "findings"))
  await check("nothing went wrong in the browser", () => equal(faults, [], "faults"))
}, looks)

process.exit(failures() ? 1 : 0)
