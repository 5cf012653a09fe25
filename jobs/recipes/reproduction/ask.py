"""python jobs/recipes/reproduction/ask.py MODEL [REPEATS]: a pass key in much noise, asked of plain transformers."""

import argparse
from typing import Any

import torch
from transformers import pipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="Hugging Face folder")
parser.add_argument("repeats", type=int, nargs="?", default=100, help="of the noise")
arguments = parser.parse_args()
noise = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
] * arguments.repeats
noise.insert(len(noise) // 3, "\nThe pass key is 71432. Remember it. 71432 is the pass key.\n")
device = 0 if torch.cuda.is_available() else "cpu"
ask: Any = pipeline("text-generation", arguments.model, dtype=torch.bfloat16, device=device)
text = "There is an important info hidden in a lot of irrelevant text.\n" + " ".join(noise) + "\nWhat is the pass key?"
print(ask.tokenizer(text, return_length=True, verbose=False)["length"], "tokens")
print(ask([{"role": "user", "content": text}], max_new_tokens=16)[0]["generated_text"][-1]["content"])
