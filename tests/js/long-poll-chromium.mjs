// The published phoenix client on long polling, in a real browser.
//   node long-poll-chromium.mjs <alias of the phoenix package> <page's origin> <options of the Socket> <tokens>
// `{"do": …}` has the test do something; see long-poll.mjs.

import { fileURLToPath } from "node:url"
import { inBrowser } from "./chromium.mjs"
import { longPoll, outage } from "./long-poll.mjs"
import { PATIENCE, check, failures, say } from "./report.mjs"

const [alias, origin, options, tokens] = process.argv.slice(2)
const build = fileURLToPath(new URL(`node_modules/${alias}/priv/static/phoenix.js`, import.meta.url))

await inBrowser(origin, async page => {
  await page.exposeFunction("ask", what => say({ do: what }))
  await page.exposeFunction("report", (name, fault) => check(name, () => { if (fault) throw new Error(fault) }))
  await page.goto(`${origin}/health`)
  await page.addScriptTag({ path: build })
  await page.evaluate(`(${options.includes("outage") ? outage : longPoll})({
    Phoenix: window.Phoenix, url: "/socket", api: "/api", options: ${options}, tokens: ${tokens},
    patience: ${PATIENCE},
  }, window.ask, window.report)`)
})
process.exit(failures() ? 1 : 0)
