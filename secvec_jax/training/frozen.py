"""Verify that a training leaves its frozen parameters unchanged, by fingerprints before and after."""

from collections.abc import Mapping

from secvec_jax.errors import UserError
from secvec_jax.trees import Tree, fingerprint


class FrozenTrees:
    """Fingerprints of frozen trees by name, taken before each training and compared after it."""

    def __init__(self) -> None:
        self.fingerprints: dict[str, str] = {}

    def record(self, trees: Mapping[str, Tree]) -> None:
        """Take the fingerprints of the trees before a training."""
        self.fingerprints |= {name: fingerprint(tree) for name, tree in trees.items()}

    def verify(self, trees: Mapping[str, Tree]) -> None:
        """Compare with the trees after the training. Raises UserError if one has changed."""
        for name, tree in trees.items():
            then, now = self.fingerprints[name], fingerprint(tree)
            if now != then:
                raise UserError(
                    f"the {name}, which the training keeps frozen, changed in it (sha256 {then[:12]} before, "
                    f"{now[:12]} after): its result is not kept; please report this, with the command"
                )

    def __str__(self) -> str:
        unchanged = [f"{name} sha256 {digest[:12]}" for name, digest in sorted(self.fingerprints.items())]
        return (
            f"frozen, the same before and after: {', '.join(unchanged)}"
            if unchanged
            else "nothing was frozen: all weights were trained"
        )
