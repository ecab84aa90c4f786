// axe-core on a page: what it finds wrong, a line each.

import fs from "node:fs"
import { createRequire } from "node:module"

const source = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8")

/** Run all rules of WCAG 2.2 A and AA, and axe's best practices, on what is shown now. */
export async function findings(page) {
  await page.evaluate(source)
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }))
  return violations.flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary }) =>
    `${id}: ${target.join(" ")}: ${failureSummary.split("\n").slice(1).map(line => line.trim()).join("; ")}`))
}
