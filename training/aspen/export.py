"""Write a checkpoint as a plain Hugging Face model folder, and check that transformers computes the same logits.

    python -m training.aspen.export --work DIR [--checkpoint checkpoint-final] [--out FOLDER]

Without `--out` the folder is `DIR/export`. `--ship` also copies it over the model folder that comes with Pando.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from training.aspen.build import build_model
from training.aspen.paths import MODELS, default_work
from training.aspen.shape import SHAPES
from training.aspen.tokenizer import save as save_tokenizer

CARDS = {family: Path(__file__).with_name(f"{family}_card.md") for family in ("aspen", "willow")}
NOTICE = Path(__file__).with_name("NOTICE")
MAX_LOGIT_DIFFERENCE = 0.02
"""fp32 on both sides: only the order of sums and the missing row maximum differ."""


def load_weights(path: Path) -> tuple[str, int, dict[str, Tensor]]:
    """The shape name, the tokens seen, and the weights rounded to bf16, of a checkpoint."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    return (
        state["shape"],
        state["tokens"],
        {name: value.bfloat16().contiguous() for name, value in state["optimizer"]["master"].items()},
    )


def write_folder(folder: Path, work: Path, shape_name: str, weights: dict[str, Tensor]) -> None:
    """Write configuration, tokenizer, template, weights, card and notice."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    save_tokenizer(tokenizer, folder)
    turn, text = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = SHAPES[shape_name].hf_config(turn, text)
    generation = {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.9,
        "eos_token_id": [turn, text],
        "pad_token_id": text,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    family = SHAPES[shape_name].family
    shutil.copyfile(CARDS[family], folder / "README.md")
    title = family.capitalize()
    notice = NOTICE.read_text("utf-8").replace("Aspen\n=====\n", f"{title}\n{'=' * len(title)}\n")
    (folder / "NOTICE").write_text(notice, "utf-8")


def largest_difference(folder: Path, shape_name: str, weights: dict[str, Tensor]) -> float:
    """Largest difference between our logits and transformers', in fp32, on a fixed random prompt."""
    ours = build_model(SHAPES[shape_name])
    ours.load_state_dict({name: value.float() for name, value in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, SHAPES[shape_name].vocab, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (ours.logits(tokens) - theirs(tokens).logits).abs().max().item()


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--checkpoint", default="checkpoint-final", help="name of a checkpoint in --work")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ship", action="store_true", help="also replace the model folder that comes with Pando")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out or args.work / "export"
    shape_name, num_tokens, weights = load_weights(args.work / f"{args.checkpoint}.pt")
    write_folder(folder, args.work, shape_name, weights)
    difference = largest_difference(folder, shape_name, weights)
    print(
        f"{folder}: shape {shape_name}, {SHAPES[shape_name].num_parameters()} parameters, {num_tokens} tokens seen,"
        f" largest logit difference to transformers {difference:.5f}"
    )
    if difference > MAX_LOGIT_DIFFERENCE:
        raise SystemExit("transformers computes something else: the export is not usable")
    if args.ship:
        shipped = MODELS / SHAPES[shape_name].family
        shutil.copytree(folder, shipped, dirs_exist_ok=True)
        print("shipped to", shipped)


if __name__ == "__main__":
    main()
