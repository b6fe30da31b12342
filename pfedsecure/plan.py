"""The federation plan: the public agreement that every party signs up to before anything is exchanged.

A plan is a TOML file. It says which frozen model is used, which classes exist, how prompts are trained, when a round
closes, and which protections are on. Its digest is announced when a client joins and is pinned by the client, so that a
server cannot change the rules under way.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pfedsecure.data.class_names import normalise_class_name
from pfedsecure.errors import PlanError

NonEmpty = Annotated[str, Field(min_length=1)]
SMALLEST_EPSILON = 0.1
"""Of a sketch's noise."""

NO_PRIVACY = (
    "differential privacy is up to each client: prompts of those without --dp-epsilon may reveal training examples to "
    "the peers that borrow them"
)
"""One of the sentences of `Plan.unprotected`; not true of a client that asked for it."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class BackbonePlan(_Section):
    """The frozen CLIP model. Every client loads its own copy; only its name and digest are agreed on."""

    model: NonEmpty = "tiny-clip"
    """open_clip model name, or the name of a configuration file that every party has."""
    pretrained: NonEmpty = "embedded"
    """open_clip pretrained tag; a client may name a local file of the same weights instead."""
    text_width: Annotated[int, Field(ge=1)] | None = None
    """Width d of the text tower; needed only for a model whose configuration the server does not have."""
    text_digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the text tower's weights as `pfedsecure.clip.backbone` computes it; checked by clients when given."""


class PromptPlan(_Section):
    """The trainable context `ctx (n, d)`, shared by all classes."""

    context_length: Annotated[int, Field(ge=1, le=64)] = 16
    context_init: str = ""
    """Words whose embeddings start the context (they stand next to the class name); random where there are none."""
    max_norm: Positive = 100.0
    """Largest Euclidean norm of a prompt that anybody sends; a client scales its own to it, receivers refuse others."""


class MixturePlan(_Section):
    """The gate over local prompt and experts. Symbols as in the paper: K, g, lambda."""

    form: Literal["paper", "ensemble"] = "paper"
    """`paper`: the own gate attends to the experts' prompts. `ensemble`: experts are whole classifiers, prompt and what
    their authors' gates make of it, and half of a prediction is the mean of theirs."""
    experts: Annotated[int, Field(ge=0, le=256)] = 9
    gate_width: Annotated[int, Field(ge=1)] = 128
    gate_heads: Annotated[int, Field(ge=1)] = 8
    lambda_: Annotated[float, Field(ge=0, allow_inf_nan=False, alias="lambda")] = 0.5
    attention_scale: Positive = 10.0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> MixturePlan:
        if self.gate_width % self.gate_heads:
            raise ValueError(f"gate_width {self.gate_width} is not a multiple of gate_heads {self.gate_heads}")
        return self


class TrainingPlan(_Section):
    """Local training of one round: SGD with momentum, cosine schedule over the round."""

    local_epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 32
    prompt_lr: Positive = 0.002
    gate_lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    views: Annotated[int, Field(ge=1, le=256)] = 1
    """V: what training sees of each image, anew at each use one of them. The first is the backbone's own preprocessing,
    the others are random crops of it."""


class PrivacyPlan(_Section):
    """How a client that asks for differential privacy trains. Public, and so nothing in it tells of anybody's data.

    Epsilon is not here: each client has its own.
    """

    mechanism: Literal["feature-space", "per-sample"] = "feature-space"
    """What is clipped and noised, with the gate's gradient: that of the text features, or that of the prompt."""
    clip: Positive = 0.3
    """Norm that what one image contributes to a step, prompt and gate together, is clipped to."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Images that a step takes on average; each is drawn by itself."""
    steps: Annotated[int, Field(ge=1)] = 30
    """Of a round, each with its noise; the same for every client, whatever the number of its images."""
    prompt_lr: Positive = 0.01
    gate_lr: Positive = 0.05


class RoundsPlan(_Section):
    """When rounds start and close."""

    count: Annotated[int, Field(ge=1)] = 10
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the clients online that is chosen for a round (at least `minimum_cohort`)."""
    minimum_cohort: Annotated[int, Field(ge=1)] = 3
    """Fewer updates than this and the round is abandoned; secure aggregation hides nobody among fewer than three."""
    start_clients: Annotated[int, Field(ge=1)] | None = None
    """Clients that must be online before the first round; `minimum_cohort` when not given."""
    deadline_seconds: Positive = 600.0
    """For training: whoever has not sent the first message of the aggregation by then is left out."""
    step_seconds: Positive = 60.0
    """For each further step of the aggregation."""
    heartbeat_seconds: Positive = 5.0
    """A client that has not been heard of for six of these is taken for gone."""

    @property
    def clients_to_start(self) -> int:
        """How many clients must be online before the first round: never fewer than `minimum_cohort`."""
        return max(self.start_clients or 0, self.minimum_cohort)


class ProtectionPlan(_Section):
    """What hides what from whom. Everything that is off is said aloud by server and client."""

    aggregation: Literal["secure", "plain"] = "secure"
    """`secure`: the server learns the cohort's mean and no single prompt, weight or metric."""
    experts: Literal["sealed", "plain"] = "sealed"
    """`sealed`: clients lend each other prompts in envelopes that the server cannot open or make."""
    matching: Literal["he", "dp", "random", "plain"] = "he"
    """How the nearest experts are found: `he` on encrypted sketches, `dp` on noised ones, `plain` on the prompts
    themselves, which the server then sees. `random` draws experts by lot."""
    metrics: bool = False
    """Whether clients that agree add accuracy and loss to the secure sum, so that the operator sees their means."""

    @model_validator(mode="after")
    def _metrics_are_protected(self) -> ProtectionPlan:
        if self.metrics and self.aggregation != "secure":
            raise ValueError('metrics take aggregation = "secure": the server would see every client\'s own')
        return self


class MatchingPlan(_Section):
    """What experts are compared by: a random projection of the prompt to `dimension` numbers."""

    dimension: Annotated[int, Field(ge=1, le=1024)] = 64
    """m: more is nearer to the distances of the prompts themselves, and dearer."""
    clip: Positive = 2.0
    """Norm that a sketch, the projection of how far a prompt went from the start, is clipped to."""
    epsilon: Positive | None = None
    """Of the noise on each sketch that is published: with `dp` against the server, with `he` against whoever has the
    cohort's secret too. None: no noise, which `dp` does not take."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @field_validator("epsilon")
    @classmethod
    def _leaves_something(cls, epsilon: float | None) -> float | None:
        if epsilon is not None and epsilon < SMALLEST_EPSILON:
            raise ValueError(f"less than {SMALLEST_EPSILON:g} leaves nothing of a sketch; draw experts by lot instead")
        return epsilon


class SecureAggregationPlan(_Section):
    """Range and precision of what is summed, and what the sparse graph of large cohorts relies on."""

    clip: Positive = 4.0
    """Each number of a prompt is clipped to [-clip, clip]; a client says so when that changes its prompt."""
    max_weight: Annotated[int, Field(ge=1, lt=2**29)] = 10_000
    """A client counts with its number of training images, but with no more than this."""
    precision: Positive = 2e-3
    """Largest error that fixed point may add to a mean of weight 1; a mean weight of w makes it w times smaller."""
    complete_up_to: Annotated[int, Field(ge=3, le=4096)] = 64
    """Up to so many clients everybody shares secrets with everybody; above, with as many as the bounds ask for."""
    assumed_corrupt: Annotated[float, Field(ge=0, lt=1 / 3)] = 0.2
    """Share of a cohort that may collude with the server, above `complete_up_to`; below, it is less than a third."""
    assumed_dropout: Annotated[float, Field(ge=0, lt=1 / 3)] = 0.3
    """Share of a cohort that may drop out, above `complete_up_to`; below, it is less than a third."""


class Plan(_Section):
    """A whole federation plan. The defaults are the paper's, but for the model: that is the embedded one."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "pfedsecure"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    method: Literal["pfedmoap", "promptfl"] = "pfedmoap"
    class_names: Annotated[tuple[NonEmpty, ...], Field(min_length=2)]
    backbone: BackbonePlan = BackbonePlan()
    prompt: PromptPlan = PromptPlan()
    mixture: MixturePlan = MixturePlan()
    training: TrainingPlan = TrainingPlan()
    privacy: PrivacyPlan = PrivacyPlan()
    rounds: RoundsPlan = RoundsPlan()
    protection: ProtectionPlan = ProtectionPlan()
    matching: MatchingPlan = MatchingPlan()
    secure_aggregation: SecureAggregationPlan = SecureAggregationPlan()

    @model_validator(mode="after")
    def _cohort_hides_its_members(self) -> Plan:
        minimum = self.rounds.minimum_cohort
        if self.protection.aggregation == "secure" and minimum < 3:
            raise ValueError(
                f'rounds.minimum_cohort {minimum} is too small for protection.aggregation = "secure": of two clients '
                'each could read the other\'s prompt off the mean; make it 3 or more, or ask for "plain"'
            )
        return self

    @model_validator(mode="after")
    def _matching_goes_with_the_rest(self) -> Plan:
        way, experts = self.protection.matching, self.protection.experts
        if way == "he" and experts != "sealed":
            raise ValueError(
                'protection.matching = "he" hides sketches of prompts that protection.experts = "plain" shows; seal '
                'the experts, or ask for matching = "plain" or "random"'
            )
        if way == "dp" and self.matching.epsilon is None:
            raise ValueError('protection.matching = "dp" needs matching.epsilon; give one, or ask for "he"')
        if self.matching.epsilon is not None and way not in ("dp", "he"):
            raise ValueError(f'matching.epsilon does nothing with protection.matching = "{way}"; leave it off')
        return self

    @model_validator(mode="after")
    def _class_names_distinct(self) -> Plan:
        seen: dict[str, str] = {}
        for name in self.class_names:
            key = normalise_class_name(name)
            if key in seen:
                raise ValueError(f"class_names: {seen[key]!r} and {name!r} are the same class")
            seen[key] = name
        return self

    @property
    def n_experts(self) -> int:
        """K: experts borrowed per client and round; PromptFL borrows none."""
        return self.mixture.experts if self.method == "pfedmoap" else 0

    @property
    def sealed_experts(self) -> bool:
        """Whether clients lend each other experts that the server cannot open."""
        return self.n_experts > 0 and self.protection.experts == "sealed"

    def with_matching(self, way: str) -> Plan:
        """This plan with another `protection.matching`. Raises PlanError where that does not go with the rest."""
        values = self.model_dump(by_alias=True)
        values["protection"]["matching"] = way
        try:
            return Plan.model_validate(values)
        except ValidationError as error:
            raise PlanError(f"--matching {way}: {first_problem(error)}") from None

    def to_json(self) -> str:
        """Canonical form: what `digest` is taken of and what travels."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 of the canonical form, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def unprotected(self) -> tuple[str, ...]:
        """One sentence for each protection that this plan leaves off: who can see what because of it."""
        sentences = []
        if self.protection.aggregation == "plain":
            sentences.append("aggregation = plain: the server sees every client's prompt and number of training images")
        if self.n_experts and self.protection.experts == "plain":
            sentences.append("experts = plain: the server sees every prompt that clients lend each other")
        if self.n_experts and self.protection.matching == "plain":
            sentences.append("matching = plain: the server sees every prompt that experts are matched on")
        sentences.append(NO_PRIVACY)
        if self.n_experts and self.mixture.form == "ensemble":
            sentences.append(
                "form = ensemble: peers also see what the gate learned, such as which classes its author has"
            )
        return tuple(sentences)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read the form that travels. Raises PlanError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"the plan that was received is invalid: {first_problem(error)}") from None

    @classmethod
    def from_toml(cls, path: Path) -> Plan:
        """Read a plan file. Raises PlanError with the file and the field that is wrong."""
        try:
            with path.open("rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise PlanError(f"{path}: cannot read the plan ({error.strerror}); give --plan a readable file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PlanError(f"{path}: not valid TOML ({error}); mend that line") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise PlanError(f"{path}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic report in one line: field, what is wrong, the value given."""
    problem = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "plan"
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    if problem["type"] == "missing":
        return f"{field} is missing; add it"
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a known setting; remove it or check its spelling"
    given = repr(problem.get("input"))
    return f"{field}: {message}" + (f" (given {given})" if problem["loc"] and len(given) <= 80 else "")
