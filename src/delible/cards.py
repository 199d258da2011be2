"""Cards: the metadata of every component, the field's taxonomy in code.

A card is written as literals in the ``@register(...)`` line above a class, so that it can be
read from the source without importing the file (and so without importing torch).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal[
    "generate", "select", "sample", "weigh", "place", "objective", "keep", "balance", "harden",
    "finish", "recipe", "editor", "intervention", "procedure", "guard", "agent", "attack",
    "metric", "benchmark", "artefact", "reward",
]  # fmt: skip

SLOTS = (
    "generate", "select", "sample", "weigh", "place", "objective", "keep", "balance", "harden",
    "finish",
)  # fmt: skip

#: Kinds that make a system forget by themselves (``--method NAME``).
METHODS: tuple[Kind, ...] = ("recipe", "editor", "intervention", "procedure", "guard")

#: What a component may need; the words are used by error messages and by `delible show`.
NEEDS = {
    "forget": "forget records (--forget FILE)",
    "retain": "retain records (--retain FILE, or leave it out for an automatic set)",
    "names": "names of the subjects to forget (--subjects NAME,…)",
    "reference": "values of the model before unlearning, computed once and cached",
    "refusals": "refusal sentences (built in; --refusals FILE for your own)",
    "generator": "a generator model for synthetic rows (--generator)",
    "model_at_inference": "another language model at inference time",
    "encoder": "a sentence encoder (built in: all-MiniLM-L6-v2)",
    "weights": "the weights of the model (white-box)",
    "activations": "activations or logits at inference time",
    "pictures": "records with pictures (images), and a model that sees",
}

Need = Literal[
    "forget", "retain", "names", "reference", "refusals", "generator", "model_at_inference",
    "encoder", "weights", "activations", "pictures",
]  # fmt: skip


#: How deep an audit goes; what belongs to one belongs to the deeper ones too.
Depth = Literal["quick", "standard", "deep"]
DEPTHS: tuple[Depth, ...] = ("quick", "standard", "deep")


class Card(BaseModel):
    """What a component is, where it comes from and how far to trust it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str
    summary: str = Field(description="One sentence: what it does.")
    paper: str | None = Field(None, description="arXiv identifier, such as 2404.05868.")
    year: int | None = None
    family: str | None = Field(None, description="Divergence, preference, representation, …")
    intention: Literal["removal", "suppression", "as host"] | None = None
    mechanism: (
        Literal[
            "PO-out", "PO-rep", "RL", "merge/edit", "adapter", "activation", "input",
            "output-guard", "agent-memory", "wrapper",
        ]
        | None
    ) = None  # fmt: skip
    needs: tuple[Need, ...] = ()
    changes: str | None = Field(None, description="What it changes: weights, prompts, nothing.")
    reversible: bool | None = Field(None, description="Dropping a part restores everything.")
    retrain_goal: bool | None = Field(None, description="Claims equality with retraining.")
    weakest: str | None = Field(None, description="The test that is expected to fail first.")
    advice: str | None = Field(
        None, description="What to set where the defaults alone do not do it, and why (methods)."
    )
    capability: Literal["generate", "score", "distribution", "hidden", "weights"] | None = Field(
        None, description="What it asks of the system (metrics and attacks)."
    )
    depth: Depth | None = Field(
        None, description="The shallowest audit that it belongs to; none: it is asked for by name."
    )
    range: str | None = Field(None, description="Range of values (metrics).")
    direction: str | None = Field(None, description="What a high value means (metrics).")
    misleads: str | None = Field(None, description="When the number misleads (metrics).")
    badges: tuple[Literal["parity", "effect", "variant", "experimental"], ...] = ()
    variant: str | None = Field(None, description="How it differs from the paper, on purpose.")
    module: str = Field("", description="Where the class lives; filled by the registry.")
    class_name: str = ""
