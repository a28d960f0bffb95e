// Markdown as chat models write it, to DOM nodes. Blocks that have not changed since the last call
// stay as they are, so that an answer can be drawn at every token, and be selected meanwhile.

const DEEPEST = 12;
const SCHEMES = ["http:", "https:", "mailto:"];
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITERS = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *\|? *$/;

// Draw `text` in `place`, which nobody else draws in.
function drawMarkdown(place, text) {
  const found = blocksOf(text.split("\n"), 0);
  const drawn = place.blocks || [];
  let same = 0;
  while (same < drawn.length && same < found.length && drawn[same].key === found[same].key) same++;
  for (const { node } of drawn.slice(same)) node.remove();
  for (const block of found.slice(same)) {
    block.node = block.draw();
    place.append(block.node);
  }
  place.blocks = [...drawn.slice(0, same), ...found.slice(same)];
}

// Blocks of lines: {key, draw}; the same key draws the same node.
function blocksOf(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const reader = READERS.find(each => each.begins(lines, at, depth));
    const end = reader.end(lines, at);
    const part = lines.slice(at, end);
    if (reader.draw) blocks.push({ key: reader.kind + part.join("\n"), draw: () => reader.draw(part, depth) });
    at = end;
  }
  return blocks;
}

function drawn(lines, depth) {
  return blocksOf(lines, depth + 1).map(block => block.draw());
}

const blank = line => line.trim() === "";
const indent = line => line.length - line.trimStart().length;
const isTable = (lines, at) =>
  lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-")
  && lines[at + 1].includes("|") && DELIMITERS.test(lines[at + 1]);

function run(lines, at, goesOn) {
  let end = at + 1;
  while (end < lines.length && goesOn(lines[end], end)) end++;
  return end;
}

function fenceEnd(lines, at) {
  const mark = FENCE.exec(lines[at])[2];
  const closes = line => line.trim().startsWith(mark) && [...line.trim()].every(c => c === mark[0]);
  return Math.min(lines.length, run(lines, at, line => !closes(line)) + 1);
}

function listEnd(lines, at) {
  const first = ITEM.exec(lines[at]), inner = first[1].length + 2;
  return run(lines, at, (line, number) => {
    if (blank(line)) {
      let later = number;
      while (later < lines.length && blank(lines[later])) later++;
      const next = lines[later];
      return next !== undefined && (indent(next) >= inner || sameList(first, next));
    }
    if (indent(line) >= inner || sameList(first, line)) return true;
    return !blank(lines[number - 1]) && !startsBlock(lines, number);
  });
}

function sameList(first, line) {
  const found = ITEM.exec(line);
  return found !== null && !RULE.test(line) && found[1].length < first[1].length + 2
    && /\d/.test(found[2]) === /\d/.test(first[2]);
}

const startsBlock = (lines, at) =>
  FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at]) || QUOTE.test(lines[at])
  || ITEM.test(lines[at]) || isTable(lines, at);

// The first that begins at a line reads it; the last reads everything.
const READERS = [
  { kind: "blank", begins: (lines, at) => blank(lines[at]), end: (lines, at) => run(lines, at, blank) },
  { kind: "code", begins: (lines, at) => FENCE.test(lines[at]), end: fenceEnd, draw: drawCode },
  { kind: "heading", begins: (lines, at) => HEADING.test(lines[at]), end: (_, at) => at + 1, draw: drawHeading },
  { kind: "rule", begins: (lines, at) => RULE.test(lines[at]), end: (_, at) => at + 1, draw: () => make("hr") },
  {
    kind: "quote",
    begins: (lines, at, depth) => depth < DEEPEST && QUOTE.test(lines[at]),
    end: (lines, at) => run(lines, at, line => QUOTE.test(line)),
    draw: (lines, depth) => make("blockquote", {}, ...drawn(lines.map(line => line.replace(QUOTE, "")), depth)),
  },
  { kind: "list", begins: (lines, at, depth) => depth < DEEPEST && ITEM.test(lines[at]), end: listEnd, draw: drawList },
  { kind: "table", begins: isTable, end: (lines, at) => run(lines, at, line => line.includes("|") && !blank(line)), draw: drawTable },
  {
    kind: "text",
    begins: () => true,
    end: (lines, at) => run(lines, at, (line, number) => !blank(line) && !startsBlock(lines, number)),
    draw: lines => make("p", {}, ...inline(lines.map(line => line.trim()).join("\n"))),
  },
];

function drawCode(lines) {
  const [, margin, mark, language] = FENCE.exec(lines[0]);
  const last = lines[lines.length - 1].trim();
  const closed = lines.length > 1 && last.startsWith(mark) && [...last].every(c => c === mark[0]);
  const inner = lines.slice(1, closed ? -1 : undefined).map(line => line.slice(Math.min(indent(line), margin.length)));
  const text = inner.join("\n");
  const head = make("div", {}, make("span", {}, language.trim().split(/\s/)[0] || "text"), copyButton(() => text));
  return make("div", { class: "code" }, head, make("pre", {}, make("code", {}, text)));
}

function drawHeading([line]) {
  const [, marks, text] = HEADING.exec(line);
  return make("h" + marks.length, {}, ...inline(text));
}

function drawList(lines, depth) {
  const first = ITEM.exec(lines[0]), numbered = /\d/.test(first[2]);
  const list = numbered ? make("ol", { start: parseInt(first[2], 10) }) : make("ul");
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && sameList(first, line)) items.push({ width: found[0].length, lines: [line.slice(found[0].length)] });
    else items[items.length - 1].lines.push(line.slice(Math.min(indent(line), items[items.length - 1].width)));
  }
  for (const item of items) {
    const parts = drawn(item.lines, depth);
    const bare = parts.map(part => part.tagName === "P" ? [...part.childNodes] : [part]);
    list.append(make("li", {}, ...(parts.filter(part => part.tagName === "P").length > 1 ? parts : bare.flat())));
  }
  return list;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
}

function drawTable([head, marks, ...rows]) {
  const sides = cells(marks).map(mark => mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "");
  const row = (line, tag) => {
    const found = cells(line);
    return make("tr", {}, ...sides.map((side, i) => make(tag, side ? { class: side } : {}, ...inline(found[i] || ""))));
  };
  const table = make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...rows.map(line => row(line, "td"))));
  return make("div", { class: "grid" }, table);
}

// Nodes of a text with code, bold, italics, struck words, links and breaks.
function inline(text, depth = 0) {
  const nodes = [], hopeless = new Set();
  let plain = "", at = 0;
  const flush = () => { if (plain) nodes.push(document.createTextNode(plain)); plain = ""; };
  while (at < text.length) {
    const found = depth < DEEPEST ? span(text, at, depth, hopeless) : null;
    if (found) {
      flush();
      nodes.push(found.node);
      at = found.end;
    } else if (text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] || "")) {
      plain += text[at + 1];
      at += 2;
    } else plain += text[at++];
  }
  flush();
  return nodes;
}

function span(text, at, depth, hopeless) {
  const char = text[at];
  if (char === "\n") return { node: make("br"), end: at + 1 };
  if (char === "`") return codeSpan(text, at, hopeless);
  if (char === "[" || (char === "!" && text[at + 1] === "[")) return link(text, at, depth, hopeless);
  if (char === "<" || char === "h") return address(text, at, hopeless);
  if (char === "*" || char === "_" || char === "~") return emphasis(text, at, depth, hopeless);
  return null;
}

// Where `mark` comes again from a place on, -1 where not: that is looked for once, whatever comes.
function seek(text, mark, from, hopeless) {
  if (hopeless.has(mark)) return -1;
  const found = text.indexOf(mark, from);
  if (found < 0) hopeless.add(mark);
  return found;
}

function codeSpan(text, at, hopeless) {
  const mark = /^`+/.exec(text.slice(at, at + 32))[0];
  let end = seek(text, mark, at + mark.length, hopeless);
  while (end >= 0 && text[end + mark.length] === "`") {
    let next = end;
    while (text[next] === "`") next++;
    end = text.indexOf(mark, next);
  }
  if (end < 0) return null;
  const inner = text.slice(at + mark.length, end).replaceAll("\n", " ");
  const bare = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
  return { node: make("code", {}, bare), end: end + mark.length };
}

function link(text, at, depth, hopeless) {
  const open = text[at] === "!" ? at + 2 : at + 1;
  const close = seek(text, "](", open, hopeless);
  if (close < 0) return null;
  const end = seek(text, ")", close, hopeless);
  if (end < 0) return null;
  const label = text.slice(open, close);
  const [target] = text.slice(close + 2, end).trim().split(/\s/);
  if (label.includes("[") || label.includes("\n\n")) return null;
  const node = anchor(target, inline(label || target, depth + 1));
  return node && { node, end: end + 1 };
}

function address(text, at, hopeless) {
  if (text[at] === "<") {
    const end = seek(text, ">", at, hopeless);
    const inner = end < 0 ? "" : text.slice(at + 1, end);
    const node = /^\S+$/.test(inner) ? anchor(inner, [inner]) : null;
    return node && { node, end: end + 1 };
  }
  if (/\w/.test(text[at - 1] || "")) return null;
  const found = /^https?:\/\/[^\s<>"'`)\]]+/.exec(text.slice(at, at + 2048));
  if (!found) return null;
  const bare = found[0].replace(/[.,;:!?*_]+$/, "");
  const node = anchor(bare, [bare]);
  return node && { node, end: at + bare.length };
}

// A link to somewhere harmless; null for every other scheme, and for what is no whole address.
function anchor(target, children) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!SCHEMES.includes(url.protocol)) return null;
  return make("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function emphasis(text, at, depth, hopeless) {
  const mark = text.startsWith(text[at].repeat(2), at) ? text[at].repeat(2) : text[at];
  if (mark === "~") return null;
  const from = at + mark.length, word = mark[0] === "_";
  if (/\s/.test(text[from] || " ") || (word && /\w/.test(text[at - 1] || ""))) return null;
  let end = seek(text, mark, from + 1, hopeless);
  const wrong = () => /\s/.test(text[end - 1]) || (mark.length === 1 && text[end + 1] === mark)
    || (word && /\w/.test(text[end + mark.length] || ""));
  for (let tries = 0; end >= 0 && wrong(); tries++) {
    if (tries > 50) return null;
    end = text.indexOf(mark, end + (text[end + 1] === mark ? 2 : 1));
  }
  if (end < 0) return null;
  if (mark.length === 2 && text[end + 2] === mark[0]) end++;
  const tag = mark[0] === "~" ? "s" : mark.length === 2 ? "strong" : "em";
  return { node: make(tag, {}, ...inline(text.slice(from, end), depth + 1)), end: end + mark.length };
}
