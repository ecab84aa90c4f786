// axe finds nothing on the pages of a relay, light and dark, wide and narrow.
//   node axe-chromium.mjs <relay http url> <topic> [directory for pictures]
// Somebody has joined <topic>.

import { findings } from "./axe.mjs"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin, topic, pictures] = process.argv.slice(2)
const views = { page: "/", overview: "/console", topics: "/console#topics", topic: `/console#topics/${encodeURIComponent(topic)}`,
  sockets: "/console#sockets", docs: "/api/docs" }
const looks = { light: {}, dark: { dark: true }, narrow: { width: 360, height: 780 }, "narrow-dark": { width: 360, height: 780, dark: true } }

for (const [look, options] of Object.entries(looks)) {
  await inBrowser(origin, async page => {
    for (const [view, address] of Object.entries(views)) {
      await check(`${view}, ${look}`, async () => {
        await page.goto("about:blank")
        await page.goto(origin + address, { waitUntil: "load" })
        if (view !== "docs") await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
        if (view === "overview") await within(page.waitForSelector(".plot .line"), "charts")
        if (view === "topic") await within(page.waitForSelector("#joined .chip"), "the details of the topic")
        if (view === "sockets") await within(page.waitForSelector("#socket-list .item"), "the sockets")
        equal(await findings(page), [], "findings")
        if (pictures) await page.screenshot({ path: `${pictures}/${view}-${look}.png` })
      })
    }
  }, options)
}

process.exit(failures() ? 1 : 0)
