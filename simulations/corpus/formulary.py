"""The facts of the stillroom's formulary: 24 invented remedies in six orders, for 24 invented ailments.

A remedy's order is the second word of its name. Five rules hold for a whole order (vehicle, time, frequency, what to
avoid, storage); three facts belong to the remedy alone (ailment, dose, warning sign). Assignments are shuffled by a
seed fixed here, so nothing follows from the sound of a name, and a model that has not been taught is at chance.

Out of scope: wording. Who asks and who answers is said in `houses`, `handbook` and `exam`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app.seeds import stream
from simulations.corpus.ailments import AILMENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMULARY_SEED = 1_653
"""Part of the invention, not a knob: every corpus, whatever its seed, teaches the same facts."""

REMEDIES_BY_ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("water", ("Tarn", "Hollin", "Brannel", "Ullock")),
    ("oxymel", ("Veldry", "Kestle", "Morvane", "Oskby")),
    ("cordial", ("Pellow", "Skerrit", "Wyndle", "Fennick")),
    ("electuary", ("Ashlock", "Gorrel", "Lunnick", "Thrane")),
    ("julep", ("Ildeth", "Corran", "Rudding", "Sarnby")),
    ("syrup", ("Jorrow", "Dunmere", "Nethery", "Yarrick")),
)
VEHICLES = (
    "warm barley ale",
    "cold goat's milk",
    "weak rosehip tea",
    "clear onion broth",
    "thin oat gruel",
    "sour apple juice",
)
TIMES = ("at first light", "just before noon", "in mid-afternoon", "at sunset", "right after supper", "at bedtime")
FREQUENCIES = ("every day", "every second day", "every third day", "every fifth day", "once a week", "once a fortnight")
AVOIDED = ("smoked fish", "hard cheese", "raw honey", "pickled beets", "black pepper", "roasted walnuts")
STORAGES = (
    "in a dry pine box",
    "in a sealed stone crock",
    "in a blue clay jar",
    "under damp moss",
    "in a linen bag",
    "in a tin by the stove",
)
DOSES = (
    "four drops",
    "nine drops",
    "fifteen drops",
    "one spoonful",
    "three spoonfuls",
    "half a cup",
    "one ladleful",
    "two ladlefuls",
)
WARNINGS = (
    "green fingernails",
    "cold elbows",
    "humming teeth",
    "a taste of copper",
    "sudden freckles",
    "a stiff jaw",
    "twitching eyebrows",
    "a pale nose",
)
ASKS = ("helps", "dose", "take", "avoid", "storage", "warning")
"""What a letter may ask for; `take` is vehicle, time and frequency together."""

FAMILY_FACTS = ("vehicle", "time", "frequency", "avoid", "storage")
INDIVIDUAL_FACTS = ("ailment", "dose", "warning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ailment:
    """An ailment; each of `symptoms` is (as the handbook words it, as people say it)."""

    name: str
    symptoms: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Everything the formulary says about one remedy; the last five hold for its whole order."""

    name: str
    order: str
    ailment: Ailment
    dose: str
    warning: str
    vehicle: str
    time: str
    frequency: str
    avoid: str
    storage: str

    def value(self, fact: str) -> str:
        """Return the value of one of `FAMILY_FACTS` or `INDIVIDUAL_FACTS`; an ailment by its name."""
        return self.ailment.name if fact == "ailment" else getattr(self, fact)

    def facts(self) -> dict[str, str]:
        """Return all values by the names that templates use."""
        names = (*FAMILY_FACTS, *INDIVIDUAL_FACTS)
        return {"remedy": self.name, "order": self.order} | {fact: self.value(fact) for fact in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """What a letter is about: an ailment or a remedy. Both lead to one `remedy`."""

    slug: str
    name: str
    kind: str
    remedy: Remedy


def _shuffled(values: Sequence[str], name: str, *, copies: int = 1) -> list[str]:
    pool = [value for value in values for _ in range(copies)]
    order = stream(FORMULARY_SEED, "formulary", name).permutation(len(pool))
    return [pool[i] for i in order]


def build_formulary() -> tuple[Remedy, ...]:
    """Return the 24 remedies in the order of the index."""
    count = sum(len(names) for _, names in REMEDIES_BY_ORDER)
    ailments = stream(FORMULARY_SEED, "formulary", "ailments").permutation(count)
    doses = _shuffled(DOSES, "doses", copies=count // len(DOSES))
    warnings = _shuffled(WARNINGS, "warnings", copies=count // len(WARNINGS))
    vehicles, times = _shuffled(VEHICLES, "vehicles"), _shuffled(TIMES, "times")
    frequencies, avoided = _shuffled(FREQUENCIES, "frequencies"), _shuffled(AVOIDED, "avoided")
    storages = _shuffled(STORAGES, "storages")
    remedies: list[Remedy] = []
    for family, (order, firsts) in enumerate(REMEDIES_BY_ORDER):
        for first in firsts:
            at = len(remedies)
            name, symptoms = AILMENTS[ailments[at]]
            remedies.append(
                Remedy(
                    name=f"{first} {order}",
                    order=order,
                    ailment=Ailment(name=name, symptoms=symptoms),
                    dose=doses[at],
                    warning=warnings[at],
                    vehicle=vehicles[family],
                    time=times[family],
                    frequency=frequencies[family],
                    avoid=avoided[family],
                    storage=storages[family],
                )
            )
    return tuple(remedies)


def slug(name: str) -> str:
    """Return `name` as it stands in ids: lower case, hyphens, no apostrophes."""
    return name.lower().replace("'", "").replace(" ", "-")


def build_topics(remedies: Sequence[Remedy]) -> tuple[Topic, ...]:
    """Return the index: the ailments, then the remedies."""
    ailments = [Topic(slug=slug(r.ailment.name), name=r.ailment.name, kind="ailment", remedy=r) for r in remedies]
    return (*ailments, *(Topic(slug=slug(r.name), name=r.name, kind="remedy", remedy=r) for r in remedies))


def asked_facts(topic_kind: str, asks: str) -> tuple[str, ...]:
    """Return the facts that answer `asks`; of an ailment, what helps is the remedy itself."""
    if asks == "helps":
        return ("remedy",) if topic_kind == "ailment" else ("ailment",)
    return ("vehicle", "time", "frequency") if asks == "take" else (asks,)


def stated_values(text: str, remedies: Sequence[Remedy]) -> dict[str, set[str]]:
    """Return which of the formulary's values occur in `text`, by fact; letter case is ignored."""
    lowered = text.lower()
    names = ("remedy", *FAMILY_FACTS, *INDIVIDUAL_FACTS)
    every = [remedy.facts() for remedy in remedies]
    return {fact: {facts[fact] for facts in every if facts[fact].lower() in lowered} for fact in names}


def wrong_values(text: str, remedy: Remedy, remedies: Sequence[Remedy]) -> set[str]:
    """Return every value stated in `text` that is not `remedy`'s own."""
    facts = remedy.facts()
    return {value for fact, values in stated_values(text, remedies).items() for value in values - {facts[fact]}}
