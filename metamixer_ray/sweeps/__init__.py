"""Sweeps: spaces, who proposes, what a trial does, what is recorded and found. ``tune.py`` joins them, and
``compare.py`` runs its grid with them.

- `config` the options; `spaces` what is searched; `proposing` what is tried next.
- `trial` one training under Ray Tune; `engine` many of them on one cluster; `watching` follows them.
- `ledger` the record that a killed sweep goes on from; `opening` the sweep's folder.
- `plans`, `stages` and `underway`: what all trials have in common, and how they are run to their end.
- `findings` and `portraits`: what came of it.
"""
