// The React hook of clients/browser/README.md in a real browser, served by Vite's dev server.
//   node react-chromium.mjs <Vite's http url> <the relay's http url> <its API key>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, relay, key] = process.argv.slice(2)

const joined = async () => Object.fromEntries(
  (await (await fetch(`${relay}/api/topics`, { headers: { authorization: `Bearer ${key}` } })).json()).map(({ topic, sockets }) => [topic, sockets]))

async function until(condition, what) {
  const poll = async () => {
    while (!await condition()) await new Promise(resolve => setTimeout(resolve, 50))
  }
  await within(poll(), what)
}

await inBrowser(origin, async (page, faults) => {
  const publish = (topic, text) => say({
    waiting: text, publish: [{ redis_channel: `to:${topic}:new_msg`, payload: JSON.stringify({ text }) }],
  })
  const lines = () => page.$$eval("li", items => items.map(item => item.textContent))

  await page.goto(origin)
  await check("it joins once under StrictMode", async () => {
    await within(page.waitForSelector("main button:enabled"), "the button to be enabled")
    await until(async () => (await joined())["room:1"] === 1, "one subscription")
  })
  await check("events reach the component, once each", async () => {
    publish("room:1", "one")
    publish("room:1", "two")
    await until(async () => (await lines()).length >= 2, "two lines")
    equal(await lines(), ["one", "two"], "lines")
  })
  await check("a push is sent", () => page.click("main button"))
  await check("another topic leaves the first and joins the second", async () => {
    await page.click("#other")
    await until(async () => JSON.stringify(await joined()) === '{"room:2":1}', "room:2 alone")
    publish("room:1", "old")
    publish("room:2", "three")
    await until(async () => (await lines()).at(-1) === "three", "the event of the second topic")
    equal((await lines()).includes("old"), false, "event of the first topic")
  })
  await check("a refusal is shown with its reason", async () => {
    await page.click("#refused")
    await within(page.waitForFunction(() => document.querySelector("p")?.textContent === "unauthorized"), "the reason")
  })
  await check("an unmounted component has left", async () => {
    await page.click("#none")
    await until(async () => Object.keys(await joined()).length === 0, "no topic")
  })
  await check("nothing went wrong in the browser", () => equal(faults, [], "faults"))
})

process.exit(failures() ? 1 : 0)
