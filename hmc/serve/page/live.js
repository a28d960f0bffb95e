// What the server says of its plan and of the work under way, drawn once a second.

const rates = [];
let model = new URLSearchParams(location.search).get("model");
let models = [], facts = null, before = null, serving = false;

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = "Bearer " + $("key").value;
  return found;
}

// The message of an answer that is an error, whatever stands between us and the server.
async function faultOf(answer) {
  if (answer.status === 401) return "needs a key: it goes into Settings";
  try {
    return (await answer.json()).error.message;
  } catch {
    return "HTTP " + answer.status;
  }
}

async function ask(path) {
  const answer = await fetch(path, { headers: headers() });
  if (!answer.ok) throw new Error(await faultOf(answer));
  return answer.json();
}

const tierClass = tier => tier === "host" || tier === "streamed" ? tier : "gpu";

function drawPlan() {
  $("name").textContent = facts.name;
  document.title = facts.name + " · hmc";
  const experts = facts.experts ? `, ${facts.experts} experts, ${facts.top_k} a token` : "";
  $("facts").textContent = `${facts.architecture}, ${facts.layers} layers${experts}, ${count(facts.parameters)} parameters, context ${facts.max_context}, ${facts.isa}`;
  const layers = facts.placement, totals = {};
  if (!layers.length) {
    $("map").textContent = "This model routes nothing.";
    $("tiers").replaceChildren();
    return;
  }
  const high = Math.max(5, Math.min(18, 320 / layers.length)), left = 26, wide = 440 - left;
  const svg = make("svg", { viewBox: `0 0 440 ${layers.length * high}`, role: "img", "aria-label": "Where the experts of each layer are" });
  layers.forEach((layer, row) => {
    if (row % Math.ceil(11 / high) === 0) svg.append(make("text", { x: 0, y: row * high + high / 2 + 3.5 }, layer.layer));
    for (const [tier, runs] of Object.entries(layer.tiers)) for (const [first, last] of runs) {
      totals[tier] = (totals[tier] || 0) + last - first + 1;
      const place = { x: left + wide * first / facts.experts, y: row * high + .5, width: wide * (last - first + 1) / facts.experts, height: high - 1 };
      svg.append(make("rect", { ...place, class: tierClass(tier) }, make("title", {}, `layer ${layer.layer}, experts ${first} to ${last}: ${tier}`)));
    }
  });
  $("map").replaceChildren(svg);
  legend($("tiers"), Object.entries(totals).map(([tier, n]) => [tierClass(tier), `${tier}: ${n} experts`]));
}

function legend(place, entries) {
  place.replaceChildren(...entries.map(([kind, text]) => make("span", {}, make("i", { class: kind }), text)));
}

function drawRates() {
  const most = Math.max(1, ...rates), width = 440, height = 56;
  const points = rates.map((rate, i) => `${(i + 120 - rates.length) * width / 119},${(height - 2 - (height - 14) * rate / most).toFixed(1)}`);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Tokens a second" });
  svg.append(make("path", { d: "M" + (points.join("L") || "0,0") }));
  svg.append(make("text", { x: 0, y: 9 }, most.toFixed(most < 10 ? 1 : 0)));
  $("spark").replaceChildren(svg);
}

function drawLive(now) {
  const loads = now.state === "unloaded" || (now.state === "loading" && models.length > 1);
  $("state").textContent = now.state === "ready" ? "ready" : now.reason || (loads ? "unloaded: a message loads it" : now.state);
  $("state").dataset.state = now.state;
  serving = now.state === "ready" || loads;
  drawButtons();
  const s = now.scheduler;
  if (!s) {
    before = null;
    return;
  }
  const rate = before ? Math.max(0, (s.tokens_generated - before.tokens) / (now.time - before.time)) : 0;
  before = { tokens: s.tokens_generated, time: now.time };
  rates.push(rate);
  if (rates.length > 120) rates.shift();
  $("running").textContent = s.running + s.prefilling;
  $("waiting").textContent = s.waiting;
  $("batch").replaceChildren(String(s.batch), make("small", {}, ` of ${facts.max_batch}`));
  $("rate").textContent = rate.toFixed(1);
  $("ttft").textContent = now.ttft ? seconds(now.ttft.median) : "–";
  $("step").textContent = seconds(s.step_seconds);
  $("phase").textContent = s.phase || "idle";
  $("lanes").textContent = s.lanes;
  const prompt = s.prompt_tokens + s.prefix_tokens;
  $("reuse").textContent = prompt ? (100 * s.prefix_tokens / prompt).toFixed(0) + " %" : "–";
  $("used").style.width = 100 * s.kv_used / s.kv_total + "%";
  $("kept").style.width = 100 * s.kv_cached / s.kv_total + "%";
  const free = s.kv_total - s.kv_used - s.kv_cached;
  legend($("cache"), [["used", `${s.kv_used} blocks in use`], ["kept", `${s.kv_cached} kept for reuse`], ["free", `${free} free`]]);
  drawRates();
}

function drawModels() {
  $("models").hidden = models.length < 2;
  $("name").hidden = models.length > 1;
  $("models").replaceChildren(...models.map(({ id, status }) => {
    const word = !status || status.value === "loaded" ? "" : status.failed ? " (failed)" : ` (${status.value})`;
    const item = make("option", { value: id }, id + word);
    item.selected = id === model;
    return item;
  }));
}

function chooseModel(name) {
  model = name;
  facts = before = null;
  rates.length = 0;
  const query = new URLSearchParams(location.search);
  query.set("model", model);
  history.replaceState(null, "", "?" + query);
}

async function poll() {
  try {
    if (models.length !== 1) {
      models = (await ask("v1/models")).data;
      model = model || models[0].id;
      if (document.activeElement !== $("models")) drawModels();
    }
    const chosen = model, which = "?model=" + encodeURIComponent(model);
    const plan = facts || await ask("live/plan" + which), now = await ask("live" + which);
    if (chosen === model) {
      if (!facts) {
        facts = plan;
        drawPlan();
      }
      drawLive(now);
    }
  } catch (error) {
    $("state").textContent = error instanceof TypeError ? "not reachable" : error.message;
    $("state").dataset.state = "unhealthy";
  }
  setTimeout(poll, 1000);
}
