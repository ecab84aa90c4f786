// The console of a relay on a Redis Cluster: a line for each master, also while one is down.
//   node console-cluster.mjs <relay http url> <topics joined> [directory for pictures]
// The test stops a master and its replicas, and starts them again, when it is asked to.

import { findings } from "./axe.mjs"
import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, joined, pictures] = process.argv.slice(2)
const LOOKS = { wide: [1280, 860, "light"], "narrow-dark": [360, 780, "dark"] }
const FURTHER = { "wide-dark": [1280, 860, "dark"], narrow: [360, 780, "light"] } // for pictures
const RETURN_MS = 30_000 // a cluster takes seconds to see that a node is back

await inBrowser(origin, async (page, faults) => {
  const lines = () => page.$$eval("#shards tbody tr", rows => rows.map(row => [...row.cells].map(cell => cell.textContent)))
  const until = (what, body, ...given) =>
    within(page.waitForFunction(body, { timeout: 0 }, ...given), what, RETURN_MS).then(() => null)
  const areAll = (...tones) => until(`masters that are ${tones}`, wanted => {
    const found = [...document.querySelectorAll("#shards tbody td[data-tone]")].map(cell => cell.dataset.tone).sort()
    return JSON.stringify(found) === wanted
  }, JSON.stringify(tones))

  await check("each master has a line", async () => {
    await page.goto(`${origin}/console`, { waitUntil: "load" })
    await areAll("ok", "ok", "ok")
    await until("the topics", wanted => {
      const counts = [...document.querySelectorAll("#shards tbody tr")].map(row => Number(row.cells[4].textContent))
      return counts.reduce((sum, count) => sum + count, 0) === wanted
    }, Number(joined))
    await until("a lag of each", () => [...document.querySelectorAll("#shards tbody tr")].every(row => row.cells[2].textContent.endsWith(" ms")))
    equal((await lines()).map(([node, link, , gaps, , lingering]) => [/^127\.0\.0\.1:\d+$/.test(node), link, gaps, lingering]),
      Array(3).fill([true, "live", "0", "0"]), "the lines")
    equal(await page.$eval("#shards-fault", fault => fault.textContent), "", "the fault")
  })

  await check("one that is down is red, with the reason", async () => {
    const [[node]] = await lines()
    say({ do: "stop", node })
    await areAll("bad", "ok", "ok")
    const [line] = (await lines()).filter(([, link]) => link === "down")
    equal([line[0], line[2]], [node, "–"], "the master that is down, and its lag")
    await until("the reason", () => document.querySelector("#shards-fault").textContent.startsWith("1 of 3 nodes are not heard: "))
    for (const [look, [width, height, colours]] of Object.entries(pictures ? { ...LOOKS, ...FURTHER } : LOOKS)) {
      await page.setViewport({ width, height })
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: colours }])
      equal(await findings(page), [], `findings, ${look}`)
      equal(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), true, `it fits, ${look}`)
      if (pictures) await (await page.$("#shards-view")).screenshot({ path: `${pictures}/cluster-${look}.png` })
    }
  })

  await check("one that is back is live again, and its gap is counted", async () => {
    say({ do: "start" })
    await areAll("ok", "ok", "ok")
    await until("no reason", () => !document.querySelector("#shards-fault").textContent)
    await until("a gap", () => [...document.querySelectorAll("#shards tbody tr")].some(row => Number(row.cells[3].textContent) > 0))
    equal(faults, [], "faults")
  })
})

process.exit(failures() ? 1 : 0)
