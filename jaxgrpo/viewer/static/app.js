// What the pages do beyond links and forms. Without it everything can still be read.
import { keys } from "./keys.js";
import { charts } from "./charts.js";
import { tokens } from "./tokens.js";

/** Forms whose choices take effect at once; typed fields wait for Enter. Empty fields stay out of the address. */
function forms() {
  for (const form of document.querySelectorAll("form[data-auto], .find")) {
    form.addEventListener("submit", () => {
      for (const field of form.elements) if (field.name && !field.value) field.disabled = true;
    });
    if (form.matches("[data-auto]")) {
      form.addEventListener("change", (event) => {
        if (event.target.matches("select")) form.requestSubmit();
      });
    }
  }
  addEventListener("pageshow", () => {
    for (const field of document.querySelectorAll("form :disabled")) field.disabled = false;
  });
}

function copying() {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const text = document.getElementById(button.dataset.copy).textContent;
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "The browser does not allow it";
    }
    setTimeout(() => (button.textContent = said), 1500);
  });
}

/** While the server reads new files, say so; when a run has grown, show the page's live part anew. */
function live() {
  const place = document.querySelector("[data-progress]");
  if (!place) return;
  let seen = null;
  const look = async () => {
    try {
      const state = await (await fetch("/state")).json();
      place.hidden = !state.reading && !state.fault;
      if (state.fault) place.textContent = state.fault;
      if (state.reading) place.textContent = `Reading: ${state.done} of ${state.total} files of ${state.reading}`;
      if (seen !== null && seen !== state.version) await renew();
      seen = state.version;
    } catch {
      place.hidden = false;
      place.textContent = "The viewer does not answer; it may have been stopped.";
    }
    setTimeout(look, document.hidden ? 10000 : 2500);
  };
  look();
}

async function renew() {
  const here = document.querySelector("[data-live]");
  if (!here || here.contains(document.activeElement)) return;
  const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
  const there = page.querySelector("[data-live]");
  if (!there) return;
  here.replaceWith(there);
  forms();
  charts();
}

/** Go to the first word that was searched for. */
function show() {
  if (!new URLSearchParams(location.search).get("q")) return;
  const mark = document.querySelector(".turn mark");
  for (let fold = mark?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  mark?.scrollIntoView({ block: "center" });
}

forms();
show();
copying();
keys();
charts();
tokens();
live();
