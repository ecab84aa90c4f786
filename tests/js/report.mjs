// What every script here says to the test that runs it: one JSON object a line on standard output.
//   {"name", "ok", "detail"}            one check
//   {"waiting", "publish": [...]}       the test is to publish these: {"redis_channel", "payload"} or "payload_base64"

export const say = object => process.stdout.write(JSON.stringify(object) + "\n")

// How many times as long as otherwise everything may take, on a slow machine.
export const PATIENCE = Number(process.env.TESTS_PATIENCE ?? 1)

// A failed check names what it waited for; the time is generous, for a machine that does other work too.
export function within(promise, what, ms = 10_000) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`nothing came: ${what}`)), ms * PATIENCE)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

let failed = 0
export const failures = () => failed

export async function check(name, body) {
  try {
    say({ name, ok: true, detail: (await body()) ?? null })
  } catch (error) {
    failed += 1
    say({ name, ok: false, detail: String(error?.message ?? error) })
  }
}

export function equal(actual, expected, what) {
  const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)]
  if (a !== e) throw new Error(`${what}: ${e} was expected, ${a} came`)
}
