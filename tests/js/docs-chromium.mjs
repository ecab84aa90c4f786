// The page at /api/docs in a real browser: the routes are shown and can be tried, and nothing is loaded from elsewhere.
//   node docs-chromium.mjs <relay http url> <API key> <name of a plugin's route>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin, key, plugins] = process.argv.slice(2)

await inBrowser(origin, async (page, faults) => {
  const routes = () => page.$$eval(".route summary", all => all.map(route => route.textContent))
  const open = text => page.evaluate(wanted => {
    const found = [...document.querySelectorAll(".route")].find(route =>
      [...route.querySelectorAll("summary > b, summary > code")].map(part => part.textContent).join(" ") === wanted)
    found.open = true
    found.id = "opened"
  }, text)
  const close = () => page.$eval("#opened", route => { route.open = false; route.removeAttribute("id") })
  const answer = async () => {
    await within(page.waitForSelector("#opened .answer[data-state='good'], #opened .answer[data-state='bad']"), "an answer")
    return page.$eval("#opened .answer", shown => shown.textContent)
  }

  await check("the page shows all routes under a policy that names this place alone", async () => {
    const response = await page.goto(`${origin}/api/docs`, { waitUntil: "load" })
    equal(response.status(), 200, "status of /api/docs")
    const policy = response.headers()["content-security-policy"]
    equal(/unsafe|\*|wss?:|https?:/.test(policy), false, `the policy names this place alone: ${policy}`)
    await within(page.waitForSelector(".route"), "routes")
    const shown = (await routes()).join("\n")
    for (const name of ["/publish", "/topics", "/users/{user}", plugins]) {
      if (!shown.includes(name)) throw new Error(`${name} is not shown`)
    }
    return shown.split("\n").length
  })

  await check("without its key the relay refuses, and the page says so", async () => {
    await open("GET /topics")
    await page.click("#opened button")
    const text = await answer()
    equal(text.includes("401") && text.includes("expected the API key"), true, text)
    faults.splice(0, faults.length, ...faults.filter(fault => !fault.includes("401"))) // as asked for
    await close()
  })

  await check("with its key an event can be published", async () => {
    await page.type("#key-value", key)
    await open("POST /publish")
    await page.click("#opened button")
    const text = await answer()
    equal(text.includes("200") && text.includes('"published": 1'), true, text)
    const body = JSON.parse(await page.$eval("#opened textarea", area => area.value))
    equal(body, { topic: "room:1", event: "new_msg", payload: { text: "hi" } }, "the example")
    await close()
  })

  await check("names are sent encoded", async () => {
    await open("GET /topics/{topic}")
    await page.type("#opened input", "a/b?c#d")
    await page.click("#opened button")
    const text = await answer()
    equal(text.includes("/api/topics/a%2Fb%3Fc%23d") && text.includes("no socket has joined 'a/b?c#d' in this process"), true, text)
    faults.splice(0, faults.length, ...faults.filter(fault => !fault.includes("404"))) // as asked for
    await close()
  })

  await check("the key is kept nowhere", async () => {
    equal(await page.evaluate(() => JSON.stringify([{ ...localStorage }, { ...sessionStorage }])), "[{},{}]", "storage")
    equal((await page.cookies()).length, 0, "cookies")
  })

  await check("nothing is wider than the window", async () => {
    await page.setViewport({ width: 390, height: 844 })
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
    if (content > window) throw new Error(`the page is ${content} px wide, the window ${window} px`)
  })

  await check("no error, and no request to another host", () => equal(faults, [], "faults"))
})

process.exit(failures() ? 1 : 0)
