// The map of docs/tutorial.md in a real browser, driven by tests/integration/test_docs.py.
//   node tutorial-chromium.mjs <relay http url> [<token that opens it> <key of the console>]

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, token, key] = process.argv.slice(2)
const publish = (redis_channel, position) =>
  say({ waiting: redis_channel, publish: [{ redis_channel, payload: JSON.stringify(position) }] })

await inBrowser(origin, async (page, faults) => {
  const until = (what, condition, ...args) => within(page.waitForFunction(condition, {}, ...args), what)
  const reads = text => until(text, text => document.querySelector("#state").textContent === text, text)
  const at = id => page.$eval(`#${id}`, element => element.style.transform)
  const moved = (id, from) => until(`${id} to move`, (id, from) =>
    (document.querySelector(`#${id}`)?.style.transform ?? from) !== from, id, from)
  const open = async hash => {
    await page.goto("about:blank") // another hash alone would not load the page anew
    await page.goto(`${origin}/api/sky/${hash}`, { waitUntil: "load" })
  }

  if (token) {
    await check("without a token nothing is shown", async () => {
      await open("")
      await reads("no connection")
      equal(await page.$$eval(".plane", planes => planes.length), 0, "planes")
    })
  }

  await check("three aircraft fly", async () => {
    await open(token ? `#${token}` : "")
    await reads("live")
    await until("three aircraft", () => document.querySelectorAll(".plane").length === 3)
    await moved("KLM12", await at("KLM12"))
  })

  await check("one is moved by hand", async () => {
    publish("to:aircraft:europe:position", { id: "YOU", lon: 2.5, lat: 49 })
    await moved("YOU", "")
    const paris = await at("YOU")
    publish("to:aircraft:europe:position", { id: "YOU", lon: 6, lat: 45 })
    await moved("YOU", paris)
  })

  await check("one is moved from the console, where the events pass by", async () => {
    const before = await at("YOU")
    const console = await page.browser().newPage()
    await console.goto(`${origin}/console#topics/aircraft%3Aeurope`, { waitUntil: "load" })
    if (key) {
      await console.waitForSelector("#key:not([hidden])")
      await console.type("#key-value", key)
      await console.keyboard.press("Enter")
    }
    await within(console.waitForFunction(() => document.body.innerText.includes("BAW56")), "events in the console")
    await console.$eval("#publish-event", field => { field.value = "position" })
    await console.$eval("#publish-payload", field => { field.value = '{"id": "YOU", "lon": 0, "lat": 50}' })
    await console.click("#publish button:not([type])")
    await within(console.waitForSelector("#publish-result[data-tone=ok]"), "the console's reply")
    await console.close()
    await page.bringToFront() // in the background nothing is waited for
    await moved("YOU", before)
  })

  await check("the page is in view, and no other host is asked", async () => {
    const isInView = await page.$$eval("#map text", texts => texts.every(text => {
      const { left, right, top, bottom } = text.getBoundingClientRect()
      return left >= 0 && right <= innerWidth && top >= 0 && bottom <= innerHeight
    }))
    equal(isInView, true, "all in view")
    // The browser logs each handshake that was refused, some of them late. One with the token would not read "live".
    const isRefused = fault => token && fault.includes("HTTP Authentication failed")
    equal(faults.filter(fault => !isRefused(fault)), [], "faults")
  })
})

process.exitCode = failures() ? 1 : 0
