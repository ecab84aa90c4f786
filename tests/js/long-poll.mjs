// The published phoenix client on long polling: what a page does, from its first join to the restarts of relay and Redis.
// The function is given to a page as text, so it refers to its arguments alone.

// Args: Phoenix: the module.  url: of the socket.  api: of the relay's REST API.
//       options: further ones of the Socket.  ask(what): has the test do something.  report(name, fault): one check.
//       tokens: of a user, for joins: the first expires soon.  patience: how many times as long all may take.
export async function longPoll({ Phoenix, url, api, options, tokens, patience }, ask, report) {
  const { Socket, Presence, LongPoll } = Phoenix
  const within = (promise, what, ms = 15_000) => {
    let timer
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new Error(`nothing came: ${what}`)), ms * patience)
    })
    return Promise.race([promise, late]).finally(() => clearTimeout(timer))
  }
  const until = async (condition, what, ms = 15_000) => {
    const end = Date.now() + ms * patience
    while (!await condition()) {
      if (Date.now() > end) throw new Error(`timed out waiting for ${what}`)
      await new Promise(resolve => setTimeout(resolve, 20))
    }
  }
  const equal = (actual, expected, what) => {
    const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)]
    if (a !== e) throw new Error(`${what}: ${e} was expected, ${a} came`)
  }
  const check = async (name, body) => {
    try { await body(); await report(name, "") } catch (error) { await report(name, String(error?.stack ?? error)) }
  }
  const publish = async (topic, event, payload) => {
    const body = JSON.stringify({ topic, event, payload })
    const headers = { "content-type": "application/json", authorization: "Bearer operators-key" }
    const response = await fetch(`${api}/publish`, { method: "POST", headers, body })
    if (!response.ok) throw new Error(`publishing ${topic}: ${response.status} ${await response.text()}`)
  }
  const answer = push => within(new Promise((resolve, reject) => push
    .receive("ok", resolve)
    .receive("error", response => reject(new Error(JSON.stringify(response))))
    .receive("timeout", () => reject(new Error("the client gave up waiting")))), "an answer")
  const open = more => new Socket(url, {
    ...(options.longPollFallbackMs ? {} : { transport: LongPoll }), ...options, ...more,
    reconnectAfterMs: () => 50, rejoinAfterMs: () => 50,
  })

  const socket = open({ params: { lang: "de" } })
  const room = socket.channel("room:1", { name: "Ada" })
  const heard = []
  room.on("n", ({ n }) => heard.push(n))
  let joins = 0

  let own, renewed = 0
  await check("joins", async () => {
    socket.connect()
    own = socket.channel("own:1", () => ({ token: tokens[Math.min(renewed, 1)] }))
    await answer(own.join().receive("ok", () => { renewed += 1 }))
    await answer(room.join().receive("ok", () => { joins += 1 }))
  })
  await check("long-polls", () => {
    if (!(socket.conn instanceof LongPoll)) throw new Error(`${socket.conn?.constructor?.name} is the transport`)
  })
  await check("pushes are answered", async () => {
    for (let n = 0; n < 3; n++) equal(await answer(room.push("shout", { n })), {}, "the reply")
  })
  await check("many pushes at once are answered", async () => {
    await Promise.all([...Array(120).keys()].map(n => answer(room.push("many", { n }))))
  })
  await check("a binary push is answered", () => answer(room.push("bytes", new Uint8Array([0, 1, 254, 255]).buffer)))
  await check("events arrive in order, each once", async () => {
    for (let n = 0; n < 60; n++) await publish("room:1", "n", { n })
    await until(() => heard.length >= 60, "60 events")
    equal(heard, [...Array(60).keys()], "the events")
  })
  await check("a second channel on one topic takes over from the first", async () => {
    const first = socket.channel("room:twice")
    let closed = 0
    first.onClose(() => { closed += 1 })
    await answer(first.join())
    const second = socket.channel("room:twice")
    const marks = []
    second.on("mark", ({ n }) => marks.push(n))
    await answer(second.join())
    await publish("room:twice", "mark", { n: 1 })
    await until(() => marks.length, "the mark")
    equal([closed, marks], [1, [1]], "closes of the first, events of the second")
    await answer(second.leave())
  })
  await check("nothing comes after a leave", async () => {
    const left = socket.channel("room:left")
    const seen = []
    left.on("n", () => seen.push("n"))
    await answer(left.join())
    await answer(left.leave())
    await publish("room:left", "n", {})
    await publish("room:1", "n", { n: "after" })
    await until(() => heard.includes("after"), "the event after it")
    equal(seen, [], "events after the leave")
  })
  await check("presence lists the members", async () => {
    const other = open()
    other.connect()
    const here = socket.channel("lobby:1", { presence: { name: "Ada" } })
    const there = other.channel("lobby:1", { presence: { name: "Bob" } })
    const presence = new Presence(here)
    const names = () => presence.list((_, { metas }) => metas.map(meta => meta.meta.name)).flat().sort()
    await answer(here.join())
    await answer(there.join())
    await until(() => names().join() === "Ada,Bob", "both members")
    await new Promise(resolve => other.disconnect(resolve))
    await answer(here.leave())
  })

  await check("an expired token is renewed by a rejoin", async () => {
    await until(() => renewed === 2, "the rejoin with the second token", 25_000)
    equal(joins, 1, "joins of a topic that needs no token")
    await answer(own.push("hello", {}))
  })

  // What the documentation of histories says for an unmodified phoenix.js.
  let since = null
  const numbers = []
  const kept = socket.channel("kept:1", () => ({ since }))
  kept.onMessage = (_, payload) => {
    const position = payload?._position ?? payload?.response?._position
    if (typeof position === "string") since = position
    return payload
  }
  kept.on("n", ({ n }) => numbers.push(n))
  const recovered = []
  await check("what was missed comes from the history", async () => {
    await answer(kept.join().receive("ok", reply => recovered.push(reply.recovered)))
    await publish("kept:1", "n", { n: 0 })
    await until(() => numbers.length === 1, "the first")
    await ask("cut")
    for (let n = 1; n < 4; n++) await publish("kept:1", "n", { n })
    await until(() => numbers.length >= 4 && recovered.length === 2, "what was missed")
    equal(numbers, [0, 1, 2, 3], "the events")
    equal(recovered[1], true, "recovered")
  })

  const returns = async (what, ms) => {
    let before = joins
    // Node's fetch may keep a request for ever whose connection the relay closes as it ends.
    const isUp = () => fetch(`${api}/../health`, { signal: AbortSignal.timeout(5000) }).then(answer => answer.ok, () => false)
    if (what === "restart") {
      await ask("stop")
      let refused = 0  // a relay that drains still answers
      const isGone = () => fetch(`${api}/../health`, { signal: AbortSignal.timeout(5000) }).then(() => false, () => true)
      await until(async () => (refused = await isGone() ? refused + 1 : 0) > 2, "the relay's end", 30_000)
      before = joins  // of several nodes, the last to end may have taken the client in
      await ask("start")
      await until(isUp, "the relay's start", 60_000)
    } else await ask(what)
    await until(() => joins > before, `the rejoin after ${what}`, ms)
    // It may lose a further session meanwhile, to a node that is up later, and what is published until it has rejoined.
    const mark = `${what} ${joins}`
    let published = 0
    await until(async () => {
      if (Date.now() - published > 500) {
        published = Date.now()
        await publish("room:1", "n", { n: mark })
      }
      return heard.includes(mark)
    }, `an event after ${what}`)
  }
  await check("is back and live within 10 s of the relay's restart", () => returns("restart", 10_000))
  await check("is back after Redis restarts", () => returns("restart redis", 40_000))

  await check("disconnects", () => within(new Promise(resolve => socket.disconnect(resolve)), "the disconnect"))
}

// Pages with WebSockets that fall back to long polling because the relay is away for a while.
export async function outage({ Phoenix, url, api, options, patience }, ask, report) {
  const { Socket, LongPoll } = Phoenix
  const until = async (condition, what, ms) => {
    const end = Date.now() + ms * patience
    while (!await condition()) {
      if (Date.now() > end) throw new Error(`timed out waiting for ${what}`)
      await new Promise(resolve => setTimeout(resolve, 20))
    }
  }
  const check = async (name, body) => {
    try { await report(name, await body() ?? "") } catch (error) { await report(name, String(error?.stack ?? error)) }
  }
  const stored = {}
  const sessionStorage = {
    getItem: name => stored[name] ?? null,
    setItem: (name, value) => { stored[name] = value },
    removeItem: name => { delete stored[name] },
  }
  // With phoenix.js's own pace of reconnecting and rejoining.
  const page = topic => {
    const socket = new Socket(url, { longPollFallbackMs: options.longPollFallbackMs, sessionStorage })
    const channel = socket.channel(topic)
    const seen = { socket, joins: 0, events: 0 }
    channel.on("n", () => { seen.events += 1 })
    channel.join().receive("ok", () => { seen.joins += 1 })
    socket.connect()
    return seen
  }
  const publish = topic => fetch(`${api}/publish`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: "Bearer operators-key" },
    body: JSON.stringify({ topic, event: "n", payload: {} }),
  })
  const polls = each => each.socket.conn instanceof LongPoll

  const open = page("room:open")
  await check("begins with a WebSocket", async () => {
    await until(() => open.joins === 1, "the join", 15_000)
    if (polls(open)) throw new Error("it is a long poll")
  })
  const isUp = () => fetch(`${api}/../health`, { signal: AbortSignal.timeout(5000) }).then(answer => answer.ok, () => false)
  await ask("stop")
  await until(async () => !await isUp(), "the relay's end", 30_000)
  const late = page("room:late") // loaded during the outage
  await check("both pages fall back", () => until(() => polls(open) && polls(late), "the fallback", 30_000))
  await ask("start")
  await until(isUp, "the relay's start", 60_000)
  await check("both are back and live within 10 s", async () => {
    const began = Date.now()
    const live = async (each, topic) => {
      await publish(topic)
      return each.events > 0
    }
    await until(async () => await live(open, "room:open") && await live(late, "room:late"), "events", 10_000)
    if (Date.now() - began > 10_000 * patience) throw new Error("too late")
  })
  await check("the fallback is remembered, and works", async () => {
    if (stored["phx:fallback:LongPoll"] !== "true") throw new Error(JSON.stringify(stored))
    const next = page("room:next")
    await until(() => next.joins === 1 && polls(next), "a page that is loaded later", 15_000)
    next.socket.disconnect()
  })
  for (const each of [open, late]) each.socket.disconnect()
}
