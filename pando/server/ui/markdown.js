// Markdown-lite as DOM nodes. Model text only ever becomes text nodes: nothing here parses HTML.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === 'class') node.className = value;
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https the clipboard interface is missing; the old way works from any origin.
    const area = el('textarea', { value: text });
    (button.closest('dialog') ?? document.body).append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = label; }, 1200);
}

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/;
const ROW = /^\s*\|.*\|\s*$/;

// Source text -> [{ kind, lines, ... }]. A block's source is kept, so that a stream redraws only the blocks that changed.
function blocks(text) {
  const out = [];
  let block = null;
  const close = () => { if (block) out.push(block); block = null; };
  const add = (kind, line, more = {}) => {
    if (block?.kind !== kind) { close(); block = { kind, lines: [], ...more }; }
    block.lines.push(line);
  };
  for (const line of text.split('\n')) {
    if (block?.kind === 'code') {
      if (line.trim().startsWith(block.mark)) close();
      else block.lines.push(line);
      continue;
    }
    const fence = FENCE.exec(line);
    if (fence) { close(); block = { kind: 'code', mark: fence[1], lang: fence[2], lines: [] }; continue; }
    if (!line.trim()) { close(); continue; }
    const heading = /^#{1,6}\s+(.*)/.exec(line);
    if (heading) { close(); add('heading', heading[1]); close(); continue; }
    const item = ITEM.exec(line);
    if (item) add(/\d/.test(item[2]) ? 'ordered' : 'bullets', item[3], { start: parseInt(item[2], 10) || 1 });
    else if (/^\s*>/.test(line)) add('quote', line.replace(/^\s*> ?/, ''));
    else if (ROW.test(line)) add('table', line);
    else if ((block?.kind === 'ordered' || block?.kind === 'bullets') && /^\s/.test(line)) block.lines[block.lines.length - 1] += `\n${line.trim()}`;
    else add('paragraph', line);
  }
  close();
  return out;
}

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|\*(?=[^\s*])([^*\n]*[^\s*])\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)|(https?:\/\/[^\s<>"')\]]+[^\s<>"')\].,;:!?])/;

// Inline marks -> array of nodes and strings.
function inline(text) {
  const out = [];
  for (let rest = text; rest;) {
    const found = INLINE.exec(rest);
    if (!found) { out.push(rest); break; }
    if (found.index) out.push(rest.slice(0, found.index));
    const [all, , code, bold, italic, label, href, bare] = found;
    if (code !== undefined) out.push(el('code', {}, code.trim() || code));
    else if (bold) out.push(el('strong', {}, ...inline(bold)));
    else if (italic) out.push(el('em', {}, ...inline(italic)));
    else out.push(el('a', { href: href ?? bare, target: '_blank', rel: 'noopener noreferrer' }, label ?? bare));
    rest = rest.slice(found.index + all.length);
  }
  return out;
}

// Lines with their breaks kept.
function broken(lines) {
  return lines.flatMap((line, index) => (index ? [el('br'), ...inline(line)] : inline(line)));
}

function cells(line) {
  return line.trim().slice(1, -1).split('|').map((cell) => cell.trim());
}

function draw(block) {
  const { kind, lines } = block;
  switch (kind) {
    case 'code': {
      const source = lines.join('\n');
      const button = el('button', { class: 'quiet', type: 'button', onclick: () => copy(source, button) }, 'Copy');
      return el('div', { class: 'code' }, el('header', {}, el('span', {}, block.lang || 'text'), button), el('pre', {}, el('code', {}, source)));
    }
    case 'heading': return el('h3', {}, ...inline(lines[0]));
    case 'quote': return el('blockquote', {}, ...broken(lines));
    case 'bullets': return el('ul', {}, ...lines.map((line) => el('li', {}, ...broken(line.split('\n')))));
    case 'ordered': return el('ol', { start: block.start }, ...lines.map((line) => el('li', {}, ...broken(line.split('\n')))));
    case 'table': {
      const rows = lines.filter((line) => !/^[\s|:-]+$/.test(line));
      return el('table', {}, ...rows.map((line, index) => el('tr', {}, ...cells(line).map((cell) => el(index ? 'td' : 'th', {}, ...inline(cell))))));
    }
    default: return el('p', {}, ...broken(lines));
  }
}

// Show `text` in `node`, touching only the blocks that are new or changed since the last call.
export function render(node, text) {
  const fresh = blocks(text);
  const keys = fresh.map((block) => JSON.stringify(block));
  const old = node.shown ?? [];
  let same = 0;
  while (same < keys.length && keys[same] === old[same]) same += 1;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...fresh.slice(same).map(draw));
  node.shown = keys;
}
