/** Lines over time as SVG: coloured by the style sheet, so that light and dark need no redraw. */

import { create } from "./show.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 148;
const EDGE = { left: 46, right: 10, top: 10, bottom: 20 };
const WINDOW_MIN_MS = 60_000;
const WINDOW_MAX_MS = 900_000;

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The next of 2, 4, 6, 8, 10, 20, 40 …: of counts the half is a whole number, too. */
export function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((top) => top >= value * 0.999);
}

/** The next power of two, for bytes. */
export const binaryTop = (value) => 2 ** Math.ceil(Math.log2(value));

export class Chart {
  // A slider along the time, so that the keyboard reads its values too.
  #svg = draw("svg", { class: "plot", role: "slider", tabindex: 0, "aria-valuemin": 0, "aria-orientation": "horizontal" });
  #metrics = [];
  #pointerX = null;
  #chosen = null; // a place from the end, by the keyboard
  #shown = []; // the samples that are drawn
  #samples = [];

  /**
   * @param lines `[{label, of: (sample) => number | null}]`
   * @param floor the least value at the top of the axis
   * @param roundUp where the axis ends for a greatest value
   */
  constructor(title, lines, format, floor, roundUp = niceTop) {
    Object.assign(this, { title, lines, format, floor, roundUp });
    this.#metrics = lines.map(() => create("b", "", "–"));
    const legend = lines.map(({ label }, line) => create("span", label ? `key line-${line}` : "", label ?? "", " ", this.#metrics[line]));
    this.element = create("article", "chart card", create("h2", "", title), create("p", "now", ...legend), this.#svg);
    this.#svg.addEventListener("pointermove", ({ offsetX }) => this.#point(offsetX));
    this.#svg.addEventListener("pointerleave", () => this.#point(null));
    this.#svg.addEventListener("focus", () => this.#svg.matches(":focus-visible") && this.#choose(-1));
    this.#svg.addEventListener("blur", () => this.#choose(null));
    this.#svg.addEventListener("keydown", (event) => this.#press(event));
    new ResizeObserver(() => this.show(this.#samples)).observe(this.#svg);
  }

  #point(x) {
    this.#pointerX = x;
    this.#chosen = null;
    this.show(this.#samples);
  }

  /** Mark a sample by its place from the end, -1 for the newest; null for none. */
  #choose(place) {
    this.#pointerX = null;
    this.#chosen = place;
    this.show(this.#samples);
  }

  #press(event) {
    const { key, shiftKey } = event;
    const last = -Math.max(1, this.#shown.length);
    const step = shiftKey ? 10 : 1;
    const now = this.#chosen ?? -1;
    const places = { ArrowLeft: now - step, ArrowRight: now + step, Home: last, End: -1 };
    if (!(key in places)) return;
    event.preventDefault();
    this.#choose(Math.max(last, Math.min(-1, places[key])));
  }

  /** @param samples `[{at_ms, …}]`, oldest first. */
  show(samples) {
    this.#samples = samples;
    const width = this.#svg.clientWidth;
    if (!width || !samples.length) return;
    const end = samples.at(-1).at_ms;
    const windowMs = Math.min(WINDOW_MAX_MS, Math.max(WINDOW_MIN_MS, end - samples[0].at_ms));
    const shown = samples.filter(({ at_ms }) => at_ms >= end - windowMs);
    this.#shown = shown;
    const values = this.lines.map(({ of }) => shown.map(of));
    const top = this.roundUp(Math.max(this.floor, ...values.flat().filter((value) => value !== null)));
    const [plotWidth, plotHeight] = [width - EDGE.left - EDGE.right, HEIGHT - EDGE.top - EDGE.bottom];
    const x = (at_ms) => EDGE.left + plotWidth * (1 - (end - at_ms) / windowMs);
    const y = (value) => EDGE.top + plotHeight * (1 - value / top);
    const parts = [...this.#axes(width, top, windowMs, y)];
    values.forEach((row, line) => parts.push(...this.#line(line, row, shown, x, y)));
    const isMarked = this.#pointerX !== null || this.#chosen !== null;
    const at = this.#chosen !== null ? Math.max(0, shown.length + this.#chosen) : this.#nearest(shown, x);
    if (isMarked) parts.push(...this.#cross(shown[at], values, at, x, y, width));
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#svg.replaceChildren(...parts);
    const now = values.map((row) => (row.at(-1) === null ? "–" : this.format(row.at(-1))));
    this.#metrics.forEach((metric, line) => (metric.textContent = now[line]));
    this.#svg.setAttribute("aria-label", `${this.title}, over time`);
    this.#svg.setAttribute("aria-valuemax", shown.length - 1);
    this.#svg.setAttribute("aria-valuenow", isMarked ? at : shown.length - 1);
    const time = new Date(shown[at].at_ms).toLocaleTimeString("en-GB");
    const said = isMarked ? values.map((row) => (row[at] === null ? "–" : this.format(row[at]))) : now;
    const named = said.map((value, line) => `${this.lines[line].label ?? ""} ${value}`.trim());
    this.#svg.setAttribute("aria-valuetext", `${named.join(", ")} ${isMarked ? `at ${time}` : "now"}`);
  }

  *#axes(width, top, windowMs, y) {
    for (const share of [0, 0.5, 1]) {
      const height = Math.round(y(top * share)) + 0.5;
      yield draw("path", { class: share ? "grid" : "axis", d: `M${EDGE.left},${height}H${width - EDGE.right}` });
      yield draw("text", { class: "tick", x: EDGE.left - 7, y: height + 3.5, "text-anchor": "end" }, this.format(top * share));
    }
    const ago = windowMs < 120_000 ? `${Math.round(windowMs / 1000)} s ago` : `${Math.round(windowMs / 60_000)} min ago`;
    yield draw("text", { class: "tick", x: EDGE.left, y: HEIGHT - 4 }, ago);
    yield draw("text", { class: "tick", x: width - EDGE.right, y: HEIGHT - 4, "text-anchor": "end" }, "now");
  }

  *#line(line, row, samples, x, y) {
    const points = row.flatMap((value, place) =>
      value === null ? [] : [`${x(samples[place].at_ms).toFixed(1)},${y(value).toFixed(1)}`],
    );
    if (!points.length) return;
    const [first, last] = [points[0].split(",")[0], points.at(-1).split(",")[0]];
    const bottom = y(0).toFixed(1);
    if (!line) yield draw("path", { class: "area line-0", d: `M${first},${bottom}L${points.join("L")}L${last},${bottom}Z` });
    yield draw("path", { class: `line line-${line}`, d: `M${points.join("L")}` });
  }

  #nearest(samples, x) {
    let best = samples.length - 1;
    for (let place = 0; place < samples.length; place += 1) {
      const isNearer = (other) => Math.abs(x(samples[place].at_ms) - this.#pointerX) < Math.abs(x(samples[other].at_ms) - this.#pointerX);
      if (isNearer(best)) best = place;
    }
    return best;
  }

  *#cross(sample, values, place, x, y, width) {
    const left = x(sample.at_ms);
    yield draw("path", { class: "cross", d: `M${left.toFixed(1)},${EDGE.top}V${HEIGHT - EDGE.bottom}` });
    const texts = [];
    for (const [line, row] of values.entries()) {
      if (row[place] === null) continue;
      yield draw("circle", { class: `dot line-${line}`, cx: left, cy: y(row[place]), r: 3 });
      texts.push(this.format(row[place]));
    }
    const time = new Date(sample.at_ms).toLocaleTimeString("en-GB");
    const isLeft = left < width / 2;
    const attributes = { class: "readout", x: left + (isLeft ? 7 : -7), y: EDGE.top + 9, "text-anchor": isLeft ? "start" : "end" };
    yield draw("text", attributes, `${texts.join("  ")}  at ${time}`);
  }
}
