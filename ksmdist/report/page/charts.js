"use strict";
/* The plots: a Vega-Lite specification each, from what the page holds and the width there is.
   Colours are names of the style sheet, so that light, dark and print need no new drawing. */

const KINDS = ["zero", "same_filled", "other"];
const KIND_NAMES = { zero: "zero pages", same_filled: "same-filled pages", other: "other pages" };
const SCOPE_NAMES = { within: "within one image", between: "between images" };
const POLICY_NAMES = {
  never: "never", zero: "zero pages only", same_filled: "same-filled only", image: "within an image",
  tenant: "within a tenant", salt: "within a salt", all: "all images",
};
const KIND_COLORS = { domain: KINDS, range: ["var(--zero)", "var(--same-filled)", "var(--other)"] };

const CONFIG = {
  aria: false, // the element around a plot says what it is, the table beside it what it shows
  background: "transparent",
  font: "system-ui, sans-serif",
  axis: {
    labelColor: "var(--ink)", titleColor: "var(--ink)", tickColor: "var(--line)", domainColor: "var(--line)",
    gridColor: "var(--grid)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelLimit: 190,
  },
  header: { labelColor: "var(--ink)", titleColor: "var(--ink)", labelFontSize: 12, labelFontWeight: "bold" },
  legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", labelFontSize: 12, titleFontWeight: "normal" },
  text: { color: "var(--ink)", fontSize: 12 },
  view: { stroke: null },
};

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/* An exact number: whole numbers beyond 2^53 come as decimal text. */
function formatNumber(value) {
  if (value === null || value === undefined) return "?";
  const sign = typeof value === "string" ? BigInt(value) : value;
  return sign.toLocaleString("en-US", { maximumFractionDigits: 2 });
}

function formatBytes(value) {
  if (value === null || value === undefined) return "?";
  let left = Number(value), unit = 0;
  while (Math.abs(left) >= 1024 && unit < UNITS.length - 1) { left /= 1024; unit += 1; }
  return unit === 0 ? `${left} B` : `${left.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} ${UNITS[unit]}`;
}

/* The unit in which a plot shows bytes, and what to divide by. */
function unitOf(values) {
  const most = Math.max(1, ...values.map((value) => Math.abs(Number(value))));
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log2(most) / 10));
  return { name: UNITS[power], size: 2 ** (10 * power) };
}

/* A bucket of powers of two by its first number. most: the greatest number there can be. */
function bucketName(copies, most = Infinity) {
  const last = Math.min(2 * copies - 1, most);
  return last <= copies ? String(copies) : `${formatNumber(copies)}-${formatNumber(last)}`;
}

/* How a plot counts: what to divide by, and what to call it. */
function scaleOf(values, name) {
  const most = Math.max(1, ...values);
  const [size, word] = most >= 1e10 ? [1e9, "billions"] : most >= 1e7 ? [1e6, "millions"] : most >= 1e4 ? [1e3, "thousands"] : [1, ""];
  return { size, title: word ? `${name}, ${word}` : name };
}

function labelWidth(width) {
  return width < 480 ? 140 : 250;
}

/* Horizontal bars with their numbers beside them. rows: name, value, label, tip, and kind for the colour. */
function bars(rows, width, title, step) {
  const most = Math.max(0, ...rows.map((row) => row.value));
  const least = Math.min(0, ...rows.map((row) => row.value));
  return {
    data: { values: rows },
    width: Math.max(80, width - labelWidth(width) - 24),
    height: { step },
    encoding: {
      y: {
        field: "name", type: "nominal", sort: null, title: null,
        axis: { labelLimit: labelWidth(width) - 10, labelPadding: 6, ticks: false, domain: false },
      },
      x: {
        field: "value", type: "quantitative", title,
        scale: { domain: [least * 1.1, (most || 1) * (width < 480 ? 1.7 : 1.3)], nice: false },
        axis: { tickCount: width < 480 ? 3 : 6 },
      },
    },
    layer: [
      {
        mark: { type: "bar", height: { band: 0.75 } },
        encoding: {
          color: { field: "kind", type: "nominal", legend: null, scale: KIND_COLORS },
          tooltip: { field: "tip" },
        },
      },
      { mark: { type: "text", align: "left", dx: 5 }, encoding: { text: { field: "label" } } },
    ],
  };
}

function splitChart(data, width) {
  const unit = unitOf(data.split.map((part) => part.bytes));
  const rows = data.split.map((part) => ({
    name: width < 480 ? `${KIND_NAMES[part.kind].replace(" pages", "")}, ${part.scope}` : `${KIND_NAMES[part.kind]}, ${SCOPE_NAMES[part.scope]}`,
    kind: part.kind,
    value: Number(part.bytes) / unit.size,
    label: formatBytes(part.bytes),
    tip: `${KIND_NAMES[part.kind]}, ${SCOPE_NAMES[part.scope]}: ${formatNumber(part.pages)} pages saved, ${formatBytes(part.bytes)}`,
  }));
  return bars(rows, width, `saved, ${unit.name}`, 26);
}

function policyChart(data, width) {
  const unit = unitOf(data.policy.map((row) => row.saved_bytes));
  const rows = data.policy.map((row) => ({
    name: POLICY_NAMES[row.policy],
    kind: "zero",
    value: Number(row.saved_bytes) / unit.size,
    label: formatBytes(row.saved_bytes),
    tip: `${POLICY_NAMES[row.policy]}: ${formatNumber(row.saved_pages)} pages saved, ${formatBytes(row.saved_bytes)}`,
  }));
  return bars(rows, width, `saved, ${unit.name}`, 28);
}

/* Vertical bars over buckets, their numbers above them. rows: name, value, tip; scale: as scaleOf() gives it. */
function columns(rows, names, width, color, scale, titleX) {
  const steep = names.length * 46 > width, roomy = names.length * 36 < width;
  return {
    data: { values: rows.map((row) => ({ ...row, height: row.value / scale.size, label: short(row.value) })) },
    width: Math.max(120, width - 84),
    height: 96,
    encoding: {
      x: {
        field: "name", type: "nominal", sort: names, title: titleX || null, scale: { domain: names },
        axis: titleX ? { labelAngle: steep ? -90 : -35, labelLimit: 110 } : { labels: false, ticks: false },
      },
      y: {
        field: "height", type: "quantitative", title: scale.title,
        scale: { domain: [0, (scale.most / scale.size) * 1.25], nice: false }, axis: { tickCount: 3, format: "~f" },
      },
    },
    layer: [
      { mark: { type: "bar", color }, encoding: { tooltip: { field: "tip" } } },
      ...(roomy ? [{
        mark: { type: "text", dy: -7, fontSize: 11 },
        transform: [{ filter: "datum.value > 0" }],
        encoding: { text: { field: "label" } },
      }] : []),
    ],
  };
}

function short(value) {
  return value < 1e4 ? formatNumber(value) : Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

function spectrumChart(data, width) {
  const last = Math.max(1, ...data.spectrum.map((row) => row.copies));
  const names = [];
  for (let copies = 1; copies <= last; copies *= 2) names.push(formatNumber(copies));
  const pages = data.spectrum.map((row) => Number(row.pages));
  const scale = { ...scaleOf(pages, "pages"), most: Math.max(1, ...pages) }; // the kinds on one scale
  const kinds = KINDS.filter((kind) => data.spectrum.some((row) => row.kind === kind));
  const panels = kinds.map((kind, at) => {
    const rows = data.spectrum.filter((row) => row.kind === kind).map((row) => ({
      name: formatNumber(row.copies),
      value: Number(row.pages),
      tip: `${KIND_NAMES[kind]}, ${bucketName(row.copies)} copies: ${formatNumber(row.pages)} pages, ${formatNumber(row.contents)} contents`,
    }));
    return {
      ...columns(rows, names, width, KIND_COLORS.range[KINDS.indexOf(kind)], scale, at === kinds.length - 1 ? "copies, at least" : ""),
      title: { text: KIND_NAMES[kind], anchor: "start", color: "var(--ink)", fontSize: 13 },
    };
  });
  return { vconcat: panels, spacing: 14 };
}

function hugeChart(data, width) {
  const most = data.page_size / 8, frames = data.huge.map((row) => row.frames);
  const rows = data.huge.map((row) => ({
    name: formatNumber(row.mergeable),
    value: row.frames,
    tip: `${bucketName(row.mergeable, most)} pages zero or with a copy elsewhere: ${formatNumber(row.frames)} frames, ${formatNumber(row.huge_frames)} of them huge pages`,
  }));
  const scale = { ...scaleOf(frames, "frames"), most: Math.max(1, ...frames) };
  return { ...columns(rows, rows.map((row) => row.name), width, "var(--zero)", scale, "pages of a frame that are zero or have a copy elsewhere, at least"), height: 150 };
}

function column(grid, name) {
  return grid.data[grid.columns.findIndex((each) => each.name === name)];
}

function cumulativeChart(data, width) {
  const grid = data.cumulative;
  const [images, pages, contents] = ["image", "total_pages", "total_contents"].map((name) => column(grid, name));
  const unit = unitOf([Number(pages[pages.length - 1]) * data.page_size]);
  const sizes = (values, at) => (Number(values[at]) * data.page_size) / unit.size;
  const gap = images.map((image, at) => ({ images: image + 1, pages: sizes(pages, at), contents: sizes(contents, at) }));
  const lines = [["pages", pages], ["different contents", contents]].flatMap(([what, values]) => images.map((image, at) => ({
    images: image + 1, what, size: sizes(values, at),
    tip: `${formatNumber(image + 1)} images: ${formatNumber(values[at])} ${what}, ${formatBytes(Number(values[at]) * data.page_size)}`,
  })));
  const domain = ["pages", "different contents"], color = ["var(--zero)", "var(--same-filled)"];
  return {
    width: Math.max(120, width - 84),
    height: 240,
    encoding: {
      x: {
        field: "images", type: "quantitative", title: "images, in scan order", scale: { domain: [1, Math.max(2, images[images.length - 1] + 1)], nice: false },
        axis: { tickMinStep: 1, tickCount: width < 480 ? 4 : 8, format: ",d" },
      },
    },
    layer: [
      {
        data: { values: gap },
        mark: { type: "area", color: "var(--zero)", opacity: 0.12 },
        encoding: { y: { field: "contents", type: "quantitative", title: unit.name }, y2: { field: "pages" } },
      },
      {
        data: { values: lines },
        mark: { type: "line", strokeWidth: 2.5, point: images.length <= 60 ? { size: 45 } : false },
        encoding: {
          y: { field: "size", type: "quantitative", title: unit.name },
          color: { field: "what", type: "nominal", title: null, scale: { domain, range: color }, legend: { orient: "top", symbolType: "stroke", symbolStrokeWidth: 3, symbolSize: 400 } },
          strokeDash: { field: "what", type: "nominal", title: null, scale: { domain, range: [[1, 0], [7, 4]] } },
          tooltip: { field: "tip" },
        },
      },
    ],
  };
}

function heatChart(data, width) {
  const { heat } = data, grid = heat.cells;
  const [rows, cols, pages, pairs] = ["row", "column", "pages", "pairs"].map((name) => column(grid, name));
  const named = !heat.binned && heat.side <= 40;
  const place = (at) => (heat.binned ? `${formatNumber(heat.first[at])} to ${formatNumber(heat.last[at])}` : `${heat.names[at]} (${at})`);
  const values = rows.map((row, at) => ({
    r: row, c: cols[at], v: pages[at],
    tip: heat.binned
      ? `images ${place(row)}, with images ${place(cols[at])}: ${formatNumber(pages[at])} pages on average, ${formatNumber(pairs[at])} pairs share`
      : row === cols[at]
        ? `${place(row)}: ${formatNumber(pages[at])} pages with a content it holds twice`
        : `${place(row)}: ${formatNumber(pages[at])} pages whose content ${place(cols[at])} holds too`,
  }));
  const ends = Array.from({ length: heat.side }, (_, at) => at);
  const margin = named ? (width < 480 ? 90 : 170) : 64;
  const room = Math.max(160, Math.min(560, width - margin - 24, Math.max(160, heat.side * 64)));
  const size = Math.floor(room / heat.side) * heat.side; // whole pixels: no seams between cells
  const shown = heat.names.map((name) => (name.length > 24 ? `${name.slice(0, 14)}…${name.slice(-9)}` : name));
  const few = Math.max(1, Math.ceil(heat.side / 10));
  const axis = {
    title: heat.binned ? "images in scan order, several in a cell" : named ? null : "image, by scan order",
    domain: false, ticks: false, grid: false, labelLimit: margin - 12, values: named ? ends : ends.filter((at) => at % few === 0),
    labelExpr: named ? `${JSON.stringify(shown)}[datum.value]` : heat.binned ? `${JSON.stringify(heat.first)}[datum.value]` : "datum.value",
  };
  return {
    data: { values },
    width: size,
    height: size,
    view: { stroke: "var(--line)" },
    mark: { type: "rect", aria: false, stroke: heat.side <= 40 ? "var(--paper)" : null, strokeWidth: 1 },
    encoding: {
      y: { field: "r", type: "ordinal", scale: { domain: ends }, axis },
      x: { field: "c", type: "ordinal", scale: { domain: ends }, axis: { ...axis, orient: "bottom", labelAngle: named ? -60 : 0 } },
      color: {
        field: "v", type: "quantitative", scale: { type: "sqrt", scheme: { name: "viridis", extent: [0.15, 1] }, zero: true },
        legend: {
          orient: "bottom", title: heat.binned ? "pages, mean of the pairs in a cell" : "pages of the row's image",
          gradientLength: Math.min(260, size), tickCount: 4, titleLimit: 400, format: ",.0f",
        },
      },
      tooltip: { field: "tip" },
    },
  };
}

/* now: what the controls say: limit (its place), zero, nodes, accounting */
function whatifChart(data, width, now) {
  const { rows, limits, kernel_accounting: tracked } = data.whatif;
  const profit = (row) => Number(row.physical_profit ?? row.profit);
  const unit = unitOf(rows.map(profit));
  const alike = rows.filter((row) => row.merge_across_nodes === now.nodes);
  const lines = [["off", "stable_tree"], ["on", now.zero ? now.accounting : tracked]];
  const values = lines.flatMap(([zero, accounting]) => alike.filter((row) => row.accounting === accounting).map((row) => ({
    limit: limits.indexOf(row.max_page_sharing), zero, profit: profit(row) / unit.size,
    tip: `use_zero_pages ${zero}, max_page_sharing ${limitName(row.max_page_sharing)}: ${formatBytes(profit(row))}`,
  })));
  const names = JSON.stringify(limits.map(limitName));
  const tried = values.filter((row) => row.limit === now.limit && row.zero === (now.zero ? "on" : "off"));
  return {
    data: { values },
    width: Math.max(120, width - 84),
    height: 200,
    encoding: {
      x: {
        field: "limit", type: "quantitative", title: "max_page_sharing", scale: { domain: [0, limits.length - 1], nice: false, padding: 12 },
        axis: { values: limits.map((_, at) => at), labelExpr: `${names}[datum.value]`, grid: false, labelAngle: width < 480 ? -60 : 0 },
      },
      y: { field: "profit", type: "quantitative", title: `profit, ${unit.name}, not from 0`, scale: { zero: false } },
    },
    layer: [
      {
        mark: { type: "line", strokeWidth: 2 },
        encoding: {
          color: { field: "zero", type: "nominal", title: "use_zero_pages", scale: { domain: ["off", "on"], range: ["var(--zero)", "var(--same-filled)"] }, legend: { orient: "top" } },
          strokeDash: { field: "zero", type: "nominal", scale: { domain: ["off", "on"], range: [[1, 0], [6, 4]] } },
        },
      },
      {
        mark: { type: "point", filled: true, size: 60, opacity: 1 },
        encoding: {
          color: { field: "zero", type: "nominal" },
          shape: { field: "zero", type: "nominal", scale: { domain: ["off", "on"], range: ["circle", "square"] } },
          tooltip: { field: "tip" },
        },
      },
      { data: { values: tried }, mark: { type: "point", size: 260, strokeWidth: 2.5, color: "var(--ink)", filled: false, opacity: 1 } },
      { data: { values: tried }, mark: { type: "text", text: "tried", dy: -18, fontWeight: "bold" } },
    ],
  };
}

function limitName(limit) {
  return limit === null ? "unlimited" : formatNumber(limit);
}
