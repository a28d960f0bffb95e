// Conversations in the browser's localStorage, one entry each, so that two tabs do not overwrite
// each other's: {id, title, system, changed, messages: [{role, content, reasoning_content, note}]}.

const PREFIX = "hmc.chat.", SETTINGS = "hmc.settings";

function newConversation() {
  const random = [...crypto.getRandomValues(new Uint8Array(8))];
  return { id: random.map(byte => byte.toString(16).padStart(2, "0")).join(""), title: "", system: "", changed: 0, messages: [] };
}

function readEntry(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // not ours, or storage is refused
  }
}

// All of them, the latest first.
function conversations() {
  let keys = [];
  try {
    keys = Object.keys(localStorage).filter(key => key.startsWith(PREFIX));
  } catch {
    return [];
  }
  const found = keys.map(readEntry).filter(each => each && typeof each.id === "string" && Array.isArray(each.messages));
  return found.sort((one, other) => other.changed - one.changed);
}

// "" or why it cannot be kept.
function keepEntry(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return "";
  } catch (error) {
    return `not kept in this browser: ${error.message}`;
  }
}

function keepConversation(conversation) {
  const first = conversation.messages.find(message => message.role === "user");
  if (!first) return "";
  conversation.title = conversation.title || first.content.trim().slice(0, 60);
  conversation.changed = Date.now();
  return keepEntry(PREFIX + conversation.id, conversation);
}

function dropConversation(id) {
  localStorage.removeItem(PREFIX + id);
}
