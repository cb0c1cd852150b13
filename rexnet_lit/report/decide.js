// Decisions about images on the page: keep, relabel or remove each .item, by mouse or keyboard.
//
// They are a list of [path, action, label], the newest last, kept in the browser until they are saved as fixes.csv,
// which `fit --data.fixes` and `rexnet-lit fix` read. All names arrive escaped, in data-* attributes.
"use strict";
(() => {
  const bar = document.getElementById("decide");
  const chooser = document.getElementById("choose"), filter = chooser.querySelector("input");
  const list = chooser.querySelector("select"), classes = [...list.options].map((option) => option.value);
  const items = [...document.querySelectorAll(".item")];
  const button = (name) => bar.querySelector(`[data-do=${name}]`);
  const key = `rexnet_lit ${bar.dataset.key}`;

  let events = [];
  try {
    events = JSON.parse(localStorage.getItem(key)) ?? [];
  } catch {
    bar.querySelector(".unkept").hidden = false; // a browser that stores nothing for files
  }

  const decisions = () => {
    const found = new Map();
    for (const [path, action, label] of events) {
      found.delete(path);
      if (action) found.set(path, [action, label]);
    }
    return found;
  };

  // Showing

  const show = () => {
    const decided = decisions(), counts = { keep: 0, relabel: 0, remove: 0 };
    for (const [action] of decided.values()) counts[action]++;
    const all = new Set(items.map((item) => item.dataset.path)).size;
    bar.querySelector("output").textContent =
      `${decided.size} of ${all} decided: ${counts.keep} kept, ${counts.relabel} relabelled, ${counts.remove} removed`;
    bar.querySelector("progress").value = decided.size / all;
    button("save").disabled = button("clear").disabled = !decided.size;
    button("undo").disabled = !events.length;
    for (const item of items) {
      const [action, label] = decided.get(item.dataset.path) ?? ["", ""];
      item.dataset.action = action;
      for (const choice of item.querySelectorAll(".choices button")) {
        const suggests = choice.dataset.do === "suggested", same = label === item.dataset.suggested;
        const pressed = action === "relabel" ? (suggests ? same : choice.dataset.do === "relabel" && !same)
          : action === choice.dataset.do;
        choice.setAttribute("aria-pressed", pressed);
        if (choice.dataset.do === "relabel") choice.textContent = pressed ? `Relabel as ${label}` : "Relabel…";
      }
    }
  };

  const change = () => {
    try {
      localStorage.setItem(key, JSON.stringify(events));
    } catch {
      bar.querySelector(".unkept").hidden = false;
    }
    show();
  };

  const focus = (item) => {
    if (!item) return;
    item.focus({ preventScroll: true });
    item.scrollIntoView({ block: "center" });
  };

  const nextOpen = (item) => {
    const decided = decisions(), at = items.indexOf(item) + 1;
    return [...items.slice(at), ...items.slice(0, at)].find((other) => !decided.has(other.dataset.path));
  };

  // Deciding

  const decide = (item, action, label = "") => {
    if (action === "relabel" && label === item.dataset.label) [action, label] = ["keep", ""];
    const [before, labelBefore] = decisions().get(item.dataset.path) ?? ["", ""];
    const again = before === action && labelBefore === label; // pressed a second time: open again
    events.push([item.dataset.path, again ? "" : action, again ? "" : label]);
    change();
  };

  const choose = (item, then) => {
    const fill = () => {
      const wanted = filter.value.trim().toLowerCase();
      const found = classes.filter((name) => name.toLowerCase().includes(wanted));
      // A name that starts with what was typed comes first.
      found.sort((a, b) => b.toLowerCase().startsWith(wanted) - a.toLowerCase().startsWith(wanted));
      list.replaceChildren(...found.map((name) => new Option(name)));
      list.selectedIndex = found.length ? 0 : -1;
    };
    const take = () => {
      if (list.selectedIndex < 0) return;
      chooser.close();
      decide(item, "relabel", list.value);
      then();
    };
    filter.value = "";
    fill();
    filter.oninput = fill;
    filter.onkeydown = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      list.selectedIndex = Math.min(Math.max(list.selectedIndex + step, 0), list.length - 1);
    };
    list.onclick = take;
    list.onkeydown = (event) => { if (event.key === "Enter") take(); };
    chooser.querySelector("form").onsubmit = (event) => { event.preventDefault(); take(); };
    chooser.showModal();
    filter.focus();
  };

  const actions = {
    keep: (item, then) => { decide(item, "keep"); then(); },
    suggested: (item, then) => { if (item.dataset.suggested) { decide(item, "relabel", item.dataset.suggested); then(); } },
    relabel: choose,
    remove: (item, then) => { decide(item, "remove"); then(); },
  };

  const undo = () => {
    const last = events.pop();
    change();
    if (last) focus(items.find((item) => item.dataset.path === last[0]));
  };

  const save = () => {
    const of = new Map(items.map((item) => [item.dataset.path, item.dataset]));
    const cell = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const rows = [["path", "action", "label", "reason", "sha256"]];
    for (const [path, [action, label]] of decisions())
      rows.push([path, action, label, of.get(path).reason, of.get(path).sha256]);
    const link = document.createElement("a");
    const text = rows.map((row) => row.map(cell).join(",") + "\n").join("");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "fixes.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  const clear = () => {
    if (!confirm("Forget all decisions on this page?")) return;
    events = [];
    change();
  };

  // Building

  for (const item of items) {
    const { path, suggested } = item.dataset;
    const choices = document.createElement("div");
    choices.className = "choices";
    choices.setAttribute("role", "group");
    choices.setAttribute("aria-label", `Decision about ${path}`);
    const texts = { keep: "Keep", suggested: `Relabel as ${suggested}`, relabel: "Relabel…", remove: "Remove" };
    for (const [name, text] of Object.entries(texts)) {
      if (name === "suggested" && !suggested) continue;
      const choice = document.createElement("button");
      choice.type = "button";
      choice.dataset.do = name;
      choice.textContent = text;
      choice.onclick = () => actions[name](item, () => {});
      choices.append(choice);
    }
    item.tabIndex = 0;
    (item.querySelector(".here") ?? item).append(choices);
  }
  for (const hidden of [bar, ...document.querySelectorAll(".how")]) hidden.hidden = false;
  button("undo").onclick = undo;
  button("save").onclick = save;
  button("clear").onclick = clear;

  const keys = { k: "keep", s: "suggested", l: "relabel", r: "remove", Delete: "remove" };
  document.addEventListener("keydown", (event) => {
    const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const item = document.activeElement.closest(".item"), undoes = name === "z" && (event.ctrlKey || event.metaKey);
    if (chooser.open || (!undoes && (event.altKey || event.ctrlKey || event.metaKey))) return;
    if (undoes || (item && name === "u")) undo();
    else if (name === "ArrowRight") focus(item ? items[items.indexOf(item) + 1] : nextOpen());
    else if (name === "ArrowLeft") focus(items[items.indexOf(item) - 1]);
    else if (item && keys[name]) actions[keys[name]](item, () => focus(nextOpen(item)));
    else return;
    event.preventDefault();
  });
  show();
})();
