// The colour scheme: the system's by default, or the user's choice, stored in this browser.
// Loaded before the page is rendered, so that it does not flash in the wrong colours.
"use strict";
{
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const read = () => { try { return localStorage.getItem("bessemer.theme"); } catch { return null; } };
  const shown = () => read() ?? (dark.matches ? "dark" : "light");
  const apply = () => {
    root.dataset.theme = shown();
    const button = document.getElementById("theme");
    if (button) {
      button.hidden = false;
      const word = document.createElement("span");
      word.className = "word";
      word.textContent = shown() === "dark" ? " Light" : " Dark";
      button.replaceChildren(shown() === "dark" ? "☀" : "☾", word);
      button.setAttribute("aria-label", shown() === "dark" ? "Use light colours" : "Use dark colours");
    }
  };
  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      try { localStorage.setItem("bessemer.theme", shown() === "dark" ? "light" : "dark"); } catch { /* storage is disabled */ }
      apply();
    });
  });
}
