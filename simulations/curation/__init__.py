"""What a run would release, looked at before it is released: `make curate RUN=runs/<id>`.

curate.py     the command: figures as JSON, the page, the data card, the dataset
evidence.py   the texts of a run directory: drafts with their fate, lessons
funnel.py     from drafts written to lessons, by round, code and voice
diversity.py  distinct n-grams and self-BLEU
closeness.py  MAUVE against a public reference, from features that are handed in
copies.py     long runs of words that a draft shares with other texts; counts, never the texts
personal.py   the pii filter's engine over everything that would be released
card.py       the data card
dataset.py    the dataset on disk, stamped
page.py       the page for people
"""
