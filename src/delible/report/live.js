(function () {
  "use strict";
  var form = document.getElementById("ask");
  if (!form) { return; }
  var place = document.getElementById("answers"), share = form.elements.share;
  var told = form.elements.told, latest = 0;
  var named = { start: "Start", between: "In between", result: "Result" };
  function element(tag, text, kind) {
    var made = document.createElement(tag);
    made.textContent = text;
    if (kind) { made.className = kind; }
    return made;
  }
  function show(parts) {
    place.replaceChildren.apply(place, parts);
    place.setAttribute("aria-busy", "false");
  }
  function percent() { return share.value + "\u202f%"; }
  function answers(found) {
    var tiles = element("div", "", "tiles");
    Object.keys(named).forEach(function (name) {
      var tile = element("div", "", "tile"), one = found[name];
      tile.appendChild(element("h3", named[name] + (name === "between" ? ", " + percent() : "")));
      tile.appendChild(element("p", one.text || "(empty answer)", "answer"));
      if (one.probability !== null) {
        tile.appendChild(element("p", "probability of the expected answer " +
          one.probability.toFixed(3), "under"));
      }
      tiles.appendChild(tile);
    });
    var parts = [tiles];
    if (found.expected) { parts.unshift(element("p", "Expected: " + found.expected, "small")); }
    show(parts);
  }
  function ask() {
    if (!form.reportValidity()) { return; }
    var mine = ++latest;
    place.setAttribute("aria-busy", "true");
    if (!place.hasChildNodes()) { show([element("p", "Loading the models \u2026")]); }
    fetch("/answers", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        run: Number(form.elements.run.value),
        share: Number(share.value) / 100,
        question: form.elements.question.value
      })
    }).then(function (reply) {
      return reply.json().then(function (found) {
        if (mine !== latest) { return; }
        if (reply.ok) { answers(found); } else { show([element("p", found.error, "caution")]); }
      });
    }).catch(function () {
      if (mine === latest) { show([element("p", "The server does not answer any more.", "caution")]); }
    });
  }
  form.addEventListener("submit", function (event) { event.preventDefault(); ask(); });
  share.addEventListener("input", function () { told.textContent = percent(); });
  share.addEventListener("change", function () { if (place.hasChildNodes()) { ask(); } });
})();
