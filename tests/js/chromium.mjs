// A real headless browser, closed to the outside, for the scripts that drive one.

import fs from "node:fs"
import os from "node:os"
import path from "node:path"
import puppeteer from "puppeteer-core"
import { PATIENCE } from "./report.mjs"

function executable() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM
  const names = ["chromium", "chromium-browser", "google-chrome"]
  const places = process.env.PATH.split(path.delimiter).filter(Boolean)
  const candidates = [
    ...names.flatMap(name => places.map(place => path.join(place, name))),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
  ]
  const found = candidates.find(candidate => fs.existsSync(candidate))
  if (!found) throw new Error("no Chromium found; CHROMIUM=/path/to/it names one")
  return found
}

// Runs body(page, faults); faults fills with what the console, the page or a request to another host did wrong.
// hosts: others that the page may ask; args: further ones of the browser.
export async function inBrowser(origin, body, { width = 1280, height = 800, dark = false, hosts = [], args = [] } = {}) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "relay-chromium-"))
  const browser = await puppeteer.launch({
    executablePath: executable(),
    headless: true,
    timeout: 30_000 * PATIENCE,
    protocolTimeout: 180_000 * PATIENCE,
    userDataDir: profile,
    args: ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
      ...args],
  })
  try {
    const page = await browser.newPage()
    page.setDefaultTimeout(30_000 * PATIENCE)
    await page.setViewport({ width, height, deviceScaleFactor: width < 600 ? 2 : 1 })
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: dark ? "dark" : "light" }])
    const { host } = new URL(origin)
    const faults = []
    const sameHost = url => !/^(https?|wss?):/.test(url) || [host, ...hosts].includes(new URL(url).host)
    page.on("console", message => { if (message.type() === "error") faults.push(`console: ${message.text()}`) })
    page.on("pageerror", error => faults.push(`uncaught: ${error.message}`))
    page.on("requestfailed", request => faults.push(`failed: ${request.url()} ${request.failure()?.errorText}`))
    page.on("request", request => { if (!sameHost(request.url())) faults.push(`another host: ${request.url()}`) })
    const devtools = await page.createCDPSession()
    await devtools.send("Network.enable")
    devtools.on("Network.webSocketCreated", ({ url }) => { if (!sameHost(url)) faults.push(`another host: ${url}`) })
    return await body(page, faults)
  } finally {
    await browser.close()
    fs.rmSync(profile, { recursive: true, force: true, maxRetries: 5 })
  }
}
