// Usage: node report-browser.cjs CHROMIUM DIR: looks at each DIR/*.html; see report-browser.sh.
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { pathToFileURL } = require("node:url");
const puppeteer = require("puppeteer-core");

const [chromium, dir] = process.argv.slice(2);
const sizes = { phone: [390, 844, 2], desktop: [1280, 900, 1] };
const schemes = ["light", "dark"];

// Opens `file` and fails on whatever a reader should never meet.
const open = async (browser, file, size, scheme) => {
  const page = await browser.newPage();
  const [width, height, deviceScaleFactor] = sizes[size];
  await page.setViewport({ width, height, deviceScaleFactor });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const url = pathToFileURL(file).href;
  const faults = [];
  page.on("console", message => faults.push(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", error => faults.push(`page error: ${error.message}`));
  page.on("request", request => {
    if (request.url() !== url) faults.push(`request: ${request.url()}`);
  });
  await page.goto(url, { waitUntil: "load" });
  return { page, faults };
};

// What is wrong with how the page looks, in words.
const looks = () => {
  const faults = [];
  const { scrollWidth } = document.documentElement;
  if (scrollWidth > innerWidth) faults.push(`the page is ${scrollWidth} wide in ${innerWidth}`);
  const shown = [...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length > 0);
  const charts = document.querySelectorAll("figure.chart").length;
  if (shown.length !== charts) faults.push(`${shown.length} of ${charts} charts are shown`);
  for (const svg of shown) {
    const title = svg.querySelector("title")?.textContent ?? "";
    const said = svg.querySelector("desc")?.textContent ?? "";
    if (svg.getAttribute("role") !== "img" || !title || !said) faults.push(`${title}: no words`);
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
    for (const [text, box] of texts) {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1) {
        faults.push(`${title}: "${text.textContent.trim()}" leaves the chart`);
      }
    }
    texts.forEach(([a, x], i) => texts.slice(i + 1).forEach(([b, y]) => {
      const wide = Math.min(x.right, y.right) - Math.max(x.left, y.left);
      const high = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (wide > 1 && high > 3) {
        faults.push(`${title}: "${a.textContent.trim()}" lies on "${b.textContent.trim()}"`);
      }
    }));
  }
  return faults;
};

// Sorts each table by each column, twice, and reads the plain values.
const sorts = () => {
  const plain = cell => cell.dataset.value ?? cell.textContent.trim();
  const faults = [];
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const before = [...body.rows].map(row => row.textContent).sort();
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      for (const _ of [1, 2]) {
        button.click();
        const values = [...body.rows].map(row => plain(row.cells[column]));
        const numbers = values.filter(value => value !== "" && isFinite(value)).map(Number);
        const sign = head.getAttribute("aria-sort") === "ascending" ? 1 : -1;
        if (numbers.some((n, i) => i > 0 && sign * (n - numbers[i - 1]) < 0)) {
          faults.push(`${head.textContent}: not sorted: ${values}`);
        }
      }
    });
    const after = [...body.rows].map(row => row.textContent).sort();
    if (before.join() !== after.join()) faults.push("sorting changed the rows");
  }
  return faults;
};

const copies = async page => {
  const expected = await page.evaluate(() => {
    const table = document.querySelector("table");
    const row = table.tBodies[0].rows[0];
    return [...row.cells].map(cell => cell.dataset.value ?? cell.textContent.trim()).join("\t");
  });
  await page.click("button.copy");
  await page.waitForFunction(() => document.querySelector("button.copy").textContent === "Copied");
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  assert.ok(copied.split("\n").includes(expected), `copied ${copied}, which lacks ${expected}`);
};

const main = async () => {
  const browser = await puppeteer.launch({ executablePath: chromium, args: ["--no-sandbox"] });
  const files = fs.readdirSync(dir).filter(name => name.endsWith(".html"));
  assert.ok(files.length > 0, `no page in ${dir}`);
  const faults = [];
  for (const name of files) {
    const file = path.join(dir, name);
    await browser.defaultBrowserContext()
      .overridePermissions(pathToFileURL(file).href, ["clipboard-read", "clipboard-sanitized-write"]);
    for (const size of Object.keys(sizes)) {
      for (const scheme of schemes) {
        const { page, faults: met } = await open(browser, file, size, scheme);
        met.push(...await page.evaluate(looks));
        const shot = `${name.replace(/\.html$/, "")}-${size}-${scheme}.png`;
        await page.screenshot({ path: path.join(dir, shot), fullPage: true });
        if (size === "desktop" && scheme === "light") {
          await page.bringToFront();
          await copies(page);
          met.push(...await page.evaluate(sorts));
          await page.pdf({ path: path.join(dir, name.replace(/html$/, "pdf")), format: "A4" });
        }
        faults.push(...met.map(fault => `${name}, ${size}, ${scheme}: ${fault}`));
        await page.close();
      }
    }
  }
  await browser.close();
  if (faults.length > 0) throw new Error(faults.join("\n"));
  console.log(`report-browser: ${files.length} pages, each at 2 widths, light and dark: ${dir}`);
};

main().catch(error => {
  console.error(`report-browser: ${error.message}`);
  process.exit(1);
});
