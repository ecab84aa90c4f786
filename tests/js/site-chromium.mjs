// The site of the documentation in a real browser: its search, and its front page in light and dark.
//   node site-chromium.mjs <http url> <directory for pictures, or empty> <word=page>...

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin, pictures, ...searched] = process.argv.slice(2)
const FIRST = 8

await inBrowser(origin, async page => {
  for (const pair of searched) {
    const [word, wanted] = pair.split("=")
    await check(`${word} is found`, async () => {
      await page.goto(`${origin}/search.html?q=${word}`, { waitUntil: "load" })
      await within(page.waitForFunction(
        () => /found|did not match/.test(document.querySelector("#search-results p")?.textContent ?? "")), "the end of the search")
      const found = await page.$$eval("#search-results li > a", links => links.map(link => new URL(link.href).pathname))
      const first = [...new Set(found.map(path => path.replace(/^\/|\.html.*$/g, "")))].slice(0, FIRST)
      if (!first.includes(wanted)) throw new Error(`${wanted} was expected among ${first.join(", ")}`)
    })
  }
})
for (const dark of [false, true]) {
  await inBrowser(origin, async (page, faults) => {
    await check(`the front page has its picture, ${dark ? "dark" : "light"}`, async () => {
      await page.goto(`${origin}/`, { waitUntil: "load" })
      equal(await page.$eval("article img", image => image.naturalWidth > 1000), true, "its width")
      const accent = await page.$eval("article a", link => getComputedStyle(link).color)
      equal(accent, dark ? "rgb(82, 214, 168)" : "rgb(11, 122, 91)", "the colour of links")
      if (pictures) await page.screenshot({ path: `${pictures}/site-${dark ? "dark" : "light"}.png` })
      equal(faults, [], "faults")
    })
  }, { dark })
}

process.exit(failures() ? 1 : 0)
