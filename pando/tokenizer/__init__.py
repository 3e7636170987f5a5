"""Text to tokens and back: tokenizer, chat templates, incremental detokenisation, stop strings. No torch."""
