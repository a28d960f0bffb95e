// The conversation that is shown: its turns, and what a person does with them.

let shown = newConversation();
let answering = null; // {conversation, abort} of the one answer under way

function drawButtons() {
  $("send").disabled = !serving || answering !== null;
  $("stop").hidden = answering === null;
  for (const each of document.querySelectorAll("#log .note button.act")) each.disabled = answering !== null;
}

function drawContext(usage) {
  const most = facts ? ` of ${facts.max_context.toLocaleString("en")}` : "";
  $("used-context").textContent = usage ? `context: ${usage.total_tokens.toLocaleString("en")}${most} tokens` : "";
}

// Whoever reads further up stays there.
function following(draw) {
  const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  draw();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function drawConversation() {
  const empty = "Ask something. Conversations stay in this browser.";
  const turns = shown.messages.map(drawTurn);
  $("log").replaceChildren(...(turns.length ? turns : [make("p", { class: "empty" }, empty)]));
  $("log").scrollTop = $("log").scrollHeight;
  $("system").value = shown.system;
  drawContext(shown.usage);
  drawButtons();
}

function drawTurn(message) {
  const turn = make("div", { class: "turn " + message.role });
  turn.redraw = () => message.role === "user" ? drawAsked(turn, message) : drawAnswer(turn, message);
  turn.redraw();
  return turn;
}

function drawAsked(turn, message) {
  const edit = button("Edit", () => editTurn(turn, message), { class: "act" });
  turn.replaceChildren(make("div", { class: "said" }, message.content), make("div", { class: "note" }, copyButton(() => message.content), edit));
}

function drawAnswer(turn, message) {
  if (!turn.firstChild) {
    turn.thought = make("div");
    turn.details = make("details", { class: "thought", hidden: "" }, make("summary"), turn.thought);
    turn.said = make("div", { class: "said md" });
    turn.note = make("div", { class: "note" });
    turn.append(turn.details, turn.said, turn.note);
  }
  turn.details.hidden = !message.reasoning_content;
  turn.details.firstChild.textContent = message.content || message.note ? "Thought" : "Thinking …";
  turn.thought.textContent = message.reasoning_content || "";
  drawMarkdown(turn.said, message.content);
  if (!message.note) return;
  turn.note.replaceChildren(message.note, copyButton(() => message.content));
  const last = shown.messages[shown.messages.length - 1] === message;
  if (last) turn.note.append(button("Regenerate", () => again(shown.messages.length - 1), { class: "act" }));
}

function editTurn(turn, message) {
  const box = make("textarea", { rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Edit" }, message.content);
  const send = button("Send", () => {
    if (box.value.trim()) attempt(box.value.trim(), shown.messages.indexOf(message));
  }, { class: "act" });
  turn.replaceChildren(box, make("div", { class: "note" }, send, button("Cancel", () => drawAsked(turn, message))));
  box.focus();
}

const say = text => attempt(text, shown.messages.length);
const again = at => attempt(null, at);

// Say `text` in place of all messages from `at` on, or (null) answer once more what comes before.
function attempt(text, at) {
  if (answering || !serving) return;
  const old = shown.messages.splice(at);
  shown.system = $("system").value;
  if (text !== null) shown.messages.push({ role: "user", content: text });
  answer(shown, text, at, old);
}

async function answer(conversation, text, at, old) {
  const message = { role: "assistant", content: "" }, body = bodyOf(conversation);
  const here = () => conversation === shown;
  conversation.messages.push(message);
  drawConversation();
  const turn = $("log").lastChild, abort = new AbortController();
  answering = { conversation, abort };
  drawButtons();
  let waiting = false;
  const told = await answerTo(body, message, abort.signal, () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (here() && !message.note) following(turn.redraw);
    });
  });
  answering = null;
  if (!told.first) takeBack(conversation, text, at, old, told.error || "stopped before the first token");
  else {
    message.note = noteOf(told);
    if (told.usage) conversation.usage = told.usage;
    const failed = keepConversation(conversation);
    if (here()) {
      following(turn.redraw);
      drawContext(conversation.usage);
      if (failed) drawError(failed);
    }
  }
  drawButtons();
  drawPast();
}

// Nothing came: all is as before, and the text back in the box.
function takeBack(conversation, text, at, old, why) {
  conversation.messages.splice(at, Infinity, ...old);
  if (conversation !== shown) {
    conversation.draft = text || "";
    keepConversation(conversation);
    return;
  }
  drawConversation();
  if (text !== null) offer(text);
  drawError(why, () => {
    if (answering || !serving) return;
    if ($("input").value.trim() === text) $("input").value = "";
    attempt(text, at);
  });
}

// Put a text into the box, unless something stands there.
function offer(text) {
  if (text && !$("input").value.trim()) $("input").value = text;
}

function drawError(text, retry) {
  const turn = make("div", { class: "turn error", role: "alert" }, text);
  if (retry) turn.append(make("div", { class: "note" }, button("Retry", retry, { class: "act" })));
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
}

function show(conversation) {
  closePanels();
  if (conversation.id === shown.id) return;
  answering?.abort.abort();
  shown = conversation;
  offer(shown.draft);
  delete shown.draft;
  drawConversation();
  drawPast();
}

function drawPast() {
  const all = conversations();
  $("list").replaceChildren(...all.map(each => {
    const open = button(each.title, () => show(each), { class: "open", title: each.title });
    const item = make("li", each.id === shown.id ? { "aria-current": "true" } : {}, open);
    item.append(button("✎", () => renameIn(item, each), { class: "small", title: "Rename", "aria-label": "Rename" }));
    item.append(button("✕", () => forget(each), { class: "small", title: "Delete", "aria-label": "Delete" }));
    return item;
  }));
}

function renameIn(item, conversation) {
  const box = make("input", { value: conversation.title, "aria-label": "Title" });
  const done = () => {
    const held = conversation.id === shown.id ? shown : conversation;
    held.title = box.value.trim() || conversation.title;
    keepEntry(PREFIX + held.id, held);
    drawPast();
  };
  box.addEventListener("change", done);
  box.addEventListener("blur", drawPast);
  item.replaceChildren(box);
  box.select();
}

function forget(conversation) {
  dropConversation(conversation.id);
  if (conversation.id === shown.id) show(newConversation());
  else drawPast();
}

function closePanels() {
  for (const name of ["past", "live"]) {
    $(name).classList.remove("open");
    $("show-" + name).setAttribute("aria-expanded", "false");
  }
}
