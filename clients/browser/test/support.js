/** A WebSocket that goes nowhere: the test plays the server. */
export class FakeWebSocket {
  static made = [];
  readyState = 0;
  sent = [];
  closedWith = null;

  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    FakeWebSocket.made.push(this);
  }

  static get last() {
    return FakeWebSocket.made.at(-1);
  }

  send(frame) {
    if (this.readyState !== 1) throw new Error("sent on a socket that is not open");
    this.sent.push(frame);
  }

  close(code, reason) {
    this.readyState = 2;
    this.closedWith = { code, reason };
  }

  open() {
    this.readyState = 1;
    this.onopen();
  }

  /** The server, or the network, ends it. */
  end(code = 1006, reason = "") {
    this.readyState = 3;
    this.onclose({ code, reason, wasClean: code !== 1006 });
  }

  receive(frame) {
    this.onmessage({ data: typeof frame === "string" || frame instanceof ArrayBuffer ? frame : JSON.stringify(frame) });
  }

  reply(sent, status, response = {}) {
    const [joinRef, ref, topic] = sent;
    this.receive([joinRef, ref, topic, "phx_reply", { status, response }]);
  }

  /** All text frames sent so far, decoded, and forgotten. */
  take() {
    return this.sent.splice(0).map((frame) => JSON.parse(frame));
  }
}

/** Stands in for `setTimeout` and fires on request; Node's own, `mock.timers`, differs from version to version. */
export class Clock {
  #real = { setTimeout, clearTimeout };
  #timers = new Map();
  #now = 0;
  #last = 0;

  install() {
    globalThis.setTimeout = (call, ms = 0) => {
      this.#timers.set(++this.#last, { call, at: this.#now + ms });
      return this.#last;
    };
    globalThis.clearTimeout = (timer) => this.#timers.delete(timer);
  }

  remove() {
    Object.assign(globalThis, this.#real);
    this.#timers.clear();
  }

  tick(ms) {
    const end = this.#now + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, { at }]) => at <= end).sort(([, one], [, other]) => one.at - other.at);
      if (!due.length) break;
      const [[timer, { call, at }]] = due;
      this.#timers.delete(timer);
      this.#now = at;
      call();
    }
    this.#now = end;
  }
}

export function bytes(hex) {
  return Uint8Array.from(Buffer.from(hex, "hex")).buffer;
}
