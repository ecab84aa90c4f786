// The pages of a relay that asks for tokens, in a real browser: whoever has none is asked, and gets in with one.
//   node token-chromium.mjs <relay http url> <token> <a token that is none> <the key of the console>

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, within } from "./report.mjs"

const [origin, token, wrong, key] = process.argv.slice(2)

// The browser itself logs each refused handshake as an error: those faults are what is looked for here.
await inBrowser(origin, async (page) => {
  const give = async (text) => {
    await page.$eval("#token", (field) => (field.value = ""))
    await page.type("#token", text)
    await page.click("#who button")
  }

  await check("who has no token is asked for one", async () => {
    await page.goto(`${origin}/`, { waitUntil: "load" })
    await within(page.waitForSelector("#who", { visible: true }), "the question")
    equal(await page.$eval("#state", element => element.dataset.state), "refused", "state")
    const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
    equal(content <= window, true, `${content} px fit into ${window} px`)
  })

  await check("a client of the console is told why it is refused", async () => {
    await page.evaluate(key => sessionStorage.setItem("relay-api-key", key), key)
    await page.goto(`${origin}/console#topics/room%3A1`, { waitUntil: "load" })
    await within(page.waitForSelector("#push", { visible: true }), "the topic's view")
    await page.type("#publish-event", "hello")
    await page.click("#push")
    await within(page.waitForFunction(() => document.querySelector("#publish-result").textContent.includes("token")), "the reason")
  })

  await check("a wrong token is not accepted, and the page says so", async () => {
    await page.goto(`${origin}/`, { waitUntil: "load" })
    await within(page.waitForSelector("#who", { visible: true }), "the question")
    await give(wrong)
    await within(page.waitForFunction(() => document.querySelector("#who-result").textContent.includes("not accept")), "the answer")
  })

  await check("a token lets in, at once and after the page is loaded again", async () => {
    await give(token)
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
    await within(page.waitForSelector("#who", { hidden: true }), "the question to go")
    await page.reload({ waitUntil: "load" })
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
  })

  await check("a push is answered", async () => {
    await page.click("#push button")
    await within(page.waitForSelector("#push-result[data-tone='ok']"), "the reply to the push")
  })
}, { width: 360, height: 780 })

process.exit(failures() ? 1 : 0)
