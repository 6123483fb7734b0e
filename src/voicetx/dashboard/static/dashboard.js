"use strict";
// Keeps a deployment's page up to date, and says when it is not. Everything works without this; then one reloads.

const QUIET_MS = 15_000; // three beats; a connection that broke without a word
const SPEAK_MS = 30_000; // numbers change every second: nobody wants to hear all of them

/** Make one element's content that of another, keeping what is the same: focus, open details, running transitions. */
function morph(old, fresh) {
  const olds = [...old.childNodes];
  const news = [...fresh.childNodes];
  news.forEach((child, place) => {
    const present = olds[place];
    if (present === undefined) old.append(child);
    else if (present.nodeName !== child.nodeName) present.replaceWith(child);
    else if (child.nodeType === Node.TEXT_NODE) {
      if (present.data !== child.data) {
        present.data = child.data;
        mark(old);
      }
    } else if (child.nodeType === Node.ELEMENT_NODE) {
      for (const { name, value } of child.attributes) {
        if (present.getAttribute(name) !== value) present.setAttribute(name, value);
      }
      for (const { name } of [...present.attributes]) {
        if (!child.hasAttribute(name) && name !== "open") present.removeAttribute(name);
      }
      morph(present, child);
    }
  });
  olds.slice(news.length).forEach((child) => child.remove());
}

function mark(element) {
  if (!element.matches("dd, td.n, .big, .count")) return;
  element.classList.remove("changed");
  void element.offsetWidth; // so that the animation starts anew
  element.classList.add("changed");
}

function follow(badge) {
  const state = badge.querySelector("[data-state]");
  const summary = document.querySelector("[data-summary]");
  let source = null;
  let pauseMs = 1_000;
  let retry = 0;
  let heardAt = 0;
  let spokeAt = Date.now();
  let isOver = false;

  function say(kind, text) {
    badge.dataset.kind = kind;
    if (state.textContent !== text) state.textContent = text; // said once, not with every beat
  }

  function hear() {
    heardAt = Date.now();
    pauseMs = 1_000;
    say("live", "Live");
  }

  function close() {
    clearTimeout(retry);
    if (source) source.close();
    source = null;
  }

  function reopen() {
    close();
    say("broken", "Not live: connecting again");
    retry = setTimeout(open, pauseMs);
    pauseMs = Math.min(pauseMs * 2, 30_000);
  }

  function end(text) {
    isOver = true;
    close();
    say("ended", text);
  }

  function open() {
    close();
    heardAt = Date.now();
    source = new EventSource(badge.dataset.live);
    source.addEventListener("parts", (event) => {
      const parts = JSON.parse(event.data);
      for (const [name, html] of Object.entries(parts)) {
        const place = document.getElementById(`part-${name}`);
        if (!place) continue;
        const template = document.createElement("template");
        template.innerHTML = html;
        morph(place, template.content);
      }
      if (parts.summary && Date.now() - spokeAt > SPEAK_MS) {
        spokeAt = Date.now();
        summary.textContent = parts.summary;
      }
      hear();
    });
    source.addEventListener("beat", (event) => {
      document.querySelector("#part-clock time").textContent = JSON.parse(event.data);
      hear();
    });
    source.addEventListener("away", () => {
      heardAt = Date.now();
      say("broken", "Not live: the database is away");
    });
    source.addEventListener("end", (event) => {
      end(JSON.parse(event.data) === "gone" ? "This deployment was purged" : "Your session has ended: load the page again");
    });
    source.addEventListener("error", () => {
      if (source.readyState === EventSource.CLOSED) reopen();
      else say("broken", "Not live: connecting again");
    });
  }

  function look() {
    if (document.hidden) close();
    else if (!source && !isOver) open();
  }

  // A browser has few connections to a service: pages that nobody sees let go of theirs.
  document.addEventListener("visibilitychange", look);
  setInterval(() => {
    if (source && Date.now() - heardAt > QUIET_MS) reopen();
  }, 5_000);
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", look);
  say("waiting", "Connecting");
  look();
}

// A page that takes its time to come is announced by a line at the top.
for (const name of ["click", "submit"]) {
  document.addEventListener(name, (event) => {
    const link = name === "click" ? event.target.closest("a[href^='/']") : event.target;
    if (link && !event.defaultPrevented && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      document.documentElement.classList.add("leaving");
    }
  });
}
window.addEventListener("pageshow", () => document.documentElement.classList.remove("leaving"));

const badge = document.querySelector("[data-live]");
if (badge) follow(badge);
