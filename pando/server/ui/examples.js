// Prompts for the first page, of the kinds the built-in model was trained on.

export const EXAMPLES = [
  { title: 'Recall from a text', prompt: 'Notes: Mara keeps the blue key in the kitchen. Tom keeps the red key in the garage. The green key is with Iris.\n\nWho has the green key?' },
  { title: 'Extract JSON', prompt: 'Extract name, age and city as JSON: "Lena Hoffmann, 34 years old, lives in Bremen and works as a carpenter."' },
  { title: 'Arithmetic', prompt: 'What is 347 + 586? Show the steps.' },
  { title: 'A Python function', prompt: 'Write a Python function that returns the largest number in a list.' },
  { title: 'Small talk', prompt: 'Hello! Who are you?' },
];
