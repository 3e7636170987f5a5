// The server, as this page uses it: model list, streamed chat, tokens of a prompt.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const headers = (key, body) => ({
  ...(body ? { 'content-type': 'application/json' } : {}),
  ...(key ? { authorization: `Bearer ${key}` } : {}),
});

async function fail(response) {
  const text = await response.text();
  let message = text.trim().slice(0, 300) || `the server answered ${response.status}`;
  try { message = JSON.parse(text).error.message ?? message; } catch { /* not JSON: the text itself will do */ }
  throw new ApiError(response.status, message);
}

export async function get(path, key) {
  const response = await fetch(path, { headers: headers(key) });
  return response.ok ? response.json() : fail(response);
}

export async function post(path, body, key, signal) {
  const response = await fetch(path, { method: 'POST', headers: headers(key, true), body: JSON.stringify(body), signal });
  return response.ok ? response : fail(response);
}

// Each event of a streamed chat completion, parsed. Aborting the signal closes the connection, which aborts the request.
export async function* chat(body, key, signal) {
  const response = await post('/v1/chat/completions', body, key, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ''; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error.message ?? 'the server reported an error');
      yield event;
    }
  }
}

// [{ id, text }] of the rendered prompt, or null if the server does not say.
export async function promptTokens(model, messages, key) {
  try {
    const response = await post('/v1/tokenize', { model, messages, add_generation_prompt: true, return_token_strs: true }, key);
    const { tokens, token_strs: texts } = await response.json();
    return tokens.map((id, index) => ({ id, text: texts?.[index] ?? String(id) }));
  } catch (error) {
    if (error instanceof ApiError) return null;
    throw error;
  }
}

// The request as a shell command. The key itself is not written into it.
export function curl(body, needsKey) {
  const text = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  const auth = needsKey ? ' \\\n  -H "Authorization: Bearer $PANDO_API_KEY"' : '';
  return `curl -N ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${auth} \\\n  -d '${text}'`;
}
