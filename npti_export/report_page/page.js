"use strict";
(() => {
  const section = document.getElementById("answers");
  const pager = section && section.querySelector(".pager");
  if (!pager) return;
  const questions = [...section.querySelectorAll(".question")];
  const find = (name) => document.getElementById(name);
  const [facet, left, right, place] = ["facet", "left", "right", "place"].map(find);
  let shown = questions;
  let at = 0;

  function draw() {
    for (const one of questions) one.classList.remove("current");
    const current = shown[at];
    current.classList.add("current");
    current.open = true;
    for (const reply of current.querySelectorAll(".reply")) {
      const way = reply.dataset.way;
      reply.classList.toggle("is-left", way === left.value);
      reply.classList.toggle("is-right", way === right.value && way !== left.value);
    }
    place.textContent = `${at + 1} of ${shown.length}`;
  }
  function turn(by) {
    at = (at + by + shown.length) % shown.length;
    draw();
  }
  function filter() {
    shown = questions.filter((one) => facet.value === "" || one.dataset.facet === facet.value);
    at = 0;
    draw();
  }

  document.documentElement.classList.add("js");
  for (const one of section.querySelectorAll("[hidden]")) one.hidden = false;
  for (const summary of section.querySelectorAll(".question > summary")) {
    summary.tabIndex = -1;
    summary.addEventListener("click", (event) => event.preventDefault());
  }
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  facet.addEventListener("change", filter);
  left.addEventListener("change", draw);
  right.addEventListener("change", draw);
  document.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // Arrows choose in a list and scroll a table: leave them to what has the focus there.
    if (event.target.closest && event.target.closest("select, input, textarea, .scroll")) return;
    event.preventDefault();
    turn(step);
  });
  filter();
})();
