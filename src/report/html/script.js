// Tables sort by a click on a column's name, and copy as tab-separated text with all digits.
"use strict";

const plain = cell => cell.dataset.value ?? cell.textContent.trim();

// Integers past 2^53 are compared as such; what is no number comes last.
const key = text => /^-?\d+$/.test(text) ? BigInt(text) : text !== "" && isFinite(text) ? Number(text) : text;

const compare = (a, b) => {
  if (typeof a === "string" && typeof b === "string") return a.localeCompare(b, "en", { numeric: true });
  if (typeof a === "string") return 1;
  if (typeof b === "string") return -1;
  return a < b ? -1 : a > b ? 1 : 0;
};

const sort = (table, column, head) => {
  // Figures are wanted from the largest at first, words from A.
  const first = head.classList.contains("figure") ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const body = table.tBodies[0];
  const rows = [...body.rows].map(row => [key(plain(row.cells[column])), row]);
  const sign = order === "ascending" ? 1 : -1;
  rows.sort(([a], [b]) => typeof a === typeof b || (typeof a !== "string" && typeof b !== "string") ? sign * compare(a, b) : compare(a, b));
  body.append(...rows.map(([, row]) => row));
};

const copy = async text => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A browser that keeps the clipboard from local files still copies what is selected.
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
};

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (head.textContent.trim() === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, column, head));
    head.append(button);
  });
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const rows = [...table.rows].map(row => [...row.cells].map(plain).join("\t"));
    await copy(rows.join("\n"));
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  table.closest(".table").append(button);
}
