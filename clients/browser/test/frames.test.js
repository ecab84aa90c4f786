import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { decode, encode } from "../relay.js";
import { bytes } from "./support.js";

const table = JSON.parse(readFileSync(new URL("../../../tests/vectors/frames.json", import.meta.url)));
const vectors = table.filter(({ version }) => version === 2); // V1 is for older clients

function messageOf(vector) {
  const { join_ref, ref, topic, event, status } = vector;
  const payload = status ? { status, response: valueOf(vector, "response") } : valueOf(vector, "payload");
  return { join_ref, ref, topic, event, payload };
}

function valueOf(vector, name) {
  const hex = vector[`${name}_hex`];
  return hex === undefined ? vector[name] : bytes(hex);
}

const hexOf = (frame) => Buffer.from(frame).toString("hex");

for (const vector of vectors) {
  test(`frame of the ${vector.direction}: ${vector.name}`, () => {
    if (vector.direction === "server") {
      assert.deepEqual(decode(vector.text ?? bytes(vector.hex)), messageOf(vector));
    } else {
      const frame = encode(messageOf(vector));
      assert.equal(vector.text === undefined ? hexOf(frame) : frame, vector.text ?? vector.hex);
    }
  });
}

test("a view of bytes is sent without what lies around it", () => {
  const payload = new Uint8Array([1, 2, 3, 4]).subarray(1, 3);
  assert.equal(hexOf(encode({ join_ref: "1", ref: "2", topic: "t", event: "e", payload })), "0001010101313274650203");
});

test("a name of 256 bytes cannot be sent in a binary frame", () => {
  const message = { join_ref: "1", ref: "2", topic: "é".repeat(128), event: "e", payload: new ArrayBuffer(1) };
  assert.throws(() => encode(message), RangeError);
});

test("a binary frame cut short, empty or of an unknown kind is an error", () => {
  assert.throws(() => decode(bytes("020505746f")), RangeError);
  assert.throws(() => decode(bytes("")), TypeError);
  assert.throws(() => decode(bytes("0301")), TypeError);
});
