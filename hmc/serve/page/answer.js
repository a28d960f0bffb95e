// One answer: what is asked of the server, and its stream of events.

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens"];

function settingsNow() {
  const found = { thinking: $("thinking").value };
  for (const name of NUMBERS) found[name] = $(name).value;
  return found;
}

function bodyOf(conversation) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const thinking = $("thinking").value;
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  const system = conversation.system.trim();
  body.messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content, reasoning_content } of conversation.messages) {
    body.messages.push(reasoning_content ? { role, content, reasoning_content } : { role, content });
  }
  return body;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) {
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Fill `message` as the answer comes, `changed` after every event. Returns {begun, first, usage,
// reason, error}: `error` in words where it was refused or broke off, "" else.
async function answerTo(body, message, signal, changed) {
  const told = { begun: performance.now(), first: 0, thought: 0, usage: null, reason: null, error: "" };
  try {
    const answer = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!answer.ok) throw new Error(await faultOf(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      told.usage = event.usage || told.usage;
      for (const { delta, finish_reason } of event.choices) {
        told.first = told.first || performance.now();
        if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content || "") + delta.reasoning_content;
        if (delta.content && !message.content) told.thought = performance.now();
        message.content += delta.content || "";
        told.reason = finish_reason || told.reason;
      }
      changed();
    }
    if (!told.reason) throw new Error("the connection was cut");
  } catch (error) {
    if (signal.aborted) told.reason = "stopped";
    else told.error = error instanceof TypeError ? "the server is not reachable" : error.message;
  }
  return told;
}

function noteOf({ begun, first, usage, reason, error }) {
  const tokens = usage ? usage.completion_tokens : 0, after = (performance.now() - first) / 1000;
  const parts = [`first token ${seconds((first - begun) / 1000)}`];
  if (tokens) parts.push(`${tokens} tokens`);
  if (tokens > 1 && after > 0) parts.push(`${((tokens - 1) / after).toFixed(1)} tok/s`);
  parts.push(error || reason);
  return parts.join(", ");
}
