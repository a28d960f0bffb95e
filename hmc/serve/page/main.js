// What listens to what, and the beginning.

function submit(event) {
  event.preventDefault();
  const text = $("input").value.trim();
  if (!text || answering || !serving) return;
  $("input").value = "";
  say(text);
}

function restoreSettings() {
  const kept = readEntry(SETTINGS) || {};
  for (const name of [...NUMBERS, "thinking"]) if (typeof kept[name] === "string") $(name).value = kept[name];
  const query = new URLSearchParams(location.search);
  if (query.has("temperature")) $("temperature").value = query.get("temperature");
}

function begin() {
  $("form").addEventListener("submit", submit);
  $("input").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  $("stop").addEventListener("click", () => answering?.abort.abort());
  $("new").addEventListener("click", () => show(newConversation()));
  $("settings").addEventListener("change", () => keepEntry(SETTINGS, settingsNow()));
  $("system").addEventListener("change", () => { shown.system = $("system").value; });
  $("models").addEventListener("change", () => {
    chooseModel($("models").value);
    $("models").blur();
  });
  for (const name of ["past", "live"]) $("show-" + name).addEventListener("click", () => {
    const open = !$(name).classList.contains("open");
    closePanels();
    $(name).classList.toggle("open", open);
    $("show-" + name).setAttribute("aria-expanded", String(open));
  });
  window.addEventListener("storage", drawPast);
  restoreSettings();
  drawConversation();
  drawPast();
  const asked = new URLSearchParams(location.search).get("ask");
  poll().then(() => { if (asked && facts) say(asked); });
}
begin();
