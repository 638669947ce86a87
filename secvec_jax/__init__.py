"""Security vectors in JAX: fine-tune a language model on data you do not trust.

    import secvec_jax as sv

    model   = sv.load("smollm2")                                  # embedded name, folder, hub id or GGUF
    aligned = sv.align(model, refusals)                           # rows: [{"messages": [...]}, ...] or a Dataset
    vectors = sv.train_vectors(aligned, harmful[:100], sv.LoRA(rank=8), benign=benign)
    tuned   = sv.finetune(aligned, user_rows, vectors=vectors)    # vectors active and frozen; None: unprotected
    answers = sv.generate(tuned, prompts)                         # vectors off, unless vectors= is passed
    tuned.save("tuned/")                                          # a Hugging Face folder
    guarded = sv.defend(aligned, user_rows, sv.defenses.GuardedVectors(), vectors=vectors).model   # another defense
    sv.audit(aligned, tuned)                                      # what changed, with a verdict
    result  = sv.protect(aligned, user_rows)                      # screened, defended and audited: the recommended way

Everything is a value: no verb changes its arguments. Wrong arguments raise `UserError`, which says what to pass.
"""

__version__ = "0.2.0"

from secvec_jax import defenses
from secvec_jax.config import Training
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.screening import screen
from secvec_jax.defenses.security_vectors import Phase1, align, finetune, train_vectors
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit import Limits
from secvec_jax.evaluation.scoring import score
from secvec_jax.inference import generate, logits
from secvec_jax.model.hub import Model, load
from secvec_jax.model.sampling import Sampling
from secvec_jax.recipes.audit import audit
from secvec_jax.recipes.defend import defend
from secvec_jax.recipes.protect import protect
from secvec_jax.sharding import make_mesh
from secvec_jax.vectors.lora import LoRA, random_like
from secvec_jax.vectors.peft import save_peft
from secvec_jax.vectors.prompt import SoftPrompt
from secvec_jax.vectors.steering import Steering
from secvec_jax.vectors.store import load_vectors, save_vectors

__all__ = [
    "Limits",
    "LoRA",
    "Model",
    "Phase1",
    "Sampling",
    "SoftPrompt",
    "Steering",
    "Training",
    "UserError",
    "align",
    "audit",
    "defend",
    "defenses",
    "finetune",
    "generate",
    "load",
    "load_rows",
    "load_vectors",
    "logits",
    "make_mesh",
    "protect",
    "random_like",
    "save_peft",
    "save_vectors",
    "score",
    "screen",
    "train_vectors",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__name__", "__version__"])
