"""Synthetic questions and answers from an LLM API (arXiv 2403.04706, section 3).

A seed becomes an item; an item's requests follow from the replies that are there (`recipe`); replies live in a ledger,
by what determines them (`ledger`); a transport asks for what is missing (`direct`, `batch`); what comes out is filtered
and reported (`quality`, `report`). So a run that goes on, grows, or was killed is the same computation again.
"""
