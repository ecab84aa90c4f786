// The console in a real browser: metrics move, topics are searched and tailed, events are sent, sockets sent away.
//   node console-chromium.mjs <relay http url> <topic> [--key=SECRET] [--dark] [--width=N] [--height=N] [--pid=N] [--history]
// Somebody has joined <topic>, once, and nobody else has joined any. With --pid the relay is ended at last.
// With --history the topic has one, which is empty, and presence.

import { inBrowser } from "./chromium.mjs"
import { check, equal, failures, say, within } from "./report.mjs"

const [origin, topic, ...flags] = process.argv.slice(2)
const flag = name => flags.find(f => f.startsWith(`--${name}=`))?.split("=")[1]
const looks = {
  dark: flags.includes("--dark"), width: Number(flag("width") ?? 1280), height: Number(flag("height") ?? 860),
}
const key = flag("key")

const publish = (event, payload) =>
  say({ waiting: event, publish: [{ redis_channel: `to:${topic}:${event}`, payload: JSON.stringify(payload) }] })

await inBrowser(origin, async (page, faults) => {
  const text = selector => page.$eval(selector, element => element.textContent)
  const until = (what, body, ...given) => within(page.waitForFunction(body, {}, ...given), what).then(() => null)
  const shows = (selector, wanted) => until(
    `${wanted} in ${selector}`, (s, w) => document.querySelector(s).textContent.includes(w), selector, wanted)
  const focused = () => page.evaluate(() => document.activeElement.id)
  const fits = () => page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
    .then(([content, window]) => {
      if (content > window) throw new Error(`the page is ${content} px wide, the window ${window} px`)
    })

  await check("the console opens", async () => {
    const response = await page.goto(`${origin}/console`, { waitUntil: "load" })
    equal(response.status(), 200, "status of /console")
    const policy = response.headers()["content-security-policy"]
    equal(/unsafe|\*|wss?:|https?:/.test(policy), false, `the policy names this place alone: ${policy}`)
  })

  if (key) {
    await check("nothing is shown without the key", async () => {
      await page.waitForSelector("#key:not([hidden])")
      await page.type("#key-value", "wrong")
      await page.keyboard.press("Enter")
      await shows("#key-result", "not the key")
      equal(await page.$$eval(".view:not([hidden])", views => views.length), 0, "views shown")
      equal(await text("#metrics"), await page.$$eval("#metrics h2", all => all.map(h2 => `${h2.textContent}–`).join("")), "metrics")
    })
    await check("the key opens it, and is kept in this tab alone", async () => {
      faults.splice(0, faults.length, ...faults.filter(fault => !fault.includes("401"))) // as asked for
      await page.type("#key-value", key)
      await page.keyboard.press("Enter")
      await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
      await page.reload()
      await within(page.waitForSelector("#state[data-state='live']"), "an open connection after a reload")
      equal(await page.evaluate(() => JSON.stringify(localStorage)), "{}", "what is kept beyond the tab")
      equal((await page.cookies()).length, 0, "cookies")
    })
  }

  await check("the console connects", () => within(page.waitForSelector("#state[data-state='live']"), "an open connection")
    .then(() => null))

  await check("metrics move when events come", async () => {
    const again = setInterval(() => publish("tick", { n: 1 }), 100)
    await until("a rate of events", () => parseFloat(document.querySelector("[data-metric=in] b").textContent) > 0)
      .finally(() => clearInterval(again))
    await until("a line in a chart", () => document.querySelectorAll(".plot .line").length >= 5)
    equal(Number(await text("[data-metric=sockets] b")), 1, "sockets")
    const ticks = await page.$$eval(".chart:nth-child(3) .tick", all => all.map(tick => Number(tick.textContent)))
    equal(ticks.slice(0, 3), [0, 2, 4], "axis of Sockets, which are whole")
    await fits()
  })

  await check("what is well is calm, and what is not takes colour", async () => {
    const names = await page.$$eval("#metrics article", all => all.map(cell => cell.dataset.metric))
    equal(names.slice(0, 3), ["link", "drops", "gaps"], "what leads")
    equal(names.includes("cpu"), false, "the processor among them")
    equal(await page.$eval("[data-metric=link]", cell => cell.dataset.tone), "ok", "the link's tone")
    equal(await page.$eval("[data-metric=drops]", cell => cell.dataset.tone), "", "the drops' tone")
    if (!key) equal(await text("#losses tbody"), "Nothing has been dropped or refused since the start.", "losses")
    say({ waiting: "a drop", publish: [{ redis_channel: `to:${topic}:phx_join`, payload: "{}" }] })
    await until("a colour", () => document.querySelector("[data-metric=drops]").dataset.tone === "bad")
    await shows("#losses", "dropped: ")
  })

  await check("the values of a chart are read by keys", async () => {
    await until("some samples", () => document.querySelector(".plot").getAttribute("aria-valuemax") > 2)
    await page.evaluate(() => document.querySelector(".plot").focus())
    await page.keyboard.press("ArrowLeft")
    const valueText = () => page.$eval(".plot", plot => plot.getAttribute("aria-valuetext"))
    equal(/^bus .+, pushes .+ at \d\d:\d\d:\d\d$/.test(await valueText()), true, `its value: ${await valueText()}`)
    equal(await page.$$eval(".chart:first-child .cross", all => all.length), 1, "marks in the chart")
    await page.keyboard.press("Home")
    equal(Number(await page.$eval(".plot", plot => plot.getAttribute("aria-valuenow"))) < 2, true, "the first value")
    await page.keyboard.press("Escape")
    equal(await focused(), "", "focus after Esc")
    equal(await page.$$eval(".chart:first-child .cross", all => all.length), 0, "marks once it is left")
  })

  await check("shortcuts can be switched off", async () => {
    if (looks.width < 800) return // there is no keyboard, and no button
    await page.click("#shortcuts")
    await page.keyboard.press("2")
    equal(await page.evaluate(() => location.hash), "", "the view")
    await page.reload()
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
    await page.keyboard.press("2")
    equal(await page.evaluate(() => location.hash), "", "the view after a reload")
    await page.click("#shortcuts")
    await page.evaluate(() => localStorage.removeItem("relay-shortcuts"))
  })

  await check("what was before is there at once", async () => {
    await page.reload()
    await within(page.waitForSelector(".plot .line"), "a line, of what the relay has kept")
  })

  await check("what was malformed is told in words", async () => {
    await page.evaluate(() => {
      const socket = new WebSocket("/socket/websocket?vsn=2.0.0")
      socket.onopen = () => socket.send("{")
    })
    await shows("#losses", "malformed: no message of the protocol (1007)")
  })

  await check("an address that is no text names no topic", async () => {
    await page.evaluate(() => { location.hash = "#topics/%" })
    await within(page.waitForSelector("#topics:not([hidden]) .hint"), "the topics, none of them chosen")
    await page.evaluate(() => { location.hash = "#overview" })
  })

  await check("a topic is found and opened by keys alone", async () => {
    await page.keyboard.press("/")
    equal(await focused(), "topic-search", "focus after /")
    await page.keyboard.type(topic.slice(1, 8))
    await within(page.waitForSelector(`#topic-list [data-key="${topic}"]`), "the topic in the list")
    await page.keyboard.press("ArrowDown")
    equal(await page.evaluate(() => document.activeElement.dataset.key), topic, "the row that has the focus")
    await page.keyboard.press("Enter")
    await shows("#topic-name", topic)
    await shows("#joined-count", "1")
    await page.evaluate(() => { location.hash = "#topics" })
    await page.focus("#topic-search")
    await page.keyboard.type("-no-such")
    await shows("#topic-list", "No topic matches.")
    await page.keyboard.press("Escape")
    equal(await focused(), "", "focus after Esc")
    equal(await page.$eval("#topic-search", field => field.value.endsWith("-no-such")), true, "what was typed stays")
    await page.keyboard.press("/")
    await page.keyboard.press("Backspace")
    const row = await within(page.waitForSelector(`#topic-list [data-key="${topic}"]`), "the topic again")
    equal(await row.$$eval("span", spans => spans[1].textContent), "1", "sockets, the console not among them")
    await page.evaluate(name => { location.hash = `#topics/${encodeURIComponent(name)}` }, topic)
    await shows("#topic-name", topic)
    await shows("#joined-count", "1") // asked for after its events were
    await fits()
  })

  await check("its events are tailed as they come", async () => {
    publish("new_msg", { from: "Ada", text: "first", n: [1, 2.5, null, true] })
    await shows("#tail", "first")
    equal(await page.$$eval("#tail .key", keys => keys.map(key => key.textContent)), ['"from":', '"text":', '"n":'], "keys")
    say({ waiting: "bytes", publish: [{ redis_channel: `to:${topic}:blob`, payload_base64: "/wD+" }] })
    await shows("#tail", "ff 00 fe")
    await fits()
  })

  await check("pause holds events back, and resume shows them", async () => {
    await page.evaluate(() => document.activeElement.blur())
    await page.keyboard.press("p")
    publish("new_msg", { text: "while paused" })
    await shows("#tail-count", "1 waiting")
    equal((await text("#tail")).includes("while paused"), false, "shown while paused")
    await page.keyboard.press("p")
    await shows("#tail", "while paused")
  })

  await check("filter shows what matches and nothing else", async () => {
    await page.keyboard.press("f")
    equal(await focused(), "filter", "focus after f")
    await page.keyboard.type("FIRST")
    const visible = () => page.$$eval("#tail li:not([hidden])", rows => rows.map(row => row.dataset.text))
    equal((await visible()).map(row => row.includes("first")), [true], "rows shown")
    publish("new_msg", { text: "another" })
    await shows("#tail-count", "1 of 4 match")
    await page.keyboard.type(" of none")
    await shows("#tail-empty", "No event matches")
    equal(await page.$eval("#tail-empty", element => element.hidden), false, "whether that is hidden")
    await page.keyboard.press("Escape")
    equal(await focused(), "", "focus after Esc")
    await page.keyboard.press("f")
    await page.keyboard.press("Backspace")
    equal((await visible()).length, 4, "rows shown once the filter is gone")
    await page.keyboard.press("Escape")
  })

  await check("events that come too fast leave a mark where they are not shown", async () => {
    const payload = JSON.stringify({ text: "flood" })
    say({ waiting: "flood", publish: Array(150).fill({ redis_channel: `to:${topic}:flood`, payload }) })
    await within(page.waitForSelector("#tail .left-out"), "a mark")
    await shows("#tail-count", "154 heard")
    const [rows, leftOut] = await page.$eval("#tail", tail => [
      tail.querySelectorAll("li:not(.left-out)").length,
      [...tail.querySelectorAll(".left-out")].reduce((sum, row) => sum + Number(row.textContent.match(/\d+/)), 0),
    ])
    equal(rows + leftOut, 154, "events that are shown, or marked as not shown")
  })

  await check("an event can be copied", async () => {
    await page.evaluate(() => { navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve() } })
    await within(page.$eval("#tail li:last-child button", button => new Promise(resolve => {
      // It says so for a moment only.
      const look = () => { if (button.textContent.includes("Copied")) resolve() }
      new MutationObserver(look).observe(button, { childList: true, characterData: true, subtree: true })
      button.click()
    })), "Copied")
    equal(JSON.parse(await page.evaluate(() => window.copied)).text, "first", "what was copied")
  })

  await check("an event is published from here", async () => {
    await page.$eval("#publish-payload", field => { field.value = "{" })
    await page.click("#publish button:not([type])")
    await shows("#publish-result", "Not JSON")
    await page.$eval("#publish-payload", field => { field.value = '{"text": "from the console"}' })
    await page.focus("#publish-payload")
    await page.keyboard.down("Control")
    await page.keyboard.press("Enter")
    await page.keyboard.up("Control")
    await within(page.waitForSelector("#publish-result[data-tone=ok]"), "the reply")
    await shows("#tail", "from the console")
  })

  await check("a history is shown where the topic has one", async () => {
    if (!flags.includes("--history")) return equal(await page.$$("#history:not([hidden])").then(all => all.length), 0, "histories")
    await shows("#history-facts", "1 of 100")
    await page.click("#history-show")
    await shows("#history-events", "from the console")
    equal(await page.$$eval("#history-events li", rows => rows.map(row => /at \d+-1$/.test(row.title))), [true], "positions")
    await fits()
  })

  await check("members are shown where the topic has presence", async () => {
    if (!flags.includes("--history")) return equal(await page.$$("#members:not([hidden])").then(all => all.length), 0, "lists")
    await shows("#members-count", "1")
    equal(await page.$$eval("#members-list span.chip", chips => chips.map(chip => chip.title)), ["{}"], "metas")
    await fits()
  })

  await check("a push is made as a client makes it", async () => {
    await page.click("#push")
    await within(page.waitForFunction(
      () => /^ok in \d/.test(document.querySelector("#publish-result").textContent)), "the reply to the push")
  })

  await check("Tab goes through the page in its order", async () => {
    await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, 0) })
    await page.focus("#filter")
    const order = []
    for (let n = 0; n < 4; n += 1) {
      await page.keyboard.press("Tab")
      order.push(await focused())
    }
    equal(order.slice(0, 3), ["pause", "clear", "tail"], "order of focus")
  })

  await check("a socket is looked at and disconnected", async () => {
    await page.click("#joined .chip")
    await shows("#socket-topics", topic)
    await shows("#socket-facts", "127.0.0.1")
    await shows("#socket-facts", "Useranonymous")
    const place = await page.$eval("#socket-topics .chip", chip => chip.title)
    equal(/^at \d+-1$/.test(place), flags.includes("--history"), `the place in the history: ${place}`)
    await fits()
    await page.keyboard.press("Escape")
    await page.waitForSelector("#socket-list .item")
    const isCut = ([...all]) => all.filter(({ scrollWidth, clientWidth }) => scrollWidth > clientWidth).map(e => e.textContent)
    if (looks.width < 800) {
      equal(await page.$$eval("#socket-list .item span, #node", isCut), [], "what is cut")
      await page.click("#socket-list .item")
    }
    await page.evaluate(() => { location.hash = document.querySelector("#socket-list .item").hash })
    await shows("#socket-topics", topic)
    await page.click("#disconnect")
    await shows("#disconnect", "Really")
    await page.click("#disconnect")
    await until("its end in the list", () => document.querySelector("#socket-total").textContent === "0")
    await shows("#socket-result", "gone")
    equal(await text("#socket-list"), "No socket is connected.", "the list")
    await page.keyboard.press("Escape")
    equal(await page.evaluate(() => location.hash), "#sockets", "view after Esc")
  })

  await check("views are a key away", async () => {
    for (const [pressed, view] of [["1", "overview"], ["2", "topics"], ["3", "sockets"]]) {
      await page.keyboard.press(pressed)
      await within(page.waitForSelector(`#${view}:not([hidden])`), view)
      await fits()
    }
  })

  await check("light and dark can be chosen, and the choice stays", async () => {
    const ground = () => page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor)
    const before = await ground()
    await page.keyboard.press("t")
    const after = await ground()
    equal(before === after, false, "the same ground")
    await page.reload()
    equal(await ground(), after, "ground after a reload")
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection, before which no key counts")
    await page.goto(`${origin}/`)
    equal(await ground(), after, "ground of the page at /")
    await page.goto(`${origin}/console`)
    await within(page.waitForSelector("#state[data-state='live']"), "an open connection")
    const title = () => page.$eval("#theme", button => button.title)
    equal(await title(), `Theme: ${looks.dark ? "light" : "dark"} (t)`, "what the button says")
    await page.keyboard.press("t")
    equal([await ground(), await title()], [before, `Theme: ${looks.dark ? "dark" : "light"} (t)`], "the other")
    await page.keyboard.press("t")
    equal([await ground(), await title()], [before, "Theme: as the system (t)"], "as the system")
  })

  await check("nothing went wrong in the browser", () => equal(faults, [], "faults"))

  await check("the policy holds", async () => {
    const ran = await page.evaluate(async () => {
      const tried = []
      const attempt = async (name, body) => { try { await body(); tried.push(name) } catch { /* as it should be */ } }
      await attempt("handler", () => {
        document.body.setAttribute("onclick", "window.inline = 1")
        document.body.click()
      })
      const style = document.createElement("style")
      style.textContent = "body { --injected: 1 }"
      document.head.append(style)
      await attempt("text as code", () => { setTimeout("window.inline = 1") }) // eval here is DevTools' own, and free
      await attempt("html", () => { document.createElement("div").innerHTML = "<b>x</b>" })
      await attempt("script", () => { const s = document.createElement("script"); s.text = "window.inline = 1"; document.body.append(s) })
      await attempt("other host", () => fetch("http://127.0.0.2:9/", { mode: "no-cors" }))
      await attempt("other socket", () => new Promise((resolve, reject) => {
        const socket = new WebSocket("ws://127.0.0.2:9/")
        document.addEventListener("securitypolicyviolation", reject, { once: true })
        setTimeout(resolve, 10_000)
        socket.onerror = () => {}
      }))
      if (window.inline) tried.push("inline")
      if (getComputedStyle(document.body).getPropertyValue("--injected")) tried.push("style")
      return tried
    })
    equal(ran, [], "what the policy let pass")
  })

  if (flag("pid")) {
    await check("metrics that no longer come are told apart from those of now", async () => {
      await within(page.waitForSelector("[data-metric=sockets] b"), "metrics")
      process.kill(Number(flag("pid")))
      await shows("#alarm", "No connection to the relay since ")
      await page.waitForSelector("#state[data-state='reconnecting']")
      equal(await page.$eval("#charts", charts => getComputedStyle(charts).opacity < 0.5), true, "charts are dimmed")
      await page.evaluate(() => { location.hash = "#topics/unheard" })
      await shows("#tail-empty", "Not connected: nothing is heard of this topic.")
      await fits()
    })
  }
}, looks)

process.exit(failures() ? 1 : 0)
