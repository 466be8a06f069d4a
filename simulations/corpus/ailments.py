"""The ailments of the formulary and how they feel: content only.

Every symptom stands twice: first as the handbook words it, then as people say it. All of it is invented; no name
hints at a remedy, because remedies are assigned by a seeded shuffle in `simulations.corpus.formulary`.
"""

from __future__ import annotations

AILMENTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "glasswort cough",
        (
            ("a dry cough that rings like a cup", "coughing like a struck glass"),
            ("a taste of salt", "a salty mouth"),
            ("sore ribs at night", "ribs that ache in bed"),
        ),
    ),
    (
        "lantern eye",
        (
            ("halos around every flame", "rings round all the lights"),
            ("watering of one eye", "one eye that keeps running"),
            ("a dull ache behind the brow", "a thick pain over the eyes"),
        ),
    ),
    (
        "miller's drowse",
        (
            ("heavy sleepiness in the forenoon", "nodding off all morning"),
            ("slow speech", "words coming slow"),
            ("dusty lips", "lips dry as flour"),
        ),
    ),
    (
        "cobble knee",
        (
            ("clicking of the knees on stairs", "knees that crack on every step"),
            ("stiff legs on rising", "legs like planks on getting up"),
            ("a soft swelling below the kneecap", "a lump under the knee"),
        ),
    ),
    (
        "button numbness",
        (
            ("numb fingertips", "fingers that feel nothing"),
            ("dropping of small things", "dropping pins and coins"),
            ("white knuckles", "knuckles gone pale"),
        ),
    ),
    (
        "bellfounder's ear",
        (
            ("ringing in one ear", "a bell going in one ear"),
            ("giddiness on turning round", "a spinning head at every turn"),
            ("voices that sound muffled", "hearing people as if through wool"),
        ),
    ),
    (
        "weathercock fever",
        (
            ("heat and chill by turns", "hot one hour and frozen the next"),
            ("burning ears", "ears red as coals"),
            ("a restless pulse", "a pulse that will not settle"),
        ),
    ),
    (
        "sparrow flutter",
        (
            ("fluttering in the chest", "a bird beating in the chest"),
            ("short breath on a slope", "no breath going uphill"),
            ("sudden fright without cause", "getting scared of nothing"),
        ),
    ),
    (
        "ferry stomach",
        (
            ("a swaying feeling in the belly", "a belly that rolls about"),
            ("sour belching", "sour burps"),
            ("dislike of bread", "no wish for bread at all"),
        ),
    ),
    (
        "chalk tongue",
        (
            ("a white coating on the tongue", "a tongue gone all white"),
            ("loss of taste", "food tasting of nothing"),
            ("constant thirst", "always being thirsty"),
        ),
    ),
    (
        "rook's waking",
        (
            ("waking in the third hour of the night", "lying awake from three"),
            ("dreams of falling", "dreaming of dropping off roofs"),
            ("weariness in the morning", "being worn out by morning"),
        ),
    ),
    (
        "hedge itch",
        (
            ("red rings on the shins", "round red marks on the shins"),
            ("itching at dusk", "scratching as soon as it gets dark"),
            ("flaking skin", "skin coming off in flakes"),
        ),
    ),
    (
        "stovepipe throat",
        (
            ("a hoarse voice", "a voice like a crow"),
            ("a smoky taste", "tasting smoke all the time"),
            ("pain on swallowing", "swallowing that hurts"),
        ),
    ),
    (
        "mitten rash",
        (
            ("small bumps on the backs of the hands", "pimply hands"),
            ("burning palms", "palms hot as a griddle"),
            ("cracked skin between the fingers", "splits between the fingers"),
        ),
    ),
    (
        "plumbline back",
        (
            ("a dragging pain down the spine", "a pull straight down the back"),
            ("trouble bending forward", "no bending down for anything"),
            ("a lean to one side", "standing all crooked"),
        ),
    ),
    (
        "ribbon headache",
        (
            ("a tight band of pain around the head", "a head tied up like a parcel"),
            ("dislike of noise", "not bearing any noise"),
            ("prickling of the scalp", "a scalp full of pins"),
        ),
    ),
    (
        "gravel yawn",
        (
            ("yawning that grates in the jaw", "yawns that grind"),
            ("a rough feeling in the throat", "grit in the gullet"),
            ("yawning without tiredness", "yawning when wide awake"),
        ),
    ),
    (
        "candle sweat",
        (
            ("waxy sweat on the brow", "sweat like tallow on the forehead"),
            ("damp bedding", "sheets wet through"),
            ("trembling thighs", "wobbly thighs"),
        ),
    ),
    (
        "orchard shake",
        (
            ("shaking hands when reaching upward", "hands that shake when reaching up"),
            ("a nodding head", "a head that keeps nodding"),
            ("a weak grip", "no strength to hold a mug"),
        ),
    ),
    (
        "saddle cramp",
        (
            ("cramps in the hips", "hips seizing up"),
            ("a limping gait", "hobbling about"),
            ("tight hamstrings", "the backs of the legs like wire"),
        ),
    ),
    (
        "herring hiccup",
        (
            ("hiccups that last for hours", "hiccups from morning on"),
            ("a cold feeling under the breastbone", "a cold spot in the chest"),
            ("a jumping belly", "a stomach that jumps"),
        ),
    ),
    (
        "moth gloom",
        (
            ("low spirits in lamplight", "feeling low when the lamps are lit"),
            ("weeping without sorrow", "crying over nothing"),
            ("a wish to sit in corners", "hiding in corners"),
        ),
    ),
    (
        "puddle foot",
        (
            ("swollen ankles", "ankles like puddings"),
            ("a squelching feeling in the soles", "feet that feel wet when dry"),
            ("wrinkled toes", "toes like old plums"),
        ),
    ),
    (
        "needle gum",
        (
            ("sharp pricks in the gums", "gums stabbing away"),
            ("loose-feeling teeth", "teeth that feel wobbly"),
            ("pain from cold drinks", "wincing at a cold drink"),
        ),
    ),
)
