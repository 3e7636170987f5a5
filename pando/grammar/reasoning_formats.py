"""How model families mark their reasoning: one record each. Sources: the families' chat templates and model cards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """begin, end: the texts around reasoning.

    absent: what a prompt without either of them means for the reply: it begins inside ("inside"), with the marker if
    the model likes ("optional"), or without reasoning ("now"); "ask": the chat template tells. hints: texts that a chat
    template of this format holds, any of them. committed: see `ReasoningSpec`.
    """

    name: str
    begin: str
    end: str
    absent: Literal["inside", "optional", "now", "ask"] = "ask"
    hints: tuple[str, ...] = ()
    committed: int = 0

    @property
    def is_channels(self) -> bool:
        """True if reasoning is a kind of message, not a block before the answer."""
        return self.name == "harmony"


REASONING: dict[str, ReasoningFormat] = {
    form.name: form
    for form in (
        ReasoningFormat(
            "harmony",
            begin="<|channel|>analysis<|message|>",
            # The grammar holds the last message: what comes before it is free, its own head included.
            end="<|channel|>final<|message|>",
            absent="inside",
            hints=("<|channel|>",),
            committed=2,
        ),
        ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>", hints=("<seed:think>",)),
        ReasoningFormat("kimi", "◁think▷", "◁/think▷", hints=("◁think▷", "◁/think▷")),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", absent="optional", hints=("[THINK]",)),
        ReasoningFormat("think", "<think>", "</think>", hints=("<think>", "</think>")),
        ReasoningFormat("deepseek_r1", "<think>", "</think>", absent="inside"),
        ReasoningFormat("qwen3", "<think>", "</think>", absent="optional"),
    )
}
"""By name; the first whose hints a chat template holds is the model's."""

ALIASES = {
    **dict.fromkeys(("gpt_oss", "openai_gptoss", "openai"), "harmony"),
    **dict.fromkeys(("deepseekr1", "qwen3_thinking", "step3", "minimax", "minimax_m2", "qwq"), "deepseek_r1"),
    **dict.fromkeys(("deepseek_v3", "deepseekv3", "deepseek_v31", "kimi_k2", "nano_v3", "olmo3"), "think"),
    **dict.fromkeys(("glm45", "interns1", "hunyuan", "ernie45", "holo2"), "qwen3"),
    **dict.fromkeys(("magistral",), "mistral"),
}
"""Further names by which people know them, SGLang's and vLLM's flags among them; `-` and `_` are the same."""


def reasoning_format(name: str) -> ReasoningFormat | None:
    """The format of this name or alias, or None."""
    plain = name.strip().lower().replace("-", "_")
    return REASONING.get(ALIASES.get(plain, plain))


def detect_reasoning_format(chat_template: str) -> ReasoningFormat | None:
    """The format that a chat template writes, or None if it knows no reasoning."""
    found = (form for form in REASONING.values() if any(hint in chat_template for hint in form.hints))
    return next(found, None)
