"""Reading a layer op by op: a rule says what an op's result means, given what its inputs mean.

In: nodes after a selection. Out: a `Role` for each (`passes/roles.py`), or a `Refusal`.

To add a way to bring rows to experts: a rule in `dispatch_rules`; one for ops on rows: `row_rules`.
"""
