// Follows the run: asks the server twice a second for the record's version, and where it is another one puts the new parts
// into the open page. What the reader chose stays, and so does the place that is looked at.

function followRun(version) {
  const note = document.body.appendChild(Object.assign(document.createElement("p"), { id: "live" }));
  const ASK_EVERY_MS = 500, answerOf = async name => (await fetch(name, { cache: "no-store" })).json();
  let shown = version, isHeld = false;  // a reader who holds the pointer is not interrupted

  async function ask() {
    try {
      const newest = await answerOf("newest");
      if (newest.version !== shown && !isHeld && !document.hidden) {
        const parts = await answerOf("parts"), top = scrollY;
        if (!isHeld) {
          refreshPage(parts);
          scrollTo(scrollX, top);
          document.title = parts.title;
          shown = parts.version;
        }
      }
      say(`Live: ${newest.progress}`, true);
    } catch (error) {
      console.debug(error);
      say("The server has stopped: this is the run as it was then.", false);
    }
    setTimeout(ask, ASK_EVERY_MS);
  }

  function say(text, isLive) {
    if (note.textContent !== text) note.textContent = text;
    note.classList.toggle("stopped", !isLive);
    document.body.dataset.version = shown;
  }

  addEventListener("pointerdown", () => { isHeld = true; });
  for (const kind of ["pointerup", "pointercancel"]) addEventListener(kind, () => { isHeld = false; });
  ask();
}
