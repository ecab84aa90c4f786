// The page of examples/vite in a real browser, served by Vite's dev server.
//   node vite-chromium.mjs <Vite's http url>

import { findings } from "./axe.mjs"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin] = process.argv.slice(2)

await inBrowser(origin, async (page, faults) => {
  const shows = (id, text) => within(page.waitForFunction(
    (id, text) => document.getElementById(id)?.value.includes(text), {}, id, text,
  ), `${text} in #${id}`).then(() => null)

  await check("the page opens", async () => equal((await page.goto(origin)).status(), 200, "status"))
  await check("the relay lets it join", () => shows("state", "joined"))
  await check("a push reaches the plugin, and its event the page", () => shows("sum", "6"))
  await check("the plugin answers plain HTTP, without its prefix", () => shows("plugin", '{"plugin":"node","answered":'))
  await check("the relay answers plain HTTP", () => shows("topics", '"calc"'))
  await check("axe finds nothing", async () => equal(await findings(page), [], "findings"))
  await check("nothing went wrong in the browser", () => equal(faults, [], "faults"))
})

process.exit(failures() ? 1 : 0)
