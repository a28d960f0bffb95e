// Elements, always with text as text: nothing that a model or a person wrote is ever parsed as HTML.

const $ = id => document.getElementById(id);
const DRAWN = ["svg", "rect", "text", "path", "title"];

function make(tag, attributes = {}, ...children) {
  const node = DRAWN.includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map(child => child instanceof Node ? child : String(child)));
  return node;
}

function button(text, press, attributes = {}) {
  const node = make("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", press);
  return node;
}

function seconds(s) {
  if (s == null) return "–";
  if (s >= 1) return s.toFixed(2) + " s";
  return s >= 0.001 ? (1000 * s).toFixed(s < 0.1 ? 1 : 0) + " ms" : (1e6 * s).toFixed(0) + " µs";
}

function count(n) {
  for (const [size, unit] of [[1e9, " B"], [1e6, " M"], [1e3, " k"]]) {
    if (n >= size) return (n / size).toFixed(size === 1e9 ? 2 : 1) + unit;
  }
  return String(n);
}

// Where pages come over plain HTTP from another machine browsers have no clipboard.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const held = make("textarea", {}, text);
  document.body.append(held);
  held.select();
  document.execCommand("copy");
  held.remove();
}

function copyButton(text) {
  const node = button("Copy", async () => {
    try {
      await copy(text());
      node.textContent = "Copied";
    } catch {
      node.textContent = "Not allowed";
    }
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  });
  return node;
}
