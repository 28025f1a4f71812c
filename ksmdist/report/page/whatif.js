/* The what-if: nothing is computed here but differences, the grid came with the run. */

const FIGURES = [
  ["pages_shared", "pages"], ["pages_sharing", "pages"], ["pages_unshared", "pages"], ["pages_volatile", "pages"],
  ["stable_node_chains", "contents"], ["stable_node_dups", "stable nodes"], ["zero_pages_counted", "pages"],
  ["rmap_items", "rmap items"], ["zero_merges", "pages"], ["content_merges", "pages"], ["frames_kept", "pages"],
  ["general_profit", "bytes"], ["saved_bytes", "bytes"], ["profit", "bytes"], ["physical_profit", "bytes"],
  ["zero_pages_given_back", "pages"], ["unmerge_frames", "frames"],
];

function figure(value, unit) {
  if (value === null || value === undefined) return "?";
  return unit === "bytes" ? `${formatNumber(value)} (${formatBytes(value)})` : formatNumber(value);
}

function difference(tried, now, unit) {
  if (tried === null || now === null) return "?";
  const by = BigInt(tried) - BigInt(now), sign = by > 0n ? "+" : "";
  if (by === 0n) return "0";
  return unit === "bytes" ? `${sign}${formatNumber(String(by))} (${sign}${formatBytes(String(by))})` : `${sign}${formatNumber(String(by))}`;
}

/* Wire the controls up; changed() is called with what they say, to draw it. */
function makeWhatif(data, changed) {
  const { rows, limits, accountings, kernel_accounting: tracked, one_node: oneNode } = data.whatif;
  const present = rows[data.whatif.present], best = rows[data.whatif.best];
  const get = (id) => document.getElementById(id);
  const [limit, zero, nodes, accounting] = ["limit", "use-zero-pages", "merge-across-nodes", "accounting"].map(get);
  limit.max = String(limits.length - 1);
  for (const option of accounting.options) {
    if (option.value === tracked) option.textContent += `, as Linux ${data.whatif.kernel} does`;
  }
  if (oneNode) get("whatif-nodes").textContent = "All pages are on one NUMA node, or no row differs: merge_across_nodes changes nothing here.";

  function selected() {
    const wanted = zero.checked ? accounting.value : accountings.off;
    return rows.find((row) => row.accounting === wanted && row.max_page_sharing === limits[Number(limit.value)] && row.merge_across_nodes === nodes.checked);
  }

  function set(row) {
    limit.value = String(limits.indexOf(row.max_page_sharing));
    zero.checked = row.use_zero_pages;
    nodes.checked = row.merge_across_nodes;
    accounting.value = row.use_zero_pages ? row.accounting : accountings.off;
    show();
  }

  function sentence(row) {
    const mine = row.physical_profit ?? row.profit, theirs = present.physical_profit ?? present.profit;
    const by = BigInt(mine) - BigInt(theirs);
    const marks = [row === present ? "the settings of the run" : "", row === best ? "the best for this kernel" : ""].filter(Boolean).join(", ");
    const change = by === 0n ? "as much as under the settings of the run"
      : `${formatBytes(String(by > 0n ? by : -by))} ${by > 0n ? "more" : "less"} than under the settings of the run`;
    return `Profit ${formatBytes(mine)}${row === present ? "" : `, ${change}`}. use_zero_pages=${Number(row.use_zero_pages)}, `
      + `max_page_sharing=${limitName(row.max_page_sharing)}, merge_across_nodes=${Number(row.merge_across_nodes)}`
      + (marks ? `: ${marks}.` : ".");
  }

  function show() {
    const name = limitName(limits[Number(limit.value)]);
    limit.setAttribute("aria-valuetext", name);
    get("limit-shown").textContent = name;
    for (const option of accounting.options) option.disabled = zero.checked !== accountings.on.includes(option.value);
    accounting.disabled = !zero.checked;
    if (!zero.checked) accounting.value = accountings.off;
    else if (!accountings.on.includes(accounting.value)) accounting.value = tracked;
    const row = selected();
    get("whatif-said").textContent = sentence(row);
    get("whatif-now").tBodies[0].replaceChildren(...FIGURES.map(([figureName, unit]) => element("tr", { "data-figure": figureName },
      element("th", { scope: "row" }, figureName),
      element("td", { class: "number", "data-value": row[figureName] ?? "" }, figure(row[figureName], unit)),
      element("td", { class: "number" }, figure(present[figureName], unit)),
      element("td", { class: "number" }, difference(row[figureName], present[figureName], unit)))));
    changed({ limit: Number(limit.value), zero: row.use_zero_pages, nodes: row.merge_across_nodes, accounting: row.accounting });
  }

  for (const control of [limit, zero, nodes, accounting]) control.addEventListener("input", show);
  get("to-present").addEventListener("click", () => set(present));
  get("to-best").addEventListener("click", () => set(best));
  set(present);
}
