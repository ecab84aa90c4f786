// The console of a relay of two workers: the overview is of both, the lists name the one they are of.
//   node console-workers.mjs <relay http url>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin] = process.argv.slice(2)

await inBrowser(origin, async (page, faults) => {
  await check("both workers are told as one", async () => {
    await page.goto(`${origin}/console`, { waitUntil: "load" })
    await within(page.waitForFunction(() => document.querySelector("#node").textContent.endsWith(" · 2 workers")), "both")
  })

  await check("the lists say whose they are", async () => {
    for (const view of ["topics", "sockets"]) {
      await page.evaluate(name => { location.hash = `#${name}` }, view)
      const whose = await within(page.waitForSelector(`#${view}:not([hidden]) .whose:not([hidden])`), `whose ${view}`)
      equal(/^Of worker \d+ only, one of 2$/.test(await whose.evaluate(element => element.textContent)), true, view)
    }
    equal(faults, [], "faults")
  })
})

process.exit(failures() ? 1 : 0)
