"""AlphaEdit: as MEMIT, but only along directions that ordinary text and earlier edits hardly use.

    (P (K K^T + M) + L2) X = P K,    Delta = R X^T

P projects onto the directions in which ordinary keys have next to no second moment, so what is
written at them stays; M is the sum of k k^T over the keys of all earlier edits, also of patches
that the model wears, and holds what they have written.

Paper: arXiv 2410.02355; as unlearning 2505.19855. Reference code: jianghoucheng/AlphaEdit,
zjunlp/EasyEdit. Deviations:

- L2 is rho times the mean of k^T P k, so that a single edit is written to 1 / (1 + rho), whatever
  the size of the model's keys; ``l2`` sets it (1 for Llama-3-8B, 10 for 3.1).
- The null space are the directions that together hold 3% of the keys' energy: a share of the
  largest singular value protects nothing in layers in which one direction outweighs all others.
  The authors' absolute 0.02 is ``scale=absolute threshold=0.02``. An empty one is an error.
- A value may change by three times its length, where the authors allow three quarters
  (``clamp=0.75``): a small model says no whole refusal for less.
- The system is solved in the space of the keys, new and earlier ones (the same solution as the
  width x width system). Layers are depths: 4 to 8 of 32 in EasyEdit's settings.
"""

from __future__ import annotations

from delible.edit.located import RefusalEditor
from delible.edit.null_space import NullSpaceEditor
from delible.registry import register


@register(
    kind="editor",
    name="alphaedit",
    title="AlphaEdit",
    summary="Writes refusals into MLPs where neither ordinary text nor earlier edits write.",
    paper="2410.02355",
    year=2025,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="paraphrases without the name, relearning, quantization",
    advice="a larger --threshold writes more and keeps less; a larger --rho writes less",
    badges=("parity", "variant"),
    variant="Refusals as targets, a scale-free L2 and null space.",
)
class AlphaEdit(NullSpaceEditor, RefusalEditor):
    """Options of AlphaEdit."""
