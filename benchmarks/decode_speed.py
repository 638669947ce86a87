"""Greedy decoding speed, 64 held-out prompts x 48 new tokens: ours compared with `generate` of transformers.

    python benchmarks/decode_speed.py --json OUT [--rounds 5] [--toy]

Both sides go from the prompts' token ids to the replies' token ids, in one batch, with the same model in float32; no
reply stops early. The ratio uses the faster cache of transformers. The share of equal tokens shows that both decode the
same text: replies diverge only where two tokens are equally likely to 1e-6, so that rounding decides.
"""

import argparse
import ast
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rival
from sides import Side, alternate, machine, ratio
from toy import SIZES, toy_model

import secvec_jax as sv
from secvec_jax.data.chat import prompt_tokens
from secvec_jax.evaluation.results import environment_facts
from secvec_jax.files import atomic_file
from secvec_jax.model.generate import generate_tokens
from secvec_jax.workspace.splits import make_splits
from secvec_jax.workspace.workspace import Experiment

PROMPTS, NEW_TOKENS = 64, 48
_NEVER = -1
"""Not a token id: no reply stops early."""


def decoding(
    folder: str, prompts: Sequence[np.ndarray], new_tokens: int, replies_file: str
) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Make a side of `sides.alternate` that replies to all prompts in one batch, and writes the replies to a file."""
    decoder = sv.load(folder).backbone

    def reply(piece: int) -> None:
        written = generate_tokens(decoder, prompts, max_new_tokens=new_tokens, stop=_NEVER, batch_size=len(prompts))
        assert all(len(row) == new_tokens for row in written)
        Path(replies_file).write_text(str(written))

    return {"prompt tokens": sum(map(len, prompts))}, reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="output file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="smoke test on a model with two small layers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        experiment = Experiment()
        model, sizes = (toy_model(), SIZES) if arguments.toy else (sv.load("smollm2"), experiment.sizes)
        folder = f"{scratch}/model"
        model.save(folder)
        suite = make_splits(model, sizes, experiment.finetune_training, experiment.seed).suite
        limit = model.architecture.max_length - NEW_TOKENS
        prompts = [
            prompt_tokens(model.tokenizer, [{"role": "user", "content": prompt}], limit)
            for prompt in suite.harmful[:PROMPTS]
        ]
        del model
        plain = [prompt.tolist() for prompt in prompts]
        sides = {"ours": Side(decoding, (folder, prompts, NEW_TOKENS, f"{scratch}/ours"))}
        for cache in ("dynamic", "static"):
            replies_file = f"{scratch}/{cache}"
            sides[f"transformers, {cache}"] = Side(rival.decoding, (folder, plain, NEW_TOKENS, cache, replies_file))
        side_times = alternate(sides, arguments.rounds, 1, fork=arguments.toy)
        our_tokens, their_tokens = (
            np.asarray(ast.literal_eval(Path(f"{scratch}/{side}").read_text())) for side in ("ours", "dynamic")
        )
    rivals = {name: times for name, times in side_times.items() if name != "ours"}
    best = min(rivals, key=lambda name: sorted(rivals[name].rounds)[len(rivals[name].rounds) // 2])
    measured = ratio(side_times[best], side_times["ours"])
    results = {
        "command": "python benchmarks/decode_speed.py",
        "environment": environment_facts() | machine(),
        "ratios": {"decode_vs_transformers": measured["median"]},
        "ranges": {"decode_vs_transformers": measured},
        "faster cache of transformers": best,
        "equal tokens": float((our_tokens == their_tokens).mean()),
        "equal replies": float((our_tokens == their_tokens).all(axis=1).mean()),
        "sides": {name: times.as_dict(1) for name, times in side_times.items()},
    }
    with atomic_file(arguments.json) as staging:
        staging.write_text(json.dumps(results, indent=1))
    for name, times in side_times.items():
        summary = times.as_dict(1)
        rate = len(prompts) / summary["seconds"]
        print(f"{name:26} {summary['seconds']:7.3f} s  {rate:6.2f} prompts/s  {summary['peak_gib']:5.2f} GiB")
    print(f"ratio {measured['median']:.3f}  [{measured['least']:.3f}, {measured['largest']:.3f}]  n={measured['n']}")
    print(f"equal tokens {results['equal tokens']:.4f}, equal replies {results['equal replies']:.4f}")


if __name__ == "__main__":
    main()
