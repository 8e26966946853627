"use strict";
// Takes the page's changes from /events, and counts deadlines down. Without this file the page reloads itself.

const AGAIN_MS = 30000; // after the server turned a stream away
const main = document.getElementById("parts");
const said = document.getElementById("said");
const link = document.getElementById("link");
let skew = Number(document.body.dataset.now) * 1000 - Date.now(); // the server's clock and this one

function left(seconds) {
  if (seconds <= 0) return "now due";
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([unit]) => seconds >= unit);
  const [unit, name] = parts[Math.max(first, 0)];
  const more = parts[first + 1];
  const rest = more ? ` ${Math.floor((seconds % unit) / more[0])} ${more[1]}` : "";
  return `in ${Math.floor(seconds / unit)} ${name}${rest}`;
}

function count() {
  for (const at of document.querySelectorAll("time[data-until]")) {
    const seconds = Math.round((Date.parse(at.dateTime) - Date.now() - skew) / 1000);
    at.textContent = `${at.dateTime.slice(11, 19)} UTC, ${left(seconds)}`;
  }
}

// A section is replaced as a whole: what was open in it stays open, and the keyboard stays where it was.
function put(section, html) {
  const open = [...section.querySelectorAll("details[open]")].map((found) => found.id);
  const focus = section.contains(document.activeElement) ? document.activeElement.id : "";
  section.innerHTML = html;
  for (const found of section.querySelectorAll("details")) {
    if (open.includes(found.id)) found.open = true;
  }
  if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
}

function show(told) {
  skew = told.now * 1000 - Date.now();
  if (said.textContent !== told.said) said.textContent = told.said;
  const there = new Map([...main.children].map((section) => [section.dataset.part, section]));
  told.order.forEach((key, place) => {
    let section = there.get(key);
    there.delete(key);
    if (!section) {
      section = document.createElement("section");
      section.id = `part-${key}`;
      section.dataset.part = key;
    }
    if (main.children[place] !== section) main.insertBefore(section, main.children[place] || null);
    if (key in told.parts) put(section, told.parts[key]);
  });
  for (const gone of there.values()) gone.remove();
  count();
}

function state(words, lost) {
  link.textContent = words;
  link.classList.toggle("lost", lost);
}

function listen() {
  const events = new EventSource("/events");
  events.addEventListener("open", () => state("live", false));
  events.addEventListener("page", (event) => show(JSON.parse(event.data)));
  events.addEventListener("error", () => {
    state("connection lost, trying again", true);
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MS);
  });
  addEventListener("pagehide", () => events.close(), { once: true });
}

listen();
setInterval(count, 1000);
count();
