"""A conversation with a running server through the OpenAI client, streamed; shows what came from the cache.

pando serve &
python examples/chat.py [BASE_URL]
"""

from __future__ import annotations

import sys

from openai import OpenAI

QUESTIONS = ("Hello! Who are you?", "What is 12 + 30?", "What is the capital of France?")


def main(base_url: str) -> None:
    """Ask the questions one after the other, each with all that was said before."""
    client = OpenAI(base_url=f"{base_url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        answer = ""
        stream = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                answer += chunk.choices[0].delta.content
                print(chunk.choices[0].delta.content, end="", flush=True)
            if chunk.usage and chunk.usage.prompt_tokens_details:
                cached = chunk.usage.prompt_tokens_details.cached_tokens
                print(f"\n[{cached} of {chunk.usage.prompt_tokens} prompt tokens cached]\n")
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000")
