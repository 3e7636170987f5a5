// Prompts for the first page, of the kinds the built-in model was trained on.

export const EXAMPLES = [
  {
    title: 'Recall from a text',
    prompt: 'Text: Zoe lives in Lisbon and owns a green bicycle. Amir is 41 years old and works as a pilot. The meeting starts at 9:30. The exam is on 15 July.\n\nWhen is the exam?',
  },
  {
    title: 'Extract JSON',
    prompt: 'My name is Leo. I am 34 years old and I live in Bremen. My email address is leo@cloudnine.com.\nAnswer in JSON with these keys: name (string), age (integer), city (string), email (string).',
  },
  { title: 'Arithmetic', prompt: 'What is 347 + 586?' },
  { title: 'A Python function', prompt: 'Write a Python function that returns the largest value of a list.' },
  { title: 'Small talk', prompt: 'Hello! What is Pando?' },
];
