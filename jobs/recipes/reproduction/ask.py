"""python jobs/recipes/reproduction/ask.py MODEL REPEATS: a pass key in noise of 3 x REPEATS, by plain transformers.

Without do_sample=False the pipeline draws its tokens at random, and may get a digit wrong.
"""

import sys
from typing import Any

from transformers import pipeline

noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * int(sys.argv[2])
key = "\nThe pass key is 71432. Remember it. 71432 is the pass key.\n"
text = f"There is an important info hidden in a lot of irrelevant text.\n{noise}{key}{noise * 2}\nWhat is the pass key?"
ask: Any = pipeline("text-generation", sys.argv[1], dtype="bfloat16")  # on a GPU where there is one
print(len(ask.tokenizer(text, verbose=False)["input_ids"]), "tokens")
question = [{"role": "user", "content": text}]
print(ask(question, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"])
