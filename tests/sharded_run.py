"""One run of everything that a mesh could change, as numbers: phase 1, min-min, phase 2, and the scores.

Also a program, for runs of several processes: `python -m tests.sharded_run OUT MESH --cluster HOST:PORT --processes 2
--process 0` writes the numbers to OUT.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from secvec_jax.config import Training
from secvec_jax.defenses.security_vectors import Phase1, finetune, train_vectors
from secvec_jax.distributed import Cluster, on_main_process, start_cluster
from secvec_jax.evaluation.suite import Suite, outcomes
from secvec_jax.inference import generate
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.trees import distance
from secvec_jax.vectors.lora import LoRA, random_like
from tests.toys import example, random_examples, tiny_model

STEPS = 4
TRAINING = Training(
    optimizer="adamw", learning_rate=3e-3, warmup_steps=0, batch_size=8, max_seq_len=48, max_steps=STEPS
)
MIN_MIN = Phase1("min_min", inner_steps=1, inner_learning_rate=1e-2)
PROMPTS = ["What is the capital of France?", "def add", "dogs", "A security vector says that", "12345 + 67890"]


def everything() -> dict[str, Any]:
    """Losses of each step, replies and final scores, on the ambient mesh."""
    told: dict[str, Any] = {}

    def losses(name: str):
        told[f"losses of {name}"] = []
        return lambda step, steps, metrics: told[f"losses of {name}"].append(metrics["loss"])

    model = Model(shard(tiny_model().backbone), tiny_model().tokenizer, "tiny")
    harmful, benign, user = (random_examples(count, seed=i, head=5) for i, count in enumerate((40, 60, 90)))
    vectors = train_vectors(model, harmful, LoRA(rank=4), benign=benign, training=TRAINING, on_step=losses("kl"))
    half = dataclasses.replace(TRAINING, max_steps=STEPS // 2)  # of the vectors; as many of the copy
    train_vectors(model, harmful, LoRA(rank=4), phase1=MIN_MIN, training=half, on_step=losses("min-min"))
    twice = dataclasses.replace(TRAINING, grad_accum_steps=2)
    tuned = finetune(model, {"user": user}, vectors=vectors, training=twice, on_step=losses("finetune"))
    task = finetune(
        model,
        {"user": user},
        vectors=random_like(vectors, jax.random.key(3)),
        task=LoRA(rank=2),
        training=dataclasses.replace(TRAINING, max_steps=3),
        on_step=losses("task"),
    )
    told["replies"] = generate(tuned, PROMPTS, max_new_tokens=8)
    elsewhere = dataclasses.replace(vectors, origin=None)  # else they are refused for the tuned model
    told["replies with vectors"] = generate(tuned, PROMPTS, elsewhere, max_new_tokens=8)
    suite = Suite(
        refusals=[told["replies"][3][:3]],  # one reply is a refusal, and one question is answered
        harmful=PROMPTS,
        questions=[(prompt, told["replies"][0]) for prompt in PROMPTS],
        harmful_targets=[example([5, 6, 7, *range(8, 8 + i)], [9, 10 + i]) for i in range(11)],
        reply_tokens=8,
    )
    for name, one in (("tuned", tuned), ("task", task)):
        told[f"{name} drift"] = [float(distance(one.backbone, model.backbone))]
        told |= {f"{name} {metric}": values for metric, values in outcomes(one, suite).items()}
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("mesh")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--cluster")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    start_cluster(Cluster(options.mesh, options.cluster, options.processes, options.process))
    told = everything()
    on_main_process(lambda: options.out.write_text(json.dumps(told)))


if __name__ == "__main__":
    main()
