// The first page: one conversation with the served model, and what the prefix cache did for each turn.

import { ApiError, chat, curl, get, promptTokens } from '/ui/api.js';
import { copy, el, render } from '/ui/markdown.js';
import { EXAMPLES } from '/ui/examples.js';

const $ = (id) => document.getElementById(id);
const SHOWN_TOKENS = 3000; // more spans than this make a page slow, and nobody reads them

const state = { model: '', maxLen: 0, temperature: 1, messages: [], controller: null, key: sessionStorage.getItem('key') ?? '' };
// A temperature of null is the model's own, which the server knows.
const settings = { system: '', temperature: null, maxTokens: 512, ...JSON.parse(localStorage.getItem('settings') ?? '{}') };

// ---- start-up ------------------------------------------------------------------------------------------------------

function banner(text, bad = false, ...more) {
  $('banner').replaceChildren(text, ...more);
  $('banner').classList.toggle('bad', bad);
  $('banner').hidden = !text;
}

async function connect() {
  try {
    const { data } = await get('/v1/models', state.key);
    state.model = data[0].id;
    state.maxLen = data[0].max_model_len ?? 0;
    banner('');
    showModel();
    get('/server_info', state.key).then(showFacts, () => {});
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askKey();
    else {
      banner(error instanceof ApiError ? `The server is not ready: ${error.message}` : 'The server does not answer; trying again …', true);
      setTimeout(connect, 1500);
    }
  }
  ready();
}

function askKey() {
  const button = el('button', { class: 'quiet', type: 'button', onclick: () => openSettings('key') }, 'Enter it');
  banner(state.key ? 'The server does not accept this API key. ' : 'This server wants an API key. ', true, button);
}

function showModel() {
  const context = state.maxLen ? ` · ${Math.floor(state.maxLen / 1024)}K context` : '';
  $('model').textContent = state.model + context;
  $('model').title = 'Model and longest conversation';
  $('model').hidden = false;
  document.title = `${state.model} · Pando`;
  if (state.model === 'aspen') {
    $('hello').textContent = 'Say hello to aspen';
    $('intro').textContent = 'A small model that comes with Pando and runs on this machine. What the server has already seen of your prompt is not computed again; each answer shows how much that was.';
  }
}

function showFacts(info) {
  state.temperature = info.generation_defaults?.temperature ?? 1;
  const facts = [
    ['Model', info.model_path ?? state.model], ['Device', info.device], ['Weights', info.dtype],
    ['Cache holds', info.max_total_num_tokens && `${info.max_total_num_tokens.toLocaleString('en')} tokens`],
    ['Version', info.version],
  ].filter(([, value]) => value);
  $('facts').replaceChildren(...facts.flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, String(value))]));
}

// ---- a turn --------------------------------------------------------------------------------------------------------

function requestBody(messages) {
  const system = settings.system.trim();
  return {
    model: state.model,
    messages: system ? [{ role: 'system', content: system }, ...messages] : messages,
    ...(settings.temperature === null ? {} : { temperature: settings.temperature }),
    max_tokens: settings.maxTokens,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function atEnd() {
  return $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 60;
}

function toEnd() {
  $('scroll').scrollTop = $('scroll').scrollHeight;
}

function send(text) {
  state.messages.push({ role: 'user', content: text });
  $('messages').append(el('div', { class: 'message user' }, text));
  answer();
}

// One answer to the conversation as it stands.
async function answer() {
  const body = requestBody([...state.messages]);
  const view = new AnswerView(body);
  $('messages').querySelectorAll('.retry').forEach((button) => button.remove());
  $('messages').append(view.node);
  closeStrips(view);
  const { messages } = state;
  const controller = new AbortController();
  state.controller = controller;
  ready();
  toEnd();
  const turn = { start: performance.now(), first: 0, last: 0, pieces: 0, text: '', thinking: '', usage: null, finish: '' };
  try {
    for await (const event of chat(body, state.key, controller.signal)) {
      if (event.usage) turn.usage = event.usage;
      const choice = event.choices?.[0];
      turn.finish = choice?.finish_reason ?? turn.finish;
      const { content, reasoning_content: thinking } = choice?.delta ?? {};
      if (!content && !thinking) continue;
      turn.last = performance.now();
      turn.first ||= turn.last;
      turn.pieces += 1;
      turn.text += content ?? '';
      turn.thinking += thinking ?? '';
      view.update(turn);
    }
  } catch (error) {
    if (error.name === 'AbortError') turn.finish = 'stopped';
    else turn.error = error;
  }
  if (state.messages !== messages) return; // a new chat was begun meanwhile
  state.controller = null;
  if (turn.error) forget(turn.error);
  else messages.push({ role: 'assistant', content: turn.text });
  view.finish(turn);
  ready();
  if (turn.usage) await view.showPrompt(turn.usage);
}

// The question stays on the page, but a turn that failed is no part of the conversation.
function forget(error) {
  const { content } = state.messages.pop();
  if (!$('input').value) { $('input').value = content; grow(); }
  if (error instanceof ApiError && error.status === 401) askKey();
}

// What is on the page for one answer.
class AnswerView {
  constructor(body) {
    this.body = body;
    this.thinking = el('div', { class: 'thinking', hidden: true });
    this.text = el('div', { class: 'text' });
    this.figures = el('div', { class: 'figures' });
    this.prompt = el('div');
    this.node = el('article', { class: 'message answer writing' }, this.thinking, this.text, el('div', { class: 'under' }, this.figures, this.prompt));
    this.frame = 0;
  }

  // Draw at most once per frame, however many tokens come.
  update(turn) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw(turn);
    });
  }

  draw(turn) {
    const follow = atEnd();
    this.thinking.textContent = turn.thinking;
    this.thinking.hidden = !turn.thinking;
    render(this.text, turn.text);
    this.figures.replaceChildren(...this.numbers(turn));
    if (follow) toEnd();
  }

  numbers(turn) {
    const count = turn.usage?.completion_tokens ?? turn.pieces;
    const spread = turn.last - turn.first;
    const whole = turn.last - turn.start;
    const shown = [];
    // The first token belongs to the wait; the speed is that of the tokens after it. Tokens that reached a busy page in
    // one bunch say nothing about it: then the whole turn counts.
    const rate = 1000 * (spread > whole / 4 ? (count - 1) / spread : count / whole);
    if (count > 1 && whole > 0) shown.push(el('span', {}, el('b', {}, Math.round(rate)), ' tok/s'));
    if (turn.first) shown.push(el('span', {}, el('b', {}, Math.round(turn.first - turn.start)), ' ms to first token'));
    if (count) shown.push(el('span', {}, el('b', {}, count), count === 1 ? ' token' : ' tokens'));
    const why = { length: 'cut at the length limit', stopped: 'stopped' }[turn.finish];
    if (why) shown.push(el('span', {}, why));
    return shown;
  }

  finish(turn) {
    cancelAnimationFrame(this.frame);
    this.draw(turn);
    this.node.classList.remove('writing');
    if (turn.error) this.text.after(el('p', { class: 'failed', role: 'alert' }, turn.error.message));
    const button = (label, title, run) => el('button', { class: 'quiet', type: 'button', title, onclick: run }, label);
    const again = button('Try again', 'Ask the same once more', () => retry(this.node));
    again.classList.add('retry');
    const asCurl = button('Copy as curl', 'This request as a shell command', () => copy(curl(this.body, Boolean(state.key)), asCurl));
    this.figures.append(el('span', { class: 'act' }, ...(turn.error ? [] : [again]), asCurl));
  }

  // The strip: the prompt's tokens, the part that came from the cache shaded.
  async showPrompt(usage) {
    const total = usage.prompt_tokens;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const fill = el('i');
    const label = el('span', {}, el('b', {}, cached.toLocaleString('en')), ` of ${total.toLocaleString('en')} prompt tokens came from the cache`);
    this.strip = el('button', { class: 'strip', type: 'button', title: 'Show the prompt, token by token', onclick: () => this.toggle() }, el('div', { class: 'bar' }, fill));
    this.tokens = el('div', { class: 'tokens', hidden: true, tabIndex: 0 });
    this.legend = el('div', { class: 'legend', hidden: true }, el('span', {}, el('i', { class: 'cached' }), 'from the cache'), el('span', {}, el('i'), 'computed'));
    const follow = atEnd();
    this.prompt.replaceChildren(this.strip, el('div', { class: 'caption' }, label, this.legend), this.tokens);
    requestAnimationFrame(() => { fill.style.width = `${(100 * cached) / Math.max(1, total)}%`; });
    const tokens = await promptTokens(this.body.model, this.body.messages, state.key);
    if (tokens?.length === total) {
      this.fillTokens(tokens, cached);
      if (this.node === $('messages').lastElementChild) this.toggle();
    } else this.strip.disabled = true;
    if (follow) toEnd();
  }

  // A long prompt is cut around the border between old and new, which is what one wants to see.
  fillTokens(tokens, cached) {
    const from = Math.max(0, Math.min(cached - SHOWN_TOKENS / 2, tokens.length - SHOWN_TOKENS));
    const span = ({ text, id }, index) => {
      const kind = `token${from + index < cached ? ' cached' : ''}${/^<\|.*\|>$/.test(text) ? ' special' : ''}`;
      return el('span', { class: kind, title: `${from + index}: id ${id}` }, text.replaceAll('\n', '↵\n'));
    };
    this.tokens.replaceChildren(...tokens.slice(from, from + SHOWN_TOKENS).map(span));
    if (from) this.tokens.prepend(`… ${from.toLocaleString('en')} tokens before … `);
    if (from + SHOWN_TOKENS < tokens.length) this.tokens.append(` … ${(tokens.length - from - SHOWN_TOKENS).toLocaleString('en')} more`);
  }

  toggle() {
    const follow = atEnd();
    this.tokens.hidden = !this.tokens.hidden;
    this.legend.hidden = this.tokens.hidden;
    const border = this.tokens.querySelector('.token:not(.cached)');
    if (!this.tokens.hidden && border) this.tokens.scrollTop = border.offsetTop - this.tokens.offsetTop - 44;
    if (follow) toEnd();
  }
}

// Only the newest answer shows its tokens.
function closeStrips(newest) {
  document.querySelectorAll('.tokens, .legend').forEach((node) => { if (!newest.node.contains(node)) node.hidden = true; });
}

function retry(node) {
  if (state.controller || node !== $('messages').lastElementChild) return;
  state.messages.pop();
  node.remove();
  answer();
}

// ---- controls ------------------------------------------------------------------------------------------------------

function ready() {
  const busy = state.controller !== null;
  const started = $('messages').childElementCount > 0;
  $('form').classList.toggle('busy', busy);
  $('send').disabled = !busy && (!state.model || !$('input').value.trim());
  $('send').title = busy ? 'Stop (Esc)' : 'Send (Enter)';
  $('send').setAttribute('aria-label', busy ? 'Stop' : 'Send');
  $('welcome').hidden = started;
  $('new').hidden = !started;
}

function grow() {
  $('input').style.height = 'auto';
  $('input').style.height = `${$('input').scrollHeight}px`;
  ready();
}

function submit() {
  const text = $('input').value.trim();
  if (!text || state.controller || !state.model) return;
  $('input').value = '';
  grow();
  send(text);
}

function newChat() {
  state.controller?.abort();
  state.controller = null;
  state.messages = [];
  $('messages').replaceChildren();
  ready();
  $('input').focus();
}

function openSettings(focus = 'system') {
  $('system').value = settings.system;
  $('temperature').value = settings.temperature ?? state.temperature;
  $('temperature-shown').value = $('temperature').value;
  $('max-tokens').value = settings.maxTokens;
  $('key').value = state.key;
  $('settings').showModal();
  $(focus).focus();
}

function saveSettings() {
  settings.system = $('system').value;
  const temperature = Number($('temperature').value);
  settings.temperature = temperature === state.temperature ? null : temperature;
  settings.maxTokens = Math.max(1, Math.round(Number($('max-tokens').value)) || 512);
  localStorage.setItem('settings', JSON.stringify(settings));
  if ($('key').value !== state.key) {
    state.key = $('key').value;
    sessionStorage.setItem('key', state.key);
    connect();
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

const dark = matchMedia('(prefers-color-scheme: dark)');
setTheme(localStorage.getItem('theme') ?? (dark.matches ? 'dark' : 'light'));
dark.addEventListener('change', () => { if (!localStorage.getItem('theme')) setTheme(dark.matches ? 'dark' : 'light'); });

$('theme').onclick = () => {
  const theme = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
  localStorage.setItem('theme', theme);
  setTheme(theme);
};
$('form').onsubmit = (event) => {
  event.preventDefault();
  if (state.controller) state.controller.abort();
  else submit();
};
$('input').oninput = grow;
$('input').onkeydown = (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
};
document.onkeydown = (event) => {
  if (event.key === 'Escape' && state.controller && !$('settings').open) state.controller.abort();
};
$('new').onclick = newChat;
$('open-settings').onclick = () => openSettings();
$('temperature').oninput = () => { $('temperature-shown').value = $('temperature').value; };
$('settings').onclose = saveSettings;
$('examples').append(...EXAMPLES.map(({ title, prompt }) => el('button', {
  class: 'example', type: 'button', onclick: () => { if (state.model) send(prompt); else { $('input').value = prompt; grow(); } },
}, el('b', {}, title), el('span', {}, prompt))));
connect();
