// The Presence classes of the published phoenix client and of the relay's own against a relay, in Node over `ws`.
//   node presence-node.mjs <whose client> <whose Presence> <socket url>
// Each is the alias of a phoenix package, or `relay`. The relay authenticates by the param `user`,
// and its plugin lists a user under a new status when it pushes `status`.

import WebSocket from "ws"
import { check, equal, failures, within } from "./report.mjs"

const [clientAlias, presenceAlias, url] = process.argv.slice(2)
const load = (alias, own) => import(alias === "relay" ? `../../clients/browser/${own}.js` : alias)
const client = await load(clientAlias, "relay")
const Socket = client.Socket ?? client.default.Socket
const members = await load(presenceAlias, "presence")
const Presence = members.Presence ?? members.default.Presence

const TOPIC = "room:presence"

// One tab of a user: what its Presence has been told, in order.
async function open(user, meta = {}) {
  const connections = []
  class Kept extends WebSocket {
    constructor(...args) {
      super(...args)
      connections.push(this)
    }
  }
  const socket = new Socket(url, { transport: Kept, params: { user }, reconnectAfterMs: () => 50 })
  const channel = socket.channel(TOPIC, { presence: meta })
  const presence = new Presence(channel)
  const tab = { user, socket, connections, channel, presence, joined: [], left: [], lists: [], diffs: [], waiting: [] }
  channel.on("presence_diff", diff => tab.diffs.push(diff))
  presence.onJoin((key, current, joined) => tab.joined.push([key, current?.metas.length ?? 0, joined.metas.length]))
  presence.onLeave((key, current, left) => tab.left.push([key, current.metas.length, left.metas.length]))
  presence.onSync(() => {
    tab.lists.push(tab.keys())
    for (const look of [...tab.waiting]) look()
  })
  tab.keys = () => presence.list(key => key).sort()
  tab.metas = key => presence.state[key]?.metas ?? []
  tab.until = (condition, what) => within(new Promise(resolve => {
    const look = () => {
      if (!condition()) return
      tab.waiting.splice(tab.waiting.indexOf(look), 1)
      resolve()
    }
    tab.waiting.push(look)
    look()
  }), what)
  tab.forget = () => { for (const list of [tab.joined, tab.left, tab.lists, tab.diffs]) list.length = 0 }
  socket.connect()
  await within(new Promise((resolve, reject) => channel.join()
    .receive("ok", resolve)
    .receive("error", response => reject(new Error(JSON.stringify(response))))), `the join of ${user}`)
  await tab.until(() => tab.keys().includes(user), `${user} in its own list`)
  return tab
}

const close = tab => within(new Promise(resolve => tab.socket.disconnect(resolve)), "the disconnect")
const count = (tab, key) => tab.metas(key).length
const gone = tab => tab.left.filter(([, rest]) => rest === 0)

let ada, bob, second

await check("a member sees itself", async () => {
  ada = await open("ada", { name: "Ada" })
  equal(ada.keys(), ["ada"], "the list")
  const [{ phx_ref, ...meta }] = ada.metas("ada")
  equal([typeof phx_ref, meta], ["string", { user: "ada", meta: { name: "Ada" } }], "ref and meta")
})

await check("members see each other", async () => {
  ada.forget()
  bob = await open("bob")
  equal(bob.keys(), ["ada", "bob"], "the list of the second")
  await ada.until(() => count(ada, "bob") === 1, "the join of bob")
  equal([ada.joined, ada.left], [[["bob", 0, 1]], []], "onJoin, onLeave")
  equal(ada.presence.list((key, { metas: [first] }) => first.user), ["ada", "bob"], "the list")
})

await check("two tabs are two metas under one key", async () => {
  ada.forget()
  second = await open("bob", { tab: 2 })
  await ada.until(() => count(ada, "bob") === 2, "the second tab")
  equal([ada.keys(), ada.joined], [["ada", "bob"], [["bob", 1, 1]]], "the list, onJoin")
  equal(ada.metas("bob").map(each => each.meta?.tab ?? 1), [1, 2], "the metas, the first tab first")
})

await check("one of two tabs that closes leaves the other", async () => {
  ada.forget()
  await close(second)
  await ada.until(() => count(ada, "bob") === 1, "the end of the second tab")
  equal([ada.keys(), ada.left], [["ada", "bob"], [["bob", 1, 1]]], "the list, onLeave")
})

await check("an update by a plugin is one difference", async () => {
  ada.forget()
  const [before] = ada.metas("bob")
  bob.channel.push("status", { status: "away" })
  await ada.until(() => ada.metas("bob")[0]?.status === "away", "the update")
  const [{ phx_ref, phx_ref_prev, ...meta }] = ada.metas("bob")
  equal(ada.metas("bob").length, 1, "metas")
  equal([meta, phx_ref_prev], [{ status: "away" }, before.phx_ref], "meta, ref before")
  if (phx_ref === before.phx_ref) throw new Error("the ref is the one before")
  equal(ada.diffs.length, 1, "differences")
  const [{ joins, leaves }] = ada.diffs
  equal([Object.keys(joins), leaves.bob.metas[0].phx_ref], [["bob"], before.phx_ref], "the difference")
  equal([ada.joined, ada.left], [[["bob", 1, 1]], [["bob", 1, 1]]], "onJoin, onLeave")
})

await check("a page that is loaded again within the delay never leaves", async () => {
  ada.forget()
  const [before] = ada.metas("bob")
  await close(bob)
  bob = await open("bob")
  await ada.until(() => count(ada, "bob") === 1 && ada.metas("bob")[0].phx_ref !== before.phx_ref, "the new page")
  equal([gone(ada), ada.keys()], [[], ["ada", "bob"]], "onLeave of a key that has gone, the list")
  if (ada.lists.some(list => !list.includes("bob"))) throw new Error(`a list without bob: ${JSON.stringify(ada.lists)}`)
})

await check("a connection that is lost and comes back never leaves", async () => {
  ada.forget()
  bob.forget()
  const [before] = ada.metas("bob")
  bob.connections[0].terminate()
  await ada.until(() => count(ada, "bob") === 1 && ada.metas("bob")[0].phx_ref !== before.phx_ref, "the rejoin")
  await bob.until(() => count(bob, "bob") === 1 && bob.metas("bob")[0].phx_ref !== before.phx_ref, "its own state")
  equal([gone(ada), gone(bob)], [[], []], "onLeave of a key that has gone")
  equal([ada.keys(), bob.keys()], [["ada", "bob"], ["ada", "bob"]], "the lists")
})

await check("who leaves is gone after the delay", async () => {
  ada.forget()
  await close(bob)
  await ada.until(() => count(ada, "bob") === 0, "the leave")
  equal([ada.keys(), ada.joined, ada.left], [["ada"], [], [["bob", 0, 1]]], "the list, onJoin, onLeave")
})

await check("disconnects", () => close(ada))

process.exit(failures() ? 1 : 0)
