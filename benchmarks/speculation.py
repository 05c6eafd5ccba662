#!/usr/bin/env python3
"""What guessing ahead gains: answers with and without it, alternating, in one process; the texts must be the same.

    python benchmarks/speculation.py MODEL.gguf [--draft SMALLER.gguf] [--prompt TEXT | --tokens N]

Without --prompt, the model is asked to repeat a paragraph (a base model: given it twice); --tokens takes N random
tokens instead. What wrong guesses cost shows where the text is new, as a story at --temp 1.3 is. Speeds are tokens/s
after the first token.
"""

from __future__ import annotations

import argparse
import random
from statistics import median

import gemmart

PARAGRAPH = (
    "The lighthouse stood on a narrow spit of rock, and every evening its keeper climbed the ninety-one steps to light "
    "the lamp. On clear nights the beam reached the islands; on foggy ones he rang a bell, once a minute, until the "
    "sun came up. He wrote down each passing ship, its colours and its course, in a ledger bound in green cloth."
)


def prompt_for(model: gemmart.Model, text: str | None, n_tokens: int) -> list[int]:
    if n_tokens:
        return random.Random(0).choices(range(model.info.n_vocab), k=n_tokens)
    if model.has_template:
        said = text or f"Repeat this text word for word, three times:\n\n{PARAGRAPH}"
        return model.chat_tokens([{"role": "user", "content": said}])
    return model.tokenize(text or f"{PARAGRAPH}\n\n{PARAGRAPH}\n\n", bos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed with and without guessing ahead.")
    parser.add_argument("model")
    parser.add_argument("--draft", help="a smaller model; without it, prompt lookup")
    parser.add_argument("--draft-max", type=int, default=7)
    parser.add_argument("--prompt")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--decode", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    options = {"ctx": 2048, "threads": given.threads}
    speculation = {"lookup": given.draft is None, "draft": given.draft, "draft_max": given.draft_max}
    with (
        gemmart.load(given.model, lookup=False, **options) as plain,
        gemmart.load(given.model, **speculation, **options) as model,
    ):
        prompt = prompt_for(model, given.prompt, given.tokens)
        sampling = gemmart.Sampling(temperature=given.temp)
        speeds: list[list[float]] = [[], []]
        for _ in range(given.repeat):
            answers = [
                m.generate(prompt, sampling, max_tokens=given.decode, seed=0, ignore_eos=True) for m in (plain, model)
            ]
            if answers[0].tokens != answers[1].tokens:
                raise SystemExit("the texts differ")
            for found, answer in zip(speeds, answers, strict=True):
                found.append(answer.timings.tokens_per_s(answer.usage))
            timings = answers[1].timings
            print(
                f"without {speeds[0][-1]:.1f}, with {speeds[1][-1]:.1f} tokens/s, "
                f"{timings.accepted_tokens} of {timings.drafted_tokens} guesses right",
                flush=True,
            )
    print(f"median: {median(speeds[0]):.1f} and {median(speeds[1]):.1f} tokens/s", end=", ")
    print(f"median ratio of a pair {median(b / a for a, b in zip(*speeds, strict=True)):.2f}")


if __name__ == "__main__":
    main()
