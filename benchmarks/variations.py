"""What can a small model vary? Each kind of variation on the same synthetic letters, by models that may write it.

    PYTHONPATH=. python benchmarks/variations.py [--texts 48] [--seed 7]

Per kind and writer: the mean cosine between a text and its variation (MiniLM), the share of variations whose own
parent is the nearest of all parents, the share that repeats the parent, the share that is well formed (filter
`length`, a finished sentence), and the share that names the topic of its control code. "another" is a fresh text of
the same code: a variation should be nearer than that and no worse in the rest.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from fl_app import embeddings, models
from fl_app.seeds import stream
from fl_app.types import CodedText, ControlCode
from simulations.corpus.codes import build_codes
from simulations.corpus.formulary import build_formulary, build_topics
from strategies.coded import DESCRIBED, SamplingSection, asked_for, drafted, evenly, fixed_adapter, unquoted
from strategies.filters.length import Length
from strategies.lab import Lab
from strategies.variations import VariationSection

if TYPE_CHECKING:
    from collections.abc import Sequence

START = "simulations/corpus/start"


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    frozen = models.load("smollm2-135m-instruct", "bfloat16")
    lab = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=24,
        public_words=frozenset(),
    )
    start, bare = lab.local_with(fixed_adapter(lab, START), "start"), lab.local_with(None, "bare")
    embed = embeddings.MiniLm(kind="minilm").build(frozen)
    made = {code.id: code for code in build_codes(build_topics(build_formulary()))}
    codes = [ControlCode(id=code.id, text=code.text) for code in made.values()]
    rng, sampling = stream(args.seed, "open"), SamplingSection()
    picked = evenly(codes, args.texts, rng)
    prompts = [code.text for code in picked]
    parents = [
        CodedText(code=code.id, text=text)
        for code, text in zip(picked, sampling.sample(start, prompts, rng), strict=True)
    ]
    origin = embed([one.text for one in parents])
    fit = Length(kind="length", min_words=5, max_words=120, require_end=True).build(lab)

    def figures(texts: Sequence[str], seconds: float = 0.0) -> dict[str, float]:
        cross = origin @ embed(texts).T
        own = np.diagonal(cross)
        drafts = drafted(texts, picked, method="measured", round_number=1)
        topics = [
            made[code.id].text.split(" about ")[1].split(",")[0].lower().split()[0].removesuffix("'s")
            for code in picked
        ]
        values = {
            "cosine": float(own.mean()),
            "nearest_is_parent": float((own >= cross.max(axis=0)).mean()),
            "repeats": float(np.mean([text == one.text for text, one in zip(texts, parents, strict=True)])),
            "well_formed": len(fit(drafts, ()).kept) / len(texts),
            "names_topic": float(np.mean([topic in text.lower() for topic, text in zip(topics, texts, strict=True)])),
            "words": float(np.mean([len(text.split()) for text in texts])),
            "cpu_s": seconds,
        }
        return {name: round(value, 2) for name, value in values.items()}

    found = {"parents": figures([one.text for one in parents])}
    found["another, start"] = figures(sampling.sample(start, prompts, rng))
    asked = [asked_for(bare, code, DESCRIBED) for code in picked]
    found["zero shot, bare"] = figures([unquoted(text) for text in sampling.sample(bare, asked, rng)])
    texts_of = {code.id: code.text for code in codes}
    for kind, who in (("continue", start), ("rephrase", bare), ("rephrase", start), ("fill", bare), ("fill", start)):
        began = time.process_time()
        section = VariationSection.model_validate({"kind": kind})
        varied = section.vary(who, parents, texts_of, stream(args.seed, kind))
        found[f"{kind}, {who.name}"] = figures([one.text for one in varied], time.process_time() - began)
    lab.close()
    print(json.dumps({"benchmark": "variations", "texts": args.texts, "seed": args.seed, "found": found}))


if __name__ == "__main__":
    main()
