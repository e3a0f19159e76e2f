// Keeps the page up to date. Everything that it shows is there without it.
'use strict';

const live = document.getElementById('live');
// Sections that changed while somebody was copying from them.
const waiting = new Map();

function say(text, mood) {
  if (live.textContent !== text) {
    live.textContent = text;
    live.className = mood;
  }
}

function isSelecting(section) {
  const selection = document.getSelection();
  return selection !== null && !selection.isCollapsed && selection.containsNode(section, true);
}

// Who tabs through the page, or has scrolled a table, stays where they are.
function replace(section, html) {
  const focused = section.contains(document.activeElement) ? document.activeElement.getAttribute('href') : null;
  const scrolled = [...section.querySelectorAll('.scroll')].map((part) => part.scrollLeft);
  section.innerHTML = html;
  section.querySelectorAll('.scroll').forEach((part, index) => { part.scrollLeft = scrolled[index] ?? 0; });
  if (focused !== null) {
    [...section.querySelectorAll('a')].find((link) => link.getAttribute('href') === focused)?.focus();
  }
}

const source = new EventSource(document.body.dataset.live);
source.addEventListener('page', (event) => {
  const parts = JSON.parse(event.data);
  document.title = parts.title;
  delete parts.title;
  for (const [id, html] of Object.entries(parts)) {
    waiting.set(id, html);
  }
  for (const [id, html] of waiting) {
    const section = document.getElementById(id);
    if (section === null || isSelecting(section)) continue;
    replace(section, html);
    waiting.delete(id);
  }
  say('live', 'good');
});
source.addEventListener('error', () => say('connection lost: what you see is old', 'bad'));
