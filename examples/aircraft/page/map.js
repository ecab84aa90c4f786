/**
 * A map without tiles from anywhere: the land and a grid of 5°, drawn on a canvas in Mercator's projection.
 *
 * Owns where one looks, the gestures that change it, and the ground under the aircraft; must not know aircraft.
 * World coordinates are degrees: x is the longitude, y the latitude as Mercator stretches it.
 */

const TILE_DEG = 5;

const TILES_MAX = 96; // in view: the relay lets one socket join 100 topics
const SCALE_MAX = 300; // pixels per degree
const LATITUDE_MAX = 84;
const LAND_UNITS = 50; // per degree, in land.json

const RADIAN = 180 / Math.PI;
const between = (low, value, high) => Math.min(high, Math.max(low, value));

/** The longitude's degrees from -180 to 180, so that everything is drawn where it is nearest. */
export const wrap = (degrees) => ((((degrees + 180) % 360) + 360) % 360) - 180;

export const toY = (latitude) => Math.log(Math.tan(Math.PI / 4 + between(-89, latitude, 89) / RADIAN / 2)) * RADIAN;
const toLatitude = (y) => (2 * Math.atan(Math.exp(y / RADIAN)) - Math.PI / 2) * RADIAN;

export class GroundMap {
  width = 0; // pixels of the page
  height = 0;
  #x;
  #y;
  #scale = 0; // pixels per degree of longitude
  #ground = document.createElement("canvas"); // what does not move, drawn when the view changes
  #isStale = true;
  #land = []; // {path, west, east, south, north}
  #pointers = new Map(); // id → where it was last
  #onChange;
  #onPoint;

  /** `onChange()` when the view has changed; `onPoint(x, y, isPressed)` when the pointer is at a place. */
  constructor(canvas, { longitude, latitude, widthDeg }, { onChange, onPoint }) {
    this.canvas = canvas;
    this.#x = longitude;
    this.#y = toY(latitude);
    this.#onChange = onChange;
    this.#onPoint = onPoint;
    new ResizeObserver(() => this.#resize(widthDeg)).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#changed());
    this.#listen();
    this.#loadLand();
  }

  get scale() {
    return this.#scale;
  }

  /** Where a place is on the page. */
  place(x, y) {
    return [this.width / 2 + wrap(x - this.#x) * this.#scale, this.height / 2 - (y - this.#y) * this.#scale];
  }

  /** South-western corners of the tiles in view: [latitude, longitude]. */
  tiles() {
    if (!this.width) return [];
    const floor = (degrees) => Math.floor(degrees / TILE_DEG) * TILE_DEG;
    const [halfX, halfY] = [this.width / 2 / this.#scale, this.height / 2 / this.#scale];
    const tiles = [];
    for (let south = floor(toLatitude(this.#y - halfY)); south < toLatitude(this.#y + halfY); south += TILE_DEG) {
      for (let west = floor(this.#x - halfX); west < this.#x + halfX; west += TILE_DEG) tiles.push([south, wrap(west)]);
    }
    return tiles;
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const before = this.#scale;
    this.#scale = between(this.#scaleMin(), before * factor, SCALE_MAX);
    const moved = 1 / before - 1 / this.#scale; // what is under the pointer stays there
    this.#look(this.#x + (x - this.width / 2) * moved, this.#y - (y - this.height / 2) * moved);
  }

  pan(dx, dy) {
    this.#look(this.#x - dx / this.#scale, this.#y + dy / this.#scale);
  }

  #look(x, y) {
    this.#x = wrap(x);
    this.#y = between(toY(-LATITUDE_MAX), y, toY(LATITUDE_MAX));
    this.#changed();
  }

  #changed() {
    this.#isStale = true;
    this.#onChange();
  }

  /** So far out that TILES_MAX are in view: (w/5s + 2)(h/5s + 2) = TILES_MAX, solved for s. */
  #scaleMin() {
    const [w, h] = [this.width / TILE_DEG, this.height / TILE_DEG];
    return (w * h) / (Math.sqrt((w + h) ** 2 + (TILES_MAX - 4) * w * h) - (w + h));
  }

  #resize(widthDeg) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    Object.assign(this, { width, height });
    for (const canvas of [this.canvas, this.#ground]) {
      canvas.width = width * devicePixelRatio;
      canvas.height = height * devicePixelRatio;
    }
    this.#scale = between(this.#scaleMin(), this.#scale || Math.max(width / widthDeg, height / widthDeg), SCALE_MAX);
    this.#changed();
  }

  // Gestures.

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      canvas.classList.add("grabbed");
      this.#pointers.set(event.pointerId, event);
      this.#onPoint(event.offsetX, event.offsetY, true);
    });
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => {
        this.#pointers.delete(event.pointerId);
        if (!this.#pointers.size) canvas.classList.remove("grabbed");
      });
    }
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(2 ** (-event.deltaY / (event.deltaMode ? 8 : 300)), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoom(2, event.offsetX, event.offsetY));
    canvas.addEventListener("keydown", ({ key }) => {
      const step = { ArrowLeft: [80, 0], ArrowRight: [-80, 0], ArrowUp: [0, 80], ArrowDown: [0, -80] }[key];
      if (step) this.pan(...step);
      else if (key === "+" || key === "=") this.zoom(1.5);
      else if (key === "-") this.zoom(1 / 1.5);
    });
  }

  #move(event) {
    const last = this.#pointers.get(event.pointerId);
    if (!last) return this.#onPoint(event.offsetX, event.offsetY, false);
    this.#pointers.set(event.pointerId, event);
    const other = [...this.#pointers.values()].find(({ pointerId }) => pointerId !== event.pointerId);
    if (other) {
      const distance = (from) => Math.hypot(from.offsetX - other.offsetX, from.offsetY - other.offsetY) || 1;
      this.zoom(distance(event) / distance(last), other.offsetX, other.offsetY); // the other finger stays
    } else this.pan(event.offsetX - last.offsetX, event.offsetY - last.offsetY);
  }

  // The ground.

  /** `land.json`: rings of [x, y, then steps from point to point], in 1/50°. */
  async #loadLand() {
    const rings = await (await fetch("land.json")).json();
    this.#land = rings.map((ring) => {
      const path = new Path2D();
      let [longitude, latitude, west, east, south, north] = [0, 0, 180, -180, 90, -90];
      for (let n = 0; n < ring.length; n += 2) {
        const step = ring[n] / LAND_UNITS;
        longitude += n && Math.abs(step) > 180 ? step - 360 * Math.sign(step) : step; // over the date line, not around
        latitude += ring[n + 1] / LAND_UNITS;
        path.lineTo(longitude, toY(latitude));
        [west, east] = [Math.min(west, longitude), Math.max(east, longitude)];
        [south, north] = [Math.min(south, latitude), Math.max(north, latitude)];
      }
      path.closePath();
      return { path, west, east, south: toY(south), north: toY(north) };
    });
    this.#changed();
  }

  /** Put the ground on the canvas, and return a pen that draws on it in pixels of the page. */
  draw() {
    if (this.#isStale) this.#drawGround();
    this.#isStale = false;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(this.#ground, 0, 0);
    pen.scale(devicePixelRatio, devicePixelRatio);
    return pen;
  }

  #drawGround() {
    const pen = this.#ground.getContext("2d");
    const colours = getComputedStyle(document.documentElement);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.fillStyle = colours.getPropertyValue("--sea");
    pen.fillRect(0, 0, this.#ground.width, this.#ground.height);
    pen.fillStyle = colours.getPropertyValue("--land");
    pen.strokeStyle = colours.getPropertyValue("--coast");
    pen.lineJoin = "round";
    for (const shift of [-360, 0, 360]) this.#drawLand(pen, shift);
    this.#drawGrid(pen, colours.getPropertyValue("--grid"));
  }

  #drawLand(pen, shift) {
    const scale = this.#scale;
    const [left, bottom] = [this.#x - this.width / 2 / scale - shift, this.#y - this.height / 2 / scale];
    const [right, top] = [left + this.width / scale, bottom + this.height / scale];
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    pen.transform(scale, 0, 0, -scale, -left * scale, top * scale);
    pen.lineWidth = 1 / scale;
    for (const { path, west, east, south, north } of this.#land) {
      if (east < left || west > right || north < bottom || south > top) continue;
      pen.fill(path);
      pen.stroke(path);
    }
  }

  #drawGrid(pen, colour) {
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    pen.strokeStyle = colour;
    pen.lineWidth = 1;
    pen.beginPath();
    for (const [south, west] of this.tiles()) {
      const [x, y] = this.place(west, toY(south)).map((edge) => Math.round(edge) + 0.5);
      const [right, top] = [x + TILE_DEG * this.#scale, this.place(west, toY(south + TILE_DEG))[1]];
      pen.moveTo(x, top);
      pen.lineTo(x, y);
      pen.lineTo(right, y);
    }
    pen.stroke();
  }
}
