"""A model with two small layers for `--toy`, a smoke test of a benchmark; its figures are meaningless."""

import jax
from flax import nnx

import secvec_jax as sv
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder
from secvec_jax.workspace.splits import Sizes

SIZES = Sizes(align_harmful=3, align_benign=6, vectors=40, keep=30, mix_harmful=20, mix_benign=9, people=3,
              people_asked=2, judged=8, judged_benign=4)  # fmt: skip


def toy_model() -> sv.Model:
    """Return a model with random weights and the embedded model's tokenizer."""
    embedded = sv.load("smollm2")
    architecture = Architecture(
        "llama", embedded.architecture.vocab_size, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_length=1024, tied_head=True,
    )  # fmt: skip
    decoder = jax.jit(lambda: Decoder(architecture, nnx.Rngs(0)))()
    return embedded.with_backbone(decoder)
