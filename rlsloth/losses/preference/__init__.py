"""Preference losses on sums of log-probs, per pair (DPO, ORPO, SimPO) or per completion (KTO).

``methods`` is the table of them, ``base`` what they share, and each loss has a file. The loss of a
step is the sum of its micro-batches' totals, however the step is divided into them.

Shape letters: P pairs of a micro-batch, B its labelled completions.
"""
