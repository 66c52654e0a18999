"""Reading a layer by value: its ops may be any, if running them gives a weighted sum of experts'
rows.

In: a selection of experts. Out: a reading (ids, weights, a body by rows), proved in float64 over
typical inputs, each of which was changed alone (`power`); or a `Refusal`.

To add: an op in experts' bodies -> `rows`; what routing values a trial must meet -> `trials`.
"""
