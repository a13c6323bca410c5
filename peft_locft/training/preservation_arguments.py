"""The arguments that make edits generalize and leave the rest alone, and the recipes that set them in one word."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Recipe = Literal["published", "balanced"]
KeptLoss = Literal["kl", "likelihood"]
KeptChoice = Literal["random", "nearest"]

GENERATED = "generated"
LOCALITY = "locality"
# what a field is where it was left open
RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        "learning_rate": 5e-4,
        "num_train_epochs": 25,
        "lr_scheduler_type": "constant",
        "stop_at_learned": 0.0,
        "adam_epsilon": 1e-8,
        "loss_averaging": "edit",
        "num_prefixes": 0,
        "variants_per_epoch": 1.0,
        "kept_subjects": 0,
        "kept_per_edit": 1.0,
        "kept_answer_tokens": 1,
        "kept_weight": 1.0,
        "preserve_soft_strength": 0.0,
        "delta_decay": 0.0,
    },
    "balanced": {
        "learning_rate": 8e-4,
        "num_train_epochs": 24,
        "lr_scheduler_type": "linear",
        "stop_at_learned": 0.98,
        "adam_epsilon": 1e-4,
        "loss_averaging": "token",
        "num_prefixes": 5,
        "prefixes_per_edit": 2,
        "variants_per_epoch": 0.3,
        "kept_subjects": 4,
        "kept_per_edit": 1.0,
        "kept_answer_tokens": 1,
        "kept_weight": 2.0,
        "preserve_soft_strength": 20.0,
        "delta_decay": 0.07,
    },
}


@dataclass
class PreservationArguments:
    """What is trained beside the edits, and what keeps the rest of the model: fields of [`BreadthFirstConfig`].

    Args:
        recipe (`str`, defaults to `"published"`):
            What the fields that are `None` below are taken for: `"published"`, nothing beside the edits;
            `"balanced"`, what keeps far more of the rest of the model; docs/pages/balanced.md has the figures.
        num_prefixes (`int`, *optional*):
            Texts that the base generates, a third of them of at most 5 tokens and the others of at most 10; every edit
            has a variant behind each (Gangadhar and Stratos, arXiv 2402.11078).
        prefixes_per_edit (`int`, *optional*): so many of them for each edit, drawn at random. `None`: all,
            or as the recipe says.
        num_concatenated (`int`, defaults to 0):
            Variants of each edit whose target is followed by a random kept fact (SAUL, arXiv 2410.02433).
        variants_per_epoch (`float`, *optional*):
            Variants of each edit, its training `paraphrases` included, that are trained beside it in an epoch, drawn
            anew each time; 0.5 is one of every second edit, `inf` all of them.
        variant_weight (`float`, defaults to 1.0): of a variant in the loss, beside 1 of its edit.
        kept_facts (`str`, *optional*):
            Prompts whose answers shall stay: a file or a dataset on the Hub, see `facts_to_keep`; `"locality"`: the
            locality probes of the edits, which cannot be evaluated on afterwards.
        num_kept_facts (`int`, defaults to 2000): so many of them, at most.
        kept_facts_choice (`str`, defaults to `"random"`): or `"nearest"`, those most similar to the edits' prompts.
        kept_subjects (`int`, *optional*):
            For each edit, so many prompts made from its own by putting other subjects in the place of its subject:
            what is asked in the same words, and must be answered as before. The base makes these subjects up; from
            one that makes up none, the other edits' are taken.
        kept_answer_tokens (`int`, *optional*):
            Tokens of the base's own answers that are kept. With 1 and `kept_loss="kl"` nothing is decoded.
        kept_text_pieces (`int`, defaults to 0): pieces of 24 tokens of `preserve_text` on which the model is kept.
        kept_per_edit (`float`, *optional*):
            Rows of what is kept beside each edit of a batch; those that `kept_subjects` made are beside the edits that
            they were made from. 0 trains on none, and leaves them to the projector.
        kept_weight (`float`, *optional*): of their mean loss, beside 1 of the mean of the edits and variants.
        kept_loss (`str`, defaults to `"kl"`):
            `"kl"` holds the model to what the base says next, KL(base || model); `"likelihood"` trains the base's own
            answers as targets, as the source does.
        preserve_text (`str`, defaults to `"generated"`):
            The text to preserve: a file, a dataset on the Hub, or text that the base generates itself.
        preserve_tokens (`int`, defaults to 8192): of that text, at most.
        preserve_soft_strength (`float`, *optional*):
            How much slower is trained in a direction that has the mean energy of the location's inputs on that text;
            see `SoftProjector`. 0: no slower.
        preserve_prompts (`float`, defaults to 0.0):
            Weight of the kept prompts' last tokens in these statistics, beside 1 of the text: locality without a
            kept row in training (`kept_per_edit=0`), at the cost of generalization.
        preserve_energy_share (`float`, defaults to 0.0):
            Share of that energy whose directions are closed to training instead; see `NullSpaceProjector`. 0: none.
        preserve_cache_dir (`str`, *optional*): a folder where the statistics are kept for later runs.
        delta_decay (`float`, *optional*):
            Share of the delta that an epoch takes off it at the full learning rate, and less as that falls: beside
            `weight_decay`, AdamW's draws the delta towards zero, the model towards its base, whatever the rate and
            however many steps an epoch has.
        delta_bound (`float`, *optional*): no value of the delta becomes larger (the L-infinity bound of FT-L).
        keep_largest (`float`, *optional*):
            Share of each delta's values that are kept after training, those largest beside their weight (RECT, arXiv
            2401.04700).
    """

    recipe: Recipe = field(
        default="published", metadata={"help": "What the fields below are where they are not given."}
    )
    num_prefixes: int | None = field(
        default=None, metadata={"help": "Prefixes that the base generates; every edit is also trained behind each."}
    )
    prefixes_per_edit: int | None = field(
        default=None,
        metadata={"help": "So many of them for each edit, drawn at random; not given: all, or as the recipe."},
    )
    num_concatenated: int = field(
        default=0, metadata={"help": "Variants of each edit that go on with a random kept fact (SAUL)."}
    )
    variants_per_epoch: float | None = field(
        default=None, metadata={"help": "Variants of each edit in an epoch, drawn anew."}
    )
    variant_weight: float = field(default=1.0, metadata={"help": "Of a variant in the loss, beside 1 of its edit."})
    kept_facts: str | None = field(
        default=None,
        metadata={"help": "Prompts whose answers are kept: a file, a dataset on the Hub, or 'locality' of the edits."},
    )
    num_kept_facts: int = field(default=2000, metadata={"help": "Take so many of them, at most."})
    kept_facts_choice: KeptChoice = field(
        default="random", metadata={"help": "Which of them: random, or nearest to the edits."}
    )
    kept_subjects: int | None = field(
        default=None, metadata={"help": "Kept prompts made of each edit's by putting other subjects into it."}
    )
    kept_answer_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the base's answers that are kept; 1 with kl asks for no decoding."}
    )
    kept_text_pieces: int = field(default=0, metadata={"help": "Pieces of text on which the model is kept as it is."})
    kept_per_edit: float | None = field(default=None, metadata={"help": "Kept rows beside each edit of a batch."})
    kept_weight: float | None = field(
        default=None, metadata={"help": "Of what is kept in the loss, beside 1 of the edits."}
    )
    kept_loss: KeptLoss = field(
        default="kl", metadata={"help": "Hold kept rows to the base's distribution, or train its own answers."}
    )
    preserve_text: str = field(
        default=GENERATED,
        metadata={"help": "Text to preserve: a file, a dataset on the Hub, or 'generated' by the base."},
    )
    preserve_tokens: int = field(default=8192, metadata={"help": "Tokens of that text, at most."})
    preserve_soft_strength: float | None = field(
        default=None,
        metadata={"help": "How much slower is trained where that text has the mean of its inputs' energy; 0: not."},
    )
    preserve_prompts: float = field(
        default=0.0, metadata={"help": "Weight of the kept prompts' last tokens there, beside 1 of the text."}
    )
    preserve_energy_share: float = field(
        default=0.0,
        metadata={"help": "Share of the inputs' energy on that text that is closed to training."},
    )
    preserve_cache_dir: str | None = field(
        default=None, metadata={"help": "A folder where its statistics are kept for later runs."}
    )
    delta_decay: float | None = field(
        default=None, metadata={"help": "Share of the delta that an epoch takes off it at the full learning rate."}
    )
    delta_bound: float | None = field(default=None, metadata={"help": "L-infinity bound on the delta (FT-L)."})
    keep_largest: float | None = field(
        default=None, metadata={"help": "Share of each delta's values that are kept after training (RECT)."}
    )

    def resolve(self) -> None:
        """Set the fields that were left open as the recipe says, and check all of them.

        Raises:
            ValueError: if a field does not have one of the values named in [`BreadthFirstConfig`].
        """
        for name, allowed in (("recipe", Recipe), ("kept_loss", KeptLoss), ("kept_facts_choice", KeptChoice)):
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ValueError(f"BreadthFirstConfig.{name}={value!r}: expected one of {', '.join(known)}.")
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("num_prefixes", "num_concatenated", "kept_subjects", "kept_text_pieces"):
            self._check(name, "0 or more", getattr(self, name) >= 0)
        for name in ("num_kept_facts", "kept_answer_tokens", "preserve_tokens"):
            self._check(name, "1 or more", getattr(self, name) >= 1)
        self._check("prefixes_per_edit", "1 or more", self.prefixes_per_edit is None or self.prefixes_per_edit >= 1)
        self._check("variants_per_epoch", "a number above 0", (self.variants_per_epoch or 0) > 0)
        for name in ("variant_weight", "kept_weight", "kept_per_edit", "preserve_soft_strength", "preserve_prompts"):
            self._check(name, "0 or more", 0 <= getattr(self, name) < math.inf)
        self._check("preserve_energy_share", "0 to 1", 0 <= self.preserve_energy_share <= 1)
        self._check("delta_decay", "0 to 1", 0 <= (self.delta_decay or 0) <= 1)

    def _check(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"BreadthFirstConfig.{name}={getattr(self, name)!r}: expected {expected}.")

    @property
    def has_kept(self) -> bool:
        return bool(self.kept_facts or self.kept_subjects or self.kept_text_pieces)
