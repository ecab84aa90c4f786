// Pictures of the console at work.
//   node console-pictures.mjs <relay http url> <directory> <seconds to wait first> <topic to open>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin, directory, seconds, topic] = process.argv.slice(2)

async function take(name, hash, { dark = false, width = 1280, height = 770, search } = {}) {
  await inBrowser(origin, async (page, faults) => {
    await check(name, async () => {
      await page.goto(`${origin}/console${hash}`, { waitUntil: "load" })
      await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
      if (search) await page.type("#topic-search", search).then(() => page.evaluate(() => document.activeElement.blur()))
      await new Promise(resolve => setTimeout(resolve, 1000 * seconds))
      await within(page.waitForFunction(() => document.querySelectorAll(".view:not([hidden]) :is(.line, .log li, .item)").length >= 3), "metrics")
      await page.screenshot({ path: `${directory}/${name}.png` })
      equal(faults, [], "faults")
    })
  }, { dark, width, height })
}

// Two at a time begin: a browser is heavy, but then each waits for most of its time.
const first = [take("console-light", ""), take("console-dark", "", { dark: true })]
await Promise.race([Promise.all(first), new Promise(resolve => setTimeout(resolve, 5000))])
await Promise.all([
  ...first,
  take("console-narrow", "", { dark: true, width: 360, height: 780 }),
  take("console-topic", `#topics/${topic}`, { height: 860, search: topic.split(":")[0] }),
])
process.exit(failures() ? 1 : 0)
