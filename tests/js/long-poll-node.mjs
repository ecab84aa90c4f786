// The published phoenix client on long polling, in Node.
//   node long-poll-node.mjs <alias of the phoenix package> <socket url> <api url> <options of the Socket> <tokens>
// `{"do": …}` has the test do something; see long-poll.mjs.

import WebSocket from "ws"
import { longPoll, outage } from "./long-poll.mjs"
import { PATIENCE, check, failures, say } from "./report.mjs"

// phoenix.js before 1.8 knows no `fetch`.
class Request {
  open(method, url) { Object.assign(this, { method, url, headers: {}, readyState: 1, aborter: new AbortController() }) }
  setRequestHeader(name, value) { this.headers[name] = value }
  abort() { this.aborter.abort() }
  async send(body) {
    const { method, headers } = this
    const timer = setTimeout(() => { this.abort(); this.ontimeout?.() }, this.timeout)
    try {
      const response = await fetch(this.url, { method, headers, body: body ?? undefined, signal: this.aborter.signal })
      this.responseText = await response.text()
      this.readyState = 4
      this.onreadystatechange()
    } catch (error) {
      if (error.name !== "AbortError") this.onerror(error)
    } finally {
      clearTimeout(timer)
    }
  }
}

const [alias, url, api, options, tokens] = process.argv.slice(2)
globalThis.self = globalThis // their builds for Node look for it
if (alias !== "phoenix-1.8") globalThis.XMLHttpRequest = Request
globalThis.WebSocket = WebSocket
const imported = await import(alias)
const Phoenix = imported.Socket ? imported : imported.default

await (options.includes("outage") ? outage : longPoll)(
  { Phoenix, url, api, options: JSON.parse(options), tokens: JSON.parse(tokens), patience: PATIENCE },
  what => say({ do: what }),
  (name, fault) => check(name, () => { if (fault) throw new Error(fault) }),
)
process.exit(failures() ? 1 : 0)
