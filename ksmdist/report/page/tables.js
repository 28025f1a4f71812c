/* Tables that can be searched, sorted and leafed through; all by keyboard, all that changes is announced. */

const ROWS = 20; // of a page of a table

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const NUMBERS = new Set(["int", "bytes", "mean"]);

function cellText(value, column) {
  if (value === null || value === undefined) return column.none ?? "?";
  return NUMBERS.has(column.type) ? formatNumber(value) : value;
}

function compare(left, right, numeric) {
  if (left === null || right === null) return (left === null) - (right === null); // not known comes last
  if (numeric) return Number(left) - Number(right);
  return left < right ? -1 : left > right ? 1 : 0;
}

/* Fill `place` with a table. grid: columns (name, label, type, none: what stands for null), data by column, total. */
function makeTable(place, grid) {
  const { columns, data, total } = grid, caption = place.dataset.caption, file = place.dataset.file;
  const count = data.length ? data[0].length : 0;
  const all = Array.from({ length: count }, (_, at) => at);
  let rows = all, page = 0, sorted = -1, down = false, found = null;

  const search = element("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  const status = element("p", { role: "status", class: "status" });
  const body = element("tbody");
  const heads = columns.map((column, at) => {
    const button = element("button", { type: "button" }, element("span", {}, column.label));
    button.addEventListener("click", () => sortBy(at));
    return element("th", { scope: "col", class: NUMBERS.has(column.type) ? "number" : null }, button);
  });
  const buttons = ["first", "previous", "next", "last"].map((name) => {
    const button = element("button", { type: "button", "aria-label": `${name} rows of ${caption}` }, name);
    button.addEventListener("click", () => turn(name));
    return button;
  });

  function pages() {
    return Math.max(1, Math.ceil(rows.length / ROWS));
  }

  function turn(name) {
    page = { first: 0, previous: page - 1, next: page + 1, last: pages() - 1 }[name];
    page = Math.min(Math.max(page, 0), pages() - 1);
    show();
  }

  function sortBy(at) {
    const numeric = NUMBERS.has(columns[at].type);
    down = sorted === at ? !down : numeric; // the most first, names from A
    sorted = at;
    arrange();
  }

  function arrange() {
    rows = found ?? all;
    if (sorted >= 0) {
      const values = data[sorted], numeric = NUMBERS.has(columns[sorted].type);
      rows = [...rows].sort((a, b) => {
        const known = (values[a] === null) - (values[b] === null);
        return known || (down ? -1 : 1) * compare(values[a], values[b], numeric) || a - b;
      });
    }
    page = 0;
    show();
  }

  function show() {
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== sorted ? "none" : down ? "descending" : "ascending"));
    body.replaceChildren(...rows.slice(page * ROWS, (page + 1) * ROWS).map((row) => element("tr", {}, ...columns.map((column, at) => {
      const cell = element("td", { class: NUMBERS.has(column.type) ? "number" : column.type });
      const text = cellText(data[at][row], column);
      cell.append(column.type === "text" ? element("bdi", {}, text) : text);
      if (column.type === "bytes" && data[at][row] !== null) cell.title = formatBytes(data[at][row]);
      return cell;
    }))));
    const first = rows.length ? page * ROWS + 1 : 0, last = Math.min(rows.length, (page + 1) * ROWS);
    const left = total > count ? `; ${formatNumber(total)} in all, the rest in ${file}` : "";
    const matched = found ? ` that match, of ${formatNumber(count)}` : "";
    status.textContent = rows.length
      ? `${formatNumber(first)} to ${formatNumber(last)} of ${formatNumber(rows.length)} rows${matched}${left}`
      : found ? `No row matches${left}` : "No rows.";
    buttons.forEach((button, at) => { button.disabled = at < 2 ? page === 0 : page >= pages() - 1; });
  }

  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      found = words.length ? all.filter((row) => {
        const text = data.map((values, at) => values[row] ?? columns[at].none ?? "?").join("\n").toLowerCase();
        return words.every((word) => text.includes(word));
      }) : null;
      arrange();
    }, 120);
  });

  place.replaceChildren(
    element("div", { class: "tools" }, element("label", {}, "search ", search), element("span", { class: "turn" }, ...buttons)),
    status,
    element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
      element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, ...heads)), body)),
  );
  show();
}
